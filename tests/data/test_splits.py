"""Splits of labeled texts: proportions, balance, duplicates, description."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data import splits as module
from gptjax.data.classification import LabeledTexts, read_labeled_texts
from gptjax.data.splits import describe_splits, split_sizes, stratified_split
from gptjax.data.text import ALL_SPLITS
from gptjax.errors import ConfigError, DataError
from tests.data.tables import quick

DEFAULTS = {
    "strategy": "stratified",
    "val_fraction": 0.1,
    "test_fraction": 0.2,
    "seed": 0,
    "balance_classes": False,
    "deduplicate": False,
}


def make_rows(*counts, texts=1_000_000):
    """Rows of each class, with at most `texts` distinct texts per class."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return LabeledTexts(
        [" " * (n % 2) + f"text {n % texts} of {label}" for n, label in enumerate(labels)],
        labels,
        tuple("abcdefgh"[: len(counts)]),
        [f"a.csv:{n + 1}" for n in range(len(labels))],
    )


def split(data, **changes):
    """Splits with the default options and some changes."""
    return stratified_split(data, **{**DEFAULTS, **changes})


def rows_of(data):
    """All fields of each row."""
    return list(zip(data.texts, data.labels, data.locations, strict=True))


@pytest.mark.fast
@quick
@given(
    st.lists(st.integers(5, 60), min_size=2, max_size=5),
    st.sampled_from([0.0, 0.01, 0.1, 0.25, 0.45]),
    st.sampled_from([0.0, 0.05, 0.2, 1 / 3, 0.5]),
    st.integers(0, 9),
    st.booleans(),
)
def test_each_row_is_in_one_split_with_the_share_of_its_class(counts, val, test, seed, balance):
    data = make_rows(*counts)
    options = {"val_fraction": val, "test_fraction": test, "balance_classes": balance}

    splits, again = (split(data, seed=seed, **options) for _ in range(2))

    found = [row for part in splits.values() for row in rows_of(part)]
    kept = [min(counts)] * len(counts) if balance else counts
    assert splits == again
    assert len(set(found)) == len(found) == sum(kept)
    assert set(found) <= set(rows_of(data))
    assert all(part.class_names == data.class_names for part in splits.values())
    shares = dict(zip(ALL_SPLITS, (1 - val - test, val, test), strict=True))
    assert list(splits) == [name for name, share in shares.items() if share]
    for label, count in enumerate(kept):
        sizes = {name: part.labels.count(label) for name, part in splits.items()}
        assert min(sizes.values()) >= 1
        ideal = {name: shares[name] * count for name in splits}
        if min(ideal.values()) >= 1:
            assert all(abs(sizes[name] - ideal[name]) < 1 for name in splits)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("count", "shares", "sizes"),
    [
        (10, [1 - 0.1 - 0.2, 0.1, 0.2], [7, 1, 2]),
        (1000, [1 - 0.9, 0.9], [100, 900]),
        (3, [0.98, 0.01, 0.01], [1, 1, 1]),
        (4, [0.1, 0.45, 0.45], [1, 1, 2]),
        (5, [1.0], [5]),
        (747, [0.7, 0.1, 0.2], [523, 75, 149]),
    ],
)
def test_sizes_are_as_near_to_the_shares_as_possible(count, shares, sizes):
    assert split_sizes(count, shares) == sizes


def test_rows_are_shuffled_and_drawn_from_the_whole_class():
    data = make_rows(400, 50)

    first, second = (split(data, seed=seed, balance_classes=True) for seed in (1, 2))

    assert set(first["test"].locations) != set(second["test"].locations)
    # Sorted rows would make the first batches of an evaluation all of one class.
    assert len(set(first["train"].labels[:20])) == len(set(first["test"].labels[:10])) == 2
    numbers = [int(place[6:]) for place in first["train"].locations if int(place[6:]) <= 400]
    assert max(numbers) > 200


@quick
@given(st.lists(st.integers(30, 60), min_size=2, max_size=3), st.integers(3, 40))
def test_without_duplicates_each_text_is_kept_once(counts, texts):
    data = make_rows(*counts, texts=texts)

    splits = split(data, deduplicate=True)

    found = [row for part in splits.values() for row in rows_of(part)]
    first = {}
    for row in rows_of(data):
        first.setdefault(row[0].strip(), row)
    assert sorted(found) == sorted(first.values())


def test_impossible_splits_are_rejected():
    two_labels = LabeledTexts(["hi", " hi"], [0, 1], ("ham", "spam"), ["a.csv:1", "a.csv:9"])
    for data, changes, kind, value in [
        (make_rows(9, 2), {}, DataError, "'b' has 2 rows"),
        (make_rows(9, 9), {"val_fraction": 0.8}, ConfigError, r"data\.val_fraction=0\.8"),
        (make_rows(9, 9), {"strategy": "boook"}, ConfigError, r"data\.split_strategy='boook'"),
        (two_labels, {"deduplicate": True}, DataError, r"^a\.csv:9: .*'spam'.*'ham' at a\.csv:1"),
    ]:
        with pytest.raises(kind, match=value):
            split(data, **changes)


def test_the_description_has_counts_the_constant_answer_and_overlap(monkeypatch):
    lines = describe_splits({"train": make_rows(1, 3), "test": make_rows(3, 1)})
    assert lines[-2].split() == ["always", "b", "75.00%", "25.00%"]
    assert lines[-1].startswith("2 texts occur in more than one split (2 in train and test)")

    monkeypatch.setattr(module, "MAX_TABLE_CLASSES", 2)
    lines = describe_splits(split(make_rows(10, 20, 30, 40), test_fraction=0.0))
    assert [line.split() for line in lines[:5]] == [
        ["train", "validation"],
        ["a", "9", "1"],
        ["b", "18", "2"],
        ["2", "more", "classes", "63", "7"],
        ["all", "90", "10"],
    ]
    assert lines[-1] == "no text occurs in more than one split"


def test_stratified_splits_of_the_sms_collection_keep_its_share_of_ham(shared_data):
    splits = split(read_labeled_texts("sms-spam")[0])

    assert [len(part) for part in splits.values()] == [3901, 557, 1114]
    assert describe_splits(splits)[4].split()[2:] == ["86.59%", "86.54%", "86.62%"]
    assert Counter(splits["test"].labels) == {0: 965, 1: 149}
