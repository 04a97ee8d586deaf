"""`gptjax bench` on a model so small that it takes seconds."""

import json
import math

import jax
import pytest

from gptjax.bench import suite, workloads
from gptjax.cli.main import main
from gptjax.config import GPTConfig
from gptjax.model.gpt import expected_shapes

SMALL = GPTConfig(
    vocab_size=64, context_length=32, n_layers=1, n_heads=2, d_model=16, dtype="float32"
)
OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nAnd more.")
PARAMS = sum(map(math.prod, expected_shapes(SMALL).values())) - 32 * 16  # of matmuls


def options_of(repeats=1):
    return suite.BenchOptions(
        config=SMALL,
        context=8,
        train_batch_sizes=(2, 4),
        backends=("auto", "cudnn", "flash"),
        decode_batch_sizes=(2,),
        repeats=repeats,
    )


def test_a_workload_does_as_many_units_as_it_reports(monkeypatch):
    monkeypatch.setattr(workloads, "read_python_help", lambda: ["ten bytes."])
    monkeypatch.setattr(workloads, "TEXT_REPEATS", 2)
    for work, units in [
        (workloads.make_decode_work(SMALL, 2, 5), 10),
        (workloads.make_prefill_work(SMALL, 2, 8), 16),
        (workloads.make_load_work(SMALL), 1),
        (workloads.make_prepare_work(1), 20),
        (workloads.make_matmul_work(8, "float32", 3), 3 * 2 * 8**3),
        (workloads.make_read_work(64, 3), 3 * 64),
        (workloads.make_copy_work(64, 3), 3 * 2 * 64),
    ]:
        assert work() == units
    found = workloads.time_save(SMALL)
    assert found["save_s"] > found["save_blocks_s"] > 0


def test_training_is_swept_over_backends_and_rows_until_memory_is_full(monkeypatch, caplog):
    measure = suite.measure_train_rate

    def measure_or_fail(config, rows, repeats):
        if config.attention == "flash" and rows == 4:
            raise OUT_OF_MEMORY
        return measure(config, rows, repeats)

    monkeypatch.setattr(suite.jax, "device_count", lambda: 1)
    monkeypatch.setattr(suite, "measure_train_rate", measure_or_fail)

    caplog.set_level("INFO", "gptjax")
    found = suite.bench_training(options_of(), 1e6)

    rates = found["rates"]
    measured = [(rate["attention"], rate["rows"]) for rate in rates]
    assert measured == [("chunked", 2), ("chunked", 4), ("flash", 2)]
    assert any("flash, 4 rows" in line and "Out of memory." in line for line in caplog.messages)
    assert rates[0]["tokens_per_s"] == pytest.approx(16e3 / rates[0]["milliseconds"])
    assert rates[0]["program_bytes"] > 3 * 4 * PARAMS  # with both moments
    assert found["train_tokens_per_s"] == max(rate["tokens_per_s"] for rate in rates)


def test_decoding_is_compared_with_the_faster_rate_of_the_memory(monkeypatch):
    rates = {"matmul": 1.0, "read": 2e6, "copy": 3e6, "decode_b2": 50.0, "int8_decode_b2": 75.0}
    monkeypatch.setattr(suite, "try_measure", lambda _, name, *rest: rates[name])
    monkeypatch.setattr(suite, "NEW_TOKENS", 4)

    *_, found = suite.run_benchmarks(options_of(), ["decode"])

    # Keys and values of 16 tokens of prompt and, on average, half of the 4 new ones.
    step_bytes = 4 * (PARAMS + 2 * 18 * 2 * 16)
    assert found["decode_share_of_bandwidth_b2"] == pytest.approx(50 / 2 * step_bytes / 3e6)
    assert found["int8_decode_ratio_fp32_b2"] == 1.5
    assert rates.items() <= found.items()


def test_the_command_writes_all_metrics(monkeypatch, tmp_path):
    calls, out = [], tmp_path / "bench.json"
    monkeypatch.setattr(suite, "run_benchmarks", lambda *call: calls.append(call) or [{"b4": 1.5}])
    command = ["bench", "--device", "--context", "2048", "--rows", "4,8", "--only", "decode"]

    assert main([*command, "--json", str(out)]) == 0

    assert json.loads(out.read_text()) == {"b4": 1.5}
    ((options, parts),) = calls
    assert (options.train_batch_sizes, options.context, parts) == ((4, 8), 2048, ("decode",))
    for name, value in (("attention", "cudn"), ("rows", "4,0"), ("preset", "gpt3")):
        assert main(["bench", f"--{name}", value]) == 2


def test_the_command_keeps_what_it_has_measured(monkeypatch, tmp_path):
    def run_benchmarks(*_):
        yield {"b4": 1.5}
        raise MemoryError

    monkeypatch.setattr(suite, "run_benchmarks", run_benchmarks)

    assert main(["bench", "--json", str(tmp_path / "bench.json")]) == 1

    assert json.loads((tmp_path / "bench.json").read_text()) == {"b4": 1.5}
