"""Files are read as Python's own readers do, or rejected with file and line."""

import csv
import gzip
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data import readers
from gptjax.data.readers import (
    get_text,
    guess_text_column,
    open_decompressed,
    read_csv_records,
    read_rows,
    read_text_file,
)
from gptjax.errors import DataError
from tests.data.tables import csv_text, quick, write


def rows_of(path):
    """(line, row) of each row of a table."""
    with open_decompressed(path) as (file, _):
        return list(read_rows(file, path))


TEXTS = ["first", 'two\nlines, "quoted"\t', "🙂 <|endoftext|>"]
TABLES = {  # content and the lines that its rows start in
    "a.jsonl": ("\n\n".join(json.dumps({"n": "1", "text": t}) for t in TEXTS), [1, 3, 5]),
    "a.json": (json.dumps([{"n": "1", "text": t} for t in TEXTS], indent=1), [2, 6, 10]),
    "a.csv": (csv_text([("n", " text"), *(("1", t) for t in TEXTS)]) + "\n", [2, 3, 5]),
    "a.tsv": ("\n" + csv_text([("n", "text"), *(("1", t) for t in TEXTS)], "\t"), [3, 4, 6]),
}


@pytest.mark.fast
def test_every_format_gives_the_same_rows_with_their_lines(tmp_path):
    for name, (content, lines) in TABLES.items():
        expected = [(n, {"n": "1", "text": t}) for n, t in zip(lines, TEXTS, strict=True)]
        assert rows_of(write(tmp_path / name, content)) == expected
        assert rows_of(write(tmp_path / f"{name}.gz", "\ufeff" + content)) == expected


INVALID = [  # file, content, line, value that the message names
    ("a.jsonl", '"a"\n\n{"text": ', 3, "not JSON"),
    ("a.jsonl", '"a" "b"', 1, '"b"'),
    ("a.jsonl", b'"a"\n"\xff"', 2, "0xff"),
    ("a.jsonl", '"a"\n"\0"', 2, "NUL"),
    ("a.json", '\n{"text": "a"}', 1, "["),
    ("a.json", '["a",\n\n"b",]', 3, "not JSON"),
    ("a.json", '["a",\n"b"', 2, "]"),
    ("a.json", '["a"]\n\n["b"]', 1, "]"),
    ("a.json", '[\n{"text": "a"},\n{"text": NaN}]', 3, "NaN"),
    ("a.json", "[[[" * 50_000, 1, "nested"),
    ("a.csv", "id,text\n1,a\n\n2\n", 4, "1 fields, but 2"),
    ("a.csv", 'id,text\n1,"a\n\nb"\n2,c,d\n', 5, "3 fields, but 2"),
    ("a.csv", 'id,text\n1,"a"b\n', 2, "not CSV"),
    ("a.csv", "text,id, text\na,b,c\n", 1, "['text', 'id', 'text']"),
    ("a.tsv", 'id\ttext\n1\tb\n2\t"b', 3, "quote"),
]


def test_invalid_tables_are_rejected_with_their_line(tmp_path):
    for name, content, line, value in INVALID:
        path = write(tmp_path / name, content)
        with pytest.raises(DataError) as error:
            rows_of(path)
        assert str(error.value).startswith(f"{path}:{line}: ")
        assert value in str(error.value)


@quick
@given(st.text(st.sampled_from('ab\t,"\n'), max_size=30), st.sampled_from([",", "\t"]))
def test_fields_are_those_of_pythons_csv_unless_a_quote_is_open(tmp_path, content, delimiter):
    # A row after the last one is swallowed where a quote is open.
    ended = content if content.endswith("\n") or not content else content + "\n"
    lines = io.StringIO(ended + "end", newline="")
    try:
        *expected, last = csv.reader(lines, delimiter=delimiter, strict=delimiter == ",")
    except csv.Error:
        expected, last = [], []
    expected = [fields for fields in expected if fields]
    is_valid = last == ["end"] and len(set(map(len, expected))) < 2

    try:
        records = list(read_csv_records(io.BytesIO(content.encode()), tmp_path, delimiter))
    except DataError:
        assert not is_valid
    else:
        assert is_valid
        assert [fields for _, fields in records] == expected


def test_blocks_may_split_characters(tmp_path, monkeypatch):
    for size in (1, 2, 1000):
        monkeypatch.setattr(readers, "READ_BLOCK_BYTES", size)
        content = "é\n\n€ 🙂\r\n"

        assert read_text_file(write(tmp_path / "README", "\ufeff" + content)) == content
        for invalid in (b"\xe2\x28\xa1", b"\0", b"\xe2\x82"):
            path = write(tmp_path / "a.txt", "é\n\n€".encode() + invalid)
            with pytest.raises(DataError, match=r"a\.txt:3: "):
                read_text_file(path)


def test_rows_that_would_fill_the_memory_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(readers, "MAX_JSON_CHARS", 100)
    for name, content in {
        "a.jsonl": f'"a"\n"{"x" * 101}"',
        "a.csv": 'text\n"' + "a\n" * 99,
        "a.json": f'["{"x" * 101}"]',
    }.items():
        with pytest.raises(DataError, match=rf"{name}.*(100|larger)"):
            rows_of(write(tmp_path / name, content))


def test_unreadable_and_corrupt_files_are_named(tmp_path):
    whole = gzip.compress(b'"text"\n' * 1000)
    path = tmp_path / "a.jsonl.gz"

    for data in (whole[:-9], whole[:-5] + b"\0" + whole[-4:], b"plain text"):
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"cannot read {path}"):
            rows_of(path)
    with pytest.raises(DataError, match="cannot read"):
        read_text_file(tmp_path)


def test_rows_without_text_are_rejected_with_their_location():
    for row, column, value in [
        ({"body": "b"}, "bod", "'bod'. Did you mean body?"),
        ("b", "text", "'text'"),
        ({"text": None}, "text", "'text' is None"),
        (3, "", "3"),
        ("\ud800", "", r"'\ud800'"),
        ("a\0", "", "NUL"),
    ]:
        with pytest.raises(DataError) as error:
            get_text(row, column, "a.csv:2")
        assert str(error.value).startswith("a.csv:2: ")
        assert value in str(error.value)


@pytest.mark.fast
def test_the_text_column_has_a_known_name_or_is_the_only_text():
    for row, column in [
        ({"id": "1", "Review": "a"}, "Review"),
        ({"content": "a", "text": "b"}, "text"),
        ({"id": 1, "story": "a"}, "story"),
        ({"sentiment": "pos", "story": "a"}, "story"),
    ]:
        assert guess_text_column(row, "a.csv:2", "--column NAME") == column
    for row in ({"title": "a", "author": "b"}, {"review": "a", "comment": "b"}, {"id": 1}):
        with pytest.raises(DataError, match=r"a\.csv:2: .*--column NAME"):
            guess_text_column(row, "a.csv:2", "--column NAME")
