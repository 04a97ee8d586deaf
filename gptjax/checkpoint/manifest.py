"""Checkpoint manifests: hashes of every file and of the manifest itself.

The manifest of a folder is written last. A folder is valid if it contains exactly the
files of its manifest, bit for bit.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gptjax.errors import ModelError
from gptjax.fileio.atomic import fsync
from gptjax.fileio.strict_json import read_json

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 26  # the manifest of a 124M model has 10 kB
HASH_THREADS = 4  # more threads do not read faster


class CorruptCheckpointError(ModelError):
    """Checkpoint that has changed since it was saved."""


def write_manifest(step_dir: Path, metadata: dict[str, Any]) -> None:
    """Writes the manifest of a complete folder and flushes all files to disk.

    Args:
        step_dir: folder of one step, without a manifest so far.
        metadata: JSON-serializable metadata; `files` is added.
    """
    for path in [step_dir, *step_dir.rglob("*")]:
        fsync(path)
    metadata = {**metadata, "files": hash_files(step_dir)}
    content = {"sha256": manifest_hash(metadata), "about": metadata}
    (step_dir / MANIFEST).write_text(json.dumps(content), encoding="utf-8")
    fsync(step_dir / MANIFEST)
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
        if not stat.S_ISREG(status.st_mode):
            raise CorruptCheckpointError(f"{MANIFEST} is not a regular file")
        content = read_json(path, MAX_MANIFEST_BYTES)
        metadata, expected_hash = content["about"], content["sha256"]
        is_valid = manifest_hash(metadata) == expected_hash and _is_valid_manifest(metadata)
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
                raise CorruptCheckpointError(f"{name!r} has {sizes[name]} bytes, a wrong size")
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
    is_valid_step = type(metadata["step"]) is int
    return (
        is_valid_step
        and isinstance(metadata.get("metadata", {}), dict)
        and all(
            isinstance(metadata[key], dict)
            and all(tuple(map(type, pair)) == types for pair in metadata[key].values())
            for key, types in value_types.items()
        )
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
