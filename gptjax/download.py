"""A file from a server to this machine: whole, and the right one, or not at all.

Only this and a judge (`gptjax.judge`) touch the network. The bytes gather in NAME.part
beside the target, where a later call goes on after an interruption, and get their name
when all are there and checked.
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

from gptjax import strict_json
from gptjax.errors import DataError

SECONDS = 30  # without a byte from the server
BLOCK = 1 << 18  # bytes asked for at once
NOTE_BYTES = 10_000  # of what is known of an unfinished file
BAR_SECONDS = 0.5  # between two pictures of a progress bar
DISK = (errno.ENOSPC, errno.EDQUOT, errno.ENOLCK, errno.EOPNOTSUPP)


class AbsentError(DataError):
    """The server has no such file."""


class Pin(NamedTuple):
    """What a file has to be."""

    bytes: int
    sha256: str


class _WrongError(Exception):
    """What came is not what was pinned; nothing of it is worth keeping."""

    def __init__(self, found: str, pin: Pin) -> None:
        super().__init__(
            f"{found}, expected {pin.bytes} bytes with sha256 {pin.sha256}"
        )


@dataclasses.dataclass(frozen=True)
class Remote:
    """A file on a server."""

    url: str
    pin: Pin | None = None
    most: int | None = None  # bytes that it may have, where it is not pinned
    token: str = dataclasses.field(default="", repr=False)  # for this host alone


def cache_folder(kind: str) -> Path:
    """Where downloads of a kind, "data" or "models", are kept."""
    home = os.environ.get("GPTJAX_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "gptjax") / kind


def offline() -> bool:
    """Whether the user forbids the network."""
    return os.environ.get("GPTJAX_OFFLINE", "") not in ("", "0")


def sha256(paths: Sequence[Path]) -> str:
    """The sha256 of the files' bytes, one after another, in hex."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def check(path: Path, pin: Pin, fix: str) -> None:
    """Raises a DataError unless the file is the pinned one."""
    found = sha256([path])
    if found != pin.sha256:
        raise DataError(
            f"{path} is not the file that was pinned: {path.stat().st_size} bytes "
            f"with sha256 {found}, expected {pin.bytes} bytes with sha256 "
            f"{pin.sha256}. {fix}"
        )


def draw_bar(doing: str, share: float) -> None:
    """Shows on the terminal's line how far it is."""
    bar = "#" * int(30 * share)
    print(f"\r{doing} [{bar:<30}] {share:4.0%}", end="", file=sys.stderr, flush=True)


