"""The small run that campaigns disturb, child processes, and what has to be left."""

import contextlib
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import jax

from gptjax.checkpoint.retention import list_steps
from gptjax.config import load_config
from gptjax.runtime.compilation_cache import enable_cache
from gptjax.tasks.train import train
from gptjax.training.metrics import read_events

VARYING = {"time", "tokens_per_s", "input_wait", "mfu"}
# Children are forked from a process that has imported all and computed nothing.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def start(
    function: Callable[..., Any], *arguments: Any, devices: int = 1
) -> tuple[ForkServerProcess, Connection]:
    """Starts a child; returns it, and what receives its result or error."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    child_arguments = (sender, devices, function, *arguments)
    process = CONTEXT.Process(target=call, args=child_arguments, daemon=True)
    process.start()
    sender.close()
    return process, receiver


def call(sender: Connection, devices: int, function: Callable[..., Any], *arguments: Any) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    try:
        sender.send(function(*arguments))
    except BaseException as error:
        sender.send(f"{type(error).__name__}: {error}")


def run_jobs(*jobs: tuple[Any, ...], devices: int = 1) -> Any:
    """Result or error of the first (function, *arguments); None if it was killed."""
    children = [start(*job, devices=devices) for job in jobs]
    try:
        return children[0][1].recv()
    except EOFError:
        return None
    finally:
        for process, receiver in children:
            process.kill()
            process.join()
            receiver.close()


def train_there(folder: Path, run_dir: Path) -> str:
    jax.config.update("jax_enable_compilation_cache", True)
    with contextlib.chdir(folder), enable_cache(folder / "compiled"):
        train(load_config("config.toml"), run_dir)
    return ""


def numbers(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    return {
        (event["event"], event["step"]): {name: event[name] for name in event.keys() - VARYING}
        for event in read_events(run / "metrics.jsonl")
        if event["event"] in ("train", "eval", "sample")
    }


def newest(run: Path) -> int:
    return max(list_steps(run / "checkpoints"), default=0)


def strayed(run: Path, whole: Path) -> str:
    """The first number so far that is not that of the undisturbed run, or ""."""
    expected = numbers(whole)
    for place, found in numbers(run).items():
        if found != expected.get(place):
            return f"{place}: {found}, not {expected.get(place)}"
    return ""


def different(run: Path, whole: Path) -> str:
    """First difference of a finished run from the undisturbed one, or ""."""
    if missing := sorted(set(numbers(whole)) - set(numbers(run))):
        return f"never written: {missing[:3]}"
    weights = [path / "model" / "model.safetensors" for path in (run, whole)]
    is_same = weights[0].read_bytes() == weights[1].read_bytes()
    return strayed(run, whole) or ("" if is_same else "other parameters")
