"""Training steps: compilation by batch shape and metrics logging."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gptjax import budget, report, spikes
from gptjax.distributed import stop_if_any
from gptjax.errors import ConfigError
from gptjax.machine_faults import check_compiled_memory
from gptjax.run_task import RunContext, Task
from gptjax.sharding import use_mesh
from gptjax.stopping import set_signal_mode, heartbeat
from gptjax.stopwatch import StepTimer
from gptjax.train import Metrics, TrainState, TrainStep


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
        self.rollback_spike: spikes.Spike | None = (
            None  # spike that requires a rollback
        )
        self.history = spikes.logged_steps(
            report.read_events(run.metrics_path), config.train.log_every
        )
        self.validation = "val -"

    def log_step(self, metrics: Metrics, lr: float, should_log: bool) -> None:
        """Records a dispatched step; its metrics are read later if wanted."""
        self.step += 1
        self.updated.append(metrics.applied)
        if should_log:
            self.pending = self.step, metrics, lr

    def flush_step(self) -> report.Event | None:
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
            if self.consecutive_skips >= spikes.MAX_CONSECUTIVE_SKIPS:
                raise ConfigError(self.skip_limit_message(applied_step))
        if step % self.run.config.train.log_every == 0:
            self.history.append(
                spikes.LoggedStep(step, event["loss"], event["grad_norm"])
            )
            if spike := spikes.detect_spike(self.history):
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

    def report_spike(self, spike: spikes.Spike) -> None:
        """Prints a spike and writes it to metrics.jsonl."""
        values = {"name": spike.name, "value": spike.value, "limit": spike.threshold}
        report.log_event(self.run.metrics_path, "spike", spike.step, **values)
        self.run.log(
            f"spike    step {spike.step}: {spike.name} {spike.value:.4g} exceeds the "
            f"spike threshold {spike.threshold:.4g}"
        )
        if self.run.on_spike == "rollback":
            self.rollback_spike = spike

    def format_line(self, event: report.Event) -> str:
        """Progress line of a logged step."""
        steps = self.run.config.train.steps
        seconds_left = (
            (steps - event["step"]) * self.tokens_per_step / event["tokens_per_s"]
        )
        return report.format_progress(steps, event, self.validation, seconds_left)

    def grad_norm_threshold(self) -> float:
        """Gradient norm above which the next step is skipped."""
        return spikes.grad_norm_threshold(self.history, self.step + 1)


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
    report.log_event(run.metrics_path, "compile", int(state.step), **numbers)
    temp_size = budget.format_bytes(temp_bytes) if temp_bytes is not None else "unknown"
    run.log(f"compiled  in {seconds:.1f} s; {temp_size} of temporary buffers per step")
    return compiled_step


def log_train_metrics(
    run: RunContext,
    step: int,
    metrics: Metrics,
    lr: float,
    tokens_per_second: float,
    input_wait: float,
) -> report.Event:
    """Logs the metrics of a step as a "train" event.

    Args:
        run: the run.
        step: finished steps.
        metrics: of the last finished step.
        lr: learning rate of that step.
        tokens_per_second: tokens per second since the previous event.
        input_wait: fraction of that time spent waiting for the next batch.
    """
    values: report.Event = {
        "loss": float(metrics.loss),
        "lr": lr,
        "grad_norm": float(metrics.grad_norm),
        "tokens_per_s": tokens_per_second,
        "input_wait": input_wait,
    }
    if peak := budget.total_peak_flops():
        values["mfu"] = (
            tokens_per_second * budget.flops_per_token(run.config.model) / peak
        )
    if not metrics.applied:
        finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        values["skipped"] = "spike" if finite else "not finite"
    report.log_event(run.metrics_path, "train", step, **values)
    return {"step": step, **values}
