"""Training, validation and test splits of labeled texts."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.data.classification import LabeledTexts, take
from gptjax.data.text import ALL_SPLITS
from gptjax.errors import ConfigError, DataError
from gptjax.plugins import load_plugin

# Splits all rows, labeled texts or conversations, by the name of the split.
SplitFn = Callable[[Any], dict[str, Any]]
MAX_TABLE_CLASSES = 20  # classes with a table row of their own


def stratified_split(
    data: LabeledTexts,
    strategy: str,
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    balance_classes: bool,
) -> dict[str, LabeledTexts]:
    """Splits labeled texts by class; omits splits with a fraction of 0.

    `strategy` is "stratified", or that of a plugin, which uses no later argument.
    `balance_classes` first downsamples all classes to the smallest.
    """
    if strategy != "stratified":
        return load_plugin("data.split_strategy", strategy)(data)
    shares = split_shares(val_fraction, test_fraction)
    generator = np.random.default_rng(seed)
    rows_by_class = class_indices(data)
    if balance_classes:
        smallest = min(map(len, rows_by_class))
        rows_by_class = [generator.permutation(rows)[:smallest] for rows in rows_by_class]
    parts = [
        split_indices(generator.permutation(rows), shares, f"class {name!r}")
        for name, rows in zip(data.class_names, rows_by_class, strict=True)
    ]
    return {
        split: take(data, generator.permutation(np.concatenate([part[split] for part in parts])))
        for split in shares
    }


def class_indices(data: LabeledTexts) -> list[np.ndarray]:
    """Returns the row indices of each class."""
    label = np.asarray(data.labels)
    return [np.flatnonzero(label == number) for number in range(len(data.class_names))]


def split_shares(val_fraction: int | float, test_fraction: int | float) -> dict[str, float]:
    """Returns the fraction of each split that is not empty."""
    if val_fraction + test_fraction >= 1:
        raise ConfigError(
            f"data.val_fraction={val_fraction} and data.test_fraction={test_fraction} "
            "leave no training rows. Choose fractions with a sum below 1."
        )
    fractions = (1.0 - val_fraction - test_fraction, val_fraction, test_fraction)
    return {name: share for name, share in zip(ALL_SPLITS, fractions, strict=True) if share}


def split_indices(
    indices: np.ndarray, shares: Mapping[str, float], subject: str
) -> dict[str, np.ndarray]:
    """Splits row indices in proportion to the shares; `subject` names the rows."""
    if len(indices) < len(shares):
        raise DataError(
            f"{subject} has {len(indices)} row{'s' * (len(indices) != 1)}, but each of "
            f"{len(shares)} splits needs one. Add rows, or set data.test_fraction or "
            "data.val_fraction to 0."
        )
    boundaries = np.cumsum(split_sizes(len(indices), list(shares.values())))[:-1]
    return dict(zip(shares, np.split(indices, boundaries), strict=True))


def split_sizes(num_rows: int, shares: Sequence[float]) -> list[int]:
    """Returns the rows per split: proportional, but at least one each.

    >>> split_sizes(101, [0.7, 0.1, 0.2])
    [71, 10, 20]
    >>> split_sizes(4, [0.98, 0.01, 0.01])
    [2, 1, 1]
    """
    ideal = [num_rows * share for share in shares]
    sizes = [int(size) for size in ideal]
    by_remainder = sorted(range(len(shares)), key=lambda i: sizes[i] - ideal[i])
    for i in by_remainder[: num_rows - sum(sizes)]:
        sizes[i] += 1
    while 0 in sizes:
        sizes[sizes.index(max(sizes))] -= 1
        sizes[sizes.index(0)] += 1
    return sizes


def hash_texts(texts: Iterable[str]) -> np.ndarray:
    """Hashes each text, so that the texts themselves need not be in memory."""
    return np.fromiter(map(hash, texts), np.int64)


def drop_duplicates(data: LabeledTexts) -> LabeledTexts:
    """Drops rows with a text that occurred before, apart from outer whitespace."""
    hashes = hash_texts(text.strip() for text in data.texts)
    _, first_rows, group = np.unique(hashes, return_index=True, return_inverse=True)
    labels = np.asarray(data.labels)
    conflicts = np.flatnonzero(labels != labels[first_rows][group])
    if len(conflicts):
        row, first = conflicts[0], first_rows[group[conflicts[0]]]
        label, other = (data.class_names[labels[n]] for n in (row, first))
        raise DataError(
            f"{data.locations[row]}: the text {data.texts[row].strip()!r:.50} has the label "
            f"{label!r}, but {other!r} at {data.locations[first]}. Correct one, or keep both "
            "with --data.deduplicate false."
        )
    return take(data, np.sort(first_rows))


def describe_dropped(before: LabeledTexts, after: Iterable[LabeledTexts], reason: str) -> list[str]:
    """Formats how many rows of each class were dropped, as one line, or none."""
    kept = Counter(label for part in after for label in part.labels)
    dropped = (Counter(before.labels) - kept).most_common()
    names = [f"{before.class_names[label]} ({n:,})" for label, n in dropped[:MAX_TABLE_CLASSES]]
    count, more = sum(n for _, n in dropped), " ..." * (len(dropped) > len(names))
    line = f"dropped  {count:,} of {len(before):,} rows: {', '.join(names)}{more}; {reason}"
    return [line] * bool(dropped)


def describe_splits(splits: dict[str, LabeledTexts]) -> list[str]:
    """Formats class counts, majority-class accuracy and overlap between splits."""
    counts = [Counter(part.labels) for part in splits.values()]
    names = next(iter(splits.values())).class_names
    majority_class = max(range(len(names)), key=lambda label: counts[0][label])
    rows = [("", list(splits))]
    for label, name in enumerate(names[:MAX_TABLE_CLASSES]):
        rows.append((name, [f"{count[label]:,}" for count in counts]))
    rows.append((f"all {len(names)} classes", [f"{count.total():,}" for count in counts]))
    accuracies = [f"{count[majority_class] / count.total():.2%}" for count in counts]
    rows.append((f"always {names[majority_class]}", accuracies))
    lines = [f"{name:<30.30}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows]
    return [*lines, *describe_overlap(splits)]


def describe_overlap(splits: dict[str, LabeledTexts]) -> list[str]:
    """Formats how many texts occur in more than one split."""
    texts = {name: hash_texts(part.texts) for name, part in splits.items()}
    pairs = itertools.combinations(texts, 2)
    counts = {(a, b): len(np.intersect1d(texts[a], texts[b])) for a, b in pairs}
    if not any(counts.values()):
        return ["no text occurs in more than one split"]
    shared = [f"{count:,} in {one} and {other}" for (one, other), count in counts.items()]
    return [
        f"texts occur in more than one split ({', '.join(shared)}), which inflates the test "
        "scores; remove duplicates with --data.deduplicate true"
    ]
