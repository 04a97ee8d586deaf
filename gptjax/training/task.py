"""Run context, task interface and resume options."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.config import RunConfig
from gptjax.training.anomalies import SpikePolicy
from gptjax.training.train_step import TrainState
from gptjax.weights.model_folder import Model

LogFn = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class RunContext:
    """Run context shared by all parts of a run."""

    config: RunConfig
    run_dir: Path
    log: LogFn
    mesh: Mesh | None = None  # None for a single device
    shared_run_dir: Path | None = (
        None  # run folder with the checkpoints, if not `run_dir`
    )
    on_spike: SpikePolicy = "log"

    @property
    def checkpoint_dir(self) -> Path:
        """Folder of the checkpoints."""
        return (self.shared_run_dir or self.run_dir) / "checkpoints"

    @property
    def metrics_path(self) -> Path:
        """Path of metrics.jsonl."""
        return self.run_dir / "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class ResumeOptions:
    """Options of starting or resuming a run that are not part of its config."""

    allow_change: tuple[str, ...] = ()  # config options that may change on resume
    on_spike: str = ""  # one of SPIKE_POLICIES; "" = the saved policy, or "log"


DEFAULT_RESUME_OPTIONS = ResumeOptions()


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of training."""

    init_state: TrainState  # before the first step
    train_step: Callable[
        ..., Any
    ]  # (state, batch, *frozen_params) -> (state, metrics), pure
    batches: Callable[[int, int], Iterator[Any]]  # of steps [start, stop)
    tokens_per_step: int | float
    # (state, finished steps, is_last) -> text for the progress line
    evaluate: Callable[[TrainState, int, bool], str]
    to_model: Callable[[TrainState], Model]
    provenance: dict[
        str, Any
    ]  # for meta.json: hashes of data, tokenizer, initial weights
    summary: list[str]  # lines printed before training
    sample: Callable[[TrainState, int], None] | None = None
    frozen_params: tuple[Any, ...] = ()
    eval_offset: int = 0  # first step evaluated; then every `train.eval_every` steps


def describe_devices(run: RunContext) -> str:
    """Summary line: devices and mesh."""
    text = f"device   {jax.device_count()} x {jax.devices()[0].device_kind}"
    if jax.process_count() > 1:
        text += f" of {jax.process_count()} processes"
    if run.mesh is not None:
        sizes = " x ".join(f"{axis} {n}" for axis, n in run.mesh.shape.items() if n > 1)
        text += f", as {sizes}"
    return text


def describe_length(steps: int, epochs: float) -> str:
    """Summary line: number of steps and epochs."""
    return f"steps    {steps:,} = {epochs:.3g} epochs"
