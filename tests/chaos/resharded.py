"""A training state saved on some devices and processes comes back on any others.

The checksums of all its arrays are the same where it was saved, where it is restored,
and as NumPy computes them from the values alone.
"""

import functools
import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax import init
from gptjax.checkpoint.checkpoint import checksum_tree, restore, write_step
from gptjax.checkpoint.manifest import read_manifest
from gptjax.config import GPTConfig, MeshConfig, OptimConfig
from gptjax.parallel.sharding import MESH_AXES, make_mesh, shard_tree
from gptjax.training.optimizer import make_optimizer
from gptjax.training.train_step import TrainState, init_state
from gptjax.training.trainer import checkpoint_state
from gptjax.tree import flatten_with_names
from tests.processes import exit_codes, free_port, started

LAYOUTS = [*itertools.product((1, 2, 4, 8), (1, 2))]  # devices of each, processes
FEW = [(1, 1), (8, 1), (2, 2)]  # those of the slice
SLICE, FULL = len(FEW) * (len(FEW) - 1), len(LAYOUTS) ** 2
MESHES = {1: (1, 1, 1), 2: (1, 2, 1), 4: (1, 2, 2), 8: (2, 2, 2), 16: (4, 2, 2)}
SHAPE = {"context_length": 8, "n_layers": 2, "n_heads": 4, "d_model": 32}
CONFIG = GPTConfig(vocab_size=64, dtype="float32", **SHAPE)
MASK = np.uint64(2**32 - 1)
CODE = """
import sys
from gptjax.parallel import distributed
if "," in sys.argv[1]:
    distributed.initialize(sys.argv[1])
from tests.chaos.resharded import work
work(*sys.argv[2:])
"""

Pair = tuple[tuple[int, int], tuple[int, int]]


def pairs(seed: int) -> list[Pair]:
    """(where it is saved, where it is restored): first those of the slice."""
    few = [(one, two) for one in FEW for two in FEW if one != two]
    others = [x for x in itertools.product(LAYOUTS, LAYOUTS) if x not in few]
    return few + random.Random(seed).sample(others, len(others))


@functools.cache
def values(seed: int) -> TrainState:
    """A state of NumPy arrays that holds all kinds of bits but those of no number."""
    optimizer = make_optimizer(OptimConfig(warmup_steps=1), 10)

    def fresh() -> TrainState:
        key = jax.random.key(0)
        return init_state(init(CONFIG, key), optimizer, key)._replace(key=key)

    rng = np.random.default_rng(seed)

    def filled(leaf: Any) -> Any:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return np.zeros((), np.int32)  # which no checkpoint holds
        if np.issubdtype(leaf.dtype, np.integer):
            return rng.integers(100, size=leaf.shape).astype(leaf.dtype)
        wide = rng.normal(size=leaf.shape) * 2.0 ** rng.integers(-60, 60, leaf.shape)
        return np.asarray(wide, leaf.dtype)

    return jax.tree.map(filled, jax.eval_shape(fresh))


def there(seed: int, zero: bool = False) -> dict[str, Any]:
    """What a checkpoint holds of the state, on all devices of all processes."""
    sizes = dict(zip(MESH_AXES, MESHES[jax.device_count()], strict=True))
    state = values(seed)
    if zero:
        state = jax.tree.map(np.zeros_like, state)
    if jax.device_count() == 1:
        state = jax.device_put(state)
    return checkpoint_state(shard_tree(state, make_mesh(MeshConfig(**sizes))))


def checksum_with_numpy(leaf: np.ndarray) -> int:
    """The checksum of `gptjax.checkpoint.checkpoint`, written down once more."""
    bits = np.ascontiguousarray(leaf).reshape(-1).view(np.uint32).astype(np.uint64)
    index = np.arange(bits.size, dtype=np.uint64)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        index = ((index ^ (index >> np.uint64(shift))) * np.uint64(factor)) & MASK
    odd = (index ^ (index >> np.uint64(16))) | np.uint64(1)
    return int(np.sum((bits * odd) & MASK) & MASK)


def work(job: str, seed: str, *folders: str) -> None:
    """Saves or restores in every folder; prints the checksums of each, by name."""
    for folder in map(Path, folders):
        if job == "save":
            write_step(folder, 1, there(int(seed)), keep=2)
            continue
        tree = restore(folder, 1, there(int(seed), zero=True))
        sums, _ = checksum_tree(tree)
        if jax.process_index() == 0:
            print(json.dumps([str(folder), sums]), flush=True)


def together(
    layout: tuple[int, int], job: str, seed: int, folder: Path, folders: Sequence[Path]
) -> list[str]:
    """The lines that the first process says."""
    devices, count = layout
    port = free_port()
    commands = []
    for number in range(count):
        where = f"127.0.0.1:{port},{count},{number}" if count > 1 else "alone"
        given = [job, str(seed), *map(str, folders)]
        commands.append([sys.executable, "-c", CODE, where, *given])
    folder.mkdir(parents=True, exist_ok=True)
    with started(commands, [folder] * count, devices) as processes:
        if any(exit_codes(processes)):
            return ["".join(one.complained()[-500:] for one in processes)]
        return processes[0].said().splitlines()


def run(seed: int, cases: Sequence[int], folder: Path) -> Iterator[str]:
    """How the checksums of each pair differ, or ""."""
    wanted = [pairs(seed)[case] for case in cases]
    truth = {
        k: checksum_with_numpy(v)
        for k, v in flatten_with_names(checkpoint_state(values(seed))).items()
    }
    saved, restored = {}, {}
    for one in dict.fromkeys(one for one, _ in wanted):
        path = saved[one] = folder / "saved{}x{}".format(*one)
        together(one, "save", seed, folder / "saver{}x{}".format(*one), [path])
    for two in dict.fromkeys(two for _, two in wanted):
        paths = [saved[one] for one, other in wanted if other == two]
        here = folder / "restorer{}x{}".format(*two)
        restored[two] = together(two, "restore", seed, here, paths)
    for one, two in wanted:
        yield fault_of(saved[one], restored[two], truth)


def fault_of(path: Path, lines: list[str], truth: dict[str, int]) -> str:
    """What differs between a state, its manifest, and what came back, or ""."""
    try:
        sums = dict(map(json.loads, lines))[str(path)]
        arrays = read_manifest(path / "1")["arrays"]
    except (ValueError, LookupError) as error:
        return f"{path.name}: {error!r} {' '.join(lines)[-500:]}"
    saved = {name: value for name, (_, value) in arrays.items()}
    for name, value in truth.items():
        if not saved[name] == sums[name] == value:
            what = f"{name} has {value}, was saved as {saved[name]}"
            return f"{path.name}: {what} and came back as {sums[name]}"
    return "" if saved.keys() == truth.keys() else f"{path.name} holds other arrays"
