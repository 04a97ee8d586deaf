"""Records for trackers, read from a metrics.jsonl that grows."""

import json

from gptjax.tracking.events import Position, drop_superseded, read_new_records
from gptjax.training.metrics import log_event, read_events


def append(path, text):
    with path.open("a") as file:
        file.write(text)


def test_each_complete_line_is_read_once_and_an_incomplete_one_later(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_new_records(path, Position()) == ([], Position())  # no file yet
    log_event(path, "train", 1, loss=2.0)
    append(path, '{"event": "train", "ste')

    first, position = read_new_records(path, Position())
    append(path, 'p": 2, "loss": 1.5}\n')
    second, end = read_new_records(path, position)

    assert [(r.number, r.step, r.scalars) for r in first] == [(1, 1, {"train/loss": 2.0})]
    assert [(r.number, r.step, r.scalars) for r in second] == [(2, 2, {"train/loss": 1.5})]
    assert read_new_records(path, end) == ([], end)


def test_a_file_that_was_replaced_by_a_shorter_one_is_read_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log_event(path, "train", 1, loss=2.0, note="long")
    _, position = read_new_records(path, Position())
    path.write_text('{"event": "train", "step": 7}\n')

    records, _ = read_new_records(path, position)

    assert [record.step for record in records] == [7]


def test_lines_that_are_no_events_are_skipped_but_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append(path, '[]\n{"event": 1}\nhalf of a li\n{"event": "train", "step": 3, "time": "x"}\n')

    records, position = read_new_records(path, Position())

    assert [(record.number, record.step) for record in records] == [(4, 3)]
    assert position.lines == 4


def test_a_resume_supersedes_the_same_events_as_for_read_events(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for kind, step in [("train", 0), ("train", 2), ("train", 4), ("resume", 2), ("train", 3)]:
        log_event(path, kind, step)

    records, _ = read_new_records(path, Position())
    assert [(r.kind, r.step) for r in records] == [
        (event["event"], event["step"]) for event in read_events(path)
    ]
    log_event(path, "resume", 0)
    records, _ = read_new_records(path, Position())
    assert [record.kind for record in records] == ["resume"]
    assert drop_superseded(records) == records


def test_numbers_become_scalars_named_by_event_split_and_field(tmp_path):
    path = tmp_path / "metrics.jsonl"
    event = {"event": "eval", "step": 1, "time": 5.0, "split": "test", "loss": float("nan")}
    append(path, json.dumps(event | {"tasks": {"copy": 1}, "note": "x", "flag": True}) + "\n")

    ((record,), _) = read_new_records(path, Position())

    assert record.scalars.keys() == {"eval/test/loss", "eval/test/tasks/copy"}
    assert record.time == 5.0
