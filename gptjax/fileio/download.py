"""Verified, resumable downloads.

Only this module and the LLM judge use the network. A download is written to NAME.part
next to the target; the next call resumes it after an interruption. The file is renamed
once it is complete and verified.
"""

import contextlib
import dataclasses
import errno
import hashlib
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedWriter
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from gptjax.errors import DataError
from gptjax.fileio import strict_json

DOWNLOAD_TIMEOUT_SECONDS = 30  # timeout without data from the server
DOWNLOAD_BLOCK_BYTES = 1 << 18  # bytes per read
MAX_NOTE_BYTES = 10_000  # maximum size of the metadata of a partial download
PROGRESS_BAR_SECONDS = 0.5  # between updates of a progress bar
DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.ENOLCK, errno.EOPNOTSUPP)


class RemoteFileNotFoundError(DataError):
    """The server does not have the file."""


class Pin(NamedTuple):
    """Expected size in bytes and hash of a file."""

    bytes: int
    sha256: str


class _PinMismatchError(Exception):
    """The download does not match the pinned size or hash."""

    def __init__(self, found: str, pin: Pin) -> None:
        super().__init__(f"{found}, expected {pin.bytes} bytes with sha256 {pin.sha256}")


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file on a server."""

    url: str
    pin: Pin | None = None
    max_bytes: int | None = None  # maximum bytes of a file that is not pinned
    token: str = dataclasses.field(default="", repr=False)  # for this host only


def user_cache_dir(kind: str) -> Path:
    """Cache directory for downloads of a kind, "data" or "models"."""
    home = os.environ.get("GPTJAX_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "gptjax") / kind


def is_offline() -> bool:
    """True if the user disabled network access (GPTJAX_OFFLINE)."""
    return os.environ.get("GPTJAX_OFFLINE", "") not in ("", "0")


def sha256_of_files(paths: Sequence[Path]) -> str:
    """Computes the sha256 (hex) of the concatenated files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def check_pin(path: Path, pin: Pin, fix: str) -> None:
    """Raises DataError unless the file matches the pin; `fix` ends the message."""
    found = sha256_of_files([path])
    if found != pin.sha256:
        raise DataError(
            f"{path} does not match its pinned hash: {path.stat().st_size} bytes "
            f"with sha256 {found}, expected {pin.bytes} bytes with sha256 "
            f"{pin.sha256}. {fix}"
        )


def draw_progress_bar(label: str, fraction: float) -> None:
    """Draws a progress bar on the current terminal line."""
    bar = "#" * int(30 * fraction)
    print(f"\r{label} [{bar:<30}] {fraction:4.0%}", end="", file=sys.stderr, flush=True)


