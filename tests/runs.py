"""Training runs and the progress lines that they log."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.checkpoint.retention import delete_step, list_steps
from gptjax.config import RunConfig, from_dict
from gptjax.runtime.terminal import logger
from gptjax.tasks.builder import TaskStages
from gptjax.tasks.train import train
from gptjax.training.metrics import read_events
from gptjax.training.task import RunContext, Task
from gptjax.weights.model_folder import Model


def config_with(table: dict[str, Any], **changes: Any) -> RunConfig:
    """Config of a table with changes, each section__option=value."""
    tables = {section: dict(options) for section, options in table.items()}
    for name, value in changes.items():
        section, option = name.split("__")
        tables.setdefault(section, {})[option] = value
    return from_dict(RunConfig, tables)


def evaluations(run_dir: Path, split: str) -> list[dict[str, Any]]:
    """Evaluations of a run on one split, without their times."""
    events = read_events(run_dir / "metrics.jsonl")
    matching = [e for e in events if e["event"] == "eval" and e["split"] == split]
    return [{name: x for name, x in e.items() if name != "time"} for e in matching]


@contextlib.contextmanager
def capture_lines(lines: list[str]) -> Iterator[list[str]]:
    """Appends the progress lines (logger "gptjax", INFO) of the block to a list."""
    handler, level = logging.Handler(), logger.level
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def train_logged(config: RunConfig, run_dir: Path, lines: list[str]) -> Model:
    """Trains, and appends the progress lines to a list."""
    with capture_lines(lines):
        return train(config, run_dir)


def make_task(stages: TaskStages, config: RunConfig, run_dir: Path) -> tuple[RunContext, Any, Task]:
    """Makes the task of a run without training it; returns (run, data, task)."""
    run, data = stages.load_data(RunContext(config, run_dir))
    return run, data, stages.make_task(run, data)


def delete_after(checkpoint_dir: Path, step: int) -> None:
    """Deletes all saved steps after `step`."""
    for saved in list_steps(checkpoint_dir):
        if saved > step:
            delete_step(checkpoint_dir, saved)
