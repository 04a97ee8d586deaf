"""Pretraining: one config and one run folder in, a model that writes out."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gptjax import budget, checkpoint, report
from gptjax.config import GPTConfig, RunConfig
from gptjax.data.batches import make_batches, validation_batches
from gptjax.data.prepare import Dataset, open_dataset
from gptjax.data.shards import Tokens
from gptjax.download import sha256
from gptjax.errors import ConfigError
from gptjax.evaluate import Evaluation, evaluate, make_scorer
from gptjax.generation import complete
from gptjax.loss import weighted_nats
from gptjax.model import hidden, init, output_table
from gptjax.optim import learning_rates, make_optimizer
from gptjax.run_folder import command_line, open_folder, settle_config, write_meta
from gptjax.stopping import Stopped, Stopwatch, stop_signal
from gptjax.train import (
    LossFn,
    Metrics,
    TrainState,
    TrainStep,
    init_state,
    make_train_step,
    steps,
)
from gptjax.weights.folder import Model, save

Say = Callable[[str], None]


def make_loss(config: GPTConfig, chunk: int) -> LossFn:
    """The next-token loss of a batch, as (sum of nats, sum of weights)."""

    def loss(params: Any, batch: Any, key: Any) -> tuple[Any, Any]:
        x_BTD, _ = hidden(
            config,
            params,
            batch["tokens"],
            position_BT=batch["positions"],
            segment_BT=batch["segments"],
            dropout_key=key if config.dropout else None,
        )
        table_VD = output_table(config, params)
        targets, weights = batch["targets"], batch["weights"]
        nats = weighted_nats(config, x_BTD, table_VD, targets, weights, chunk)
        return nats, weights.sum()

    return loss


@dataclasses.dataclass(frozen=True)
class Run:
    """What the parts of one run share; nothing in it changes."""

    config: RunConfig
    folder: Path
    dataset: Dataset
    say: Say

    @property
    def metrics(self) -> Path:
        """Where events go."""
        return self.folder / "metrics.jsonl"

    @property
    def tokens_per_step(self) -> int:
        """Targets in one step."""
        return self.config.data.batch_size * self.config.model.context_length


def pretrain(config: RunConfig, folder: Path, say: Say = print) -> Model:
    """Trains as `config` says in the run folder `folder`, or goes on where it ended.

    Args:
        config: of the run; a folder that holds another one is refused.
        folder: made if it is not there.
        say: gets each line for the user.

    Raises:
        GptjaxError: data, config or folder cannot be used.
        Stopped: SIGINT or SIGTERM came; the same call goes on later.
    """
    open_folder(folder)
    with stop_signal() as stopping:
        dataset = open_dataset(config.data, folder / "data")
        config = with_vocabulary(config, dataset)
        settle_config(folder, config)
        run = Run(config, folder, dataset, say)
        optimizer = make_optimizer(config.optim, config.train.steps)
        key = jax.random.key(config.train.seed)
        params = jax.jit(lambda key: init(config.model, key))(key)
        state, first = resumed(run, init_state(params, optimizer, key))
        plan = plan_lines(run)
        if not first:
            write_meta(folder, command_line(), data_facts(dataset))
            for line in plan:
                say(line)
        if first < config.train.steps:
            step_fn = make_train_step(
                make_loss(config.model, config.train.loss_chunk),
                optimizer,
                config.train.accumulate,
            )
            state = loop(run, jax.jit(step_fn, donate_argnums=0), state, stopping)
    return finish(run, state, plan)


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
            split: {shard.path.name: sha256([shard.path]) for shard in tokens.shards}
            for split, tokens in parts.items()
            if tokens is not None
        },
        "tokenizer": {"name": dataset.tokenizer.name, "hash": dataset.tokenizer.hash},
    }


def plan_lines(run: Run) -> list[str]:
    """The block that says what will happen, before anything does."""
    c, train, data = run.config.model, run.config.train, run.dataset
    parts = budget.memory_bytes(run.config)
    sizes = " + ".join(f"{name} {budget.human(size)}" for name, size in parts.items())
    epochs = train.steps * run.tokens_per_step / len(data.train)
    per_step = f"{run.config.data.batch_size} rows x {c.context_length} tokens"
    if train.accumulate > 1:
        per_step += f" in {train.accumulate} micro-batches"
    held = len(data.validation) if data.validation else 0
    return [
        f"run      {run.folder}",
        f"model    {budget.parameter_count(c):,} parameters: {c.n_layers} layers, "
        f"{c.n_heads} heads, width {c.d_model}",
        f"data     {len(data.train):,} tokens to train on, {held:,} held out; "
        f"{data.tokenizer.name} tokenizer, {c.vocab_size:,} tokens",
        f"step     {per_step} = {run.tokens_per_step:,} tokens, "
        f"{report.short(run.tokens_per_step * budget.flops_per_token(c))} FLOPs",
        f"length   {train.steps:,} steps = {epochs:.3g} times through the data",
        f"memory   about {budget.human(sum(parts.values()))}: {sizes}",
        f"device   {jax.device_count()} x {jax.devices()[0].device_kind}",
    ]


def saved_part(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds; the key follows from the config."""
    return {
        "step": state.step,
        "params": state.params,
        "opt_state": state.opt_state,
        "skipped": state.skipped,
    }


