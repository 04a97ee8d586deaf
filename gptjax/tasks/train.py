"""Training of any task, as `train.task` says."""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import jax

from gptjax.config import RunConfig
from gptjax.data.prepare import tokenizer_id
from gptjax.data.splits import split_shares
from gptjax.errors import check_type
from gptjax.fileio.paths import user_path
from gptjax.plugins import load_plugin
from gptjax.tasks.builder import TaskStages
from gptjax.tasks.classify import CLASSIFY
from gptjax.tasks.dpo import DPO
from gptjax.tasks.pretrain import PRETRAIN
from gptjax.tasks.sft import SFT
from gptjax.tracking.process import track_run
from gptjax.tracking.trackers import check_installed
from gptjax.training.expected_results import record_changes
from gptjax.training.optimizer import make_schedule
from gptjax.training.run_dir import open_run
from gptjax.training.task import RunContext
from gptjax.training.trainer import fit
from gptjax.weights.model_folder import Model

StagesFn = Callable[[RunConfig], TaskStages]  # implementation of a plugin's task

TASKS = {"pretrain": PRETRAIN, "classify": CLASSIFY, "sft": SFT, "dpo": DPO}


def train(
    config: RunConfig, run_dir: str | Path, *, allow_change: Sequence[str] = (), on_spike: str = ""
) -> Model:
    """Trains a run and returns its model; resumes if the run exists.

    Progress is logged to the logger "gptjax" at level INFO. SIGINT, SIGTERM and
    SIGHUP raise `Interrupted`; the same call resumes.

    An existing run must have the same config, but for the options `allow_change`.
    `on_spike` is "log", "skip", or "" for that of an existing run, else "log".
    """
    check_type("config", config, RunConfig, 'Write load_config(find_config("tiny")).')
    check_type("allow_change", allow_change, list | tuple, 'Write ["train.steps"].')
    if config.train.task in TASKS:
        stages = TASKS[config.train.task]
    else:
        stages_fn: StagesFn = load_plugin("train.task", config.train.task)
        stages = stages_fn(config)
    check_options(config)
    config = record_changes(config)
    with (
        open_run(config, user_path(run_dir), allow_change=allow_change, on_spike=on_spike) as run,
        follow_with_tracker(run),
    ):
        run.log(f"reading  {config.data.source}")
        run, data = stages.load_data(run)
        task = stages.make_task(run, data)
        state = fit(run, task)
        return stages.finalize(run, data, task, state)


def follow_with_tracker(run: RunContext) -> AbstractContextManager[None]:
    """Sends the run to the tracker `track.to`, from the first process only."""
    if run.config.track.to == "none" or jax.process_index() > 0:
        return contextlib.nullcontext()
    return track_run(run.run_dir, run.config.track.to)


def check_options(config: RunConfig) -> None:
    """Rejects options that do not fit together or have no meaning, before any work."""
    if config.track.to != "none" and jax.process_index() == 0:
        check_installed(config.track.to)
    make_schedule(config.optim, config.train.steps)
    if config.train.task in ("classify", "sft", "dpo"):
        split_shares(config.data.val_fraction, config.data.test_fraction)
    if config.data.tokenizer:
        tokenizer_id(config.data.tokenizer)
