"""Labelled texts divided into training, validation and test rows.

`stratified` gives each split the same shares of the classes. `book` is the procedure
of "Build a Large Language Model (From Scratch)", chapter 6, row by row, so that its
numbers can be compared with.
"""

import csv
import io
from collections import Counter
from collections.abc import Sequence

import numpy as np

from gptjax.config import suggestion
from gptjax.data.labelled import Labelled, select
from gptjax.errors import ConfigError, DataError

SPLITS = ("train", "validation", "test")
BOOK_SEED = 123
SHOWN = 20  # classes that have a line in the table


def split_rows(
    data: Labelled,
    how: str,
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    balance: bool,
    dedupe: bool,
) -> dict[str, Labelled]:
    """The rows of each split; one whose fraction is 0 is left out.

    Args:
        data: all rows.
        how: "stratified", or "book", which has fractions, a seed and balanced classes
            of its own.
        val_fraction: of the rows, held out.
        test_fraction: of the rows, held out.
        seed: of the lot that picks and orders the rows.
        balance: cut each class down to the size of the smallest, before it is split.
        dedupe: leave out rows whose text came before; spaces around it do not count.

    Raises:
        ConfigError: the way is unknown, or the fractions leave nothing to train on.
        DataError: a class has too few rows, or a text has two labels.
    """
    if dedupe:
        data = without_repeats(data)
    if how == "book":
        return book_splits(data)
    if how != "stratified":
        raise ConfigError(
            f"data.split={how!r} is unknown.{suggestion(how, ('stratified', 'book'))} "
            "Choose stratified or book."
        )
    if val_fraction + test_fraction >= 1:
        raise ConfigError(
            f"data.val_fraction={val_fraction} and data.test_fraction={test_fraction} "
            "leave nothing to train on. Choose fractions whose sum is below 1."
        )
    generator = np.random.default_rng(seed)
    classes = class_indices(data)
    if balance:
        smallest = min(map(len, classes))
        classes = [generator.permutation(rows)[:smallest] for rows in classes]
    shares = (1 - val_fraction - test_fraction, val_fraction, test_fraction)
    chosen: dict[str, list[np.ndarray]] = {
        name: [] for name, share in zip(SPLITS, shares, strict=True) if share
    }
    for name, rows in zip(data.names, classes, strict=True):
        sizes = split_sizes(len(rows), [share for share in shares if share], name)
        cuts = np.cumsum(sizes)[:-1]
        parts = np.split(generator.permutation(rows), cuts)
        for split, part in zip(chosen, parts, strict=True):
            chosen[split].append(part)
    return {
        split: select(data, generator.permutation(np.concatenate(parts)))
        for split, parts in chosen.items()
    }


def class_indices(data: Labelled) -> list[np.ndarray]:
    """The indices of the rows of each class."""
    label = np.asarray(data.labels)
    return [np.flatnonzero(label == number) for number in range(len(data.names))]


def split_sizes(count: int, shares: Sequence[float], name: str) -> list[int]:
    """How many of a class's rows each split gets: at least one, else as near as can be.

    >>> split_sizes(101, [0.7, 0.1, 0.2], "ham")
    [71, 10, 20]
    >>> split_sizes(4, [0.98, 0.01, 0.01], "ham")
    [2, 1, 1]
    """
    if count < len(shares):
        raise DataError(
            f"class {name!r} has {count} {'row' if count == 1 else 'rows'}, but each "
            f"of {len(shares)} splits needs one. Add some, leave the class out, or set "
            "data.test_fraction or data.val_fraction to 0."
        )
    ideal = [count * share for share in shares]
    sizes = [int(size) for size in ideal]
    by_rest = sorted(range(len(shares)), key=lambda i: sizes[i] - ideal[i])
    for i in by_rest[: count - sum(sizes)]:
        sizes[i] += 1
    while 0 in sizes:
        sizes[sizes.index(max(sizes))] -= 1
        sizes[sizes.index(0)] += 1
    return sizes


