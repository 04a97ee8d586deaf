"""Safetensors files with damaged bytes or another header.

With its hash known a file is refused or unchanged; without, it is read or refused with
a ModelError, and needs no more memory than its size.
"""

import json
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from gptjax.errors import DataError, ModelError
from gptjax.fileio.download import Pin, check_pin, sha256_of_files
from gptjax.weights.safetensors import open_safetensors
from tests.chaos._damage import damage_bytes

FULL, SLICE = 1_000_000, 4_000
HEADER_LENGTH_BYTES = 8
MAX_GROWTH_KB = 200 << 10  # of resident memory over the whole campaign
ARRAYS = {
    "h.0.weight": np.ones((3, 4), np.float32),
    "h.1.weight": np.zeros((4, 3), np.float32),
    "blocks/mlp": np.ones((2, 3, 2), np.float16),
    "c": np.ones(5, ml_dtypes.bfloat16),
    "mask": np.tril(np.ones((4, 4), bool)),
}
WORDS = (
    *("F32", "F16", "BF16", "I32", "F64", "dtype", "shape", "data_offsets", "a", "h.0"),
    *("0", "1", "2", "-1", "9" * 30, "1e999", "NaN", "null", "[]", "{}", '"', "\\ud800"),
    *("__metadata__", "../x", "true", ":", ",", "[" * 99, "4611686018427387904"),
)
WORD_BYTES = [word.encode() for word in WORDS]


def change_header(rng: random.Random, whole: bytes) -> bytes:
    """The file with another value in the header, which stays valid JSON."""
    length = struct.unpack("<Q", whole[:HEADER_LENGTH_BYTES])[0]
    header: dict[str, Any] = json.loads(whole[HEADER_LENGTH_BYTES : HEADER_LENGTH_BYTES + length])
    one, other = rng.sample(sorted(header), 2)
    field = rng.choice(("dtype", "shape", "data_offsets", "x"))
    value = rng.choice(("F32", [0], [1 << 62, 0], [-1, 2], [], [12], [0, 48], 0.5))
    changes = [
        {one: header[other], other: header[one]},
        {rng.choice(WORDS): header[one]},
        {one: rng.choice((None, [], 3, "x", {}))},
        *[{one: {**header[one], field: value}}] * 2,
        {f"t{n}": header[one] for n in range(rng.choice((1, 300)))},
    ]
    rest = {name: entry for name, entry in header.items() if name != one}
    text = json.dumps(rest | rng.choice(changes)).encode()
    return struct.pack("<Q", len(text)) + text + whole[HEADER_LENGTH_BYTES + length :]


def prepare(folder: Path) -> Callable[[int, random.Random], str]:
    path = folder / "x.safetensors"
    safetensors.numpy.save_file(ARRAYS, path, {"format": "pt"})
    whole = path.read_bytes()
    pin = Pin(len(whole), sha256_of_files([path]))
    memory_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def check(case: int, rng: random.Random) -> str:
        data = damage_bytes(rng, whole, WORD_BYTES) if case % 4 else change_header(rng, whole)
        if case % 4 == 1:
            length = rng.getrandbits(rng.choice((9, 64)))
            data = struct.pack("<Q", length) + data[HEADER_LENGTH_BYTES:]
        path.write_bytes(data)
        try:
            check_pin(path, pin, "")
            if data != whole:
                return "another file passed for the one with the known hash"
        except DataError:
            if data == whole:
                return "the file itself was refused"
        try:
            tensors = open_safetensors([path])
            size = sum(tensors.read(name).nbytes for name in tensors.tensors)
        except ModelError as error:
            return "" if str(path) in str(error) else f"no file in: {error}"
        header_size = HEADER_LENGTH_BYTES + int.from_bytes(data[:HEADER_LENGTH_BYTES], "little")
        if header_size + size != len(data):  # gaps, or something twice
            return f"{header_size + size} bytes of {len(data)}"
        growth_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_kb
        return f"memory grew by {growth_kb:,} kB" if growth_kb > MAX_GROWTH_KB else ""

    return check
