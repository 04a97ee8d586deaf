"""A damaged checkpoint is never loaded as if it were intact.

The newer of two steps is altered. Either its values come back bit for bit, as when
equal files were swapped, or it is set aside, with a complaint, for the older one.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checkpoint import manifest
from gptjax.checkpoint.checkpoint import latest_step, restore_latest, write_step
from tests.chaos._damage import damage_bytes, flip_bit

FULL, SLICE = 10_000, 70


def state_at(step: int) -> dict[str, Any]:
    """Arrays of several sizes, dtypes and magnitudes, other ones in each step."""
    rng = np.random.default_rng(step)
    kernel, bias, moments = (
        (rng.normal(size=shape) * 2.0 ** rng.integers(-60, 60, shape)).astype(np.float32)
        for shape in ((32, 16), (16,), (8, 16))
    )
    return {
        "step": np.array(step, np.int32),
        "params": {"kernel": kernel, "bias": bias},
        "moments": (moments.astype(jnp.bfloat16), np.array(step, np.int32)),
    }


def resume_fault(folder: Path, expected: set[int | None]) -> str:
    """Returns the fault of resuming a run in the folder, or ""."""
    resumed = restore_latest(folder, jax.tree.map(jnp.asarray, state_at(0)))
    if resumed.step not in expected:
        return f"resumed from step {resumed.step} instead of {expected}"
    if resumed.step is None:
        return ""
    is_same = jax.tree.map(has_same_bits, resumed.tree, state_at(resumed.step))
    return "" if jax.tree.all(is_same) else f"step {resumed.step} has other values: {is_same}"


def has_same_bits(one: Any, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and np.asarray(one).tobytes() == other.tobytes()


def pick_file(step: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path for path in step.rglob("*") if path.is_file()))


def damage_file(step: Path, rng: random.Random) -> None:
    path = pick_file(step, rng)
    data = path.read_bytes()
    path.unlink()
    new = rng.choice([*[damage_bytes(rng, data)] * 3, b"", data + rng.randbytes(9), None])
    if new is not None:
        path.write_bytes(new)


def swap_files(step: Path, rng: random.Random) -> None:
    one, other = pick_file(step, rng), pick_file(step, rng)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def replace_by_link(step: Path, rng: random.Random) -> None:
    path = rng.choice([step, *sorted(step.rglob("*"))])
    elsewhere = step.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def add_entry(step: Path, rng: random.Random) -> None:
    """Adds a file or folder to the step, or in place of a later one."""
    folder = pick_file(step, rng).parent
    names = [folder / name for name in ("more", ".hidden", "\udcff", "0" * 200)]
    path = rng.choice(names + [step.with_name(name) for name in ("3", "999999", "9" * 18)])
    copied = step if path.parent == step.parent else step.with_name("1")
    adders = [
        *(path.mkdir, path.touch, lambda: os.mkfifo(path), lambda: path.symlink_to(copied)),
        lambda: shutil.copytree(copied, path),
    ]
    rng.choice(adders)()


def edit_manifest(step: Path, rng: random.Random) -> None:
    path = step / manifest.MANIFEST
    content = json.loads(path.read_text())
    about = content["about"]
    table = rng.choice([content, about, about["files"], about["arrays"]])
    key = rng.choice(sorted(table))
    value = table.pop(key)
    other = rng.choice([None, [], {}, -1, 10**400, 0.5, "", True])
    table.update(rng.choice([{}, {f"{key}x": value}, {key: other}]))
    path.write_text(json.dumps(content))


def forge(step: Path, rng: random.Random) -> None:
    """Flips a bit of an array and rewrites the manifest to fit the files."""
    content = manifest.read_manifest(step)
    (step / manifest.MANIFEST).unlink()
    kernel = state_at(2)["params"]["kernel"].tobytes()  # too large to be among others
    (path,) = [p for p in step.rglob("*") if p.is_file() and kernel in p.read_bytes()]
    path.write_bytes(path.read_bytes().replace(kernel, flip_bit(kernel, rng)))
    manifest.write_manifest(step, content)


ALTERATIONS = [*(damage_file, swap_files, replace_by_link, add_entry, edit_manifest, forge)]


def prepare(folder: Path) -> Callable[[int, random.Random], str]:
    good, run = folder / "good", folder / "run"
    for step in (1, 2):
        write_step(good, step, state_at(step), keep=2)

    def check(case: int, rng: random.Random) -> str:
        shutil.rmtree(run, ignore_errors=True)
        steps = run / "checkpoints"
        shutil.copytree(good, steps)
        alter = ALTERATIONS[case % len(ALTERATIONS)]
        alter(steps / "2", rng)
        fault = resume_fault(steps, {1}) if alter is forge else latest_fault(steps)
        return fault and f"{alter.__name__}: {fault}"

    return check


def latest_fault(steps: Path) -> str:
    step, complaints = latest_step(steps)
    if step != 1:
        return resume_fault(steps, {2})
    if not any(steps.glob("*.damaged")) or "damaged" not in " ".join(complaints):
        return "the older step is used without a complaint"
    return ""
