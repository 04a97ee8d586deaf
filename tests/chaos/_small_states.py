"""A training state of a few arrays, and what its saved form has to come back as."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checkpoint.checkpoint import restore_latest
from gptjax.tree import flatten_with_names


def state_at(step: int) -> dict[str, Any]:
    """NumPy's arrays of several sizes and dtypes, other ones in each step."""
    rng = np.random.default_rng(step)

    def normal(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    return {
        "step": np.array(step, np.int32),
        "params": {"kernel": normal(32, 16), "bias": normal(16)},
        "moments": (normal(8, 16).astype(jnp.bfloat16), np.array(step, np.int32)),
    }


def bits(tree: Any) -> dict[str, bytes]:
    """All that makes a tree what it is."""
    return {
        name: f"{leaf.dtype}{leaf.shape}".encode() + np.asarray(leaf).tobytes()
        for name, leaf in flatten_with_names(tree).items()
    }


def resume_fault(folder: Path, expected: set[int | None]) -> str:
    """Returns the fault of resuming a run in the folder, or ""."""
    resumed = restore_latest(folder, jax.tree.map(jnp.asarray, state_at(0)))
    if resumed.step not in expected:
        return f"it goes on from step {resumed.step}, and not from {expected}"
    if resumed.step is None:
        return ""
    if bits(resumed.tree) != bits(state_at(resumed.step)):
        return f"step {resumed.step} came back with other values"
    return ""