def resumed(run: Run, fresh: TrainState) -> tuple[TrainState, int]:
    """The newest saved state, or the fresh one; and its number of finished steps."""
    folder = run.folder / "checkpoints"
    step, complaints = checkpoint.latest(folder)
    for complaint in complaints:
        run.say(complaint)
    if step is None:
        run.metrics.unlink(missing_ok=True)  # of a start that saved nothing
        return fresh, 0
    tree = checkpoint.restore(folder, step, saved_part(fresh))
    report.trim_events(run.metrics, step)
    if step < run.config.train.steps:
        report.write_event(run.metrics, "resume", step)
        run.say(f"resumed  {run.folder} after step {step}")
    return fresh._replace(**tree), step


def loop(
    run: Run, step_fn: Any, state: TrainState, stopping: Callable[[], bool]
) -> TrainState:
    """Trains to the last step; logs, evaluates, samples and saves on the way."""
    c, train, done = run.config, run.config.train, int(state.step)
    batches = make_batches(
        run.dataset.train,
        rows=c.data.batch_size,
        context=c.model.context_length,
        seed=train.seed,
        packed=c.data.packed,
    )
    step_fn = compiled(run, step_fn, state, batches.batch_at(done))
    scorer = make_scorer(c.model, train.loss_chunk)
    rates = learning_rates(c.optim, train.steps)
    if not done and train.sample_tokens:
        write_sample(run, state, 0)
    watch, logged, validation = Stopwatch(), done, None
    pending: Any = None

    def noted(pending: Any) -> report.Event:
        at, metrics, lr, count = pending
        jax.block_until_ready(metrics)  # steps are dispatched long before they end
        return train_event(run, at, metrics, lr, count, watch.lap())

    stream = batches.iterate(done, train.steps)
    for done, state, metrics in steps(state, step_fn, stream):  # noqa: B020
        if pending:  # read one step late, so that the device is not kept waiting
            event, pending = noted(pending), None
            run.say(line(run, event, validation))
        last, stop = done == train.steps, stopping()
        evaluating = last or done % train.eval_every == 0
        sampling = train.sample_tokens and (last or done % train.sample_every == 0)
        saving = last or stop or done % c.checkpoint.every == 0
        if evaluating or sampling or saving or done % train.log_every == 0:
            pending, logged = (done, metrics, rates[done - 1], done - logged), done
        if not (evaluating or sampling or saving):
            continue
        event, pending = noted(pending), None
        with watch.aside():
            if evaluating and run.dataset.validation is not None:
                limit = None if last else train.eval_batches
                held_out = run.dataset.validation
                validation = validate(run, scorer, state, done, held_out, limit)
            run.say(line(run, event, validation))
            if sampling:
                write_sample(run, state, done)
            if saving:
                save_step(run, state, done)
        if stop and not last:
            raise Stopped(f"stopped after step {done}; all is saved in {run.folder}")
    return state


def compiled(run: Run, step_fn: Any, state: TrainState, batch: Any) -> TrainStep:
    """The step, compiled before it is needed so that people see what they wait for."""
    run.say("compiling ...")
    started = time.perf_counter()
    step = step_fn.lower(state, batch).compile()
    seconds = time.perf_counter() - started
    memory = step.memory_analysis()
    held = budget.human(memory.temp_size_in_bytes) if memory else "unknown"
    run.say(f"compiled  in {seconds:.1f} s; a step needs {held} of temporaries")
    return step


