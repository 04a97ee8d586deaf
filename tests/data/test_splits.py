"""How labelled rows are divided."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data import splits as folds
from gptjax.data.classification import LabeledTexts, read_labeled_texts, take
from gptjax.data.splits import describe_splits, split_sizes, stratified_split
from gptjax.errors import ConfigError, DataError

quiet = settings(deadline=None, derandomize=True, max_examples=100)
DEFAULTS = {
    "strategy": "stratified",
    "val_fraction": 0.1,
    "test_fraction": 0.2,
    "seed": 0,
    "balance_classes": False,
    "deduplicate": False,
}


def rows_of(*counts: int, texts: int = 1_000_000) -> LabeledTexts:
    """As many rows of each class, of which each class has its own `texts`."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return LabeledTexts(
        [f" text {n % texts} of {label} " for n, label in enumerate(labels)],
        labels,
        tuple("abcdefgh"[: len(counts)]),
        [f"a.csv:{n + 1}" for n in range(len(labels))],
    )


def split(data: LabeledTexts, **changes: object) -> dict[str, LabeledTexts]:
    """The splits by the defaults and what differs from them."""
    return stratified_split(data, **{**DEFAULTS, **changes})


def rows(data: LabeledTexts) -> list[tuple[str, int, str]]:
    """All that is known of each row."""
    return list(zip(data.texts, data.labels, data.locations, strict=True))


classes = st.lists(st.integers(3, 60), min_size=2, max_size=5)
fractions = st.tuples(
    st.sampled_from([0.0, 0.01, 0.1, 0.25, 0.45]), st.sampled_from([0.0, 0.05, 0.2, 1 / 3, 0.5])
)


@pytest.mark.fast
@quiet
@given(classes, fractions, st.integers(0, 9), st.booleans())
def test_each_row_is_in_one_split(counts, parts, seed, balance):
    data = rows_of(*counts)

    splits = split(
        data, val_fraction=parts[0], test_fraction=parts[1], seed=seed, balance_classes=balance
    )

    found = [row for part in splits.values() for row in rows(part)]
    assert len(found) == len(set(found))
    assert set(found) <= set(rows(data))
    if not balance:
        assert len(found) == len(data)
    assert list(splits) == [
        name for name, share in zip(folds.ALL_SPLITS, (1, *parts), strict=True) if share
    ]
    assert all(part.class_names == data.class_names for part in splits.values())


@quiet
@given(classes, fractions)
def test_each_split_has_its_share_of_each_class_within_one_row(counts, parts):
    val, test = parts
    splits = split(rows_of(*counts), val_fraction=val, test_fraction=test)

    shares = {"train": 1 - val - test, "validation": val, "test": test}
    for label, count in enumerate(counts):
        found = {name: Counter(part.labels)[label] for name, part in splits.items()}
        assert min(found.values()) >= 1
        ideal = {name: shares[name] * count for name in splits}
        if min(ideal.values()) >= 1:
            assert all(abs(found[name] - ideal[name]) < 1 for name in splits)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("count", "shares", "sizes"),
    [
        (10, [0.7, 0.1, 0.2], [7, 1, 2]),
        (10, [1 - 0.1 - 0.2, 0.1, 0.2], [7, 1, 2]),
        (1000, [1 - 0.9, 0.9], [100, 900]),
        (3, [0.98, 0.01, 0.01], [1, 1, 1]),
        (4, [0.1, 0.45, 0.45], [1, 1, 2]),
        (5, [1.0], [5]),
        (747, [0.7, 0.1, 0.2], [523, 75, 149]),
    ],
)
def test_sizes_are_as_near_to_the_shares_as_can_be(count, shares, sizes):
    assert split_sizes(count, shares) == sizes


@quiet
@given(classes, st.integers(0, 9))
def test_the_same_seed_gives_the_same_splits(counts, seed):
    first, second = (split(rows_of(*counts), seed=seed) for _ in range(2))

    assert first == second


def test_selected_rows_keep_their_order_label_and_place():
    data = rows_of(2, 1)

    chosen = take(data, [2, 0])

    assert rows(chosen) == [rows(data)[2], rows(data)[0]]
    assert chosen.class_names == data.class_names


