"""Checkpoint manifests: hashes of every file and of the manifest itself.

The manifest of a folder is written last. A folder is valid if it contains exactly the
files of its manifest, bit for bit.
"""

import hashlib
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gptjax.errors import ModelError
from gptjax.fileio.atomic import fsync, write_atomic
from gptjax.fileio.strict_json import read_json

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 26  # the manifest of a 124M model has 10 kB
HASH_THREADS = 4  # more threads do not read faster


class CorruptCheckpointError(ModelError):
    """Checkpoint that has changed since it was saved."""


def write_manifest(step_dir: Path, contents: dict[str, Any]) -> None:
    """Writes the manifest of a complete folder and flushes all files to disk.

    The contents are `step`, `arrays` and `metadata`; `files` is added.
    """
    for path in [step_dir, *step_dir.rglob("*")]:
        fsync(path)
    contents = {**contents, "files": hash_files(step_dir)}
    manifest = {"sha256": contents_hash(contents), "about": contents}
    write_atomic(step_dir / MANIFEST, json.dumps(manifest), MAX_MANIFEST_BYTES)
    fsync(step_dir)  # without temporary files


def read_manifest(step_dir: Path) -> dict[str, Any]:
    """Reads and checks the manifest, but not the files that it lists."""
    if step_dir.is_symlink() or not step_dir.is_dir():
        raise CorruptCheckpointError("it is not a folder")
    try:
        manifest = read_json(step_dir / MANIFEST, MAX_MANIFEST_BYTES)
        contents = manifest["about"]
        is_unchanged = contents_hash(contents) == manifest["sha256"]
        _ = contents["step"], contents["files"], contents["arrays"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{MANIFEST} is missing or unreadable") from error
    if not is_unchanged:
        raise CorruptCheckpointError(f"{MANIFEST} has changed since it was saved")
    return contents


def verify_manifest(step_dir: Path) -> dict[str, Any]:
    """Reads the manifest and verifies all files against it."""
    contents = read_manifest(step_dir)
    expected = contents["files"]
    try:
        found = hash_files(step_dir)
    except OSError as error:
        raise CorruptCheckpointError(f"it cannot be read: {error.strerror}") from error
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            raise CorruptCheckpointError(f"{name!r} is missing")
        if name not in expected:
            raise CorruptCheckpointError(f"{name!r} is not listed in {MANIFEST}")
        if found[name] != expected[name]:
            raise CorruptCheckpointError(f"{name!r} has changed since it was saved")
    return contents


def contents_hash(contents: Any) -> str:
    """SHA-256 of the contents, independent of key order and formatting."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def hash_files(step_dir: Path) -> dict[str, list[Any]]:
    """Size and SHA-256 of each file but the manifest, by name.

    Names of empty folders end in a slash.
    """
    names = []
    for path in step_dir.rglob("*"):
        name, mode = path.relative_to(step_dir).as_posix(), path.lstat().st_mode
        if stat.S_ISDIR(mode):
            names += [] if any(path.iterdir()) else [f"{name}/"]
        elif not stat.S_ISREG(mode):
            raise CorruptCheckpointError(f"{name!r} is neither a file nor a folder")
        elif name != MANIFEST:
            names.append(name)

    def size_and_hash(name: str) -> list[Any]:
        if name.endswith("/"):
            return [0, ""]
        with (step_dir / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return [file.tell(), digest]

    with ThreadPoolExecutor(HASH_THREADS, "hash") as executor:
        return dict(zip(names, executor.map(size_and_hash, names), strict=True))
