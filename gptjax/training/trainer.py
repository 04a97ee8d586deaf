"""Training loop for all tasks: logs, evaluates, samples, saves, stops and resumes."""

import contextlib
import dataclasses
import functools
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.checkpoint.checkpoint import SaveFn, async_saver, check_disk_space, restore_latest
from gptjax.fileio.atomic import open_append
from gptjax.parallel import distributed
from gptjax.parallel.sharding import shard_batch, shard_tree, use_mesh
from gptjax.runtime.device import package_versions
from gptjax.runtime.preemption import Interrupted, heartbeat, set_signal_mode
from gptjax.runtime.timing import mark_phase
from gptjax.training.estimate import format_bytes
from gptjax.training.metrics import Event, History, MetricsLogger, drop_open_line, log_event
from gptjax.training.resource_errors import check_compiled_memory
from gptjax.training.run_dir import check_provenance, reconcile_config, write_run_metadata
from gptjax.training.task import RunContext, Task, describe_devices
from gptjax.training.train_step import Metrics, TrainState, TrainStep, train_steps
from gptjax.weights import model_folder


def fit(run: RunContext, task: Task) -> TrainState:
    """Trains to the last step, from the newest verified checkpoint if there is one."""
    if jax.process_count() > 1:
        distributed.assert_equal(shared_provenance(run, task))
        distributed.stop_if_any(run.is_interrupted())
    changes = reconcile_config(run.run_dir, run.config, run.allow_change)
    check_provenance(run.run_dir, task.provenance)
    task = shard_task(run, task)
    state, history = restore_or_init(run, task, changes)
    mark_phase("loading")
    distributed.stop_if_any(run.is_interrupted())
    check_disk_space(run.checkpoint_dir, checkpoint_state(state))
    logger = MetricsLogger(run, task.tokens_per_step, int(state.step), history)
    log_save = functools.partial(log_event, run.metrics_path, "save")
    keep = run.config.checkpoint.keep
    shard = functools.partial(shard_batch, mesh=run.mesh, rows=run.config.data.batch_size)
    steps = task.batches(logger.step, run.config.train.steps)
    batches = prefetch_to_device(steps, shard, waiting=logger.timer.waiting)
    with async_saver(run.checkpoint_dir, keep, log_save) as save, contextlib.closing(batches):
        state = train_loop(run, task, state, batches, logger, save)
    set_signal_mode("collective" if jax.process_count() > 1 else "immediate")
    logger.check_finite()
    return state


def shared_provenance(run: RunContext, task: Task) -> dict[str, Any]:
    """Values that must be equal in all processes of a run."""
    data = task.provenance.get("data")
    if data is None:  # each process reads all data: compare its first batch
        first_batch = next(task.batches(0, 1))
        data = {name: np.asarray(leaf).tobytes().hex() for name, leaf in first_batch.items()}
    return {
        "config": [dataclasses.asdict(run.config), run.on_spike],
        "code": [distributed.source_hash(), package_versions()],
        "data": data,
        "tokenizer": task.provenance.get("tokenizer"),
    }


def shard_task(run: RunContext, task: Task) -> Task:
    """Returns the task with its arrays sharded over the mesh."""
    if run.mesh is None:
        return task
    return dataclasses.replace(
        task,
        init_state=shard_tree(task.init_state, run.mesh),
        frozen_params=tuple(shard_tree(tree, run.mesh) for tree in task.frozen_params),
    )


def checkpoint_state(state: TrainState) -> dict[str, Any]:
    """Tree saved in a checkpoint; the key is derived from the config."""
    return {name: leaf for name, leaf in state._asdict().items() if name != "key"}


