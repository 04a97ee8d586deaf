"""Each example once an epoch, whoever reads, in whatever parts, killed at any time.

Of each case, some processes share the rows of every step and read ahead with some
threads; all are killed with SIGKILL once a few steps were read, and others, of another
number, go on from the last step that was a multiple of the interval between
checkpoints. What was read up to there is what one reader that is never killed reads.

    python -m tests.chaos.exact_epochs FOLDER SEED CASE ...    what `run` starts
"""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

import gptjax.book  # noqa: F401 (the values "book")
from gptjax.data import lm
from gptjax.data.bucketing import buckets
from gptjax.data.classification import ClassificationBatches
from gptjax.data.lm import make_batches
from gptjax.data.preference import PreferenceBatches
from gptjax.data.prefetch import prefetch_to_device
from gptjax.data.sft import Example, make_sft_batches
from gptjax.data.token_files import TokenShard, open_shards

FULL, SLICE = 200, 20
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


def stream_of(folder: Path, rng: random.Random, rows: int) -> tuple[Read, int, int]:
    """Rows of a stream of tokens: a reader, steps of an epoch, examples of one."""
    length, context = rng.randint(90, 400), rng.randint(3, 9)
    length -= (length - 1) // context % rows * context  # whole steps, for counting
    path = folder / "tokens"
    np.arange(length, dtype="<u2").tofile(path)
    tokens = open_shards([TokenShard(path, length, np.dtype("<u2"))], length, 0)
    options: dict[str, Any] = {"rows": rows, "context": context, "seed": rng.randrange(1000)}

    def read(here: Sequence[int], start: int, stop: int) -> Iterator[list[int]]:
        batches = make_batches(tokens, isolate_documents=True, local_rows=here, **options)
        for batch in batches.iterate(start, stop):
            # The stream is a circle in which 0 and the last token are one.
            yield [int(n) % (length - 1) for n in batch["targets"].reshape(-1)]

    per_epoch = (length - 1) // context
    return read, per_epoch // rows, per_epoch * context


def examples_of(rng: random.Random, kind: str, rows: int) -> tuple[Read, int, int]:
    """Examples of a kind: a reader, steps of an epoch, examples of one."""
    count, seed = rng.randint(rows, 60), rng.randrange(1000)
    count -= count % rows if kind == "book" else 0  # which drops what is left over
    ids = [[n + 1] * rng.randint(2, 17) for n in range(count)]
    examples = [Example(x, [True] * len(x), []) for x in ids]
    shape: dict[str, Any] = {"rows": rows, "pad_id": 0, "seed": seed}
    batches: Any
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
    """Returns the batches that each process read; kills all after `after` steps."""
    children, pipes = [], []
    for here in shares:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException), os.fdopen(writing, "w") as out:
                for step in prefetch_to_device(read(here, start, stop), lambda rows: rows):
                    print(json.dumps(step), file=out, flush=True)
            os._exit(0)
        os.close(writing)
        children.append(child)
        pipes.append(os.fdopen(reading))
    seen = list(itertools.islice(pipes[0], after + 1))
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    found = []
    for pipe in pipes:
        with pipe:
            lines, seen = [*seen, *pipe], []
        found.append([json.loads(line) for line in lines if line.endswith("\n")])
    return found


def fault_of(folder: Path, seed: int, case: int) -> str:
    """What went wrong with a case, or ""."""
    rng = random.Random(f"{seed} {case}")
    rows, kind = rng.choice((2, 4, 8)), KINDS[case % len(KINDS)]
    if kind == "tokens":
        read, per_epoch, count = stream_of(folder, rng, rows)
    else:
        read, per_epoch, count = examples_of(rng, kind, rows)
    stop, every = EPOCHS * per_epoch, rng.randint(1, 5)
    committed: list[list[int]] = []
    kills = 0
    while len(committed) < stop:
        lm.PREFETCH_OPTIONS = grain.ReadOptions(rng.choice((1, 1, 2, 4)), rng.choice((4, 8)))
        processes = rng.choice([n for n in (1, 2, 4) if n <= rows])
        shares = [part.tolist() for part in np.split(np.arange(rows), processes)]
        after = rng.randint(0, 2 * every + per_epoch)
        parts = read_until_killed(read, shares, len(committed), stop, after)
        kills += 1
        committed += [[n for share in step for n in share] for step in zip(*parts, strict=False)]
        if len(committed) < stop:  # the last checkpoint
            del committed[len(committed) // every * every :]
    (unbroken,) = read_until_killed(read, [range(rows)], 0, stop, stop)
    if committed != unbroken:
        return f"{kind}: after {kills} kills, other rows than without"
    for epoch in range(EPOCHS):
        seen = [n for step in committed[epoch * per_epoch :][:per_epoch] for n in step]
        if not len(seen) == len(set(seen)) == count:
            return f"{kind}: epoch {epoch}: {len(set(seen))} of {count} in {len(seen)} rows"
    return ""


def run(seed: int, cases: Sequence[int], folder: Path) -> Iterator[str]:
    """What went wrong with each case."""
    command = [sys.executable, "-m", "tests.chaos.exact_epochs", str(folder), str(seed)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [*command, *map(str, cases)], stdout=subprocess.PIPE, text=True, cwd=root
    ) as process:
        for line in process.stdout or []:
            yield json.loads(line)


if __name__ == "__main__":  # a process that has no threads yet, and so may fork
    for number in map(int, sys.argv[3:]):
        try:
            said = fault_of(Path(sys.argv[1]), int(sys.argv[2]), number)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        print(json.dumps(said), flush=True)