def clear_progress_bar() -> None:
    """Clears the current line if stderr is a terminal."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def download_file(remote: RemoteFile, target: Path, description: str) -> str:
    """Downloads a file to `target` and returns its sha256.

    `target` is only ever the complete, verified file; an existing one is not
    overwritten. Of concurrent calls, also from several processes, one downloads and the
    others wait. Error messages call the file `description`.

    Raises:
        RemoteFileNotFoundError: the server does not have the file.
        DataError: the network is disabled or fails, or the file does not match.
    """
    by_hand = f"Or copy the file yourself to {target}"
    if is_offline():
        raise DataError(
            f"{description} is not on this machine and GPTJAX_OFFLINE disables the "
            f"download of {remote.url}. Unset GPTJAX_OFFLINE. {by_hand}"
        )
    try:
        with open_part(target) as part:
            if target.exists():  # another call has completed it
                found = sha256_of_files([target])
            else:
                found = complete_download(part, remote, f"downloading {target.name}")
                os.replace(part.name, target)
    except _PinMismatchError as wrong:
        raise DataError(
            f"{remote.url} does not match its pinned hash: {wrong}. The download was "
            f"deleted. Try again later. {by_hand}"
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        kind, fix = DataError, "Check the network and try again."
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # also closes the connection
            kind = RemoteFileNotFoundError if error.code in (404, 410) else DataError
        elif isinstance(error, OSError) and (error.filename or error.errno in DISK_ERRNOS):
            fix = (
                f"Check that {target.parent} is writable and has free space, or set "
                "GPTJAX_HOME to another folder."
            )
        elif num_bytes := resumable_bytes(remote, target):
            fix += f" The download will resume after {num_bytes:,} bytes."
        raise kind(f"cannot download {remote.url}: {error}. {fix} {by_hand}") from error
    if remote.pin and found != remote.pin.sha256:
        check_pin(target, remote.pin, f"Replace or remove {target}.")
    return found


def part_path(target: Path) -> Path:
    """Path of the partial download of `target`."""
    return target.with_name(target.name + ".part")


def note_path(part: Path) -> Path:
    """Path of the metadata (ETag, size) of a partial download that is not pinned."""
    return part.with_name(part.name + ".json")


def resumable_bytes(remote: RemoteFile, target: Path) -> int:
    """Number of bytes that the next call can reuse."""
    part = part_path(target)
    usable = part.exists() and (remote.pin or read_note(part))
    return part.stat().st_size if usable else 0


@contextlib.contextmanager
def open_part(target: Path) -> Iterator[BufferedWriter]:
    """Opens the partial download of `target` and locks it against other calls."""
    import fcntl  # not on Windows; keeps the module importable there

    target.parent.mkdir(parents=True, exist_ok=True)
    path = part_path(target)
    while True:
        with path.open("ab") as part:
            fcntl.flock(part, fcntl.LOCK_EX)
            if not refers_to(part, path):
                continue  # the previous owner of the lock renamed or removed it
            part.seek(0, os.SEEK_END)  # it may have grown since it was opened
            try:
                yield part
                return
            finally:
                if not refers_to(part, path):
                    note_path(path).unlink(missing_ok=True)
                elif not part.tell():
                    note_path(path).unlink(missing_ok=True)
                    path.unlink()


def refers_to(file: BufferedWriter, path: Path) -> bool:
    """True if `path` still refers to the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def complete_download(part: BufferedWriter, remote: RemoteFile, label: str) -> str:
    """Completes a partial download, verifies it and returns its sha256.

    Raises:
        _PinMismatchError: the file does not match its pin.
    """
    pin = remote.pin
    try:
        resumed = part.tell() > 0 and resume_download(part, remote, label)
        if not resumed:
            restart_download(part, remote, label)
        found = flush_and_hash(part)
        if resumed and pin and found != pin:  # the partial data were of another file
            restart_download(part, remote, label)
            found = flush_and_hash(part)
        if pin and found != pin:
            raise _PinMismatchError(f"{found.bytes} bytes with sha256 {found.sha256}", pin)
    except _PinMismatchError:
        truncate_part(part)
        raise
    return found.sha256


def flush_and_hash(part: BufferedWriter) -> Pin:
    """Flushes a partial download to disk; returns its size and hash."""
    part.flush()
    os.fsync(part.fileno())
    return Pin(part.tell(), sha256_of_files([Path(part.name)]))


def truncate_part(part: BufferedWriter) -> None:
    """Truncates a partial download and removes its metadata."""
    part.seek(0)
    part.truncate()
    note_path(Path(part.name)).unlink(missing_ok=True)


def resume_download(part: BufferedWriter, remote: RemoteFile, label: str) -> bool:
    """Resumes a partial download; returns False if that is not possible.

    For a pinned file, the hash shows whether both parts belong together. Otherwise a
    strong ETag of the server is required.
    """
    num_bytes, note = part.tell(), read_note(Path(part.name))
    size = remote.pin.bytes if remote.pin else note.get("bytes", 0)
    if num_bytes >= size:
        return num_bytes == size
    headers = {"Range": f"bytes={num_bytes}-"}
    if not remote.pin:
        headers["If-Range"] = note["etag"]
    try:
        with open_url(remote, headers) as answer:
            span = f"bytes {num_bytes}-{size - 1}/{size}"
            if (
                answer.status != 206
                or answer.headers.get("Content-Range", "").strip() != span
                or answer.length not in (None, size - num_bytes)
                or not (remote.pin or answer.headers.get("ETag") == note["etag"])
            ):
                return False
            append_body(part, answer, size, label)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # range not satisfiable
            raise
        error.close()
        return False
    return True


