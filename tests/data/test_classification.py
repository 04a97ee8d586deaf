"""Labeled texts from tables and folders: formats, guessed columns, rejected rows."""

import hashlib
import json
from collections import Counter

import pytest

from gptjax.data.classification import read_labeled_texts, take
from gptjax.errors import DataError
from tests.data.tables import csv_text, write

PAIRS = [("ham", "see you"), ("spam", "Win £9!"), ("ham", "ok, later"), ("spam", "Hi")]
TABLES = {  # content, columns of text and label, header
    "a.csv": (csv_text([("label", "text"), *PAIRS]), "text", "label", "with a header"),
    "a.tsv": (csv_text([("label", "text"), *PAIRS], "\t"), "text", "label", "with a header"),
    "a.jsonl.gz": (
        "".join(json.dumps({"label": n, "text": t}) + "\n\n" for n, t in PAIRS),
        *("text", "label", ""),
    ),
    "b.csv": (
        csv_text([("id", "Review", "Sentiment"), *(("7", t, n) for n, t in PAIRS)]),
        *("Review", "Sentiment", "with a header"),
    ),
    # Without a header, as the label of the first row occurs again.
    "b.tsv": (csv_text(PAIRS, "\t"), "2", "1", "no header"),
    "SMSSpamCollection": (csv_text(PAIRS[:2], "\t"), "text", "label", "no header"),
}


def pairs(data):
    """(label, text) of each row."""
    return [(data.class_names[n], t) for n, t in zip(data.labels, data.texts, strict=True)]


@pytest.mark.fast
def test_each_format_gives_the_same_rows_and_the_description_names_it(tmp_path):
    for name, (content, text, label, header) in TABLES.items():
        path = write(tmp_path / name, content)
        data, description = read_labeled_texts(path)

        assert pairs(data) == PAIRS[: len(data)]
        assert (data.class_names, data.labels[:2]) == (("ham", "spam"), [0, 1])
        columns = f"text in column {text!r}, label in column {label!r}"
        for value in (f"{path}: ", "in 2 classes: ham (", columns, header):
            assert value in description


def test_class_names_are_sorted_and_numbers_by_value(tmp_path):
    for labels, names in [
        ([10, 9, -1, "-1"], ("-1", "9", "10")),
        ([True, False], ("false", "true")),
        (["b ", "b", "10", "a\t", "9", "²", "1.5"], ("1.5", "9", "10", "a", "b", "²")),
    ]:
        content = "\n".join(json.dumps({"text": "t", "label": n}) for n in labels)
        data, _ = read_labeled_texts(write(tmp_path / "a.jsonl", content))
        assert data.class_names == names


def test_columns_are_guessed_by_name_or_by_repeated_labels(tmp_path):
    for header, text, label in [
        ("Class,MESSAGE", "MESSAGE", "Class"),
        ("content,text,category,label", "text", "label"),
        ("words,target", "words", "target"),
        ("y,tweet", "tweet", "y"),
        ("v1,v2", "v2", "v1"),
        ("v2,v1", "v1", "v2"),
    ]:
        names = header.split(",")
        rows = [
            dict.fromkeys(names, f"{n}") | {text: f"some words {n}", label: "ab"[n % 2]}
            for n in range(6)
        ]
        table = csv_text([names, *(row.values() for row in rows)])
        for kind, content in (("csv", table), ("jsonl", "\n".join(map(json.dumps, rows)))):
            data, _ = read_labeled_texts(write(tmp_path / f"a.{kind}", content))
            assert pairs(data) == [("ab"[n % 2], f"some words {n}") for n in range(6)]


@pytest.mark.parametrize(
    "content",
    [
        "a,b,c\n1,2,3\n",
        "review,comment,label\na,b,c\n",
        "text,other\na,b\nc,d\n",  # no value occurs twice
        "text,\na,b\nc,b\n",  # a column without a name
        "a,b\nx,y\nx,y\nx,z\nx,z\n",  # both columns are short and repeat values
        "a,b\nx,some\nx,more\nz,words\n",  # too few repeat
        f"a,b\n{'x' * 51},{'y' * 60}\n{'x' * 51},{'z' * 60}\n",  # too long for labels
    ],
)
def test_ambiguous_columns_have_to_be_named(tmp_path, content):
    path = write(tmp_path / "a.csv", content)
    with pytest.raises(DataError, match=rf"{path}:\d: .*--data\.text_column"):
        read_labeled_texts(path)


