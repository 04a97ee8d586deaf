"""Prepared folders with damaged files, or with files of another folder.

Either the folder is rejected with the file, and with block and bytes where only bytes
differ; or what is read is what was written; or the hashes that a run keeps differ.
"""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from gptjax.data import token_files
from gptjax.data.prepare import TokenizedSplits, open_prepared, prepare_dataset
from gptjax.data.token_files import verify_prepared
from gptjax.errors import DataError
from tests.chaos._damage import damage_bytes

FULL, SLICE = 10_000, 300
small_blocks = mock.patch.object(token_files, "CRC_BLOCK_BYTES", 64)  # several per file


def write_folder(folder: Path, numbers: range) -> Path:
    rows = "".join(f'"{n} times {n} is {n * n}."\n' for n in numbers)
    (folder / "text.jsonl").write_text(rows)
    out = folder / f"from{numbers.start}"
    prepare_dataset([folder / "text.jsonl"], "bytes", out, val_fraction=0.3, shard_tokens=200)
    return out


def read_content(data: TokenizedSplits) -> list[Any]:
    """All that training reads of a folder, in windows that cross blocks."""
    content: list[Any] = [data.tokenizer.hash, data.tokenizer.eot_token]
    for tokens in filter(None, data[:2]):
        windows = [(n, min(37, len(tokens) - n)) for n in range(0, len(tokens), 37)]
        content += [tokens.vocab_size, tokens.eot, *(tokens.read(*w).tolist() for w in windows)]
    return content


def shard_hashes(data: TokenizedSplits) -> list[Any]:
    return [(s.path.name, s.sha256) for part in filter(None, data[:2]) for s in part.shards]


@small_blocks
def prepare(folder: Path) -> Callable[[int, random.Random], str]:
    good, other = write_folder(folder, range(40)), write_folder(folder, range(1000, 1040))
    whole, bad = open_prepared(good), folder / "bad"
    content, files = read_content(whole), sorted(path.name for path in good.glob("*.*"))

    @small_blocks
    def check(case: int, rng: random.Random) -> str:
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        path = bad / rng.choice(files)
        before, name = path.read_bytes(), path.name
        foreign = (rng.choice([other, good]) / rng.choice([name, *files])).read_bytes()
        kinds = [damage_bytes(rng, before), foreign, None]
        path.unlink()
        (after,) = rng.choices(kinds, [75, 15, 10])
        if after is not None:
            path.write_bytes(after)
        if path.suffix == ".idx":
            is_found = any(str(path) in problem for problem in verify_prepared(bad))
            return "" if is_found == (after != before) else f"{name}: found {is_found}"
        try:
            found = open_prepared(bad)
            if read_content(found) == content or shard_hashes(found) != shard_hashes(whole):
                return ""
        except DataError as error:
            place = rf"{bad}/[a-z]+-\d+\.bin: block \d+, bytes [\d,]+ to [\d,]+"
            if len(after or b"") != len(before) or name == "meta.json":
                place = str(bad)
            return "" if re.search(place, str(error)) else f"{name}: no place in: {error}"
        return f"{name} is another one, and nobody noticed"

    return check
