"""Batch schedule of the book's training runs, for training and for printed losses.

The book's loops print the unweighted mean of the batch means, regardless of batch size.
The batches are the first ones of a new pass over the data loader.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from gptjax.book.loader import BatchIndices, Loader
from gptjax.book.torch_random import TorchGenerator
from gptjax.config import RunConfig, TrainConfig
from gptjax.data.text import TEST_SPLIT, TRAIN_SPLIT, VALIDATION_SPLIT
from gptjax.training.task import EvalResult, RunContext, Task
from gptjax.training.train_step import TrainState
from gptjax.weights.model_folder import Model

FIRST_EVAL_STEP = 1  # steps before the book's first evaluation

# (model, split, row indices of a batch) -> metrics of the batch
BatchScoreFn = Callable[[Model, str, list[int]], dict[str, float]]


class BatchSchedule(NamedTuple):
    """Batches of a run, as row indices."""

    train_batches: BatchIndices  # one batch per training step
    eval_batches: dict[int, BatchIndices]  # training batches to evaluate, by step
    all_train_batches: BatchIndices  # all training batches, unshuffled
    val_batches: BatchIndices  # all validation batches


def plan_batch_schedule(
    train_loader: Loader,
    val_loader: Loader,
    generator: TorchGenerator,
    train_config: TrainConfig,
    epoch_end_evals: int = 0,
) -> BatchSchedule:
    """Draws the batches of a run, in the order in which the book starts its passes.

    Args:
        train_loader: training loader.
        val_loader: validation loader.
        generator: in its state at the start of training.
        train_config: steps and evaluation interval.
        epoch_end_evals: evaluations at the end of each epoch.
    """
    train_batches: BatchIndices = []
    eval_batches: dict[int, BatchIndices] = {}
    val_batches = val_loader.start_epoch(TorchGenerator(0))  # not shuffled
    while len(train_batches) < train_config.steps:
        for batch in train_loader.start_epoch(generator):
            if len(train_batches) % train_config.eval_every == 0:
                some_batches = train_loader.start_epoch(generator)[: train_config.eval_batches]
                eval_batches[len(train_batches) + FIRST_EVAL_STEP] = some_batches
                val_loader.start_epoch(generator)
            train_batches.append(batch)
        for _ in range(epoch_end_evals):
            train_loader.start_epoch(generator)
            val_loader.start_epoch(generator)
    rows = range(0, train_loader.items, train_loader.batch_size)
    all_train_batches = [
        list(range(train_loader.items))[n : n + train_loader.batch_size] for n in rows
    ]
    return BatchSchedule(
        train_batches[: train_config.steps], eval_batches, all_train_batches, val_batches
    )


def make_loaders(sizes: Mapping[str, int], config: RunConfig) -> dict[str, Loader]:
    """Makes one loader per split, as in chapters 6 and 7."""
    batch_size = config.data.batch_size
    return {
        split: Loader(
            count, batch_size, shuffle=split == TRAIN_SPLIT, drop_last=split == TRAIN_SPLIT
        )
        for split, count in sizes.items()
    }


def first_batches(
    loaders: Mapping[str, Loader], generator: TorchGenerator, max_batches: int
) -> dict[str, BatchIndices]:
    """Returns the first batches of a new pass: training, validation, test."""
    splits = [split for split in (TRAIN_SPLIT, VALIDATION_SPLIT, TEST_SPLIT) if split in loaders]
    return {split: loaders[split].start_epoch(generator)[:max_batches] for split in splits}


def make_book_evaluate(
    run: RunContext,
    task: Task,
    schedule: BatchSchedule,
    initial_batches: Mapping[str, Mapping[str, BatchIndices]],
    score_batch: BatchScoreFn,
) -> Callable[[TrainState, int, bool], EvalResult]:
    """Extends a task's evaluation by the metrics that the book prints.

    Adds a "book" event with "train_loss" and other metrics.

    Args:
        run: the run.
        task: its own evaluation comes first.
        schedule: batches of the run.
        initial_batches: batches to evaluate before the first step, by metric ("loss",
            "accuracy") and split.
        score_batch: computes the metrics of one batch.
    """
    val_batches = schedule.val_batches[: run.config.train.eval_batches]

    def evaluate(state: TrainState, step: int, is_last: bool) -> EvalResult:
        result = task.evaluate(state, step, is_last)
        batches_by_metric = dict(initial_batches) if not step else {}
        if step in schedule.eval_batches:
            train_batches = schedule.eval_batches[step]
            batches_by_metric = {
                "loss": {TRAIN_SPLIT: train_batches, VALIDATION_SPLIT: val_batches}
            }
        model = task.to_model(state)
        metrics = {
            f"{split}_{name}": float(
                np.mean([score_batch(model, split, rows)[name] for rows in batches])
            )
            for name, batches_by_split in batches_by_metric.items()
            for split, batches in batches_by_split.items()
        }
        if not metrics:
            return result
        text = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        return result._replace(
            events=[*result.events, ("book", metrics)],
            log_lines=(f"book     {text.replace('_', ' ')}",),
        )

    return evaluate
