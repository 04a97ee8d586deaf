"""Training loop for all tasks: logs, evaluates, samples, saves, stops and resumes."""

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
from gptjax.fingerprint import check_provenance
from gptjax.going_back import remaining_batches, go_back, jumps_of
from gptjax.machine_faults import (
    check_estimated_memory,
    translate_resource_errors,
    choose_accumulation,
)
from gptjax.optim import learning_rates
from gptjax.phases import mark_phase
from gptjax.prefetch import prefetch_to_device
from gptjax.run_folder import (
    command_line,
    create_run_dir,
    reconcile_config,
    reconcile_spike_policy,
    package_versions,
    write_run_metadata,
)
from gptjax.run_lock import run_lock
from gptjax.run_steps import MetricsLogger, jit_by_shape
from gptjax.run_task import (
    DEFAULT_RESUME_OPTIONS,
    RunContext,
    LogFn,
    Task,
    ResumeOptions,
    describe_devices,
)
from gptjax.sharding import check_batch_divisible, make_mesh, shard_tree, shard_batch
from gptjax.stopping import Interrupted, set_signal_mode, heartbeat, handle_signals
from gptjax.train import TrainState, train_steps
from gptjax.weights.folder import Model
from gptjax.weights.importing import load

MakeTaskFn = Callable[[RunContext], tuple[RunContext, Task]]


def train(
    config: RunConfig,
    run_dir: Path,
    log: LogFn,
    make_task: MakeTaskFn,
    options: ResumeOptions = DEFAULT_RESUME_OPTIONS,
) -> tuple[RunContext, Task, TrainState]:
    """Trains a run to the last step; resumes if the run exists.

    Args:
        config: must match that of an existing run.
        run_dir: run folder; created if missing.
        log: receives log lines.
        make_task: loads the data; returns the run with the resolved config.
        options: config options that may change, and the spike policy.

    Raises:
        GptjaxError: invalid data, config or run folder, or a resource error.
        Interrupted: interrupted by SIGINT or SIGTERM; the same call resumes.
    """
    is_main, is_distributed = jax.process_index() == 0, jax.process_count() > 1
    create_run_dir(run_dir)
    run = RunContext(
        config=config,
        run_dir=distributed.process_dir(run_dir),
        log=log if is_main else lambda text: None,
        mesh=make_mesh(config.mesh),
        shared_run_dir=run_dir,
    )
    lock = run_lock(run_dir) if is_main else contextlib.nullcontext()
    with lock, handle_signals() as is_interrupted, translate_resource_errors():
        set_signal_mode("collective" if is_distributed else "immediate")
        policy = reconcile_spike_policy(
            run.run_dir, options.on_spike, options.allow_change
        )
        run = choose_accumulation(dataclasses.replace(run, on_spike=policy))
        if policy == "rollback" and config.train.task == "book":
            raise ConfigError(
                "--on-spike rollback skips batches, which train.task=book does not "
                "support: it uses the book's batch order. Choose log or skip."
            )
        check_estimated_memory(run)
        jumps: list[spikes.Jump] = []
        while True:
            resolved_run, task, state = setup_run(
                run, make_task, options, jumps, is_interrupted
            )
            checkpoint.check_disk_space(
                resolved_run.checkpoint_dir, checkpoint_state(state)
            )
            with checkpoint.async_saver(*async_saver_args(resolved_run)) as save:
                state, spike = train_loop(
                    resolved_run, task, state, is_interrupted, save
                )
            if spike is None:
                break
            jumps = go_back(resolved_run, spike)
            set_signal_mode("collective" if is_distributed else "immediate")
        set_signal_mode("collective" if is_distributed else "immediate")
    return resolved_run, task, state


def setup_run(
    run: RunContext,
    make_task: MakeTaskFn,
    options: ResumeOptions,
    jumps: list[spikes.Jump],
    is_interrupted: Callable[[], bool],
) -> tuple[RunContext, Task, TrainState]:
    """Loads data and task and restores the newest checkpoint.

    Args:
        run: with the config as requested.
        make_task: as for `train`.
        options: config options that may change.
        jumps: all rollbacks so far, if the run has just been rolled back.
        is_interrupted: returns True after a signal.
    """
    run, task = make_task(run)
    if jax.process_count() > 1:
        distributed.assert_equal(shared_provenance(run, task))
        distributed.stop_if_any(is_interrupted())
    changes = reconcile_config(run.run_dir, run.config, options.allow_change)
    check_provenance(run.run_dir, task.provenance)
    task = shard_task(task, run)
    state, start_step = restore_or_init(run, task.init_state, changes)
    for jump in jumps[len(jumps_of(run)) :]:
        left_out = {"batches": jump.batches}
        report.log_event(run.metrics_path, "rollback", jump.step, **left_out)
    mark_phase("loading")
    if not start_step:
        metadata = {**task.provenance, "on_spike": run.on_spike}
        write_run_metadata(run.run_dir, command_line(), metadata)
        for text in task.summary:
            run.log(text)
    distributed.stop_if_any(is_interrupted())
    return run, task, state


