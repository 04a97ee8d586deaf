"""OpenAI's GPT-2 files: a TensorFlow checkpoint, read without TensorFlow.

hparams.json                        model hyperparameters
model.ckpt.index                    table of tensor name -> location, dtype and shape
model.ckpt.data-00000-of-00001      concatenated tensor data

The index is a LevelDB table (SSTable): blocks of sorted (key, value) entries, a block
with the offsets of these blocks, and a footer with the offset of the latter. Values are
protocol buffers (TensorFlow's tensor_bundle.proto). The CRC-32C of every block and
tensor is verified, and sizes are checked before memory is allocated.
"""

import io
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from gptjax.errors import ModelError
from gptjax.fileio.strict_json import open_regular_file, read_small_file
from gptjax.weights.safetensors import TensorReader

SSTABLE_MAGIC = 0xDB4775248B80FB57  # last eight bytes of a table
FOOTER_BYTES = 48  # two block handles, zeros, the magic number
BLOCK_TRAILER_BYTES = 5  # after each block: compression type and CRC
MAX_INDEX_BYTES = 1 << 26
MAX_INDEX_ENTRIES = 10_000  # the largest GPT-2 has 580 tensors
MAX_ENTRY_BYTES = 1_000  # of a key, and of a value

# Field numbers of TensorFlow's messages.
HEADER_NUM_SHARDS, HEADER_ENDIANNESS = 1, 2  # BundleHeaderProto
ENTRY_DTYPE, ENTRY_SHAPE, ENTRY_OFFSET, ENTRY_SIZE, ENTRY_CRC32C = 1, 2, 4, 5, 6
SHAPE_DIM, DIM_SIZE = 2, 1  # TensorShapeProto, TensorShapeProto.Dim
TF_FLOAT32 = 1  # in types.proto


class BundleEntry(NamedTuple):
    """Location, shape and checksum of a float32 tensor in the data file."""

    shape: tuple[int, ...]
    offset: int  # in bytes
    size: int  # in bytes
    crc32c: int  # masked
    dtype: np.dtype = np.dtype("<f4")


def unusable_file(path: Path, reason: object) -> ModelError:
    """Returns the error for a corrupt or unsupported file."""
    return ModelError(
        f"{path} cannot be used: {reason}. Copy the folder again, or use one in the format "
        "of the GPT-2 published by OpenAI."
    )


def open_tf_checkpoint(folder: Path) -> TensorReader:
    """Opens the checkpoint in a folder; reads and checks only its index."""
    index = find_index_file(folder)
    data = index.with_suffix(".data-00000-of-00001")
    try:
        tensors = parse_entries(read_sstable(read_small_file(index, MAX_INDEX_BYTES)))
        check_offsets(tensors, data.stat().st_size)
    except (ValueError, OSError) as error:
        raise unusable_file(index, error) from error

    def read(name: str) -> np.ndarray:
        entry = tensors[name]
        try:
            with open_regular_file(data) as file:
                file.seek(entry.offset)
                content = file.read(entry.size)
        except OSError as error:
            raise unusable_file(data, error) from error
        if masked_crc32c(content) != entry.crc32c:
            raise unusable_file(data, f"the checksum of {name!r} does not match")
        return np.frombuffer(content, entry.dtype).reshape(entry.shape)

    return TensorReader(tensors, read)


def find_index_file(folder: Path) -> Path:
    """Finds the index: model.ckpt.index, else the only one in the folder."""
    candidates = list(folder.glob("model.ckpt.index")) or list(folder.glob("*.index"))
    if len(candidates) != 1:
        raise unusable_file(folder, f"it has {len(candidates)} *.index files instead of one")
    return candidates[0]


def parse_entries(entries: list[tuple[bytes, bytes]]) -> dict[str, BundleEntry]:
    """Parses the entries of an index; ValueError if invalid."""
    if not entries or entries[0][0]:
        raise ValueError("it has no header")
    header, _ = parse_proto(entries[0][1])
    if header.get(HEADER_NUM_SHARDS) != 1 or header.get(HEADER_ENDIANNESS, 0):
        raise ValueError("its tensors are not in one little-endian data file")
    tensors = {}
    for key, value in entries[1:]:
        name = key.decode("utf-8")
        numbers, messages = parse_proto(value)
        if numbers.get(ENTRY_DTYPE) != TF_FLOAT32:
            raise ValueError(f"{name!r} is not float32")
        _, axes = parse_proto(b"".join(messages.get(ENTRY_SHAPE, [])))
        shape = tuple(parse_proto(axis)[0].get(DIM_SIZE, 0) for axis in axes.get(SHAPE_DIM, []))
        size = numbers.get(ENTRY_SIZE, 0)
        if not size or size != 4 * math.prod(shape):
            raise ValueError(f"{name!r} has {size:,} bytes and the invalid shape {shape}")
        offset, crc32c = (numbers.get(field, 0) for field in (ENTRY_OFFSET, ENTRY_CRC32C))
        tensors[name] = BundleEntry(shape, offset, size, crc32c)
    return tensors


