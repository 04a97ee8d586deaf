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


def test_a_value_that_differs_between_processes_is_named(monkeypatch):
    sent, values = [], {"config": {"a": 1, "b": 2}, "code": "x", "data": ["y"], "tokenizer": None}
    monkeypatch.setattr(
        multihost_utils, "process_allgather", lambda own: sent.append(own) or np.stack(sent)
    )

    distributed.assert_equal(values)
    distributed.assert_equal(values | {"config": {"b": 2, "a": 1}})
    with pytest.raises(ConfigError, match=r"^the data of process 2 differs"):
        distributed.assert_equal(values | {"data": ["z"]})
    with pytest.raises(ConfigError, match=r"^the config of .* 3 and the data of processes 2, 3 di"):
        distributed.assert_equal(values | {"config": {"a": 1}, "data": ["z"]})


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
    (tmp_path / "config.toml").touch()
    (tmp_path / "metrics.jsonl").touch()
    at_exit = []
    monkeypatch.setattr(distributed.atexit, "register", at_exit.append)

    assert distributed.process_dir(tmp_path) == tmp_path
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    scratch = distributed.process_dir(tmp_path)

    assert os.listdir(scratch) == ["config.toml"]
    at_exit[0]()
    assert not scratch.exists()


def test_an_address_that_is_none_or_a_port_that_another_run_has_is_refused():
    with socket.create_server(("", 0)) as server:
        addresses = ["nonsense", "host:1234,2,2", "host:99999,2,0", "host:1,9999999,0"]
        for address in [*addresses, f"127.0.0.1:{server.getsockname()[1]},2,0"]:
            with pytest.raises(ConfigError, match=f"--distributed {address}[ :]"):
                distributed.initialize(address)
