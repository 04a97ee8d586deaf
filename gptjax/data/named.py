"""Named data sets: found in a folder of the user's, in the cache, or downloaded.

A file counts only when its size and its sha256 are the ones written here.
"""

import dataclasses
import os
from pathlib import Path

from gptjax.config import suggestion
from gptjax.download import Pin, Remote, cache_folder, check, download
from gptjax.errors import DataError


@dataclasses.dataclass(frozen=True)
class NamedFile:
    """One pinned file."""

    file: str  # its name in $GPTJAX_DATA and in the cache
    bytes: int
    sha256: str
    url: str


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
    "sms-spam": NamedFile(  # Almeida and Gómez Hidalgo 2011; UCI dataset 228, CC BY
        "SMSSpamCollection",
        477_907,
        "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d",
        "https://raw.githubusercontent.com/learn-co-students/"
        "dsc-document-classification-with-naive-bayes-lab-online-ds-pt-051319/"
        "2f98ca443ecd26e1088b369260f1e9782e2e36fc/SMSSpamCollection",
    ),
}


def python_help() -> list[str]:
    """The texts of Python's own help topics, in the order of their names."""
    from pydoc_data.topics import topics  # 0.7 MB that only this set needs

    return [topics[name] for name in sorted(topics)]


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
    pin, cache = Pin(entry.bytes, entry.sha256), cache_folder("data")
    own = os.environ.get("GPTJAX_DATA")
    for folder in [*([Path(own)] if own else []), cache]:
        if (path := folder / entry.file).exists():
            check(path, pin, f"Put the right file there, or remove {path}.")
            return path
    target = cache / entry.file
    download(Remote(entry.url, pin), target, f"data set {name}")
    return target
