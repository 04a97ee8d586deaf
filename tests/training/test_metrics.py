"""The event log of a run: full precision, append-only, superseded by resumes."""

import pytest

from gptjax.errors import ModelError
from gptjax.training.metrics import drop_open_line, log_event, metric_series, read_events


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (10, 20, 30):
        log_event(path, "train", step, loss=5 / step, lr=1e-3)
    log_event(path, "eval", 20, loss=1 / 3, perplexity=1.4, bits_per_byte=None)
    return path


def test_a_series_has_the_newest_events_of_its_split_with_every_digit(path):
    for step, split in enumerate(("validation", "train", "test"), 30):
        log_event(path, "eval", step, split=split, loss=9.0)
        log_event(path, "eval", step, split=split, loss=1.0)  # the second counts
    log_event(path, "eval", 30, split="test", loss=2.0)

    events = read_events(path)

    assert metric_series(events, "train", "loss") == ([10, 20, 30], [5 / 10, 5 / 20, 5 / 30])
    assert metric_series(events, "eval", "loss")[0] == [20, 30, 31, 32, 30]
    assert metric_series(events, "eval", "loss", "validation") == ([20, 30], [1 / 3, 1.0])
    assert metric_series(events, "eval", "bits_per_byte") == ([], [])


def test_only_the_last_line_may_be_incomplete_and_is_removed_before_events_are_added(path):
    events, text = read_events(path), path.read_text()

    path.write_text(text[:-5])
    assert len(read_events(path)) == 3
    path.write_text("{broken\n" + text)
    with pytest.raises(ModelError, match=r"metrics\.jsonl:1 "):
        read_events(path)
    for line in (
        *("null", "[]", '{"event": 5}', '{"event": ["x"], "step": 1}', "[" * 100_000),
        *('{"event": "train", "step": "x"}', '{"event": "train", "step": null}'),
        *(
            '{"event": "train", "step": 1, "loss": "x"}',
            '{"event": "eval", "step": 1, "split": []}',
        ),
    ):
        resume = "" if line[:2] == "[[" else '{"event": "resume", "step": 10}\n'
        path.write_text(f"{text}{line}\n{text}{resume}")
        with pytest.raises(ModelError, match=r"metrics\.jsonl:5 "):
            read_events(path)
    path.write_text(text + '{"event": "train", "st')  # its process was killed
    for _ in range(2):
        drop_open_line(path)
        assert path.read_text() == text
    log_event(path, "sample", 30, text="a\u2028b\x85c\n```é")
    assert [e["text"] for e in read_events(path)[len(events) :]] == ["a\u2028b\x85c\n```é"]


def test_a_resume_supersedes_earlier_events_of_later_steps(path):
    text = path.read_text()

    log_event(path, "resume", 20)
    assert [e["step"] for e in read_events(path)] == [10, 20, 20, 20]
    log_event(path, "train", 30, loss=9.0)
    assert [e["step"] for e in read_events(path)] == [10, 20, 20, 20, 30]
    log_event(path, "resume", 0)
    assert [e["event"] for e in read_events(path)] == ["resume"]
    assert path.read_text().startswith(text)
