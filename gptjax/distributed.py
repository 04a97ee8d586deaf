"""Many processes as one run: they find each other, agree, and end together.

Process 0 alone writes into the run folder, but for the parts of a checkpoint, which
each process writes of its own devices. The others have a scratch folder for the rest.
"""

import atexit
import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.errors import ConfigError, GptjaxError, MachineError
from gptjax.stopping import NOTHING, Stopped

START_SECONDS = 300  # until all processes have to be there
LOST_SECONDS = 10  # without a sign of life from a process, the run ends
LOST = (
    "gptjax: another process of this run is lost, so this one has ended. Start all of "
    "them again with the same command: they go on from the last checkpoint."
)
AGREE = ("config", "code", "data", "tokenizer")


def start(where: str) -> None:
    """Connects this process with the others of its run.

    Args:
        where: "auto" where a scheduler says who the others are (Slurm, Open MPI, GKE, a
            TPU pod), else "HOST:PORT,N,I": of process 0, how many, which this one is.

    Raises:
        ConfigError: it is neither, or the others cannot be reached.
    """
    options: dict[str, Any] = {}
    if where != "auto":
        match = re.fullmatch(r"(.+:\d+),(\d+),(\d+)", where)
        if not match or int(match[3]) >= int(match[2]):
            raise ConfigError(
                f"--distributed {where} is neither auto nor HOST:PORT,N,I with I below "
                "N. Write, for the second of two processes, HOST:1234,2,1."
            )
        options = {
            "coordinator_address": match[1],
            "num_processes": int(match[2]),
            "process_id": int(match[3]),
        }
        if not options["process_id"]:
            check_port(where, int(match[1].rpartition(":")[2]))
    waiting = threading.Timer(START_SECONDS, nobody_came, [where])
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=START_SECONDS + 60,  # ends the process without words
            heartbeat_timeout_seconds=LOST_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--distributed {where}: the processes of this run cannot find each other "
            f"({str(error).splitlines()[0]}). Write HOST:PORT,N,I, where HOST is that "
            "of process 0."
        ) from error
    finally:
        waiting.cancel()


def check_port(where: str, port: int) -> None:
    """Whether the others can be awaited there; if not, JAX would crash.

    Raises:
        ConfigError: another program has the port, or it is no port.
    """
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"--distributed {where}: port {port} of this host cannot be used: "
                f"{error}. End the run that still has it, or give all processes "
                "another port."
            ) from error


def nobody_came(where: str) -> None:
    """Ends this process, whose main thread waits for the others inside of JAX."""
    print(
        f"gptjax: --distributed {where}: not all processes of this run were there "
        f"within {START_SECONDS} s. Start all of them, each with its own number; all "
        "need to reach HOST:PORT of process 0.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends this process at once after an error, and says when another one is lost.

    JAX ends it from inside, where no exception passes; so a shell waits at the other
    end of a pipe, and speaks if that closes without a word.
    """
    if jax.process_count() == 1:
        yield
        return
    command = ["sh", "-c", 'read -r word || echo "$0" >&2', LOST]
    waiting: Any = subprocess.Popen(
        command, stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    except BaseException as error:
        # The connection broke, or this process failed by itself, of which the others
        # hear this way: they are not to wait for what it will not send.
        lost = comes_from_xla(error) and "RESOURCE_EXHAUSTED" not in str(error)
        sys.stdout.flush()
        print(account(error), file=sys.stderr, flush=True)
        waiting.communicate(b"" if lost else b"done\n")
        if isinstance(error, GptjaxError):
            # All have found the same, and need what this one sent last, and to speak
            # before process 0 ends them.
            time.sleep(1 if jax.process_index() else 2)
        mistake = isinstance(error, GptjaxError) and not isinstance(error, MachineError)
        os._exit(2 if mistake else 1)
    finally:
        with contextlib.suppress(OSError):
            waiting.stdin.write(b"done\n")
            waiting.stdin.close()
        waiting.wait()


def account(error: BaseException) -> str:
    """What a person should read of an error."""
    if isinstance(error, GptjaxError):
        return f"gptjax: {error}"
    if comes_from_xla(error):
        return str(error)
    return "".join(traceback.format_exception(error)).rstrip()


def comes_from_xla(error: BaseException) -> bool:
    """Whether it is one of those that a broken connection ends in."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return True
    # jax 0.7 has no type of its own for it, but all start with the name of a status.
    return bool(re.match(r"[A-Z]+(_[A-Z]+)*: ", str(error)))


def own_folder(folder: Path) -> Path:
    """The run folder in process 0; in others one that is deleted when they end.

    It starts with what a resumed run reads.
    """
    if jax.process_index() == 0:
        return folder
    scratch = Path(tempfile.mkdtemp(prefix="gptjax-"))
    command = ["sh", "-c", 'read -r word; rm -rf "$0"', str(scratch)]
    keeper: Any = subprocess.Popen(
        command, stdin=subprocess.PIPE, start_new_session=True
    )
    atexit.register(keeper.communicate)  # closes the pipe, as any other end does
    for name in ("config.toml", "meta.json", "metrics.jsonl"):
        if (folder / name).is_file():
            shutil.copy(folder / name, scratch)
    return scratch


def agree(facts: Mapping[str, Any]) -> None:
    """Compares what the processes are about to do.

    Args:
        facts: `AGREE`, each anything that JSON can hold.

    Raises:
        ConfigError: some of it is not the same in all of them.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental.multihost_utils import process_allgather

    mine = np.stack([digest(facts.get(name)) for name in AGREE])
    every = np.asarray(process_allgather(mine))
    different = []
    for n, name in enumerate(AGREE):
        others = [str(i) for i, one in enumerate(every) if any(one[n] != every[0, n])]
        if others:
            plural = "es" * (len(others) > 1)
            different.append(f"the {name} of process{plural} {', '.join(others)}")
    if different:
        verb = "differs" if len(different) == 1 else "differ"
        raise ConfigError(
            f"{' and '.join(different)} {verb} from process 0's. Give all hosts the "
            "same files, options and versions."
        )


def digest(value: Any) -> np.ndarray:
    """32 bytes that stand for a value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)


def code_facts() -> str:
    """A hash of the package's source files."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()


def any_process(flag: bool) -> bool:
    """Whether it is true in one of the processes, which all ask together."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental.multihost_utils import process_allgather

    return bool(np.any(process_allgather(np.array(flag))))


def stop_together(asked: bool) -> None:
    """All stop if one was asked to; the loop saves what is new, if anything is.

    Raises:
        Stopped: one was.
    """
    if any_process(asked):
        raise Stopped(NOTHING)