def test_another_seed_gives_other_splits_in_a_mixed_order():
    data = rows_of(50, 50)

    first, second = split(data, seed=1), split(data, seed=2)

    assert set(first["test"].locations) != set(second["test"].locations)
    # Sorted rows would make the first batches of an evaluation all of one class.
    assert len(set(first["train"].labels[:20])) == 2
    assert len(set(first["test"].labels[:10])) == 2


@quiet
@given(st.lists(st.integers(5, 60), min_size=2, max_size=5), st.integers(0, 9))
def test_balanced_classes_have_equal_counts_in_every_split(counts, seed):
    splits = split(rows_of(*counts), balance_classes=True, seed=seed)

    for part in splits.values():
        assert len(set(Counter(part.labels).values())) == 1
        assert len(Counter(part.labels)) == len(counts)
    assert sum(map(len, splits.values())) == min(counts) * len(counts)


def test_balanced_rows_are_drawn_from_the_whole_class():
    splits = split(rows_of(400, 20), balance_classes=True)

    kept = [
        int(place.split(":")[1])
        for part in splits.values()
        for label, place in zip(part.labels, part.locations, strict=True)
        if label == 0
    ]

    assert len(kept) == 20
    assert max(kept) > 200


@quiet
@given(st.lists(st.integers(30, 60), min_size=2, max_size=3), st.integers(3, 40))
def test_without_repeats_no_text_is_in_two_splits(counts, texts):
    data = rows_of(*counts, texts=texts)
    spaces = [text * (n % 2) + text.strip() * (1 - n % 2) for n, text in enumerate(data.texts)]
    data = LabeledTexts(spaces, data.labels, data.class_names, data.locations)

    splits = split(data, deduplicate=True)

    found = [text.strip() for part in splits.values() for text in part.texts]
    assert len(found) == len(set(found))
    assert set(found) == {text.strip() for text in data.texts}


def test_of_repeats_the_first_is_kept():
    data = LabeledTexts(
        list("xyxzwyuvt"), [0, 1, 0, 0, 0, 1, 1, 1, 1], ("a", "b"), list("123456789")
    )

    splits = split(data, deduplicate=True)

    places = sorted(place for part in splits.values() for place in part.locations)
    assert places == list("1245789")


def test_one_text_with_two_labels_is_refused_without_repeats():
    data = LabeledTexts(["hi", " hi"], [0, 1], ("ham", "spam"), ["a.csv:1", "a.csv:9"])

    with pytest.raises(
        DataError,
        match=r"^a\.csv:9: the text 'hi' has the label 'spam', but 'ham' at a\.csv:1\. "
        r".* --data\.deduplicate false\.$",
    ):
        split(data, deduplicate=True)


@pytest.mark.fast
def test_what_cannot_be_divided_is_refused():
    for counts, message in [
        ((9, 2), r"class 'b' has 2 rows, but each of 3 splits needs one\. Add "),
        ((1, 9), "class 'a' has 1 row, but each of 3 splits"),
    ]:
        with pytest.raises(DataError, match=message):
            split(rows_of(*counts))
    with pytest.raises(ConfigError, match=r"val_fraction=0\.5 and .*test_fraction=0\.5 "):
        split(rows_of(9, 9), val_fraction=0.5, test_fraction=0.5)


@pytest.fixture
def sms(shared_data):
    """The SMS collection, where it is on this machine."""
    return read_labeled_texts("sms-spam")[0]


def test_stratified_rows_of_the_sms_collection_keep_its_share_of_ham(sms):
    splits = split(sms)

    assert [len(part) for part in splits.values()] == [3901, 557, 1114]
    assert describe_splits(splits)[4].split()[2:] == ["86.59%", "86.54%", "86.62%"]


def test_the_constant_answer_is_the_one_most_frequent_in_training():
    lines = describe_splits({"train": rows_of(1, 3), "test": rows_of(3, 1)})

    assert lines[-2].split() == ["always", "b", "75.00%", "25.00%"]


def test_classes_beyond_the_table_are_counted_together(monkeypatch):
    monkeypatch.setattr(folds, "MAX_TABLE_CLASSES", 2)

    lines = describe_splits(split(rows_of(10, 20, 30, 40), test_fraction=0.0))

    assert [line.split() for line in lines[:5]] == [
        ["train", "validation"],
        ["a", "9", "1"],
        ["b", "18", "2"],
        ["2", "more", "classes", "63", "7"],
        ["all", "90", "10"],
    ]
