"""Splits of labeled texts: proportions, balance, duplicates."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.classification import LabeledTexts
from gptjax.data.splits import describe_dropped, drop_duplicates, stratified_split
from gptjax.data.text import ALL_SPLITS
from gptjax.errors import ConfigError, DataError
from tests.data.tables import quick

DEFAULTS = {"strategy": "stratified", "val_fraction": 0.1, "test_fraction": 0.2, "seed": 0}
DEFAULTS |= {"balance_classes": False}


def make_rows(*counts, texts=1_000_000):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return LabeledTexts(
        [" " * (n % 2) + f"text {n % texts} of {label}" for n, label in enumerate(labels)],
        labels,
        tuple("abcdefgh"[: len(counts)]),
        [f"a.csv:{n + 1}" for n in range(len(labels))],
    )


def split(data, **changes):
    return stratified_split(data, **{**DEFAULTS, **changes})


def rows_of(data):
    return list(zip(data.texts, data.labels, data.locations, strict=True))


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
    shares = dict(zip(ALL_SPLITS, (1 - val - test, val, test), strict=True))
    assert list(splits) == [name for name, share in shares.items() if share]
    for label, count in enumerate(kept):
        sizes = {name: part.labels.count(label) for name, part in splits.items()}
        assert min(sizes.values()) >= 1
        if min(shares[name] * count for name in splits) >= 1:
            assert all(abs(sizes[name] - shares[name] * count) < 1 for name in splits)


def test_rows_are_shuffled_drawn_from_the_whole_class_and_once_if_repeated():
    data, repeated, first = make_rows(400, 50), make_rows(40, 50, texts=7), {}

    one, other = (split(data, seed=seed, balance_classes=True) for seed in (1, 2))
    unique = drop_duplicates(repeated)

    assert set(one["test"].locations) != set(other["test"].locations)
    # Sorted rows would make the first batches of an evaluation all of one class.
    assert len(set(one["train"].labels[:20])) == len(set(one["test"].labels[:10])) == 2
    assert any(200 < int(place[6:]) <= 400 for place in one["train"].locations)
    for row in rows_of(repeated):
        first.setdefault(row[0].strip(), row)
    assert rows_of(unique) == list(first.values())
    (line,) = describe_dropped(repeated, [unique], "repeated")
    assert "76 of 90 rows: b (43), a (33); repeated" in line
    assert not describe_dropped(data, split(data).values(), "")


def test_impossible_splits_are_rejected():
    two_labels = LabeledTexts(["hi", " hi"], [0, 1], ("ham", "spam"), ["a.csv:1", "a.csv:9"])
    for data, changes, kind, value in [
        (make_rows(9, 2), {}, DataError, "'b' has 2 rows"),
        (make_rows(9, 9), {"val_fraction": 0.8}, ConfigError, r"data\.val_fraction=0\.8"),
        (make_rows(9, 9), {"strategy": "boook"}, ConfigError, r"data\.split_strategy='boook'"),
    ]:
        with pytest.raises(kind, match=value):
            split(data, **changes)
    with pytest.raises(DataError, match=r"^a\.csv:9: .*'spam'.*'ham' at a\.csv:1"):
        drop_duplicates(two_labels)
