"""What a run leaves for people."""

import json
import math

import pytest

from gptjax.errors import ModelError
from gptjax.plots.curves import loss_figure, write_figures
from gptjax.plots.report import write_report
from gptjax.training.metrics import (
    format_duration,
    format_number,
    log_event,
    log_resume,
    metric_series,
    read_events,
)


def write_run(folder):
    path = folder / "metrics.jsonl"
    for step in (10, 20, 30):
        log_event(path, "train", step, loss=5 / step, lr=1e-3, grad_norm=1.0, tokens_per_s=9.0)
    log_event(path, "eval", 20, loss=1 / 3, perplexity=1.4, bits_per_byte=None)
    log_event(path, "sample", 20, text="```é\n")
    return path


def test_losses_come_back_with_every_digit(tmp_path):
    path = write_run(tmp_path)

    steps, losses = metric_series(read_events(path), "train", "loss")

    assert steps == [10, 20, 30]
    assert losses == [5 / 10, 5 / 20, 5 / 30]


def test_a_last_line_cut_short_is_left_out_and_an_inner_one_is_an_error(tmp_path):
    path = write_run(tmp_path)
    whole = path.read_text()

    path.write_text(whole[:-5])
    assert len(read_events(path)) == 4

    path.write_text("{broken\n" + whole)
    with pytest.raises(ModelError, match=r"metrics\.jsonl:1 "):
        read_events(path)


def test_a_resume_supersedes_earlier_events_of_later_steps(tmp_path):
    path = write_run(tmp_path)
    with path.open("a") as file:
        file.write('{"event": "train", "st')  # a process was killed
    written = path.read_text()

    log_resume(path, 20)
    assert [e["step"] for e in read_events(path)] == [10, 20, 20, 20, 20]
    log_event(path, "train", 30, loss=9.0)
    assert [e["step"] for e in read_events(path)] == [10, 20, 20, 20, 20, 30]
    assert path.read_text().startswith(written)

    log_resume(path, 0)
    assert [e["event"] for e in read_events(path)] == ["resume"]


def test_of_two_evaluations_of_a_step_and_split_the_second_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for loss, split in ((1.0, "test"), (2.0, "validation"), (3.0, "test")):
        log_event(path, "eval", 5, loss=loss, split=split)

    assert {e["split"]: e["loss"] for e in read_events(path)} == {"test": 3.0, "validation": 2.0}


@pytest.mark.fast
def test_pictures_and_report_show_what_the_events_say(tmp_path):
    path = write_run(tmp_path)

    figure = loss_figure(read_events(path), 512)
    train, validation = figure.axes[0].get_lines()
    write_figures(tmp_path, 512)
    write_report(tmp_path, "Run x", ["plan line"])

    assert list(train.get_ydata()) == [0.5, 0.25, 5 / 30]
    assert list(validation.get_xdata()) == [20]
    for name in ("loss.png", "lr.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "report.md").read_text()
    assert "plan line" in text
    assert "| 20 | 0.3333 |" in text
    assert text.count("```") == 4


def test_the_validation_curve_leaves_out_other_splits(tmp_path):
    path = write_run(tmp_path)  # whose own event names no split
    for step, split in enumerate(("validation", "train", "test")):
        log_event(path, "eval", 30 + step, split=split, loss=1.0 + step)

    events = read_events(path)
    _, validation = loss_figure(events, 512).axes[0].get_lines()

    assert list(validation.get_xdata()) == [20, 30]
    assert list(validation.get_ydata()) == [1 / 3, 1.0]
    assert metric_series(events, "eval", "loss")[0] == [20, 30, 31, 32]


def test_events_are_one_json_object_per_line(tmp_path):
    path = write_run(tmp_path)

    lines = path.read_text().splitlines()

    assert [json.loads(line)["event"] for line in lines] == [*["train"] * 3, "eval", "sample"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (999.6, "1k"), (1e6, "1M"), (1.26e12, "1.26T"), (1e18, "1e+03P")],
)
def test_counts_are_short(value, text):
    assert format_number(value) == text


def test_durations_round_to_seconds():
    assert format_duration(59.6) == "1m00s"
    assert format_duration(math.pi) == "3s"
