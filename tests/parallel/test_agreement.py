"""How processes agree, in one process that gathers what the others would send."""

import os
import socket

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from gptjax.errors import ConfigError
from gptjax.parallel import distributed
from gptjax.runtime.preemption import Interrupted

VALUES = {"config": {"a": 1, "b": 2}, "code": "x", "data": ["y"], "tokenizer": "z"}


def test_a_value_that_differs_between_processes_is_named(monkeypatch):
    others = []
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(
        multihost_utils, "process_allgather", lambda local: np.stack([*others, local])
    )

    def send(**changes):
        others.clear()
        for number in range(3):
            own = VALUES | {name: f"of {number}" for name, n in changes.items() if number in n}
            distributed.assert_equal(own)
            others.append(np.stack([distributed.json_digest(own[k]) for k in VALUES]))

    assert tuple(VALUES) == distributed.CONSENSUS_KEYS
    send()
    distributed.assert_equal(VALUES | {"config": {"b": 2, "a": 1}, "steps": 3})
    for changes, message in (
        ({"data": (1,)}, "^the data of process 1 differs"),
        ({"code": (2,), "config": (2,)}, "^the config of process 2 and the code of process 2 "),
    ):
        with pytest.raises(ConfigError, match=message):
            send(**changes)


def test_all_processes_stop_if_one_is_asked_to(monkeypatch):
    assert [distributed.any_across_processes(flag) for flag in (True, False)] == [True, False]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for other in (False, True):
        monkeypatch.setattr(
            multihost_utils, "process_allgather", lambda flag, other=other: np.stack([flag, other])
        )
        assert distributed.any_across_processes(False) == other
        assert distributed.any_across_processes(True)
    with pytest.raises(Interrupted):
        distributed.stop_if_any(False)


def test_only_the_first_process_writes_into_the_run_folder(monkeypatch, tmp_path):
    for name in ("config.toml", "meta.json", "metrics.jsonl"):
        (tmp_path / name).write_text(name)
    at_exit = []
    monkeypatch.setattr(distributed.atexit, "register", at_exit.append)

    assert distributed.process_dir(tmp_path) == tmp_path
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    scratch = distributed.process_dir(tmp_path)

    assert sorted(os.listdir(scratch)) == ["config.toml", "meta.json"]
    at_exit[0]()
    assert not scratch.exists()
    assert len(os.listdir(tmp_path)) == 3


def test_errors_are_told_without_a_traceback_unless_they_are_unexpected():
    describe, lost = distributed.describe_error, RuntimeError("UNAVAILABLE: connection reset")

    assert describe(ConfigError("train.steps=0")) == "gptjax: train.steps=0"
    assert describe(lost) == "UNAVAILABLE: connection reset"
    assert describe(KeyError("x")).startswith("KeyError")


@pytest.mark.fast
def test_an_address_that_is_none_or_a_port_that_another_run_has_is_refused():
    with socket.create_server(("", 0)) as server:
        addresses = ["nonsense", "host:1234,2,2", "host:1234,0,0", "host:99999,2,0"]
        for address in [*addresses, f"127.0.0.1:{server.getsockname()[1]},2,0"]:
            with pytest.raises(ConfigError, match=f"--distributed {address}[ :]"):
                distributed.initialize(address)
