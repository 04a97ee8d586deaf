"""`gptjax bench` on a model so small that it takes seconds."""

import dataclasses
import json

import jax
import pytest

from gptjax.bench import suite, workloads
from gptjax.cli.main import main
from gptjax.config import GPTConfig
from gptjax.model.gpt import init
from gptjax.tree import num_params

SMALL = GPTConfig(
    vocab_size=64, context_length=32, n_layers=1, n_heads=2, d_model=16, dtype="float32"
)
WORKLOADS = {  # units of one run
    "train": (lambda: workloads.make_train_work(SMALL, 2, 8), 16),
    "decode": (lambda: workloads.make_decode_work(SMALL, 2, 5), 10),
    "int8 decode": (lambda: workloads.make_decode_work(SMALL, 2, 5, int8=True), 10),
    "prefill": (lambda: workloads.make_prefill_work(SMALL, 2, 8), 16),
    "load": (lambda: workloads.make_load_work(SMALL), 1),
    "input": (lambda: workloads.make_prepare_work(1), 20),
    "matmul": (lambda: workloads.make_matmul_work(8, "float32", 3), 3 * 2 * 8**3),
    "read": (lambda: workloads.make_read_work(64, 3), 3 * 64),
    "copy": (lambda: workloads.make_copy_work(64, 3), 3 * 2 * 64),
    "import": (workloads.make_import_work, 1),
}


@pytest.fixture
def options(monkeypatch):
    monkeypatch.setattr(suite.jax, "device_count", lambda: 1)
    monkeypatch.setattr(suite, "CPU_SIZES", (32, 1 << 16, 2))
    monkeypatch.setattr(suite, "NEW_TOKENS", 4)
    lines = []
    return lines, suite.BenchOptions(
        config=SMALL,
        context=16,
        train_batch_sizes=(2, 4),
        backends=("auto", "cudnn", "flash"),
        decode_batch_sizes=(2,),
        prefill_batch_sizes=(2,),
        prefill_length=8,
        repeats=1,
        log=lines.append,
    )


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_does_as_many_units_as_it_reports(monkeypatch, name):
    monkeypatch.setattr(workloads, "read_python_help", lambda: ["ten bytes."])
    monkeypatch.setattr(workloads, "TEXT_REPEATS", 2)
    make_work, units = WORKLOADS[name]

    work = make_work()

    assert [work(), work()] == [units, units]


def test_rates_are_units_per_second_without_the_warm_up(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 14.0])
    monkeypatch.setattr(workloads.time, "perf_counter", lambda: next(clock))
    runs = []

    def work():
        runs.append(1)
        return 8

    assert workloads.measure_rates(work, 2) == [4.0, 2.0]
    assert len(runs) == workloads.WARMUP_RUNS + 2


def test_training_is_measured_per_backend_and_batch_size(options):
    lines, options = options

    found = suite.run_benchmarks(options, ["train"])

    assert [(rate["attention"], rate["rows"]) for rate in found["rates"]] == [
        *(("chunked", 2), ("chunked", 4), ("flash", 2), ("flash", 4))
    ]
    assert any("cudnn" in line for line in lines)  # not supported on a CPU
    for rate in found["rates"]:
        assert rate["tokens_per_s"] == pytest.approx(16e3 * rate["rows"] / rate["milliseconds"])
        assert rate["mfu"] is None  # a CPU has no published peak
        assert rate["compile_seconds"] > 0
        params = num_params(init(SMALL, jax.random.key(0)))
        assert rate["program_bytes"] > 3 * 4 * (params - 16 * SMALL.d_model)  # with both moments
    best = max(found["rates"], key=lambda rate: rate["tokens_per_s"])
    assert found["train_tokens_per_s"] == best["tokens_per_s"]
    assert (found["train_attention"], found["train_rows"]) == (best["attention"], best["rows"])
    assert found[f"train_b{best['rows']}"] == best["tokens_per_s"]
    flops = suite.estimate.flops_per_token(dataclasses.replace(SMALL, context_length=16))
    share = best["tokens_per_s"] * flops / found["matmul"]
    assert found["train_share_of_matmul_rate"] == pytest.approx(share)
    assert not any(name.startswith(("decode", "prefill")) for name in found)


