"""After a spike: a run forgets its last steps, and leaves their batches out."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax

from gptjax import report, spikes
from gptjax.changes import ON_SPIKE
from gptjax.errors import ConfigError
from gptjax.run_task import Run, Task
from gptjax.step_folders import forget_after


def batches(run: Run, task: Task, first: int) -> Iterator[Any]:
    """Those of the steps that are left; some are left out where the run went back."""
    spans = spikes.spans(jumps_of(run), first, run.config.train.steps)
    return itertools.chain.from_iterable(itertools.starmap(task.batches, spans))


def jumps_of(run: Run) -> list[spikes.Jump]:
    """Where the run went back to, and how many batches it left out there."""
    events = report.read_events(run.metrics)
    return [
        spikes.Jump(event["step"], event["batches"])
        for event in events
        if event["event"] == "rollback"
    ]


def go_back(run: Run, spike: spikes.Spike) -> list[spikes.Jump]:
    """Forgets what came after the last regular checkpoint before a spike.

    Returns:
        All jumps of the run, the new one included, which are to be written down.

    Raises:
        ConfigError: it has gone back to there too often.
    """
    known = jumps_of(run)
    jump = spikes.jump_after(spike, run.config.checkpoint.every)
    if [one.step for one in known].count(jump.step) >= spikes.ROLLBACKS:
        raise ConfigError(
            f"after step {jump.step} a spike came {spikes.ROLLBACKS + 1} times, the "
            f"last one in step {spike.step}, each with other batches: it is not the "
            "data. Lower optim.peak_lr with --allow-change optim.peak_lr, or go on "
            f"with --on-spike log --allow-change {ON_SPIKE}."
        )
    if jax.process_index() == 0:
        forget_after(run.checkpoints, jump.step)
    run.say(
        f"rollback to step {jump.step}; {jump.batches} batches are left out from there"
    )
    return [*known, jump]