def check_offsets(tensors: Mapping[str, BundleEntry], file_size: int) -> None:
    """Raises ValueError if tensors overlap or do not end with the data file."""
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].offset):
        if entry.offset < end:
            raise ValueError(f"{name!r} overlaps another tensor")
        end = entry.offset + entry.size
    if file_size != end:
        raise ValueError(f"the data file has {file_size:,} bytes instead of {end:,}")


def read_sstable(data: bytes) -> list[tuple[bytes, bytes]]:
    """Reads the (key, value) entries of a LevelDB table; ValueError if invalid."""
    footer = data[-FOOTER_BYTES:]
    if int.from_bytes(footer[-8:], "little") != SSTABLE_MAGIC:
        raise ValueError("it does not end with the magic number of an SSTable")
    stream = io.BytesIO(footer)
    # The metaindex block is unused.
    read_block(data, read_varint(stream), read_varint(stream))
    blocks = read_block(data, read_varint(stream), read_varint(stream))
    entries, end = [], 0
    for _, value in iter_entries(blocks):
        stream = io.BytesIO(value)
        offset, size = read_varint(stream), read_varint(stream)
        if offset < end:
            raise ValueError("its blocks are not in order")
        block, end = read_block(data, offset, size), offset + size
        entries += itertools.islice(iter_entries(block), MAX_INDEX_ENTRIES + 1)
        if len(entries) > MAX_INDEX_ENTRIES:
            raise ValueError(f"it has more than {MAX_INDEX_ENTRIES:,} entries")
    if any(one[0] >= other[0] for one, other in itertools.pairwise(entries)):
        raise ValueError("its names are not sorted and unique")
    return entries


def read_block(data: bytes, offset: int, size: int) -> bytes:
    """Returns a block of a table after verifying its checksum."""
    content = data[offset : offset + size + BLOCK_TRAILER_BYTES]
    if len(content) != size + BLOCK_TRAILER_BYTES:
        raise ValueError(f"its block at {offset:,} is truncated")
    if masked_crc32c(content[:-4]) != int.from_bytes(content[-4:], "little"):
        raise ValueError(f"the checksum of its block at {offset:,} does not match")
    if content[size]:
        raise ValueError("it is compressed, which checkpoints of TensorFlow never are")
    return content[:size]


def iter_entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the entries of a block; keys share prefixes with the preceding key."""
    num_restarts = int.from_bytes(block[-4:], "little")  # u32 offsets of full keys
    end = len(block) - 4 * (num_restarts + 1)
    if end < 0:
        raise ValueError("a block has no valid restart array")
    stream, key = io.BytesIO(block[:end]), b""
    while stream.tell() < end:
        prefix_length, suffix_length, value_length = (read_varint(stream) for _ in range(3))
        if max(prefix_length + suffix_length, value_length) > MAX_ENTRY_BYTES:
            raise ValueError(f"a name or its value has more than {MAX_ENTRY_BYTES:,} bytes")
        key = key[:prefix_length] + read_exact(stream, suffix_length)
        yield key, read_exact(stream, value_length)


def parse_proto(data: bytes) -> tuple[dict[int, int], dict[int, list[bytes]]]:
    """Parses a protocol buffer into integer and length-delimited fields by number."""
    stream = io.BytesIO(data)
    numbers, messages = {}, {}
    while stream.tell() < len(data):
        field, wire_type = divmod(read_varint(stream), 8)
        match wire_type:
            case 0:
                numbers[field] = read_varint(stream)
            case 1 | 5:
                width = 8 if wire_type == 1 else 4
                numbers[field] = int.from_bytes(read_exact(stream, width), "little")
            case 2:
                messages.setdefault(field, []).append(read_exact(stream, read_varint(stream)))
            case _:
                raise ValueError(f"a field has the unknown wire type {wire_type}")
    return numbers, messages


def read_varint(stream: io.BytesIO) -> int:
    """Reads a base-128 varint."""
    value = 0
    for shift in range(0, 70, 7):
        (byte,) = read_exact(stream, 1)
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    raise ValueError("an integer has more than ten bytes")


def read_exact(stream: io.BytesIO, count: int) -> bytes:
    """Reads exactly `count` bytes."""
    data = stream.read(min(count, MAX_INDEX_BYTES))
    if len(data) != count:
        raise ValueError("it ends inside an entry")
    return data


def masked_crc32c(data: bytes) -> int:
    """Returns a CRC-32C, masked as TensorFlow does so that data may contain its own."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
