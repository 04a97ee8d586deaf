"""Child processes, forked from one that has imported all and computed nothing."""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import jax

from gptjax.config import load_config
from gptjax.runtime.compilation_cache import enable_cache
from gptjax.tasks.train import train

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def start(function: Callable[..., Any], *arguments: Any) -> tuple[ForkServerProcess, Connection]:
    """Starts a child; returns it, and a connection that receives what `call` sends."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=call, args=(sender, function, *arguments), daemon=True)
    process.start()
    sender.close()
    return process, receiver


def call(sender: Connection, function: Callable[..., Any], *arguments: Any) -> None:
    """Sends the result of the function, or the text of an error."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 1)
    try:
        sender.send(function(*arguments))
    except BaseException as error:
        sender.send(f"{type(error).__name__}: {error}")


def train_there(folder: Path, run_dir: Path) -> str:
    """Trains the run of the folder to its end."""
    os.chdir(folder)
    jax.config.update("jax_enable_compilation_cache", True)
    with enable_cache(folder / "compiled"):
        train(load_config("config.toml"), run_dir)
    return ""


def run_jobs(*jobs: tuple[Any, ...]) -> Any:
    """Runs (function, *arguments) in child processes, until the first has ended.

    Returns the result of the first, the text of its error, or None if it was killed.
    """
    children = [start(*job) for job in jobs]
    try:
        return children[0][1].recv()
    except EOFError:
        return None
    finally:
        for process, receiver in children:
            process.kill()
            process.join()
            receiver.close()
