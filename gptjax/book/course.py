"""The rows that the book's training runs read, and those of which they print losses.

What the book's loops print is a mean over some batches of the mean of each, however
many tokens or rows a batch has; they are the first of a pass that begins just then.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from gptjax import report
from gptjax.book.loader import Batches, Loader
from gptjax.book.torch_random import TorchGenerator
from gptjax.config import RunConfig, TrainConfig
from gptjax.run_loop import Run, Task
from gptjax.train import TrainState
from gptjax.weights.folder import Model

TRAIN, VALIDATION, TEST = "train", "validation", "test"
FIRST = 1  # finished steps at the book's first evaluation

# (model, split, rows of a batch) -> what is known of the batch, by its name
Score = Callable[[Model, str, list[int]], dict[str, float]]


class Course(NamedTuple):
    """The rows that a run of the book reads."""

    steps: Batches  # of each training step
    looks: dict[int, Batches]  # training batches of the evaluation after so many steps
    whole: Batches  # all of them, in order
    held_out: Batches  # of validation


def plan_course(
    loader: Loader,
    held_out: Loader,
    generator: TorchGenerator,
    train: TrainConfig,
    after: int = 0,
) -> Course:
    """All passes of a run, in the order in which the book begins them.

    Args:
        loader: of the training rows.
        held_out: of the validation rows.
        generator: as it is when training begins.
        train: how many steps there are, and how often it is evaluated.
        after: evaluations at the end of each epoch.
    """
    steps: Batches = []
    looks: dict[int, Batches] = {}
    validation = held_out.begin(TorchGenerator(0))  # it does not shuffle
    while len(steps) < train.steps:
        for batch in loader.begin(generator):
            if len(steps) % train.eval_every == 0:
                some = loader.begin(generator)[: train.eval_batches]
                looks[len(steps) + FIRST] = some
                held_out.begin(generator)
            steps.append(batch)
        for _ in range(after):
            loader.begin(generator)
            held_out.begin(generator)
    rows = range(0, loader.items, loader.batch_size)
    whole = [list(range(loader.items))[n : n + loader.batch_size] for n in rows]
    return Course(steps[: train.steps], looks, whole, validation)


def loaders_of(sizes: Mapping[str, int], c: RunConfig) -> dict[str, Loader]:
    """One for the rows of each split, as chapters 6 and 7 make them."""
    each = c.data.batch_size
    return {
        split: Loader(count, each, shuffle=split == TRAIN, drop_last=split == TRAIN)
        for split, count in sizes.items()
    }


def begun(
    loaders: Mapping[str, Loader], generator: TorchGenerator, most: int
) -> dict[str, Batches]:
    """The first batches of a pass of each loader: training, validation, test."""
    names = [split for split in (TRAIN, VALIDATION, TEST) if split in loaders]
    return {split: loaders[split].begin(generator)[:most] for split in names}


def printing(
    run: Run,
    task: Task,
    course: Course,
    before: Mapping[str, Mapping[str, Batches]],
    score: Score,
) -> Callable[[TrainState, int, bool], str]:
    """The evaluation of a task, which then says and writes what the book prints.

    Args:
        run: the run; it gets an event "book" with "train_loss" and the like.
        task: whose `evaluate` is done, too.
        course: of the run.
        before: for "loss" and "accuracy", the batches of the look before the first
            step.
        score: of one batch.
    """
    held_out = course.held_out[: run.config.train.eval_batches]

    def evaluate(state: TrainState, done: int, last: bool) -> str:
        told = task.evaluate(state, done, last)
        wanted = dict(before) if not done else {}
        if done in course.looks:
            wanted = {"loss": {TRAIN: course.looks[done], VALIDATION: held_out}}
        model = task.model(state)
        found = {
            f"{split}_{name}": float(
                np.mean([score(model, split, rows)[name] for rows in batches])
            )
            for name, parts in wanted.items()
            for split, batches in parts.items()
        }
        if found:
            report.write_event(run.metrics, "book", done, **found)
            text = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
            run.say(f"book     {text.replace('_', ' ')}")
        return told

    return evaluate
