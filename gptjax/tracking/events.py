"""Events of a run as records for a tracker, read from metrics.jsonl as it grows."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MAX_READ_BYTES = 1 << 26  # of metrics.jsonl at a time
MAX_NESTING = 8  # levels of objects inside an event


class Position(NamedTuple):
    """Place in metrics.jsonl: all before it has been read."""

    offset: int = 0  # bytes
    lines: int = 0


class Record(NamedTuple):
    """Values of one event."""

    number: int  # line in metrics.jsonl, from 1
    kind: str  # of the event
    step: int
    time: float  # seconds since 1970; of the sending if the event has none
    scalars: dict[str, float]
    texts: dict[str, str]


def read_new_records(path: Path, position: Position) -> tuple[list[Record], Position]:
    """Reads the complete lines after a position; returns the position behind them.

    Lines that are no events are skipped, and so are those that a "resume" event among
    the new ones supersedes. A file shorter than the position has been replaced: it is
    read from its start.
    """
    try:
        with path.open("rb") as file:
            if position.offset > os.fstat(file.fileno()).st_size:
                position = Position()
            file.seek(position.offset)
            data = file.read(MAX_READ_BYTES)
    except FileNotFoundError:
        return [], position
    data = data[: data.rfind(b"\n") + 1]
    lines = data.split(b"\n")[:-1]
    records = [
        record
        for number, line in enumerate(lines, position.lines + 1)
        if (record := parse_record(number, line))
    ]
    behind = Position(position.offset + len(data), position.lines + len(lines))
    return drop_superseded(records), behind


def parse_record(number: int, line: bytes) -> Record | None:
    """Record of a line of metrics.jsonl; None if it is no event.

    >>> line = b'{"event": "eval", "step": 9, "split": "test", "loss": 2.5}'
    >>> parse_record(1, line).scalars
    {'eval/test/loss': 2.5}
    """
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    match event:
        case {"event": str(kind), "step": int(step), **values}:
            split, event_time = values.pop("split", None), values.pop("time", None)
            event_time = event_time if isinstance(event_time, int | float) else time.time()
            prefix = f"{kind}/{split}" if isinstance(split, str) else kind
            scalars = dict(flatten_scalars(values, prefix))
            texts = {kind: values["text"]} if isinstance(values.get("text"), str) else {}
            return Record(number, kind, step, event_time, scalars, texts)
    return None


def flatten_scalars(
    values: Mapping[str, Any], prefix: str, depth: int = MAX_NESTING
) -> Iterator[tuple[str, float]]:
    """Yields the numbers of nested objects, with their names joined by slashes."""
    for name, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}/{name}", value
        elif isinstance(value, dict) and depth:
            yield from flatten_scalars(value, f"{prefix}/{name}", depth - 1)


def drop_superseded(records: Sequence[Record]) -> list[Record]:
    """Drops records of later steps than a "resume" after them; at step 0, all."""
    kept: list[Record] = []
    for record in records:
        if record.kind == "resume":
            kept = [earlier for earlier in kept if 0 < record.step >= earlier.step]
        kept.append(record)
    return kept
