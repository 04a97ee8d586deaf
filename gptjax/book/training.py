"""Training runs of the book, with its initial parameters and batch order.

`train.task = "book"`: chapter 5 and appendix D for `data.source = "verdict"`, chapter 6
for "sms-spam", chapter 7 for "instructions". Step n in the book is n + 1 finished steps
here. Dropout masks differ from the book's.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gptjax.book.ch02 import make_windows, split_text
from gptjax.book.loader import Loader
from gptjax.book.params import init_params
from gptjax.book.schedule import (
    FIRST_EVAL_STEP,
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
from gptjax.data.sft import collate
from gptjax.data.text import TEST_SPLIT, TRAIN_SPLIT, VALIDATION_SPLIT
from gptjax.errors import ConfigError
from gptjax.evaluation import perplexity
from gptjax.evaluation.classification import evaluate_classifier
from gptjax.evaluation.instructions import example_loss
from gptjax.inference.classify import bucket_lengths
from gptjax.parallel.sharding import to_host
from gptjax.runtime.prng import make_key
from gptjax.tasks.builder import TaskStages
from gptjax.tasks.classify import (
    ClassificationData,
    finalize_classification,
    load_classification_data,
    make_classification_task,
)
from gptjax.tasks.pretrain import finalize_pretrain, make_sample
from gptjax.tasks.sft import SFTData, finalize_sft, load_sft_data, make_sft_task
from gptjax.tokenizer.tokenizer import Tokenizer, load_tokenizer
from gptjax.training import estimate
from gptjax.training.finetune import model_provenance
from gptjax.training.loss import make_lm_loss_fn
from gptjax.training.optimizer import make_optimizer
from gptjax.training.task import EvalResult, RunContext, Task, describe_devices, describe_length
from gptjax.training.train_step import TrainState, init_state, make_train_step
from gptjax.tree import num_params
from gptjax.weights.model_folder import Model


def load_verdict_rows(context: int) -> dict[str, np.ndarray]:
    """Loads the-verdict as rows of T + 1 tokens, split 90:10."""
    text = fetch_dataset("verdict").read_text(encoding="utf-8")
    rows = {}
    for split, split_part in zip((TRAIN_SPLIT, VALIDATION_SPLIT), split_text(text), strict=True):
        ids = load_tokenizer("gpt2").encode(split_part)
        token_windows = make_windows(ids, context, context)
        rows[split] = np.concatenate(
            [token_windows.input_BT, token_windows.target_BT[:, -1:]], axis=1
        )
    return rows


class VerdictData(NamedTuple):
    """Data of chapter 5: rows of T + 1 tokens by split."""

    rows: dict[str, np.ndarray]
    tokenizer: Tokenizer


def load_chapter_5(run: RunContext) -> tuple[RunContext, VerdictData]:
    """Loads the-verdict; sets the vocabulary of the model."""
    config, tokenizer = run.config, load_tokenizer("gpt2")
    model = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    config = dataclasses.replace(config, model=model)
    data = VerdictData(load_verdict_rows(model.context_length), tokenizer)
    return dataclasses.replace(run, config=config), data


def make_chapter_5(run: RunContext, data: VerdictData) -> Task:
    """Makes the pretraining task on the-verdict."""
    c, batch_size = run.config, run.config.data.batch_size
    train_rows, val_rows = data.rows[TRAIN_SPLIT], data.rows[VALIDATION_SPLIT]
    generator = TorchGenerator(c.train.seed)
    params = init_params(c.model, generator)
    optimizer = make_optimizer(c.optim, c.train.steps)
    loss_fn = make_lm_loss_fn(c.model, c.train.loss_chunk_size)
    loader = Loader(len(train_rows), batch_size)
    val_loader = Loader(len(val_rows), batch_size, shuffle=False, drop_last=False)
    schedule = plan_batch_schedule(loader, val_loader, generator, c.train)
    steps_per_epoch = len(train_rows) // batch_size

    def to_model(state: TrainState) -> Model:
        return Model(c.model, to_host(state.params), data.tokenizer)

    def batches(start: int, stop: int) -> Iterator[Batch]:
        return (
            make_lm_batch(train_rows[schedule.train_batches[n]], None) for n in range(start, stop)
        )

    complete = make_sample(run, to_model)

    def sample(state: TrainState, step: int) -> str | None:
        is_due = step % steps_per_epoch < c.train.eval_every  # about once an epoch
        return complete(state, step) if complete and is_due else None

    memory_by_part = estimate.memory_bytes(estimate.resolve_config(c))
    return Task(
        init_state=init_state(params, optimizer, make_key(c.train.seed)),
        train_step=make_train_step(loss_fn, optimizer, c.train.accumulate),
        batches=batches,
        evaluate=make_chapter_5_evaluate(run, data, schedule),
        to_model=to_model,
        tokens_per_step=batch_size * c.model.context_length,
        provenance=model_provenance(data.tokenizer),
        summary=[
            f"run      {run.run_dir}",
            f"model    {num_params(params):,} parameters, initialized as in PyTorch",
            f"data     {train_rows.size:,} tokens in {len(train_rows)} training rows, "
            f"{len(val_rows)} validation rows",
            describe_length(c.train.steps, c.train.steps / steps_per_epoch),
            f"memory   about {estimate.format_bytes(sum(memory_by_part.values()))}",
            describe_devices(run),
        ],
        sample=sample,
        eval_offset=FIRST_EVAL_STEP,
    )


def make_chapter_5_evaluate(
    run: RunContext, data: VerdictData, schedule: BatchSchedule
) -> Callable[[TrainState, int, bool], EvalResult]:
    """Evaluates the book's random training batches (or all) and the validation rows."""
    loss_chunk_size = run.config.train.loss_chunk_size
    eval_step = perplexity.make_eval_step(run.config.model, loss_chunk_size, run.mesh)

    def evaluate(state: TrainState, step: int, is_last: bool) -> EvalResult:
        all_batches = schedule.all_train_batches
        batches_by_split = {
            TRAIN_SPLIT: schedule.eval_batches.get(step, all_batches),
            VALIDATION_SPLIT: schedule.val_batches,
        }
        events, loss = [], 0.0
        for split, batch_indices in batches_by_split.items():
            rows = data.rows[split]
            batches = (make_lm_batch(rows[n], None) for n in batch_indices)
            result = perplexity.evaluate(
                eval_step, state.params, batches, data.tokenizer.byte_lengths
            )
            events.append(("eval", {"split": split, **result.to_dict()}))
            loss = result.loss
        return EvalResult(events, f"val {loss:.4f}")

    return evaluate


