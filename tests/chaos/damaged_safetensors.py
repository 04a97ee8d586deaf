"""A safetensors file with flipped, cut, swapped or added bytes, or another header.

With its hash known it is refused or unchanged; without, it is read or refused, and
nothing but a ModelError comes out, nor more memory in than the file has.
"""

import json
import random
import resource
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

from gptjax.errors import DataError, ModelError
from gptjax.fileio.download import Pin, check_pin, sha256_of_files
from gptjax.weights.safetensors import HEADER_LENGTH_BYTES, open_safetensors

FULL, SLICE = 1_000_000, 100_000
MOST_GROWTH = 200 << 10  # kB of resident memory over the whole campaign

WORDS = (
    *("F32", "F16", "BF16", "I32", "F64", "dtype", "shape", "data_offsets", "a", "h.0"),
    *("0", "1", "2", "-1", "9" * 30, "1e999", "NaN", "null", "[]", "{}", '"', "\\ud800"),
    *("__metadata__", "../x", "true", ":", ",", "[" * 99, "4611686018427387904"),
)


def whole_file(folder: Path) -> Path:
    """A small file with a tensor of each kind."""
    rng = np.random.default_rng(0)
    arrays = {
        "h.0.weight": rng.normal(size=(3, 4)).astype(np.float32),
        "h.1.weight": rng.normal(size=(4, 3)).astype(np.float32),
        "blocks/mlp": rng.normal(size=(2, 3, 2)).astype(np.float16),
        "c": rng.normal(size=5).astype(ml_dtypes.bfloat16),
        "mask": np.tril(np.ones((4, 4), bool)),
    }
    path = folder / "whole.safetensors"
    safetensors.numpy.save_file(arrays, path, {"format": "pt"})
    return path


def mutated(lot: random.Random, whole: bytes) -> bytes:
    """The file with one to three changes; most of them in the header."""
    data = bytearray(whole)
    for _ in range(lot.randint(1, 3)):
        stop = len(data) if lot.random() < 0.4 else min(600, len(data))
        at = lot.randrange(stop) if stop else 0
        match lot.randrange(8):
            case 0:
                data[at : at + 1] = bytes([(*data[at : at + 1], 0)[0] ^ 1 << at % 8])
            case 1:
                data[at : at + 1] = bytes([lot.randrange(256)])
            case 2:
                del data[at:]
            case 3:
                data[at:at] = lot.randbytes(lot.randint(1, 9))
            case 4:
                del data[at : at + lot.randint(1, 9)]
            case 5:
                data[at : at + 8] = bytes(8)
            case 6:
                data[:HEADER_LENGTH_BYTES] = struct.pack("<Q", lot.getrandbits(lot.choice((9, 64))))
            case 7:
                data[at : at + lot.randint(0, 5)] = lot.choice(WORDS).encode()
    return bytes(data)


def reworded(lot: random.Random, whole: bytes) -> bytes:
    """The file with a header that is JSON still, in which some value is another one."""
    length = struct.unpack("<Q", whole[:HEADER_LENGTH_BYTES])[0]
    header = json.loads(whole[HEADER_LENGTH_BYTES : HEADER_LENGTH_BYTES + length])
    one, other = lot.sample(sorted(header), 2)
    match lot.randrange(6):
        case 0:
            header[one], header[other] = header[other], header[one]
        case 1:
            header[lot.choice(WORDS)] = header.pop(one)
        case 2:
            header[one] = lot.choice((None, [], 3, "x", {}))
        case 3 | 4:
            name = lot.choice(("dtype", "shape", "data_offsets", "x"))
            value = lot.choice(("F32", [0], [1 << 62, 0], [-1, 2], [], [12], [0, 48], 0.5))
            header[one] = {**header[one], name: value}
        case 5:
            header |= {f"t{n}": header[one] for n in range(lot.choice((1, 300)))}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + whole[HEADER_LENGTH_BYTES + length :]


def fault_of(path: Path, whole: bytes, data: bytes, pin: Pin) -> str:
    """What went wrong with a file of these bytes, or ""."""
    path.write_bytes(data)
    try:
        check_pin(path, pin, "")
        if data != whole:
            return "another file passed for the one with the known hash"
    except DataError:
        if data == whole:
            return "the file itself was refused"
    try:
        found = open_safetensors([path])
        size = sum(found.read(name).nbytes for name in found.tensors)
    except ModelError as error:
        return "" if str(path) in str(error) else f"no file in: {error}"
    header = HEADER_LENGTH_BYTES + int.from_bytes(data[:HEADER_LENGTH_BYTES], "little")
    whole_size = header + size  # without gaps, and nothing twice
    return "" if whole_size == len(data) else f"{whole_size} bytes of {len(data)}"


def run(seed: int, cases: Sequence[int], folder: Path) -> Iterator[str]:
    """What went wrong with each case."""
    source, path = whole_file(folder), folder / "x.safetensors"
    whole = source.read_bytes()
    pin = Pin(len(whole), sha256_of_files([source]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in cases:
        lot = random.Random(f"{seed} {case}")
        change = reworded if case % 4 == 0 else mutated
        try:
            fault = fault_of(path, whole, change(lot, whole), pin)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        yield fault or ("" if grown < MOST_GROWTH else f"memory grew by {grown:,} kB")
