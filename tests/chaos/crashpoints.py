"""Killed at any point of a save or a start, a run resumes from that step or before.

A point is before or after something that Python does to the file system. The points are
dealt to the cases, so that the campaign covers all of them, however many this version
of Orbax has. In the second half two processes save together, and one of them is killed.
"""

import builtins
import io
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.checkpoint.checkpoint import restore_latest, write_step
from gptjax.parallel import distributed
from tests.chaos._forks import run_jobs
from tests.chaos._small_states import resume_fault, state_at
from tests.processes import free_port

SHARES = 4  # cases that the points of one process are dealt to
SLICE, FULL = SHARES, 2 * SHARES
PARALLEL = 2  # jobs at a time
PATCHED = (
    *("rename", "replace", "mkdir", "unlink", "remove", "rmdir"),
    *("fsync", "truncate", "link", "symlink"),
)
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
TEMPORARY = (".partial", ".orbax-checkpoint-tmp")


def kill_at(point: int) -> Callable[[], int]:
    """Kills the process at a point from now on; never if it is -1.

    Operation n has the points 2 n before it and 2 n + 1 after it. The arrays are
    written by Orbax in C++, between two points. Returns a function that counts the
    points so far.
    """
    passed, lock = [], threading.Lock()

    def pass_point() -> None:
        with lock:
            passed.append(point)
            number = len(passed) - 1
        if number == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def patch(function: Any, is_counted: Callable[..., bool]) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if not is_counted(*arguments, **options):
                return function(*arguments, **options)
            pass_point()
            result = function(*arguments, **options)
            pass_point()
            return result

        return call

    for name in PATCHED:
        setattr(os, name, patch(getattr(os, name), lambda *_, **__: True))
    os.open = patch(os.open, lambda _, flags, *__, **___: bool(flags & WRITE_FLAGS))
    builtins.open = io.open = patch(builtins.open, opens_for_writing)
    return lambda: len(passed)


def opens_for_writing(file: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
    return isinstance(file, (str, os.PathLike)) and bool(set(mode) & set("wax+"))


def place_state(step: int) -> Any:
    """The state of a step; each of several processes has a part of the kernel."""
    state = state_at(step)
    if jax.process_count() == 1:
        return jax.device_put(state)
    mesh = Mesh(np.array(jax.devices()), ("part",))

    def put(leaf: Any) -> Any:
        is_split = leaf.ndim and leaf.shape[0] % jax.device_count() == 0
        spec = PartitionSpec(*["part" if is_split else None] * min(leaf.ndim, 1))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(
            host.shape, NamedSharding(mesh, spec), lambda index: host[index]
        )

    return jax.tree.map(put, state)


def save(folder: Path, step: int, point: int = -1, address: str = "") -> int:
    """Saves a step and is killed at a point; else returns the number of points."""
    if address:
        distributed.initialize(address)
    state = place_state(step)
    jax.block_until_ready(state)
    count_points = kill_at(point)
    write_step(folder, step, state, keep=2)
    return count_points()


def start(folder: Path, point: int) -> int:
    """Restores as a run does and is killed at a point, as `save`."""
    like = state_at(0)
    count_points = kill_at(point)
    restore_latest(folder, like)
    return count_points()


def check(folders: Sequence[Path], expected: Sequence[int | None]) -> list[str]:
    """Returns the faults of a start in each folder, and of a save after it."""
    faults = []
    for folder in folders:
        fault = resume_fault(folder, {*expected})
        left = [name for name in os.listdir(folder) if name.endswith(TEMPORARY)]
        if not fault and left:
            fault = f"{left} are left"
        if not fault:
            write_step(folder, 9, state_at(9), keep=2)
            fault = resume_fault(folder, {9})
        faults.append(fault)
        shutil.rmtree(folder)
    return faults


class Scene(NamedTuple):
    """A process to kill, the place, and the valid states afterwards."""

    name: str
    before: Path
    step: int | None  # to save; None for a start
    expected: Sequence[int | None]

    def play(self, folder: Path, point: int, processes: int, victim: int) -> Any:
        """Returns the number of points, or None if the process was killed at one."""
        shutil.copytree(self.before, folder)
        if self.step is None:
            return run_jobs((start, folder, point))
        port = free_port()
        addresses = [f"127.0.0.1:{port},{processes},{n}" for n in range(processes)]
        jobs = [(save, folder, self.step, -1, address) for address in addresses]
        address = addresses[victim] if processes > 1 else ""
        others = [job for n, job in enumerate(jobs) if n != victim]
        return run_jobs((save, folder, self.step, point, address), *others)


def make_scenes(folder: Path) -> Iterator[Scene]:
    none, two, torn = (folder / name for name in ("none", "two", "torn"))
    none.mkdir()
    for path in (two, torn):
        path.mkdir()
        for step in (1, 2):
            run_jobs((save, path, step))
    yield Scene("a save that deletes an older step", two, 3, [2, 3])
    yield Scene("the first save", none, 1, [None, 1])
    shutil.copytree(torn / "1", torn / "3.partial")
    (torn / "2" / "manifest.json").write_text("{}")
    yield Scene("a start after a crash", torn, None, [1])


def run(seed: int, cases: Sequence[int], folder: Path) -> Iterator[str]:
    scenes = [*make_scenes(folder)]
    for case in cases:
        share, processes = case % SHARES, 2 if case >= SHARES else 1
        faults = [
            f"{scene.name}, {fault}"
            for scene in scenes
            if processes == 1 or scene.step is not None
            for victim in range(processes)
            for fault in scene_faults(scene, folder, share, processes, victim)
        ]
        yield "; ".join(faults[:3])


def scene_faults(
    scene: Scene, folder: Path, share: int, processes: int, victim: int
) -> Iterator[str]:
    """What went wrong at each point of one share."""
    whole = folder / "whole"
    count = scene.play(whole, -1, processes, victim)
    shutil.rmtree(whole)
    if not isinstance(count, int):
        yield f"without a crash: {count}"
        return
    points = range(share, count, SHARES)
    folders = [folder / f"point{point}" for point in points]
    with ThreadPoolExecutor(PARALLEL) as threads:
        plays = [
            threads.submit(scene.play, path, point, processes, victim)
            for path, point in zip(folders, points, strict=True)
        ]
        yield from (text for play in plays if isinstance(text := play.result(), str))
    faults = run_jobs((check, folders, scene.expected))
    if not isinstance(faults, list):
        yield f"a start after it: {faults}"
        return
    for point, fault in zip(points, faults, strict=True):
        if fault:
            yield f"point {point} of {count}: {fault}"
