"""The speed of training by backend, on a model so small that it takes seconds."""

import json

import pytest

from gptjax.bench.device import bench_device, rate
from gptjax.cli import main
from gptjax.config import GPTConfig, MeshConfig

pytestmark = pytest.mark.mesh

SMALL = GPTConfig(
    vocab_size=64, context_length=32, n_layers=1, n_heads=2, d_model=16, dtype="float32"
)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr("gptjax.bench.device.MeshConfig", lambda: MeshConfig(data=1))
    monkeypatch.setattr("gptjax.bench.device.jax.device_count", lambda: 1)


@pytest.mark.usefixtures("one_device")
def test_a_rate_counts_the_tokens_of_a_step():
    found = rate(SMALL, 4)

    assert found.rows == 4
    assert found.tokens_per_s == pytest.approx(4 * 32 / found.milliseconds * 1e3)
    assert found.mfu is None  # a CPU has no published peak


@pytest.mark.usefixtures("one_device")
def test_every_backend_that_can_has_its_line_and_the_others_say_why():
    told = []

    found = bench_device(SMALL, told.append, sizes=(2,))

    names = [one["attention"] for one in found["rates"]]
    assert names == ["plain", "xla", "blockwise"]
    assert any("cudnn" in line and "not here" in line for line in told)
    assert found["train_tokens_per_s"] == max(
        one["tokens_per_s"] for one in found["rates"]
    )


@pytest.mark.usefixtures("one_device")
def test_the_command_writes_all_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(GPTConfig, "preset", lambda name, **changes: SMALL)
    out = tmp_path / "bench.json"

    assert main(["bench", "--device", "--rows", "2", "--json", str(out)]) == 0

    assert "tokens/s" in capsys.readouterr().out
    assert json.loads(out.read_text())["versions"]["jax"]
