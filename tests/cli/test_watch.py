"""`gptjax watch`: the view of a run in the terminal and as a page."""

import http.client
import io
import json
import os
import re
import signal
import threading
import time

import pytest

from gptjax.cli import watch
from gptjax.cli.main import main
from gptjax.cli.watch_page import PageServer
from gptjax.training.metrics import log_event
from gptjax.training.run_dir import run_lock
from tests.evaluation.test_run_comparison import write_run
from tests.processes import started, train, until, write_config

EVIL = "\x1b]0;title\x07<script>alert(1)</script>&"


@pytest.fixture
def run_dir(tmp_path):
    """A run of 20 steps that has reached step 15."""
    folder = write_run(tmp_path / "run", train__steps=30)
    log_event(folder / "metrics.jsonl", "sample", 20, text=f"{EVIL}\nsecond line")
    return folder


def test_one_view_has_state_progress_values_curve_and_sample(run_dir, capfd):
    with run_lock(run_dir):
        codes = [main(["watch", str(run_dir), "--once"])]
    codes.append(main(["watch", str(run_dir), "--once"]))
    (run_dir / ".lock").unlink()
    codes.append(main(["watch", str(run_dir)]))  # a dead run: ends by itself
    codes.append(main(["watch", str(run_dir.parent)]))

    printed = capfd.readouterr()
    running, _, dead = re.split(rf"^{run_dir} ", printed.out, flags=re.MULTILINE)[1:]
    assert codes == [0, 0, 1, 2]
    assert re.match(rf" running for \d+s, pid {os.getpid()} on", running)
    assert dead.startswith(" dead since 20")
    for text in ("step 20/30 (66.7%)", "loss 2.0500", "(best 2.1000 at step 20)", "2.05 │"):
        assert text in running
    assert "sample after step 20" in running
    assert "\x1b" not in printed.out
    assert "config.toml" in printed.err


def test_a_terminal_shows_the_newest_view_in_place_and_keeps_the_last_one(
    run_dir, monkeypatch, capfd
):
    calls = []

    def sleep(seconds):
        calls.append(seconds)
        if len(calls) == 2:
            lock.__exit__(None, None, None)

    monkeypatch.setattr(watch.time, "sleep", sleep)
    monkeypatch.setattr(watch, "is_terminal", lambda stream: True)
    lock = run_lock(run_dir)
    lock.__enter__()

    assert main(["watch", str(run_dir)]) == 0

    before, *screens, last = re.split(r"\x1b\[\?1049[hl]|\x1b\[H", capfd.readouterr().out)
    assert not before
    assert [screen.count("running for") for screen in screens] == [0, 1, 1]
    assert "finished at" in last
    assert "\x1b" not in last
    assert {EVIL in screen for screen in screens} == {False}


def test_elsewhere_a_line_is_printed_for_each_change(run_dir, monkeypatch, capfd):
    monkeypatch.setattr(watch, "format_progress", lambda status, now: f"step {status.step}")
    steps = iter([20, 25])

    def sleep(seconds):
        if (step := next(steps, None)) is None:
            lock.__exit__(None, None, None)
        else:
            log_event(run_dir / "metrics.jsonl", "save", step)

    monkeypatch.setattr(watch.time, "sleep", sleep)
    lock = run_lock(run_dir)
    lock.__enter__()

    assert main(["watch", str(run_dir)]) == 0

    lines = capfd.readouterr().out.splitlines()
    assert [line.split(" |")[0] for line in lines[:2]] == ["step 20", "step 25"]
    assert "finished at" in lines[2]


def test_a_narrow_terminal_or_another_encoding_gets_what_fits(run_dir, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))

    lines = watch.format_view(watch.read_run_status(run_dir))

    assert max(map(len, lines[1:])) <= 50
    assert len(lines) <= 24
    assert "".join(lines[1:-4]).isascii()


@pytest.fixture
def get(run_dir):
    """Function that requests a path of the page; returns status, headers and body."""
    server = PageServer(run_dir, 0)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()

    def get(path, host="localhost"):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
        connection.putrequest("GET", path, skip_host=True)
        connection.putheader("Host", host)
        connection.endheaders()
        answer = connection.getresponse()
        with answer:
            return answer.status, answer.headers, answer.read().decode()

    yield get
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_page_shows_the_view_escaped_and_may_load_nothing_from_elsewhere(get, run_dir):
    status, headers, page = get("/", "localhost:4711")

    assert status == 200
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;\nsecond line" in page
    assert "\x1b" not in page
    for text in (str(run_dir), "step 20/30", "loss 2.0500", 'value="0.6667"', "dead"):
        assert text in page
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    (nonce,) = set(re.findall(r"'nonce-([^']+)'", policy))
    assert page.count("<script") == page.count(f'<script nonce="{nonce}">') == 1
    assert not re.search(r"https?://|src=\"(?!/)", page)
    picture = re.search(r'src="(/[^"]+)"', page)
    assert picture is not None
    status, headers, body = get(picture[1])
    assert (status, headers["Content-Type"]) == (200, "image/svg+xml")
    assert "<svg" in body


def test_the_page_is_for_this_machine_only(get):
    codes = {host: get("/", host)[0] for host in ("127.0.0.1:80", "evil.example:80", "[::", "")}

    assert codes == {"127.0.0.1:80": 200, "evil.example:80": 403, "[::": 403, "": 403}
    assert get("/../config.toml")[0] == 404


def test_the_port_of_the_page_may_be_taken(run_dir, capfd):
    server = PageServer(run_dir, 0)
    try:
        assert main(["watch", str(run_dir), "--browser", "--port", str(server.server_port)]) == 1
    finally:
        server.server_close()
    assert f"--port {server.server_port}" in capfd.readouterr().err
    assert main(["watch", str(run_dir), "--browser", "--once"]) == 2


@pytest.mark.chaos
def test_a_training_process_that_is_killed_is_dead_since_then(tmp_path, capfd):
    folder = write_config(tmp_path, train__steps=100_000, train__eval_every=100_000)
    path = folder / "run" / "metrics.jsonl"

    def has_saved():
        return path.is_file() and '"save"' in path.read_text()

    with started(train(1, "config.toml", "--run", "run"), [folder]) as (process,):
        until(has_saved, [process])
        assert main(["watch", str(folder / "run"), "--once"]) == 0
        process.popen.send_signal(signal.SIGKILL)
        process.popen.wait()
        killed = time.time()
        assert main(["watch", str(folder / "run")]) == 1
        running, dead = capfd.readouterr().out.split(str(folder / "run"))[1:]
        last = json.loads(path.read_text().rstrip().split("\n")[-1])

    assert running.startswith("  running for")
    moment = watch.format_time(last["time"])
    assert killed - last["time"] < 10
    assert dead.startswith(f"  dead since {moment}")
    assert "the same command resumes after step" in dead
