"""Training runs of the book, with its initial parameters and batch order.

`train.task = "book"`: chapter 5 and appendix D for `data.source = "verdict"`, chapter 6
for "sms-spam", chapter 7 for "instructions". Step n in the book is n + 1 finished steps
here. Dropout masks differ from the book's.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.book.ch02 import make_windows, split_text
from gptjax.book.loader import Loader
from gptjax.book.params import init_params
from gptjax.book.schedule import (
    FIRST_EVAL_STEP,
    TEST_SPLIT,
    TRAIN_SPLIT,
    VALIDATION_SPLIT,
    BatchSchedule,
    first_batches,
    make_book_evaluate,
    make_loaders,
    plan_batch_schedule,
)
from gptjax.book.torch_random import TorchGenerator
from gptjax.config import RunConfig
from gptjax.data.classification import ClassificationBatches, take
from gptjax.data.datasets import fetch_dataset
from gptjax.data.lm import Batch, make_lm_batch
from gptjax.data.sft import BookBatches
from gptjax.errors import ConfigError
from gptjax.evaluation.classification import evaluate_classifier
from gptjax.evaluation.instructions import example_loss
from gptjax.evaluation.perplexity import evaluate, make_eval_step
from gptjax.inference.classify import bucket_lengths
from gptjax.parallel.sharding import to_host
from gptjax.tasks import classify, pretrain, sft
from gptjax.tokenizer.tokenizer import load_tokenizer
from gptjax.training import estimate
from gptjax.training.finetune import tokenizer_provenance
from gptjax.training.loss import make_lm_loss_fn
from gptjax.training.metrics import log_event
from gptjax.training.optimizer import make_optimizer
from gptjax.training.task import (
    DEFAULT_RESUME_OPTIONS,
    LogFn,
    ResumeOptions,
    RunContext,
    Task,
    describe_devices,
    describe_length,
)
from gptjax.training.train_step import TrainState, init_state, make_train_step
from gptjax.tree import num_params
from gptjax.weights.model_folder import Model


def train_book(
    config: RunConfig,
    run_dir: Path,
    log: LogFn = print,
    options: ResumeOptions = DEFAULT_RESUME_OPTIONS,
) -> Model:
    """Trains as a chapter of the book does; resumes if the run exists.

    Args:
        config: `data.source` selects the chapter.
        run_dir: run directory; created if missing.
        log: called with each line for the user.
        options: resume options.

    Raises:
        GptjaxError: invalid data, config or run directory.
        Interrupted: a signal was received; the same call resumes.
    """
    source = config.data.source
    if source == "verdict":
        return pretrain.pretrain(config, run_dir, log, make_chapter_5, options)
    if source == "sms-spam":
        return classify.train_classifier(config, run_dir, log, make_chapter_6, options)
    if source == "instructions":
        return sft.train_sft(config, run_dir, log, make_chapter_7, options)
    raise ConfigError(
        f"data.source={source!r} is not used by the book. Use verdict, sms-spam or "
        "instructions, or another train.task."
    )


def load_verdict_rows(context: int) -> dict[str, np.ndarray]:
    """Loads the-verdict as rows of T + 1 tokens, split 90:10."""
    text = fetch_dataset("verdict").read_text(encoding="utf-8")
    rows = {}
    for split, split_part in zip(
        (TRAIN_SPLIT, VALIDATION_SPLIT), split_text(text), strict=True
    ):
        ids = load_tokenizer("gpt2").encode(split_part)
        token_windows = make_windows(ids, context, context)
        rows[split] = np.concatenate(
            [token_windows.input_BT, token_windows.target_BT[:, -1:]], axis=1
        )
    return rows


def make_chapter_5(run: RunContext) -> tuple[RunContext, Task]:
    """Makes the pretraining task on the-verdict."""
    c, tokenizer = run.config, load_tokenizer("gpt2")
    model_config = dataclasses.replace(c.model, vocab_size=tokenizer.vocab_size)
    c = dataclasses.replace(c, model=model_config)
    run = dataclasses.replace(run, config=c)
    rows, batch_size = load_verdict_rows(model_config.context_length), c.data.batch_size
    generator = TorchGenerator(c.train.seed)
    params = init_params(model_config, generator)
    optimizer = make_optimizer(c.optim, c.train.steps)
    loss_fn = make_lm_loss_fn(model_config, c.train.loss_chunk_size)
    loader = Loader(len(rows[TRAIN_SPLIT]), batch_size)
    val_loader = Loader(
        len(rows[VALIDATION_SPLIT]), batch_size, shuffle=False, drop_last=False
    )
    schedule = plan_batch_schedule(loader, val_loader, generator, c.train)
    steps_per_epoch = len(rows[TRAIN_SPLIT]) // batch_size

    def to_model(state: TrainState) -> Model:
        return Model(model_config, to_host(state.params), tokenizer)

    def batches(start: int, stop: int) -> Iterator[Batch]:
        return (
            make_lm_batch(rows[TRAIN_SPLIT][schedule.train_batches[n]], None)
            for n in range(start, stop)
        )

    def sample(state: TrainState, step: int) -> None:
        if step % steps_per_epoch < c.train.eval_every:  # about once an epoch
            pretrain.write_sample(run, to_model(state), step)

    memory_by_part = estimate.memory_bytes(estimate.resolve_config(c))
    return run, Task(
        init_state=init_state(params, optimizer, jax.random.key(c.train.seed)),
        train_step=make_train_step(loss_fn, optimizer, c.train.accumulate),
        batches=batches,
        tokens_per_step=batch_size * model_config.context_length,
        evaluate=make_chapter_5_evaluate(run, rows, schedule, tokenizer.byte_lengths),
        to_model=to_model,
        provenance=tokenizer_provenance(tokenizer),
        summary=[
            f"run      {run.run_dir}",
            f"model    {num_params(params):,} parameters, initialized as in PyTorch",
            f"data     {rows[TRAIN_SPLIT].size:,} tokens in {len(rows[TRAIN_SPLIT])} training "
            f"rows, {len(rows[VALIDATION_SPLIT])} validation rows",
            describe_length(c.train.steps, c.train.steps / steps_per_epoch),
            f"memory   about {estimate.format_bytes(sum(memory_by_part.values()))}",
            describe_devices(run),
        ],
        sample=sample if c.train.sample_prompt else None,
        eval_offset=FIRST_EVAL_STEP,
    )


def make_chapter_5_evaluate(
    run: RunContext,
    rows: dict[str, np.ndarray],
    schedule: BatchSchedule,
    byte_lengths: np.ndarray,
) -> Any:
    """Evaluates the book's random training batches (or all) and the validation rows."""
    loss_chunk_size = run.config.train.loss_chunk_size
    eval_step = make_eval_step(run.config.model, loss_chunk_size, run.mesh)

    def evaluate_rows(state: TrainState, step: int, last: bool) -> str:
        evaluation = None
        train_batches = schedule.eval_batches.get(step, schedule.all_train_batches)
        for split, batches_by_split in (
            (TRAIN_SPLIT, train_batches),
            (VALIDATION_SPLIT, schedule.val_batches),
        ):
            batches = (
                make_lm_batch(rows[split][row_indices], None)
                for row_indices in batches_by_split
            )
            evaluation = evaluate(eval_step, state.params, batches, byte_lengths)
            metrics = evaluation.to_dict()
            log_event(run.metrics_path, "eval", step, split=split, **metrics)
        return f"val {evaluation.loss:.4f}" if evaluation else ""

    return evaluate_rows