def test_decoding_is_compared_with_the_faster_rate_of_the_memory(options):
    _, options = options

    found = suite.run_benchmarks(options, ["decode", "prefill"])

    # 16 tokens of prompt and, on average, half of the 4 new ones
    step_bytes = suite.decode_step_bytes(SMALL, 2, 18)
    share = found["decode_b2"] / 2 * step_bytes / max(found["read"], found["copy"])
    assert found["decode_share_of_bandwidth_b2"] == pytest.approx(share)
    ratio = found["int8_decode_b2"] / found["decode_b2"]
    assert found["int8_decode_ratio_fp32_b2"] == pytest.approx(ratio)
    assert found["prefill_b2"] > 0


def test_a_decode_step_reads_all_multiplied_parameters_and_the_filled_cache():
    params = num_params(init(SMALL, jax.random.key(0))) - SMALL.context_length * SMALL.d_model
    cached = 2 * SMALL.n_layers * SMALL.n_heads * SMALL.head_dim

    assert suite.decode_step_bytes(SMALL, 1, 0) == 4 * params
    assert suite.decode_step_bytes(SMALL, 3, 5) == 4 * (params + 3 * 5 * cached)
    half = dataclasses.replace(SMALL, dtype="bfloat16")
    assert suite.decode_step_bytes(half, 3, 5) == suite.decode_step_bytes(SMALL, 3, 5) / 2


def test_full_memory_ends_a_sweep_but_not_the_others(options, monkeypatch):
    lines, options = options

    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nAnd more.")

    def fail_with_four_rows(config, rows, repeats):
        rate = {"attention": "flash", "tokens_per_s": 1.0, "mfu": None, "milliseconds": 1.0}
        rate |= {"rows": rows, "compile_seconds": 1.0, "program_bytes": 1}
        return rate if rows < 4 and config.attention == "flash" else fail()

    monkeypatch.setattr(suite, "measure_train_rate", fail_with_four_rows)
    monkeypatch.setattr(workloads, "make_copy_work", fail)

    found = suite.run_benchmarks(options, ["train"])

    assert [rate["rows"] for rate in found["rates"]] == [2]
    assert [line[:20] for line in lines if "RESOURCE_EXHAUSTED: Out of memory." in line] == [
        *("copy                ", "train chunked, 2 row", "train flash, 4 rows:")
    ]
    assert "read" in found
    assert "copy" not in found


def test_the_times_of_a_save_are_those_of_its_parts():
    found = workloads.time_save(SMALL)

    assert [*found] == ["save_blocks_s", "save_copy_s", "save_s", "verify_s"]
    assert found["save_s"] > found["save_blocks_s"] > 0


def test_the_command_writes_all_metrics(monkeypatch, tmp_path):
    calls, out = [], tmp_path / "bench.json"
    monkeypatch.setattr(
        suite, "run_benchmarks", lambda *call: calls.append(call) or {"train_b4": 1.5}
    )

    assert main(["bench", "--json", str(out), "--rows", "4,8"]) == 0
    flags = ["--context", "2048", "--attention", "xla", "--only", "decode"]
    assert main(["bench", "--device", *flags]) == 0

    assert json.loads(out.read_text()) == {"train_b4": 1.5}
    (machine, machine_parts), (device, device_parts) = calls
    assert (machine.train_batch_sizes, machine.context) == ((4, 8), 256)
    assert {"train", "start", "save"} < {*machine_parts}
    assert (device.train_batch_sizes[-1], device.context) == (128, 2048)
    assert (device.backends, device_parts) == (("xla",), ("decode",))


@pytest.mark.parametrize(
    "flags",
    [["--attention", "cudn"], ["--rows", "4,0"], ["--only", "training"], ["--preset", "gpt3"]],
)
def test_a_wrong_value_is_rejected_with_its_option(flags, capsys):
    assert main(["bench", *flags]) == 2

    assert flags[1].split(",")[-1] in capsys.readouterr().err
