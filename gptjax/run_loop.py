"""The loop of a run, whatever it trains: log, evaluate, sample, save, stop, resume."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax import checkpoint, distributed, report, spikes
from gptjax.config import RunConfig
from gptjax.errors import ConfigError
from gptjax.fingerprint import check_facts
from gptjax.going_back import batches, go_back, jumps_of
from gptjax.machine_faults import check_memory, told, with_micro_batch
from gptjax.optim import learning_rates
from gptjax.phases import reached
from gptjax.prefetch import prefetched
from gptjax.run_folder import (
    command_line,
    open_folder,
    settle_config,
    settle_policy,
    versions,
    write_meta,
)
from gptjax.run_lock import only_writer
from gptjax.run_steps import Journal, compiled_by_shape
from gptjax.run_task import NO_WISHES, Run, Say, Task, Wishes, device_line
from gptjax.sharding import check_rows, make_mesh, place, place_batch
from gptjax.stopping import Stopped, answer, show_life, stop_signal
from gptjax.train import TrainState, steps
from gptjax.weights.folder import Model
from gptjax.weights.importing import load

MakeTask = Callable[[Run], tuple[Run, Task]]


def train_run(
    config: RunConfig,
    folder: Path,
    say: Say,
    make_task: MakeTask,
    wishes: Wishes = NO_WISHES,
) -> tuple[Run, Task, TrainState]:
    """Trains in the run folder to the last step, or goes on where it ended.

    Args:
        config: of the run; a folder that holds another one is refused.
        folder: made if it is not there.
        say: gets each line for the user.
        make_task: reads the data; returns the run with its config settled by them.
        wishes: what may change, and what follows a spike.

    Raises:
        GptjaxError: data, config or folder cannot be used, or the machine fails.
        Stopped: SIGINT or SIGTERM came; the same call goes on later.
    """
    main, together = jax.process_index() == 0, jax.process_count() > 1
    open_folder(folder)
    run = Run(
        config=config,
        folder=distributed.own_folder(folder),
        say=say if main else lambda text: None,
        mesh=make_mesh(config.mesh),
        saved=folder,
    )
    alone = only_writer(folder) if main else contextlib.nullcontext()
    with alone, stop_signal() as stopping, told():
        answer("together" if together else "leave")
        policy = settle_policy(run.folder, wishes.on_spike, wishes.allow_change)
        run = with_micro_batch(dataclasses.replace(run, on_spike=policy))
        if policy == "rollback" and config.train.task == "book":
            raise ConfigError(
                "--on-spike rollback leaves batches out, and train.task=book has the "
                "book's own, in its order. Choose log or skip."
            )
        check_memory(run)
        jumps: list[spikes.Jump] = []
        while True:
            settled, task, state = prepared(run, make_task, wishes, jumps, stopping)
            checkpoint.check_space(settled.checkpoints, saved_part(state))
            with checkpoint.saver(*saving(settled)) as save:
                state, spike = loop(settled, task, state, stopping, save)
            if spike is None:
                break
            jumps = go_back(settled, spike)
            answer("together" if together else "leave")
        answer("together" if together else "leave")
    return settled, task, state


def prepared(
    run: Run,
    make_task: MakeTask,
    wishes: Wishes,
    jumps: list[spikes.Jump],
    stopping: Callable[[], bool],
) -> tuple[Run, Task, TrainState]:
    """Reads what there is to read; the state is that of the newest checkpoint.

    Args:
        run: as asked for.
        make_task: of `train_run`.
        wishes: what may change.
        jumps: that are to be made, if the run has just gone back.
        stopping: whether a signal came.
    """
    run, task = make_task(run)
    if jax.process_count() > 1:
        distributed.agree(facts_of(run, task))
        distributed.stop_together(stopping())
    changes = settle_config(run.folder, run.config, wishes.allow_change)
    check_facts(run.folder, task.facts)
    task = placed(task, run)
    state, first = resumed(run, task.fresh, changes)
    for jump in jumps[len(jumps_of(run)) :]:
        left_out = {"batches": jump.batches}
        report.write_event(run.metrics, "rollback", jump.step, **left_out)
    reached("loading")
    if not first:
        facts = {**task.facts, "on_spike": run.on_spike}
        write_meta(run.folder, command_line(), facts)
        for text in task.plan:
            run.say(text)
    distributed.stop_together(stopping())
    return run, task, state


def facts_of(run: Run, task: Task) -> dict[str, Any]:
    """What all processes of a run have to agree on."""
    data = task.facts.get("data")
    if data is None:  # each process reads all of it: then its first batch stands for it
        first = next(task.batches(0, 1))
        data = {name: np.asarray(leaf).tobytes().hex() for name, leaf in first.items()}
    return {
        "config": [dataclasses.asdict(run.config), run.on_spike],
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
    wishes: Wishes = NO_WISHES,
) -> Model:
    """Trains as `train_run`, and finishes with the model that the task kept.

    Args:
        config: of the run; a folder that holds another one is refused.
        folder: made if it is not there.
        say: gets each line for the user.
        make_task: as for `train_run`; returns also what it read.
        finish: gets the run, its task, the model in model/, and what was read.
        wishes: as for `train_run`.
    """
    found: list[Any] = []

    def noted(run: Run) -> tuple[Run, Task]:
        run, task, read = make_task(run)
        found.append(read)
        return run, task

    run, task, _ = train_run(config, folder, say, noted, wishes)
    model = load(run.folder / "model")
    finish(run, task, model, found[-1])
    return model


def saved_part(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds; the key follows from the config."""
    return {
        "step": state.step,
        "params": state.params,
        "opt_state": state.opt_state,
        "skipped": state.skipped,
    }


