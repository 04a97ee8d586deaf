"""Killed at any point of a save or of a start, a run goes on from there or before.

A point is before or after something that Python does to the file system. The points are
dealt to the cases, so that the campaign has all of them, however many this version of
Orbax makes. In the second half two processes save together, and one of them is killed.
"""

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.processes import ROOT, free_port

SHARES = 4  # cases that the points of one process are dealt to
AT_A_TIME = 2  # of those processes
SLICE, FULL = SHARES, 2 * SHARES

Ask = Callable[[list[Any]], Any]


@contextlib.contextmanager
def children() -> Iterator[Ask]:
    """Yields what does jobs in processes of their own, as many at a time as asked."""
    with contextlib.ExitStack() as stack:
        parents = queue.SimpleQueue[Ask]()
        for _ in range(AT_A_TIME):
            parents.put(stack.enter_context(parent()))

        def ask(jobs: list[Any]) -> Any:
            free = parents.get()
            try:
                return free(jobs)
            finally:
                parents.put(free)

        yield ask


@contextlib.contextmanager
def parent() -> Iterator[Ask]:
    """Yields what does jobs one after the other: see `tests.chaos._crash`."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }
    with subprocess.Popen(
        [sys.executable, "-m", "tests.chaos._crash"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=environment,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout
        lines, answers = process.stdin, process.stdout

        def ask(jobs: list[Any]) -> Any:
            lines.write(json.dumps(jobs) + "\n")
            lines.flush()
            return json.loads(answers.readline())

        yield ask


def made(ask: Ask, folder: Path, steps: Sequence[int]) -> Path:
    """A folder with some steps saved."""
    folder.mkdir(parents=True)
    for step in steps:
        ask([("save", job(folder, step=step))])
    return folder


def job(folder: Path, point: int = -1, where: str = "", **more: Any) -> dict[str, Any]:
    """What a save is asked for."""
    return {"folder": str(folder), "point": point, "where": where, **more}


def scenes(ask: Ask, folder: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """(name, folder before it, what happens in it and what may be found after it)."""
    two = made(ask, folder / "two", [1, 2])
    save = {"job": "save", "step": 3, "expected": [2, 3]}
    yield "a save that deletes an older step", two, save
    none = made(ask, folder / "none", [])
    yield "the first save", none, {**save, "step": 1, "expected": [None, 1]}
    torn = made(ask, folder / "torn", [1, 2])
    shutil.copytree(torn / "1", torn / "3.partial")
    (torn / "2" / "manifest.json").write_text("{}")
    yield "a start after a crash", torn, {"job": "start", "expected": [1]}


def run(seed: int, cases: Sequence[int], folder: Path) -> Iterator[str]:
    """What went wrong at the points of each case, or ""."""
    del seed  # nothing is left to chance
    with children() as ask:
        all_scenes = [*scenes(ask, folder)]
        for case in cases:
            share, together = case % SHARES, case >= SHARES
            found = []
            for name, before, scene in all_scenes:
                if together and scene["job"] == "start":
                    continue  # one process alone looks
                for victim in (0, 1) if together else (0,):
                    shot = Shot(ask, before, scene, victim, together)
                    found += [f"{name}, {x}" for x in faults(shot, folder, share)]
            yield "; ".join(found[:3])


class Shot:
    """One scene, which can be played with a crash at any point."""

    def __init__(self, *parts: Any) -> None:
        """Of these parts, in this order."""
        self.ask, self.before, self.scene, self.victim, self.together = parts

    def play(self, folder: Path, point: int) -> Any:
        """The number of points, or None where the process was killed at one."""
        shutil.copytree(self.before, folder)
        if self.scene["job"] == "start":
            return self.ask([("start", {"folder": str(folder), "point": point})])
        count = 2 if self.together else 1
        where, port = "", free_port()
        jobs = []
        for number in sorted(range(count), key=lambda n: n != self.victim):
            if self.together:
                where = f"127.0.0.1:{port},2,{number}"
            here = point if number == self.victim else -1
            jobs.append(("save", job(folder, here, where, step=self.scene["step"])))
        return self.ask(jobs)


def faults(shot: Shot, folder: Path, share: int) -> Iterator[str]:
    """What went wrong at each point of one share."""
    whole = folder / "whole"
    points = shot.play(whole, -1)
    shutil.rmtree(whole)
    if not isinstance(points, int):
        yield f"without a crash: {points}"
        return
    numbers = range(share, points, SHARES)
    folders = [str(folder / f"point{point}") for point in numbers]
    with ThreadPoolExecutor(AT_A_TIME) as threads:
        for said in threads.map(shot.play, map(Path, folders), numbers):
            if isinstance(said, str):
                yield said
    given = {"folders": folders, "expected": shot.scene["expected"], "following": 9}
    found = shot.ask([("check", given)])
    if len(found) != len(folders):
        yield f"a start after it: {found}"
        return
    for path, fault in zip(folders, found, strict=True):
        if fault:
            yield f"{Path(path).name} of {points}: {fault}"