def make_chapter_6(
    run: RunContext,
) -> tuple[RunContext, Task, classify.ClassificationData]:
    """Makes the spam filter task: the book's head, batch order and printed metrics."""
    run, task, datasets = classify.make_classification_task(run)
    c, ids, max_length = (
        run.config,
        datasets.ids[TRAIN_SPLIT],
        bucket_lengths(run.config.model)[-1],
    )
    loaders = make_loaders(
        {split: len(part) for split, part in datasets.ids.items()}, c
    )
    schedule = plan_batch_schedule(
        loaders[TRAIN_SPLIT],
        loaders[VALIDATION_SPLIT],
        TorchGenerator(c.train.seed),
        c.train,
        1,
    )
    padded_batches = ClassificationBatches(
        *(ids, datasets.rows[TRAIN_SPLIT].labels, c.data.batch_size),
        *(bucket_lengths(c.model), datasets.tokenizer.eot_token),
    )

    def score_batch(model: Model, split: str, rows: list[int]) -> dict[str, float]:
        texts = take(datasets.rows[split], rows)
        classified = evaluate_classifier(
            model, texts, [datasets.ids[split][n] for n in rows]
        )
        return {"loss": classified.loss, "accuracy": classified.metrics.accuracy}

    generator = TorchGenerator(c.train.seed)
    initial_batches = {
        "accuracy": first_batches(loaders, generator, 2 * c.train.eval_batches)
    }
    initial_batches["loss"] = first_batches(loaders, generator, c.train.eval_batches)
    params = task.init_state.params | {"head": init_book_head(c)}
    task = dataclasses.replace(
        task,
        fresh=task.init_state._replace(params=params),
        batches=lambda first, stop: (
            padded_batches.make_batch(max_length, np.asarray(rows))
            for rows in schedule.train_batches[first:stop]
        ),
        evaluate=make_book_evaluate(run, task, schedule, initial_batches, score_batch),
        eval_offset=FIRST_EVAL_STEP,
    )
    return run, task, datasets


