"""What one device can do, and what it writes and reads beside that.

All of it is measured in the same run, with what was drawn or computed, not zeros: a
device may be faster with these.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from gptjax import budget
from gptjax.bench import ours
from gptjax.config import GPTConfig
from gptjax.model import compute_dtype

NEW = 128  # tokens that are written after a prompt of `ours.PROMPT`
WRITTEN = (1, 8, 64)  # rows at a time
READ = (1, 8)
TIMES = 5  # of which the median counts
# Sides of matrices, bytes of arrays, and how often each is computed before the host
# waits: waiting takes as long as a small product.
ON_CPU: tuple[int, int, int] = 1024, 1 << 28, 1
ON_OTHERS: tuple[int, int, int] = 8192, 1 << 31, 20


def speed(work: ours.Work, warm: int = 1) -> float:
    """Units per second, the median."""
    for _ in range(warm):
        work()
    found = []
    for _ in range(TIMES):
        started = time.perf_counter()
        units = work()
        found.append(units / (time.perf_counter() - started))
    return statistics.median(found)


def tried(
    say: Callable[[str], None], what: str, prepare: Callable[[], ours.Work]
) -> float | None:
    """The speed of a piece of work, or nothing, and why, as for want of memory."""
    try:
        return speed(prepare())
    except jax.errors.JaxRuntimeError as error:
        say(f"{what:<10} {reason(error)}")
        return None


def reason(error: Exception) -> str:
    """The start of what an error says; XLA's can be pages long."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def peak_bytes() -> int | None:
    """The most of a device's memory that was in use, where it counts that."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def own_rates(say: Callable[[str], None]) -> dict[str, float]:
    """FLOP/s of bfloat16 products, and bytes/s that are read, or read and written."""
    side, size, times = ON_CPU if jax.default_backend() == "cpu" else ON_OTHERS
    works: dict[str, Callable[[], ours.Work]] = {
        "matmul_bfloat16": lambda: ours.matmul(side, "bfloat16", times),
        "read": lambda: ours.bandwidth(size, times),
        "copy": lambda: ours.copying(size, times),
    }
    found = {}
    for name, prepare in works.items():
        if (rate := tried(say, name, prepare)) is not None:
            found[name] = rate
    if rate := found.get("matmul_bfloat16"):
        say(f"products   {rate / 1e12:.3g} TFLOP/s in bfloat16, {side} x {side}")
    if rate := found.get("read"):
        say(f"memory     {rate / 1e9:,.1f} GB/s when {budget.human(size)} are read")
    if rate := found.get("copy"):
        say(f"memory     {rate / 1e9:,.1f} GB/s read and written when they are copied")
    return found


def bandwidth_of(found: Mapping[str, Any]) -> float | None:
    """The higher of both rates of the memory, bytes/s."""
    return max((found[n] for n in ("read", "copy") if n in found), default=None)


def step_bytes(config: GPTConfig, rows: int, filled: int | float) -> float:
    """What writing a token of each row has to read, at least: E (M + 2 N D S B).

    E is the size of a number of the activations' dtype, in which parameters are
    multiplied; M are the parameters that are multiplied, so all but the position table
    (and but the token table where the head is another one); S of the slots of the
    cache are filled, for keys and values of each of B rows.
    """
    multiplied = budget.flops_per_token(config) - budget.attention_flops(config)
    cache = 2 * config.n_layers * config.d_model * filled * rows
    return compute_dtype(config).itemsize * (multiplied / 6 + cache)


def writing(
    config: GPTConfig, say: Callable[[str], None], bandwidth: float | None
) -> dict[str, float]:
    """Greedy tokens/s after a short prompt, which is read within that time.

    The share of the memory's limit is tokens/s over B x `bandwidth` / `step_bytes`,
    with the cache as full as it is on average.
    """
    new = min(NEW, config.context_length - ours.PROMPT)
    found: dict[str, float] = {}
    if new < 1:
        say(f"decode     not here: T = {config.context_length} has no room to write in")
        return found
    for rows in WRITTEN:
        rate = tried(say, "decode", lambda rows=rows: ours.decode(config, rows, new))
        if rate is None:
            break
        found[f"decode_b{rows}"] = rate
        share = ""
        if bandwidth:
            each = step_bytes(config, rows, ours.PROMPT + new / 2)
            found[f"decode_share_of_bandwidth_b{rows}"] = rate / rows * each / bandwidth
            share = f", {rate / rows * each / bandwidth:.1%} of what the memory allows"
        say(f"decode     {rows:>3} rows: {rate:12,.0f} tokens/s{share}")
    return found


def reading(config: GPTConfig, say: Callable[[str], None]) -> dict[str, float]:
    """Tokens/s of prompts as long as the context, up to the first new token."""
    found: dict[str, float] = {}
    length = config.context_length
    for rows in READ:
        rate = tried(
            say, "prefill", lambda rows=rows: ours.prefill(config, rows, length)
        )
        if rate is None:
            break
        found[f"prefill_b{rows}"] = rate
        say(f"prefill    {rows:>3} rows: {rate:12,.0f} tokens/s")
    return found
