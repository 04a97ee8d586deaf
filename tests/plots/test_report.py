"""What a run that trains a classifier leaves for people."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from gptjax.plots.curves import loss_figure
from gptjax.plots.report import (
    MAX_TEXT_CHARS,
    Misclassification,
    abbreviate,
    accuracy_figure,
    confusion_figure,
    inline_code,
    per_class_table,
    write_classification_report,
)
from gptjax.training.metrics import log_event, read_events

CONFUSION = np.array([[9_990, 10], [2, 6]])
BAD = "one `two` ``` \n\n# <b>no|bar</b> \\| ![x](y)\u202e " * 9


def write_run(folder):
    path = folder / "metrics.jsonl"
    for step in (50, 100):
        log_event(path, "train", step, loss=5 / step, lr=1e-3, grad_norm=1.0)
        for split, bonus in (("train", 0.1), ("validation", 0.0), ("test", -0.2)):
            accuracy, loss = 0.8 + step / 1000 + bonus, 1 / step - bonus
            numbers = {"split": split, "accuracy": accuracy, "loss": loss}
            log_event(path, "eval", step, **numbers)
    return path


def write(folder, mistakes, names=("ham", "spam")):
    write_classification_report(
        folder,
        summary=["plan line"],
        result="test accuracy 0.9988",
        confusion_CC=CONFUSION,
        class_names=names,
        mistakes=mistakes,
        examples_per_step=8,
    )
    return (folder / "report.md").read_text(encoding="utf-8")


@pytest.mark.fast
def test_each_curve_is_of_its_own_split(tmp_path):
    events = read_events(write_run(tmp_path))

    train, validation = accuracy_figure(events, 8).axes[0].get_lines()
    _, loss = loss_figure(events, 8, "example").axes[0].get_lines()

    assert list(train.get_ydata()) == [0.8 + 0.05 + 0.1, 0.8 + 0.1 + 0.1]
    assert list(validation.get_ydata()) == [0.8 + 0.05, 0.8 + 0.1]
    assert list(validation.get_xdata()) == [50, 100]
    assert list(loss.get_ydata()) == [1 / 50, 1 / 100]


def test_the_upper_axis_counts_examples(tmp_path):
    figure = accuracy_figure(read_events(write_run(tmp_path)), 8)
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    (upper,) = axes.child_axes

    assert upper.get_xlabel() == "examples seen"
    assert upper.get_xlim() == pytest.approx([8 * x for x in axes.get_xlim()])


def test_a_run_that_was_never_scored_has_an_empty_picture(tmp_path):
    accuracy_figure([], 8).savefig(tmp_path / "accuracy.png")

    assert (tmp_path / "accuracy.png").stat().st_size > 1000


@pytest.mark.parametrize("classes", [2, 5, 20])
def test_every_cell_shows_its_count_and_lies_in_the_picture(classes):
    matrix = np.arange(classes**2).reshape(classes, classes)
    names = [f"${n} is a rather long name {n}_$" for n in range(classes)]

    figure = confusion_figure(matrix, names)
    FigureCanvasAgg(figure).draw()

    axes = figure.axes[0]
    shown = {text.get_position()[::-1]: text.get_text() for text in axes.texts}
    assert shown == {at: str(count) for at, count in np.ndenumerate(matrix)}
    assert figure.bbox.containsx(axes.yaxis.get_label().get_window_extent().x0)
    places = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(places))
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(set(labels)) == classes
    assert max(map(len, labels)) == 18


def test_colours_are_shares_of_the_true_class_and_rows_may_be_empty():
    figure = confusion_figure(np.array([[3, 1], [0, 0]]), ["a", "b"])

    shares = figure.axes[0].images[0].get_array()

    assert shares.tolist() == [[0.75, 0.25], [0, 0]]


def test_the_report_tells_plan_result_rates_and_mistakes(tmp_path):
    write_run(tmp_path)
    mistakes = [Misclassification(f"text {n}", "ham", "spam", n / 100) for n in range(99)]

    text = write(tmp_path, mistakes)

    assert "```text\nplan line\n```\n\ntest accuracy 0.9988\n" in text
    assert "| `ham` | 0.9998 | 0.9990 | 0.9994 | 10,000 |" in text
    assert "| `spam` | 0.3750 | 0.7500 | 0.5000 | 8 |" in text
    for name in re.findall(r"^!\[\w+\]\((\w+\.png)\)$", text, re.MULTILINE):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert text.count(".png)") == 4
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert lines[0] == "- `ham` predicted as `spam` (0.980): `text 98`"
    assert len(lines) == 10


def test_a_text_cannot_leave_its_place_in_the_report(tmp_path):
    write_run(tmp_path)
    plain = write(tmp_path, [Misclassification("text", "ham", "spam", 0.9)])

    bad = write(tmp_path, [Misclassification(BAD, BAD, BAD, 0.9)], names=(BAD, "文"))

    assert len(bad.splitlines()) == len(plain.splitlines())
    assert "\u202e" not in bad
    (row,) = [line for line in bad.splitlines() if "<b>" in line and line[0] == "|"]
    assert row.count("|") == plain.splitlines()[8].count("|") == 6


@given(st.text() | st.text("` \nab").map(lambda text: 9 * text))
def test_a_code_span_ends_where_it_is_meant_to(text):
    span = inline_code(text)

    fence = re.match("`+", span)[0]
    # A span ends at the first run of as many backticks as it starts with.
    runs = re.findall("`+", span)
    assert [len(run) for run in runs].count(len(fence)) == 2
    assert runs[-1] == fence
    assert span.endswith(fence)
    inner = span[len(fence) : -len(fence)].strip()
    assert len(inner) <= MAX_TEXT_CHARS
    assert inner.isprintable()
    start = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    assert start.startswith(inner.removesuffix("…"))


def test_long_names_keep_both_ends():
    assert abbreviate("comp.sys.ibm.pc.hardware") == "comp.sys.…hardware"
    assert abbreviate("x" * 18) == "x" * 18


def test_classes_and_rows_of_the_table_must_be_as_many():
    with pytest.raises(ValueError, match="zip"):
        per_class_table(CONFUSION, ["ham"])
