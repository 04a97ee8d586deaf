"""A writer of TensorFlow's checkpoint indexes for tests, independent of the reader."""

import itertools
from pathlib import Path

TABLE = []
for register in range(256):
    for _ in range(8):
        register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    TABLE.append(register)


def masked_crc32c(data: bytes) -> int:
    """CRC-32C byte by byte, masked as in TensorFlow."""
    register = 0xFFFFFFFF
    for byte in data:
        register = (register >> 8) ^ TABLE[(register ^ byte) & 0xFF]
    crc = register ^ 0xFFFFFFFF
    return ((crc >> 15) + (crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) % (1 << 32)


def varint(number: int) -> bytes:
    number %= 1 << 64
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def proto(*fields: tuple[int, int | bytes]) -> bytes:
    """A message of (number, value): bytes with their length, integers as varints."""
    return b"".join(
        varint(number << 3) + varint(value)
        if isinstance(value, int)
        else varint(number << 3 | 2) + varint(len(value)) + value
        for number, value in fields
    )


def entry(*shape: int, size: int, dtype=1, offset=0) -> bytes:
    """A tensor whose checksum is 0."""
    axes = proto(*((2, proto((1, length))) for length in shape))
    return proto((1, dtype), (2, axes), (4, offset), (5, size))


def pair(key: bytes, value: bytes, shared: int = 0) -> bytes:
    return b"".join(map(varint, (shared, len(key), len(value)))) + key + value


RESTARTS = bytes(4) + b"\x01\0\0\0"  # of a block: one, at its start
HEADER = proto((1, 1), (3, proto((1, 1))))  # one data file, version 1


def table(*blocks: bytes, kind: bytes = b"\0", handles=()) -> bytes:
    """A table of these blocks, whose index has these handles if there are any."""
    data, places = b"", []
    for content in (*blocks, RESTARTS):  # the last: metadata
        places.append(varint(len(data)) + varint(len(content)))
        data += content + kind + masked_crc32c(content + kind).to_bytes(4, "little")
        kind = kind if len(places) < len(blocks) else b"\0"
    keys = (b"%08d" % number for number in itertools.count())
    index = b"".join(map(pair, keys, handles or places[:-1])) + RESTARTS
    footer = places[-1] + varint(len(data)) + varint(len(index))
    data += index + b"\0" + masked_crc32c(index + b"\0").to_bytes(4, "little")
    return data + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def write_checkpoint(folder: Path, index: bytes, data: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.ckpt.index").write_bytes(index)
    (folder / "model.ckpt.data-00000-of-00001").write_bytes(data)
    return folder
