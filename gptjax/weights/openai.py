"""OpenAI's GPT-2 files: a TensorFlow checkpoint, read without TensorFlow.

hparams.json                        sizes of the model
checkpoint                          text that names the prefix of the next two
model.ckpt.index                    table of name -> where and what the tensor is
model.ckpt.data-00000-of-00001      the tensors' bytes, one behind the other

The index is a table as LevelDB writes it: blocks of sorted (key, value) pairs, then a
block that says where the blocks are, then a footer that says where that one is. The
values are protocol buffers (TensorFlow's tensor_bundle.proto). Every block and every
tensor has a CRC-32C, and all are compared. What a file says about sizes is compared
with the files themselves before memory is taken.
"""

import dataclasses
import io
import itertools
import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from gptjax import strict_json
from gptjax.errors import ModelError
from gptjax.weights.crc32c import crc32c

MAGIC = 0xDB4775248B80FB57  # the last eight bytes of a table
FOOTER = 48  # bytes: two places of blocks, zeros, the magic number
TRAILER = 5  # bytes behind a block: its compression, then a CRC of it and of that
LARGEST_INDEX, LARGEST_TEXT = 1 << 26, 1 << 16  # bytes
PAIRS = 10_000  # in an index; the largest GPT-2 has 580 tensors
LENGTH = 1_000  # bytes of a key, and of a value
AXES = 8

# Numbers of the fields of TensorFlow's messages.
SHARDS, ENDIANNESS, VERSION = 1, 2, 3  # BundleHeaderProto
OLDEST_READER = 2  # VersionDef
DTYPE, SHAPE, SHARD, OFFSET, SIZE, CRC, SLICES = 1, 2, 3, 4, 5, 6, 7  # BundleEntryProto
AXIS, UNKNOWN_RANK = 2, 3  # TensorShapeProto
AXIS_LENGTH = 1  # TensorShapeProto.Dim

DTYPES = {  # by their numbers in TensorFlow's types.proto
    1: np.dtype("<f4"),
    14: np.dtype(ml_dtypes.bfloat16),
    19: np.dtype("<f2"),
}
HPARAMS = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
AGAIN = "Copy the folder again, or download the model again."
OTHER = "Name the folder of a GPT-2 that OpenAI published, or of one saved like it."


