"""Roll back after a loss spike and skip its batches."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax

from gptjax.checkpoint.manifest import delete_after
from gptjax.errors import ConfigError
from gptjax.training import anomalies
from gptjax.training.metrics import read_events
from gptjax.training.run_dir import ON_SPIKE
from gptjax.training.task import RunContext, Task


def remaining_batches(run: RunContext, task: Task, first: int) -> Iterator[Any]:
    """Batches of the remaining steps, without those skipped by rollbacks."""
    spans = anomalies.batch_ranges(jumps_of(run), first, run.config.train.steps)
    return itertools.chain.from_iterable(itertools.starmap(task.batches, spans))


def jumps_of(run: RunContext) -> list[anomalies.Jump]:
    """Rollbacks of the run so far."""
    events = read_events(run.metrics_path)
    return [
        anomalies.Jump(event["step"], event["batches"])
        for event in events
        if event["event"] == "rollback"
    ]


def go_back(run: RunContext, spike: anomalies.Spike) -> list[anomalies.Jump]:
    """Forgets what came after the last regular checkpoint before a spike.

    Returns:
        All jumps of the run, the new one included, which are to be written down.

    Raises:
        ConfigError: it has gone back to there too often.
    """
    known = jumps_of(run)
    jump = anomalies.jump_after(spike, run.config.checkpoint.every)
    if [one.step for one in known].count(jump.step) >= anomalies.MAX_ROLLBACKS:
        raise ConfigError(
            f"after step {jump.step} a spike came {anomalies.MAX_ROLLBACKS + 1} times, the "
            f"last one in step {spike.step}, each with other batches: it is not the "
            "data. Lower optim.peak_lr with --allow-change optim.peak_lr, or go on "
            f"with --on-spike log --allow-change {ON_SPIKE}."
        )
    if jax.process_index() == 0:
        delete_after(run.checkpoint_dir, jump.step)
    run.log(
        f"rollback to step {jump.step}; {jump.batches} batches are left out from there"
    )
    return [*known, jump]
