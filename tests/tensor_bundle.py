"""A writer of TensorFlow's checkpoints, as plain as can be, for tests.

Nothing of it comes from the reader; the checksum goes byte by byte.
"""

import itertools
from pathlib import Path

TABLE = []
for register in range(256):
    for _ in range(8):
        register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    TABLE.append(register)


def bytewise(data: bytes, crc: int = 0) -> int:
    register = crc ^ 0xFFFFFFFF
    for byte in data:
        register = (register >> 8) ^ TABLE[(register ^ byte) & 0xFF]
    return register ^ 0xFFFFFFFF


def masked(crc: int) -> int:
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


def shape(*lengths: int) -> bytes:
    return proto(*((2, proto((1, length))) for length in lengths))


def entry(dims: bytes, size: int, *, dtype=1, shard=0, offset=0, crc=0) -> bytes:
    fields = (1, dtype), (2, dims), (3, shard), (4, offset), (5, size)
    return proto(*fields) + b"\x35" + crc.to_bytes(4, "little")


def pair(key: bytes, value: bytes, shared: int = 0) -> bytes:
    numbers = shared, len(key), len(value)
    return b"".join(map(varint, numbers)) + key + value


def sealed(content: bytes, kind: bytes = b"\0") -> bytes:
    return content + kind + masked(bytewise(content + kind)).to_bytes(4, "little")


RESTARTS = bytes(4) + b"\x01\0\0\0"  # of a block: one, at its start


def table(*contents: bytes, kind: bytes = b"\0", places=None) -> bytes:
    """A table of these blocks, which `places` may say to be elsewhere."""
    data, found = b"", []
    for content in contents:
        found.append(varint(len(data)) + varint(len(content)))
        data += sealed(content, kind)
    handles = (places or found) + [varint(len(data)) + varint(8)]  # the last: metadata
    data += sealed(RESTARTS)
    keys = (b"%08d" % number for number in itertools.count())
    index = b"".join(map(pair, keys, handles[:-1])) + RESTARTS
    footer = handles[-1] + varint(len(data)) + varint(len(index))
    magic = bytes.fromhex("57fb808b247547db")
    return data + sealed(index) + footer.ljust(40, b"\0") + magic


HEADER = proto((1, 1), (3, proto((1, 1))))  # one data file, version 1


def index_of(*pairs: tuple[bytes, bytes], header: bytes = HEADER) -> bytes:
    return table(b"".join(pair(*p) for p in ((b"", header), *pairs)) + RESTARTS)


def folder_of(folder: Path, index: bytes, *data: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.ckpt.index").write_bytes(index)
    for number, content in enumerate(data):
        name = f"model.ckpt.data-{number:05d}-of-{len(data):05d}"
        (folder / name).write_bytes(content)
    return folder