class Tensor(NamedTuple):
    """What the index says of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    path: Path  # of the file that holds its bytes
    offset: int  # of the first one
    crc: int  # of all of them, masked

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds; the tensors stay on disk until they are read."""

    index: Path
    tensors: dict[str, Tensor]  # in the order of the index, which is sorted

    def read(self, name: str) -> np.ndarray:
        """The tensor of that name, in memory of its own.

        Raises:
            ModelError: there is none, or its bytes are not those that were written.
        """
        if name not in self.tensors:
            raise ModelError(f"{self.index} has no tensor {name!r}. {OTHER}")
        tensor = self.tensors[name]
        array = np.empty(tensor.shape, tensor.dtype)
        data = array.reshape(-1).view(np.uint8)
        try:
            with tensor.path.open("rb") as file:
                file.seek(tensor.offset)
                if file.readinto(data.data) != len(data):
                    raise ModelError(f"{tensor.path} ends in {name!r}. {AGAIN}")
        except OSError as error:
            raise ModelError(f"cannot read {tensor.path}: {error}. {AGAIN}") from error
        crc = masked(crc32c(data))
        if crc != tensor.crc:
            raise ModelError(
                f"{tensor.path} is damaged: the checksum of {name!r} is {crc:08x}, but "
                f"the index has {tensor.crc:08x}. {AGAIN}"
            )
        return array


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder; of its tensors, only where they lie is checked.

    Raises:
        ModelError: there is none, its index is damaged or has what gptjax does not
            read, or the other files are not those that it describes.
    """
    index = index_file(folder)
    data = read_small(index, LARGEST_INDEX)
    try:
        tensors = tensors_of(index, table(data))
        check_places(tensors.values())
    except ModelError:
        raise
    except (ValueError, OSError) as error:
        raise ModelError(f"{index} cannot be used: {error}. {AGAIN}") from error
    return Checkpoint(index, tensors)


def read_hparams(folder: Path) -> dict[str, int]:
    """The sizes of the model in a folder: `HPARAMS`, from its hparams.json.

    Raises:
        ModelError: they are not there, or not all are positive integers.
    """
    path = folder / "hparams.json"
    data = read_small(path, LARGEST_TEXT)
    sizes = {}
    try:
        found = strict_json.parse(data)
        for name in HPARAMS:
            value = found.get(name) if isinstance(found, dict) else None
            if not isinstance(value, int) or value < 1 or value is True:
                raise ValueError(f"{name}={str(value)[:40]} is no positive integer")
            sizes[name] = value
    except ValueError as error:
        raise ModelError(f"{path} cannot be used: {error}. {AGAIN}") from error
    return sizes


def read_small(path: Path, largest: int) -> bytes:
    """All bytes of a file, which may not be more than `largest`."""
    try:
        if not path.is_file():
            raise ModelError(f"{path} is not there, or is no file. {AGAIN}")
        size = path.stat().st_size
        if size > largest:
            raise ModelError(
                f"{path} has {size:,} bytes, and more than {largest:,} are not read. "
                f"{AGAIN}"
            )
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error}. {AGAIN}") from error


def index_file(folder: Path) -> Path:
    """The index that `checkpoint` names, else model.ckpt's, else the only one.

    TensorFlow may have written a path into that file, which is then one of another
    machine: only a name in this folder is followed.
    """
    if (folder / "checkpoint").exists():
        text = read_small(folder / "checkpoint", LARGEST_TEXT)
        line = rb'^model_checkpoint_path: "(\w[\w.-]*)"\r?$'
        if name := re.search(line, text, re.MULTILINE):
            return folder / f"{name[1].decode()}.index"
    if (folder / "model.ckpt.index").exists():
        return folder / "model.ckpt.index"
    found = sorted(folder.glob("*.index"))
    if len(found) != 1:
        raise ModelError(
            f"{folder} has {len(found)} files that end in .index, but a checkpoint has "
            f"one. {OTHER}"
        )
    return found[0]


def tensors_of(index: Path, pairs: list[tuple[bytes, bytes]]) -> dict[str, Tensor]:
    """What the pairs of an index describe; ValueError if it is not all to be read."""
    if not pairs or pairs[0][0]:
        raise ValueError("it has no header")
    numbers, parts = message(pairs[0][1])
    shards = numbers.get(SHARDS, 0)
    if not 1 <= shards < 100_000:
        raise ValueError(f"it describes {shards:,} data files")
    if numbers.get(ENDIANNESS, 0):
        raise ModelError(f"{index} is of a big-endian machine. {OTHER}")
    version, _ = message(b"".join(parts.get(VERSION, [])))
    if version.get(OLDEST_READER, 0) > 1:  # 1 is what TensorFlow writes
        raise ModelError(
            f"{index} needs a reader of version {version[OLDEST_READER]}, and gptjax "
            f"has 1. {OTHER}"
        )
    tensors = [tensor_of(index, shards, *pair) for pair in pairs[1:]]
    return {tensor.name: tensor for tensor in tensors}


def tensor_of(index: Path, shards: int, key: bytes, value: bytes) -> Tensor:
    """The tensor that one pair of an index describes."""
    name = key.decode("utf-8")
    numbers, parts = message(value)
    if SLICES in parts:
        raise ModelError(f"{index} has {name!r} only in slices. {OTHER}")
    kind, shard = numbers.get(DTYPE, 0), numbers.get(SHARD, 0)
    if kind not in DTYPES:
        raise ModelError(
            f"{index} has {name!r} in TensorFlow's type {kind}, and gptjax reads "
            f"{', '.join(f'{n} ({dtype})' for n, dtype in DTYPES.items())}. {OTHER}"
        )
    if shard >= shards:
        raise ValueError(f"{name!r} is in data file {shard} of 0 to {shards - 1}")
    rank, axes = message(b"".join(parts.get(SHAPE, [])))
    shape = tuple(message(a)[0].get(AXIS_LENGTH, 0) for a in axes.get(AXIS, []))
    size = numbers.get(SIZE, 0)
    path = index.with_suffix(f".data-{shard:05d}-of-{shards:05d}")
    place = numbers.get(OFFSET, 0)
    tensor = Tensor(name, shape, DTYPES[kind], path, place, numbers.get(CRC, 0))
    if len(shape) > AXES or 0 in shape or UNKNOWN_RANK in rank or tensor.size != size:
        raise ValueError(f"{name!r} cannot have {size:,} bytes and the shape {shape}")
    return tensor


def check_places(tensors: Collection[Tensor]) -> None:
    """Raises unless the tensors lie in their files and none in another one."""
    order = sorted(tensors, key=lambda tensor: (tensor.path, tensor.offset))
    for path, group in itertools.groupby(order, key=lambda tensor: tensor.path):
        end = 0
        for tensor in group:
            if tensor.offset < end:
                raise ValueError(f"{tensor.name!r} begins inside of another tensor")
            end = tensor.offset + tensor.size
        found = path.stat().st_size if path.is_file() else 0
        if found < end:
            raise ValueError(f"{path.name} has {found:,} bytes instead of {end:,}")


def table(data: bytes) -> list[tuple[bytes, bytes]]:
    """The (key, value) pairs of a LevelDB table; ValueError if it is not one."""
    footer = data[-FOOTER:]
    if int.from_bytes(footer[-8:], "little") != MAGIC:
        raise ValueError("it does not end as an index of TensorFlow does")
    stream = io.BytesIO(footer)
    block(data, varint(stream), varint(stream))  # about the table, of no use here
    blocks = block(data, varint(stream), varint(stream))
    pairs, end = [], 0
    for _, value in pairs_of(blocks):
        stream = io.BytesIO(value)
        place, size = varint(stream), varint(stream)
        if place < end:
            raise ValueError("its blocks do not lie one behind the other")
        pairs += pairs_of(block(data, place, size))
        end = place + size
        if len(pairs) > PAIRS:
            raise ValueError(f"it has more than {PAIRS:,} entries")
    if any(one[0] >= other[0] for one, other in itertools.pairwise(pairs)):
        raise ValueError("its names are not sorted, or one is there twice")
    return pairs


def block(data: bytes, place: int, size: int) -> bytes:
    """A block of a table, with the checksum behind it compared."""
    found = data[place : place + size + TRAILER]
    if len(found) != size + TRAILER:
        raise ValueError(f"its block at {place:,} is cut off")
    if masked(crc32c(found[:-4])) != int.from_bytes(found[-4:], "little"):
        raise ValueError(f"the checksum of its block at {place:,} does not match")
    if found[size]:
        raise ValueError("it is compressed, which TensorFlow's checkpoints never are")
    return found[:size]


def pairs_of(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The pairs of a block; a key repeats the start of the one in front of it."""
    restarts = int.from_bytes(block[-4:], "little")  # u32 places of unshortened keys
    end = len(block) - 4 * (restarts + 1)
    if end < 0:
        raise ValueError("a block has no end")
    stream, key = io.BytesIO(block[:end]), b""
    for _ in range(PAIRS + 1):
        if stream.tell() == end:
            return
        shared, rest, length = varint(stream), varint(stream), varint(stream)
        if shared > len(key) or shared + rest > LENGTH or length > LENGTH:
            raise ValueError(f"a name or its entry has more than {LENGTH:,} bytes")
        key = key[:shared] + take(stream, rest)
        yield key, take(stream, length)
    raise ValueError(f"it has more than {PAIRS:,} entries")


