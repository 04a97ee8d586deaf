"""The small run that campaigns disturb, and what has to be left of it in the end."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

import tomli_w

from gptjax.checkpoint.retention import list_steps
from gptjax.training.metrics import read_events
from tests.processes import TEXT
from tests.runs import config_with

ROOT = Path(__file__).resolve().parent.parent.parent
TABLE: dict[str, dict[str, Any]] = {
    "model": {"context_length": 16, "n_layers": 1, "n_heads": 2, "d_model": 8},
    "data": {"source": "text.txt", "tokenizer": "bytes", "batch_size": 4},
    "optim": {"warmup_steps": 2, "peak_lr": 1e-2},
    "train": {
        **{"steps": 60, "log_every": 1, "eval_every": 10},
        **{"eval_batches": 2, "sample_prompt": ""},
    },
    "checkpoint": {"every": 3},
}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "true",  # children start faster
    "PYTHONPATH": str(ROOT),
}
KINDS = ("train", "eval", "sample")
VARYING = ("tokens_per_s", "input_wait", "mfu")


def write_config(folder: Path, **changes: Any) -> None:
    """Makes the folder one in which the run can be started; section__option=value."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(TEXT)
    table = dataclasses.asdict(config_with(TABLE, **changes))
    (folder / "config.toml").write_text(tomli_w.dumps(table))


def environment(folder: Path) -> dict[str, str]:
    """Of the processes; what they keep for later is in the folder."""
    return {**os.environ, **ENVIRONMENT, "GPTJAX_HOME": str(folder / "home")}


def numbers(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """What each step computed, by kind of event and step, but for its speed."""
    return {
        (event["event"], event["step"]): {
            name: value for name, value in event.items() if name not in VARYING
        }
        for event in read_events(run / "metrics.jsonl")
        if event["event"] in KINDS
    }


def parameters(run: Path) -> str:
    """A hash of the parameters of the finished model."""
    content = (run / "model" / "model.safetensors").read_bytes()
    return hashlib.sha256(content).hexdigest()


def newest(run: Path) -> int:
    """The newest step that has a checkpoint; 0 where there is none."""
    return max(list_steps(run / "checkpoints"), default=0)


def strayed(run: Path, whole: Path) -> str:
    """The first number so far that is not that of the undisturbed run, or nothing."""
    expected = numbers(whole)
    for place, found in numbers(run).items():
        if found != expected.get(place):
            return f"{place}: {found}, not {expected.get(place)}"
    return ""


def different(run: Path, whole: Path) -> str:
    """What of a finished run is not as in the undisturbed one, or nothing."""
    if fault := strayed(run, whole):
        return fault
    if missing := sorted(set(numbers(whole)) - set(numbers(run))):
        return f"never written: {missing[:3]}"
    return "" if parameters(run) == parameters(whole) else "other parameters"
