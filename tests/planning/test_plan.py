"""What a plan says before anything runs, and how near the compiler it is."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from gptjax.cli.arguments import apply_overrides
from gptjax.cli.main import main
from gptjax.config import (
    DataConfig,
    GPTConfig,
    MeshConfig,
    RunConfig,
    TrainConfig,
    find_config,
    load_config,
)
from gptjax.errors import ConfigError
from gptjax.planning import aot, plan
from gptjax.training import estimate
from gptjax.training.hardware import CHIPS, chip_from_device, parse_topology

GIB = 2**30
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler, from the extra [tpu-plan]",
)

# What the TPU compiler (libtpu 0.0.42.1, jax 0.10.2) gave for a step, in GiB: arguments
# and temporaries. (preset, topology, mesh, rows, accumulate, remat)
COMPILED = {
    ("gpt2", "v5e:1", (1, 1, 1), 8, 1, "none"): 1.39 + 8.36,
    ("gpt2-large", "v5e:1", (1, 1, 1), 4, 1, "full"): 8.65 + 5.58,
    ("gpt2", "v5e:8", (1, 8, 1), 256, 1, "dots"): 0.19 + 10.98,
    ("gpt2-medium", "v5e:8", (1, 4, 2), 64, 2, "full"): 0.50 + 1.53,
    ("gpt2-xl", "v5e:8", (1, 8, 1), 32, 1, "dots"): 2.38 + 8.77,
    ("gpt2-xl", "v5e:8", (1, 8, 1), 128, 1, "full"): 2.38 + 7.01,
}

# Bytes that the CPU compiler (jax 0.10.2, x86 with AVX-512) gave: config and options.
CPU_COMPILED = {
    ("tiny", ""): 3_546_533,
    ("quickstart", ""): 171_466_469,
    ("text", ""): 229_024_869,
    ("tinyshakespeare", "data.batch_size=64 model.context_length=256"): 1_585_599_205,
    ("modern", ""): 63_968_677,
    (
        "modern",
        "data.batch_size=64 model.context_length=256 model.mlp=swiglu model.n_kv_heads=2",
    ): 2_061_651_549,
    ("book/ch05", ""): 3_490_072_173,
    ("gpt2_124m", "data.batch_size=1 train.accumulate=1"): 2_555_070_693,
    ("gpt2_124m", "data.batch_size=16 train.accumulate=1"): 10_232_371_429,
    ("gpt2_124m", "data.batch_size=8 train.accumulate=8"): 3_054_330_597,
    ("gpt2_124m", "data.batch_size=4 train.accumulate=1 model.remat=none"): 11_600_139_877,
    ("gpt2_124m", "data.batch_size=4 train.accumulate=1 model.remat=full"): 2_972_701_605,
    (
        "gpt2_124m",
        "data.batch_size=2 train.accumulate=2 model.n_layers=24 model.d_model=1024 "
        "model.n_heads=16",
    ): 8_285_237_989,
}


def run_of(preset, sizes, rows, accumulate=1, remat="dots", **model):
    data, fsdp, tensor = sizes
    return RunConfig(
        model=GPTConfig.preset(preset, vocab_multiple=128, remat=remat, **model),
        data=DataConfig(batch_size=rows),
        train=TrainConfig(accumulate=accumulate),
        mesh=MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
    )


def plan_of(config, topology):
    return plan.make_plan(config, parse_topology(topology), run_compiler=False)


def test_the_estimate_is_as_near_the_compiler_as_the_plan_says():
    for (name, options), compiled in CPU_COMPILED.items():
        words = [word for x in options.split() for word in f"--{x}".split("=")]
        config = apply_overrides(load_config(find_config(name)), words)

        planned = plan_of(config, "cpu:1")

        assert planned.to_dict()["memory_accuracy"] == 0.15
        assert planned.memory_estimate == pytest.approx(compiled, rel=0.15), (name, options)
        assert " per device, estimated to within 15%: " in "".join(plan.format_plan(planned))
    assert "unverified" in "".join(plan.format_plan(plan_of(config, "h100:1")))


def test_the_estimate_is_within_15_percent_of_the_tpu_compiler():
    for (preset, topology, *options), compiled in COMPILED.items():
        planned = plan_of(run_of(preset, *options), topology)

        assert planned.config.model.attention == "splash"
        assert planned.memory_estimate / GIB == pytest.approx(compiled, rel=0.15), (preset, options)


def test_memory_at_rest_parameters_and_flops_are_those_of_nanogpt():
    """Position embeddings are not counted there: they are added, not multiplied."""
    config = GPTConfig.preset("gpt2")

    assert estimate.parameter_count(config) - 1024 * 768 == 123_653_376
    assert estimate.flops_per_token(config) == 6 * 123_653_376 + 12 * 12 * 768 * 1024
    half = estimate.flops_per_token(config) - estimate.causal_flops_per_token(config)
    assert half == 6 * 12 * 768 * 1024
    run = estimate.resolve_config(run_of("gpt2", (1, 1, 1), 8), "tpu")
    for sizes in [(1, 1, 1), (4, 1, 1), (1, 2, 4)]:
        parts = estimate.memory_bytes(run, sizes)
        rest = sum(parts[name] for name in estimate.TRAIN_STATE_PARTS)
        per_param = rest / estimate.parameter_count(run.model)
        assert per_param == pytest.approx(12 / (sizes[1] * sizes[2]), rel=1e-6)


def test_what_does_not_fit_comes_with_options_that_fit():
    planned = plan_of(run_of("gpt2-xl", (-1, 1, 1), 64), "v5e:2x4")
    alone = plan_of(run_of("gpt2-xl", (1, 1, 1), 8), "v5e:1")

    last = plan.format_plan(planned)[-1]
    assert last.endswith("Try --train.accumulate 0 --mesh.data 1 --mesh.fsdp -1")
    assert plan_of(run_of("gpt2-xl", (1, -1, 1), 64, accumulate=0), "v5e:2x4").fits
    for gib, fits in ((13, True), (15.9, False)):  # a run leaves some of the memory
        assert dataclasses.replace(alone, memory={"all": int(gib * GIB)}).fits == fits


def test_a_step_takes_as_long_as_its_slowest_part():
    planned = plan_of(run_of("gpt2", (1, 1, 1), 32), "v5e:1")
    flops = estimate.flops_per_token(planned.config.model)

    seconds = planned.min_seconds

    assert seconds["compute"] == pytest.approx(32 * 1024 * flops / 197e12)
    assert seconds["links"] == 0
    assert f"at least {max(seconds.values()) * 1e3:,.3g} ms" in str(plan.format_plan(planned))


def test_topologies_and_devices_are_known_by_name():
    for text, value in (
        ("v7:8", "v7"),
        ("v5e:7", "7"),
        ("v5p:8", "8"),
        ("v5e:2xx4", "2xx4"),
        ("cpu:1025", "1025"),
    ):
        with pytest.raises(ConfigError, match=value):
            parse_topology(text)
    devices = ("TPU v5 lite", "TPU v5", "NVIDIA H100 80GB HBM3", "cpu")
    chips = [CHIPS["v5e"], CHIPS["v5p"], CHIPS["h100"], None]
    assert [chip_from_device(device) for device in devices] == chips


@needs_libtpu
@pytest.mark.slow
def test_the_tpu_compiler_agrees_with_the_arithmetic_for_a_sharded_model():
    """In a process of its own, as libtpu wants it."""
    words = (
        "tiny --topology v5e:2x4 --mesh.data 1 --mesh.fsdp 8 --model.d_model 256 "
        "--model.n_heads 4 --model.n_layers 4 --model.context_length 512 "
        "--model.vocab_multiple 128 --data.tokenizer gpt2 --data.batch_size 128 "
        "--train.loss_chunk_size 64 --json"
    )
    command = [sys.executable, "-m", "gptjax", "plan", *words.split()]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}

    done = subprocess.run(command, env=env, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # Never all parameters at once: at most the table of the vocabulary, in float32.
    assert 0 < found["largest_gather"] <= 50_304 * 256 * 4
    assert found["memory_estimate"] == pytest.approx(found["memory_compiled"], rel=0.15)


def test_without_the_compiler_a_plan_says_so_and_exits_with_1_if_it_does_not_fit(
    capsys, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    codes = [
        main(["plan", "gpt2_124m", "--topology", name, *flags])
        for name, flags in (("v5e:2x4", []), ("v5e:1", ["--train.accumulate", "1"]))
    ]

    assert codes == [0, 1]
    assert 'pip install -e ".[tpu-plan]"' in capsys.readouterr().err
    assert not aot.can_compile(parse_topology(f"cpu:{jax.device_count() + 1}"))
    assert aot.can_compile(parse_topology(f"cpu:{jax.device_count()}"))
