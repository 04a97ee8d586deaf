"""Token files of other programs: nanoGPT, llm.c and datatrove.

They know no hash of their tokenizer, so that the configured one is believed, with
every token id that is read checked to be one of its.
"""

from pathlib import Path

import numpy as np

from gptjax.data.shards import Shard, Tokens, open_shards
from gptjax.errors import DataError

LLMC_MAGIC = 20240520
LLMC_BYTES = 1024  # 256 int32: magic, version 1, number of u16 tokens, zeros


def token_files(folder: Path) -> list[Path]:
    """The folder's .ds files (datatrove), and .bin files that name a split (others)."""
    return sorted(
        path
        for path in folder.glob("*")
        if path.suffix == ".ds"
        or (path.suffix == ".bin" and ("train" in path.name or "val" in path.name))
    )


def open_foreign(folder: Path, split: str, vocab_size: int, eot: int) -> Tokens | None:
    """One split of a folder; a file with "val" in its name is for validation.

    Args:
        folder: which holds `token_files`.
        split: "train" or "validation".
        vocab_size: of the tokenizer that made the files.
        eot: the same tokenizer's end-of-text token.

    Raises:
        DataError: a file is damaged or is not of the tokenizer's.
    """
    if (folder / "meta.pkl").exists():
        raise DataError(
            f"{folder} has its vocabulary in meta.pkl, a pickle, which gptjax never "
            "opens. Prepare its text again: gptjax data prepare input.txt "
            "--tokenizer bytes --out DIR."
        )
    shards = [
        datatrove_shard(path, eot) if path.suffix == ".ds" else bin_shard(path)
        for path in token_files(folder)
        if ("val" in path.name) == (split == "validation")
    ]
    return open_shards(shards, vocab_size, eot) if shards else None


def bin_shard(path: Path) -> Shard:
    """A file of u16 tokens, behind llm.c's header where it has one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(LLMC_BYTES)
    # As tokens, llm.c's magic number would start with id 55,448, which GPT-2 has not.
    if len(header) < LLMC_BYTES or np.frombuffer(header, "<i4", 1)[0] != LLMC_MAGIC:
        return Shard(path, size // 2, np.dtype("<u2"))
    _, version, count = np.frombuffer(header, "<i4", 3)
    if version != 1:
        raise DataError(
            f"{path}: llm.c's format in version {version}; only version 1 (GPT-2) is "
            "read. Write the file again, or prepare the text."
        )
    return Shard(path, int(count), np.dtype("<u2"), LLMC_BYTES)


def datatrove_shard(path: Path, eot: int) -> Shard:
    """A .ds file; the last end of a document in its .index tells the tokens' type."""
    index = path.with_name(path.name + ".index")
    ends = np.fromfile(index, "<u8") if index.exists() else np.empty(0, "<u8")
    size = path.stat().st_size
    last = int(ends[-1]) if len(ends) else 0
    if size not in (2 * last, 4 * last) or not size:
        raise DataError(
            f"{path} has {size:,} bytes, but {index.name} does not end at half or a "
            f"quarter of that (it ends at {last:,}). Copy both files again."
        )
    dtype = np.dtype(f"<u{size // last}")
    ending = np.memmap(path, dtype, "r", shape=(last,))[int(ends[0]) - 1]
    if ending != eot:
        raise DataError(
            f"{path}: the first document ends with token {ending}, not with the "
            f"tokenizer's end-of-text token {eot}. Set data.tokenizer to the one that "
            "made it, or write it again with an eos_token."
        )
    return Shard(path, last, dtype, index=index, documents=len(ends))
