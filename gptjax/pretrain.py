"""Pretraining: one config and one run folder in, a model that writes out."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gptjax import budget, report
from gptjax import tokenizer as tokenizers
from gptjax.config import DataConfig, RunConfig
from gptjax.data.batches import make_batches, validation_batches
from gptjax.data.prepare import Dataset, open_dataset
from gptjax.data.shards import Shard
from gptjax.download import sha256
from gptjax.errors import ConfigError
from gptjax.evaluate import evaluate, make_scorer
from gptjax.generation import complete
from gptjax.loss import next_token_loss
from gptjax.optim import make_optimizer
from gptjax.run_loop import train_run
from gptjax.run_task import NO_WISHES, Run, Say, Task, Wishes, device_line, length_line
from gptjax.sharding import local, place, rows_here
from gptjax.starting import (
    open_start,
    settled_model,
    start_facts,
    starting_params,
)
from gptjax.train import TrainState, init_state, make_train_step
from gptjax.weights.folder import Model, save
from gptjax.weights.importing import find

APART = {"auto": True, "packed": True, "mixed": False}  # data.batching
SAMPLE_TOKENS = 60
MakeTask = Callable[[Run], tuple[Run, Task]]


def pretrain(
    config: RunConfig,
    folder: Path,
    say: Say = print,
    make: MakeTask | None = None,
    wishes: Wishes = NO_WISHES,
) -> Model:
    """Trains as `config` says in the run folder `folder`, or goes on where it ended.

    Args:
        config: of the run; a folder that holds another one is refused.
        folder: made if it is not there.
        say: gets each line for the user.
        make: makes the task, where it is not `make_task`.
        wishes: what may change, and what follows a spike.

    Raises:
        GptjaxError: data, config or folder cannot be used.
        Stopped: SIGINT or SIGTERM came; the same call goes on later.
    """
    run, task, state = train_run(config, folder, say, make or make_task, wishes)
    model = task.model(state)
    finish(run, task, model, int(state.skipped))
    return model


def make_task(run: Run) -> tuple[Run, Task]:
    """Pretraining as the loop wants it."""
    start = open_start(run.config, run.say)
    dataset = open_dataset(data_config(run), run.folder / "data")
    c = with_vocabulary(run.config, dataset)
    c = dataclasses.replace(c, model=settled_model(c.model, start, dataset.tokenizer))
    run, train = dataclasses.replace(run, config=c), c.train
    optimizer = make_optimizer(c.optim, train.steps)
    key = jax.random.key(train.seed)
    params = starting_params(c.model, start, dataset.tokenizer, key)
    params = place(params, run.mesh)
    packed = documents_apart(c.data.batching)
    loss_fn = next_token_loss(c.model, train.loss_chunk, packed)
    batches = make_batches(
        dataset.train,
        rows=c.data.batch_size,
        context=c.model.context_length,
        seed=train.seed,
        packed=packed,
        here=rows_here(c.data.batch_size, run.mesh),
    )

    def model_of(state: TrainState) -> Model:
        return Model(c.model, local(state.params), dataset.tokenizer)

    def sample(state: TrainState, done: int) -> None:
        write_sample(run, model_of(state), done)

    return run, Task(
        fresh=init_state(params, optimizer, key),
        step=make_train_step(loss_fn, optimizer, train.accumulate),
        batches=batches.iterate,
        tokens_per_step=c.data.batch_size * c.model.context_length,
        evaluate=make_evaluate(run, dataset),
        model=model_of,
        facts={**data_facts(dataset), **start_facts(start)},
        plan=plan_lines(run, dataset),
        sample=sample if train.sample_prompt else None,
    )


def data_config(run: Run) -> DataConfig:
    """The run's `[data]`; where it names no tokenizer, that of the start is meant.

    Raises:
        ConfigError: only a part of the parameters is to be trained.
    """
    c = run.config
    if c.tune.trainable != "all":
        raise ConfigError(
            f"tune.trainable={c.tune.trainable!r} is for fine-tuning: pretraining "
            "changes everything. Leave it out."
        )
    if not c.tune.start or c.data.tokenizer:
        return c.data
    folder = find(c.tune.start, run.say)
    name = str(folder) if tokenizers.is_folder(folder) else "gpt2"
    return dataclasses.replace(c.data, tokenizer=name)


def make_evaluate(run: Run, dataset: Dataset) -> Any:
    """Scores the held-out text: `train.eval_batches` on the way, at the end all."""
    c, held_out = run.config, dataset.validation
    packed = documents_apart(c.data.batching)
    scorer = make_scorer(c.model, c.train.loss_chunk, run.mesh)

    def validate(state: TrainState, done: int, last: bool) -> str:
        if held_out is None:
            return "val -"
        batches = validation_batches(
            held_out,
            rows=c.data.batch_size,
            context=c.model.context_length,
            packed=packed,
            limit=None if last else c.train.eval_batches,
        )
        lengths = dataset.tokenizer.byte_lengths
        result = evaluate(scorer, state.params, batches, lengths)
        numbers = result.numbers()
        report.write_event(run.metrics, "eval", done, split="validation", **numbers)
        return f"val {result.loss:.4f}"

    return validate


def documents_apart(batching: str) -> bool:
    """Whether documents that share a row see nothing of each other.

    Raises:
        ConfigError: it is a way of batching for conversations.
    """
    if batching not in APART:
        raise ConfigError(
            f"data.batching={batching!r} is for fine-tuning: pretraining fills every "
            "row with text. Choose packed or mixed."
        )
    return APART[batching]


def with_vocabulary(config: RunConfig, dataset: Dataset) -> RunConfig:
    """The config with `model.vocab_size` settled by the tokenizer of the data."""
    size, asked = dataset.tokenizer.vocab_size, config.model.vocab_size
    if asked not in (0, size):
        raise ConfigError(
            f"model.vocab_size={asked} does not fit the tokenizer "
            f"{dataset.tokenizer.name}, which has {size} tokens. Leave the option out, "
            "or set model.vocab_multiple to pad."
        )
    model = dataclasses.replace(config.model, vocab_size=size)
    return dataclasses.replace(config, model=model)


def data_facts(dataset: Dataset) -> dict[str, Any]:
    """What meta.json records of the data, so that a change of it can be seen."""
    parts = {"train": dataset.train, "validation": dataset.validation}
    return {
        "data": {
            split: {shard.path.name: hash_of(shard) for shard in tokens.shards}
            for split, tokens in parts.items()
            if tokens is not None
        },
        "tokenizer": {"name": dataset.tokenizer.name, "hash": dataset.tokenizer.hash},
    }


def hash_of(shard: Shard) -> str:
    """The sha256 of a shard's tokens: as recorded, for its blocks are compared."""
    return shard.sha256[0] if shard.sha256 else sha256([shard.path])


