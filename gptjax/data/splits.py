"""Training, validation and test splits of labeled texts."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.data.classification import LabeledTexts, take
from gptjax.data.text import ALL_SPLITS
from gptjax.errors import ConfigError, DataError
from gptjax.plugins import load_plugin

# Splits all rows, labeled texts or conversations, by the name of the split.
SplitFn = Callable[[Any], dict[str, Any]]
MAX_TABLE_CLASSES = 20  # classes with a table row of their own


def check_split_fractions(val_fraction: int | float, test_fraction: int | float) -> None:
    """Rejects fractions that leave no training rows."""
    if val_fraction + test_fraction >= 1:
        raise ConfigError(
            f"data.val_fraction={val_fraction} and data.test_fraction={test_fraction} "
            "leave no training rows. Choose fractions with a sum below 1."
        )


def stratified_split(
    data: LabeledTexts,
    strategy: str,
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    balance_classes: bool,
    deduplicate: bool,
) -> dict[str, LabeledTexts]:
    """Splits labeled texts by class; omits splits with a fraction of 0.

    Args:
        data: all rows.
        strategy: "stratified", or that of a plugin, which uses no other argument.
        val_fraction: fraction of the rows.
        test_fraction: fraction of the rows.
        seed: for selecting and shuffling rows.
        balance_classes: first downsample all classes to the smallest.
        deduplicate: drop rows whose text, stripped, occurred before.

    Raises:
        ConfigError: the strategy is unknown, or the fractions sum to 1 or more.
        DataError: a class has too few rows, or a text has two labels.
    """
    if deduplicate:
        data = drop_duplicates(data)
    if strategy != "stratified":
        split_fn: SplitFn = load_plugin("data.split_strategy", strategy)
        return split_fn(data)
    check_split_fractions(val_fraction, test_fraction)
    generator = np.random.default_rng(seed)
    rows_by_class = class_indices(data)
    if balance_classes:
        smallest = min(map(len, rows_by_class))
        rows_by_class = [generator.permutation(rows)[:smallest] for rows in rows_by_class]
    fractions = (1 - val_fraction - test_fraction, val_fraction, test_fraction)
    indices_by_split: dict[str, list[np.ndarray]] = {
        name: [] for name, share in zip(ALL_SPLITS, fractions, strict=True) if share
    }
    for name, rows in zip(data.class_names, rows_by_class, strict=True):
        sizes = split_sizes(len(rows), [share for share in fractions if share], name)
        boundaries = np.cumsum(sizes)[:-1]
        parts = np.split(generator.permutation(rows), boundaries)
        for split, part in zip(indices_by_split, parts, strict=True):
            indices_by_split[split].append(part)
    return {
        split: take(data, generator.permutation(np.concatenate(parts)))
        for split, parts in indices_by_split.items()
    }


def class_indices(data: LabeledTexts) -> list[np.ndarray]:
    """Returns the row indices of each class."""
    label = np.asarray(data.labels)
    return [np.flatnonzero(label == number) for number in range(len(data.class_names))]


def split_sizes(num_rows: int, shares: Sequence[float], class_name: str) -> list[int]:
    """Returns the rows of a class per split: proportional, but at least one each.

    >>> split_sizes(101, [0.7, 0.1, 0.2], "ham")
    [71, 10, 20]
    >>> split_sizes(4, [0.98, 0.01, 0.01], "ham")
    [2, 1, 1]
    """
    if num_rows < len(shares):
        raise DataError(
            f"class {class_name!r} has {num_rows} "
            f"{'row' if num_rows == 1 else 'rows'}, but each of {len(shares)} splits "
            "needs one. Add rows, remove the class, or set data.test_fraction or "
            "data.val_fraction to 0."
        )
    ideal = [num_rows * share for share in shares]
    sizes = [int(size) for size in ideal]
    by_remainder = sorted(range(len(shares)), key=lambda i: sizes[i] - ideal[i])
    for i in by_remainder[: num_rows - sum(sizes)]:
        sizes[i] += 1
    while 0 in sizes:
        sizes[sizes.index(max(sizes))] -= 1
        sizes[sizes.index(0)] += 1
    return sizes


def drop_duplicates(data: LabeledTexts) -> LabeledTexts:
    """Drops rows with a text that occurred before, apart from outer whitespace."""
    first_index: dict[str, int] = {}
    for i, text in enumerate(data.texts):
        earlier = first_index.setdefault(text.strip(), i)
        if data.labels[earlier] != data.labels[i]:
            raise DataError(
                f"{data.locations[i]}: the text {text.strip()!r:.50} has the label "
                f"{data.class_names[data.labels[i]]!r}, but "
                f"{data.class_names[data.labels[earlier]]!r} at "
                f"{data.locations[earlier]}. Correct one, or keep both with "
                "--data.deduplicate false."
            )
    return take(data, first_index.values())


def describe_splits(splits: dict[str, LabeledTexts]) -> list[str]:
    """Formats class counts, majority-class accuracy and overlap between splits."""
    parts = list(splits.values())
    counts = [Counter(part.labels) for part in parts]
    names = parts[0].class_names
    majority_class = max(range(len(names)), key=lambda label: counts[0][label])
    table = [["", *splits]]
    for label, name in list(enumerate(names))[:MAX_TABLE_CLASSES]:
        table.append([f"{name:.30}", *(f"{count[label]:,}" for count in counts)])
    if len(names) > MAX_TABLE_CLASSES:
        more = [sum(c[i] for i in range(MAX_TABLE_CLASSES, len(names))) for c in counts]
        table.append([f"{len(names) - MAX_TABLE_CLASSES} more classes", *(f"{n:,}" for n in more)])
    table.append(["all", *(f"{len(part):,}" for part in parts)])
    accuracies = [
        count[majority_class] / max(len(part), 1) for count, part in zip(counts, parts, strict=True)
    ]
    table.append([f"always {names[majority_class]:.30}", *(f"{rate:.2%}" for rate in accuracies)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([first.ljust(widths[0]), *map(str.rjust, cells, widths[1:])])
        for first, *cells in table
    ]
    return [*lines, *describe_overlap(splits)]


def describe_overlap(splits: dict[str, LabeledTexts]) -> list[str]:
    """Formats how many texts occur in more than one split."""
    texts = {name: set(part.texts) for name, part in splits.items()}
    counts = Counter(text for found in texts.values() for text in found)
    num_shared = sum(count > 1 for count in counts.values())
    if not num_shared:
        return ["no text occurs in more than one split"]
    pairs = [
        f"{len(texts[one] & texts[other]):,} in {one} and {other}"
        for i, one in enumerate(texts)
        for other in list(texts)[i + 1 :]
    ]
    return [
        f"{num_shared:,} texts occur in more than one split ({', '.join(pairs)}), "
        "which inflates the test scores; remove duplicates with --data.deduplicate true"
    ]
