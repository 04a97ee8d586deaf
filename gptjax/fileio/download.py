"""Downloads of files with a pinned size and hash, and the settings of all downloads."""

import hashlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.errors import DataError, ResourceError
from gptjax.fileio.strict_json import open_regular_file

DOWNLOAD_TIMEOUT_SECONDS = 30  # without data from the server


class Pin(NamedTuple):
    """Expected size in bytes and hash of a file."""

    bytes: int
    sha256: str


def is_offline() -> bool:
    """True if the user disabled network access (GPTJAX_OFFLINE)."""
    return os.environ.get("GPTJAX_OFFLINE", "") not in ("", "0")


def sha256_of_files(paths: Sequence[Path]) -> str:
    """Computes the sha256 (hex) of the concatenated files."""
    digest = hashlib.sha256()
    for path in paths:
        with open_regular_file(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def check_pin(path: Path, pin: Pin, fix: str) -> None:
    """Raises DataError unless the file matches the pin; `fix` ends the message."""
    try:
        found = Pin(path.stat().st_size, sha256_of_files([path]))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}. {fix}") from error
    if found != pin:
        raise DataError(
            f"{path} does not match its pinned hash: {found.bytes} bytes with sha256 "
            f"{found.sha256}, expected {pin.bytes} bytes with sha256 {pin.sha256}. {fix}"
        )


class _BoundedFile(io.FileIO):
    """File that refuses to grow beyond a size, however much a server sends."""

    def __init__(self, path: str, max_bytes: int) -> None:
        super().__init__(path, "w")
        self.max_bytes = max_bytes

    def write(self, data: Any) -> int:
        """Writes a block of the download."""
        if self.tell() + len(data) > self.max_bytes:
            raise ValueError(f"the file has more than the pinned {self.max_bytes} bytes")
        return super().write(data)


def download_file(url: str, pin: Pin, target: Path, description: str) -> None:
    """Downloads a file to `target`, which appears only when complete and verified.

    Error messages call it `description`.
    """
    by_hand = f"Or copy the file yourself to {target}."
    if is_offline():
        raise DataError(
            f"{description} is not on this machine and GPTJAX_OFFLINE disables the "
            f"download of {url}. Unset GPTJAX_OFFLINE. {by_hand}"
        )
    import pooch

    get = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=DOWNLOAD_TIMEOUT_SECONDS)

    def download(fname: str, action: Any, pooch: Any, *, check_only: bool | None = None) -> None:
        with _BoundedFile(action, pin.bytes) as file:
            get(fname, file, pooch)
        os.chmod(action, 0o644)  # pooch creates it with mode 0600

    try:
        pooch.retrieve(url, f"sha256:{pin.sha256}", target.name, target.parent, downloader=download)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors
        raise ResourceError(
            f"cannot download {url}: {error}. Check the network and that {target.parent} "
            f"is writable, then try again. {by_hand}"
        ) from error