def restart_download(part: BufferedWriter, remote: RemoteFile, label: str) -> None:
    """Downloads the file from the start."""
    truncate_part(part)
    with open_url(remote, {}) as answer:
        length, pin = answer.length, remote.pin
        if answer.status != 200:
            raise OSError(f"the server responded with status {answer.status}")
        if pin:
            if length not in (None, pin.bytes):
                raise _PinMismatchError(f"{length} bytes", pin)
            append_body(part, answer, pin.bytes, label)
            # Without Content-Length, one more byte shows that the file is too long.
            if length is None and part.tell() == pin.bytes and answer.read1(1):
                raise _PinMismatchError(f"{pin.bytes + 1} bytes or more", pin)
            return
        if length is None:
            raise OSError("the server sent no Content-Length")
        if remote.max_bytes is not None and length > remote.max_bytes:
            raise OSError(f"the file has {length:,} bytes, more than {remote.max_bytes:,}")
        write_note(Path(part.name), answer.headers.get("ETag", ""), length)
        append_body(part, answer, length, label)


def append_body(
    part: BufferedWriter, answer: http.client.HTTPResponse, size: int, label: str
) -> None:
    """Appends the response body to the partial download, up to `size` bytes in all."""
    known, shown = answer.length is not None or answer.status == 206, time.monotonic()
    try:
        while room := size - part.tell():
            if not (block := answer.read1(min(DOWNLOAD_BLOCK_BYTES, room))):
                break
            part.write(block)
            if time.monotonic() - shown > PROGRESS_BAR_SECONDS and sys.stderr.isatty():
                shown = time.monotonic()
                draw_progress_bar(label, part.tell() / size)
    finally:
        clear_progress_bar()
    if room and known:  # of unknown length, the file ends here
        raise OSError(f"the connection ended after {size - room} of {size} bytes")


def read_note(part: Path) -> dict[str, Any]:
    """Reads the metadata of a partial download; empty if missing or invalid."""
    try:
        match strict_json.read_json(note_path(part), MAX_NOTE_BYTES):
            case {"etag": str(), "bytes": int()} as note:
                return note
    except (OSError, ValueError):
        pass  # the download starts over
    return {}


def write_note(part: Path, etag: str, size: int) -> None:
    """Writes the metadata of a partial download, if its ETag is a strong one."""
    if re.fullmatch(r'"[\x21\x23-\x7e]*"', etag):
        note = json.dumps({"etag": etag, "bytes": size})
        note_path(part).write_text(note, encoding="utf-8")


class SafeRedirectHandler(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from https to http nor with a token to other hosts."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Builds the request for the new URL; keeps the token only on the same host."""
        fp.close()  # else urllib reads the whole body, of any size
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https") or ((old.scheme, new.scheme) == ("https", "http")):
            raise OSError(f"redirects from {old.scheme} to {new.scheme} are not allowed")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.unredirected_hdrs.get("Authorization")
        if request and token and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            request.add_unredirected_header("Authorization", token)
        return request


def open_url(remote: RemoteFile, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    """Opens a URL; the body of the response is yet to be read."""
    if urlsplit(remote.url).scheme not in ("http", "https"):
        raise OSError("only http and https URLs are supported")
    sent = {"User-Agent": "gptjax", "Accept-Encoding": "identity", **headers}
    request = urllib.request.Request(remote.url, headers=sent)  # noqa: S310 (checked)
    if remote.token:
        request.add_unredirected_header("Authorization", f"Bearer {remote.token}")
    opener = urllib.request.build_opener(SafeRedirectHandler)
    answer = opener.open(request, timeout=DOWNLOAD_TIMEOUT_SECONDS)
    if (encoding := answer.headers.get("Content-Encoding", "identity")) != "identity":
        answer.close()
        raise OSError(f"Content-Encoding {encoding} is not supported")
    return answer
