"""Run outputs: metrics.jsonl, figures and report.md.

A "train" event has the loss in nats per token, the learning rate, the gradient norm
before clipping, tokens per second since the previous event, and the fraction of that
time spent waiting for the next batch (input_wait, 0 to 1).
"""

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax.errors import ModelError

Event = dict[str, Any]


WRITE_LOCK = threading.Lock()  # the checkpoint thread also writes events


def log_event(path: Path, kind: str, step: int, **values: Any) -> None:
    """Appends one event to metrics.jsonl; floats keep full precision."""
    line = json.dumps({"event": kind, "step": step, **values}, ensure_ascii=False)
    with WRITE_LOCK, path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def truncate_events(path: Path, size: int, keep_kind: str) -> None:
    """Truncates metrics.jsonl to `size` bytes, except for events of one kind.

    Args:
        path: of metrics.jsonl.
        size: bytes.
        keep_kind: kind of the events after `size` to keep.
    """
    if not path.is_file():
        return
    start = json.dumps({"event": keep_kind})[:-1].encode()
    with WRITE_LOCK, path.open("r+b") as file:
        file.seek(size)
        lines = [line for line in file.readlines() if line.startswith(start)]
        file.truncate(size)
        file.seek(size)
        file.writelines(lines)


def sync_events(path: Path) -> None:
    """Syncs metrics.jsonl to disk."""
    with path.open("a", encoding="utf-8") as file:
        os.fsync(file.fileno())


def read_events(path: Path) -> list[Event]:
    """Events of a run, oldest first; ignores an incomplete last line.

    Raises:
        ModelError: another line is not an event.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    events = []
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            events.append({**event, "event": event["event"], "step": event["step"]})
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise ModelError(
                f"{path}:{number} is not a valid event. Delete the line or restore the "
                "file from a backup."
            ) from error
    return events


def drop_events_after(path: Path, step: int) -> None:
    """Drops the events after `step`; a run resumed there logs them again."""
    kept = [event for event in read_events(path) if event["step"] <= step]
    lines = [json.dumps(event, ensure_ascii=False) + "\n" for event in kept]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(path)


def metric_series(
    events: Sequence[Event], kind: str, name: str, split: str | None = None
) -> tuple[list, list]:
    """Steps and values of one metric.

    Args:
        events: of a run.
        kind: kind of event, such as "eval".
        name: name of the metric.
        split: only events of this split ("validation" if the event has none); None for
            all events.
    """
    matching = [
        event
        for event in events
        if event["event"] == kind
        and event.get(name) is not None
        and split in (None, event.get("split", "validation"))
    ]
    return [event["step"] for event in matching], [event[name] for event in matching]


def format_number(value: int | float) -> str:
    """Count with three significant digits and an SI suffix.

    >>> format_number(124_439_808), format_number(950.0), format_number(0)
    ('124M', '950', '0')
    """
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"


def format_duration(seconds: int | float) -> str:
    """Duration in hours, minutes and seconds.

    >>> format_duration(8040), format_duration(75), format_duration(3.2)
    ('2h14m', '1m15s', '3s')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def format_progress(
    total_steps: int, event: Event, validation: str, seconds_left: float
) -> str:
    """Progress line of a logged step."""
    parts = [
        f"step {event['step']:>{len(str(total_steps))}}/{total_steps}",
        f"loss {event['loss']:.4f}",
        validation,
        f"lr {event['lr']:.2e}",
        f"|g| {event['grad_norm']:.2f}",
        f"{format_number(event['tokens_per_s'])} tok/s",
        *([f"mfu {event['mfu']:.1%}"] if "mfu" in event else []),
        f"eta {format_duration(seconds_left)}",
        *([f"{event['skipped']}: step skipped"] if "skipped" in event else []),
    ]
    return " | ".join(parts)
