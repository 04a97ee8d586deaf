"""The book's training runs, from its own parameters and in its own order.

`train.task = "book"`: chapter 5 and appendix D for `data.source = "verdict"`, chapter 6
for "sms-spam", chapter 7 for "instructions". What the book's loops count as step n is
n + 1 finished steps here. Its dropout takes other random numbers than ours.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax import budget, classification, instruct, pretrain, report
from gptjax import tokenizer as tokenizers
from gptjax.book.ch02 import split_text, windows
from gptjax.book.course import (
    FIRST,
    TEST,
    TRAIN,
    VALIDATION,
    Course,
    begun,
    loaders_of,
    plan_course,
    printing,
)
from gptjax.book.loader import Loader
from gptjax.book.params import init_params
from gptjax.book.torch_random import TorchGenerator
from gptjax.config import RunConfig
from gptjax.data import named
from gptjax.data.batches import Batch, pack
from gptjax.data.example_batches import Book
from gptjax.data.labelled import select
from gptjax.data.labelled_batches import LabelledBatches
from gptjax.errors import ConfigError
from gptjax.evaluate import evaluate, make_scorer
from gptjax.examine import example_loss
from gptjax.loss import next_token_loss
from gptjax.optim import make_optimizer
from gptjax.prediction import judge, sizes_of
from gptjax.run_task import NO_WISHES, Run, Say, Task, Wishes, device_line, length_line
from gptjax.sharding import local
from gptjax.starting import tokenizer_facts
from gptjax.train import TrainState, init_state, make_train_step
from gptjax.tree import count
from gptjax.weights.folder import Model


def train_book(
    config: RunConfig, folder: Path, say: Say = print, wishes: Wishes = NO_WISHES
) -> Model:
    """Trains as a chapter of the book does, in the run folder `folder`, or goes on.

    Args:
        config: of the run; its `data.source` says which chapter.
        folder: made if it is not there.
        say: gets each line for the user.
        wishes: what may change, and what follows a spike.

    Raises:
        GptjaxError: data, config or folder cannot be used.
        Stopped: a signal came; the same call goes on later.
    """
    source = config.data.source
    if source == "verdict":
        return pretrain.pretrain(config, folder, say, make_chapter_5, wishes)
    if source == "sms-spam":
        return classification.train_classifier(
            config, folder, say, make_chapter_6, wishes
        )
    if source == "instructions":
        return instruct.train_assistant(config, folder, say, make_chapter_7, wishes)
    raise ConfigError(
        f"data.source={source!r} is trained on in no chapter. Choose verdict, sms-spam "
        "or instructions, or another train.task."
    )


def verdict_rows(context: int) -> dict[str, np.ndarray]:
    """Rows of T + 1 tokens of nine tenths of the-verdict, and of the rest."""
    text = named.find("verdict").read_text(encoding="utf-8")
    rows = {}
    for split, part in zip((TRAIN, VALIDATION), split_text(text), strict=True):
        ids = tokenizers.load("gpt2").encode(part)
        found = windows(ids, context, context)
        rows[split] = np.concatenate([found.input_BT, found.target_BT[:, -1:]], axis=1)
    return rows


def make_chapter_5(run: Run) -> tuple[Run, Task]:
    """Pretraining on the-verdict."""
    c, tokenizer = run.config, tokenizers.load("gpt2")
    model = dataclasses.replace(c.model, vocab_size=tokenizer.vocab_size)
    c = dataclasses.replace(c, model=model)
    run = dataclasses.replace(run, config=c)
    rows, each = verdict_rows(model.context_length), c.data.batch_size
    generator = TorchGenerator(c.train.seed)
    params = init_params(model, generator)
    optimizer = make_optimizer(c.optim, c.train.steps)
    loss_fn = next_token_loss(model, c.train.loss_chunk)
    loader = Loader(len(rows[TRAIN]), each)
    held_out = Loader(len(rows[VALIDATION]), each, shuffle=False, drop_last=False)
    course = plan_course(loader, held_out, generator, c.train)
    per_epoch = len(rows[TRAIN]) // each

    def model_of(state: TrainState) -> Model:
        return Model(model, local(state.params), tokenizer)

    def batches(first: int, stop: int) -> Iterator[Batch]:
        return (pack(rows[TRAIN][course.steps[n]], None) for n in range(first, stop))

    def sample(state: TrainState, done: int) -> None:
        if done % per_epoch < c.train.eval_every:  # about once an epoch
            pretrain.write_sample(run, model_of(state), done)

    memory = budget.memory_bytes(budget.settled(c))
    return run, Task(
        fresh=init_state(params, optimizer, jax.random.key(c.train.seed)),
        step=make_train_step(loss_fn, optimizer, c.train.accumulate),
        batches=batches,
        tokens_per_step=each * model.context_length,
        evaluate=make_chapter_5_evaluate(run, rows, course, tokenizer.byte_lengths),
        model=model_of,
        facts=tokenizer_facts(tokenizer),
        plan=[
            f"run      {run.folder}",
            f"model    {count(params):,} parameters, drawn as PyTorch draws them",
            f"data     {rows[TRAIN].size:,} tokens in {len(rows[TRAIN])} rows to train "
            f"on, {len(rows[VALIDATION])} held out",
            length_line(c.train.steps, c.train.steps / per_epoch),
            f"memory   about {budget.human(sum(memory.values()))}",
            device_line(run),
        ],
        sample=sample if c.train.sample_prompt else None,
        eval_offset=FIRST,
    )


def make_chapter_5_evaluate(
    run: Run, rows: dict[str, np.ndarray], course: Course, byte_lengths: np.ndarray
) -> Any:
    """Scores the book's random training batches, or all, and the validation rows."""
    chunk = run.config.train.loss_chunk
    scorer = make_scorer(run.config.model, chunk, run.mesh)

    def evaluate_rows(state: TrainState, done: int, last: bool) -> str:
        found = None
        chosen = course.looks.get(done, course.whole)
        for split, parts in ((TRAIN, chosen), (VALIDATION, course.held_out)):
            batches = (pack(rows[split][part], None) for part in parts)
            found = evaluate(scorer, state.params, batches, byte_lengths)
            numbers = found.numbers()
            report.write_event(run.metrics, "eval", done, split=split, **numbers)
        return f"val {found.loss:.4f}" if found else ""

    return evaluate_rows


