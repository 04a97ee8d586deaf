"""The loop of a run, whatever it trains: log, evaluate, sample, save, stop, resume."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax import budget, checkpoint, distributed, report
from gptjax.config import RunConfig, read_config
from gptjax.errors import ConfigError
from gptjax.fingerprint import check_facts
from gptjax.optim import learning_rates
from gptjax.phases import reached
from gptjax.prefetch import prefetched
from gptjax.run_folder import (
    command_line,
    open_folder,
    settle_config,
    versions,
    write_meta,
)
from gptjax.sharding import (
    check_rows,
    make_mesh,
    on,
    place,
    place_batch,
)
from gptjax.stopping import Stopped, Stopwatch, stop_signal
from gptjax.train import Metrics, TrainState, TrainStep, steps
from gptjax.weights.folder import Model
from gptjax.weights.importing import load

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Run:
    """What the parts of one run share; nothing in it changes."""

    config: RunConfig
    folder: Path
    say: Say
    mesh: Mesh | None = None  # of the devices; None: there is one
    saved: Path | None = None  # the folder of its checkpoints, where it is another

    @property
    def checkpoints(self) -> Path:
        """Where states are saved."""
        return (self.saved or self.folder) / "checkpoints"

    @property
    def metrics(self) -> Path:
        """Where events go."""
        return self.folder / "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class Task:
    """What one kind of training brings to the loop."""

    fresh: TrainState  # before the first step
    step: Callable[..., Any]  # (state, batch, *fixed) -> (state, metrics), pure
    batches: Callable[[int, int], Iterator[Any]]  # of steps from, to before
    tokens_per_step: int | float
    # (state, finished steps, whether it is the last time) -> what the line says of it
    evaluate: Callable[[TrainState, int, bool], str]
    model: Callable[[TrainState], Model]  # that a state stands for
    facts: dict[str, Any]  # for meta.json: what the run reads
    plan: list[str]  # lines for people, before anything happens
    sample: Callable[[TrainState, int], None] | None = None
    fixed: tuple[Any, ...] = ()  # arguments of `step` that no step changes
    eval_offset: int = 0  # evaluated are this step and every `train.eval_every` after


def train_run(
    config: RunConfig,
    folder: Path,
    say: Say,
    make_task: Callable[[Run], tuple[Run, Task]],
) -> tuple[Run, Task, TrainState]:
    """Trains in the run folder to the last step, or goes on where it ended.

    Args:
        config: of the run; a folder that holds another one is refused.
        folder: made if it is not there.
        say: gets each line for the user.
        make_task: reads the data; returns the run with its config settled by them.

    Raises:
        GptjaxError: data, config or folder cannot be used.
        Stopped: SIGINT or SIGTERM came; the same call goes on later.
    """
    main = jax.process_index() == 0
    open_folder(folder)
    run = Run(
        config=config,
        folder=distributed.own_folder(folder),
        say=say if main else lambda text: None,
        mesh=make_mesh(config.mesh),
        saved=folder,
    )
    with stop_signal() as stopping:
        run, task = make_task(with_micro_batch(run))
        if jax.process_count() > 1:
            distributed.agree(facts_of(run, task))
        settle_config(run.folder, run.config)
        check_facts(run.folder, task.facts)
        task = placed(task, run)
        state, first = resumed(run, task.fresh)
        reached("loading")
        if not first:
            write_meta(run.folder, command_line(), task.facts)
            for text in task.plan:
                run.say(text)
        if first < run.config.train.steps:
            state = loop(run, task, state, stopping)
    return run, task, state


def with_micro_batch(run: Run) -> Run:
    """The run with `train.accumulate` chosen, where it is 0: as before, or to fit.

    Raises:
        ConfigError: the model is not the config's own, so that its size is not known.
    """
    c = run.config
    if c.train.accumulate:
        return run
    before = run.folder / "config.toml"
    if before.is_file():
        count = read_config(before).train.accumulate
    else:
        count = micro_batches_that_fit(run)
    train = dataclasses.replace(c.train, accumulate=count)
    return dataclasses.replace(run, config=dataclasses.replace(c, train=train))


def micro_batches_that_fit(run: Run) -> int:
    """The fewest micro-batches for the memory of a device; says so.

    Raises:
        ConfigError: the model is not the config's own, so that its size is not known.
    """
    c = run.config
    if c.tune.start:
        raise ConfigError(
            "train.accumulate=0 finds what fits for a model of the config's own, not "
            "for tune.start. Give a number of micro-batches."
        )
    sizes = tuple(run.mesh.shape.values()) if run.mesh else budget.ONE_DEVICE
    limit = budget.device_memory()
    fitted = budget.with_micro_batch(budget.settled(c), sizes, limit)
    count = fitted.train.accumulate
    run.say(
        f"accumulate {count} micro-batches of {c.data.batch_size // count} rows, the "
        f"largest that fit {budget.human(limit)} of memory by arithmetic"
    )
    return count


def facts_of(run: Run, task: Task) -> dict[str, Any]:
    """What all processes of a run have to agree on."""
    data = task.facts.get("data")
    if data is None:  # each process reads all of it: then its first batch stands for it
        first = next(task.batches(0, 1))
        data = {name: np.asarray(leaf).tobytes().hex() for name, leaf in first.items()}
    return {
        "config": dataclasses.asdict(run.config),
        "code": [distributed.code_facts(), versions()],
        "data": data,
        "tokenizer": task.facts.get("tokenizer"),
    }


def placed(task: Task, run: Run) -> Task:
    """The task with its arrays on the mesh.

    Raises:
        ConfigError: parameters or rows do not split evenly.
    """
    if run.mesh is None:
        return task
    c, fixed = run.config, tuple(place(tree, run.mesh) for tree in task.fixed)
    check_rows(c.data.batch_size, c.train.accumulate, [*run.mesh.shape.values()])
    return dataclasses.replace(task, fresh=place(task.fresh, run.mesh), fixed=fixed)


def tune_run(
    config: RunConfig,
    folder: Path,
    say: Say,
    make_task: Callable[[Run], tuple[Run, Task, Any]],
    finish: Callable[[Run, Task, Model, Any], None],
) -> Model:
    """Trains as `train_run`, and finishes with the model that the task kept.

    Args:
        config: of the run; a folder that holds another one is refused.
        folder: made if it is not there.
        say: gets each line for the user.
        make_task: as for `train_run`; returns also what it read.
        finish: gets the run, its task, the model in model/, and what was read.
    """
    found: list[Any] = []

    def noted(run: Run) -> tuple[Run, Task]:
        run, task, read = make_task(run)
        found.append(read)
        return run, task

    run, task, _ = train_run(config, folder, say, noted)
    model = load(run.folder / "model")
    finish(run, task, model, found[0])
    return model


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
    step, complaints = checkpoint.latest(run.checkpoints)
    for complaint in complaints:
        run.say(complaint)
    if step is None:
        run.metrics.unlink(missing_ok=True)  # of a start that saved nothing
        return fresh, 0
    tree = checkpoint.restore(run.checkpoints, step, saved_part(fresh))
    report.trim_events(run.metrics, step)
    if step < run.config.train.steps:
        where = device_line(run)
        report.write_event(run.metrics, "resume", step, device=where.split(None, 1)[1])
        run.say(f"resumed  {run.folder} after step {step}")
        run.say(where)
    return fresh._replace(**tree), step


def loop(
    run: Run, task: Task, state: TrainState, stopping: Callable[[], bool]
) -> TrainState:
    """Trains to the last step; evaluates before it, and on the way; logs and saves."""
    c, train, done = run.config, run.config.train, int(state.step)
    rates = learning_rates(c.optim, train.steps)
    validation = "val -"
    if not done:
        validation = task.evaluate(state, 0, False)
        run.say(f"step {0:>{len(str(train.steps))}}/{train.steps} | {validation}")
        if task.sample:
            task.sample(state, 0)
    step = compiled_by_shape(run, task)
    watch, logged = Stopwatch(), done
    pending: Any = None

    def noted(pending: Any) -> report.Event:
        at, metrics, lr, count = pending
        jax.block_until_ready(metrics)  # steps are dispatched long before they end
        seconds, waited = watch.lap()
        rate = count * task.tokens_per_step / seconds
        return train_event(run, at, metrics, lr, rate, waited / seconds)

    def left(event: report.Event) -> float:
        steps_left = train.steps - event["step"]
        return steps_left * task.tokens_per_step / event["tokens_per_s"]

    put = functools.partial(place_batch, mesh=run.mesh, rows=c.data.batch_size)
    stream = prefetched(task.batches(done, train.steps), put)
    for done, state, metrics in steps(state, step, watch.waiting(stream)):  # noqa: B020
        reached("first step", metrics)
        if pending:  # read one step late, so that the device is not kept waiting
            event, pending = noted(pending), None
            run.say(report.progress(train.steps, event, validation, left(event)))
        last, logging = done == train.steps, done % train.log_every == 0
        evaluating = last or (done - task.eval_offset) % train.eval_every == 0
        stop = stop_now(stopping, logging)
        saving = last or stop or done % c.checkpoint.every == 0
        if evaluating or saving or logging:
            pending, logged = (done, metrics, rates[done - 1], done - logged), done
        if not (evaluating or saving):
            continue
        event, pending = noted(pending), None
        with watch.aside():
            if evaluating:
                validation = task.evaluate(state, done, last)
            run.say(report.progress(train.steps, event, validation, left(event)))
            if evaluating and task.sample:
                task.sample(state, done)
            if saving:
                save_step(run, state, done)
        if stop and not last:
            where = run.checkpoints.parent
            raise Stopped(f"stopped after step {done}; all is saved in {where}")
    return state


def stop_now(stopping: Callable[[], bool], logging: bool) -> bool:
    """Whether to stop here; many processes ask each other only now and then."""
    if jax.process_count() == 1:
        return stopping()
    return logging and distributed.any_process(stopping())


def compiled_by_shape(run: Run, task: Task) -> TrainStep:
    """The step, compiled for each shape of batch, so that people see the wait."""
    options: dict[str, Any] = {"donate_argnums": 0}
    if run.mesh is not None:  # the next step finds the state as this one did
        same = jax.tree.map(lambda leaf: leaf.sharding, task.fresh)
        options["out_shardings"] = same, NamedSharding(run.mesh, PartitionSpec())
    step_fn: Any = jax.jit(task.step, **options)
    programs: dict[Any, Any] = {}

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in programs:
            run.say("compiling ...")
            started = time.perf_counter()
            with on(run.mesh):
                program = step_fn.lower(state, batch, *task.fixed).compile()
            seconds = time.perf_counter() - started
            memory = program.memory_analysis()
            size = memory.temp_size_in_bytes if memory else None
            numbers = {"seconds": seconds, "temporaries": size}
            report.write_event(run.metrics, "compile", int(state.step), **numbers)
            held = budget.human(size) if size is not None else "unknown"
            run.say(f"compiled  in {seconds:.1f} s; a step needs {held} of temporaries")
            programs[shapes] = program
        return programs[shapes](state, batch, *task.fixed)

    return step


def train_event(
    run: Run, done: int, metrics: Metrics, lr: float, rate: float, waited: float
) -> report.Event:
    """Writes the metrics of step `done`.

    Args:
        run: the run.
        done: finished steps.
        metrics: of the last of them.
        lr: that it used.
        rate: tokens per second since the event before.
        waited: share of that time that the loop waited for its next batch.
    """
    values = {
        "loss": float(metrics.loss),
        "lr": lr,
        "grad_norm": float(metrics.grad_norm),
        "tokens_per_s": rate,
        "input_wait": waited,
    }
    if peak := budget.peak_flops():
        values["mfu"] = rate * budget.flops_per_token(run.config.model) / peak
    if not metrics.finite:
        values["skipped"] = True
    report.write_event(run.metrics, "train", done, **values)
    return {"step": done, **values}


def save_step(run: Run, state: TrainState, done: int) -> None:
    """Saves the state and says so in the metrics."""
    keep = run.config.checkpoint.keep
    checkpoint.save(run.checkpoints, done, saved_part(state), keep)
    report.write_event(run.metrics, "save", done)


def device_line(run: Run) -> str:
    """What the run computes on, for its plan."""
    text = f"device   {jax.device_count()} x {jax.devices()[0].device_kind}"
    if jax.process_count() > 1:
        text += f" of {jax.process_count()} processes"
    if run.mesh is not None:
        sizes = " x ".join(f"{axis} {n}" for axis, n in run.mesh.shape.items() if n > 1)
        text += f", as {sizes}"
    return text


def length_line(steps: int, epochs: float) -> str:
    """How long the run is, for its plan."""
    return f"length   {steps:,} steps = {epochs:.3g} times through the data"
