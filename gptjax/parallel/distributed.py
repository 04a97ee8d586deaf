"""Multi-process runs: initialization, consistency checks and coordinated exit.

Only process 0 writes to the run folder, except for checkpoint shards, which each
process writes for its own devices. The other processes use a temporary folder.
"""

import atexit
import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from gptjax.errors import ConfigError, GptjaxError, short_message, to_resource_error
from gptjax.runtime.preemption import NOTHING_TO_SAVE, STOP_SIGNALS, Interrupted
from gptjax.runtime.terminal import print_message

INIT_TIMEOUT_SECONDS = 300  # for all processes to connect
MAX_PORT = 65_535
HEARTBEAT_TIMEOUT_SECONDS = 10  # the run ends after this time without a heartbeat
LOST_MESSAGE = (
    "gptjax: lost another process of this run, so this one has exited. Start all "
    "processes again with the same command to resume from the last checkpoint."
)


def initialize(address: str) -> None:
    """Connects this process to the other processes of its run.

    `address` is "auto" under a scheduler that JAX supports (Slurm, Open MPI, GKE, TPU
    pods), else "HOST:PORT,N,I": that of process 0, number of processes, index of this.
    """
    options: dict[str, Any] = {}
    if address != "auto":
        match = re.fullmatch(r"(.+:(\d{1,5})),(\d{1,6}),(\d{1,6})", address, re.ASCII)
        if not match or int(match[4]) >= int(match[3]) or int(match[2]) > MAX_PORT:
            raise ConfigError(
                f"--distributed {address:.80} is neither auto nor HOST:PORT,N,I with I < "
                "N. For the second of two processes, for example, use HOST:1234,2,1."
            )
        names = "coordinator_address", "num_processes", "process_id"
        options = dict(zip(names, (match[1], int(match[3]), int(match[4])), strict=True))
        if not options["process_id"]:
            check_coordinator_port(address, int(match[2]))
    timer = threading.Timer(INIT_TIMEOUT_SECONDS, exit_after_startup_timeout, [address])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=INIT_TIMEOUT_SECONDS + 60,  # JAX then exits silently
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--distributed {address}: cannot connect to the other processes of this "
            f"run ({short_message(error)}). Use HOST:PORT,N,I with the host of "
            "process 0."
        ) from error
    finally:
        timer.cancel()
    for number in STOP_SIGNALS:  # JAX has replaced the handlers
        signal.signal(number, signal.getsignal(number))


def check_coordinator_port(address: str, port: int) -> None:
    """Checks that the coordinator's port can be used; JAX would crash otherwise."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"--distributed {address}: cannot use port {port} of this host: "
                f"{error}. End the run that still uses it, or give all processes "
                "another port."
            ) from error


def exit_after_startup_timeout(address: str) -> None:
    """Reports the timeout and exits; the main thread is blocked inside JAX."""
    print_message(
        f"gptjax: --distributed {address}: timed out after {INIT_TIMEOUT_SECONDS} s "
        "waiting for all processes. Start all of them, each with its own index; each "
        "must be able to reach HOST:PORT of process 0."
    )
    os._exit(2)


@contextlib.contextmanager
def abort_all_on_error() -> Iterator[None]:
    """Exits immediately after an error, and reports a lost process.

    Exiting tells the others not to wait for this process.
    """
    if jax.process_count() == 1:
        yield
        return
    with catch_aborts():
        try:
            yield
        except Interrupted:
            raise
        except BaseException as error:
            if is_xla_error(error) and not to_resource_error(error):
                exit_after_loss()
            is_expected = isinstance(error, GptjaxError)
            text = f"gptjax: {error}" if is_expected else "".join(traceback.format_exception(error))
            print_message(text)
            if is_expected:
                # All processes raise the same error. Give them time to receive the last
                # data and to print it; when process 0 exits, they are terminated.
                time.sleep(1 if jax.process_index() else 2)
            os._exit(getattr(error, "exit_code", 1))


@contextlib.contextmanager
def catch_aborts() -> Iterator[None]:
    """Reports a lost process in place of JAX, which logs a C++ stack and aborts.

    What C++ code writes to stderr is dropped: the stack is written before the signal.
    """
    if sys.stderr.fileno() != 2:  # in a notebook
        yield
        return
    set_handler = ctypes.CDLL(None).signal
    with open(os.devnull, "w") as null, os.fdopen(os.dup(2), "w") as python_stderr:
        stderr, sys.stderr = sys.stderr, python_stderr
        os.dup2(null.fileno(), 2)
        set_handler(signal.SIGABRT, EXIT_AFTER_LOSS)
        try:
            yield
        finally:
            set_handler(signal.SIGABRT, None)
            os.dup2(python_stderr.fileno(), 2)
            sys.stderr = stderr


def exit_after_loss(*_: Any) -> NoReturn:
    """Reports that a process was lost and exits; only the first call prints."""
    if not _loss_lock.acquire(blocking=False):
        time.sleep(HEARTBEAT_TIMEOUT_SECONDS)
    print_message(LOST_MESSAGE)
    os._exit(1)


_loss_lock = threading.Lock()
EXIT_AFTER_LOSS = ctypes.CFUNCTYPE(None, ctypes.c_int)(exit_after_loss)  # as C function


def is_xla_error(error: BaseException) -> bool:
    """True for errors that XLA raises, such as after a broken connection."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return True
    # jax 0.7 has no such type, but the messages start with a status name.
    return bool(re.match(r"[A-Z]+(_[A-Z]+)*: ", str(error)))


def process_dir(run_dir: Path) -> Path:
    """Run folder in process 0; in the others a temporary copy, deleted at exit.

    The copy contains only the files that a resumed run reads.
    """
    if jax.process_index() == 0:
        return run_dir
    scratch_dir = Path(tempfile.mkdtemp(prefix="gptjax-"))
    command = ["sh", "-c", 'read -r word; rm -rf "$0"', str(scratch_dir)]
    cleaner: Any = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    atexit.register(cleaner.communicate)  # closes the pipe, as any exit does
    for name in ("config.toml", "meta.json"):
        if (run_dir / name).is_file():
            shutil.copy(run_dir / name, scratch_dir)
    return scratch_dir


def assert_equal(values: Mapping[str, Any]) -> None:
    """Raises ConfigError if a JSON-serializable value differs between processes."""
    from jax.experimental.multihost_utils import process_allgather

    texts = (json.dumps(value, sort_keys=True, default=str) for value in values.values())
    digests = [np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8) for text in texts]
    all_digests = np.asarray(process_allgather(np.stack(digests)))  # [process, key, byte]
    different = []
    for name, digest in zip(values, all_digests.swapaxes(0, 1), strict=True):
        others = np.flatnonzero((digest != digest[0]).any(axis=1))
        if others.size:
            plural = "es" * (others.size > 1)
            different.append(f"the {name} of process{plural} {', '.join(map(str, others))}")
    if different:
        verb = "differs" if len(different) == 1 else "differ"
        raise ConfigError(
            f"{' and '.join(different)} {verb} from process 0's. Give all hosts the "
            "same files, options and versions."
        )


def source_hash() -> str:
    """Hash of the package's source files."""
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()


def any_across_processes(flag: bool) -> bool:
    """True if the flag is set in any process; a collective operation."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental.multihost_utils import process_allgather

    return bool(np.any(process_allgather(np.array(flag))))


def stop_if_any(stop_requested: bool) -> None:
    """Raises Interrupted in all processes if any was asked to stop."""
    if any_across_processes(stop_requested):
        raise Interrupted(NOTHING_TO_SAVE)
