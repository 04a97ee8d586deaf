"""Each example once an epoch, whoever reads, in whatever parts, killed at any time.

Some processes share the rows of every step. All are killed; others, of another number,
go on from the last checkpoint. Together they read what one reader that is never killed
reads.
"""

import contextlib
import itertools
import json
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import gptjax.book  # noqa: F401 (the values "book")
from gptjax.data.bucketing import buckets
from gptjax.data.classification import ClassificationBatches
from gptjax.data.lm import LMBatches
from gptjax.data.sft import Example, PreferenceBatches, make_sft_batches
from gptjax.data.token_files import TokenDataset, open_shard
from gptjax.training.trainer import prefetch_to_device
from tests.chaos._runs import run_jobs

FULL, SLICE = 200, 6
KINDS = ("tokens", "padded", "packed", "book", "labels", "pairs")
EPOCHS = 3
# (rows of one step that this process has, steps from, to before) -> their numbers
Read = Callable[[Sequence[int], int, int], Iterator[list[int]]]


def example_numbers(batch: Any, row: int) -> list[int]:
    """The examples in a row of a batch; the tokens of example n are all n + 1."""
    found = batch["tokens"][row].reshape(-1)
    if "lengths" in batch:
        found = found[: batch["lengths"][row]] if batch["loss_weights"][row] else found[:0]
    return [int(n) - 1 for n in dict.fromkeys(found.tolist()) if n]


def open_reader(folder: Path, rng: random.Random, kind: str, rows: int) -> tuple[Read, int, int]:
    """Returns a reader, and the steps and examples of an epoch."""
    shape: dict[str, Any] = {"rows": rows, "seed": rng.randrange(1000)}
    batches: Any
    if kind == "tokens":
        length, context = rng.randint(90, 400), rng.randint(3, 9)
        length -= (length - 1) // context % rows * context  # whole steps, for counting
        path = folder / "tokens"
        np.arange(length, dtype="<u2").tofile(path)
        tokens = TokenDataset([open_shard(path, length, np.dtype("<u2"))], length, 0)
        shape |= {"context": context, "isolate_documents": True}

        def read_stream(here: Sequence[int], start: int, stop: int) -> Iterator[list[int]]:
            for batch in LMBatches(tokens, local_rows=here, **shape).iterate(start, stop):
                # The stream is a circle in which 0 and the last token are one.
                yield [int(n) % (length - 1) for n in batch["targets"].reshape(-1)]

        steps = (length - 1) // context // rows
        return read_stream, steps, steps * rows * context

    count = rng.randint(rows, 60)
    count -= count % rows if kind == "book" else 0  # which drops what is left over
    ids = [[n + 1] * rng.randint(2, 17) for n in range(count)]
    examples = [Example(x, [True] * len(x), []) for x in ids]
    shape["pad_id"] = 0
    if kind == "labels":
        batches = ClassificationBatches(ids, [0] * count, bucket_lengths=buckets(17), **shape)
    elif kind == "pairs":
        pairs, logprob_P2 = [(x, x) for x in examples], np.zeros((count, 2), np.float32)
        batches = PreferenceBatches(pairs, logprob_P2, bucket_lengths=buckets(16), **shape)
    else:
        batches = make_sft_batches(kind, examples, context=16, **shape)

    def read(here: Sequence[int], start: int, stop: int) -> Iterator[list[int]]:
        for step in range(start, stop):
            batch = batches.batch_at(step)
            yield [n for row in here for n in example_numbers(batch, row)]

    return read, batches.steps_per_epoch, count


def read_until_killed(
    read: Read, shares: Sequence[Sequence[int]], start: int, stop: int, after: int
) -> list[list[list[int]]]:
    """The batches that each process read, until all are killed after some steps."""
    children, pipes, found = [], [], []
    for here in shares:
        reading, writing = os.pipe()
        if not (child := os.fork()):
            with contextlib.suppress(BaseException), os.fdopen(writing, "w") as out:
                for step in prefetch_to_device(read(here, start, stop), lambda rows: rows):
                    print(json.dumps(step), file=out, flush=True)
            os._exit(0)
        os.close(writing)
        children.append(child)
        pipes.append(os.fdopen(reading))
    seen = list(itertools.islice(pipes[0], after + 1))
    for child, pipe in zip(children, pipes, strict=True):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with pipe:
            lines, seen = [*seen, *pipe], []
        found.append([json.loads(line) for line in lines if line.endswith("\n")])
    return found


def fault_of(folder: Path, case: int, rng: random.Random) -> str:
    rows, kind = rng.choice((2, 4, 8)), KINDS[case % len(KINDS)]
    read, per_epoch, count = open_reader(folder, rng, kind, rows)
    stop, every = EPOCHS * per_epoch, rng.randint(1, 5)
    committed: list[list[int]] = []
    while len(committed) < stop:
        processes = rng.choice([n for n in (1, 2, 4) if n <= rows])
        shares = [part.tolist() for part in np.split(np.arange(rows), processes)]
        after = rng.randint(0, 2 * every + per_epoch)
        parts = read_until_killed(read, shares, len(committed), stop, after)
        committed += [[n for share in step for n in share] for step in zip(*parts, strict=False)]
        if len(committed) < stop:  # the last checkpoint
            del committed[len(committed) // every * every :]
    (unbroken,) = read_until_killed(read, [range(rows)], 0, stop, stop)
    if committed != unbroken:
        return f"{kind}: other rows than without kills"
    for epoch in range(EPOCHS):
        seen = [n for step in committed[epoch * per_epoch :][:per_epoch] for n in step]
        if not len(seen) == len(set(seen)) == count:
            return f"{kind}: epoch {epoch}: {len(set(seen))} of {count} in {len(seen)} rows"
    return ""


def prepare(folder: Path) -> Callable[[int, random.Random], str]:
    """Each case has a process of its own, which has no threads yet, and so may fork."""
    return lambda case, rng: run_jobs((fault_of, folder, case, rng))
