"""The steps of a run: compiled by shape, and what is written of them, one step late."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gptjax import budget, report, spikes
from gptjax.distributed import stop_together
from gptjax.errors import ConfigError
from gptjax.machine_faults import check_compiled
from gptjax.run_task import Run, Task
from gptjax.sharding import on
from gptjax.stopping import answer, show_life
from gptjax.stopwatch import Stopwatch
from gptjax.train import Metrics, TrainState, TrainStep


class Journal:
    """Reads the metrics of steps when they are there, writes and watches them.

    Metrics are read one step late, so that the device is not kept waiting.
    """

    def __init__(self, run: Run, task: Task, done: int) -> None:
        """After `done` steps, of which metrics.jsonl may tell."""
        c = run.config
        self.run, self.tokens, self.watch = run, task.tokens_per_step, Stopwatch()
        self.done = self.logged = self.good = done
        self.pending: tuple[int, Metrics, float] | None = None
        self.updated: list[Any] = []  # of the steps since, on the device
        self.left_out = 0  # steps in a row without an update
        self.back: spikes.Spike | None = None  # for which the run is to go back
        self.seen = spikes.seen_in(report.read_events(run.metrics), c.train.log_every)
        self.validation = "val -"

    def add(self, metrics: Metrics, lr: float, wanted: bool) -> None:
        """One more step is under way; what it computed is wanted, or not."""
        self.done += 1
        self.updated.append(metrics.updated)
        if wanted:
            self.pending = self.done, metrics, lr

    def read(self) -> report.Event | None:
        """Writes what is pending, and returns it; notes if the run is to go back.

        Raises:
            ConfigError: too many steps in a row have changed nothing.
        """
        if self.pending is None:
            return None
        (at, metrics, lr), self.pending = self.pending, None
        jax.block_until_ready(metrics)  # steps are dispatched long before they end
        seconds, waited = self.watch.lap()
        count, self.logged = at - self.logged, at
        show_life(seconds / count)
        rate = count * self.tokens / seconds
        event = train_event(self.run, at, metrics, lr, rate, waited / seconds)
        updated = jax.device_get(self.updated[:count])
        self.updated = self.updated[count:]
        for number, made in enumerate(updated, at - count + 1):
            self.left_out = 0 if made else self.left_out + 1
            self.good = number if made else self.good
            if self.left_out >= spikes.IN_A_ROW:
                raise ConfigError(self.no_update(number))
        if at % self.run.config.train.log_every == 0:
            self.seen.append(spikes.Seen(at, event["loss"], event["grad_norm"]))
            if spike := spikes.spike_at(self.seen):
                self.tell(spike)
        return event

    def no_update(self, step: int) -> str:
        """What to say of a run that does not change any more."""
        why = "neither loss nor gradient may be infinite or no number"
        if self.run.on_spike == "skip":
            why += ", and the gradient may not be above the limit of --on-spike skip"
        return (
            f"{self.left_out} steps in a row, up to step {step}, have changed nothing: "
            f"{why}. The last good step is {self.good}. Lower optim.peak_lr, raise "
            "optim.warmup_steps or set optim.grad_clip, with --allow-change for each "
            "to go on from the last checkpoint, or with another --run to start anew."
        )

    def tell(self, spike: spikes.Spike) -> None:
        """Says and writes that there is a spike."""
        facts = {"name": spike.name, "value": spike.value, "limit": spike.limit}
        report.write_event(self.run.metrics, "spike", spike.step, **facts)
        self.run.say(
            f"spike    in step {spike.step}: {spike.name} {spike.value:.4g}, where "
            f"{spike.limit:.4g} would be much"
        )
        if self.run.on_spike == "rollback":
            self.back = spike

    def line(self, event: report.Event) -> str:
        """The line that people read of a logged step."""
        steps = self.run.config.train.steps
        left = (steps - event["step"]) * self.tokens / event["tokens_per_s"]
        return report.progress(steps, event, self.validation, left)

    def norm_limit(self) -> float:
        """Above what norm of the gradient the next step is to change nothing."""
        return spikes.norm_limit(self.seen, self.done + 1)


def compiled_by_shape(
    run: Run, task: Task, limit: Callable[[], float], stopping: Callable[[], bool]
) -> TrainStep:
    """The step, compiled for each shape of batch, so that people see the wait.

    Args:
        run: its `on_spike` says whether the limit counts.
        task: of the run.
        limit: of the norm of the gradient of the next step.
        stopping: whether a signal came; asked when a program is ready, before its step.
    """
    options: dict[str, Any] = {"donate_argnums": 0}
    if run.mesh is not None:  # the next step finds the state as this one did
        same = jax.tree.map(lambda leaf: leaf.sharding, task.fresh)
        options["out_shardings"] = same, NamedSharding(run.mesh, PartitionSpec())
    step_fn: Any = jax.jit(task.step, **options)
    programs: dict[Any, Any] = {}
    skipping = run.on_spike == "skip"

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        last = {"limit": np.float32(limit())} if skipping else {}
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in programs:
            show_life(slow=True)
            programs[shapes] = compiled(run, step_fn, state, batch, task.fixed, last)
            stop_together(stopping())
        if jax.process_count() == 1:
            answer("ask")  # from here on there is something to save
        return programs[shapes](state, batch, *task.fixed, **last)

    return step


def compiled(
    run: Run, step_fn: Any, state: TrainState, batch: Any, fixed: Any, last: Any
) -> Any:
    """The program of a step for batches of that shape; says how long that took.

    Raises:
        ConfigError: the machine has not the memory for it.
    """
    run.say("compiling ...")
    started = time.perf_counter()
    with on(run.mesh):
        program = step_fn.lower(state, batch, *fixed, **last).compile()
    seconds = time.perf_counter() - started
    memory = program.memory_analysis()
    check_compiled(run, memory)
    size = memory.temp_size_in_bytes if memory else None
    numbers = {"seconds": seconds, "temporaries": size}
    report.write_event(run.metrics, "compile", int(state.step), **numbers)
    held = budget.human(size) if size is not None else "unknown"
    run.say(f"compiled  in {seconds:.1f} s; a step needs {held} of temporaries")
    return program


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
    values: report.Event = {
        "loss": float(metrics.loss),
        "lr": lr,
        "grad_norm": float(metrics.grad_norm),
        "tokens_per_s": rate,
        "input_wait": waited,
    }
    if peak := budget.peak_flops():
        values["mfu"] = rate * budget.flops_per_token(run.config.model) / peak
    if not metrics.updated:
        finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        values["skipped"] = "spike" if finite else "not finite"
    report.write_event(run.metrics, "train", done, **values)
    return {"step": done, **values}
