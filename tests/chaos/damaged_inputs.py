"""Rows, texts, configs and tokenizers with damaged bytes.

Each is read, and then consists of valid text, or is refused by an error of gptjax that
names the file, and the line where the format has lines.
"""

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptjax.config import load_config
from gptjax.data.classification import read_labeled_texts
from gptjax.data.conversations import read_conversations, read_preference_pairs
from gptjax.data.readers import read_text_file
from gptjax.data.text import find_sources, iter_chunks
from gptjax.errors import GptjaxError
from gptjax.tokenizer import tokenizer
from tests.chaos._damage import damage_bytes

FULL, SLICE = 100_000, 10_000

NASTY = (
    *(b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\r\n", b'"'),
    *(b"\\ud800", b"\\u0000", b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\t", b"="),
    *(b"NaN", b"-Infinity", b"1e999", b"null", b"true", b"0", b"-1", b"[[[[", b"'''"),
    *(b"9" * 5000, b"[" * 5000, b'{"a":' * 5000, b"a.b.c=", b"\xe2\x80\xa8", b" "),
    *(b"[]", b"{}", b'""', b"1970-01-01", b"#", b"<|endoftext|>", b"\xf4\x90\x80\x80"),
    *(b"\x1b[2J", b"\xf0"),
)

TEXTS = "".join(f'{{"text": "row {n} ü"}}\n' for n in range(4)).encode()
LABELS = "".join(
    f'{{"text": "row {n} é", "label": "{"ab"[n % 2]}", "n": 0.5}}\n' for n in range(6)
).encode()
CSV = "".join(
    ["text,label\n", *(f'"row, {n} ""q""\nö",{"ab"[n % 2]}\n' for n in range(6))]
).encode()
TALK = b"""{"messages": [{"role": "user", "content": "Hi"},
 {"role": "assistant", "content": "Ho"}]}
""".replace(b"\n ", b" ")
ASKED = b'{"instruction": "Add.", "input": "1 1", "output": "2", "system": "Be kind."}\n'
PAIRS = b'{"prompt": "Hi", "chosen": "Ho", "rejected": "Go away", "split": "train"}\n'
CONFIG = b"""# a comment
[model]
context_length = 16
dropout = 0.1
[data]
source = "a.txt"
tokenizer = 'bytes'
mask_prompt = true
[train]
task = "pretrain"
steps = 12
"""
SMALL = tokenizer.train_tokenizer(["low lower lowest newest widest"] * 3, 264)


def read_texts(path: Path) -> list[Any]:
    return [p.text for source in find_sources([path]) for p in iter_chunks(source)]


def read_chats(path: Path) -> list[Any]:
    found, line = read_conversations(path)
    return [line, [(dict(m), x.split, x.task) for x in found for m in x.messages]]


def read_pairs(path: Path) -> list[Any]:
    found, line = read_preference_pairs(path)
    return [line, [(dict(x.prompt[0]), x.chosen, x.rejected, x.split) for x in found]]


def read_classes(path: Path) -> list[Any]:
    data, line = read_labeled_texts(path)
    return [line, data.texts, list(data.class_names), data.locations]


def read_tokenizer(path: Path) -> list[Any]:
    found = tokenizer.load_tokenizer(path.parent)
    text = "the lowest <|endoftext|> ü"
    assert found.decode(found.encode(text)) == text
    return [found.vocab_size]


def to_array(rows: bytes) -> bytes:
    """JSON lines as a JSON array."""
    return b"[" + rows.strip().replace(b"\n", b",\n") + b"]\n"


Reader = Callable[[Path], list[Any]]
KINDS: dict[str, tuple[bytes, Reader]] = {  # name of the file: content, reader
    "texts.jsonl": (TEXTS, read_texts),
    "texts.json": (to_array(TEXTS), read_texts),
    "texts.csv": (b'text,n\nrow 1,1\n"row\n2",2\n', read_texts),
    "text.txt": ("One ö.\n\nTwo.\r\nThree.\n".encode(), lambda path: [read_text_file(path)]),
    "labels.jsonl": (LABELS, read_classes),
    "labels.json": (to_array(LABELS), read_classes),
    "labels.csv": (CSV, read_classes),
    "labels.tsv": (CSV.replace(b",", b"\t"), read_classes),
    "talk.jsonl": (TALK * 3, read_chats),
    "asked.json": (to_array(ASKED * 3), read_chats),
    "pairs.jsonl": (PAIRS * 3, read_pairs),
    "config.toml": (CONFIG, lambda path: [repr(load_config(path))]),
}
TOKENIZER_FILES = ("vocab.json", "merges.txt")
# Of all the file, not of a line.
WHOLE = re.compile(
    "has no rows|has no texts|cannot read|the only label|cannot be used|invalid tokenizer file"
)


def fault_of(path: Path, read: Reader) -> str:
    """What went wrong with reading a file, or ""."""
    try:
        text = "".join(flatten(read(path)))
    except GptjaxError as error:
        return fault_of_message(path, str(error))
    text.encode()  # half a surrogate pair would fail here
    return "" if "\0" not in text else "a NUL character passed"


def fault_of_message(path: Path, text: str) -> str:
    """What is missing in an error's message, or ""."""
    text.encode()
    if path.suffix == ".toml" and re.search(r"\b[a-z]+\.[a-z_]+|unknown option", text):
        return ""  # it names an option, or (below) the line
    is_tokenizer = path.name in TOKENIZER_FILES
    if str(path.parent if is_tokenizer else path) not in text:
        return f"no file in: {text}"
    line = re.search(rf"{re.escape(path.name)}(:\d+|.*line \d+|.*end of document)", text)
    return "" if is_tokenizer or line or WHOLE.search(text) else f"no line in: {text}"


def flatten(value: Any) -> Iterator[str]:
    """The strings in a value, as they are."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for part in value:
            yield from flatten(part)
    else:
        yield str(value)


def prepare(folder: Path) -> Callable[[int, random.Random], str]:
    SMALL.save(folder)
    for name in TOKENIZER_FILES:
        KINDS[name] = (folder / name).read_bytes(), read_tokenizer

    def check(case: int, rng: random.Random) -> str:
        name = list(KINDS)[case % len(KINDS)]
        content, read = KINDS[name]
        path = folder / name
        path.write_bytes(damage_bytes(rng, content, NASTY))
        try:
            return fault_of(path, read)
        finally:
            path.write_bytes(content)

    return check