def shared_provenance(run: RunContext, task: Task) -> dict[str, Any]:
    """Values that must be equal in all processes of a run."""
    data = task.provenance.get("data")
    if data is None:  # each process reads all data: compare its first batch
        first_batch = next(task.batches(0, 1))
        data = {
            name: np.asarray(leaf).tobytes().hex() for name, leaf in first_batch.items()
        }
    return {
        "config": [dataclasses.asdict(run.config), run.on_spike],
        "code": [distributed.source_hash(), package_versions()],
        "data": data,
        "tokenizer": task.provenance.get("tokenizer"),
    }


def shard_task(task: Task, run: RunContext) -> Task:
    """Task with its arrays sharded over the mesh.

    Raises:
        ConfigError: parameters or rows are not divisible by the mesh axes.
    """
    if run.mesh is None:
        return task
    config, frozen_params = (
        run.config,
        tuple(shard_tree(tree, run.mesh) for tree in task.frozen_params),
    )
    check_batch_divisible(
        config.data.batch_size, config.train.accumulate, [*run.mesh.shape.values()]
    )
    return dataclasses.replace(
        task, fresh=shard_tree(task.init_state, run.mesh), fixed=frozen_params
    )


def finetune(
    config: RunConfig,
    run_dir: Path,
    log: LogFn,
    make_task: Callable[[RunContext], tuple[RunContext, Task, Any]],
    finalize: Callable[[RunContext, Task, Model, Any], None],
    options: ResumeOptions = DEFAULT_RESUME_OPTIONS,
) -> Model:
    """Trains with `train`, then finalizes with the best model.

    Args:
        config: must match that of an existing run.
        run_dir: run folder; created if missing.
        log: receives log lines.
        make_task: as for `train`, but also returns the data it loaded.
        finalize: receives the run, its task, the model in model/ and the data.
        options: as for `train`.
    """
    task_data: list[Any] = []

    def make_task_only(run: RunContext) -> tuple[RunContext, Task]:
        run, task, data = make_task(run)
        task_data.append(data)
        return run, task

    run, task, _ = train(config, run_dir, log, make_task_only, options)
    model = load(run.run_dir / "model")
    finalize(run, task, model, task_data[-1])
    return model


def checkpoint_state(state: TrainState) -> dict[str, Any]:
    """Tree saved in a checkpoint; the key is derived from the config."""
    return {
        "step": state.step,
        "params": state.params,
        "opt_state": state.opt_state,
        "num_skipped": state.num_skipped,
    }


def restore_or_init(
    run: RunContext, init_state: TrainState, changes: Sequence[str] = ()
) -> tuple[TrainState, int]:
    """Newest saved state or the initial one, with its number of finished steps.

    Args:
        run: the run.
        init_state: state before the first step.
        changes: config changes, which are logged.
    """
    step, tree, warnings = checkpoint.restore_latest(
        run.checkpoint_dir, checkpoint_state(init_state)
    )
    for warning in warnings:
        run.log(warning)
    if step is None:
        run.metrics_path.unlink(
            missing_ok=True
        )  # of an earlier start without a checkpoint
        return init_state, 0
    report.drop_events_after(run.metrics_path, step)
    if step < run.config.train.steps:
        devices = describe_devices(run)
        resume_info = {"device": devices.split(None, 1)[1]}
        resume_info |= {"changes": list(changes)} if changes else {}
        report.log_event(run.metrics_path, "resume", step, **resume_info)
        run.log(f"resumed  {run.run_dir} after step {step}")
        run.log(devices)
        for change in changes:
            run.log(f"changed  {change}")
    return init_state._replace(**tree), step


