"""What a run is given: its config and folder, its task, and the user's wishes."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.config import RunConfig
from gptjax.spikes import Policy
from gptjax.train import TrainState
from gptjax.weights.folder import Model

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Run:
    """What the parts of one run share; nothing in it changes."""

    config: RunConfig
    folder: Path
    say: Say
    mesh: Mesh | None = None  # of the devices; None: there is one
    saved: Path | None = None  # the folder of its checkpoints, where it is another
    on_spike: Policy = "log"

    @property
    def checkpoints(self) -> Path:
        """Where states are saved."""
        return (self.saved or self.folder) / "checkpoints"

    @property
    def metrics(self) -> Path:
        """Where events go."""
        return self.folder / "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What a user asks of a run besides its config."""

    allow_change: tuple[str, ...] = ()  # options that may differ from those before
    on_spike: str = ""  # one of `gptjax.spikes.POLICIES`; "" = as before, or log


NO_WISHES = Wishes()


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
