"""The process of a command: signals in any phase, closed streams, what it prints."""

import subprocess
import sys

import pytest

from gptjax.runtime.preemption import NOTHING_TO_SAVE
from tests.conftest import ROOT

PROCESS = """
import errno, os, signal, sys, threading, time
from gptjax import __main__

phase, sys.argv[1:] = sys.argv[1], ["doctor"]

def interrupt(name=phase, *_):
    if name == phase:
        signal.raise_signal(signal.SIGTERM)

class Value:
    find_spec = staticmethod(interrupt)
    __del__ = staticmethod(interrupt)

class Crash:  # of C++ code of a library, while Python shuts down
    def __del__(self, abort=os.abort):
        abort()

def open_and_print():
    from gptjax.runtime.terminal import print_progress
    with open(os.devnull) as file:
        sys.exit(3) if file.fileno() < 3 else print_progress("done")

def fail():
    error = RuntimeError("of a thread of a library")
    thread = threading.Thread(target=sys.excepthook, args=(RuntimeError, error, None))
    thread.start()
    thread.join()
    raise OSError(errno.EMFILE, "too many")

def run_doctor():
    commands = {"a callback": Value, "no streams": open_and_print, "a limit": fail}
    commands.get(phase, interrupt)()
    time.sleep(60 if phase in ("a callback", "the command") else 0)

if phase != "no streams":
    sys.crash = Crash()
if phase.startswith("gptjax"):
    sys.meta_path.insert(0, Value)
else:
    from gptjax.cli import doctor
    doctor.run_doctor = run_doctor
sys.exit(__main__.main())
"""


def run_process(phase, redirections=""):
    command = [sys.executable, "-c", PROCESS, phase]
    shell = ["sh", "-c", f'exec "$@" {redirections}', "sh", *command]
    return subprocess.run(shell, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize("phase", ["gptjax.cli.main", "the command", "a callback"])
def test_a_signal_ends_the_process_with_75_and_one_line_in_any_phase(phase):
    ended = run_process(phase)

    assert (ended.returncode, ended.stdout) == (75, ""), ended.stderr
    assert ended.stderr.startswith(NOTHING_TO_SAVE)
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("redirections", ["<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_a_command_does_not_depend_on_its_streams(redirections):
    assert run_process("no streams", redirections).returncode == 0


def test_libraries_print_nothing_beside_an_error():
    ended = run_process("a limit")

    assert (ended.returncode, ended.stdout) == (1, "")
    assert "ulimit -n" in ended.stderr
    assert ended.stderr.count("\n") == 1
