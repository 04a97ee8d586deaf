"""Pieces of work that are timed: they are the work that they say, and take turns."""

import json

import pytest

from gptjax.bench import suite, torch_workloads, workloads
from gptjax.bench.checkpointing import measure_save_times
from gptjax.bench.runner import Workload, run_interleaved, run_isolated, summarize_rates
from gptjax.bench.startup import COMMAND_WORKLOADS
from gptjax.bench.workloads import WORKLOADS
from gptjax.cli.main import main
from gptjax.config import PRESETS, GPTConfig
from gptjax.errors import GptjaxError

pytestmark = pytest.mark.mesh

WORK = {  # what a piece of it is, and its units
    "train": ({"rows": 2, "context": 8}, 16),
    "decode": ({"rows": 2, "new": 5}, 10),
    "prefill": ({"rows": 2, "context": 8}, 16),
    "load": ({}, 1),
    "compile": ({"rows": 2, "context": 8}, 1),
    "input": ({"workers": 2}, 20),
    "tiktoken_input": ({"workers": 2}, 20),
    "import": ({}, 1),
    "start": ({}, 1),
}


@pytest.fixture
def mini(monkeypatch):
    monkeypatch.setitem(PRESETS, "mini", (1, 2, 16))
    return "mini"


@pytest.mark.parametrize("name", WORK)
def test_our_work_does_as_many_units_as_it_says(mini, monkeypatch, name):
    options, units = WORK[name]
    monkeypatch.setattr(workloads, "sample_texts", lambda: ["ten bytes."] * 2)

    work = (WORKLOADS | COMMAND_WORKLOADS)[name](mini, **options)

    assert [work(), work()] == [units, units]


def test_two_sides_work_in_turns_in_processes_of_their_own():
    one, other, ratio = run_interleaved(Workload("bandwidth", {}), Workload("bandwidth", {}), 3)

    assert 0 < one.low <= one.median <= one.high
    assert 0 < other.low <= other.median <= other.high
    assert one.low / other.high <= ratio <= one.high / other.low
    assert min(one.peak, other.peak) > workloads.BANDWIDTH_BYTES


def test_the_middle_is_that_of_the_rates():
    assert summarize_rates([3.0, 1.0, 10.0])[:3] == (3.0, 1.0, 10.0)


def test_a_side_that_cannot_start_is_an_error(capfd):
    with pytest.raises(GptjaxError, match="train failed to start"):
        run_isolated(Workload("train", {"preset": "gpt3", "rows": 1, "context": 8}), 1)

    assert "unknown preset 'gpt3'" in capfd.readouterr().err


def test_a_peer_that_is_not_installed_is_named_with_the_line_that_brings_it(monkeypatch):
    monkeypatch.setitem(torch_workloads.INSTALL_COMMANDS, "nothing_of_it", "pip install it")

    with pytest.raises(GptjaxError, match=r"needs nothing_of_it, .*: pip install it"):
        torch_workloads.import_peer("nothing_of_it.part")


def test_the_command_says_each_figure_and_writes_them_all(monkeypatch, tmp_path, capsys):
    """With sides that are known, so that the ratios are."""

    def known(one, other, pairs):
        ours = summarize_rates([30.0] * pairs)
        theirs = summarize_rates([20.0] * pairs)
        ours = ours._replace(peak=1 << 30)
        return ours, theirs, 1.5

    monkeypatch.setattr(suite, "run_interleaved", known)
    monkeypatch.setattr(suite, "run_isolated", lambda side, times: summarize_rates([7.0] * times))
    costs = {"save_blocks_s": [0.25, 0.5, 0.75]}
    monkeypatch.setattr(suite, "measure_save_times", lambda config, times: costs)
    out = tmp_path / "bench.json"

    assert main(["bench", "--peers", "--json", str(out)]) == 0

    found, said = json.loads(out.read_text()), capsys.readouterr().out
    for key in (
        *("train_ratio_transformers_b2", "train_ratio_transformers_b4"),
        *("train_ratio_book_b4", "decode_ratio_transformers_b1"),
        *("decode_ratio_transformers_b8", "prefill_ratio_transformers_b1"),
        *("input_ratio_tiktoken", "start_ratio_transformers"),
    ):
        assert found[key] == 1.5
        assert key in said
    assert found["train_share_of_matmul_rate_b8"] > 0
    assert found["decode_share_of_bandwidth_b1"] > 0
    assert found["start"] == 1 / 30  # seconds
    assert found["save_blocks_s"] == 0.5
    assert found["train_b4_peak_bytes"] == 1 << 30
    assert found["versions"]["jax"]
    assert found["machine"]


def test_each_cost_of_a_save_is_found():
    shape = {"context_length": 8, "n_layers": 1, "n_heads": 2, "d_model": 16}

    found = measure_save_times(GPTConfig(vocab_size=32, dtype="float32", **shape), 2)

    keys = ["save_blocks_s", "save_copy_s", "save_s", "verify_s"]
    assert [*found] == keys
    assert {len(times) for times in found.values()} == {2}
    assert found["save_s"] > found["save_blocks_s"]
