"""Training of any task, as `train.task` says."""

from collections.abc import Sequence
from pathlib import Path

from gptjax.config import RunConfig
from gptjax.errors import ConfigError
from gptjax.tasks.builder import TaskStages
from gptjax.tasks.classify import CLASSIFY
from gptjax.tasks.dpo import DPO
from gptjax.tasks.pretrain import PRETRAIN
from gptjax.tasks.sft import SFT
from gptjax.training.run_dir import open_run
from gptjax.training.trainer import fit
from gptjax.weights.model_folder import Model

TASKS = {"pretrain": PRETRAIN, "classify": CLASSIFY, "sft": SFT, "dpo": DPO}


def train(
    config: RunConfig, run_dir: str | Path, *, allow_change: Sequence[str] = (), on_spike: str = ""
) -> Model:
    """Trains a run and returns its model; resumes if the run exists.

    Progress is logged to the logger "gptjax" at level INFO.

    Args:
        config: must match that of an existing run.
        run_dir: run folder; created if missing.
        allow_change: config options that may differ from those of an existing run.
        on_spike: "log" or "skip"; "" = that of an existing run, or "log".

    Raises:
        GptjaxError: invalid data, config or run folder, or a resource error.
        Interrupted: interrupted by SIGINT or SIGTERM; the same call resumes.
    """
    if config.train.task not in TASKS:
        raise ConfigError(
            f"train.task={config.train.task!r} is trained by gptjax.book.train_book. "
            f"Call it, or choose one of {', '.join(TASKS)}."
        )
    return run_stages(
        TASKS[config.train.task],
        config,
        Path(run_dir),
        allow_change=allow_change,
        on_spike=on_spike,
    )


def run_stages(
    stages: TaskStages,
    config: RunConfig,
    run_dir: Path,
    *,
    allow_change: Sequence[str] = (),
    on_spike: str = "",
) -> Model:
    """Runs the stages of a task in an open run; otherwise as `train`."""
    with open_run(config, run_dir, allow_change=allow_change, on_spike=on_spike) as run:
        run, data = stages.load_data(run)
        task = stages.make_task(run, data)
        state = fit(run, task)
        return stages.finalize(run, data, task, state)
