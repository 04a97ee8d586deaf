"""GGUF files with damaged bytes, other counts and offsets, or other metadata.

A file is loaded or refused with a ModelError that names it. No tensor is outside of the
file, and memory does not grow with what the file claims.
"""

import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptjax.errors import ModelError
from gptjax.tokenizer.chat_template import load_chat_template
from gptjax.weights.load import open_model_source, read_model
from tests.chaos._damage import damage_bytes
from tests.gguf_files import TENSOR_TYPES, gguf_bytes, gguf_metadata, gguf_tensors
from tests.small_models import LLAMA, make_model

FULL, SLICE = 20_000, 300
MAX_GROWTH_KB = 200 << 10  # of resident memory over the whole campaign
NUMBERS = (0, 1, 2, 3, 8, 9, 12, 31, 33, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 61)
NUMBERS += ((1 << 63) - 1, 1 << 63, (1 << 64) - 1)
VALUES = ("", "llama", "qwen3", "x" * 3000, True, 0, 1, 7, 2**32 - 1, 0.0, -1.0, 1e30)
VALUES += (float("nan"), float("inf"), [], [1], [-1, 2**31 - 1], ["a"] * 300, [0.5], [True])
WORDS = [b"GGUF", *(struct.pack("<Q", n) for n in NUMBERS), *(struct.pack("<I", n) for n in (3, 9))]
FIELD_OFFSETS = (-8, 0, 4, 8, 12, 16, 20, 24, 28)  # before a name, and after it


def change_field(rng: random.Random, whole: bytes, names: list[str]) -> bytes:
    """The file with another length, type, count, dim or offset."""
    name = rng.choice(names).encode()
    start, offset = whole.index(struct.pack("<Q", len(name)) + name) + 8, rng.choice(FIELD_OFFSETS)
    at = start + offset + len(name) * (offset >= 0)
    if rng.random() < 0.1:
        at = rng.choice((4, 8, 16))  # version, numbers of tensors and keys
    field = struct.pack("<Q", rng.choice(NUMBERS))[: rng.choice((4, 8))]
    return whole[:at] + field + whole[at + len(field) :]


def change_table(rng: random.Random, table: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    """The table without an entry, or with another value, name or place of it."""
    name, other = rng.choice(sorted(table)), rng.choice(sorted(table))
    rest = {key: value for key, value in table.items() if key != name}
    change = rng.choice([{}, {f"{name}x": table[name]}, {name: table[other]}])
    return rest | rng.choice([change, {name: rng.choice(values)}])


def prepare(folder: Path) -> Callable[[int, random.Random], str]:
    path = folder / "x.gguf"
    shape = {"d_model": 32, "mlp_dim": 32, "head_dim": 8, "n_layers": 1}
    files = []
    for architecture, changes in (("llama", {"qk_norm": False}), ("qwen3", {"rope_factor": 1.0})):
        model = make_model(**LLAMA | shape | changes)
        metadata = gguf_metadata(model, architecture)
        metadata["tokenizer.chat_template"] = load_chat_template("qa").source
        types = [*TENSOR_TYPES]
        tensors = gguf_tensors(model, architecture)
        for n, (name, (array, _)) in enumerate(tensors.items()):
            tensors[name] = (array, types[n % len(types)] if array.ndim > 1 else "F32")
        files.append((metadata, tensors))
    wholes = [gguf_bytes(*file) for file in files]
    names = [[*metadata, *tensors] for metadata, tensors in files]
    memory_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def check(case: int, rng: random.Random) -> str:
        n = rng.randrange(len(files))
        metadata, tensors = files[n]
        match case % 4:
            case 0:
                data = gguf_bytes(change_table(rng, metadata, [*VALUES]), tensors)
            case 1:
                data = gguf_bytes(metadata, change_table(rng, tensors, [*tensors.values()]))
            case 2:
                data = change_field(rng, wholes[n], names[n])
            case _:
                data = damage_bytes(rng, wholes[n], WORDS)
        path.write_bytes(data)
        try:
            source = open_model_source(path)
            read_model(source)
        except ModelError as error:
            return "" if str(path) in str(error) else f"no file in: {error}"
        ends = [tensor.offset + tensor.size for tensor in source.reader.tensors.values()]
        if max(ends) > len(data):
            return f"a tensor ends at {max(ends)} of {len(data)}"
        growth_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_kb
        return f"memory grew by {growth_kb:,} kB" if growth_kb > MAX_GROWTH_KB else ""

    return check
