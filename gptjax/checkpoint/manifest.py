"""Checkpoint manifest: written last, hashes every file.

A folder is valid if it contains exactly the files listed in its manifest, bit for bit.
The manifest contains a hash of itself.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gptjax.errors import ModelError
from gptjax.fileio.strict_json import read_json

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 26  # the manifest of a 124M model has 10 kB
HASH_THREADS = 4  # more threads do not read faster


class CorruptCheckpointError(ModelError):
    """A checkpoint whose content differs from what was saved."""


def write_manifest(step_dir: Path, metadata: dict[str, Any]) -> None:
    """Writes the manifest of a complete folder and flushes all files to disk.

    Args:
        step_dir: folder of one step, without a manifest so far.
        metadata: JSON-serializable metadata; `files` is added.
    """
    for path in [step_dir, *step_dir.rglob("*")]:
        fsync(path)
    metadata = {**metadata, "files": hash_files(step_dir)}
    partial_path = step_dir / f"{MANIFEST}.partial"
    with partial_path.open("w", encoding="utf-8") as file:
        json.dump({"sha256": manifest_hash(metadata), "about": metadata}, file)
        file.flush()
        os.fsync(file.fileno())
    partial_path.replace(step_dir / MANIFEST)
    fsync(step_dir)


def read_manifest(step_dir: Path) -> dict[str, Any]:
    """Reads and checks the manifest, but not the files that it lists.

    Raises:
        CorruptCheckpointError: the manifest is missing or modified.
    """
    path = step_dir / MANIFEST
    try:
        if not stat.S_ISDIR(step_dir.lstat().st_mode):
            raise CorruptCheckpointError("it is not a folder")
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_MANIFEST_BYTES:
            raise CorruptCheckpointError(
                f"{MANIFEST} is not a file of at most {MAX_MANIFEST_BYTES} bytes"
            )
        content = read_json(path, MAX_MANIFEST_BYTES)
        metadata, expected_hash = content["about"], content["sha256"]
        is_valid = manifest_hash(metadata) == expected_hash and _is_valid_manifest(
            metadata
        )
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        if isinstance(error, CorruptCheckpointError):
            raise
        raise CorruptCheckpointError(f"{MANIFEST} is missing or unreadable") from error
    if not is_valid:
        raise CorruptCheckpointError(f"{MANIFEST} has changed since it was saved")
    return metadata


def verify_manifest(step_dir: Path) -> dict[str, Any]:
    """Reads the manifest and verifies all files against it.

    Raises:
        CorruptCheckpointError: a file is missing, unexpected or modified.
    """
    metadata = read_manifest(step_dir)
    expected = metadata["files"]
    try:
        sizes = list_files(step_dir)
        for name in sorted(expected.keys() | sizes.keys()):
            if name not in sizes:
                raise CorruptCheckpointError(f"{name!r} is missing")
            if name not in expected:
                raise CorruptCheckpointError(f"{name!r} is not listed in {MANIFEST}")
            if sizes[name] != expected[name][0]:
                raise CorruptCheckpointError(
                    f"{name!r} has {sizes[name]} bytes, a wrong size"
                )
        for name, value in hash_files(step_dir).items():
            if value != expected[name]:
                raise CorruptCheckpointError(f"{name!r} has changed since it was saved")
    except OSError as error:
        raise CorruptCheckpointError(f"it cannot be read: {error.strerror}") from error
    return metadata


def _is_valid_manifest(metadata: Any) -> bool:
    """True if the metadata has the format that this version writes.

    Raises:
        LookupError: a key is missing.
    """
    value_types = {"files": (int, str), "arrays": (str, int)}
    return type(metadata["step"]) is int and all(
        isinstance(metadata[key], dict)
        and all(tuple(map(type, pair)) == types for pair in metadata[key].values())
        for key, types in value_types.items()
    )


def manifest_hash(metadata: Any) -> str:
    """Returns a hash of the metadata, independent of key order and formatting."""
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def list_files(step_dir: Path) -> dict[str, int]:
    """Returns the size of each file in `step_dir`, in bytes, without the manifest.

    Names of empty folders end in a slash.

    Raises:
        CorruptCheckpointError: an entry is neither a file nor a folder (e.g. a link).
        OSError: an entry cannot be read.
    """
    return {name: size for name, size in _walk(step_dir, "") if name != MANIFEST}


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    """Yields the names and sizes of all files in `folder`, sorted by name."""
    with os.scandir(folder) as entries:
        children = sorted(entries, key=lambda entry: entry.name)
    for entry in children:
        name, status = prefix + entry.name, entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            nested = [*_walk(folder / entry.name, f"{name}/")]
            yield from nested or [(f"{name}/", 0)]
        elif stat.S_ISREG(status.st_mode):
            yield name, status.st_size
        else:
            raise CorruptCheckpointError(f"{name!r} is neither a file nor a folder")


def hash_files(step_dir: Path) -> dict[str, list[Any]]:
    """Returns the size and SHA-256 of all files of `list_files`; multithreaded."""
    sizes = list_files(step_dir)

    def size_and_hash(name: str) -> list[Any]:
        if name.endswith("/"):
            return [0, ""]
        with (step_dir / name).open("rb") as file:
            return [sizes[name], hashlib.file_digest(file, "sha256").hexdigest()]

    with ThreadPoolExecutor(HASH_THREADS, "hash") as executor:
        return dict(zip(sizes, executor.map(size_and_hash, sizes), strict=True))


def fsync(path: Path) -> None:
    """Flushes a file or folder to disk, so that it survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