@pytest.mark.fast
def test_named_columns_are_used(tmp_path):
    path = write(tmp_path / "a.csv", "text,body,label,mood\na,b,x,1\nc,d,y,2\n")
    bare = write(tmp_path / "b.csv", "1,good,pos\n2,bad,neg\n")
    repeated = write(tmp_path / "c.csv", "pos,words\npos,good\nneg,bad\nneg,so bad\n")

    assert pairs(read_labeled_texts(path, "body")[0]) == [("x", "b"), ("y", "d")]
    assert pairs(read_labeled_texts(path, "body", "mood")[0]) == [("1", "b"), ("2", "d")]
    assert pairs(read_labeled_texts(bare, "2", "3")[0]) == [("pos", "good"), ("neg", "bad")]
    assert len(read_labeled_texts(repeated)[0]) == 4
    assert len(read_labeled_texts(repeated, "words", "pos")[0]) == 3  # names in the first row
    for options, value in (
        (("bod",), r"csv:2: .*'bod'.*body.*data\.text_column"),
        (("", "id"), r"'id'.*--data\.label_column"),
        (("label", "label"), r"data\.label_column .*'label'"),
    ):
        with pytest.raises(DataError, match=value):
            read_labeled_texts(path, *options)


INVALID = [  # file, content, start of the message, value in it
    ("a.csv", "text,label\na,x\n ,y\n", ":3: ", "empty"),
    ("a.csv", "text,label\na,x\nb, \n", ":3: ", "'label'"),
    ("a.json", "[]", " ", "no rows"),
    ("a.csv", "text,label\n", " ", "no rows"),
    ("a.jsonl", '{"text": "a", "label": 1}\n{"txt": "b", "label": 1}', ":2: ", "mean txt?"),
    ("a.jsonl", '{"text": "a", "label": [1]}', ":1: ", "[1]"),
    ("a.jsonl", '{"text": 5, "label": 1}', ":1: ", "'text' is 5"),
    ("a.csv", "text,label\na,ham\nb,ham\n", ", column 'label': ", "'ham'"),
]


def test_invalid_rows_are_rejected_with_their_line(tmp_path):
    for name, content, start, value in INVALID:
        path = write(tmp_path / name, content)
        with pytest.raises(DataError) as error:
            read_labeled_texts(path)
        assert str(error.value).startswith(f"{path}{start}")
        assert value in str(error.value)


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
    for path, columns, value in [
        (tmp_path, (), "such as .*set"),
        (tmp_path / "flat", (), "flat.*spam"),
        (tmp_path / "none.csv", (), r"none\.csv.*sms-spam"),
        (tmp_path / "set/neg/a.png", (), r"a\.png.*\.csv, "),
        (tmp_path / "set", ("text",), r"data\.text_column"),
        ("verdict", (), "verdict .*sms-spam"),
    ]:
        with pytest.raises(DataError, match=value):
            read_labeled_texts(path, *columns)


def test_the_sms_collection_is_read_as_pandas_reads_it(tmp_path, shared_data):
    path = shared_data / "SMSSpamCollection"

    data, _ = read_labeled_texts("sms-spam")

    assert Counter(data.labels) == {0: 4825, 1: 747}
    assert data.locations[5081:5083] == [f"{path}:5082", f"{path}:5085"]  # quoted line breaks
    # The rows of pandas 3.1.1: read_csv(path, sep="\t", header=None).values.
    rows = "\0".join(f"{label}\t{text}" for label, text in pairs(data))
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == "f408737e705aea94"
    # Under another name, the columns are guessed from the values.
    copy = write(tmp_path / "messages.tsv", path.read_bytes())
    assert pairs(read_labeled_texts(copy)[0]) == pairs(data)
