"""Rows, texts, configs, templates, tokenizers and weights with damaged bytes.

Each is read, and then consists of valid text, or is refused by an error of gptjax that
names the file, and the line where the format has lines. What another parser finds
damaged is refused: bytes that are not UTF-8, truncated or misquoted rows, lengths and
checksums that do not fit. No reading takes longer than a limit per megabyte.
"""

import csv
import dataclasses
import gzip
import io
import json
import random
import re
import shutil
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import safetensors.numpy

from gptjax.config import load_config
from gptjax.data.classification import read_labeled_texts
from gptjax.data.conversations import read_conversations, read_preference_pairs
from gptjax.data.packed_rows import PackedRows
from gptjax.data.readers import read_text_file
from gptjax.data.text import find_sources, iter_chunks
from gptjax.errors import GptjaxError
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.tokenizer.tokenizer import ENDOFTEXT, load_tokenizer, train_tokenizer
from gptjax.weights.safetensors import open_safetensors
from gptjax.weights.tf_checkpoint import open_tf_checkpoint
from tests.chaos._damage import damage_bytes
from tests.processes import ROOT

FULL, SLICE = 100_000, 1_600
MAX_SECONDS = 15  # per megabyte, at least one
NASTY = (
    *(b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\r\n", b'"'),
    *(b"\\ud800", b"\\u0000", b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\t", b"="),
    *(b"NaN", b"-Infinity", b"1e999", b"null", b"true", b"0", b"-1", b"[[[[", b"'''"),
    *(b"9" * 5000, b"[" * 5000, b'{"a":' * 5000, b"a.b.c=", b"\xe2\x80\xa8", b" "),
    *(b"[]", b"{}", b'""', b"1970-01-01", b"#", b"<|endoftext|>", b"\xf4\x90\x80\x80"),
    *(b"\x1b[2J", b"\xf0", b"a." * 5000, b"{{", b"}}", b"{%", b"%}", b"{#", b"9" * 30),
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
completion_only_loss = true
[train]
task = "pretrain"
"""
TEMPLATE = """{% for m in messages -%}
<|{{ m.role }}|>{{ m.content | trim }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}
"""


def read_texts(path: Path) -> Any:
    return [chunk.text for source in find_sources([path]) for chunk in iter_chunks(source)]


def read_tokenizer(path: Path) -> Any:
    found = load_tokenizer(path.parent)
    text = "the lowest <|endoftext|> ü"
    assert found.decode(found.encode(text)) == text
    return found.vocab_size


def read_rows(read: Callable[[Path], tuple[Any, str]]) -> Callable[[Path], Any]:
    return lambda path: read(path)[0]  # without the summary, which names unread columns


def read_template(path: Path) -> Any:
    return load_chat_template(str(path)).stop_strings


def read_tensors(path: Path) -> Any:
    tensors = open_safetensors([path])
    return [[name, tensors.read(name).shape] for name in tensors.tensors]


def read_checkpoint(path: Path) -> Any:
    tensors = open_tf_checkpoint(path.parent)
    return [[name, tensors.read(name).tobytes().hex()] for name in tensors.tensors]


def to_array(rows: str) -> str:
    return "[" + rows.strip().replace("\n", ",\n") + "]\n"


KINDS: dict[str, tuple[str, Callable[[Path], Any]]] = {  # path of the file: content, reader
    "texts.jsonl": (TEXTS, read_texts),
    "texts.json": (to_array(TEXTS), read_texts),
    "texts.csv": ('text,n\nrow 1,1\n"row\n2",2\n', read_texts),
    "texts.jsonl.gz": ("", read_texts),
    "text.txt": ("One ö.\n\nTwo.\r\nThree.\n", read_text_file),
    "labels.jsonl": (LABELS, read_rows(read_labeled_texts)),
    "labels.json": (to_array(LABELS), read_rows(read_labeled_texts)),
    "labels.csv": (CSV, read_rows(read_labeled_texts)),
    "labels.tsv": (CSV.replace(",", "\t"), read_rows(read_labeled_texts)),
    "talk.jsonl": (TALK * 3, read_rows(read_conversations)),
    "asked.json": (to_array(ASKED * 3), read_rows(read_conversations)),
    "pairs.jsonl": (PAIRS * 3, read_rows(read_preference_pairs)),
    "config.toml": (CONFIG, load_config),
    "chat.jinja": (TEMPLATE, read_template),
    "vocab.json": ("", read_tokenizer),
    "merges.txt": ("", read_tokenizer),
    "one/tokenizer.json": ("", read_tokenizer),
    "llama/tokenizer.json": ("", read_tokenizer),
    "x.safetensors": ("", read_tensors),
    "openai-tiny/model.ckpt.index": ("", read_checkpoint),
    "openai-tiny/model.ckpt.data-00000-of-00001": ("", read_checkpoint),
}
CHECKSUMS = (".gz", ".index", ".data-00000-of-00001")  # suffixes of formats that have them
WHOLE = re.compile(
    "has no (rows|texts)|cannot (read|use)|the only label|cannot be used|invalid tokenizer"
)


def join_strings(value: Any) -> str:
    """All text in rows and options, but not the rows as they are in the file."""
    if isinstance(value, PackedRows):
        value = list(value)
    if dataclasses.is_dataclass(value):
        value = [part for name, part in vars(value).items() if name != "source_row"]
    if isinstance(value, dict):
        value = list(value.items())
    return "".join(map(join_strings, value)) if isinstance(value, list | tuple) else str(value)


def parse(path: Path, data: bytes) -> Any:
    """Parses a file as Python's own parsers do, which raise if it is damaged."""
    if path.suffix == ".safetensors":
        return safetensors.numpy.load(data)
    if path.parent.name == "openai-tiny":
        return None  # no other parser
    if path.suffix == ".gz" and data:
        return parse(path.with_suffix(""), gzip.decompress(data))
    text = data.decode("utf-8-sig")
    match path.suffix:
        case ".json":
            return json.loads(text)
        case ".jsonl":
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        case ".csv":
            rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
            if len({len(row) for row in rows if row}) > 1:
                raise ValueError("rows of several lengths")
        case ".toml":
            return tomllib.loads(text)
        case ".jinja":
            return jinja2.Environment(autoescape=True).parse(text)
    return text


def is_damaged(path: Path, data: bytes) -> bool:
    try:
        parse(path, data)
    except RecursionError:
        return False
    except Exception:
        return True
    return False


def write_tokenizers(folder: Path) -> None:
    """Writes a tokenizer in both formats, and one in the style of Llama 3."""
    tokenizer = train_tokenizer(["low lower lowest newest widest"] * 3, 264)
    tokenizer.save(folder)
    changes = {"pre_tokenizer": "llama-bpe", "added_tokens": {"<|begin|>": 264}}
    llama = dataclasses.replace(tokenizer, **changes, bos_token=264, add_bos=True)
    llama.save(folder / "llama")
    vocab = json.loads((folder / "vocab.json").read_text())
    table = {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "model": {"type": "BPE", "vocab": vocab},
        "added_tokens": [{"content": ENDOFTEXT, "id": vocab.pop(ENDOFTEXT)}],
    }
    table["model"]["merges"] = (folder / "merges.txt").read_text().splitlines()[1:]
    (folder / "one").mkdir()
    (folder / "one" / "tokenizer.json").write_text(json.dumps(table))


def prepare(folder: Path) -> Callable[[int, random.Random], str]:
    write_tokenizers(folder)
    arrays = {"a": np.ones((3, 4), np.float32), "b/c": np.zeros(5, np.int32)}
    safetensors.numpy.save_file(arrays, folder / "x.safetensors")
    (folder / "texts.jsonl.gz").write_bytes(gzip.compress(TEXTS.encode(), mtime=0))
    shutil.copytree(ROOT / "tests" / "fixtures" / "openai-tiny", folder / "openai-tiny")
    originals = {
        folder / name: join_strings(read(folder / name))
        for name, (_, read) in KINDS.items()
        if Path(name).suffix in CHECKSUMS
    }

    def check(case: int, rng: random.Random) -> str:
        name, (content, read) = list(KINDS.items())[case % len(KINDS)]
        path = folder / name
        data = content.encode() or path.read_bytes()
        damaged = damage(rng, data, is_long=case // len(KINDS) % 100 == 50)
        path.write_bytes(damaged)
        signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS * max(1, len(damaged) >> 20))
        try:
            text = join_strings(read(path))
        except GptjaxError as error:
            return missing_place(path, folder, str(error))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            path.write_bytes(data)
        text.encode()  # half a surrogate pair would fail here
        original = originals.get(path, text)
        if path.suffix == ".gz":  # several gzip files in a row are one
            original *= len(text) // len(original)
        if is_damaged(path, damaged) or text != original:
            return f"{name} is damaged, and nobody noticed: {damaged[:300]!r}"
        return f"{name}: a NUL character passed" if "\0" in text else ""

    signal.signal(signal.SIGALRM, raise_timeout)
    return check


def raise_timeout(number: int, frame: Any) -> None:
    raise TimeoutError(f"more than {MAX_SECONDS} seconds per megabyte")


def damage(rng: random.Random, data: bytes, is_long: bool) -> bytes:
    """Damaged data; if long, of a megabyte, as rows or as one value."""
    if not is_long:
        return damage_bytes(rng, data, NASTY)
    word = rng.choice((data, *NASTY))
    at = rng.choice((0, rng.randint(0, len(data)), len(data)))
    return data[:at] + word * ((1 << 20) // len(word)) + data[at:]


def missing_place(path: Path, folder: Path, text: str) -> str:
    text.encode()
    if len(text) > 2000:
        return f"a message of {len(text)} characters: {text[:1000]}"
    reader = KINDS[path.relative_to(folder).as_posix()][1]
    is_folder = reader in (read_tokenizer, read_checkpoint)
    rest = text.replace(str(path.parent if is_folder else path), "")
    if path.suffix == ".toml" and re.search(r"\b[a-z]+\.[a-z_]+|unknown option", rest):
        return ""  # it names an option
    line = re.search(r":\d+|(line|row) \d+|end of document", rest)
    has_place = rest != text and (is_folder or line or WHOLE.search(text))
    return "" if has_place else f"no file or line in: {text}"
