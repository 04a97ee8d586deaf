"""The comparison with PyTorch, on a model so small that it takes seconds."""

import json
from functools import partial

import pytest

from gptjax.bench.workloads import make_train_work
from gptjax.config import GPTConfig
from tests.benchmarks import peers

pytestmark = pytest.mark.peers

SMALL = GPTConfig.preset("gpt2", n_layers=1, n_heads=2, d_model=16, context_length=32)
WORKLOADS = {  # arguments, units of one run
    "train": ({"rows": 2, "context": 8}, 16),
    "decode": ({"rows": 2, "new": 5}, 10),
    "prefill": ({"rows": 2, "context": 8}, 16),
    "load": ({}, 1),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_their_work_is_as_much_as_ours(name):
    from tests.benchmarks import torch_workloads

    options, units = WORKLOADS[name]

    assert getattr(torch_workloads, f"transformers_{name}")(SMALL, **options)() == units


def test_a_comparison_that_fails_is_replaced_by_its_alternative(capsys):
    from tests.benchmarks.torch_workloads import transformers_train

    works = [
        partial(work, SMALL, rows=2, context=8) for work in (make_train_work, transformers_train)
    ]
    failing = (works[0], partial(transformers_train, SMALL, rows=2, context=8, device="none"), {})
    comparison = ("train", "b2", "tokens/s", "transformers", [failing, (*works, {"rows": 2})])

    found = peers.compare(comparison, 1)

    assert "RuntimeError" in capsys.readouterr().err
    assert found["train_ratio_transformers_b2"] == pytest.approx(
        found["train_b2"] / found["train_transformers_b2"]
    )
    assert found["rows"] == 2
    assert found["train_transformers_b2_peak_bytes"] > 0


def test_missing_requirements_end_the_command_before_anything_is_timed(
    monkeypatch, capsys, tmp_path
):
    import torch

    from gptjax.training import estimate

    machine = {"platform": "cpu", "repeats": 5}
    monkeypatch.setattr(peers, "in_new_process", lambda function, *args: dict(machine))
    monkeypatch.setattr(peers, "compare", lambda *args: pytest.fail("a comparison was started"))
    monkeypatch.setattr(peers.os, "sched_getaffinity", lambda pid: {0, 1})
    path = tmp_path / "peers.json"
    flags = ["--only", "decode", "--json", str(path)]

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert peers.main(flags) == 2
    assert "OMP_NUM_THREADS=2" in capsys.readouterr().err

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(estimate, "free_memory", lambda: 1 << 20)
    assert peers.main(flags) == 2
    assert "1 MiB are free" in capsys.readouterr().err

    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert peers.main(flags) == 2
    assert "torch is not installed" in capsys.readouterr().err
    assert not path.exists()


def test_each_result_is_stored_as_it_arrives(monkeypatch, tmp_path):
    path, stored = tmp_path / "peers.json", []

    def compare(comparison, repeats):
        stored.append(json.loads(path.read_text()))
        return {} if comparison[1] == "b8" else {f"decode_{comparison[1]}": repeats}

    machine = {"platform": "cpu", "repeats": 3}
    monkeypatch.setattr(peers, "in_new_process", lambda function, *args: dict(machine))
    monkeypatch.setattr(peers, "missing_requirement", lambda *args: "")
    monkeypatch.setattr(peers, "compare", compare)

    code = peers.main(["--only", "decode", "--repeats", "3", "--json", str(path)])

    assert code == 1  # one comparison has failed
    assert stored == [machine, machine | {"decode_b1": 3}]
    assert json.loads(path.read_text()) == machine | {"decode_b1": 3}
