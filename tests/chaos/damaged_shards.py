"""A prepared folder with flipped, cut or added bytes, or with files of another one.

It is rejected with the file, and with block and bytes where only bytes differ; or what
is read is what was written; or the hashes that a run keeps tell that it is another one.
Training does not read the index of documents: `verify_prepared` finds what is wrong
with it.
"""

import random
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gptjax.data import token_files
from gptjax.data.prepare import TokenizedSplits, open_prepared, prepare_dataset
from gptjax.data.token_files import verify_prepared
from gptjax.errors import DataError

FULL, SLICE = 10_000, 1_000
BLOCK = 64  # bytes instead of a megabyte, so that files have several


def written(folder: Path, numbers: range) -> Path:
    """A prepared folder of a few sentences."""
    rows = "".join(f'"{n} times {n} is {n * n}."\n' for n in numbers)
    (folder / "text.jsonl").write_text(rows)
    out = folder / f"from{numbers.start}"
    prepare_dataset([folder / "text.jsonl"], "bytes", out, val_fraction=0.3, shard_tokens=200)
    return out


def content(data: TokenizedSplits) -> list[Any]:
    """All that training reads of a folder, in windows that cross blocks."""
    found: list[Any] = [data.tokenizer.hash, data.tokenizer.eot_token]
    for tokens in (data.train, data.validation):
        if tokens is not None:
            starts = range(0, len(tokens), 37)
            found += [tokens.read(n, min(37, len(tokens) - n)).tolist() for n in starts]
            found += [tokens.vocab_size, tokens.eot]
    return found


def hashes(data: TokenizedSplits) -> list[Any]:
    """Data provenance of a run, as `gptjax.tasks.pretrain` does."""
    parts = [part for part in (data.train, data.validation) if part]
    return [(shard.path.name, shard.sha256) for part in parts for shard in part.shards]


def changed(lot: random.Random, data: bytes) -> bytes:
    """The bytes of one file, changed in one place."""
    if not data:  # an index without a document
        return lot.randbytes(8)
    new, at = bytearray(data), lot.randrange(len(data))
    match lot.randrange(7):
        case 0 | 1:
            new[at] ^= 1 << lot.randrange(8)
        case 2:
            new[at : at + 8] = bytes(len(new[at : at + 8]))
        case 3:
            del new[at:]
        case 4:
            new += lot.randbytes(lot.randint(1, 99))
        case 5:
            del new[at : at + 2]
        case 6:
            other = lot.randrange(0, len(new), BLOCK)
            one = at // BLOCK * BLOCK
            a, b = new[one : one + BLOCK], new[other : other + BLOCK]
            if len(a) == len(b):
                new[one : one + BLOCK], new[other : other + BLOCK] = b, a
    return bytes(new)


def damage(lot: random.Random, folder: Path, other: Path) -> tuple[str, bool]:
    """Changes one file; (its name, whether only its bytes differ from before)."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    path = lot.choice(files)
    before = path.read_bytes()
    kind = lot.random()
    if kind < 0.1:
        path.unlink()
        return path.name, False
    if kind < 0.25:
        source = lot.choice([other / path.name, lot.choice(files)])
        new = source.read_bytes() if source.exists() else b""
    else:
        new = changed(lot, before)
    path.write_bytes(new)
    return path.name, len(new) == len(before)


def fault_of(folder: Path, name: str, same_size: bool, whole: TokenizedSplits) -> str:
    """What went wrong with a damaged folder, or ""."""
    if name.endswith(".idx"):
        good = folder.parent / "from0" / name
        is_same = (folder / name).exists() and (folder / name).read_bytes() == good.read_bytes()
        is_found = any(str(folder / name) in problem for problem in verify_prepared(folder))
        return "" if is_found != is_same else f"{name}: changed {not is_same}, found {is_found}"
    try:
        found = open_prepared(folder)
        if content(found) == content(whole) or hashes(found) != hashes(whole):
            return ""
    except DataError as error:
        text = str(error)
        if str(folder) not in text:
            return f"{name}: no file in: {text}"
        if same_size and name != "meta.json":
            place = rf"{folder}/[a-z]+-\d+\.bin: block \d+, bytes [\d,]+ to [\d,]+"
            return "" if re.match(place, text) else f"{name}: no place in: {text}"
        return ""
    return f"{name} is another one, and nobody noticed"


def run(seed: int, cases: Sequence[int], folder: Path) -> Iterator[str]:
    """What went wrong with each case."""
    block, token_files.CRC_BLOCK_BYTES = token_files.CRC_BLOCK_BYTES, BLOCK
    try:
        good, other = written(folder, range(40)), written(folder, range(1000, 1040))
        whole = open_prepared(good)
        for part in (whole.train, whole.validation):
            part.read(0, len(part))
        bad = folder / "bad"
        for case in cases:
            lot = random.Random(f"{seed} {case}")
            shutil.copytree(good, bad)
            name, same_size = damage(lot, bad, other)
            try:
                yield fault_of(bad, name, same_size, whole)
            except Exception as error:
                yield f"{name}: {type(error).__name__}: {error}"
            shutil.rmtree(bad)
    finally:
        token_files.CRC_BLOCK_BYTES = block