def without_repeats(data: Labelled) -> Labelled:
    """The rows whose text did not come before."""
    first: dict[str, int] = {}
    for i, text in enumerate(data.texts):
        before = first.setdefault(text.strip(), i)
        if data.labels[before] != data.labels[i]:
            raise DataError(
                f"{data.places[i]}: the text {text.strip()!r:.50} has the label "
                f"{data.names[data.labels[i]]!r}, but "
                f"{data.names[data.labels[before]]!r} at {data.places[before]}. "
                "Correct one, or keep both: --data.dedupe false."
            )
    return select(data, first.values())


def book_splits(data: Labelled) -> dict[str, Labelled]:
    """Both classes cut to one size, shuffled, and divided 70 : 10 : 20.

    The numbers are those of pandas' `sample(n, random_state=123)`.
    """
    if len(data.names) != 2:
        raise DataError(
            f"data.split=book divides two classes, not {len(data.names)}. Choose "
            "data.split=stratified."
        )
    larger, smaller = sorted(class_indices(data), key=len, reverse=True)
    sampled = larger[book_sample(len(larger), len(smaller))]
    rows = np.concatenate([sampled, smaller])
    rows = rows[book_sample(len(rows), len(rows))]
    if len(rows) < 10:
        raise DataError(
            f"data.split=book leaves {len(rows)} rows, of which none would be for "
            "validation. Give each class 5 or more, or choose data.split=stratified."
        )
    train_end = int(len(rows) * 0.7)
    parts = np.split(rows, [train_end, train_end + int(len(rows) * 0.1)])
    return {
        split: select(data, part) for split, part in zip(SPLITS, parts, strict=True)
    }


def book_sample(count: int, size: int) -> np.ndarray:
    """`size` of the indices below `count`, in the order they are drawn."""
    return np.random.RandomState(BOOK_SEED).choice(count, size=size, replace=False)


def book_csv(data: Labelled) -> str:
    """The rows as the book's .csv files have them, to compare with those."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["Label", "Text"])
    writer.writerows(zip(data.labels, data.texts, strict=True))
    return text.getvalue()


def describe(splits: dict[str, Labelled]) -> list[str]:
    """Lines for people: classes, the accuracy of a constant answer, shared texts."""
    parts = list(splits.values())
    counts = [Counter(part.labels) for part in parts]
    names = parts[0].names
    answer = max(range(len(names)), key=lambda label: counts[0][label])
    table = [["", *splits]]
    for label, name in list(enumerate(names))[:SHOWN]:
        table.append([f"{name:.30}", *(f"{count[label]:,}" for count in counts)])
    if len(names) > SHOWN:
        more = [sum(c[i] for i in range(SHOWN, len(names))) for c in counts]
        table.append([f"{len(names) - SHOWN} more classes", *(f"{n:,}" for n in more)])
    table.append(["all", *(f"{len(part):,}" for part in parts)])
    rates = [
        count[answer] / max(len(part), 1)
        for count, part in zip(counts, parts, strict=True)
    ]
    table.append([f"always {names[answer]:.30}", *(f"{rate:.2%}" for rate in rates)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
        for first, *cells in table
    ]
    return [*lines, *describe_shared(splits)]


def describe_shared(splits: dict[str, Labelled]) -> list[str]:
    """A line about texts that are in more than one split, or none."""
    texts = {name: set(part.texts) for name, part in splits.items()}
    counts = Counter(text for found in texts.values() for text in found)
    shared = sum(count > 1 for count in counts.values())
    if not shared:
        return ["no text is in more than one split"]
    pairs = [
        f"{len(texts[one] & texts[other]):,} in {one} and {other}"
        for i, one in enumerate(texts)
        for other in list(texts)[i + 1 :]
    ]
    return [
        f"{shared:,} texts are in more than one split ({', '.join(pairs)}), which "
        "flatters the result; leave repeats out: --data.dedupe true"
    ]
