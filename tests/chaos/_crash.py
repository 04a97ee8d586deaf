"""A process that is killed before or after the n-th thing it does to files.

    python -m tests.chaos._crash        reads a job per line, and answers each with one

It has imported all that is slow, and forks for every job before any device is started.
"""

import builtins
import io
import itertools
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.checkpoint.checkpoint import restore_latest, write_step
from gptjax.parallel import distributed
from tests.chaos._small_states import resume_fault, state_at

PATCHED = (
    *("rename", "replace", "mkdir", "unlink", "remove", "rmdir"),
    *("fsync", "truncate", "link", "symlink"),
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def watch(point: int) -> Callable[[], int]:
    """From now on, the process dies at a point; -1: nowhere.

    Operation n has the points 2 n before it and 2 n + 1 after it. What Orbax does in
    C++, which is to write arrays, is between them.

    Returns:
        How many points there were so far.
    """
    counter, lock, count = itertools.count(), threading.Lock(), [0]

    def at() -> None:
        with lock:
            number = next(counter)
            count[0] = number + 1
        if number == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def patched(function: Any, counts: Callable[..., bool]) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if not counts(*args, **options):
                return function(*args, **options)
            at()
            result = function(*args, **options)
            at()
            return result

        return call

    for name in PATCHED:
        setattr(os, name, patched(getattr(os, name), lambda *_, **__: True))
    os.open = patched(os.open, lambda _, flags, *__, **___: bool(flags & WRITING))
    builtins.open = io.open = patched(builtins.open, writes)
    return lambda: count[0]


def writes(file: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
    """Whether a file is opened to be written."""
    return isinstance(file, (str, os.PathLike)) and bool(set(mode) & set("wax+"))


def placed(step: int) -> Any:
    """The state of a step; of several processes each has a part of the kernel."""
    state = state_at(step)
    if jax.process_count() == 1:
        return jax.device_put(state)
    mesh = Mesh(np.array(jax.devices()), ("part",))

    def put(leaf: Any) -> Any:
        split = leaf.ndim and leaf.shape[0] % jax.device_count() == 0
        where = NamedSharding(mesh, PartitionSpec("part" if split else None))
        if not leaf.ndim:
            where = NamedSharding(mesh, PartitionSpec())
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, where, lambda at: host[at])

    return jax.tree.map(put, state)


def save(folder: Path, step: int, point: int, where: str) -> int:
    """Saves a step, and dies at a point; where there is none, says how many."""
    if where:
        distributed.initialize(where)
    state = placed(step)
    jax.block_until_ready(state)
    points = watch(point)
    write_step(folder, step, state, keep=2)
    return points()


def start(folder: Path, point: int) -> int:
    """Goes on there as a run does, and dies at a point."""
    like = state_at(0)
    points = watch(point)
    restore_latest(folder, like)
    return points()


def check(folders: list[str], expected: list[int | None], following: int) -> list[str]:
    """What is wrong with a start in each of the folders, and with a save after it."""
    found = []
    for folder in map(Path, folders):
        fault = resume_fault(folder, {*expected})
        left = [name for name in os.listdir(folder) if name.endswith(LEFT)]
        if not fault and left:
            fault = f"{left} are left"
        if not fault:
            write_step(folder, following, state_at(following), keep=2)
            fault = resume_fault(folder, {following})
        found.append(fault)
        shutil.rmtree(folder)
    return found


LEFT = (".partial", ".orbax-checkpoint-tmp")
JOBS: dict[str, Callable[..., Any]] = {"save": save, "start": start, "check": check}


def forked(job: str, given: dict[str, Any]) -> tuple[int, int]:
    """A child that does a job: its id, and where its answer can be read."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    try:
        os.close(read)
        if "folder" in given:
            given = {**given, "folder": Path(given["folder"])}
        os.write(write, json.dumps(JOBS[job](**given)).encode())
        os._exit(0)
    except BaseException as error:
        os.write(write, json.dumps(f"{type(error).__name__}: {error}").encode())
        os._exit(1)


def answer(child: int, read: int) -> Any:
    """What a child said; None: it was killed."""
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said) if said else None


def done(jobs: list[tuple[str, dict[str, Any]]]) -> Any:
    """The answer of the first of some jobs; when it has ended, others are killed."""
    children = [forked(*job) for job in jobs]
    first, *others = children
    result = answer(*first)
    for child, read in others:
        os.kill(child, signal.SIGKILL)
        answer(child, read)
    return result


def main() -> None:
    """Answers each line of stdin, a list of jobs that belong together."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Gloo says on stdout whom it has found
    for line in sys.stdin:
        print(json.dumps(done(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