def clear_bar() -> None:
    """Clears the terminal's line, where there is a terminal."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def download(remote: Remote, target: Path, what: str) -> str:
    """Downloads a file to `target`, which never holds anything else.

    Of several calls at once, in one process or many, one downloads and the others
    wait for it.

    Args:
        remote: where it is, and what it has to be.
        target: left as it is where it is there already.
        what: the file in the user's words.

    Returns:
        The sha256 of the file.

    Raises:
        AbsentError: the server has no such file.
        DataError: the network is forbidden or fails, or the file is another one.
    """
    by_hand = f"Or put the file there yourself: {target}"
    if offline():
        raise DataError(
            f"{what} is not on this machine and GPTJAX_OFFLINE forbids the download "
            f"of {remote.url}. Unset GPTJAX_OFFLINE. {by_hand}"
        )
    try:
        with open_part(target) as part:
            if target.exists():  # another call was faster
                found = sha256([target])
            else:
                found = complete(part, remote, f"downloading {target.name}")
                os.replace(part.name, target)
    except _WrongError as wrong:
        raise DataError(
            f"{remote.url} is not the file that was pinned: {wrong}. Nothing was "
            f"kept. Try again later. {by_hand}"
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        kind, fix = DataError, "Check the network and try again."
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the server's answer too
            kind = AbsentError if error.code in (404, 410) else DataError
        elif isinstance(error, OSError) and (error.filename or error.errno in DISK):
            fix = (
                f"Check that {target.parent} can be written and has room, or set "
                "GPTJAX_HOME to another folder."
            )
        elif kept := size_kept(remote, target):
            fix += f" It goes on after the {kept:,} bytes that came."
        raise kind(f"cannot download {remote.url}: {error}. {fix} {by_hand}") from error
    if remote.pin and found != remote.pin.sha256:
        check(target, remote.pin, f"Put the right file there, or remove {target}.")
    return found


def part_of(target: Path) -> Path:
    """Where the bytes gather."""
    return target.with_name(target.name + ".part")


def note_of(part: Path) -> Path:
    """Where it is written which file the part began, where none is pinned."""
    return part.with_name(part.name + ".json")


def size_kept(remote: Remote, target: Path) -> int:
    """How many bytes the next call need not download again."""
    part = part_of(target)
    usable = part.exists() and (remote.pin or read_note(part))
    return part.stat().st_size if usable else 0


@contextlib.contextmanager
def open_part(target: Path) -> Iterator[BufferedWriter]:
    """The part of `target`, locked against other calls while the block runs."""
    import fcntl  # not on Windows, where the rest of this file can still be imported

    target.parent.mkdir(parents=True, exist_ok=True)
    path = part_of(target)
    while True:
        with path.open("ab") as part:
            fcntl.flock(part, fcntl.LOCK_EX)
            if not is_at(part, path):  # whoever held the lock has renamed or removed it
                continue
            part.seek(0, os.SEEK_END)  # it may have grown since it was opened
            try:
                yield part
                return
            finally:
                if not is_at(part, path):
                    note_of(path).unlink(missing_ok=True)
                elif not part.tell():
                    note_of(path).unlink(missing_ok=True)
                    path.unlink()


def is_at(file: BufferedWriter, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def complete(part: BufferedWriter, remote: Remote, doing: str) -> str:
    """Downloads what the part lacks, checks the whole, and returns its sha256.

    Raises:
        _WrongError: it is another file than the pinned one.
    """
    pin = remote.pin
    try:
        resumed = part.tell() > 0 and resume(part, remote, doing)
        if not resumed:
            begin(part, remote, doing)
        found = settled(part)
        if resumed and pin and found != pin:  # what was there was of another file
            begin(part, remote, doing)
            found = settled(part)
        if pin and found != pin:
            raise _WrongError(f"{found.bytes} bytes with sha256 {found.sha256}", pin)
    except _WrongError:
        empty(part)
        raise
    return found.sha256


def settled(part: BufferedWriter) -> Pin:
    """What the part is, all of which is then on the disk."""
    part.flush()
    os.fsync(part.fileno())
    return Pin(part.tell(), sha256([Path(part.name)]))


def empty(part: BufferedWriter) -> None:
    """Forgets what came so far."""
    part.seek(0)
    part.truncate()
    note_of(Path(part.name)).unlink(missing_ok=True)


def resume(part: BufferedWriter, remote: Remote, doing: str) -> bool:
    """Goes on where an earlier call stopped; False if that cannot be done.

    Where the file is pinned, its hash will tell whether the pieces belong together.
    Otherwise the server has to say by a strong ETag that they do.
    """
    have, note = part.tell(), read_note(Path(part.name))
    size = remote.pin.bytes if remote.pin else note.get("bytes", 0)
    if have >= size:
        return have == size
    headers = {"Range": f"bytes={have}-"}
    if not remote.pin:
        headers["If-Range"] = note["etag"]
    try:
        with open_url(remote, headers) as answer:
            span = f"bytes {have}-{size - 1}/{size}"
            if (
                answer.status != 206
                or answer.headers.get("Content-Range", "").strip() != span
                or answer.length not in (None, size - have)
                or not (remote.pin or answer.headers.get("ETag") == note["etag"])
            ):
                return False
            receive(part, answer, size, doing)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the range is not in the file
            raise
        error.close()
        return False
    return True


def begin(part: BufferedWriter, remote: Remote, doing: str) -> None:
    """Downloads the file from its first byte on."""
    empty(part)
    with open_url(remote, {}) as answer:
        length, pin = answer.length, remote.pin
        if answer.status != 200:
            raise OSError(f"the server answers with status {answer.status}")
        if pin:
            if length not in (None, pin.bytes):
                raise _WrongError(f"{length} bytes", pin)
            receive(part, answer, pin.bytes, doing)
            # Without a Content-Length, one more byte shows that it is too long.
            if length is None and part.tell() == pin.bytes and answer.read1(1):
                raise _WrongError(f"{pin.bytes + 1} bytes or more", pin)
            return
        if length is None:
            raise OSError("the server does not say how many bytes the file has")
        if remote.most is not None and length > remote.most:
            raise OSError(f"it has {length:,} bytes, more than {remote.most:,}")
        write_note(Path(part.name), answer.headers.get("ETag", ""), length)
        receive(part, answer, length, doing)


def receive(
    part: BufferedWriter, answer: http.client.HTTPResponse, size: int, doing: str
) -> None:
    """Adds the body of the answer to the part, which never exceeds `size` bytes."""
    known, shown = answer.length is not None or answer.status == 206, time.monotonic()
    try:
        while room := size - part.tell():
            if not (block := answer.read1(min(BLOCK, room))):
                break
            part.write(block)
            if time.monotonic() - shown > BAR_SECONDS and sys.stderr.isatty():
                shown = time.monotonic()
                draw_bar(doing, part.tell() / size)
    finally:
        clear_bar()
    if room and known:  # otherwise, this is where the file ends
        raise OSError(f"the connection ended after {size - room} of {size} bytes")


def read_note(part: Path) -> dict[str, Any]:
    """What write_note wrote, or nothing."""
    try:
        match strict_json.read_json(note_of(part), NOTE_BYTES):
            case {"etag": str(), "bytes": int()} as note:
                return note
    except (OSError, ValueError):
        pass  # then the file is downloaded from its start
    return {}


def write_note(part: Path, etag: str, size: int) -> None:
    """Writes which file the part begins, if the server has a strong name for it."""
    if re.fullmatch(r'"[\x21\x23-\x7e]*"', etag):
        note = json.dumps({"etag": etag, "bytes": size})
        note_of(part).write_text(note, encoding="utf-8")


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from https to anything else, nor with a token."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """The request for the new place; the token stays with its own host."""
        fp.close()  # else urllib reads all of it, however much there is
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https") or (
            (old.scheme, new.scheme) == ("https", "http")
        ):
            raise OSError(
                f"it is redirected from {old.scheme} to {new.scheme}, which is refused"
            )
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.unredirected_hdrs.get("Authorization")
        if request and token and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            request.add_unredirected_header("Authorization", token)
        return request


def open_url(remote: Remote, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    """The server's answer, of which the body is still to be read."""
    if urlsplit(remote.url).scheme not in ("http", "https"):
        raise OSError("only http and https are spoken here")
    sent = {"User-Agent": "gptjax", "Accept-Encoding": "identity", **headers}
    request = urllib.request.Request(remote.url, headers=sent)
    if remote.token:
        request.add_unredirected_header("Authorization", f"Bearer {remote.token}")
    opener = urllib.request.build_opener(Redirects)
    answer = opener.open(request, timeout=SECONDS)
    if (encoding := answer.headers.get("Content-Encoding", "identity")) != "identity":
        answer.close()
        raise OSError(f"the server sends it encoded as {encoding}")
    return answer