def message(data: bytes) -> tuple[dict[int, int], dict[int, list[bytes]]]:
    """The fields of a protocol buffer by number: integers, and parts with a length."""
    stream = io.BytesIO(data)
    numbers, parts = {}, {}
    while stream.tell() < len(data):
        field, kind = divmod(varint(stream), 8)
        match kind:
            case 0:
                numbers[field] = varint(stream)
            case 1 | 5:
                width = 8 if kind == 1 else 4
                numbers[field] = int.from_bytes(take(stream, width), "little")
            case 2:
                parts.setdefault(field, []).append(take(stream, varint(stream)))
            case _:
                raise ValueError(f"a field has the unknown wire type {kind}")
    return numbers, parts


def varint(stream: io.BytesIO) -> int:
    """An integer in groups of seven bits, the lowest first."""
    value = 0
    for shift in range(0, 70, 7):
        (byte,) = take(stream, 1)
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    raise ValueError("an integer has more than ten bytes")


def take(stream: io.BytesIO, count: int) -> bytes:
    """The next bytes, all of `count`."""
    data = stream.read(min(count, LARGEST_INDEX))
    if len(data) != count:
        raise ValueError("it ends in the middle of an entry")
    return data


def masked(crc: int) -> int:
    """A CRC as TensorFlow stores it, so that it may lie inside what is summed."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
