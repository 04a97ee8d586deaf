"""Each example once an epoch, whoever reads, in whatever parts, killed at any time.

Of each case, some processes share the rows of every step and read ahead with some
threads; all are killed with SIGKILL once a few steps were read, and others, of another
number, go on from the last step that was a multiple of the interval between
checkpoints. What was read up to there is what one reader that is never killed reads.

    python -m tests.chaos.exact_epochs FOLDER SEED CASE ...    what `run` starts
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

import gptjax.book  # noqa: F401 (the values "book")
from gptjax.data import lm as token_batches
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


def examples(lot: random.Random, count: int) -> list[Example]:
    """Examples of several lengths, each of which has its own number as tokens."""
    lengths = [lot.randint(2, 17) for _ in range(count)]
    return [Example([n + 1] * k, [True] * k, []) for n, k in enumerate(lengths)]


def numbers(batch: Any, row: int) -> list[int]:
    """Which examples a row of a batch has."""
    found = batch["tokens"][row].reshape(-1)
    if "lengths" in batch:
        found = found[: batch["lengths"][row]] if batch["loss_weights"][row] else found[:0]
    return [int(n) - 1 for n in dict.fromkeys(found.tolist()) if n]


def stream_of(folder: Path, lot: random.Random, rows: int) -> tuple[Read, int, int]:
    """Rows of a stream of tokens: a reader, steps of an epoch, examples of one."""
    length, context = lot.randint(90, 400), lot.randint(3, 9)
    length -= (length - 1) // context % rows * context  # whole steps, for counting
    path = folder / "tokens"
    np.arange(length, dtype="<u2").tofile(path)
    tokens = open_shards([TokenShard(path, length, np.dtype("<u2"))], length, 0)
    seed = lot.randrange(1000)

    def read(here: Sequence[int], start: int, stop: int) -> Iterator[list[int]]:
        made = make_batches(
            tokens, rows=rows, context=context, seed=seed, isolate_documents=True, local_rows=here
        )
        for batch in made.iterate(start, stop):
            # The stream is a circle in which 0 and the last token are one.
            yield [int(n) % (length - 1) for n in batch["targets"].reshape(-1)]

    per_epoch = (length - 1) // context
    return read, per_epoch // rows, per_epoch * context


def examples_of(lot: random.Random, kind: str, rows: int) -> tuple[Read, int, int]:
    """Examples of a kind: a reader, steps of an epoch, examples of one."""
    count, seed = lot.randint(rows, 60), lot.randrange(1000)
    count -= count % rows if kind == "book" else 0  # which drops what is left over
    found = examples(lot, count)
    shape: dict[str, Any] = {"rows": rows, "pad_id": 0, "seed": seed}
    made: Any
    if kind == "labels":
        ids = [x.ids for x in found]
        made = ClassificationBatches(ids, [0] * count, bucket_lengths=buckets(17), **shape)
    elif kind == "pairs":
        pairs, logprob_P2 = [(x, x) for x in found], np.zeros((count, 2), np.float32)
        made = PreferenceBatches(pairs, logprob_P2, bucket_lengths=buckets(16), **shape)
    else:
        made = make_sft_batches(kind, found, context=16, **shape)

    def read(here: Sequence[int], start: int, stop: int) -> Iterator[list[int]]:
        for step in range(start, stop):
            batch = made.batch_at(step)
            yield [n for row in here for n in numbers(batch, row)]

    return read, made.steps_per_epoch, count


def killed(
    read: Read, shares: Sequence[Sequence[int]], start: int, stop: int, after: int
) -> list[list[list[int]]]:
    """What each process read, of which all are killed after `after` steps of one."""
    found: list[list[list[int]]] = []
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
    seen = []
    for line in pipes[0]:
        seen.append(line)
        if len(seen) > after:
            break
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for number, pipe in enumerate(pipes):
        with pipe:
            lines = [*(seen if number == 0 else []), *pipe]
        found.append([json.loads(line) for line in lines if line.endswith("\n")])
    return found


def fault_of(folder: Path, seed: int, case: int) -> str:
    """What went wrong with a case, or ""."""
    lot = random.Random(f"{seed} {case}")
    rows, kind = lot.choice((2, 4, 8)), KINDS[case % len(KINDS)]
    if kind == "tokens":
        read, per_epoch, count = stream_of(folder, lot, rows)
    else:
        read, per_epoch, count = examples_of(lot, kind, rows)
    stop, every = EPOCHS * per_epoch, lot.randint(1, 5)
    committed: list[list[int]] = []
    kills = 0
    while len(committed) < stop:
        threads = lot.choice((1, 1, 2, 4))
        token_batches.PREFETCH_OPTIONS = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=lot.choice((4, 8))
        )
        processes = lot.choice([n for n in (1, 2, 4) if n <= rows])
        shares = [part.tolist() for part in np.split(np.arange(rows), processes)]
        after = lot.randint(0, 2 * every + per_epoch)
        parts = killed(read, shares, len(committed), stop, after)
        kills += 1
        steps = [[n for share in step for n in share] for step in zip(*parts, strict=False)]
        done = len(committed) + len(steps)
        done = done if done == stop else done // every * every
        committed += steps[: max(done - len(committed), 0)]
        if kills > 1000:
            return f"{kind}: after 1,000 kills only {len(committed)} of {stop} steps"
    (unbroken,) = killed(read, [range(rows)], 0, stop, stop)
    if committed != unbroken:
        return f"{kind}: after {kills} kills, other rows than without"
    for epoch in range(EPOCHS):
        part = committed[epoch * per_epoch : (epoch + 1) * per_epoch]
        times = Counter(n for step in part for n in step)
        if len(times) != count or set(times.values()) != {1}:
            twice = sum(n > 1 for n in times.values())
            lost = count - len(times)
            return f"{kind}: epoch {epoch}: {lost} of {count} lost, {twice} doubled"
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
