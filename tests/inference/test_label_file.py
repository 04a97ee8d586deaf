"""A file of rows becomes the same file with labels, or nothing at all."""

import csv
import json

import pytest

from gptjax.errors import DataError
from gptjax.inference.label_file import label_file
from tests.data.tables import csv_text, write


def predict(texts):
    """The label and the "probability" identify the text."""
    return [(text.upper(), len(text) / 1000) for text in texts]


def label(source, output, **options):
    label_file(source, output, predict, **options)


@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_a_table_keeps_its_fields_and_gets_two_more(tmp_path, suffix, delimiter):
    fields = ['a, "b"\nc\r', " x\ty ", "\\'é🙂", ""]
    others = ["", "d e", fields[0], "\r"]
    rows = [["text", "x", "y", "z"], fields, others]
    source, output = write(tmp_path / "a.csv.gz", csv_text(rows)), tmp_path / f"out.{suffix}"

    label(source, output, text_column="x")

    with output.open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file, delimiter=delimiter)) == [
            [*rows[0], "label", "probability"],
            [*fields, " X\tY ", "0.005"],
            [*others, "D E", "0.003"],
        ]


def test_nested_objects_become_json_lines_only(tmp_path):
    rows = '{"text": "a", "n": [1, null]}\n\n{"text": "b c", "é": {}}'
    source = write(tmp_path / "a.jsonl", rows)

    label(source, tmp_path / "out.jsonl")

    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        {"text": "a", "n": [1, None], "label": "A", "probability": 0.001},
        {"text": "b c", "é": {}, "label": "B C", "probability": 0.003},
    ]
    with pytest.raises(DataError, match=r"out\.tsv.*\.jsonl"):
        label(source, tmp_path / "out.tsv")


def test_existing_columns_and_files_are_not_overwritten(tmp_path):
    source = write(tmp_path / "a.csv", "text,label\na,spam\n")

    label(source, tmp_path / "b.csv")

    assert (tmp_path / "b.csv").read_text().splitlines() == [
        "text,label,predicted_label,predicted_probability",
        "a,spam,A,0.001",
    ]
    for path, message in ((tmp_path / "c.csv", "'predicted_label'"), (source, "already")):
        with pytest.raises(DataError, match=message):
            label(tmp_path / "b.csv", path)


@pytest.mark.parametrize(
    ("name", "content", "value"),
    [
        ("a.csv", "id,words\n1,a\n", ":2: .*id, words.*--text NAME"),
        ("a.csv", "id,text\n1,a\n2, \n", ":3: .*empty"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b", "label": 1}', ":2: .*'label'"),
        ("a.pdf", "a", r".*\.jsonl"),
    ],
)
def test_invalid_rows_are_named_and_leave_no_file(tmp_path, name, content, value):
    source = write(tmp_path / name, content)

    with pytest.raises(DataError, match=f"{name}{value}"):
        label(source, tmp_path / "out.jsonl", batch_size=1)

    assert list(tmp_path.iterdir()) == [source]


def test_batches_are_full_and_an_interrupted_file_does_not_exist(tmp_path):
    source = write(tmp_path / "a.txt", "".join(f"{n}\n" for n in range(8)))
    output, batches = tmp_path / "out" / "a.csv", []

    def predict_or_stop(texts):
        assert not output.exists()
        batches.append(texts)
        if len(batches) == 3:
            raise KeyboardInterrupt
        return predict(texts)

    with pytest.raises(KeyboardInterrupt):
        label_file(source, output, predict_or_stop, batch_size=3)

    assert batches == [["0", "1", "2"], ["3", "4", "5"], ["6", "7"]]
    assert list(output.parent.iterdir()) == []
