"""Follower of a run: sends its events to a tracker, each once.

tracking/NAME.json in the run folder records what has been sent to the tracker NAME, so
that sending a run again, or after an interruption, sends only the rest. A record may be
sent twice if the follower is killed.
"""

import contextlib
import dataclasses
import functools
import json
import os
import resource
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gptjax.config import load_toml
from gptjax.errors import ModelError, ResourceError
from gptjax.fileio.atomic import lock_file, write_atomic
from gptjax.fileio.strict_json import read_json
from gptjax.tracking.events import Position, Record, read_new_records
from gptjax.tracking.trackers import SINKS, Sink, TrackedRun

TRACKING_DIR = "tracking"  # in the run folder
MAX_STATE_BYTES = 1 << 20
MAX_REASON_CHARS = 500
MIN_FREE_DISK_BYTES = 1 << 26  # of the run's disk, left to the training


@dataclasses.dataclass(frozen=True)
class TrackingState:
    """Part of a run that a tracker has."""

    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(4))
    position: Position = dataclasses.field(default_factory=Position)
    step: int = 0  # of the last record
    pictures: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # versions by name

    def save(self, path: Path) -> None:
        """Writes the state."""
        write_atomic(path, json.dumps(dataclasses.asdict(self)))


def load_state(path: Path) -> TrackingState:
    """Loads a state; the initial one if there is none."""
    if not path.exists():
        return TrackingState()
    try:
        values = read_json(path, MAX_STATE_BYTES)
        return TrackingState(**values | {"position": Position(*values["position"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"cannot read {path}, which records what was sent to the tracker: {error}. Delete it "
            "to send the whole run again."
        ) from error


def follow_run(run_dir: Path, tracker: str, wait: Callable[[], bool]) -> int:
    """Sends the events of a run to a tracker; returns the number of records sent.

    `wait` waits between two looks at the files; it returns False when the run has ended
    or is not to be followed further. Then the rest is sent, and pictures.
    """
    state_path = run_dir / TRACKING_DIR / f"{tracker}.json"
    num_sent, is_open = 0, True
    with lock_tracking(state_path):
        state = load_state(state_path)

        @functools.cache
        def sink() -> Sink:
            state.save(state_path)  # the id
            return open_sink(run_dir, tracker, state)

        while True:
            check_free_space(run_dir)
            records, position = read_new_records(run_dir / "metrics.jsonl", state.position)
            if position == state.position and not is_open:
                break
            for record in records:
                sink().log(record)
            num_sent += len(records)
            is_open = is_open and wait()  # meanwhile the tracker writes
            if position != state.position:
                step = records[-1].step if records else state.step
                state = dataclasses.replace(state, position=position, step=step)
                state.save(state_path)
        if pictures := new_pictures(run_dir, state):
            last = Record(state.position.lines, "picture", state.step, time.time(), {}, {})
            for name in pictures:
                sink().log_picture(run_dir / name, last)
            state = dataclasses.replace(state, pictures=state.pictures | pictures)
        if num_sent or pictures:
            sink().close()
            state.save(state_path)
    return num_sent + len(pictures)


def open_sink(run_dir: Path, tracker: str, state: TrackingState) -> Sink:
    """Connects to a tracker."""
    config_path = run_dir / "config.toml"
    config = load_toml(config_path) if config_path.exists() else {}
    run = TrackedRun(
        name=run_dir.absolute().name,
        id=state.id,
        config=config,
        folder=run_dir / TRACKING_DIR,
        is_new=not state.position.lines,
    )
    return SINKS[tracker](run)


def new_pictures(run_dir: Path, state: TrackingState) -> dict[str, list[int]]:
    """Versions (time and size) of the pictures that were not sent, by file name."""
    versions = {}
    for path in sorted(run_dir.glob("*.png")):
        status = path.stat()
        version = [status.st_mtime_ns, status.st_size]
        if state.pictures.get(path.name) != version:
            versions[path.name] = version
    return versions


@contextlib.contextmanager
def lock_tracking(state_path: Path) -> Iterator[None]:
    """Locks the state of a tracker; ModelError if another process has locked it."""
    state_path.parent.mkdir(exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    descriptor = os.open(state_path.with_suffix(".lock"), flags, 0o644)
    try:
        try:
            lock_file(descriptor)
        except BlockingIOError as error:
            raise ModelError(
                f"another process sends {state_path.parents[1]} to {state_path.stem}. Wait until "
                "it ends, as training with track.to does."
            ) from error
        yield
    finally:
        os.close(descriptor)


def check_free_space(run_dir: Path) -> None:
    """ResourceError if the disk is nearly full: the rest is for the training."""
    if (free := shutil.disk_usage(run_dir).free) < MIN_FREE_DISK_BYTES:
        raise ResourceError(
            f"only {free >> 20} MiB are free on the disk of {run_dir}; tracking needs "
            f"{MIN_FREE_DISK_BYTES >> 20}. Free space."
        )


def limit_file_size(run_dir: Path) -> None:
    """Limits the files of this process to half of the free space."""
    limit = shutil.disk_usage(run_dir).free // 2
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))


def describe_failure(error: BaseException, tracker: str) -> str:
    """One line for an error of a tracker, without the final period."""
    line = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return f"{tracker} failed: {line[:MAX_REASON_CHARS]}"
