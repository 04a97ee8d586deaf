"""A device with gptjax and PyTorch: what they are asked, and what becomes of it."""

import json

import pytest

from gptjax.bench import compare_torch, torch_workloads
from gptjax.bench.runner import summarize_rates
from gptjax.cli.main import main
from gptjax.errors import GptjaxError

pytestmark = pytest.mark.mesh

ALONE = {"platform": "gpu", "device": "NVIDIA H100", "train_attention": "cudnn", "train_rows": 32}


@pytest.fixture
def asked(monkeypatch):
    """Every pair of sides; those with a static cache or 32 rows cannot."""
    pairs = []

    def known(one, other, count):
        pairs.append((one, other))
        if other.options["rows"] == 32 or other.options.get("cache") == "static":
            raise GptjaxError("a side ended while it worked; it says why above.")
        return summarize_rates([30.0] * count), summarize_rates([20.0] * count), 1.5

    monkeypatch.setattr(compare_torch, "run_interleaved", known)
    monkeypatch.setattr(compare_torch, "bench_device_isolated", lambda options: dict(ALONE))
    monkeypatch.setattr(torch_workloads, "import_peer", lambda name: None)
    return pairs


def test_both_sides_train_with_the_rows_of_the_best_or_half_of_them(asked, tmp_path):
    out = tmp_path / "bench.json"
    flags = ["--device", "--peers", "--only", "train", "--context", "2048"]

    assert main(["bench", *flags, "--json", str(out)]) == 0

    found = json.loads(out.read_text())
    assert found["train_ratio_transformers_device"] == 1.5
    assert found["train_rows_transformers_device"] == 16
    assert [ours.options["rows"] for ours, _ in asked] == [32, 16]
    for ours, theirs in asked:
        assert (ours.name, theirs.name) == ("train", "transformers_train")
        assert ours.options["rows"] == theirs.options["rows"]
        assert ours.options["context"] == theirs.options["context"] == 2048
        assert ours.options["attention"] == "cudnn"
        assert theirs.options["device"] == "cuda"


def test_both_sides_write_and_a_cache_that_works_is_named(asked, capsys):
    found = compare_torch.bench_against_torch(
        print, preset="gpt2", context=64, repeats=2, device_flags=[], only=["decode"]
    )

    said = capsys.readouterr().out
    for rows in (1, 8):
        assert found[f"decode_ratio_transformers_device_b{rows}"] == 1.5
        assert found[f"decode_cache_transformers_device_b{rows}"] == "dynamic"
    assert "a side ended while it worked" in said
    assert "train_ratio_transformers_device" not in found


def test_a_device_that_pytorch_is_not_for_is_refused(asked, monkeypatch):
    other = {"platform": "tpu", "device": "TPU v6 lite"}
    monkeypatch.setattr(compare_torch, "bench_device_isolated", lambda options: other)

    with pytest.raises(GptjaxError, match=r"not TPU v6 lite.* Remove --peers"):
        compare_torch.bench_against_torch(
            print, preset="gpt2", context=64, repeats=2, device_flags=[]
        )


def test_gptjax_alone_runs_as_the_command_in_a_process_of_its_own(capfd):
    with pytest.raises(GptjaxError, match="gptjax bench --device failed"):
        compare_torch.bench_device_isolated(["--preset", "gpt3"])

    assert "unknown preset 'gpt3'" in capfd.readouterr().err


def test_the_flags_of_the_sweep_are_handed_on(monkeypatch):
    seen = []
    monkeypatch.setattr(
        compare_torch, "bench_against_torch", lambda say, **given: seen.append(given)
    )

    flags = ["--rows", "8,16", "--attention", "xla", "--only", "train"]
    assert main(["bench", "--device", "--peers", *flags]) == 0

    assert seen[0]["device_flags"] == flags
