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


def test_results_and_alternatives_of_failed_comparisons_are_stored_as_they_arrive(
    monkeypatch, tmp_path
):
    path, stored = tmp_path / "peers.json", []
    results = [interleaved.Result(median, 1.0, 9.0, 7) for median in (6.0, 2.0)]

    def run(ours, theirs, repeats):
        stored.append(json.loads(path.read_text()))
        if ours != "works":
            raise RuntimeError("out of memory")
        return *results, 3.5

    fails, works = ("fails", None, {}), ("works", None, {"rows": 3})
    comparisons = [
        ("start", "", "s", "transformers", [fails, works]),
        ("decode", "b8", "tokens/s", "transformers", [works]),
        ("decode", "b1", "tokens/s", "transformers", [fails]),
        ("train", "b2", "tokens/s", "transformers", [works]),
    ]
    machine = {"platform": "cpu", "repeats": 5}
    monkeypatch.setattr(peers, "in_new_process", lambda function, *args: dict(machine))
    monkeypatch.setattr(peers, "missing_requirement", lambda *args: "")
    monkeypatch.setattr(peers, "cpu_comparisons", lambda config: comparisons)
    monkeypatch.setattr(peers, "run_interleaved", run)

    code = peers.main(["--only", "start", "--only", "decode", "--json", str(path)])

    assert code == 1  # one comparison has failed
    start = {"start": 1 / 6, "start_transformers": 0.5, "start_ratio_transformers": 3.5}
    start |= {"start_peak_bytes": 7, "start_transformers_peak_bytes": 7, "rows": 3}
    decode = {"decode_b8": 6.0, "decode_transformers_b8": 2.0, "decode_ratio_transformers_b8": 3.5}
    decode |= {"decode_b8_peak_bytes": 7, "decode_transformers_b8_peak_bytes": 7}
    assert stored == [machine, machine, machine | start, machine | start | decode]
    assert json.loads(path.read_text()) == stored[-1]


def test_missing_requirements_end_the_command_before_anything_is_timed(monkeypatch, capsys):
    import torch

    from gptjax.training import estimate

    monkeypatch.setattr(peers, "in_new_process", lambda function, *args: {"platform": "cpu"})
    monkeypatch.setattr(peers, "compare", lambda *args: pytest.fail("a comparison was started"))
    monkeypatch.setattr(peers.os, "sched_getaffinity", lambda pid: {0, 1})

    for target, name, value, message in (
        (torch, "get_num_threads", lambda: 1, "OMP_NUM_THREADS=2"),
        (torch, "get_num_threads", lambda: 2, ""),
        (estimate, "free_memory", lambda: 1 << 20, "1 MiB are free"),
        (peers.importlib.util, "find_spec", lambda name: None, "torch is not installed"),
    ):
        monkeypatch.setattr(target, name, value)
        if message:
            assert peers.main(["--only", "decode"]) == 2
            assert message in capsys.readouterr().err