def init_book_head(config: RunConfig) -> dict[str, Any]:
    """Initializes the classification head as a PyTorch Linear, from the run's seed."""
    generator, width = TorchGenerator(config.train.seed), config.model.d_model
    bound = 1 / math.sqrt(width)
    kernel = generator.uniform((config.model.n_classes, width), -bound, bound).T
    head = {"kernel": jnp.asarray(kernel)}
    if config.model.head_bias:
        bias = generator.uniform((config.model.n_classes,), -bound, bound)
        head["bias"] = jnp.asarray(bias)
    return head


def make_chapter_7(run: RunContext) -> tuple[RunContext, Task, sft.SFTData]:
    """Makes the assistant task: the book's batch order and printed metrics."""
    run, task, datasets = sft.make_sft_task(run)
    c, examples = run.config, datasets.examples
    loaders = make_loaders({split: len(part) for split, part in examples.items()}, c)
    schedule = plan_batch_schedule(
        loaders[TRAIN_SPLIT],
        loaders[VALIDATION_SPLIT],
        TorchGenerator(c.train.seed),
        c.train,
    )

    def score_batch(model: Model, split: str, rows: list[int]) -> dict[str, float]:
        return {"loss": example_loss(model, [examples[split][n] for n in rows]).loss}

    loaders.pop(TEST_SPLIT, None)  # the book evaluates no test rows before the end
    initial_batches = first_batches(
        loaders, TorchGenerator(c.train.seed), c.train.eval_batches
    )
    book_batches = BookBatches(
        examples[TRAIN_SPLIT],
        c.data.batch_size,
        datasets.tokenizer.eot_token,
        c.train.seed,
    )
    task = dataclasses.replace(
        task,
        batches=lambda first, stop: map(
            book_batches.make_batch, schedule.train_batches[first:stop]
        ),
        evaluate=make_book_evaluate(
            run, task, schedule, {"loss": initial_batches}, score_batch
        ),
        eval_offset=FIRST_EVAL_STEP,
    )
    return run, task, datasets
