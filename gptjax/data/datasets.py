"""Named data sets: looked up in `$GPTJAX_DATA` and the cache, else downloaded.

A file is accepted only if its size and SHA-256 equal the ones pinned here.
"""

import dataclasses
import os
from pathlib import Path

from gptjax.config import did_you_mean
from gptjax.errors import DataError
from gptjax.fileio.download import Pin, check_pin, download_file, user_cache_dir


@dataclasses.dataclass(frozen=True)
class DatasetFile:
    """File with pinned size and hash."""

    file_name: str  # name in $GPTJAX_DATA and in the cache
    size_bytes: int
    sha256: str
    url: str


BOOK_URL = "https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/"
PYTHON_HELP = "python-help"  # no file: the text ships with Python
DATASETS = {
    "verdict": DatasetFile(  # Edith Wharton, 1908
        "the-verdict.txt",
        20_479,
        "b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f",
        BOOK_URL + "ch02/01_main-chapter-code/the-verdict.txt",
    ),
    "tinyshakespeare": DatasetFile(
        "tinyshakespeare.txt",
        1_115_394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    ),
    "wikitext2": DatasetFile(  # validation split: Merity et al. 2016, CC BY-SA
        "wikitext2-valid.txt",
        1_121_681,
        "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        "https://raw.githubusercontent.com/pytorch/examples/main/"
        "word_language_model/data/wikitext-2/valid.txt",
    ),
    "instructions": DatasetFile(
        "instruction-data.json",
        203_524,
        "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
        BOOK_URL + "ch07/01_main-chapter-code/instruction-data.json",
    ),
    "preferences": DatasetFile(
        "instruction-data-with-preference.json",
        386_968,
        "305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e",
        BOOK_URL + "ch07/04_preference-tuning-with-dpo/instruction-data-with-preference.json",
    ),
    "sms-spam": DatasetFile(  # Almeida and Gómez Hidalgo 2011; UCI dataset 228, CC BY
        "SMSSpamCollection",
        477_907,
        "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d",
        "https://raw.githubusercontent.com/learn-co-students/"
        "dsc-document-classification-with-naive-bayes-lab-online-ds-pt-051319/"
        "2f98ca443ecd26e1088b369260f1e9782e2e36fc/SMSSpamCollection",
    ),
}


def read_python_help() -> list[str]:
    """Returns the texts of Python's help topics, sorted by name."""
    from pydoc_data.topics import topics  # 0.7 MB, needed only here

    return [topics[name] for name in sorted(topics)]


def fetch_dataset(name: str) -> Path:
    """Returns the path of a named data set, downloading it if necessary."""
    if name not in DATASETS:
        raise DataError(
            f"unknown data set {name!r}.{did_you_mean(name, DATASETS)} "
            f"Known: {', '.join(DATASETS)}."
        )
    entry = DATASETS[name]
    pin, cache = Pin(entry.size_bytes, entry.sha256), user_cache_dir("data")
    user_dir = os.environ.get("GPTJAX_DATA")
    path = Path(user_dir or cache, entry.file_name)
    if not path.exists():
        path = cache / entry.file_name
    if path.exists():
        check_pin(path, pin, f"Replace or remove {path}.")
    else:
        download_file(entry.url, pin, path, f"data set {name}")
    return path
