"""What this machine does with gptjax, beside others, and beside its own limits.

Ratios above 1 mean that gptjax is faster; shares are of what the machine itself was
measured to do in the same minutes.
"""

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from gptjax import budget
from gptjax.bench.limits import step_bytes
from gptjax.bench.ours import PROMPT as BEFORE
from gptjax.bench.ours import config_of
from gptjax.bench.saving import save_times
from gptjax.bench.turns import Found, Side, against, alone, summary
from gptjax.run_folder import versions

CONTEXT = 256  # tokens of a row that is trained on
NEW = 128  # tokens that are written
PROMPT = 512  # tokens that are read
SECONDS = "s"  # the unit of what is said as a time and not as a rate


class Part(NamedTuple):
    """Something that gptjax does, and who else does it."""

    name: str  # of `gptjax.bench.ours.OURS` or COMMANDS
    tag: str  # in the names of the figures, if not ""
    unit: str
    others: tuple[str, ...]
    options: dict[str, int]


PARTS = (
    Part("train", "b2", "tokens/s", ("transformers",), {"rows": 2, "context": CONTEXT}),
    Part(
        "train",
        "b4",
        "tokens/s",
        ("transformers", "book"),
        {"rows": 4, "context": CONTEXT},
    ),
    Part("decode", "b1", "tokens/s", ("transformers",), {"rows": 1, "new": NEW}),
    Part("decode", "b8", "tokens/s", ("transformers",), {"rows": 8, "new": NEW}),
    Part(
        "prefill", "b1", "tokens/s", ("transformers",), {"rows": 1, "context": PROMPT}
    ),
    Part("load", "safetensors", "models/s", ("transformers",), {}),
    Part("input", "", "bytes/s", ("tiktoken",), {"workers": os.cpu_count() or 1}),
    Part("import", "", SECONDS, (), {}),
    Part("start", "", SECONDS, ("transformers",), {}),
    Part("compile", "b4", SECONDS, (), {"rows": 4, "context": CONTEXT}),
)


class Figure(NamedTuple):
    """A number with its name, and how it is said."""

    key: str
    value: float
    said: str


def bench_machine(
    say: Callable[[str], None],
    *,
    preset: str = "gpt2",
    peers: bool = False,
    pairs: int = 5,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Says a line for each figure, and returns all with the machine and the versions.

    Args:
        say: gets each line.
        preset: size of the model.
        peers: whether PyTorch's are timed too, turn by turn.
        pairs: of turns, or turns where there is no peer.
        only: names of the parts to measure; all by default.

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
    for figure in measured(preset, pairs, peers, only):
        numbers[figure.key] = figure.value
        say(f"{figure.key:<40}{figure.said}")
    return numbers


def measured(
    preset: str, pairs: int, peers: bool, only: Sequence[str]
) -> Iterator[Figure]:
    """Every figure of the parts that are asked for, as it is found."""
    for part in PARTS:
        if not only or part.name in only:
            yield from figures(part, preset, part.others if peers else (), pairs)
    if not only or "train" in only:
        yield from train_share(preset, pairs, peers)
    if not only or "decode" in only:
        yield from decode_share(preset, pairs)
        yield from decode_int8(preset, pairs)
    if not only or "save" in only:
        for key, times in save_times(config_of(preset), pairs).items():
            yield spanned(key, SECONDS, summary(times))


def figures(
    part: Part, preset: str, others: tuple[str, ...], pairs: int
) -> Iterator[Figure]:
    """The rate and the memory of a part, alone or beside each of the others."""
    name, tag, unit, _, options = part
    ours = Side(name, {"preset": preset, **options})
    if not others:
        found = alone(ours, pairs)
        yield rate(named(name, tag), unit, found)
        yield held(named(name, tag), found)
    for other in others:
        result = against(ours, Side(f"{other}_{name}", ours.options), pairs)
        yield from beside(name, other, tag, unit, result)
        yield held(named(name, tag), result[0])
        yield held(named(name, other, tag), result[1])


def beside(
    name: str, other: str, tag: str, unit: str, result: tuple[Found, Found, float]
) -> Iterator[Figure]:
    """The rates of both sides of `gptjax.bench.turns.against`, and their ratio."""
    one, two, ratio = result
    yield rate(named(name, tag), unit, one)
    yield rate(named(name, other, tag), unit, two)
    yield plain(named(name, "ratio", other, tag), ratio)


def named(*parts: str) -> str:
    """The key of a figure."""
    return "_".join(part for part in parts if part)


def train_share(preset: str, pairs: int, peers: bool) -> Iterator[Figure]:
    """Training at B = 8, and which share of the machine's matrix products it is.

    A token takes 6 FLOPs for each parameter that is multiplied.
    """
    ours = Side("train", {"preset": preset, "rows": 8, "context": CONTEXT})
    one, flops, share = against(ours, Side("matmul", {}), pairs)
    yield rate("train_b8", "tokens/s", one)
    yield rate("matmul", "FLOP/s", flops)
    if peers:
        yield rate("torch_matmul", "FLOP/s", alone(Side("torch_matmul", {}), pairs))
    config = config_of(preset)
    each = budget.flops_per_token(config) - budget.attention_flops(config)
    yield plain("train_share_of_matmul_rate_b8", share * each)


def decode_share(preset: str, pairs: int) -> Iterator[Figure]:
    """Writing one row, as a share of what reading weights and cache once allows."""
    ours = Side("decode", {"preset": preset, "rows": 1, "new": NEW})
    _, read, share = against(ours, Side("bandwidth", {}), pairs)
    yield rate("read", "bytes/s", read)
    each = step_bytes(config_of(preset), 1, BEFORE + NEW / 2)
    yield plain("decode_share_of_bandwidth_b1", share * each)


def decode_int8(preset: str, pairs: int) -> Iterator[Figure]:
    """Writing with weights in 8 bits beside writing with them as they are."""
    for rows in (1, 8):
        options = {"preset": preset, "rows": rows, "new": NEW}
        whole = Side("decode", {**options, "int8": True})
        one, _, ratio = against(whole, Side("decode", options), pairs)
        yield rate(f"int8_decode_b{rows}", "tokens/s", one)
        yield plain(f"int8_decode_ratio_fp32_b{rows}", ratio)


def rate(key: str, unit: str, found: Found) -> Figure:
    """A rate, or the time of one unit, with its least and its most."""
    if unit == SECONDS:
        found = Found(1 / found.middle, 1 / found.high, 1 / found.low)
    return spanned(key, unit, found)


def spanned(key: str, unit: str, found: Found) -> Figure:
    """A number of a unit, with its least and its most."""
    span = f"({found.low:.4g} to {found.high:.4g})"
    return Figure(key, found.middle, f"{found.middle:12.4g} {unit} {span}")


def held(key: str, found: Found) -> Figure:
    """The most memory that a side held."""
    return Figure(f"{key}_peak_bytes", found.peak, budget.human(found.peak))


def plain(key: str, value: float) -> Figure:
    """A ratio or a share."""
    return Figure(key, value, f"{value:12.3f}")
