"""Labeled texts from tables and folders: formats, guessed columns, class names."""

import json

import pytest

from gptjax.data.classification import read_labeled_texts, take
from gptjax.errors import DataError
from tests.data.tables import csv_text, write

PAIRS = [("ham", "see you"), ("spam", "Win £9!"), ("ham", "ok, later"), ("spam", "Hi")]
OBJECTS = [{"label": n, "text": t} for n, t in PAIRS]
TABLES = [  # file, content, options, columns of text and label
    ("a.csv", csv_text([("label", "text"), *PAIRS]), (), "text", "label"),
    ("a.tsv", csv_text([("Class", "words"), *PAIRS], "\t"), (), "words", "Class"),
    ("a.jsonl.gz", "\n\n".join(map(json.dumps, OBJECTS)), (), "text", "label"),
    ("b.csv", csv_text([("text", "content"), *PAIRS]), ("", "text"), "content", "text"),
    ("c.csv", csv_text(PAIRS), ("2", "1"), "2", "1"),
    ("SMSSpamCollection", csv_text(PAIRS, "\t"), (), "text", "label"),
    ("d.csv", csv_text([("v1", "v2", "", ""), *((*x, "", 0) for x in PAIRS)]), ("v2",), "v2", "v1"),
    ("e.csv", csv_text([("", "a", "text"), *((0, *x) for x in PAIRS)]), (), "text", "a"),
]


def pairs(data):
    return [(data.class_names[n], t) for n, t in zip(data.labels, data.texts, strict=True)]


def test_each_format_gives_the_same_rows_and_the_description_names_it(tmp_path):
    for name, content, options, text, label in TABLES:
        data, description = read_labeled_texts(write(tmp_path / name, content), *options)

        assert pairs(data) == PAIRS
        assert data.class_names == ("ham", "spam")
        assert f"text in column {text!r}, label in column {label!r}" in description
    for options in (("bod",), ("label", "label")):
        with pytest.raises(DataError, match=r"csv:2: .*data\.text_column"):
            read_labeled_texts(tmp_path / "a.csv", *options)


def test_columns_that_are_not_read_are_counted(tmp_path):
    head = ("v1", "v2", "", "id", "split")
    rows = [head, ("ham", "a", "rest", 1, "train"), ("spam", "b", "", 2, "train")]

    data, description = read_labeled_texts(write(tmp_path / "a.csv", csv_text(rows)), "v2", "v1")

    assert data.columns == ("v2", "v1")
    assert "; not read: 3 (1), id (2), split (2);" in description


def test_any_classes_of_a_model_may_occur_in_columns_of_the_training_data(tmp_path):
    options = {"usual_columns": ("v2", "v1"), "options": ("-t", "-l")}
    options["class_names"] = ("spam", "ham")
    table = write(tmp_path / "a.csv", csv_text([("v1", "id", "v2"), ("ham", 1, "a")]))
    other = write(tmp_path / "b.csv", csv_text([("label", "text", "n"), ("ham", "a", 1)]))

    assert pairs(read_labeled_texts(table, **options)[0]) == [("ham", "a")]
    assert pairs(read_labeled_texts(table, "id", **options)[0]) == [("ham", "1")]
    assert pairs(read_labeled_texts(other, **options)[0]) == [("ham", "a")]
    for rows, value in [
        ([("a", "b", "c"), ("ham", "x", "y")], "csv:2: .*a, b, c.* -t -l"),
        ([("v1", "v2"), ("ham", "a"), ("eggs", "b")], "csv:3: .*'eggs'.*spam, ham"),
    ]:
        with pytest.raises(DataError, match=value):
            read_labeled_texts(write(tmp_path / "c.csv", csv_text(rows)), **options)


def test_class_names_are_sorted_and_numbers_by_value(tmp_path):
    for labels, names in [
        ([10, 9, -1, "-1"], ("-1", "9", "10")),
        ([True, False], ("false", "true")),
        (["b ", "b", "10", "a\t", "9", "²", "1.5"], ("1.5", "9", "10", "a", "b", "²")),
    ]:
        content = "\n".join(json.dumps({"text": "t", "label": n}) for n in labels)
        assert read_labeled_texts(write(tmp_path / "a.jsonl", content))[0].class_names == names


def test_a_folder_has_one_folder_per_label(tmp_path):
    for name in ("pos/2.txt", "pos/10.txt", "neg/1.txt", "neg/9.txt.gz"):
        write(tmp_path / "set" / name, f"text of\n{name}\n")
    for name in ("neg/.no.txt", "neg/a.png", "README.txt", ".git/a.txt"):
        write(tmp_path / "set" / name, "no text")

    data, _ = read_labeled_texts(tmp_path / "set")

    names = ("neg/1.txt", "neg/9.txt.gz", "pos/10.txt", "pos/2.txt")
    assert pairs(data) == [(name[:3], f"text of\n{name}\n") for name in names]
    assert data.locations[0] == f"{tmp_path}/set/neg/1.txt:1"
    assert pairs(take(data, [2, 0])) == [pairs(data)[2], pairs(data)[0]]
    write(tmp_path / "flat/1.txt", "good")
    with pytest.raises(DataError, match="flat"):
        read_labeled_texts(tmp_path / "flat")
