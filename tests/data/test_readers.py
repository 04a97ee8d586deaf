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

OPTION = "--column NAME"


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
@pytest.mark.parametrize("name", TABLES)
def test_every_format_gives_the_same_rows_with_their_lines(tmp_path, name):
    content, lines = TABLES[name]
    expected = [(line, {"n": "1", "text": text}) for line, text in zip(lines, TEXTS, strict=True)]

    for data in (content, "\ufeff" + content):
        assert rows_of(write(tmp_path / name, data)) == expected
        assert rows_of(write(tmp_path / f"{name}.gz", data)) == expected


INVALID = [  # file, content, line, value that the message names
    ("a.jsonl", '"a"\n{"text": NaN}', 2, "NaN"),
    ("a.jsonl", '"a"\n{"text": -Infinity}', 2, "-Infinity"),
    ("a.jsonl", '"a"\n{"n": 1e999}', 2, "1e999"),
    ("a.jsonl", '"a"\n{"text": "b", "text": "c"}', 2, "duplicate"),
    ("a.jsonl", '"a"\n' + "[" * 100_000, 2, "nested"),
    ("a.jsonl", '"a"\n' + "9" * 5000, 2, "not JSON"),
    ("a.jsonl", '"a"\n\n{"text": ', 3, "not JSON"),
    ("a.jsonl", '"a" "b"', 1, '"b"'),
    ("a.jsonl", b'"a"\n"\xff"', 2, "0xff"),
    ("a.jsonl", '"a"\n"\0"', 2, "NUL"),
    ("a.json", "", 1, "["),
    ("a.json", '\n{"text": "a"}', 1, "["),
    ("a.json", '["a",\n\n"b",]', 3, "not JSON"),
    ("a.json", '["a"\n\n"b"]', 3, "]"),
    ("a.json", '["a",\n"b"', 2, "]"),
    ("a.json", '["a"]\n\n["b"]', 1, "]"),
    ("a.json", '[\n{"text": "a"},\n{"text": NaN}]', 3, "NaN"),
    ("a.json", "[[[" * 50_000, 1, "nested"),
    ("a.json", b'["a",\n"\xe2\x82"]', 2, "0xe2"),
    ("a.csv", "id,text\n1,a\n\n2\n", 4, "1 fields, but 2"),
    ("a.csv", 'id,text\n1,"a\n\nb"\n2,c,d\n', 5, "3 fields, but 2"),
    ("a.csv", 'id,text\n1,"a\nb', 2, "not CSV"),
    ("a.csv", 'id,text\n1,"a"b\n', 2, "not CSV"),
    ("a.csv", "text,id, text\na,b,c\n", 1, "['text', 'id', 'text']"),
    ("a.csv", b"id,text\n1,\xed\xa0\x80\n", 2, "0xed"),
    ("a.tsv", "id\ttext\n1\ta\tb", 2, "3 fields, but 2"),
    ("a.tsv", 'id\ttext\n1\t"b\n', 2, "quote"),
    ("a.tsv", 'id\ttext\n1\tb\n2\t"b', 3, "quote"),
]


@pytest.mark.parametrize(("name", "content", "line", "value"), INVALID)
def test_invalid_tables_are_rejected_with_their_line(tmp_path, name, content, line, value):
    path = write(tmp_path / name, content)

    with pytest.raises(DataError) as error:
        rows_of(path)

    assert str(error.value).startswith(f"{path}:{line}: ")
    assert value in str(error.value)


@quick
@given(
    st.sampled_from(["jsonl", "json", "csv", "tsv"]),
    st.lists(
        st.sampled_from([b'{"text": "a"}', b"[", b"]", b",", b'"', b"\n", b"\t", b'"b"', b"{"])
        | st.binary(max_size=3)
    ).map(b"".join),
)
def test_any_bytes_give_rows_or_an_error_with_file_and_line(tmp_path, kind, content):
    path = write(tmp_path / f"fuzz.{kind}", content)

    try:
        rows_of(path)
    except DataError as error:
        assert str(error).startswith(f"{path}:")  # noqa: PT017


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


@pytest.mark.parametrize("block", [1, 2, 3, 1000])
def test_blocks_may_split_characters(tmp_path, monkeypatch, block):
    monkeypatch.setattr(readers, "READ_BLOCK_BYTES", block)
    content = "é\n\n€ 🙂\r\n"

    assert read_text_file(write(tmp_path / "README", "\ufeff" + content)) == content
    for invalid in (b"\xe2\x28\xa1", b"\0", b"\xe2\x82"):
        path = write(tmp_path / "a.txt", "é\n\n€".encode() + invalid)
        with pytest.raises(DataError, match=r"a\.txt:3: "):
            read_text_file(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", f'"a"\n"{"x" * 101}"'),
        ("a.csv", f"text\na\n{'x' * 101}"),
        ("b.csv", 'text\n"' + "a\n" * 99),
        ("a.json", f'["{"x" * 101}"]'),
    ],
)
def test_rows_that_would_fill_the_memory_are_rejected(tmp_path, monkeypatch, name, content):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(readers, "MAX_JSON_CHARS", 100)

    with pytest.raises(DataError, match=rf"{name}.*(100|larger)"):
        rows_of(write(tmp_path / name, content))


def test_unreadable_and_corrupt_files_are_named(tmp_path):
    whole = gzip.compress(b'"text"\n' * 1000)
    flipped = bytearray(whole)
    flipped[-5] ^= 1  # of the checksum
    path = tmp_path / "a.jsonl.gz"

    for data in (whole[:-9], bytes(flipped), b"plain text", whole[:12] + b"\xff" * 30):
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"cannot read {path}"):
            rows_of(path)
    with pytest.raises(DataError, match="cannot read"):
        read_text_file(tmp_path)


INVALID_TEXTS = [  # row, column, value that the message names
    ({"body": "b"}, "bod", "'bod'. Did you mean body? Columns: body. Choose with --column NAME."),
    ("b", "text", "'text'. Columns: none"),
    ({"text": None}, "text", "'text' is None"),
    (3, "", "3"),
    ("\ud800", "", r"'\ud800'"),
    ("a\0", "", "NUL"),
]


@pytest.mark.parametrize(("row", "column", "value"), INVALID_TEXTS)
def test_rows_without_text_are_rejected_with_their_location(row, column, value):
    with pytest.raises(DataError) as error:
        get_text(row, column, "a.csv:2")

    assert str(error.value).startswith("a.csv:2: ")
    assert value in str(error.value)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"id": "1", "Review": "a"}, "Review"),
        ({"content": "a", "text": "b"}, "text"),
        ({"id": 1, "story": "a"}, "story"),
        ({"sentiment": "pos", "story": "a"}, "story"),
        ({"title": "a", "author": "b"}, None),
        ({"review": "a", "comment": "b"}, None),
        ({"id": 1}, None),
    ],
)
def test_the_text_column_has_a_known_name_or_is_the_only_text(row, column):
    if column:
        assert guess_text_column(row, "a.csv:2", OPTION) == column
        return
    with pytest.raises(DataError, match=r"a\.csv:2: .*--column NAME"):
        guess_text_column(row, "a.csv:2", OPTION)