def restore_or_init(
    run: RunContext, task: Task, changes: Sequence[str]
) -> tuple[TrainState, History]:
    """Newest saved state or the initial one, with its history; logs config changes."""
    step, tree, warnings, metadata = restore_latest(
        run.checkpoint_dir, checkpoint_state(task.init_state)
    )
    for warning in warnings:
        run.log(warning)
    drop_open_line(run.metrics_path)
    if step is None:
        if run.metrics_path.exists():  # of an earlier start without a checkpoint
            log_event(run.metrics_path, "resume", 0)
        recorded = {"on_spike": run.on_spike, "tokens_per_step": task.tokens_per_step}
        write_run_metadata(run.run_dir, {**task.provenance, **recorded})
        model = task.to_model(task.init_state)  # model/ gets its parameters later
        model_folder.save(dataclasses.replace(model, params={}), run.run_dir / "model")
        for line in task.summary:
            run.log(line)
        return task.init_state, History()
    history = History.from_metadata(metadata)
    if step < run.config.train.steps:
        devices = describe_devices(run)
        logged_changes = {"changes": list(changes)} if changes else {}
        log_event(
            run.metrics_path, "resume", step, device=devices.split(None, 1)[1], **logged_changes
        )
        best = f"; the best so far is {history.best_step}" if history.best_score else ""
        run.log(f"resumed  {run.run_dir} after step {step}{best}")
        for line in (devices, *(f"changed  {change}" for change in changes)):
            run.log(line)
    return task.init_state._replace(**tree), history


def train_loop(
    run: RunContext,
    task: Task,
    state: TrainState,
    batches: Iterable[Any],
    logger: MetricsLogger,
    save: SaveFn,
) -> TrainState:
    """Trains to the last step; logs, evaluates and saves, also after a signal."""
    config = run.config
    step = saved_step = start_step = int(state.step)
    if should_evaluate(run, task, step) and logger.history.evaluated_step != step:
        with logger.timer.exclude():
            evaluate_and_log(run, task, state, logger, None)
    distributed.stop_if_any(run.is_interrupted())
    if start_step == config.train.steps:
        return state
    train_step = jit_by_shape(run, task, logger)
    try:
        for step, state, metrics in train_steps(state, train_step, batches):  # noqa: B020
            mark_phase("first step", metrics)
            heartbeat(step)
            logger.print_progress(logger.flush_step())  # of the previous step
            is_last, is_stopping = step == config.train.steps, should_stop(run, step)
            is_eval_step = should_evaluate(run, task, step)
            is_save_step = is_last or is_stopping or step % config.checkpoint.every == 0
            is_log_step = is_eval_step or is_save_step or step % config.train.log_every == 0
            logger.log_step(metrics, is_log_step)
            if is_eval_step or is_save_step:
                event = logger.flush_step()
                with logger.timer.exclude():
                    if is_eval_step:
                        evaluate_and_log(run, task, state, logger, event)
                    else:
                        logger.print_progress(event)
                    if is_save_step:
                        saved_step = step  # first: a step is never saved twice
                        save_checkpoint(run, state, logger, save)
            if is_stopping and not is_last:
                raise Interrupted
    except Interrupted:
        if step == start_step:
            raise
        logger.flush_step()
        if step > saved_step:
            save_checkpoint(run, state, logger, save)
        raise Interrupted(
            f"interrupted after step {step}; all progress is saved in {run.checkpoint_dir.parent}"
        ) from None
    return state


def should_evaluate(run: RunContext, task: Task, step: int) -> bool:
    """True if the state after a step is evaluated; that before the first one is."""
    train = run.config.train
    return step in (0, train.steps) or (step - task.eval_offset) % train.eval_every == 0


def evaluate_and_log(
    run: RunContext, task: Task, state: TrainState, logger: MetricsLogger, event: Event | None
) -> None:
    """Evaluates and samples at one step, logs both, and saves the best model.

    Nothing is logged if the evaluation is interrupted; it is repeated on resume.
    """
    step = logger.step
    heartbeat()
    result = task.evaluate(state, step, step == run.config.train.steps)
    if not step:  # before the first step there is nothing to save
        distributed.stop_if_any(run.is_interrupted())
    heartbeat()
    sample = task.sample(state, step) if task.sample else None
    is_best = logger.log_evaluation(step, result, sample)
    if is_best and task.save_best:
        task.save_best(state)
    logger.print_progress(event, result.text)
    if sample is not None:
        indented = "\n".join(f"    {row}" for row in sample.strip("\n").splitlines())
        run.log(f"sample after step {step}:\n{indented}")


