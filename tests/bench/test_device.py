"""What a device does by backend, on a model so small that it takes seconds."""

import dataclasses
import json

import jax
import pytest

from gptjax.bench import device, roofline
from gptjax.bench.device import bench_device, measure_train_rate
from gptjax.cli.main import main
from gptjax.config import GPTConfig, MeshConfig
from gptjax.model.gpt import init
from gptjax.tree import flatten_with_names

pytestmark = pytest.mark.mesh

SMALL = GPTConfig(
    vocab_size=64, context_length=32, n_layers=1, n_heads=2, d_model=16, dtype="float32"
)


@pytest.fixture(autouse=True)
def _one_device_and_little_work(monkeypatch):
    monkeypatch.setattr(device, "MeshConfig", lambda: MeshConfig(data=1))
    monkeypatch.setattr(device.jax, "device_count", lambda: 1)
    monkeypatch.setattr(roofline, "CPU_SIZES", (32, 1 << 16, 2))
    monkeypatch.setattr(roofline, "DECODE_BATCH_SIZES", (1, 8))


def out_of_memory(*args):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nAnd more.")


def test_a_rate_counts_the_tokens_of_a_step():
    found = measure_train_rate(SMALL, 4)

    assert found.rows == 4
    assert found.tokens_per_s == pytest.approx(4 * 32 / found.milliseconds * 1e3)
    assert found.mfu is None  # a CPU has no published peak
    assert found.peak_bytes is None  # and counts no memory
    assert found.compile_seconds > 0


def test_a_step_needs_at_least_its_parameters_and_their_moments():
    leaves = flatten_with_names(init(SMALL, jax.random.key(0))).values()

    assert measure_train_rate(SMALL, 1).program_bytes > 3 * sum(leaf.nbytes for leaf in leaves)


def test_every_backend_that_can_has_its_line_and_the_others_say_why():
    told = []

    found = bench_device(SMALL, told.append, batch_sizes=(2,), only=["train"])

    names = [one["attention"] for one in found["rates"]]
    assert names == ["reference", "chunked", "xla", "flash"]
    assert any("cudnn" in line and "not supported" in line for line in told)
    best = max(found["rates"], key=lambda one: one["tokens_per_s"])
    assert found["train_tokens_per_s"] == best["tokens_per_s"]
    assert found["train_attention"] == best["attention"]
    assert found["train_rows"] == 2
    assert not any(name.startswith(("decode", "prefill")) for name in found)


def test_the_share_of_the_products_is_of_the_flops_of_all_tokens():
    found = bench_device(SMALL, lambda line: None, (2,), backends=["xla"], only=["train"])

    flops = device.estimate.flops_per_token(SMALL) * found["train_tokens_per_s"]
    share = found["train_share_of_matmul_rate"]
    assert share == pytest.approx(flops / found["matmul_bfloat16"])


def test_full_memory_ends_a_sweep_and_not_the_rest(monkeypatch):
    real, told = measure_train_rate, []

    def full(config, rows):
        small = config.attention == "reference" and rows < 4
        return real(config, rows) if small else out_of_memory()

    monkeypatch.setattr(device, "measure_train_rate", full)

    found = bench_device(SMALL, told.append, (2, 4, 8), backends=["reference", "xla"])

    assert [(one["attention"], one["rows"]) for one in found["rates"]] == [("reference", 2)]
    assert [line for line in told if "RESOURCE" in line] == [
        "reference  4 rows: RESOURCE_EXHAUSTED: Out of memory.",
        "xla        2 rows: RESOURCE_EXHAUSTED: Out of memory.",
    ]
    assert found["decode_b8"] > 0


def test_nothing_that_fits_is_said(monkeypatch):
    told = []
    monkeypatch.setattr(device, "measure_train_rate", out_of_memory)
    monkeypatch.setattr(roofline.workloads, "make_decode_work", out_of_memory)
    monkeypatch.setattr(roofline.workloads, "make_prefill_work", out_of_memory)
    monkeypatch.setattr(roofline.workloads, "make_copy_work", out_of_memory)

    found = bench_device(SMALL, told.append, (2,))

    assert found["rates"] == []
    assert "best       none: no configuration could be trained" in told
    assert sum("RESOURCE" in line for line in told) == 7  # four backends are here
    assert found["read"] > 0


def test_writing_a_token_reads_all_that_is_multiplied_and_the_filled_cache():
    leaves = flatten_with_names(init(SMALL, jax.random.key(0)))
    read = sum(leaf.size for name, leaf in leaves.items() if "position" not in name)
    keys = SMALL.n_layers * SMALL.n_heads * SMALL.head_dim

    assert roofline.decode_step_bytes(SMALL, 1, 0) == 4 * read
    assert roofline.decode_step_bytes(SMALL, 3, 5) == 4 * (read + 3 * 5 * 2 * keys)
    half = dataclasses.replace(SMALL, dtype="bfloat16")
    assert roofline.decode_step_bytes(half, 3, 5) == roofline.decode_step_bytes(SMALL, 3, 5) / 2


def test_shares_are_of_the_faster_of_both_rates_of_the_memory():
    told = []

    found = bench_device(SMALL, told.append, only=["decode", "prefill"])

    fastest = max(found["read"], found["copy"])
    each = roofline.decode_step_bytes(SMALL, 8, 16 + 16 / 2)  # 16 of 32 tokens are new
    share = found["decode_share_of_bandwidth_b8"]
    assert share == pytest.approx(found["decode_b8"] / 8 * each / fastest)
    assert {"decode_b1", "prefill_b1", "prefill_b8"} <= found.keys()
    assert "rates" not in found


def test_a_context_that_ends_with_the_prompt_cannot_be_written_in():
    told = []
    short = dataclasses.replace(SMALL, context_length=16)

    found = bench_device(short, told.append, only=["decode"])

    assert any("T = 16 is too short" in line for line in told)
    assert "decode_b1" not in found


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attention", "cudn"], "--attention cudn is not a backend. Did"),
        (["--rows", "4,0"], "--rows 4,0 must be"),
        (["--only", "load"], "--only load is not available with --device"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, message, capsys):
    assert main(["bench", "--device", *flags]) == 2

    assert f"gptjax: {message}" in capsys.readouterr().err


def test_the_command_writes_all_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(GPTConfig, "preset", lambda name, **changes: SMALL)
    out = tmp_path / "bench.json"

    flags = ["--rows", "2", "--attention", "auto", "--json", str(out)]
    assert main(["bench", "--device", *flags]) == 0

    assert "tokens/s" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["versions"]["jax"]
    assert found["train_attention"] == "chunked"  # "auto" on a CPU
