"""Rows, texts, configs and tokenizers with damaged bytes.

Each is read, and then consists of valid text, or is refused by an error of gptjax that
names the file, and the line where the format has lines.
"""

import dataclasses
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptjax.config import load_config
from gptjax.data.classification import read_labeled_texts
from gptjax.data.conversations import read_conversations, read_preference_pairs
from gptjax.data.readers import read_text_file
from gptjax.data.text import find_sources, iter_chunks
from gptjax.errors import GptjaxError
from gptjax.tokenizer.tokenizer import load_tokenizer, train_tokenizer
from tests.chaos._damage import damage_bytes

FULL, SLICE = 100_000, 1_400
NASTY = (
    *(b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\r\n", b'"'),
    *(b"\\ud800", b"\\u0000", b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\t", b"="),
    *(b"NaN", b"-Infinity", b"1e999", b"null", b"true", b"0", b"-1", b"[[[[", b"'''"),
    *(b"9" * 5000, b"[" * 5000, b'{"a":' * 5000, b"a.b.c=", b"\xe2\x80\xa8", b" "),
    *(b"[]", b"{}", b'""', b"1970-01-01", b"#", b"<|endoftext|>", b"\xf4\x90\x80\x80"),
    *(b"\x1b[2J", b"\xf0"),
)
TEXTS = "".join(f'{{"text": "row {n} ü"}}\n' for n in range(4))
LABELS = "".join(f'{{"text": "row {n} é", "label": "{"ab"[n % 2]}"}}\n' for n in range(6))
CSV = "text,label\n" + "".join(f'"row, {n} ""q""\nö",{"ab"[n % 2]}\n' for n in range(6))
TALK = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n'
ASKED = '{"instruction": "Add.", "input": "1 1", "output": "2", "system": "Be kind."}\n'
PAIRS = '{"prompt": "Hi", "chosen": "Ho", "rejected": "Go away", "split": "train"}\n'
CONFIG = """# a comment
[model]
context_length = 16
dropout = 0.1
[data]
source = "a.txt"
tokenizer = 'bytes'
mask_prompt = true
[train]
task = "pretrain"
"""


def read_texts(path: Path) -> Any:
    return [chunk.text for source in find_sources([path]) for chunk in iter_chunks(source)]


def read_tokenizer(path: Path) -> Any:
    found = load_tokenizer(path.parent)
    text = "the lowest <|endoftext|> ü"
    assert found.decode(found.encode(text)) == text
    return found.vocab_size


def to_array(rows: str) -> str:
    return "[" + rows.strip().replace("\n", ",\n") + "]\n"


KINDS: dict[str, tuple[str, Callable[[Path], Any]]] = {  # name of the file: content, reader
    "texts.jsonl": (TEXTS, read_texts),
    "texts.json": (to_array(TEXTS), read_texts),
    "texts.csv": ('text,n\nrow 1,1\n"row\n2",2\n', read_texts),
    "text.txt": ("One ö.\n\nTwo.\r\nThree.\n", read_text_file),
    "labels.jsonl": (LABELS, read_labeled_texts),
    "labels.json": (to_array(LABELS), read_labeled_texts),
    "labels.csv": (CSV, read_labeled_texts),
    "labels.tsv": (CSV.replace(",", "\t"), read_labeled_texts),
    "talk.jsonl": (TALK * 3, read_conversations),
    "asked.json": (to_array(ASKED * 3), read_conversations),
    "pairs.jsonl": (PAIRS * 3, read_preference_pairs),
    "config.toml": (CONFIG, load_config),
    "vocab.json": ("", read_tokenizer),
    "merges.txt": ("", read_tokenizer),
}
WHOLE = re.compile(
    "has no (rows|texts)|cannot read|the only label|cannot be used|invalid tokenizer"
)


def join_strings(value: Any) -> str:
    """All text in rows and options, but not the rows as they are in the file."""
    if dataclasses.is_dataclass(value):
        value = [part for name, part in vars(value).items() if name != "source_row"]
    if isinstance(value, dict):
        value = list(value.items())
    return "".join(map(join_strings, value)) if isinstance(value, list | tuple) else str(value)


def prepare(folder: Path) -> Callable[[int, random.Random], str]:
    train_tokenizer(["low lower lowest newest widest"] * 3, 264).save(folder)

    def check(case: int, rng: random.Random) -> str:
        name, (content, read) = list(KINDS.items())[case % len(KINDS)]
        path = folder / name
        data = content.encode() or path.read_bytes()
        path.write_bytes(damage_bytes(rng, data, NASTY))
        try:
            text = join_strings(read(path))
            text.encode()  # half a surrogate pair would fail here
            return "a NUL character passed" if "\0" in text else ""
        except GptjaxError as error:
            return missing_place(path, str(error))
        finally:
            path.write_bytes(data)

    return check


def missing_place(path: Path, text: str) -> str:
    text.encode()
    is_tokenizer = KINDS[path.name][1] is read_tokenizer
    rest = text.replace(str(path.parent if is_tokenizer else path), "")
    if path.suffix == ".toml" and re.search(r"\b[a-z]+\.[a-z_]+|unknown option", rest):
        return ""  # it names an option
    line = re.search(r":\d+|(line|row) \d+|end of document", rest)
    has_place = rest != text and (is_tokenizer or line or WHOLE.search(text))
    return "" if has_place else f"no file or line in: {text}"
