"""One small run, as several processes of this machine; none outlives its test."""

import contextlib
import dataclasses
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from gptjax.config import load_config
from gptjax.tasks.train import train as train_run
from gptjax.training.metrics import read_events
from tests.runs import config_with

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 240  # seconds that anything may take on a machine with other work
TEXT = "".join(f"{n} times {n} is {n * n}.\n" for n in range(300))
SHAPE = {"context_length": 32, "n_layers": 1, "n_heads": 4, "d_model": 16, "vocab_multiple": 8}
TABLE: dict[str, dict[str, Any]] = {
    "model": {**SHAPE, "dropout": 0.1},
    "data": {"source": "text.txt", "tokenizer": "bytes", "batch_size": 16},
    "optim": {"warmup_steps": 2, "peak_lr": 1e-2},
    "train": {
        **{"steps": 20, "accumulate": 2, "log_every": 1, "eval_every": 20},
        **{"eval_batches": 1, "sample_prompt": ""},
    },
    "checkpoint": {"every": 8},
}
# What a process runs instead of `gptjax train`.
OTHER_CODE = """
import sys
from gptjax.cli import main
from gptjax.parallel import distributed
distributed.source_hash = lambda: "of another version"
sys.exit(main.main(sys.argv[1:]))
"""
IMPATIENT = """
import sys
from gptjax.parallel import distributed
distributed.INIT_TIMEOUT_SECONDS = 2
distributed.initialize(sys.argv[1])
"""
# Gloo writes to stdout in pieces. Those of two threads can run together, and then the
# number or the end of one has a line of its own. Grain warns of old versions of jaxlib.
NOISE = re.compile(r"\[Gloo\]|connected peer ranks|^\s*\d*\s*$|WARNING:absl:Grain")


class Process(NamedTuple):
    """One of the processes, and where it writes what it says."""

    popen: subprocess.Popen
    output: Path
    complaint: Path

    def said(self) -> str:
        return read_without_noise(self.output)

    def complained(self) -> str:
        return read_without_noise(self.complaint)


def read_without_noise(path: Path) -> str:
    lines = path.read_text().splitlines(keepends=True)
    return "".join(line for line in lines if not NOISE.search(line))


def addresses(count: int) -> list[str]:
    """Addresses for `--distributed`; "" for a single process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return [f"127.0.0.1:{port},{count},{n}" if count > 1 else "" for n in range(count)]


def train(count: int, *arguments: str) -> list[list[str]]:
    """The command of each of `count` processes that train together."""
    gptjax = [sys.executable, "-m", "gptjax", "train", *arguments]
    return [[*gptjax, *(["--distributed", x] if x else [])] for x in addresses(count)]


@contextlib.contextmanager
def started(
    commands: Sequence[Sequence[str]], folders: Sequence[Path], devices: int = 1, **variables: str
) -> Iterator[list[Process]]:
    """Processes that run the commands, each in its folder; killed in the end."""
    processes: list[Process] = []
    with contextlib.ExitStack() as stack:
        for number, (command, folder) in enumerate(zip(commands, folders, strict=True)):
            scratch = folder / f"scratch{number}"
            scratch.mkdir(exist_ok=True)
            variables |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
            variables |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)}
            paths = [folder / f"process{number}.{kind}" for kind in ("out", "err")]
            out, err = (stack.enter_context(path.open("w")) for path in paths)
            options: Any = {"cwd": folder, "env": {**os.environ, **variables}}
            popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, **options
            )
            stack.callback(popen.wait)
            stack.callback(popen.kill)
            processes.append(Process(popen, *paths))
        yield processes


def cache_options(folder: Path) -> dict[str, str]:
    """Environment of processes that share compiled programs, and so start faster."""
    return {"JAX_ENABLE_COMPILATION_CACHE": "true", "GPTJAX_HOME": str(folder / "home")}


def exit_codes(processes: Sequence[Process]) -> list[int]:
    return [process.popen.wait(LIMIT) for process in processes]


def until(true: Callable[[], bool], processes: Sequence[Process] = ()) -> None:
    """Waits until it is true while all of the processes run."""
    end = time.monotonic() + (LIMIT if processes else 30)
    while not true():
        ended = [one for one in processes if one.popen.poll() is not None]
        if ended or time.monotonic() > end:
            said = "\n".join(one.said() + one.complained() for one in ended)
            raise TimeoutError(f"it never came: {said or 'all are running'}")
        time.sleep(0.01)


def write_config(folder: Path, **changes: Any) -> Path:
    """The folder with text.txt and config.toml; changes are section__option=value."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(TEXT)
    table = dataclasses.asdict(config_with(TABLE, **changes))
    (folder / "config.toml").write_text(tomli_w.dumps(table))
    return folder


def run_here(folder: Path) -> None:
    with contextlib.chdir(folder):
        train_run(load_config("config.toml"), folder / "run")


def losses(run: Path) -> list[tuple[int, float]]:
    events = read_events(run / "metrics.jsonl")
    return [(e["step"], e["loss"]) for e in events if e["event"] in ("train", "eval")]


def last_step(run: Path) -> int:
    return max((step for step, _ in losses(run)), default=0)