def should_stop(run: RunContext, step: int) -> bool:
    """True if the run should stop; processes synchronize only at logged steps."""
    if jax.process_count() == 1:
        return run.is_interrupted()
    is_log_step = step % run.config.train.log_every == 0
    return is_log_step and distributed.any_across_processes(run.is_interrupted())


def save_checkpoint(
    run: RunContext, state: TrainState, logger: MetricsLogger, save: SaveFn
) -> None:
    """Starts saving a checkpoint after syncing the metrics up to it to disk."""
    heartbeat()
    with open_append(run.metrics_path) as file:
        os.fsync(file.fileno())
    save(logger.step, checkpoint_state(state), logger.history.to_metadata())


def jit_by_shape(run: RunContext, task: Task, logger: MetricsLogger) -> TrainStep:
    """Train step, compiled once per batch shape; step times exclude compilation."""
    options: dict[str, Any] = {"donate_argnums": 0}
    if run.mesh is not None:  # keeps the sharding of the state from step to step
        state_shardings = jax.tree.map(lambda leaf: leaf.sharding, task.init_state)
        options["out_shardings"] = state_shardings, NamedSharding(run.mesh, PartitionSpec())
    step_fn: Any = jax.jit(task.train_step, **options)
    compiled_steps: dict[Any, Any] = {}

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        threshold_arg = {}
        if run.on_spike == "skip":
            threshold_arg["max_grad_norm"] = np.float32(logger.grad_norm_threshold())
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in compiled_steps:
            heartbeat()
            args = jax.block_until_ready(state), batch, *task.frozen_params
            with logger.timer.exclude():
                compiled_steps[shapes] = aot_compile(run, step_fn, *args, **threshold_arg)
            distributed.stop_if_any(run.is_interrupted())
        if jax.process_count() == 1:
            set_signal_mode("deferred")  # from here on there is progress to save
        return compiled_steps[shapes](state, batch, *task.frozen_params, **threshold_arg)

    return train_step


def aot_compile(
    run: RunContext, step_fn: Any, state: TrainState, *args: Any, **options: Any
) -> Any:
    """Compiles the step for one batch shape; checks its memory and logs its time."""
    run.log("compiling ...")
    started = time.perf_counter()
    with use_mesh(run.mesh):
        compiled_step = step_fn.lower(state, *args, **options).compile()
    seconds = time.perf_counter() - started
    memory = compiled_step.memory_analysis()
    check_compiled_memory(memory)
    temp_bytes = memory.temp_size_in_bytes if memory else None
    log_event(run.metrics_path, "compile", int(state.step), seconds=seconds, temporaries=temp_bytes)
    temp_size = format_bytes(temp_bytes) if temp_bytes is not None else "unknown"
    run.log(f"compiled  in {seconds:.1f} s; {temp_size} of temporary buffers per step")
    return compiled_step


def prefetch_to_device(
    items: Iterable[Any],
    make: Callable[[Any], Any],
    size: int = 2,
    waiting: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Generator[Any, None, None]:
    """Yields `map(make, items)`, computed by a thread up to `size` results ahead.

    An error is raised in place of its result. Only the thread reads `items`. Usually
    `make` transfers a batch to the devices. The consumer waits inside `waiting()`, and
    closes the generator to end the thread.
    """
    source, end = iter(items), object()

    def next_result() -> Any:
        item = next(source, end)
        return item if item is end else make(item)

    with ThreadPoolExecutor(1, "prefetch") as thread:
        queue = deque(thread.submit(next_result) for _ in range(size))
        try:
            while queue:
                with waiting():
                    result = queue.popleft().result()
                if result is end:
                    return
                queue.append(thread.submit(next_result))
                yield result
        finally:  # the consumer may stop early
            thread.shutdown(wait=True, cancel_futures=True)
