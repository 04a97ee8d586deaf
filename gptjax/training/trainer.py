"""Training loop for all tasks: logs, evaluates, samples, saves, stops and resumes."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.checkpoint.checkpoint import (
    SaveFn,
    async_saver,
    check_disk_space,
    restore_latest,
)
from gptjax.config import RunConfig
from gptjax.data.prefetch import prefetch_to_device
from gptjax.errors import ConfigError
from gptjax.parallel import distributed
from gptjax.parallel.distributed import stop_if_any
from gptjax.parallel.sharding import (
    check_batch_divisible,
    make_mesh,
    shard_batch,
    shard_tree,
    use_mesh,
)
from gptjax.runtime.device import package_versions
from gptjax.runtime.preemption import (
    Interrupted,
    handle_signals,
    heartbeat,
    set_signal_mode,
)
from gptjax.runtime.timing import StepTimer, mark_phase
from gptjax.training import anomalies, estimate
from gptjax.training.going_back import go_back, jumps_of, remaining_batches
from gptjax.training.metrics import (
    Event,
    drop_events_after,
    format_progress,
    log_event,
    read_events,
    sync_events,
    truncate_events,
)
from gptjax.training.optimizer import learning_rates
from gptjax.training.resource_errors import (
    check_compiled_memory,
    check_estimated_memory,
    choose_accumulation,
    translate_resource_errors,
)
from gptjax.training.run_dir import (
    check_provenance,
    command_line,
    create_run_dir,
    reconcile_config,
    reconcile_spike_policy,
    write_run_metadata,
)
from gptjax.training.run_lock import run_lock
from gptjax.training.task import (
    DEFAULT_RESUME_OPTIONS,
    LogFn,
    ResumeOptions,
    RunContext,
    Task,
    describe_devices,
)
from gptjax.training.train_step import Metrics, TrainState, TrainStep, train_steps
from gptjax.weights.load import load
from gptjax.weights.model_folder import Model

MakeTaskFn = Callable[[RunContext], tuple[RunContext, Task]]


class MetricsLogger:
    """Logs step metrics and detects anomalies.

    Metrics are read one step later, so that the device is not blocked.
    """

    def __init__(self, run: RunContext, task: Task, step: int) -> None:
        """Starts after `step` steps, with the history in metrics.jsonl."""
        config = run.config
        self.run, self.tokens_per_step, self.timer = (
            run,
            task.tokens_per_step,
            StepTimer(),
        )
        self.step = self.logged_step = self.last_good_step = step
        self.pending: tuple[int, Metrics, float] | None = None
        self.updated: list[Any] = []  # of the steps not yet logged, on the device
        self.consecutive_skips = 0  # consecutive skipped steps
        self.rollback_spike: anomalies.Spike | None = (
            None  # spike that requires a rollback
        )
        self.history = anomalies.logged_steps(
            read_events(run.metrics_path), config.train.log_every
        )
        self.validation = "val -"

    def log_step(self, metrics: Metrics, lr: float, should_log: bool) -> None:
        """Records a dispatched step; its metrics are read later if wanted."""
        self.step += 1
        self.updated.append(metrics.applied)
        if should_log:
            self.pending = self.step, metrics, lr

    def flush_step(self) -> Event | None:
        """Logs and returns the pending metrics; detects spikes.

        Raises:
            ConfigError: too many consecutive steps were skipped.
        """
        if self.pending is None:
            return None
        (step, metrics, lr), self.pending = self.pending, None
        jax.block_until_ready(metrics)  # dispatch is asynchronous
        seconds, wait_seconds = self.timer.end_step()
        num_steps, self.logged_step = step - self.logged_step, step
        heartbeat(seconds / num_steps)
        tokens_per_second = num_steps * self.tokens_per_step / seconds
        event = log_train_metrics(
            self.run, step, metrics, lr, tokens_per_second, wait_seconds / seconds
        )
        applied = jax.device_get(self.updated[:num_steps])
        self.updated = self.updated[num_steps:]
        for applied_step, was_applied in enumerate(applied, step - num_steps + 1):
            self.consecutive_skips = 0 if was_applied else self.consecutive_skips + 1
            self.last_good_step = applied_step if was_applied else self.last_good_step
            if self.consecutive_skips >= anomalies.MAX_CONSECUTIVE_SKIPS:
                raise ConfigError(self.skip_limit_message(applied_step))
        if step % self.run.config.train.log_every == 0:
            self.history.append(
                anomalies.LoggedStep(step, event["loss"], event["grad_norm"])
            )
            if spike := anomalies.detect_spike(self.history):
                self.report_spike(spike)
        return event

    def skip_limit_message(self, step: int) -> str:
        """Error message after too many consecutive skipped steps."""
        reason = "non-finite gradients"
        if self.run.on_spike == "skip":
            reason += ", or gradients above the threshold of --on-spike skip"
        return (
            f"{self.consecutive_skips} consecutive steps were skipped ({reason}), the last of them "
            f"step {step}. The last good step is {self.last_good_step}. Lower optim.peak_lr, "
            "raise optim.warmup_steps or set optim.grad_clip: resume with "
            "--allow-change for each, or start a new run with another --run DIR."
        )

    def report_spike(self, spike: anomalies.Spike) -> None:
        """Prints a spike and writes it to metrics.jsonl."""
        values = {"name": spike.name, "value": spike.value, "limit": spike.threshold}
        log_event(self.run.metrics_path, "spike", spike.step, **values)
        self.run.log(
            f"spike    step {spike.step}: {spike.name} {spike.value:.4g} exceeds the "
            f"spike threshold {spike.threshold:.4g}"
        )
        if self.run.on_spike == "rollback":
            self.rollback_spike = spike

    def format_line(self, event: Event) -> str:
        """Progress line of a logged step."""
        steps = self.run.config.train.steps
        seconds_left = (
            (steps - event["step"]) * self.tokens_per_step / event["tokens_per_s"]
        )
        return format_progress(steps, event, self.validation, seconds_left)

    def grad_norm_threshold(self) -> float:
        """Gradient norm above which the next step is skipped."""
        return anomalies.grad_norm_threshold(self.history, self.step + 1)


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
        jumps: list[anomalies.Jump] = []
        while True:
            resolved_run, task, state = setup_run(
                run, make_task, options, jumps, is_interrupted
            )
            check_disk_space(resolved_run.checkpoint_dir, checkpoint_state(state))
            with async_saver(*async_saver_args(resolved_run)) as save:
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
    jumps: list[anomalies.Jump],
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
        log_event(run.metrics_path, "rollback", jump.step, **left_out)
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
    step, tree, warnings = restore_latest(
        run.checkpoint_dir, checkpoint_state(init_state)
    )
    for warning in warnings:
        run.log(warning)
    if step is None:
        run.metrics_path.unlink(
            missing_ok=True
        )  # of an earlier start without a checkpoint
        return init_state, 0
    drop_events_after(run.metrics_path, step)
    if step < run.config.train.steps:
        devices = describe_devices(run)
        resume_info = {"device": devices.split(None, 1)[1]}
        resume_info |= {"changes": list(changes)} if changes else {}
        log_event(run.metrics_path, "resume", step, **resume_info)
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
    save: SaveFn,
) -> tuple[TrainState, anomalies.Spike | None]:
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
    events = read_events(run.metrics_path)
    kinds = {event["event"] for event in events if event["step"] == step}
    return bool(kinds & {"eval", "sample"})


def evaluate_and_sample(
    run: RunContext,
    task: Task,
    state: TrainState,
    logger: MetricsLogger,
    event: Event | None,
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
        truncate_events(
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
    log_save = functools.partial(log_event, run.metrics_path, "save")
    return run.checkpoint_dir, run.config.checkpoint.keep, log_save


def save_checkpoint(
    run: RunContext, save: SaveFn, state: TrainState, step: int
) -> None:
    """Starts saving a checkpoint after syncing the metrics up to it to disk."""
    heartbeat(long_operation=True)
    sync_events(run.metrics_path)  # a run resumed from this step reads them
    save(step, checkpoint_state(state))


def jit_by_shape(
    run: RunContext,
    task: Task,
    grad_norm_threshold: Callable[[], float],
    is_interrupted: Callable[[], bool],
) -> TrainStep:
    """Train step, compiled explicitly for each batch shape, with a log line.

    Args:
        run: the run; the threshold applies if its `on_spike` is "skip".
        task: the task.
        grad_norm_threshold: returns the gradient-norm threshold of the next step.
        is_interrupted: returns True after a signal; checked after compilation.
    """
    options: dict[str, Any] = {"donate_argnums": 0}
    if run.mesh is not None:  # keeps the sharding of the state from step to step
        state_shardings = jax.tree.map(lambda leaf: leaf.sharding, task.init_state)
        options["out_shardings"] = (
            state_shardings,
            NamedSharding(run.mesh, PartitionSpec()),
        )
    step_fn: Any = jax.jit(task.train_step, **options)
    compiled_steps: dict[Any, Any] = {}
    skip_spikes = run.on_spike == "skip"

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        threshold_arg = (
            {"max_grad_norm": np.float32(grad_norm_threshold())} if skip_spikes else {}
        )
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in compiled_steps:
            heartbeat(long_operation=True)
            compiled_steps[shapes] = aot_compile(
                run, step_fn, state, batch, task.frozen_params, threshold_arg
            )
            stop_if_any(is_interrupted())
        if jax.process_count() == 1:
            set_signal_mode("deferred")  # from here on there is progress to save
        return compiled_steps[shapes](
            state, batch, *task.frozen_params, **threshold_arg
        )

    return train_step


def aot_compile(
    run: RunContext,
    step_fn: Any,
    state: TrainState,
    batch: Any,
    frozen_params: Any,
    threshold_arg: Any,
) -> Any:
    """Compiles the step for one batch shape; logs time and memory.

    Raises:
        ConfigError: the step does not fit into memory.
    """
    run.log("compiling ...")
    started = time.perf_counter()
    with use_mesh(run.mesh):
        compiled_step = step_fn.lower(
            state, batch, *frozen_params, **threshold_arg
        ).compile()
    seconds = time.perf_counter() - started
    memory = compiled_step.memory_analysis()
    check_compiled_memory(run, memory)
    temp_bytes = memory.temp_size_in_bytes if memory else None
    numbers = {"seconds": seconds, "temporaries": temp_bytes}
    log_event(run.metrics_path, "compile", int(state.step), **numbers)
    temp_size = (
        estimate.format_bytes(temp_bytes) if temp_bytes is not None else "unknown"
    )
    run.log(f"compiled  in {seconds:.1f} s; {temp_size} of temporary buffers per step")
    return compiled_step


def log_train_metrics(
    run: RunContext,
    step: int,
    metrics: Metrics,
    lr: float,
    tokens_per_second: float,
    input_wait: float,
) -> Event:
    """Logs the metrics of a step as a "train" event.

    Args:
        run: the run.
        step: finished steps.
        metrics: of the last finished step.
        lr: learning rate of that step.
        tokens_per_second: tokens per second since the previous event.
        input_wait: fraction of that time spent waiting for the next batch.
    """
    values: Event = {
        "loss": float(metrics.loss),
        "lr": lr,
        "grad_norm": float(metrics.grad_norm),
        "tokens_per_s": tokens_per_second,
        "input_wait": input_wait,
    }
    if peak := estimate.total_peak_flops():
        values["mfu"] = (
            tokens_per_second * estimate.flops_per_token(run.config.model) / peak
        )
    if not metrics.applied:
        finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        values["skipped"] = "spike" if finite else "not finite"
    log_event(run.metrics_path, "train", step, **values)
    return {"step": step, **values}
