"""One small run, as several processes of this machine; none outlives its test."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import tomli_w

from gptjax.config import RunConfig, from_dict
from gptjax.parallel.sharding import MESH_AXES
from gptjax.tasks.train import train as train_run
from gptjax.tokenizer import tokenizer
from gptjax.training.metrics import read_events

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 240  # seconds that anything may take on a machine with other work

TEXT = "".join(f"{n} times {n} is {n * n}.\n" for n in range(300))
TABLE = {
    "model": {
        "context_length": 32,
        "n_layers": 1,
        "n_heads": 4,
        "d_model": 16,
        "dropout": 0.1,
        "vocab_multiple": 8,
    },
    "data": {"source": "text.txt", "tokenizer": "bytes", "batch_size": 16},
    "optim": {"warmup_steps": 2, "peak_lr": 1e-2},
    "train": {
        "steps": 20,
        "accumulate": 2,
        "log_every": 1,
        "eval_every": 20,
        "eval_batches": 1,
        "sample_prompt": "",
    },
    "checkpoint": {"every": 8},
}

# What a process runs instead of `gptjax train`.
BROKEN = """
import sys
from gptjax.cli import main
from gptjax.training import metrics
metrics.log_train_metrics = None
sys.exit(main.main(sys.argv[1:]))
"""
IMPATIENT = """
import sys
from gptjax.parallel import distributed
distributed.INIT_TIMEOUT_SECONDS = 2
distributed.initialize(sys.argv[1])
"""
AUTO = """
from gptjax.parallel import distributed
distributed.initialize("auto")
import jax
print(jax.process_index(), jax.process_count(), jax.device_count())
"""
OTHER_CODE = """
import sys
from gptjax.cli import main
from gptjax.parallel import distributed
distributed.source_hash = lambda: "of another version"
sys.exit(main.main(sys.argv[1:]))
"""

# Gloo writes "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected
# peer ranks is : 1" and the line's end in pieces. Those of two threads can run
# together, and then the number or the end of one has a line of its own.
GREETING = r"\[Gloo\]|connected peer ranks|^\s*\d*\s*$"


class Process(NamedTuple):
    """One of the processes, and where it writes what it says."""

    popen: subprocess.Popen
    output: Path
    complaint: Path

    def said(self) -> str:
        """What came on stdout, but for Gloo, which greets each connection there."""
        return without(GREETING, self.output)

    def complained(self) -> str:
        """What came on stderr, but for what old versions of jaxlib make Grain say."""
        return without("WARNING:absl:Grain", self.complaint)


def without(pattern: str, file: Path) -> str:
    """The lines of a file in which nothing matches the pattern."""
    lines = file.read_text().splitlines(keepends=True)
    return "".join(x for x in lines if not re.search(pattern, x))


def free_port() -> int:
    """A port of this machine that nobody has at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def train(count: int, *arguments: str) -> list[list[str]]:
    """The command of each of `count` processes that train together."""
    where = f"127.0.0.1:{free_port()},{count}"
    gptjax = [sys.executable, "-m", "gptjax", "train", *arguments]
    return [[*gptjax, "--distributed", f"{where},{n}"] for n in range(count)]


@contextlib.contextmanager
def started(
    commands: Sequence[Sequence[str]],
    folders: Sequence[Path],
    devices: int = 1,
    env: Mapping[str, str] = os.environ,
) -> Iterator[list[Process]]:
    """Processes that run the commands, each in its folder; killed in the end."""
    processes: list[Process] = []
    try:
        for number, (command, folder) in enumerate(zip(commands, folders, strict=True)):
            scratch = folder / f"scratch{number}"
            scratch.mkdir(exist_ok=True)
            environment = {
                **env,
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "PYTHONPATH": str(ROOT),
                "TMPDIR": str(scratch),
            }
            files = [folder / f"process{number}.{kind}" for kind in ("out", "err")]
            with files[0].open("w") as output, files[1].open("w") as complaint:
                popen = subprocess.Popen(
                    command,
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=complaint,
                    env=environment,
                )
            processes.append(Process(popen, *files))
        yield processes
    finally:
        for process in processes:
            process.popen.kill()
        for process in processes:
            process.popen.wait()


def exit_codes(processes: Sequence[Process]) -> list[int]:
    """How the processes ended, each by itself."""
    end = time.monotonic() + LIMIT
    return [one.popen.wait(max(end - time.monotonic(), 0)) for one in processes]


def until(true: Callable[[], bool], processes: Sequence[Process] = ()) -> None:
    """Waits until it is true while all of the processes run."""
    end = time.monotonic() + (LIMIT if processes else 30)
    while not true():
        ended = [one for one in processes if one.popen.poll() is not None]
        if ended or time.monotonic() > end:
            said = "\n".join(one.said() + one.complained() for one in ended)
            raise TimeoutError(f"it never came: {said or 'all are running'}")
        time.sleep(0.01)


def mesh_flags(*sizes: int) -> list[str]:
    """The options that make a mesh of those sizes."""
    axes = zip(MESH_AXES, sizes, strict=True)
    return [word for axis, n in axes for word in (f"--mesh.{axis}", str(n))]


def write_config(folder: Path) -> Path:
    """The folder with text.txt and config.toml, which can be run there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(TEXT)
    (folder / "config.toml").write_text(tomli_w.dumps(TABLE))
    return folder


def write_tokenizer(folder: Path, text: str) -> None:
    """Makes tokenizer/, of one size for any text."""
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    tokenizer.train_tokenizer([text], 280).save(folder / "tokenizer")


def run_here(folder: Path) -> None:
    """Runs on one device of pytest's own process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_run(from_dict(RunConfig, TABLE), folder / "run")


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of all training steps and evaluations."""
    events = read_events(run / "metrics.jsonl")
    return [(e["step"], e["loss"]) for e in events if e["event"] in ("train", "eval")]


def last_step(run: Path) -> int:
    """How far a run has come."""
    return max((step for step, _ in losses(run)), default=0)


def commands_of_pair() -> list[list[str]]:
    """Two processes with four devices each."""
    return train(2, "config.toml", "--run", "run", *mesh_flags(2, 2, 2))


def other_config(command: list[str], folder: Path) -> None:
    command += ["--optim.peak_lr", "0.5"]


def other_code(command: list[str], folder: Path) -> None:
    command[1:3] = ["-c", OTHER_CODE]


def other_data(command: list[str], folder: Path) -> None:
    (folder / "text.txt").write_text(TEXT.replace("7", "8"))


def other_tokenizer(command: list[str], folder: Path) -> None:
    write_tokenizer(folder, TEXT.replace("times", "mal"))


# Differences between two processes, applied to one of them.
OTHER = {
    "config": other_config,
    "code": other_code,
    "data": other_data,
    "tokenizer": other_tokenizer,
}
