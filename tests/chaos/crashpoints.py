"""Killed at any point of a save or a start, a run resumes from that step or before.

A point is before or after something that Python does to the file system. The points are
dealt to the cases, so that the campaign covers all of them, however many this version
of Orbax has. In the second half two processes save together, and one of them is killed.
"""

import builtins
import functools
import io
import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.checkpoint.checkpoint import restore_latest, write_step
from gptjax.parallel import distributed
from tests.chaos._disturbed import killer, watch
from tests.chaos._runs import run_jobs
from tests.chaos.damaged_checkpoints import resume_fault, state_at
from tests.processes import addresses

SHARES = 16  # cases that the points of one process are dealt to
SLICE, FULL = 1, 2 * SHARES
PARALLEL = 2  # plays at a time
PATCHED = (
    *("rename", "replace", "mkdir", "unlink", "remove", "rmdir"),
    *("fsync", "truncate", "link", "symlink"),
)
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
TEMPORARY = (".partial", ".orbax-checkpoint-tmp")


def kill_at(point: int) -> Iterator[int]:
    """Kills the process at a point. Orbax writes arrays in C++, between two points."""
    points = itertools.count()
    pass_point = killer(point, points)

    def pass_open(path: Any, flags: int, *_: Any, **__: Any) -> None:
        if flags & WRITE_FLAGS:
            pass_point()

    def pass_builtin_open(file: Any, mode: str = "r", *_: Any, **__: Any) -> None:
        if isinstance(file, (str, os.PathLike)) and set(mode) & set("wax+"):
            pass_point()

    for name in PATCHED:
        watch(os, name, pass_point, pass_point)
    watch(os, "open", pass_open, pass_open)
    watch(builtins, "open", pass_builtin_open, pass_builtin_open)
    io.open = builtins.open
    return points


def place_state(step: int) -> Any:
    """The state of a step, sharded over all devices of all processes if possible."""
    if jax.device_count() == 1:
        return jax.device_put(state_at(step))
    mesh = Mesh(np.array(jax.devices()).reshape(2, -1), ("row", "column"))

    def put(leaf: Any) -> Any:
        axes = ["row", "column"][: leaf.ndim] if leaf.size % 128 == 0 else []
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put, state_at(step))


def save_or_resume(folder: Path, step: int | None, point: int, address: str) -> int:
    """Returns the number of points, unless it is killed at one."""
    if address:
        distributed.initialize(address)
    state = place_state(step or 0)
    jax.block_until_ready(state)
    points = kill_at(point)
    if step is None:
        restore_latest(folder, state)
    else:
        write_step(folder, step, state, keep=2)
    return next(points)


def fault_after(folder: Path, expected: Sequence[int | None]) -> str:
    if fault := resume_fault(folder, {*expected}):
        return fault
    if left := [name for name in os.listdir(folder) if name.endswith(TEMPORARY)]:
        return f"{left} are left"
    write_step(folder, 9, state_at(9), keep=2)
    return resume_fault(folder, {9})


class Scene(NamedTuple):
    name: str
    before: Path
    step: int | None  # to save; None for a start
    expected: tuple[int | None, ...]  # steps from which a run may resume
    processes: int = 1
    victim: int = 0

    def play(self, folder: Path, point: int = -1) -> Any:
        shutil.copytree(self.before, folder)
        points = [point if n == self.victim else -1 for n in range(self.processes)]
        jobs = [
            (save_or_resume, folder, self.step, *pair)
            for pair in zip(points, addresses(self.processes), strict=True)
        ]
        return run_jobs(jobs.pop(self.victim), *jobs)


def prepare(folder: Path) -> Callable[[int, random.Random], str]:
    none, two, torn = (folder / name for name in ("none", "two", "torn"))
    none.mkdir()
    for step in (1, 2):
        write_step(two, step, state_at(step), keep=2)
    shutil.copytree(two, torn)
    shutil.copytree(torn / "1", torn / "3.partial")
    (torn / "2" / "manifest.json").write_text("{}")
    scenes = [
        Scene("a save that deletes an older step", two, 3, (2, 3)),
        Scene("the first save", none, 1, (None, 1)),
        Scene("a start after a crash", torn, None, (1,)),
    ]
    pairs = [scene._replace(processes=2, victim=n) for scene in scenes[:2] for n in (0, 1)]

    @functools.cache
    def count_points(scene: Scene) -> int:
        return int(scene.play(Path(tempfile.mkdtemp(dir=folder), "whole")))

    def check(case: int, rng: random.Random) -> str:
        for scene in pairs if case >= SHARES else scenes:
            points = range(case % SHARES, count_points(scene), SHARES)
            places = [Path(tempfile.mkdtemp(dir=folder), "run") for _ in points]
            with ThreadPoolExecutor(PARALLEL) as threads:
                plays = [*threads.map(scene.play, places, points)]
            for point, place, play in zip(points, places, plays, strict=True):
                fault = play if isinstance(play, str) else fault_after(place, scene.expected)
                if fault:
                    return f"{scene.name}, victim {scene.victim}, point {point}: {fault}"
                shutil.rmtree(place)
        return ""

    return check
