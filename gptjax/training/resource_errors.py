"""Out-of-memory and disk-full: estimates and error messages."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from gptjax.config import load_config
from gptjax.errors import ConfigError, to_resource_error
from gptjax.training import estimate
from gptjax.training.task import RunContext

ESTIMATE_SLACK = 1.5  # tolerated ratio of estimated to available memory
OOM_ADVICE = (
    "Raise train.accumulate (0 chooses a value that fits), lower data.batch_size or "
    "model.context_length, or set model.remat to full."
)


@contextlib.contextmanager
def translate_resource_errors() -> Iterator[None]:
    """Raises a ResourceError if memory, disk space or a limit is exhausted."""
    try:
        yield
    except Exception as error:
        if translated := to_resource_error(error, OOM_ADVICE):
            raise translated from error
        raise


def choose_accumulation(run: RunContext) -> RunContext:
    """Resolves `train.accumulate=0`: to the saved value, or to one that fits memory."""
    c = run.config
    if c.train.accumulate:
        return run
    saved_config = run.run_dir / "config.toml"
    if saved_config.is_file():
        num_micro_batches = load_config(saved_config).train.accumulate
    elif c.finetune.init_from:
        raise ConfigError(
            "train.accumulate=0 estimates memory from [model] and does not work with "
            "finetune.init_from. Set a number of micro-batches."
        )
    else:
        limit = estimate.device_memory()
        fitted_config = estimate.fit_micro_batch(
            estimate.resolve_config(c), estimate.mesh_sizes(run.mesh), limit
        )
        num_micro_batches = fitted_config.train.accumulate
        run.log(
            f"accumulate {num_micro_batches} micro-batches of "
            f"{c.data.batch_size // num_micro_batches} rows, the largest estimated to fit "
            f"{estimate.format_bytes(limit)} of memory"
        )
    train = dataclasses.replace(c.train, accumulate=num_micro_batches)
    return dataclasses.replace(run, config=dataclasses.replace(c, train=train))


def check_estimated_memory(run: RunContext) -> None:
    """Rejects a run that needs more than `ESTIMATE_SLACK` times the device's memory."""
    c = run.config
    if c.finetune.init_from:
        return  # model size is not known yet
    # The tokenizer is loaded later; 257 is the smallest vocabulary.
    model = dataclasses.replace(c.model, vocab_size=c.model.vocab_size or 257)
    resolved_config = estimate.resolve_config(dataclasses.replace(c, model=model))
    parts = estimate.memory_bytes(resolved_config, estimate.mesh_sizes(run.mesh))
    limit = ESTIMATE_SLACK * estimate.device_memory()
    largest = max(parts, key=lambda name: parts[name])
    check_memory_limit(sum(parts.values()), limit, f", mostly for {largest}")


def check_compiled_memory(memory: Any) -> None:
    """Rejects a compiled step that does not fit into free memory (CPU only).

    `memory` is the `memory_analysis()` of the step, or None if it is not available.
    """
    if memory is None or jax.devices()[0].platform != "cpu":
        return  # compilers for other devices check this themselves
    needed = memory.temp_size_in_bytes + memory.output_size_in_bytes
    check_memory_limit(needed - memory.alias_size_in_bytes, estimate.free_memory())


def check_memory_limit(needed: int | float, limit: int | float, largest: str = "") -> None:
    """Rejects a memory requirement above the limit, both in bytes."""
    if needed > limit:
        raise ConfigError(
            f"a step needs {estimate.format_bytes(needed)} of memory per device{largest}; "
            f"the device has {estimate.format_bytes(estimate.device_memory())}, of which "
            f"{estimate.format_bytes(estimate.free_memory())} are free. {OOM_ADVICE}"
        )
