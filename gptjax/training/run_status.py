"""State of a run, from its files alone, on any machine that sees them."""

import calendar
import dataclasses
import os
import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gptjax.config import RunConfig, load_config
from gptjax.errors import ModelError
from gptjax.runtime.supervisor import HANG_TIMEOUT_SECONDS
from gptjax.training.metrics import Event, read_events
from gptjax.training.run_dir import RUN_LOCK_FILE, UTC_FORMAT, is_locked, read_run_metadata

# "stopped" by a signal, with its progress saved; "failed" with an error; "dead": it was
# killed, or its machine went down.
State = Literal["running", "finished", "stopped", "failed", "dead"]

MAX_RECORD_BYTES = 1 << 16  # of the lock file
MAX_RATE_EVENTS = 50  # training events that the speed of a run is measured over
MAX_TIME = 4e9  # year 2096
RECORD_PATTERN = re.compile(
    r"pid (?P<pid>\d{1,9}) on (?P<host>.*), started (?P<started>.{23})"
    r"(\nended (?P<ended>.{23}): (?P<outcome>(?s:.*)))?"
)


class ProcessRecord(NamedTuple):
    """The process that trains or trained in a folder, from its lock file."""

    host: str = ""
    pid: int = 0
    started: float = 0.0  # seconds since 1970, as all times here
    ended: float = 0.0  # 0 = it has not ended, or was killed
    outcome: str = ""  # "completed", "interrupted" or an error


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """State and progress of a run."""

    run_dir: Path
    state: State
    since: int | float  # start of a running process, else its end or last activity
    process: ProcessRecord
    config: RunConfig | None  # None until the data are read
    events: Sequence[Event]
    tokens_per_step: int | float | None  # None for runs of earlier versions

    @property
    def step(self) -> int:
        """Last step in metrics.jsonl."""
        return max((event["step"] for event in self.events), default=0)

    @property
    def last_event_time(self) -> int | float | None:
        """Time of the newest event; None for runs of earlier versions."""
        times = [event["time"] for event in self.events if event.get("time") is not None]
        return max((x for x in times if 0 <= x < MAX_TIME), default=None)

    def last(self, kind: str) -> Event:
        """Newest event of a kind; {} if there is none."""
        return next((event for event in reversed(self.events) if event["event"] == kind), {})

    def seconds_left(self, now: int | float) -> float | None:
        """Estimate of the time to the last step, at the speed of the latest steps."""
        first = [n for n, event in enumerate(self.events) if event["event"] == "resume"][-1:]
        recent = self.events[first[0] if first else 0 :]
        recent = [e for e in recent if e["event"] == "train" and e.get("time")][-MAX_RATE_EVENTS:]
        if self.config is None or len(recent) < 2:
            return None
        seconds = recent[-1]["time"] - recent[0]["time"]
        seconds_per_step = seconds / max(recent[-1]["step"] - recent[0]["step"], 1)
        total = seconds_per_step * (self.config.train.steps - recent[-1]["step"])
        return max(total - (now - recent[-1]["time"]), 0.0)


def read_run_status(run_dir: Path) -> RunStatus:
    """Reads the state of a run without disturbing it."""
    config_path, metrics_path = run_dir / "config.toml", run_dir / "metrics.jsonl"
    if not any(path.is_file() for path in (config_path, metrics_path, run_dir / RUN_LOCK_FILE)):
        raise ModelError(
            f"{run_dir} is not a run folder: it has no config.toml and no metrics.jsonl. Give the "
            "folder of `gptjax train --run DIR`."
        )
    locked = is_locked(run_dir)  # before the rest is read, which may then be complete
    process, events = read_process_record(run_dir / RUN_LOCK_FILE), read_events(metrics_path)
    config = load_config(config_path) if config_path.is_file() else None
    tokens_per_step: Any = read_run_metadata(run_dir).get("tokens_per_step")
    status = RunStatus(run_dir, "dead", 0.0, process, config, events, tokens_per_step)
    state, since = infer_state(status, locked)
    return dataclasses.replace(status, state=state, since=since)


def infer_state(status: RunStatus, locked: bool | None) -> tuple[State, int | float]:
    """State of a run, and since when.

    A run on another machine, whose lock may be invisible here, counts as running until
    it has been silent for the time after which --auto-restart would restart it.
    """
    process, run_dir = status.process, status.run_dir
    last_activity = status.last_event_time or last_modified(run_dir / "metrics.jsonl")
    last_activity = max(last_activity, process.started)
    is_complete = status.config is not None and status.step >= status.config.train.steps
    is_elsewhere = process.host != socket.gethostname() or locked is None
    is_silent = time.time() - last_activity > HANG_TIMEOUT_SECONDS
    if locked:
        return "running", process.started
    if process.outcome == "completed":
        return "finished", process.ended
    if is_complete and (run_dir / "report.md").is_file():
        return "finished", last_activity
    if process.outcome:
        return "stopped" if process.outcome == "interrupted" else "failed", process.ended
    if process.host and is_elsewhere and not is_silent:
        return "running", process.started
    return "dead", last_activity


def last_modified(path: Path) -> float:
    """Time when a file was last written; 0 if it does not exist."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def read_process_record(path: Path) -> ProcessRecord:
    """Reads the lock file of a run; an empty record if it has none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            text = file.read(MAX_RECORD_BYTES).decode(errors="replace")
    except OSError:
        return ProcessRecord()
    if not (match := RECORD_PATTERN.match(text)):
        return ProcessRecord()

    def parse_time(text: str | None) -> float:
        try:
            return float(calendar.timegm(time.strptime(text or "", UTC_FORMAT)))
        except ValueError:
            return 0.0

    times = parse_time(match["started"]), parse_time(match["ended"])
    return ProcessRecord(match["host"], int(match["pid"]), *times, match["outcome"] or "")
