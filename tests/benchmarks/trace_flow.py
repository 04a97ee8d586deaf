"""Lists the modules through which a batch and a config pass in a training run.

    python tests/benchmarks/trace_flow.py

Trains `configs/tiny.toml` for two steps in a profiler. A module is on the path of a
batch if one of its functions holds the batch, or the token ids it is made of, in an
argument, a local variable or a result, from the token files to the call of the model.
A module is on the path of the config if a function holds the `RunConfig`, from the
command line to the first compiled step. Constructors that read their own section of the
config, and modules that hold the run but not its config, are not counted.
"""

import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from gptjax.cli.main import main as gptjax_main
from gptjax.config import RunConfig

ARGUMENTS = (
    "train tiny --train.steps 2 --train.eval_every 2 --train.log_every 1 --optim.warmup_steps 1"
)
OUTSIDE = ("gptjax.evaluation", "gptjax.inference", "gptjax.planning")


def module_of(frame: FrameType) -> str:
    """Name of a frame's module, "" if it is not one of gptjax."""
    name = frame.f_globals.get("__name__", "")
    return name if name.startswith("gptjax.") else ""


def is_batch(value: Any) -> bool:
    """True for a batch of token ids, on the host, on a device or traced."""
    return isinstance(value, Mapping) and hasattr(value.get("tokens"), "shape")


def is_inside(frame: FrameType | None, modules: tuple[str, ...]) -> bool:
    """True if a caller of the frame is in one of the modules."""
    while frame is not None:
        if module_of(frame).startswith(modules):
            return True
        frame = frame.f_back
    return False


def trace(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Modules of the batch and of the config, in the order in which they hold it."""
    batch: dict[str, None] = {}
    config: dict[str, None] = {}
    is_training, compiled = threading.Event(), threading.Event()

    def on_event(frame: FrameType, event: str, result: Any) -> None:
        name = module_of(frame)
        if not name or event not in ("call", "return"):
            return
        if name.endswith("trainer") and frame.f_code.co_name == "jit_by_shape":
            is_training.set()
        values = [*frame.f_locals.values(), result]
        if name.endswith("train_step") and any(map(is_batch, values)):
            compiled.set()
        if not compiled.is_set() and any(isinstance(v, RunConfig) for v in values):
            config.setdefault(name)
        if not is_training.is_set():
            return
        tokens = name.endswith("token_files") and isinstance(result, np.ndarray)
        if (tokens or any(map(is_batch, values))) and not is_inside(frame, OUTSIDE):
            batch.setdefault(name)
        if name == "gptjax.model.gpt" and not is_inside(frame, OUTSIDE):
            batch.setdefault(name)

    threading.setprofile(on_event)
    sys.setprofile(on_event)
    try:
        gptjax_main(arguments)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return list(batch), list(config)


def main() -> None:
    """Prints both paths."""
    with tempfile.TemporaryDirectory() as folder:
        paths = trace([*ARGUMENTS.split(), "--run", str(Path(folder) / "run")])
    for name, modules in zip(("batch", "config"), paths, strict=True):
        print(f"{name}: {len(modules)} modules")
        print("\n".join(f"  {module}" for module in modules))


if __name__ == "__main__":
    main()
