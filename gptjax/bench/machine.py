"""What this machine does with gptjax, beside others, and beside its own limits.

Ratios above 1 mean that gptjax is faster; shares are of what the machine itself was
measured to do in the same minutes.
"""

import os
import platform
from collections.abc import Callable
from typing import Any

from gptjax import budget
from gptjax.bench.ours import config_of
from gptjax.bench.turns import Found, Side, against, alone
from gptjax.run_folder import versions

CONTEXT = 256  # tokens of a row that is trained on
NEW = 64  # tokens that are written
PROMPT = 512  # tokens that are read


def bench_machine(
    say: Callable[[str], None],
    *,
    preset: str = "gpt2",
    peers: bool = False,
    pairs: int = 5,
    only: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Says a line for each figure, and returns all with the machine and the versions.

    Args:
        say: gets each line.
        preset: size of the model.
        peers: whether PyTorch's are timed too, turn by turn.
        pairs: of turns, or turns where there is no peer.
        only: the parts to measure: train, decode, prefill, load; all by default.

    Raises:
        GptjaxError: a peer is not installed.
    """
    numbers: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "preset": preset,
        "pairs": pairs,
    }
    say(f"machine    {numbers['machine']}; XLA_FLAGS={numbers['xla_flags']!r}")

    def tell(key: str, unit: str, found: Found) -> None:
        numbers[key] = found.middle
        span = f"{found.low:.4g} to {found.high:.4g}"
        say(f"{key:<40}{found.middle:12.4g} {unit} ({span})")

    def compare(
        part: str, tag: str, unit: str, others: tuple[str, ...], **options: Any
    ) -> None:
        if only and part not in only:
            return
        ours = Side(part, {"preset": preset, **options})
        if not peers:
            tell(f"{part}_{tag}", unit, alone(ours, pairs))
        for other in others if peers else ():
            theirs = Side(f"{other}_{part}", ours.options)
            one, two, ratio = against(ours, theirs, pairs)
            tell(f"{part}_{tag}", unit, one)
            tell(f"{part}_{other}_{tag}", unit, two)
            numbers[f"{part}_ratio_{other}_{tag}"] = ratio
            say(f"{f'{part}_ratio_{other}_{tag}':<40}{ratio:12.3f}")

    tokens = "tokens/s"
    compare("train", "b2", tokens, ("transformers",), rows=2, context=CONTEXT)
    compare("train", "b4", tokens, ("transformers", "book"), rows=4, context=CONTEXT)
    compare("decode", "b1", tokens, ("transformers",), rows=1, new=NEW)
    compare("decode", "b8", tokens, ("transformers",), rows=8, new=NEW)
    compare("prefill", "b1", tokens, ("transformers",), rows=1, context=PROMPT)
    compare("load", "safetensors", "models/s", ("transformers",))
    if not only or "train" in only:
        train_share(numbers, tell, say, preset, peers, pairs)
    if not only or "decode" in only:
        decode_share(numbers, tell, say, preset, pairs)
    return numbers


def train_share(
    numbers: dict[str, Any], tell: Any, say: Any, preset: str, peers: bool, pairs: int
) -> None:
    """Training at B = 8 as a share of the machine's own matrix products.

    FLOPs are those of `gptjax.budget.flops_per_token`: 6 P + 12 N D T.
    """
    ours = Side("train", {"preset": preset, "rows": 8, "context": CONTEXT})
    one, rate, share = against(ours, Side("matmul", {}), pairs)
    tell("train_b8", "tokens/s", one)
    tell("matmul_flops", "FLOP/s", rate)
    if peers:
        tell("torch_matmul_flops", "FLOP/s", alone(Side("torch_matmul", {}), pairs))
    config = config_of(preset)
    each = budget.flops_per_token(config) - budget.attention_flops(config)
    numbers["train_share_of_matmul_rate_b8"] = share * each
    say(f"{'train_share_of_matmul_rate_b8':<40}{share * each:12.3f}")


def decode_share(
    numbers: dict[str, Any], tell: Any, say: Any, preset: str, pairs: int
) -> None:
    """Decoding of one row as a share of what reading all parameters once allows."""
    ours = Side("decode", {"preset": preset, "rows": 1, "new": NEW})
    one, rate, share = against(ours, Side("bandwidth", {}), pairs)
    tell("decode_b1", "tokens/s", one)
    tell("read_bytes", "bytes/s", rate)
    size = 4 * budget.parameter_count(config_of(preset))
    numbers["decode_share_of_bandwidth_b1"] = share * size
    say(f"{'decode_share_of_bandwidth_b1':<40}{share * size:12.3f}")