def make_chapter_6(run: RunContext, data: ClassificationData) -> Task:
    """Makes the spam filter task: the book's head, batch order and printed metrics."""
    task = make_classification_task(run, data)
    c, ids = run.config, data.ids[TRAIN_SPLIT]
    max_length = bucket_lengths(c.model)[-1]
    loaders = make_loaders({split: len(part) for split, part in data.ids.items()}, c)
    schedule = plan_batch_schedule(
        loaders[TRAIN_SPLIT], loaders[VALIDATION_SPLIT], TorchGenerator(c.train.seed), c.train, 1
    )
    padded_batches = ClassificationBatches(
        ids,
        data.rows[TRAIN_SPLIT].labels,
        rows=c.data.batch_size,
        bucket_lengths=[max_length],
        pad_id=data.inputs.tokenizer.eot_token,
    )

    def score_batch(model: Model, split: str, rows: list[int]) -> dict[str, float]:
        texts = take(data.rows[split], rows)
        classified = evaluate_classifier(model, texts, [data.ids[split][n] for n in rows])
        return {"loss": classified.loss, "accuracy": classified.metrics.accuracy}

    generator = TorchGenerator(c.train.seed)
    initial_batches = {"accuracy": first_batches(loaders, generator, 2 * c.train.eval_batches)}
    initial_batches["loss"] = first_batches(loaders, generator, c.train.eval_batches)
    params = task.init_state.params | {"head": init_book_head(c)}
    return dataclasses.replace(
        task,
        init_state=task.init_state._replace(params=params),
        batches=lambda first, stop: (
            padded_batches.make_batch(max_length, np.asarray(rows))
            for rows in schedule.train_batches[first:stop]
        ),
        evaluate=make_book_evaluate(run, task, schedule, initial_batches, score_batch),
        eval_offset=FIRST_EVAL_STEP,
    )


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


def make_chapter_7(run: RunContext, data: SFTData) -> Task:
    """Makes the assistant task: the book's batch order and printed metrics."""
    task = make_sft_task(run, data)
    c, examples = run.config, data.examples
    loaders = make_loaders({split: len(part) for split, part in examples.items()}, c)
    schedule = plan_batch_schedule(
        loaders[TRAIN_SPLIT], loaders[VALIDATION_SPLIT], TorchGenerator(c.train.seed), c.train
    )

    def score_batch(model: Model, split: str, rows: list[int]) -> dict[str, float]:
        return {"loss": example_loss(model, [examples[split][n] for n in rows]).loss}

    loaders.pop(TEST_SPLIT, None)  # the book evaluates no test rows before the end
    initial_batches = first_batches(loaders, TorchGenerator(c.train.seed), c.train.eval_batches)

    def make_batch(rows: list[int]) -> Batch:
        batch = [examples[TRAIN_SPLIT][n] for n in rows]
        longest = max(len(example.ids) - 1 for example in batch)
        return collate([[example] for example in batch], longest, data.inputs.tokenizer.eot_token)

    return dataclasses.replace(
        task,
        batches=lambda first, stop: map(make_batch, schedule.train_batches[first:stop]),
        evaluate=make_book_evaluate(run, task, schedule, {"loss": initial_batches}, score_batch),
        eval_offset=FIRST_EVAL_STEP,
    )


CHAPTERS = {  # data.source -> stages of the chapter's run
    "verdict": TaskStages(load_chapter_5, make_chapter_5, finalize_pretrain),
    "sms-spam": TaskStages(load_classification_data, make_chapter_6, finalize_classification),
    "instructions": TaskStages(load_sft_data, make_chapter_7, finalize_sft),
}


def book_stages(config: RunConfig) -> TaskStages:
    """Finds the stages of the chapter that uses `data.source`."""
    if config.train.seed >= 2**32:
        raise ConfigError(
            f"train.seed={config.train.seed} must be below 2**32: PyTorch's generator uses only "
            "32 bits of it. Use a smaller seed."
        )
    if config.data.source not in CHAPTERS:
        raise ConfigError(
            f"data.source={config.data.source!r} is not used by the book. Use "
            f"{', '.join(CHAPTERS)}, or another train.task."
        )
    return CHAPTERS[config.data.source]
