"""Too little memory and full disks: predicted, or reported in one sentence."""

import dataclasses
import errno
from types import SimpleNamespace

import jax
import pytest

from gptjax.cli import main
from gptjax.errors import ConfigError, ModelError, ResourceError
from gptjax.tasks import pretrain
from gptjax.training import estimate
from gptjax.training.resource_errors import (
    check_compiled_memory,
    check_estimated_memory,
    choose_accumulation,
    translate_resource_errors,
)
from gptjax.training.run_dir import reconcile_config
from gptjax.training.task import RunContext
from tests.tasks.test_pretrain import make_config


def make_run(tmp_path, **changes):
    return RunContext(make_config(tmp_path, **changes), tmp_path)


def test_a_step_that_exceeds_memory_is_rejected_by_its_estimate_or_compiled_size(tmp_path):
    check_estimated_memory(make_run(tmp_path))
    with pytest.raises(ConfigError, match=r"GiB .* data\.batch_size"):
        check_estimated_memory(make_run(tmp_path, model__d_model=2**16, model__n_layers=500))
    free = estimate.free_memory()
    sizes = {"output_size_in_bytes": free, "alias_size_in_bytes": free}
    check_compiled_memory(SimpleNamespace(temp_size_in_bytes=free // 2, **sizes))
    with pytest.raises(ConfigError, match=r"train\.accumulate"):
        check_compiled_memory(SimpleNamespace(temp_size_in_bytes=free * 2, **sizes))


def test_accumulate_0_chooses_the_fewest_micro_batches_that_fit(tmp_path, monkeypatch):
    needed = estimate.memory_bytes(
        estimate.resolve_config(make_config(tmp_path, train__accumulate=4))
    )
    assert needed["AdamW moments"] == needed["gradients"] == 2 * needed["parameters"]
    limit = sum(needed.values()) / estimate.USABLE_MEMORY_FRACTION
    monkeypatch.setattr(estimate, "device_memory", lambda: limit)
    run = make_run(tmp_path, train__accumulate=0)

    chosen = choose_accumulation(run)

    assert chosen.config.train.accumulate == 4
    reconcile_config(tmp_path, chosen.config)
    monkeypatch.setattr(estimate, "device_memory", lambda: 2**40)
    assert choose_accumulation(run).config == chosen.config  # a resumed run keeps it
    tuned = make_run(tmp_path, train__accumulate=0, finetune__init_from="gpt2")
    with pytest.raises(ConfigError, match=r"accumulate=0 .* finetune\.init_from"):
        choose_accumulation(dataclasses.replace(tuned, run_dir=tmp_path / "new"))


OUT_OF_MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: allocating 4398046511104 bytes.")
CAUSED = ModelError("cannot save: [Errno 28] full. Some advice.")
CAUSED.__cause__ = OSError(errno.ENOSPC, "full")


def test_errors_of_memory_and_disk_name_the_fix():
    for error, kind, text in (
        (OUT_OF_MEMORY, ResourceError, r"4398046511104 bytes.*model\.remat"),
        (MemoryError(), ResourceError, r"model\.remat"),
        (RuntimeError("can't start new thread"), ResourceError, r"thread.*model\.remat"),
        (OSError(errno.EMFILE, "open"), ResourceError, "ulimit -n"),
        (OSError(errno.EFBIG, "large"), ResourceError, "ulimit -f"),
        (OSError(errno.ENOSPC, "full", "a/b"), ResourceError, "a/b.*space"),
        (CAUSED, ResourceError, "cannot save: .*space"),
        (OSError(errno.EACCES, "denied"), PermissionError, "denied"),
        (jax.errors.JaxRuntimeError("INTERNAL: x"), jax.errors.JaxRuntimeError, "INTERNAL"),
    ):
        with pytest.raises(kind, match=text), translate_resource_errors():
            raise error


def test_a_full_disk_ends_the_command_with_1(tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pretrain, "open_dataset", fail)

    assert main.main(["train", "tiny", "--run", str(tmp_path / "run")]) == 1
    assert "Free space" in capsys.readouterr().err
