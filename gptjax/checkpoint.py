"""Training state on disk: Orbax writes the arrays, a manifest makes them count.

    checkpoints/<step>/state/          what Orbax wrote
    checkpoints/<step>/manifest.json   size and sha256 of every file, written last

A step is built under a temporary name and renamed when it is complete, so a folder
named by a number is whole unless something changed it later. Orbax loads flipped
bits without a word, hence the hashes: only a step whose files all match counts.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental.multihost_utils import (
    broadcast_one_to_all,
    sync_global_devices,
)

from gptjax.errors import ModelError
from gptjax.tree import named_leaves

MANIFEST = "manifest.json"


def save(folder: Path, step: int, tree: Any, keep: int) -> None:
    """Saves `tree` as `step`, then deletes all but the newest `keep` steps.

    Raises:
        ModelError: the folder cannot be written; earlier steps are untouched.
    """
    building, main = folder / f"{step}.partial", jax.process_index() == 0
    try:
        if main:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(building, ignore_errors=True)
        sync_global_devices("checkpoint begun")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(building.absolute() / "state", tree)
        if main:
            seal(folder, step, tree)
        sync_global_devices("checkpoint sealed")
    except OSError as error:
        raise ModelError(
            f"cannot save step {step} in {folder}: {error}. Free space or name "
            "another run folder; earlier checkpoints are kept."
        ) from error
    if main:
        for old in saved_steps(folder)[:-keep]:
            shutil.rmtree(folder / str(old))


def seal(folder: Path, step: int, tree: Any) -> None:
    """Writes the manifest of a step that is all there, and gives it its name."""
    building, final = folder / f"{step}.partial", folder / str(step)
    about = {"step": step, "arrays": described(tree), "files": hashed(building)}
    with (building / MANIFEST).open("w") as file:
        json.dump(about, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)  # only ever one that did not verify
    building.rename(final)
    flush_folder(folder)


def saved_steps(folder: Path) -> list[int]:
    """Steps that have a folder, oldest first; whether they are whole is not known."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def latest(folder: Path) -> tuple[int | None, list[str]]:
    """The newest step that verifies (None: nothing was ever saved), and complaints.

    Of many processes, the first looks and tells the others.

    Raises:
        ModelError: steps were saved, and none of them verifies.
    """
    if jax.process_count() == 1:
        return newest(folder)
    step, complaints = newest(folder) if jax.process_index() == 0 else (None, [])
    told = int(broadcast_one_to_all(np.int32(-1 if step is None else step)))
    return (None if told < 0 else told), complaints


def newest(folder: Path) -> tuple[int | None, list[str]]:
    """`latest` as one process finds it.

    A step that does not verify is set aside as `<step>.damaged`.

    Raises:
        ModelError: steps were saved, and none of them verifies.
    """
    complaints = []
    for step in reversed(saved_steps(folder)):
        fault = damage(folder / str(step))
        if fault is None:
            return step, complaints
        aside = folder / f"{step}.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        (folder / str(step)).rename(aside)
        complaints.append(f"checkpoint {step} is damaged: {fault}; see {aside}.")
    if complaints or (folder.is_dir() and list(folder.glob("*.damaged"))):
        raise ModelError(
            f"no checkpoint in {folder} can be trusted. {' '.join(complaints)} "
            "Restore the folder from a copy, or start again with another --run."
        )
    return None, complaints


def restore(folder: Path, step: int, like: Any) -> Any:
    """The saved tree, with the structure, dtypes and sharding of `like`.

    Raises:
        ModelError: the saved arrays have other names, shapes or dtypes.
    """
    about = json.loads((folder / str(step) / MANIFEST).read_text())
    if about["arrays"] != described(like):
        names = set(about["arrays"].items() ^ described(like).items())
        raise ModelError(
            f"checkpoint {step} in {folder} holds other arrays than this model and "
            f"optimiser: {sorted({name for name, _ in names})[:3]}. Use the config it "
            "was saved with, or another --run."
        )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((folder / str(step)).absolute() / "state", abstract)


def described(tree: Any) -> dict[str, str]:
    """Dtype and shape of every leaf by name."""
    leaves = named_leaves(tree)
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def hashed(folder: Path) -> dict[str, list[Any]]:
    """Size in bytes and sha256 of every file below `folder`, by relative path."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            name = path.relative_to(folder).as_posix()
            files[name] = [path.stat().st_size, digest]
    return files


def damage(folder: Path) -> str | None:
    """What is wrong with one saved step, or None."""
    try:
        about = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        promised = about["files"]
        if about["step"] != int(folder.name) or not isinstance(promised, dict):
            return f"{MANIFEST} belongs to another step"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"{MANIFEST} is missing or unreadable"
    found = hashed(folder)
    for name in sorted(set(promised) | set(found)):
        if promised.get(name) != found.get(name):
            return f"{name} is not what was saved"
    return None


def flush_folder(folder: Path) -> None:
    """Makes renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
