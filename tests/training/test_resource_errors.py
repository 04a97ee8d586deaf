"""Too little memory and full disks: foreseen, or told in a sentence."""

import errno
import types

import jax
import pytest

from gptjax.cli import main
from gptjax.errors import ConfigError, ModelError, ResourceError
from gptjax.tasks.train import train
from gptjax.training import estimate, metrics, resource_errors
from gptjax.training.metrics import log_event
from gptjax.training.task import RunContext
from tests.tasks.test_pretrain import make_config


def test_a_model_that_cannot_fit_is_refused_before_anything_is_made(tmp_path):
    config = make_config(tmp_path, model__d_model=2**16, model__n_layers=500)

    with pytest.raises(ConfigError, match=r"GiB of memory .* data.batch_size"):
        train(config, tmp_path / "run")

    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_compiled_step_that_does_not_fit_what_is_free_is_refused(tmp_path):
    run = RunContext(make_config(tmp_path), tmp_path)
    sizes = {"output_size_in_bytes": 3, "alias_size_in_bytes": 3}
    free = estimate.free_memory()

    fitting = types.SimpleNamespace(temp_size_in_bytes=free // 2, **sizes)
    resource_errors.check_compiled_memory(run, fitting)
    larger = types.SimpleNamespace(temp_size_in_bytes=free * 2, **sizes)
    with pytest.raises(ConfigError, match=r"train\.accumulate"):
        resource_errors.check_compiled_memory(run, larger)


@pytest.mark.parametrize("step", [1, 6])
def test_memory_that_runs_out_ends_the_run_with_what_to_lower(tmp_path, monkeypatch, step):
    config, calls = make_config(tmp_path), []
    get = jax.device_get

    def short(tree):
        calls.append(tree)
        if len(calls) == step:
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 4398046511104 bytes."
            )
        return get(tree)

    monkeypatch.setattr("gptjax.training.metrics.jax.device_get", short)
    with pytest.raises(ConfigError, match=r"4398046511104 bytes.*model.remat"):
        train(config, tmp_path / "run")
    monkeypatch.undo()

    train(config, tmp_path / "run")
    assert (tmp_path / "run" / "model").is_dir()


@pytest.mark.parametrize("number", resource_errors.DISK_FULL_ERRNOS)
def test_a_full_disk_is_the_machines_fault_whoever_meets_it(number):
    full = OSError(number, "full")

    with (
        pytest.raises(ResourceError, match="Free space"),
        resource_errors.translate_resource_errors(),
    ):
        raise full
    with (
        pytest.raises(ResourceError, match="Free space"),
        resource_errors.translate_resource_errors(),
    ):
        raise ModelError("cannot save step 3") from full
    with pytest.raises(OSError, match="denied"), resource_errors.translate_resource_errors():
        raise OSError(errno.EACCES, "denied")
    with pytest.raises(ModelError, match="other"), resource_errors.translate_resource_errors():
        raise ModelError("other")


def test_a_disk_that_fills_up_ends_the_command_with_1_and_it_goes_on_later(
    tmp_path, monkeypatch, capsys
):
    make_config(tmp_path)
    write = log_event
    command = ["train", "tiny", "--run", str(tmp_path / "run")]
    command += ["--data.source", str(tmp_path / "text.txt"), "--train.steps", "4"]
    command += ["--train.log_every", "1", "--model.d_model", "8"]
    command += ["--optim.warmup_steps", "1"]

    def full(path, kind, step, **values):
        if (kind, step) == ("train", 3):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, kind, step, **values)

    monkeypatch.setattr(metrics, "log_event", full)
    assert main.main(command) == 1
    assert "disk full" in capsys.readouterr().err
    monkeypatch.undo()

    assert main.main(command) == 0