def train_loop(
    run: RunContext,
    task: Task,
    state: TrainState,
    is_interrupted: Callable[[], bool],
    save: checkpoint.SaveFn,
) -> tuple[TrainState, spikes.Spike | None]:
    """Trains to the last step; logs, evaluates and saves.

    Returns:
        The last state, and the spike that requires a rollback, or None.
    """
    config, train_config, start_step = run.config, run.config.train, int(state.step)
    logger, step, saved_step = (
        MetricsLogger(run, task, start_step),
        start_step,
        start_step,
    )
    if not already_evaluated(run, task, start_step):
        with logger.timer.excluded():
            evaluate_and_sample(run, task, state, logger, None, True, is_interrupted)
    distributed.stop_if_any(is_interrupted())
    if start_step == train_config.steps:
        return state, None
    learning_rate_by_step = learning_rates(config.optim, train_config.steps)
    train_step = jit_by_shape(run, task, logger.grad_norm_threshold, is_interrupted)
    shard = functools.partial(shard_batch, mesh=run.mesh, rows=config.data.batch_size)
    batch_stream = logger.timer.time_data(
        prefetch_to_device(remaining_batches(run, task, start_step), shard)
    )
    try:
        for step, state, metrics in train_steps(state, train_step, batch_stream):  # noqa: B020
            mark_phase("first step", metrics)
            heartbeat()
            if event := logger.flush_step():  # of the previous step
                run.log(logger.format_line(event))
            is_last, is_log_step = (
                step == train_config.steps,
                step % train_config.log_every == 0,
            )
            is_eval_step, stop_requested = (
                should_evaluate(run, task, step),
                should_stop(is_interrupted, is_log_step),
            )
            is_save_step = (
                is_last or stop_requested or step % config.checkpoint.every == 0
            )
            logger.log_step(
                metrics,
                learning_rate_by_step[step - 1],
                is_eval_step or is_save_step or is_log_step,
            )
            if (is_eval_step or is_save_step) and not logger.rollback_spike:
                event = logger.flush_step()
            if logger.rollback_spike:
                return state, logger.rollback_spike
            if not (is_eval_step or is_save_step):
                continue
            with logger.timer.excluded():
                evaluate_and_sample(
                    run, task, state, logger, event, is_eval_step, is_interrupted
                )
                if is_save_step:
                    save_checkpoint(run, save, state, step)
                    saved_step = step
            if stop_requested and not is_last:
                raise Interrupted
    except Interrupted:
        if step == start_step:
            raise
        logger.flush_step()
        if logger.rollback_spike:
            return state, logger.rollback_spike
        if step > saved_step:
            save_checkpoint(run, save, state, step)
        run_dir = run.checkpoint_dir.parent
        text = f"interrupted after step {step}; all progress is saved in {run_dir}"
        raise Interrupted(text) from None
    return state, None


def should_evaluate(run: RunContext, task: Task, step: int) -> bool:
    """True if the state after a step is evaluated."""
    train_config = run.config.train
    return (
        step == train_config.steps
        or not (step - task.eval_offset) % train_config.eval_every
    )


def already_evaluated(run: RunContext, task: Task, step: int) -> bool:
    """True if the restored step was already evaluated.

    The run may have been interrupted during its evaluation.
    """
    if step and not should_evaluate(run, task, step):
        return True
    events = report.read_events(run.metrics_path)
    kinds = {event["event"] for event in events if event["step"] == step}
    return bool(kinds & {"eval", "sample"})


def evaluate_and_sample(
    run: RunContext,
    task: Task,
    state: TrainState,
    logger: MetricsLogger,
    event: report.Event | None,
    is_eval_step: bool,
    is_interrupted: Callable[[], bool],
) -> None:
    """Evaluates, logs and samples at one step.

    If interrupted meanwhile, removes the events written so far from metrics.jsonl.

    Args:
        run: the run.
        task: the task.
        state: after the step, or before the first.
        logger: metrics logger; receives the validation text.
        event: logged event of the step, if any.
        is_eval_step: if False, only logs the progress line.
        is_interrupted: returns True after a signal; checked before the first sample.
    """
    step, train_config = logger.step, run.config.train
    size = run.metrics_path.stat().st_size if run.metrics_path.is_file() else 0
    try:
        if is_eval_step:
            heartbeat(long_operation=True)
            text = task.evaluate(state, step, step == train_config.steps)
            logger.validation = text
        width = len(str(train_config.steps))
        progress = f"step {step:>{width}}/{train_config.steps} | {logger.validation}"
        run.log(logger.format_line(event) if event else progress)
        if is_eval_step and task.sample:
            if not event:  # before the first step there is nothing to save
                distributed.stop_if_any(is_interrupted())
            heartbeat(long_operation=True)
            task.sample(state, step)
    except Interrupted:
        report.truncate_events(
            run.metrics_path, size, "save"
        )  # a save may have finished meanwhile
        raise


def should_stop(is_interrupted: Callable[[], bool], is_log_step: bool) -> bool:
    """True if the run should stop; processes synchronize only at logged steps."""
    if jax.process_count() == 1:
        return is_interrupted()
    return is_log_step and distributed.any_across_processes(is_interrupted())


def async_saver_args(run: RunContext) -> tuple[Path, int, Callable[[int], None]]:
    """Checkpoint folder, number of checkpoints to keep, and a callback that logs."""
    log_save = functools.partial(report.log_event, run.metrics_path, "save")
    return run.checkpoint_dir, run.config.checkpoint.keep, log_save


def save_checkpoint(
    run: RunContext, save: checkpoint.SaveFn, state: TrainState, step: int
) -> None:
    """Starts saving a checkpoint after syncing the metrics up to it to disk."""
    heartbeat(long_operation=True)
    report.sync_events(run.metrics_path)  # a run resumed from this step reads them
    save(step, checkpoint_state(state))
