"""Runs command lines, each in a process forked from one that has imported everything.

Each line of stdin is a `Job`, as a JSON object; each line of stdout its exit status and
what its process could not handle. The child is the command from the first line of
`gptjax.__main__` to the end of its interpreter, and has files of its own as streams.
"""

import atexit
import contextlib
import gc
import json
import logging
import os
import resource
import runpy
import signal
import sys
import threading
import time
import traceback
import types
from pathlib import Path
from typing import Any, TypedDict

import gptjax.bench.suite
import gptjax.exporters.export
import gptjax.planning.plan
import gptjax.plots.report
import gptjax.tasks.train
import gptjax.weights.hub  # noqa: F401 (imports most of what commands import)

LIMIT_SECONDS = 60  # of time, and of time on one core
MAX_FILE_BYTES = 256 << 20  # that a command may write
MAX_MEMORY_BYTES = 8 << 30


class Job(TypedDict):
    """A command line and the world it finds itself in."""

    words: list[str]
    folder: str
    stdin: str  # path, or "" for none; those of the output also "broken"
    stdout: str
    stderr: str
    encoding: str


def open_stream(descriptor: int, target: str) -> None:
    """Makes a file, a pipe that nobody reads or nothing the stream of a descriptor."""
    if target == "broken":
        reader, opened = os.pipe()
        os.close(reader)
    elif target:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC if descriptor else os.O_RDONLY
        opened = os.open(target, flags)
    else:
        os.close(descriptor)
        return
    os.dup2(opened, descriptor)
    os.close(opened)


def python_stream(descriptor: int, encoding: str) -> Any:
    """The text stream that Python makes of a descriptor when it starts."""
    try:
        os.fstat(descriptor)
    except OSError:
        return None
    if not descriptor:
        return open(0, encoding=encoding, errors="strict", newline="\n", closefd=False)
    errors = "strict" if descriptor == 1 else "backslashreplace"
    buffering = 1 if descriptor == 2 else -1
    return open(descriptor, "w", buffering, encoding, errors, closefd=False)


def become(job: Job, report: int) -> None:
    """Makes this process that of the command."""
    os.setsid()
    limits = {
        resource.RLIMIT_CPU: LIMIT_SECONDS,
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_DATA: MAX_MEMORY_BYTES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    os.chdir(job["folder"])
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        open_stream(descriptor, job[name])  # type: ignore[literal-required]
        setattr(sys, name, python_stream(descriptor, job["encoding"]))
        setattr(sys, f"__{name}__", getattr(sys, name))

    def write_report(error: Any, where: str) -> None:
        text = "".join(traceback.format_exception(error))
        os.write(report, f"{where}: {text}"[-4000:].encode("utf-8", "backslashreplace"))

    sys.excepthook = lambda kind, error, trace: write_report(error, "traceback")
    sys.unraisablehook = lambda raised: write_report(raised.exc_value, "exception ignored")
    logging.getLogger().handlers.clear()  # of an import; a new process has none
    sys.argv = ["gptjax", *job["words"]]


def watch(pid: int) -> dict[str, Any]:
    """Waits for a child; kills it and what it started."""
    end, ended = time.monotonic() + LIMIT_SECONDS, 0
    while not ended and time.monotonic() < end:
        time.sleep(0.002)
        ended, status, usage = os.wait4(pid, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if not ended:
        _, status, usage = os.wait4(pid, 0)
    seconds = usage.ru_utime + usage.ru_stime
    return {"code": os.waitstatus_to_exitcode(status), "is_hung": not ended, "seconds": seconds}


def serve() -> None:
    """Runs jobs until the end of stdin; returns in the children."""
    gc.freeze()  # children share the pages of what is imported
    for line in iter(sys.stdin.buffer.readline, b""):
        job: Job = json.loads(line)
        report = Path(job["folder"]).with_name("report")
        # A descriptor, which the end of the interpreter does not close.
        descriptor = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        if not (pid := os.fork()):
            return become(job, descriptor)
        os.close(descriptor)
        result = watch(pid) | {"report": report.read_text()}
        print(json.dumps(result), flush=True)
    os._exit(0)


def end(code: Any) -> None:
    """Does what the end of the interpreter does, except to free all objects."""
    if not isinstance(code, int):
        code = int(code is not None)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except Exception as error:
            code = 120
            if stream is sys.stdout:
                sys.unraisablehook(types.SimpleNamespace(exc_value=error))
    os._exit(code)


if __name__ == "__main__":
    serve()
    try:
        runpy.run_module("gptjax", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        end(stop.code)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        end(1)