def plan_lines(run: Run, data: Dataset) -> list[str]:
    """The block that says what will happen, before anything does."""
    c, train, rows = run.config.model, run.config.train, run.config.data.batch_size
    settled = budget.settled(run.config)
    sizes = tuple(run.mesh.shape.values()) if run.mesh else budget.ONE_DEVICE
    parts = budget.memory_bytes(settled, sizes)
    each = " + ".join(f"{name} {budget.human(size)}" for name, size in parts.items())
    tokens = rows * c.context_length
    per_step = f"{rows} rows x {c.context_length} tokens"
    if train.accumulate > 1:
        per_step += f" in {train.accumulate} micro-batches"
    held = len(data.validation) if data.validation else 0
    origin = f", from {start}" if (start := run.config.tune.start) else ""
    return [
        f"run      {run.folder}",
        f"model    {budget.parameter_count(c):,} parameters: {c.n_layers} layers, "
        f"{c.n_heads} heads, width {c.d_model}{origin}",
        f"data     {len(data.train):,} tokens to train on, {held:,} held out; "
        f"{data.tokenizer.name} tokenizer, {c.vocab_size:,} tokens",
        f"step     {per_step} = {tokens:,} tokens, "
        f"{report.short(tokens * budget.flops_per_token(c))} FLOPs",
        length_line(train.steps, train.steps * tokens / len(data.train)),
        f"memory   about {budget.human(sum(parts.values()))} on a device: {each}",
        f"kernel   attention by {settled.model.attention}, remat {c.remat}",
        device_line(run),
    ]


def write_sample(run: Run, model: Model, done: int) -> None:
    """Writes and shows what the model says after `train.sample_prompt`."""
    train = run.config.train
    (sample,) = complete(
        model,
        train.sample_prompt,
        max_new_tokens=SAMPLE_TOKENS,
        temperature=0.8,
        seed=train.seed,
    )
    text = train.sample_prompt + sample.text
    report.write_event(run.metrics, "sample", done, text=text)
    shown = "\n".join(f"    {row}" for row in text.strip("\n").splitlines())
    run.say(f"sample after step {done}:\n{shown}")


def finish(run: Run, task: Task, model: Model, skipped: int) -> None:
    """Writes model/, the pictures and report.md, and says how it went."""
    save(model, run.folder / "model")
    report.write_pictures(run.folder, round(task.tokens_per_step))
    report.write_report(run.folder, f"Run {run.folder.name}", task.plan)
    evals = [e for e in report.read_events(run.metrics) if e["event"] == "eval"]
    result = "no text was held out"
    if evals:
        result = f"validation loss {evals[-1]['loss']:.4f} nats per token"
        if evals[-1]["bits_per_byte"]:
            result += f", {evals[-1]['bits_per_byte']:.4f} bits per byte"
    if skipped:
        result += f"; {skipped} steps were skipped as not finite"
    run.say(f"done     {result}")
    run.say(f"wrote    {run.folder}/model, report.md, loss.png, lr.png, metrics.jsonl")
