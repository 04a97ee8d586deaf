"""The comparison with PyTorch, on a model so small that it takes seconds."""

import json
from functools import partial

import pytest

from gptjax.config import GPTConfig
from tests.benchmarks import interleaved, peers

pytestmark = pytest.mark.peers

SMALL = GPTConfig.preset("gpt2", n_layers=1, n_heads=2, d_model=16, context_length=32)


def test_their_work_is_as_much_as_ours():
    from tests.benchmarks import torch_workloads

    assert torch_workloads.transformers_train(SMALL, rows=2, context=8)() == 16
    assert torch_workloads.transformers_decode(SMALL, rows=2, new=5)() == 10
    assert torch_workloads.transformers_prefill(SMALL, rows=2, context=8)() == 16
    assert torch_workloads.transformers_load(SMALL)() == 1


def test_two_workloads_run_in_processes_of_their_own():
    eight, ten = (partial(partial, len, text) for text in ("8 units.", "ten units."))

    ours, theirs, ratio = interleaved.run_interleaved(eight, ten, 3)

    assert 0 < ours.low <= ours.median <= ours.high
    assert ours.peak_bytes > 2**20
    assert theirs.low / 100 < ours.median < 100 * theirs.high
    assert 0.01 < ratio < 100
    with pytest.raises(TypeError):
        interleaved.run_interleaved(eight, partial(partial, len, 1), 1)


def test_a_comparison_that_fails_is_replaced_by_its_alternative(monkeypatch, capsys):
    results = [interleaved.Result(median, 1.0, 9.0, 7) for median in (6.0, 2.0)]

    def run(ours, theirs, repeats):
        if ours == "fails":
            raise RuntimeError("out of memory")
        return *results, 3.5

    monkeypatch.setattr(peers, "run_interleaved", run)
    alternatives = [("fails", None, {}), ("works", None, {"rows": 2})]

    for unit, value in (("tokens/s", 6.0), ("s", 1 / 6)):
        comparison = ("train", "b2", unit, "transformers", alternatives)
        found = peers.compare(comparison, 1)
        assert found["train_b2"] == value
    assert "out of memory" in capsys.readouterr().err
    assert found == {
        **{"rows": 2, "train_b2": 1 / 6, "train_transformers_b2": 0.5},
        **{"train_b2_peak_bytes": 7, "train_transformers_b2_peak_bytes": 7},
        "train_ratio_transformers_b2": 3.5,
    }
    assert peers.compare(("train", "b2", "s", "transformers", alternatives[:1]), 1) == {}


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

    for target, name, value, message in (
        (torch, "get_num_threads", lambda: 1, "OMP_NUM_THREADS=2"),
        (torch, "get_num_threads", lambda: 2, ""),
        (estimate, "free_memory", lambda: 1 << 20, "1 MiB are free"),
        (peers.importlib.util, "find_spec", lambda name: None, "torch is not installed"),
    ):
        monkeypatch.setattr(target, name, value)
        if message:
            assert peers.main(["--only", "decode", "--json", str(path)]) == 2
            assert message in capsys.readouterr().err
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