def make_chapter_6(run: Run) -> tuple[Run, Task, classification.Sets]:
    """The spam filter: the book's head, its order of the rows, and what it prints."""
    run, task, sets = classification.make_task(run)
    c, ids, size = run.config, sets.ids[TRAIN], sizes_of(run.config.model)[-1]
    loaders = loaders_of({split: len(part) for split, part in sets.ids.items()}, c)
    course = plan_course(
        loaders[TRAIN], loaders[VALIDATION], TorchGenerator(c.train.seed), c.train, 1
    )
    padded = LabelledBatches(
        *(ids, sets.rows[TRAIN].labels, c.data.batch_size),
        *(sizes_of(c.model), sets.tokenizer.eot),
    )

    def score(model: Model, split: str, rows: list[int]) -> dict[str, float]:
        data = select(sets.rows[split], rows)
        found = judge(model, data, [sets.ids[split][n] for n in rows])
        return {"loss": found.nats, "accuracy": found.scores.accuracy}

    generator = TorchGenerator(c.train.seed)
    before = {"accuracy": begun(loaders, generator, 2 * c.train.eval_batches)}
    before["loss"] = begun(loaders, generator, c.train.eval_batches)
    params = task.fresh.params | {"head": book_head(c)}
    task = dataclasses.replace(
        task,
        fresh=task.fresh._replace(params=params),
        batches=lambda first, stop: (
            padded.batch(size, np.asarray(rows)) for rows in course.steps[first:stop]
        ),
        evaluate=printing(run, task, course, before, score),
        eval_offset=FIRST,
    )
    return run, task, sets


def book_head(c: RunConfig) -> dict[str, Any]:
    """The new output layer of chapter 6: a PyTorch Linear after the run's seed."""
    generator, width = TorchGenerator(c.train.seed), c.model.d_model
    bound = 1 / math.sqrt(width)
    kernel = generator.uniform((c.model.n_classes, width), -bound, bound).T
    head = {"kernel": jnp.asarray(kernel)}
    if c.model.head_bias:
        bias = generator.uniform((c.model.n_classes,), -bound, bound)
        head["bias"] = jnp.asarray(bias)
    return head


def make_chapter_7(run: Run) -> tuple[Run, Task, instruct.Sets]:
    """The assistant: the book's order of the rows, and what it prints."""
    run, task, sets = instruct.make_task(run)
    c, examples = run.config, sets.examples
    loaders = loaders_of({split: len(part) for split, part in examples.items()}, c)
    course = plan_course(
        loaders[TRAIN], loaders[VALIDATION], TorchGenerator(c.train.seed), c.train
    )

    def score(model: Model, split: str, rows: list[int]) -> dict[str, float]:
        return {"loss": example_loss(model, [examples[split][n] for n in rows]).loss}

    loaders.pop(TEST, None)  # the book looks at no test rows before the end
    before = begun(loaders, TorchGenerator(c.train.seed), c.train.eval_batches)
    book = Book(examples[TRAIN], c.data.batch_size, sets.tokenizer.eot, c.train.seed)
    task = dataclasses.replace(
        task,
        batches=lambda first, stop: map(book.batch, course.steps[first:stop]),
        evaluate=printing(run, task, course, {"loss": before}, score),
        eval_offset=FIRST,
    )
    return run, task, sets