def train_event(
    run: Run, done: int, metrics: Metrics, lr: float, count: int, seconds: float
) -> report.Event:
    """Writes the metrics of step `done`.

    Args:
        run: the run.
        done: finished steps.
        metrics: of the last of them.
        lr: that it used.
        count: steps since the event before.
        seconds: that these took.
    """
    rate = count * run.tokens_per_step / seconds
    values = {
        "loss": float(metrics.loss),
        "lr": lr,
        "grad_norm": float(metrics.grad_norm),
        "tokens_per_s": rate,
    }
    if peak := budget.peak_flops():
        values["mfu"] = rate * budget.flops_per_token(run.config.model) / peak
    if not metrics.finite:
        values["skipped"] = True
    report.write_event(run.metrics, "train", done, **values)
    return {"step": done, **values}


def line(run: Run, event: report.Event, validation: Evaluation | None) -> str:
    """The one line per interval; its parts never change their order."""
    total, done = run.config.train.steps, event["step"]
    left = (total - done) * run.tokens_per_step / event["tokens_per_s"]
    parts = [
        f"step {done:>{len(str(total))}}/{total}",
        f"loss {event['loss']:.4f}",
        f"val {validation.loss:.4f}" if validation else "val -",
        f"lr {event['lr']:.2e}",
        f"|g| {event['grad_norm']:.2f}",
        f"{report.short(event['tokens_per_s'])} tok/s",
        *([f"mfu {event['mfu']:.1%}"] if "mfu" in event else []),
        f"eta {report.duration(left)}",
        *(["not finite: step skipped"] if "skipped" in event else []),
    ]
    return " | ".join(parts)


def validate(
    run: Run,
    scorer: Any,
    state: TrainState,
    done: int,
    held_out: Tokens,
    limit: int | None,
) -> Evaluation:
    """Scores `limit` batches of the held-out text, evenly apart (None: all)."""
    c = run.config
    batches = validation_batches(
        held_out,
        rows=c.data.batch_size,
        context=c.model.context_length,
        packed=c.data.packed,
        limit=limit,
    )
    lengths = run.dataset.tokenizer.byte_lengths
    result = evaluate(scorer, state.params, batches, lengths)
    report.write_event(
        run.metrics, "eval", done, split="validation", **result.numbers()
    )
    return result


def write_sample(run: Run, state: TrainState, done: int) -> None:
    """Writes and shows what the model says after `train.sample_prompt`."""
    train = run.config.train
    model = Model(run.config.model, state.params, run.dataset.tokenizer)
    (sample,) = complete(
        model,
        train.sample_prompt,
        max_new_tokens=train.sample_tokens,
        temperature=0.8,
        seed=train.seed,
    )
    text = train.sample_prompt + sample.text
    report.write_event(run.metrics, "sample", done, text=text)
    shown = "\n".join(f"    {row}" for row in text.strip("\n").splitlines())
    run.say(f"sample after step {done}:\n{shown}")


def save_step(run: Run, state: TrainState, done: int) -> None:
    """Saves the state and says so in the metrics."""
    keep = run.config.checkpoint.keep
    checkpoint.save(run.folder / "checkpoints", done, saved_part(state), keep)
    report.write_event(run.metrics, "save", done)


def finish(run: Run, state: TrainState, plan: list[str]) -> Model:
    """Writes model/, the pictures and report.md, and says how it went."""
    model = Model(run.config.model, state.params, run.dataset.tokenizer)
    save(model, run.folder / "model")
    report.write_pictures(run.folder, run.tokens_per_step)
    report.write_report(run.folder, f"Run {run.folder.name}", plan)
    evals = [e for e in report.read_events(run.metrics) if e["event"] == "eval"]
    result = "no text was held out"
    if evals:
        result = f"validation loss {evals[-1]['loss']:.4f} nats per token"
        if evals[-1]["bits_per_byte"]:
            result += f", {evals[-1]['bits_per_byte']:.4f} bits per byte"
    if skipped := int(state.skipped):
        result += f"; {skipped} steps were skipped as not finite"
    run.say(f"done     {result}")
    run.say(f"wrote    {run.folder}/model, report.md, loss.png, lr.png, metrics.jsonl")
    return model
