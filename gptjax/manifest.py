"""What makes a folder of files count: a manifest, written last, that names them all.

A folder verifies if it holds the files that its manifest names, bit for bit, and
nothing else; the manifest has a hash of itself.
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
from gptjax.strict_json import read_json

MANIFEST = "manifest.json"
LARGEST = 1 << 26  # bytes of a manifest; that of 124 M parameters has 10,000
THREADS = 4  # that hash; more do not read faster


class DamagedError(ModelError):
    """A saved step that is not what was saved."""


def write_manifest(folder: Path, about: dict[str, Any]) -> None:
    """Seals a folder whose files are all there, so that a power cut loses none.

    Args:
        folder: of one step; until now without a manifest.
        about: anything that JSON can hold; `files` is added.
    """
    for path in [folder, *folder.rglob("*")]:
        flush(path)
    about = {**about, "files": hashed(folder)}
    new = folder / f"{MANIFEST}.partial"
    with new.open("w", encoding="utf-8") as file:
        json.dump({"sha256": seal(about), "about": about}, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(folder / MANIFEST)
    flush(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest says; that the files are so is not known.

    Raises:
        DamagedError: it is missing, or not as it was written.
    """
    path = folder / MANIFEST
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise DamagedError("it is not a folder")
        now = path.lstat()
        if not stat.S_ISREG(now.st_mode) or now.st_size > LARGEST:
            raise DamagedError(f"{MANIFEST} is not a file of at most {LARGEST} bytes")
        table = read_json(path, LARGEST)
        about, known = table["about"], table["sha256"]
        right = seal(about) == known and well_formed(about)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"{MANIFEST} is missing or unreadable") from error
    if not right:
        raise DamagedError(f"{MANIFEST} is not what was saved")
    return about


def verified(folder: Path) -> dict[str, Any]:
    """What the manifest says, after all files were compared with it.

    Raises:
        DamagedError: with the file that is not what was saved.
    """
    about = read_manifest(folder)
    promised = about["files"]
    try:
        sizes = found(folder)
        for name in sorted(promised.keys() | sizes.keys()):
            if name not in sizes:
                raise DamagedError(f"{name!r} is missing")
            if name not in promised:
                raise DamagedError(f"{name!r} was not saved")
            if sizes[name] != promised[name][0]:
                raise DamagedError(f"{name!r} has {sizes[name]} bytes and not as many")
        for name, value in hashed(folder).items():
            if value != promised[name]:
                raise DamagedError(f"{name!r} is not what was saved")
    except OSError as error:
        raise DamagedError(f"it cannot be read: {error.strerror}") from error
    return about


def well_formed(about: Any) -> bool:
    """Whether it has the form that this version writes: `gptjax.checkpoint` reads it.

    Raises:
        LookupError: it lacks something.
    """
    pairs = {"files": (int, str), "arrays": (str, int)}
    return type(about["step"]) is int and all(
        isinstance(about[key], dict)
        and all(tuple(map(type, pair)) == kinds for pair in about[key].values())
        for key, kinds in pairs.items()
    )


def seal(about: Any) -> str:
    """The hash of what a manifest says, however it is written down."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def found(folder: Path) -> dict[str, int]:
    """Bytes of all below `folder` but its manifest; an empty folder ends in a slash.

    Raises:
        DamagedError: something is neither a file nor a folder, as a link is.
        OSError: something cannot be read.
    """
    return {name: size for name, size in walked(folder, "") if name != MANIFEST}


def walked(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    """Names and bytes of what is below, in order."""
    with os.scandir(folder) as entries:
        below = sorted(entries, key=lambda entry: entry.name)
    for entry in below:
        name, now = prefix + entry.name, entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(now.st_mode):
            inside = [*walked(folder / entry.name, f"{name}/")]
            yield from inside or [(f"{name}/", 0)]
        elif stat.S_ISREG(now.st_mode):
            yield name, now.st_size
        else:
            raise DamagedError(f"{name!r} is neither a file nor a folder")


def hashed(folder: Path) -> dict[str, list[Any]]:
    """Size in bytes and sha256 of all that `found` finds, several at a time."""
    sizes = found(folder)

    def entry(name: str) -> list[Any]:
        if name.endswith("/"):
            return [0, ""]
        with (folder / name).open("rb") as file:
            return [sizes[name], hashlib.file_digest(file, "sha256").hexdigest()]

    with ThreadPoolExecutor(THREADS, "hash") as threads:
        return dict(zip(sizes, threads.map(entry, sizes), strict=True))


def flush(path: Path) -> None:
    """Makes what a file or folder holds survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
