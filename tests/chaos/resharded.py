"""A training state saved on some devices and processes comes back on any others.

The checksums of all its arrays are the same where it was saved, where it is restored,
and as NumPy computes them from the values alone.
"""

import functools
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.checkpoint.checkpoint import checksum_tree, restore, write_step
from gptjax.checkpoint.manifest import read_manifest
from gptjax.parallel import distributed
from gptjax.tree import flatten_with_names
from tests.chaos._runs import run_jobs
from tests.chaos.crashpoints import place_state
from tests.chaos.damaged_checkpoints import state_at
from tests.processes import addresses

Layout = tuple[int, int]  # devices of each process, processes
LAYOUTS: list[Layout] = [*itertools.product((1, 2, 4, 8), (1, 2))]
FEW: list[tuple[Layout, Layout]] = [((8, 1), (2, 2)), ((2, 2), (1, 1)), ((1, 1), (8, 1))]
PAIRS = FEW + [pair for pair in itertools.product(LAYOUTS, LAYOUTS) if pair not in FEW]
SLICE, FULL = len(FEW), len(PAIRS)
MASK = np.uint64(2**32 - 1)


def checksum_with_numpy(leaf: np.ndarray) -> int:
    bits = np.ravel(leaf).view(f"u{leaf.itemsize}").astype(np.uint64)
    index = np.arange(bits.size, dtype=np.uint64)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        index = ((index ^ (index >> np.uint64(shift))) * np.uint64(factor)) & MASK
    odd = (index ^ (index >> np.uint64(16))) | np.uint64(1)
    return int(np.sum((bits * odd) & MASK) & MASK)


def work(address: str, folder: Path, is_save: bool) -> dict[str, int]:
    if address:
        distributed.initialize(address)
    tree = place_state(1)
    if is_save:
        write_step(folder, 1, tree, keep=2)
    else:
        tree = restore(folder, 1, jax.tree.map(lambda leaf: 0 * leaf, tree))
    return checksum_tree(tree)[0]


def run_on(layout: Layout, folder: Path, is_save: bool) -> dict[str, int] | str:
    devices, count = layout
    jobs = [(work, address, folder, is_save) for address in addresses(count)]
    return run_jobs(*jobs, devices=devices)


def prepare(folder: Path) -> Callable[[int, random.Random], str]:
    leaves = flatten_with_names(state_at(1))
    expected = {name: checksum_with_numpy(leaf) for name, leaf in leaves.items()}

    @functools.cache
    def save(layout: Layout) -> tuple[Path, Any]:
        path = folder / "{}x{}".format(*layout)
        return path, run_on(layout, path, is_save=True)

    def check(case: int, rng: random.Random) -> str:
        one, other = PAIRS[case]
        path, saved = save(one)
        restored = run_on(other, path, is_save=False)
        recorded = {name: x for name, (_, x) in read_manifest(path / "1")["arrays"].items()}
        is_same = saved == restored == recorded == expected
        return "" if is_same else f"{one} to {other}: {saved}, {restored}, not {expected}"

    return check
