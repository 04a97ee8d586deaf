"""The supervisor: what it restarts, what it does not, and that no process is left."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.runtime import supervisor
from tests.conftest import ROOT
from tests.processes import until

START = """
import os, signal, sys, time
from pathlib import Path
from gptjax.runtime.preemption import check_interrupted, heartbeat
from gptjax.runtime.supervisor import init_child
init_child()
starts = Path("starts")
number = len(starts.read_text()) if starts.exists() else 0
starts.write_text("." * (number + 1))
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(supervisor, "POLL_INTERVAL_SECONDS", 0.02)
    monkeypatch.setattr(supervisor, "RESTART_WAITS_SECONDS", (0.01, 0.02))
    monkeypatch.setattr(supervisor, "STACK_DUMP_SECONDS", 0.5)


def supervise(capfd, program, hang_timeout=60.0):
    code = supervisor.supervise([sys.executable, "-c", START + program], hang_timeout)
    return code, capfd.readouterr().err, len(Path("starts").read_text())


@pytest.mark.parametrize("code", [0, 2, 75])
def test_these_exit_codes_are_final(capfd, code):
    assert supervise(capfd, f"sys.exit({code})") == (code, "", 1)


def test_a_run_is_restarted_until_it_is_done_or_fails_three_times_at_one_step(capfd):
    program = """
heartbeat(min(number, 3))
if number < {}:
    os.kill(os.getpid(), signal.SIGKILL) if number % 2 else sys.exit(1)
"""
    code, err, starts = supervise(capfd, program.format(4))
    assert (code, starts) == (0, 5)
    lines = err.splitlines()
    assert all(line.startswith("auto-restart: ") and "in 0.01 s" in line for line in lines)
    assert "code 1 after step 0" in lines[0]
    assert "SIGKILL after step 1" in lines[1]

    Path("starts").unlink()
    code, err, starts = supervise(capfd, program.format(99))
    assert (code, starts) == (1, 6)
    assert [line.split()[-2] for line in err.splitlines()[-3:-1]] == ["0.01", "0.02"]
    assert "failure 3 after step 3" in err


def test_a_hung_run_dumps_its_stacks_and_is_restarted(capfd):
    program = """
def wait_for_nothing():
    time.sleep(600) if number else os.kill(os.getpid(), signal.SIGSTOP)
if number < 2:
    wait_for_nothing()
for _ in range(10):  # longer than the timeout, but with heartbeats
    time.sleep(0.2)
    check_interrupted()
"""
    code, err, starts = supervise(capfd, program, hang_timeout=1.5)
    assert (code, starts) == (0, 3)
    assert err.count("hung for 1.5 s") == 2
    assert err.count("in wait_for_nothing") == 2


OUTER = """
import sys
from gptjax.runtime.supervisor import supervise
sys.exit(supervise([sys.executable, "-c", *sys.argv[1:]]))
"""
WAITS = """
child = __import__("subprocess").Popen(["sleep", "600"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
Path("pids.new").write_text(f"{os.getpid()} {child.pid}")
Path("pids.new").rename("pids")
while True:
    time.sleep(0.1)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_are_forwarded_and_no_process_outlives_the_supervisor(number):
    parent = subprocess.Popen([sys.executable, "-c", OUTER, START + WAITS])
    try:
        until(Path("pids").exists)
        child, grandchild = map(int, Path("pids").read_text().split())
        parent.send_signal(number)
        assert parent.wait(60) == (75 if number == signal.SIGTERM else -9)
        until(lambda: not is_alive(child))
        if number == signal.SIGTERM:
            until(lambda: not is_alive(grandchild))
    finally:
        parent.kill()
        for pid in map(int, Path("pids").read_text().split()):
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