def resumed(
    run: Run, fresh: TrainState, changes: Sequence[str] = ()
) -> tuple[TrainState, int]:
    """The newest saved state, or the fresh one; and its number of finished steps.

    Args:
        run: the run.
        fresh: its state before the first step.
        changes: of its config, which are written down and said.
    """
    step, tree, complaints = checkpoint.resume(run.checkpoints, saved_part(fresh))
    for complaint in complaints:
        run.say(complaint)
    if step is None:
        run.metrics.unlink(missing_ok=True)  # of a start that saved nothing
        return fresh, 0
    report.trim_events(run.metrics, step)
    if step < run.config.train.steps:
        where = device_line(run)
        facts = {"device": where.split(None, 1)[1]}
        facts |= {"changes": list(changes)} if changes else {}
        report.write_event(run.metrics, "resume", step, **facts)
        run.say(f"resumed  {run.folder} after step {step}")
        run.say(where)
        for change in changes:
            run.say(f"changed  {change}")
    return fresh._replace(**tree), step


def loop(
    run: Run,
    task: Task,
    state: TrainState,
    stopping: Callable[[], bool],
    save: checkpoint.Save,
) -> tuple[TrainState, spikes.Spike | None]:
    """Trains to the last step; evaluates before it, and on the way; logs and saves.

    Returns:
        The last state, and the spike for which the run is to go back, or None.
    """
    c, train, first = run.config, run.config.train, int(state.step)
    journal, done, saved = Journal(run, task, first), first, first
    if not looked_at(run, task, first):
        with journal.watch.aside():
            look(run, task, state, journal, None, True, stopping)
    distributed.stop_together(stopping())
    if first == train.steps:
        return state, None
    rates = learning_rates(c.optim, train.steps)
    step = compiled_by_shape(run, task, journal.norm_limit, stopping)
    put = functools.partial(place_batch, mesh=run.mesh, rows=c.data.batch_size)
    stream = journal.watch.waiting(prefetched(batches(run, task, first), put))
    try:
        for done, state, metrics in steps(state, step, stream):  # noqa: B020
            reached("first step", metrics)
            show_life()
            if event := journal.read():  # of the step before
                run.say(journal.line(event))
            last, logging = done == train.steps, done % train.log_every == 0
            evaluating, stop = due(run, task, done), stop_now(stopping, logging)
            saving = last or stop or done % c.checkpoint.every == 0
            journal.add(metrics, rates[done - 1], evaluating or saving or logging)
            if (evaluating or saving) and not journal.back:
                event = journal.read()
            if journal.back:
                return state, journal.back
            if not (evaluating or saving):
                continue
            with journal.watch.aside():
                look(run, task, state, journal, event, evaluating, stopping)
                if saving:
                    save_step(run, save, state, done)
                    saved = done
            if stop and not last:
                raise Stopped
    except Stopped:
        if done == first:
            raise
        journal.read()
        if journal.back:
            return state, journal.back
        if done > saved:
            save_step(run, save, state, done)
        where = run.checkpoints.parent
        text = f"stopped after step {done}; all is saved in {where}"
        raise Stopped(text) from None
    return state, None


def due(run: Run, task: Task, done: int) -> bool:
    """Whether a state is evaluated after so many steps."""
    train = run.config.train
    return done == train.steps or not (done - task.eval_offset) % train.eval_every


def looked_at(run: Run, task: Task, done: int) -> bool:
    """Whether nothing is left to do with the state from which the loop starts.

    A signal may have come while it was evaluated.
    """
    if done and not due(run, task, done):
        return True
    events = report.read_events(run.metrics)
    kinds = {event["event"] for event in events if event["step"] == done}
    return bool(kinds & {"eval", "sample"})


def look(
    run: Run,
    task: Task,
    state: TrainState,
    journal: Journal,
    event: report.Event | None,
    evaluating: bool,
    stopping: Callable[[], bool],
) -> None:
    """Evaluates a state if asked to, says the line of its step, and lets it write.

    All of it is in metrics.jsonl, or nothing if a signal comes meanwhile.

    Args:
        run: the run.
        task: that it trains on.
        state: after a step, or before the first.
        journal: of the run; is told of the validation.
        event: what was logged of the step, if anything.
        evaluating: whether to look at all.
        stopping: whether a signal came; asked before the first sample.
    """
    done, train = journal.done, run.config.train
    size = run.metrics.stat().st_size if run.metrics.is_file() else 0
    try:
        if evaluating:
            show_life(slow=True)
            text = task.evaluate(state, done, done == train.steps)
            journal.validation = text
        width = len(str(train.steps))
        before = f"step {done:>{width}}/{train.steps} | {journal.validation}"
        run.say(journal.line(event) if event else before)
        if evaluating and task.sample:
            if not event:  # before the first step, where nothing would be saved
                distributed.stop_together(stopping())
            show_life(slow=True)
            task.sample(state, done)
    except Stopped:
        report.cut(run.metrics, size, "save")  # a save may have ended meanwhile
        raise


def stop_now(stopping: Callable[[], bool], logging: bool) -> bool:
    """Whether to stop here; many processes ask each other only now and then."""
    if jax.process_count() == 1:
        return stopping()
    return logging and distributed.any_process(stopping())


def saving(run: Run) -> tuple[Path, int, Callable[[int], None]]:
    """Where a run saves, how many steps it keeps, and that it notes each of them."""
    noted = functools.partial(report.write_event, run.metrics, "save")
    return run.checkpoints, run.config.checkpoint.keep, noted


def save_step(run: Run, save: checkpoint.Save, state: TrainState, done: int) -> None:
    """Begins to save the state, once the metrics up to it are on the disk."""
    show_life(slow=True)
    report.flush(run.metrics)  # what is resumed from the step goes by it
    save(done, saved_part(state))
