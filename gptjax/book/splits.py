"""Splits of chapters 6 and 7, row by row: `data.split_strategy = "book"`."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.data.classification import LabeledTexts, take
from gptjax.data.conversations import ConversationOrPair
from gptjax.data.splits import class_indices
from gptjax.data.text import ALL_SPLITS
from gptjax.errors import DataError

BOOK_SPLIT_SEED = 123


def book_split(rows: Any) -> dict[str, Any]:
    """Splits labeled texts as in chapter 6, and conversations as in chapter 7."""
    if isinstance(rows, LabeledTexts):
        return book_classification_split(rows)
    return book_instruction_split(rows)


def book_classification_split(data: LabeledTexts) -> dict[str, LabeledTexts]:
    """Balances two classes, shuffles and splits 70:10:20, like the book.

    Selects the same rows as pandas' `sample(n, random_state=123)`.
    """
    if len(data.class_names) != 2:
        raise DataError(
            "data.split_strategy=book requires two classes, not "
            f"{len(data.class_names)}. Use data.split_strategy=stratified."
        )
    larger, smaller = sorted(class_indices(data), key=len, reverse=True)
    sampled = larger[book_sample(len(larger), len(smaller))]
    rows = np.concatenate([sampled, smaller])
    rows = rows[book_sample(len(rows), len(rows))]
    if len(rows) < 10:
        raise DataError(
            f"data.split_strategy=book leaves {len(rows)} rows and no validation rows. "
            "Provide at least 5 rows per class, or use data.split_strategy=stratified."
        )
    train_end = int(len(rows) * 0.7)
    parts = np.split(rows, [train_end, train_end + int(len(rows) * 0.1)])
    return {split: take(data, part) for split, part in zip(ALL_SPLITS, parts, strict=True)}


def book_sample(count: int, size: int) -> np.ndarray:
    """Samples `size` of the indices below `count` without replacement."""
    return np.random.RandomState(BOOK_SPLIT_SEED).choice(count, size=size, replace=False)


def book_csv(data: LabeledTexts) -> str:
    """Returns the rows in the format of the book's CSV files, for comparison."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["Label", "Text"])
    writer.writerows(zip(data.labels, data.texts, strict=True))
    return text.getvalue()


def book_instruction_split(
    items: Sequence[ConversationOrPair],
) -> dict[str, Sequence[ConversationOrPair]]:
    """Splits train:test:validation 85:10:5 in file order (Raschka 2024, ch. 7)."""
    if len(items) < 10:
        raise DataError(
            f"data.split_strategy=book leaves no test rows of {len(items)}. Provide at "
            "least 10 rows, or use data.split_strategy=stratified."
        )
    train = int(len(items) * 0.85)
    test = train + int(len(items) * 0.1)
    parts = (items[:train], items[test:], items[train:test])
    return dict(zip(ALL_SPLITS, parts, strict=True))
