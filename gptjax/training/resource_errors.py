"""Out-of-memory and disk-full: estimates and error messages."""

import contextlib
import dataclasses
import errno
from collections.abc import Iterator
from typing import Any

import jax

from gptjax.config import load_config
from gptjax.errors import ConfigError, ModelError, ResourceError
from gptjax.training import estimate
from gptjax.training.task import RunContext

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ESTIMATE_SLACK = 1.5  # tolerated ratio of estimated to available memory
OOM_ADVICE = (
    "Raise train.accumulate (0 chooses a value that fits), lower data.batch_size or "
    "model.context_length, or set model.remat to full."
)


@contextlib.contextmanager
def translate_resource_errors() -> Iterator[None]:
    """Translates out-of-memory and disk-full errors into user-facing errors.

    Raises:
        ConfigError: out of memory.
        ResourceError: the disk is full.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).splitlines()[0][:200].rstrip(".")
        raise ConfigError(
            f"out of device memory: {first}. {OOM_ADVICE} Saved checkpoints are unaffected."
        ) from error
    except MemoryError as error:
        raise ConfigError(
            f"out of host memory. {OOM_ADVICE} Saved checkpoints are unaffected."
        ) from error
    except OSError as error:
        if isinstance(error, ResourceError) or error.errno not in DISK_FULL_ERRNOS:
            raise
        raise disk_full_error(error) from error
    except ModelError as error:
        if getattr(error.__cause__, "errno", None) not in DISK_FULL_ERRNOS:
            raise
        raise disk_full_error(error) from error


def disk_full_error(error: Exception) -> ResourceError:
    """User-facing error for a full disk."""
    text = str(error).rstrip(".")
    return ResourceError(
        f"disk full: {text}. Free space and run the same command again; it resumes "
        "from the last checkpoint."
    )


def choose_accumulation(run: RunContext) -> RunContext:
    """Resolves `train.accumulate=0`: to the saved value, or to one that fits memory.

    Raises:
        ConfigError: the run starts from a model of unknown size.
    """
    c = run.config
    if c.train.accumulate:
        return run
    saved_config = run.run_dir / "config.toml"
    if saved_config.is_file():
        num_micro_batches = load_config(saved_config).train.accumulate
    else:
        num_micro_batches = micro_batches_that_fit(run)
    train = dataclasses.replace(c.train, accumulate=num_micro_batches)
    return dataclasses.replace(run, config=dataclasses.replace(c, train=train))


def micro_batches_that_fit(run: RunContext) -> int:
    """Smallest number of micro-batches that fits device memory; logs it.

    Raises:
        ConfigError: the run starts from a model of unknown size.
    """
    c = run.config
    if c.finetune.init_from:
        raise ConfigError(
            "train.accumulate=0 estimates memory from [model] and does not work with "
            "finetune.init_from. Set a number of micro-batches."
        )
    limit = estimate.device_memory()
    fitted_config = estimate.fit_micro_batch(estimate.resolve_config(c), run_mesh_shape(run), limit)
    num_micro_batches = fitted_config.train.accumulate
    run.log(
        f"accumulate {num_micro_batches} micro-batches of "
        f"{c.data.batch_size // num_micro_batches} rows, the largest estimated to fit "
        f"{estimate.format_bytes(limit)} of memory"
    )
    return num_micro_batches


def run_mesh_shape(run: RunContext) -> Any:
    """Axis sizes of the run's mesh."""
    return tuple(run.mesh.shape.values()) if run.mesh else estimate.SINGLE_DEVICE_MESH


def check_estimated_memory(run: RunContext) -> None:
    """Rejects a run whose estimated memory is far above that of a device.

    Raises:
        ConfigError: the estimate exceeds ESTIMATE_SLACK times the device's memory.
    """
    c = run.config
    if c.finetune.init_from:
        return  # model size is not known yet
    # The tokenizer is loaded later; 257 is the smallest vocabulary.
    model = dataclasses.replace(c.model, vocab_size=c.model.vocab_size or 257)
    resolved_config = estimate.resolve_config(dataclasses.replace(c, model=model))
    parts = estimate.memory_bytes(resolved_config, run_mesh_shape(run))
    check_memory_limit(sum(parts.values()), ESTIMATE_SLACK * estimate.device_memory(), parts)


def check_compiled_memory(run: RunContext, memory: Any) -> None:
    """Rejects a compiled step that does not fit into free memory (CPU only).

    Args:
        run: the run.
        memory: `memory_analysis()` of the compiled step; None if not available.

    Raises:
        ConfigError: the step does not fit.
    """
    if memory is None or jax.devices()[0].platform != "cpu":
        return  # compilers for other devices check this themselves
    needed = memory.temp_size_in_bytes + memory.output_size_in_bytes
    check_memory_limit(needed - memory.alias_size_in_bytes, estimate.free_memory(), {})


def check_memory_limit(needed: int | float, limit: int | float, parts: dict[str, int]) -> None:
    """Rejects a memory requirement above the limit.

    Args:
        needed: bytes.
        limit: bytes.
        parts: bytes by purpose; the message names the largest.

    Raises:
        ConfigError: `needed` exceeds `limit`.
    """
    if needed <= limit:
        return
    largest = ""
    if parts:
        name = max(parts, key=lambda name: parts[name])
        largest = f", mostly for {name}"
    raise ConfigError(
        f"a step needs {estimate.format_bytes(needed)} of memory per device{largest}; "
        f"the device has {estimate.format_bytes(estimate.device_memory())}, of which "
        f"{estimate.format_bytes(estimate.free_memory())} are free. {OOM_ADVICE}"
    )
