"""Many processes are one run: they compute, agree, end and resume together."""

import json
import os
import signal
import sys
import time

import numpy as np
import pytest

from gptjax.checkpoint.retention import list_steps
from gptjax.parallel import distributed
from gptjax.tokenizer.tokenizer import train_tokenizer
from tests.processes import (
    IMPATIENT,
    OTHER_CODE,
    TEXT,
    cache_options,
    exit_codes,
    last_step,
    losses,
    run_here,
    started,
    train,
    until,
    write_config,
)

pytestmark = pytest.mark.mesh
PAIR = ("config.toml", "--run", "run", "--mesh.fsdp", "2", "--mesh.tensor", "2")


@pytest.fixture(autouse=True, scope="module")
def compiled_once(tmp_path_factory):
    """Programs of the same mesh and the same batches."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cache_options(tmp_path_factory.mktemp("programs")).items():
            patch.setenv(name, value)
        yield


def test_processes_stop_and_end_together_and_their_run_goes_on_with_the_losses_of_one_device(
    tmp_path,
):
    """At first they share nothing but the checkpoints, so that any other file shows."""
    folder = write_config(tmp_path / "pair")
    run, folders = folder / "run", [folder, folder]
    (run / "checkpoints").mkdir(parents=True)
    (folder / "other").mkdir()
    (folder / "other" / "checkpoints").symlink_to(run / "checkpoints")
    commands = train(2, *PAIR)
    commands[1] += ["--run", "other"]
    with started(commands, folders, devices=2) as stopped:
        until(lambda: last_step(run) >= 2, stopped)
        stopped[1].popen.send_signal(signal.SIGTERM)
        assert exit_codes(stopped) == [75, 75], stopped[0].complained()

    step = list_steps(run / "checkpoints")[-1]
    assert f"after step {step}" in stopped[0].complained()
    assert "tok/s" in stopped[0].said()
    assert "tok/s" not in stopped[1].said()
    devices = json.loads((run / "meta.json").read_text())["devices"]
    assert devices == {"kind": "cpu", "count": 4, "processes": 2}
    assert os.listdir(folder / "other") == ["checkpoints"]
    assert os.listdir(folder / "scratch1") == []  # its scratch files are deleted

    with started(train(2, *PAIR), folders, devices=2) as lost:
        until(lambda: last_step(run) >= step + 2, lost)
        lost[1].popen.kill()
        killed = time.monotonic()
        assert exit_codes(lost) == [1, -signal.SIGKILL]
        assert time.monotonic() - killed < 30  # 15 where the machine has nothing else to do
    assert [one.complained() for one in lost] == [f"{distributed.LOST_MESSAGE}\n", ""]
    assert f"resumed  run after step {step}" in lost[0].said()

    run_here(folder)
    run_here(write_config(tmp_path / "alone"))
    here, alone = (np.array(losses(path)) for path in (run, tmp_path / "alone" / "run"))
    assert len(here) == 20 + 2  # steps and evaluations
    np.testing.assert_array_equal(here[:, 0], alone[:, 0])
    np.testing.assert_allclose(here[:, 1], alone[:, 1], rtol=2e-6)


def test_processes_that_would_not_do_the_same_all_say_so_and_end(tmp_path):
    flags = ["--run", "run", "--data.tokenizer", "tokenizer"]
    commands = train(2, "config.toml", *flags)
    folders = [write_config(tmp_path / host) for host in ("first", "second")]
    commands[1] += ["--optim.peak_lr", "0.5"]
    commands[1][1:3] = ["-c", OTHER_CODE]
    (folders[1] / "text.txt").write_text(TEXT.replace("7", "8"))
    for folder, text in zip(folders, (TEXT, TEXT.replace("times", "mal")), strict=True):
        train_tokenizer([text], 280).save(folder / "tokenizer")

    with started(commands, folders) as processes:
        assert exit_codes(processes) == [2, 2]

    for process in processes:
        assert process.complained().startswith("gptjax: the ")
        assert len(process.complained().splitlines()) == 1
        for name in ("config", "code", "data", "tokenizer"):
            assert f"the {name} of process 1" in process.complained()
    until(lambda: not os.listdir(folders[1] / "scratch1"))


def test_a_process_without_the_others_says_so_and_ends(tmp_path):
    command = [sys.executable, "-c", IMPATIENT, train(2)[0][-1]]

    with started([command], [tmp_path]) as (process,):
        assert exit_codes([process]) == [2]

    assert "timed out after 2 s" in process.complained()
    assert "Traceback" not in process.complained()
