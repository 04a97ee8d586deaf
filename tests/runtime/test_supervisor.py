"""The supervisor: what it starts again, what it does not, and that nothing is left."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.runtime import supervisor
from tests.processes import ROOT, until

COUNT = """
import json, os, signal, sys, time
from pathlib import Path
from gptjax.runtime.supervisor import init_child
init_child()
runs = Path("runs")
number = len(runs.read_text()) if runs.exists() else 0
runs.write_text("." * (number + 1))
def reach(step):
    with open("metrics.jsonl", "a") as file:
        file.write(json.dumps({"event": "train", "step": step}) + "\\n")
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(supervisor, "MIN_RESTART_WAIT_SECONDS", 0.01)


def supervised(program, least=60.0):
    """The exit code, the lines that were said, and how often it was started."""
    said: list[str] = []
    command = [sys.executable, "-c", COUNT + program]
    code = supervisor.supervise(command, Path(), least, said.append)
    return code, said, len(Path("runs").read_text())


@pytest.mark.parametrize("code", [0, 2, 75])
def test_an_answer_is_passed_on_and_nothing_is_started_again(code):
    assert supervised(f"sys.exit({code})") == (code, [], 1)


def test_what_crashes_is_started_again_until_it_is_done():
    program = """
reach(number)
if number < 4:
    os.kill(os.getpid(), signal.SIGKILL) if number % 2 else sys.exit(1)
"""
    code, said, starts = supervised(program)

    assert (code, starts) == (0, 5)
    assert "code 1 after step 0" in said[0]
    assert "SIGKILL after step 1" in said[1]


def test_three_deaths_at_one_step_are_the_end_and_the_reason_is_told(capfd):
    program = """
reach(7 if number else 3)
print("reason", number, file=sys.stderr)
sys.exit(1)
"""
    code, said, starts = supervised(program)

    assert (code, starts) == (1, 4)
    assert "3 times after step 7" in said[-1]
    assert capfd.readouterr().err.count("reason 3") == 2  # as it came, and in the end


def test_it_waits_longer_after_each_death_at_the_same_step(monkeypatch):
    monkeypatch.setattr(supervisor, "MAX_FAILURES", 5)

    _, said, _ = supervised("sys.exit(1)")

    assert [line.split()[-2] for line in said[:4]] == ["0.01", "0.02", "0.04", "0.08"]


@pytest.mark.parametrize("hang", ["time.sleep(600)", "os.kill(os.getpid(), 19)"])
def test_what_hangs_writes_its_stacks_and_is_started_again(hang, capfd, monkeypatch):
    monkeypatch.setattr(supervisor, "MIN_CPU_FRACTION", 0.02)  # else its start counts for a minute
    program = f"""
reach(number)
def waits_for_nothing():
    {hang}
if number == 0:
    waits_for_nothing()
"""
    code, said, starts = supervised(program, least=1.0)

    assert (code, starts) == (0, 2)
    assert "hung for" in said[0]
    assert "in waits_for_nothing" in capfd.readouterr().err


def test_a_process_that_computes_is_no_hang_until_it_has_said_so(tmp_path):
    program = """
from gptjax.runtime.preemption import HEARTBEAT_ENV
end = time.monotonic() + 3
if number == 0:
    while time.monotonic() < end:
        sum(range(1000))
    Path(os.environ[HEARTBEAT_ENV]).write_text("0.1 0.1")
    while True:
        sum(range(1000))
"""
    code, said, starts = supervised(program, least=1.5)

    assert (code, starts) == (0, 2)
    assert "hung for" in said[0]


OUTER = """
import sys
from pathlib import Path
from gptjax.runtime.supervisor import supervise
sys.exit(supervise([sys.executable, "-c", *sys.argv[1:]], Path()))
"""
WAITS = """
subprocess_ = __import__("subprocess").Popen(["sleep", "600"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
Path("pids.new").write_text(f"{os.getpid()} {subprocess_.pid}")
Path("pids.new").rename("pids")
while True:
    time.sleep(0.1)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_go_on_to_the_child_and_nothing_outlives_the_supervisor(number):
    parent = subprocess.Popen([sys.executable, "-c", OUTER, COUNT + WAITS])
    try:
        until(lambda: Path("pids").exists() and len(Path("pids").read_text().split()) == 2)
        child, grandchild = map(int, Path("pids").read_text().split())
        parent.send_signal(number)
        assert parent.wait(60) == (75 if number == signal.SIGTERM else -9)
        until(lambda: not alive(child))
        if number == signal.SIGTERM:
            until(lambda: not alive(grandchild))
    finally:
        parent.kill()
        for pid in map(int, Path("pids").read_text().split()):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def alive(pid):
    """Whether a process runs; one that waits for its parent to notice does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_supervisor_imports_nothing_heavy():
    code = "import gptjax.runtime.supervisor, sys; print(*sys.modules)"

    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()

    assert not {"jax", "numpy", "flax"} & set(loaded)


def test_the_last_step_is_read_past_lines_cut_short(tmp_path):
    lines = [{"event": "train", "step": 3}, {"event": "eval", "step": 9}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"event": "tr'
    (tmp_path / "metrics.jsonl").write_text(text)

    assert supervisor.last_logged_step(tmp_path) == 3
    assert supervisor.last_logged_step(tmp_path / "nowhere") == 0
