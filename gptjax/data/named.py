"""Named data sets: found in a folder of the user's, in the cache, or downloaded.

Nothing else in the package touches the network. A file counts only when its size and
its sha256 are the ones written here.
"""

import dataclasses
import hashlib
import http.client
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from gptjax.config import suggestion
from gptjax.errors import DataError

SECONDS = 30  # without a byte from the server


@dataclasses.dataclass(frozen=True)
class NamedFile:
    """One pinned file."""

    file: str  # its name in $GPTJAX_DATA and in the cache
    bytes: int
    sha256: str
    url: str  # "" = there is no plain file to download; `page` says where it is
    page: str = ""


BOOK = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/"
PYTHON_HELP = "python-help"  # a named set without a file: every Python carries its text
NAMED = {
    "verdict": NamedFile(  # Edith Wharton, 1908
        "the-verdict.txt",
        20_479,
        "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
        BOOK + "ch02/01_main-chapter-code/the-verdict.txt",
    ),
    "tinyshakespeare": NamedFile(
        "tinyshakespeare.txt",
        1_115_394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/"
        "data/tinyshakespeare/input.txt",
    ),
    "wikitext2": NamedFile(  # its validation part: Merity et al. 2016, CC BY-SA
        "wikitext2-valid.txt",
        1_121_681,
        "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        "https://raw.githubusercontent.com/pytorch/examples/main/"
        "word_language_model/data/wikitext-2/valid.txt",
    ),
    "instructions": NamedFile(
        "instruction-data.json",
        203_524,
        "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
        BOOK + "ch07/01_main-chapter-code/instruction-data.json",
    ),
    "preferences": NamedFile(
        "instruction-data-with-preference.json",
        386_968,
        "305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e",
        BOOK + "ch07/04_preference-tuning-with-dpo/"
        "instruction-data-with-preference.json",
    ),
    "sms-spam": NamedFile(  # Almeida and Gómez Hidalgo 2011
        "SMSSpamCollection",
        477_907,
        "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d",
        "",
        "https://archive.ics.uci.edu/dataset/228/sms+spam+collection",
    ),
}


def python_help() -> list[str]:
    """The texts of Python's own help topics, in the order of their names."""
    from pydoc_data.topics import topics  # 0.7 MB that only this set needs

    return [topics[name] for name in sorted(topics)]


def cache_folder() -> Path:
    """Where downloaded data sets are kept."""
    home = os.environ.get("GPTJAX_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "gptjax") / "data"


def find(name: str) -> Path:
    """The checked file of a named data set, downloaded where it is nowhere yet.

    Raises:
        DataError: the name is unknown, the file found is another one, or it cannot
            be downloaded.
    """
    if name not in NAMED:
        raise DataError(
            f"unknown data set {name!r}.{suggestion(name, NAMED)} "
            f"Known: {', '.join(NAMED)}."
        )
    entry = NAMED[name]
    own = os.environ.get("GPTJAX_DATA")
    for folder in [*([Path(own)] if own else []), cache_folder()]:
        if (path := folder / entry.file).exists():
            check(path, entry, f"Put the right file there, or remove {path}.")
            return path
    target = cache_folder() / entry.file
    by_hand = f"Or put the file there yourself: {target}"
    if not entry.url:
        raise DataError(
            f"data set {name} is not on this machine and cannot be downloaded as a "
            f"plain file. Take {entry.file} from {entry.page} and put it there: "
            f"{target}"
        )
    if os.environ.get("GPTJAX_OFFLINE", "") not in ("", "0"):
        raise DataError(
            f"data set {name} is not on this machine and GPTJAX_OFFLINE forbids the "
            f"download of {entry.url}. Unset GPTJAX_OFFLINE. {by_hand}"
        )
    download(entry, target, by_hand)
    return target


def check(path: Path, entry: NamedFile, fix: str) -> None:
    """Raises unless the file has the pinned size and sha256."""
    found = sha256([path])
    if found != entry.sha256:
        raise DataError(
            f"{path} is not the file that was pinned: {path.stat().st_size} bytes "
            f"with sha256 {found}, expected {entry.bytes} bytes with sha256 "
            f"{entry.sha256}. {fix}"
        )


def sha256(paths: Sequence[Path]) -> str:
    """The sha256 of the files' bytes, one after another, in hex."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def download(entry: NamedFile, target: Path, by_hand: str) -> None:
    """Writes the file from its URL to `target`, which never holds anything else."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(".part", entry.file + ".", target.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            with urllib.request.urlopen(entry.url, timeout=SECONDS) as answer:
                # One byte more than expected is enough to know that it is too long.
                while block := answer.read(min(1 << 16, entry.bytes + 1 - file.tell())):
                    file.write(block)
            file.flush()
            os.fsync(file.fileno())
        check(part, entry, f"Nothing was kept. Try again later. {by_hand}")
        os.replace(part, target)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is the server's answer too
        raise DataError(
            f"cannot download {entry.url}: {error}. Check the network and try again. "
            f"{by_hand}"
        ) from error
    finally:
        part.unlink(missing_ok=True)