MIN_KEEP = 2  # valid steps that are always kept
STEP_PATTERN = re.compile(r"(0|[1-9]\d{0,17})", re.ASCII)
LEFTOVER_PATTERN = re.compile(rf"{STEP_PATTERN.pattern}\.(partial|replaced)", re.ASCII)


def list_steps(checkpoint_dir: Path) -> list[int]:
    """Returns the steps that have a folder, in ascending order, without verifying."""
    return sorted(
        int(name)
        for name in _entry_names(checkpoint_dir)
        if STEP_PATTERN.fullmatch(name)
    )


def _entry_names(folder: Path) -> list[str]:
    """Returns the names of all entries; none if there is no such folder."""
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def clean_partial(checkpoint_dir: Path) -> None:
    """Removes partial and replaced steps left by a killed process."""
    for name in _entry_names(checkpoint_dir):
        if match := LEFTOVER_PATTERN.fullmatch(name):
            step_dir = checkpoint_dir / match[1]
            if match[2] == "replaced" and not step_dir.exists():
                (checkpoint_dir / name).rename(step_dir)
            else:
                remove_path(checkpoint_dir / name)


def latest_valid_step(checkpoint_dir: Path) -> tuple[int | None, list[str]]:
    """Returns the newest valid step (None if no step was ever saved) and warnings.

    Quarantines invalid steps, so only the process that writes the run may call it.

    Raises:
        ModelError: the folder is not empty but has no valid step.
    """
    warnings: list[str] = []
    try:
        clean_partial(checkpoint_dir)
        for step in reversed(list_steps(checkpoint_dir)):
            if (problem := check_step(checkpoint_dir, step)) is None:
                return step, warnings
            warnings.append(quarantine(checkpoint_dir, step, problem))
        leftover_names = sorted(_entry_names(checkpoint_dir))
    except OSError as error:
        raise ModelError(
            f"cannot read the checkpoints in {checkpoint_dir}: {error}. Repair the folder, or "
            "choose another --run."
        ) from error
    if leftover_names:
        details = (
            " ".join(warnings)
            or f"It contains {', '.join(map(repr, leftover_names[:3]))}."
        )
        raise ModelError(
            f"no valid checkpoint in {checkpoint_dir}. {details} "
            "Restore the folder from a backup, or choose another --run."
        )
    return None, warnings


def check_step(checkpoint_dir: Path, step: int) -> str | None:
    """Verifies one step; returns the problem, or None if it is valid."""
    try:
        metadata = verify_manifest(checkpoint_dir / str(step))
    except CorruptCheckpointError as error:
        return str(error)
    return (
        None if metadata["step"] == step else f"it is a copy of step {metadata['step']}"
    )


def quarantine(checkpoint_dir: Path, step: int, problem: str) -> str:
    """Renames an invalid step to `<step>.damaged` and returns a warning."""
    quarantine_dir = checkpoint_dir / f"{step}.damaged"
    remove_path(quarantine_dir)
    (checkpoint_dir / str(step)).rename(quarantine_dir)
    fsync(checkpoint_dir)
    return f"checkpoint {step} is damaged: {problem}. It was moved to {quarantine_dir}."


def begin_step(checkpoint_dir: Path, step: int) -> Path:
    """Returns an unused path for writing a step."""
    partial_dir = checkpoint_dir / f"{step}.partial"
    checkpoint_dir.mkdir(parents=True, exist_ok=True)
    remove_path(partial_dir)
    return partial_dir


def commit_step(checkpoint_dir: Path, step: int) -> None:
    """Renames a complete step to its final name, then deletes any old version."""
    step_dir, replaced_dir = (
        checkpoint_dir / str(step),
        checkpoint_dir / f"{step}.replaced",
    )
    if step_dir.exists():
        remove_path(replaced_dir)
        step_dir.rename(replaced_dir)
    (checkpoint_dir / f"{step}.partial").rename(step_dir)
    fsync(checkpoint_dir)
    remove_path(replaced_dir)


def apply_retention(checkpoint_dir: Path, step: int, keep: int) -> None:
    """Deletes all but the newest `keep` steps, after `step` was committed.

    Nothing is deleted unless another step verifies, since steps may have been modified
    after saving. The newest such step is kept too, even if it is older.

    Args:
        checkpoint_dir: checkpoint folder of the run.
        step: newest step, just committed.
        keep: number of steps to keep, at least `MIN_KEEP`.
    """
    older = [n for n in list_steps(checkpoint_dir) if n < step]
    surplus = older[: max(len(older) + 1 - max(keep, MIN_KEEP), 0)]
    if not surplus:
        return
    valid_steps = (n for n in reversed(older) if check_step(checkpoint_dir, n) is None)
    if (fallback := next(valid_steps, None)) is not None:
        for surplus_step in surplus:
            if surplus_step != fallback:
                delete_step(checkpoint_dir, surplus_step)


def delete_after(checkpoint_dir: Path, step: int) -> None:
    """Deletes all steps after `step`, for example before a rollback to it."""
    for later_step in reversed(list_steps(checkpoint_dir)):
        if later_step > step:
            delete_step(checkpoint_dir, later_step)


def delete_step(checkpoint_dir: Path, step: int) -> None:
    """Deletes a step; it is renamed first, so that it is never partly valid."""
    partial_dir = checkpoint_dir / f"{step}.partial"
    remove_path(partial_dir)
    (checkpoint_dir / str(step)).rename(partial_dir)
    remove_path(partial_dir)


def remove_path(path: Path) -> None:
    """Deletes a folder, file or link if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
