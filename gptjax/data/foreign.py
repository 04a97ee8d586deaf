"""Token files of nanoGPT, llm.c and datatrove.

They do not store a hash of their tokenizer, so the configured one is used, and every
token id is checked against its vocabulary when read.
"""

from pathlib import Path

import numpy as np

from gptjax.data.shards import TokenShard, TokenDataset, open_shards
from gptjax.errors import DataError

LLMC_MAGIC = 20240520
LLMC_HEADER_BYTES = (
    1024  # header, 256 int32: magic, version 1, number of u16 tokens, zeros
)


def find_token_files(folder: Path) -> list[Path]:
    """Returns .ds files (datatrove) and .bin files with a split in the name."""
    return sorted(
        path
        for path in folder.glob("*")
        if path.suffix == ".ds"
        or (path.suffix == ".bin" and ("train" in path.name or "val" in path.name))
    )


def open_external(
    folder: Path, split: str, vocab_size: int, eot: int
) -> TokenDataset | None:
    """Opens one split; files with "val" in their name are validation data.

    Args:
        folder: see `find_token_files`.
        split: "train" or "validation".
        vocab_size: of the tokenizer of the files.
        eot: end-of-text token of the same tokenizer.

    Raises:
        DataError: a file is corrupt or does not match the tokenizer.
    """
    if (folder / "meta.pkl").exists():
        raise DataError(
            f"{folder} has its vocabulary in meta.pkl; gptjax does not load pickles. "
            "Prepare the text instead: gptjax data prepare input.txt "
            "--tokenizer bytes --out DIR."
        )
    shards = [
        datatrove_shard(path, eot) if path.suffix == ".ds" else llmc_shard(path)
        for path in find_token_files(folder)
        if ("val" in path.name) == (split == "validation")
    ]
    return open_shards(shards, vocab_size, eot) if shards else None


def llmc_shard(path: Path) -> TokenShard:
    """Describes a file of u16 tokens, with or without llm.c's header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(LLMC_HEADER_BYTES)
    # As tokens, llm.c's magic number would start with id 55,448, not in GPT-2.
    if (
        len(header) < LLMC_HEADER_BYTES
        or np.frombuffer(header, "<i4", 1)[0] != LLMC_MAGIC
    ):
        return TokenShard(path, size // 2, np.dtype("<u2"))
    _, version, count = np.frombuffer(header, "<i4", 3)
    if version != 1:
        raise DataError(
            f"{path}: llm.c format version {version}; only version 1 (GPT-2) is "
            "supported. Write the file again, or prepare the text."
        )
    return TokenShard(path, int(count), np.dtype("<u2"), LLMC_HEADER_BYTES)


def datatrove_shard(path: Path, eot: int) -> TokenShard:
    """Describes a .ds file; its dtype follows from the last entry of its .index."""
    index = path.with_name(path.name + ".index")
    ends = np.fromfile(index, "<u8") if index.exists() else np.empty(0, "<u8")
    size = path.stat().st_size
    last = int(ends[-1]) if len(ends) else 0
    if size not in (2 * last, 4 * last) or not size:
        raise DataError(
            f"{path} has {size:,} bytes, but the last entry of {index.name} is "
            f"{last:,}, neither half nor a quarter of that. Copy both files again."
        )
    dtype = np.dtype(f"<u{size // last}")
    end_token = np.memmap(path, dtype, "r", shape=(last,))[int(ends[0]) - 1]
    if end_token != eot:
        raise DataError(
            f"{path}: the first document ends with token {end_token}, not with the "
            f"end-of-text token {eot}. Set data.tokenizer to the tokenizer of the "
            "file, or write the file again with an eos_token."
        )
    return TokenShard(path, last, dtype, index_path=index, documents=len(ends))
