"""The comparison with PyTorch, on a model so small that it takes seconds."""

import json
from functools import partial

import pytest

from gptjax.config import GPTConfig
from tests.benchmarks import peers

pytestmark = pytest.mark.peers

SMALL = GPTConfig.preset("gpt2", n_layers=1, n_heads=2, d_model=16, context_length=32)


def test_their_work_is_as_much_as_ours():
    from tests.benchmarks import torch_workloads

    assert torch_workloads.transformers_train(SMALL, rows=2, context=8)() == 16
    assert torch_workloads.transformers_decode(SMALL, rows=2, new=5)() == 10
    assert torch_workloads.transformers_prefill(SMALL, rows=2, context=8)() == 16
    assert torch_workloads.transformers_load(SMALL)() == 1


def test_an_alternative_replaces_what_fails_and_all_results_are_stored(monkeypatch, tmp_path):
    eight, ten = (partial(partial, len, text) for text in ("8 units.", "ten units."))
    fails, path = partial(int, "out of memory"), tmp_path / "peers.json"
    comparisons = [
        ("start", "", "s", "transformers", [(fails, ten, {}), (eight, ten, {"rows": 3})]),
        ("decode", "b1", "tokens/s", "transformers", [(eight, fails, {})]),
        ("train", "b2", "tokens/s", "transformers", [(eight, ten, {})]),
    ]
    machine = {"platform": "cpu", "repeats": 1}
    monkeypatch.setattr(peers, "in_new_process", lambda function, *args: dict(machine))
    monkeypatch.setattr(peers, "missing_requirement", lambda *args: "")
    monkeypatch.setattr(peers, "cpu_comparisons", lambda config: comparisons)
    options = ["--only", "start", "--only", "decode", "--repeats", "1"]

    assert peers.main([*options, "--json", str(path)]) == 1  # a comparison has failed

    found = json.loads(path.read_text())
    for peer in ("", "_transformers"):
        assert found.pop(f"start{peer}_peak_bytes") > 2**20
    ratio = found.pop("start_transformers") / found.pop("start")
    assert found == machine | {"rows": 3, "start_ratio_transformers": pytest.approx(ratio)}
