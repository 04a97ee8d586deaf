"""What a machine may refuse: memory and disk; foreseen, or told in a sentence."""

import contextlib
import dataclasses
import errno
from collections.abc import Iterator
from typing import Any

import jax

from gptjax import budget
from gptjax.config import read_config
from gptjax.errors import ConfigError, MachineError, ModelError
from gptjax.run_task import Run

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ROUGH = 1.5  # times what there is: less may still be an error of the arithmetic
LOWER = (
    "Raise train.accumulate (0 finds what fits), or lower data.batch_size or "
    "model.context_length, or set model.remat to full."
)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Too little memory or disk in the block is said in a sentence.

    Raises:
        ConfigError: the devices have no memory for it.
        MachineError: the disk is full.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).splitlines()[0][:200].rstrip(".")
        raise ConfigError(
            f"the device's memory does not suffice: {first}. {LOWER} What was saved "
            "is untouched."
        ) from error
    except MemoryError as error:
        raise ConfigError(
            f"the memory of this machine does not suffice. {LOWER} What was saved is "
            "untouched."
        ) from error
    except OSError as error:
        if isinstance(error, MachineError) or error.errno not in FULL:
            raise
        raise full(error) from error
    except ModelError as error:
        if getattr(error.__cause__, "errno", None) not in FULL:
            raise
        raise full(error) from error


def full(error: Exception) -> MachineError:
    """What to say of a disk that is full."""
    text = str(error).rstrip(".")
    return MachineError(
        f"the disk took no more: {text}. Free space, and give the same command again: "
        "it goes on from the last checkpoint."
    )


def with_micro_batch(run: Run) -> Run:
    """The run with `train.accumulate` chosen, where it is 0: as before, or to fit.

    Raises:
        ConfigError: the model is not the config's own, so that its size is not known.
    """
    c = run.config
    if c.train.accumulate:
        return run
    before = run.folder / "config.toml"
    if before.is_file():
        count = read_config(before).train.accumulate
    else:
        count = micro_batches_that_fit(run)
    train = dataclasses.replace(c.train, accumulate=count)
    return dataclasses.replace(run, config=dataclasses.replace(c, train=train))


def micro_batches_that_fit(run: Run) -> int:
    """The fewest micro-batches for the memory of a device; says so.

    Raises:
        ConfigError: the model is not the config's own, so that its size is not known.
    """
    c = run.config
    if c.tune.start:
        raise ConfigError(
            "train.accumulate=0 finds what fits for a model of the config's own, not "
            "for tune.start. Give a number of micro-batches."
        )
    limit = budget.device_memory()
    fitted = budget.with_micro_batch(budget.settled(c), sizes_of(run), limit)
    count = fitted.train.accumulate
    run.say(
        f"accumulate {count} micro-batches of {c.data.batch_size // count} rows, the "
        f"largest that fit {budget.human(limit)} of memory by arithmetic"
    )
    return count


def sizes_of(run: Run) -> Any:
    """The sizes of the run's mesh."""
    return tuple(run.mesh.shape.values()) if run.mesh else budget.ONE_DEVICE


def check_memory(run: Run) -> None:
    """Refuses by arithmetic, before anything is made, what cannot fit at all.

    Raises:
        ConfigError: a device would need far more memory than it has.
    """
    c = run.config
    if c.tune.start:
        return  # its shape is not known yet
    # The tokenizer is looked up later; a vocabulary of 257 is the least there is.
    model = dataclasses.replace(c.model, vocab_size=c.model.vocab_size or 257)
    settled = budget.settled(dataclasses.replace(c, model=model))
    parts = budget.memory_bytes(settled, sizes_of(run))
    refuse(sum(parts.values()), ROUGH * budget.device_memory(), parts)


def check_compiled(run: Run, memory: Any) -> None:
    """Refuses a compiled step that will not fit into what is free of the memory.

    Args:
        run: the run.
        memory: `memory_analysis` of the program, or None where there is none.

    Raises:
        ConfigError: it will not.
    """
    if memory is None or jax.devices()[0].platform != "cpu":
        return  # compilers for other devices have refused already
    new = memory.temp_size_in_bytes + memory.output_size_in_bytes
    refuse(new - memory.alias_size_in_bytes, budget.free_memory(), {})


def refuse(need: int | float, limit: int | float, parts: dict[str, int]) -> None:
    """Raises where more is needed than there is.

    Raises:
        ConfigError: with the largest of the parts, and what to lower.
    """
    if need <= limit:
        return
    largest = ""
    if parts:
        name = max(parts, key=lambda name: parts[name])
        largest = f", most of it for {name}"
    raise ConfigError(
        f"a step needs {budget.human(need)} of memory on a device{largest}; there are "
        f"{budget.human(budget.device_memory())}, of which "
        f"{budget.human(budget.free_memory())} are free. {LOWER}"
    )
