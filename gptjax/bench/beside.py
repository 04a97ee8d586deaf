"""The same device with gptjax and with PyTorch, turn by turn.

Each side is a process of its own, and so is what measures gptjax alone: JAX would keep
the memory that the other one needs.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from gptjax.bench import machine, peers
from gptjax.bench.limits import NEW
from gptjax.bench.ours import scratch
from gptjax.bench.turns import Found, Side, against
from gptjax.errors import ConfigError, GptjaxError

TORCH = {"cpu": "cpu", "gpu": "cuda"}  # PyTorch's names for JAX's platforms
CACHES = {"cpu": ["dynamic"], "cuda": ["static", "dynamic"]}  # the fastest first
WRITTEN = (1, 8)  # rows at a time

Compared = tuple[Found, Found, float]


def bench_beside(
    say: Callable[[str], None],
    *,
    preset: str,
    context: int,
    pairs: int,
    sweep: Sequence[str],
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """All of `gptjax.bench.device`, then training and writing beside transformers.

    Args:
        say: gets each line.
        preset: size of the model.
        context: [T] of a row that is trained on.
        pairs: of turns.
        sweep: further flags of `gptjax bench --device`.
        only: of "train", "decode", "prefill"; all by default.

    Raises:
        ConfigError: PyTorch is not there, or is not for such a device.
        GptjaxError: gptjax alone could not be measured.
    """
    peers.needed("torch")
    peers.needed("transformers")
    found = alone(["--preset", preset, "--context", str(context), *sweep])
    if found["platform"] not in TORCH:
        raise ConfigError(
            f"--peers compares on CPUs and NVIDIA's GPUs, not on a {found['device']}, "
            "which PyTorch has no part for. Leave --peers."
        )
    device = TORCH[found["platform"]]
    if (not only or "train" in only) and "train_rows" in found:
        say("compiling on both sides, which takes a minute or two ...")
        found |= training(say, preset, context, pairs, device, found)
    if not only or "decode" in only:
        for rows in WRITTEN:
            found |= writing(say, preset, rows, pairs, device)
    return found


def alone(options: Sequence[str]) -> dict[str, Any]:
    """What `gptjax bench --device` finds, in a process that gives its memory back."""
    out = scratch() / "device.json"
    command = [sys.executable, "-m", "gptjax", "bench", "--device", *options]
    done = subprocess.run([*command, "--json", str(out)])
    if done.returncode:
        raise GptjaxError("gptjax alone could not be measured; it says why above.")
    return json.loads(out.read_text(encoding="utf-8"))


def training(
    say: Callable[[str], None],
    preset: str,
    context: int,
    pairs: int,
    device: str,
    found: dict[str, Any],
) -> dict[str, Any]:
    """With the rows that gptjax was best with, or half of them where it takes less."""
    best = found["train_rows"]
    for rows in dict.fromkeys((best, max(best // 2, 1))):
        work = {"preset": preset, "rows": rows, "context": context}
        ours = model_side("train", work, context, attention=found["train_attention"])
        theirs = Side("transformers_train", {**work, "device": device})
        if result := compared(say, ours, theirs, pairs):
            figures = told(say, "train", "device", result)
            return figures | {"train_rows_transformers_device": rows}
    return {}


def writing(
    say: Callable[[str], None], preset: str, rows: int, pairs: int, device: str
) -> dict[str, Any]:
    """Greedily, with the cache of transformers that is the fastest that works."""
    work = {"preset": preset, "rows": rows, "new": NEW}
    for cache in CACHES[device]:
        options = {"device": device, "cache": cache}
        theirs = Side("transformers_decode", work | options)
        result = compared(say, model_side("decode", work), theirs, pairs)
        if result:
            figures = told(say, "decode", f"device_b{rows}", result)
            return figures | {f"decode_cache_transformers_device_b{rows}": cache}
    return {}


def model_side(
    name: str, work: dict[str, Any], context: int = 1024, **model: Any
) -> Side:
    """Our part, in the dtype that gptjax takes on such a device."""
    length = max(context, 1024)
    return Side(name, {**work, "dtype": "auto", "context_length": length, **model})


def compared(
    say: Callable[[str], None], ours: Side, theirs: Side, pairs: int
) -> Compared | None:
    """Both rates and their ratio; nothing, said, where a side could not."""
    try:
        return against(ours, theirs, pairs)
    except GptjaxError as error:
        say(f"{theirs.name} with {theirs.options}: {error}")
        return None


def told(
    say: Callable[[str], None], name: str, tag: str, result: Compared
) -> dict[str, float]:
    """The three figures of a comparison, as they were said."""
    figures = list(machine.beside(name, "transformers", tag, "tokens/s", result))
    for figure in figures:
        say(f"{figure.key:<40}{figure.said}")
    return {figure.key: figure.value for figure in figures}
