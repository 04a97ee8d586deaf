"""Task: the trainer's only interface, and the context of a run."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from gptjax.config import RunConfig
from gptjax.runtime.terminal import logger
from gptjax.training.anomalies import SpikePolicy
from gptjax.training.train_step import TrainState
from gptjax.tree import Params
from gptjax.weights.model_folder import Model


@dataclasses.dataclass(frozen=True)
class RunContext:
    """Context shared by all parts of a run; opened by `open_run`."""

    config: RunConfig
    run_dir: Path  # of this process
    mesh: Mesh | None = None  # None for a single device
    shared_run_dir: Path | None = None  # has the checkpoints, if not `run_dir`
    on_spike: SpikePolicy = "log"
    allow_change: tuple[str, ...] = ()  # config options that may change on resume
    is_interrupted: Callable[[], bool] = lambda: False  # True after a signal

    @property
    def checkpoint_dir(self) -> Path:
        """Folder of the checkpoints."""
        return (self.shared_run_dir or self.run_dir) / "checkpoints"

    @property
    def metrics_path(self) -> Path:
        """Path of metrics.jsonl."""
        return self.run_dir / "metrics.jsonl"

    def log(self, text: str) -> None:
        """Logs progress to the logger "gptjax", from the first process only."""
        if jax.process_index() == 0:
            logger.info(text)


class EvalResult(NamedTuple):
    """Evaluation of one step; the trainer logs it and keeps the best model."""

    events: list[tuple[str, dict[str, Any]]]  # kind and values, for metrics.jsonl
    text: str  # for the progress line, such as "val 3.2012"
    score: tuple[float, ...] | None = None  # the highest is the best
    log_lines: tuple[str, ...] = ()  # printed before the progress line


@dataclasses.dataclass(frozen=True)
class Task:
    """One kind of training."""

    init_state: TrainState  # before the first step
    train_step: Callable[..., Any]  # (state, batch, *frozen_params), pure
    batches: Callable[[int, int], Iterator[Any]]  # of steps [start, stop)
    evaluate: Callable[[TrainState, int, bool], EvalResult]  # (state, step, is_last)
    to_model: Callable[[TrainState], Model]
    tokens_per_step: int | float  # mean
    provenance: dict[str, Any]  # hashes of data, tokenizer and initial weights
    summary: list[str]  # printed before training
    frozen_params: tuple[Params, ...] = ()
    # Completion to log after an evaluation, or None: (state, step) -> text
    sample: Callable[[TrainState, int], str | None] | None = None
    save_best: Callable[[TrainState], None] | None = None  # writes model/
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
