"""Figures and report.md of a run."""

import re

import numpy as np
import pytest

from gptjax.plots.curves import accuracy_figure, confusion_figure, loss_figure, lr_figure
from gptjax.plots.report import Misclassification, list_mistakes, per_class_table, write_report
from gptjax.training.metrics import log_event, read_events
from tests.plots.test_figures import assert_nothing_is_cut_off

BAD = "one `two` ``` \n\n# <b>no|bar</b> \\| ![x](y)\u202e " * 9


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (50, 100):
        log_event(path, "train", step, loss=5 / step, lr=1e-3 * step, grad_norm=2.0 * step)
        for split, offset in (("train", 0.1), ("validation", 0.0), ("test", -0.2)):
            values = {"accuracy": 0.8 + offset + step / 1000, "loss": 1 / step + offset}
            log_event(path, "eval", step, split=split, bits_per_byte=None, **values)
        log_event(path, "sample", step, text=f"``` sample {step} é\n")
    return tmp_path


@pytest.mark.fast
def test_figures_show_the_logged_values_and_the_share_of_each_true_class(run_dir):
    events = read_events(run_dir / "metrics.jsonl")
    confusion_CC = np.arange(81).reshape(9, 9)
    confusion_CC[1] = 0

    figure = confusion_figure(confusion_CC, [f"${n} is a rather long name {n}_$" for n in range(9)])

    found = [
        (*line.get_xdata(), *line.get_ydata())
        for each in (loss_figure(events, 512), accuracy_figure(events, 8), lr_figure(events))
        for axes in each.axes
        for line in axes.lines
    ]
    values = [(0.1, 0.05), (0.02, 0.01), (0.95, 1.0), (0.85, 0.9), (0.05, 0.1), (100.0, 200.0)]
    assert found == [pytest.approx((50, 100, *pair)) for pair in values]
    # Losses of two kinds are on different axes.
    upper, lower = loss_figure(events, 512, "example", "next-token loss").axes
    assert [line.get_ydata()[0] for line in upper.lines] == pytest.approx([0.12, 0.02])
    assert [line.get_ydata()[0] for line in lower.lines] == pytest.approx([0.1])
    assert "next-token loss" in lower.get_ylabel()
    assert_nothing_is_cut_off(figure)
    axes = figure.axes[0]
    cells = {text.get_position()[::-1]: text.get_text() for text in axes.texts}
    assert cells == {at: str(count) for at, count in np.ndenumerate(confusion_CC)}
    share_CC = np.asarray(axes.images[0].get_array())
    assert share_CC.sum(axis=1).tolist() == pytest.approx([1, 0, *[1] * 7])


def test_report_holds_summary_result_evaluations_pictures_samples_and_details(run_dir):
    mistakes = [Misclassification(f"text {n}", "ham", "spam", n / 100) for n in range(99)]
    confusion_CC = np.array([[9_990, 10], [2, 6]])

    write_report(
        run_dir,
        summary=["plan line", "```"],
        result="test accuracy 0.9988",
        units_per_step=8,
        figures={"confusion": confusion_figure(confusion_CC, ("文", "spam"))},
        details=[*per_class_table(confusion_CC, (BAD, "spam")), *list_mistakes(mistakes)],
    )

    text = (run_dir / "report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"^!\[\w+\]\((\w+\.png)\)$", text, re.MULTILINE)
    assert pictures == ["loss.png", "lr.png", "confusion.png"]
    assert all((run_dir / name).is_file() for name in pictures)
    for part in (
        "```text\nplan line\n'''\n```\n\nTest accuracy 0.9988.",
        "| 50 train | 0.1200 | 0.9500 |",
        "Sample after step 100:\n\n```text\n''' sample 100 é\n",
        "| `spam` | 0.3750 | 0.7500 | 0.5000 | 8 |",
    ):
        assert part in text
    (row,) = [line for line in text.splitlines() if "<b>" in line]
    assert (row.count("|"), "0.9998 | 0.9990 | 0.9994 | 10000" in row) == (6, True)
    first = next(line for line in text.splitlines() if line.startswith("- "))
    assert first == "- `ham` predicted as `spam` (0.980): `text 98`"
