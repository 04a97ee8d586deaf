"""What becomes a document, and what is refused with its file and line."""

import csv
import gzip
import io
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax.data import readers, text
from gptjax.data.text import chunk_document, count_documents, find_sources, iter_chunks
from gptjax.errors import DataError
from gptjax.tokenizer import tokenizer

quiet = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
    derandomize=True,
    max_examples=150,
)
line_of_text = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20
)


@pytest.fixture(scope="module")
def gpt2():
    """The tokenizer that the places to cut are chosen for."""
    return tokenizer.load_tokenizer("gpt2")


def documents(*paths: Path | str, column: str = "") -> list[str]:
    """The whole documents of files."""
    whole, pieces = [], []
    for source in find_sources(paths, column):
        for piece in iter_chunks(source):
            pieces.append(piece.text)
            if piece.is_last:
                whole.append("".join(pieces))
                pieces = []
    assert not pieces
    return whole


def write(path: Path, content: str | bytes) -> Path:
    """The file, with that content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.fast
def test_a_text_file_is_one_document_as_it_is(tmp_path):
    content = "One.\r\n\r\n\n  <|endoftext|> Zwölf 🙂\t\n"

    for name in ("a.txt", "b.MD", "c.txt.gz"):
        data = content.encode()
        path = write(tmp_path / name, gzip.compress(data) if "gz" in name else data)
        assert documents(path) == [content]


def test_each_row_is_a_document_in_every_format(tmp_path):
    texts = ["first", 'two\nlines, "quoted"', "🙂 <|endoftext|>"]
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["id", "text"], *([i, t] for i, t in enumerate(texts))])
    files = {
        "a.jsonl": "".join(json.dumps({"n": 1, "text": t}) + "\n\n" for t in texts),
        "b.jsonl": "\n".join(json.dumps(t) for t in texts),
        "c.json": json.dumps([{"text": t} for t in texts], indent=2),
        "d.json": json.dumps(texts),
        "e.csv": table.getvalue(),
    }
    for name, content in files.items():
        plain = write(tmp_path / name, content)
        packed = write(tmp_path / (name + ".gz"), gzip.compress(content.encode()))

        assert documents(plain) == documents(packed) == texts
        assert count_documents(find_sources([plain]), 9) == 3


def test_empty_documents_do_not_exist(tmp_path):
    write(tmp_path / "a.txt", "")
    write(tmp_path / "b.txt", b"\xef\xbb\xbf")
    write(tmp_path / "c.jsonl", '""\n"text"\n""\n')

    assert documents(tmp_path) == ["text"]
    assert count_documents(find_sources([tmp_path]), 9) == 1


@quiet
@given(st.lists(line_of_text), st.integers(1, 7), st.booleans())
def test_blocks_may_split_characters(tmp_path, monkeypatch, lines, block, mark):
    content = "\n".join(lines).removeprefix("\ufeff")
    monkeypatch.setattr(readers, "READ_BLOCK_BYTES", block)
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbf" * mark + content.encode())

    assert "".join(documents(path)) == content


@quiet
@given(st.text(), st.integers(1, 9))
def test_pieces_are_short_and_make_up_the_document(monkeypatch, content, size):
    monkeypatch.setattr(text, "CHUNK_CHARS", size)

    pieces = list(chunk_document([content[:5], content[5:]]))

    assert "".join(piece for piece, _ in pieces) == content
    assert all(0 < len(piece) <= size for piece, _ in pieces)
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True] * (content != "")


@quiet
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["we're", "Zwölf", "1234", "--", "x.", "'s", "🙂é"]),
            st.sampled_from([" ", "\n", "  ", "\n\n ", "\r\n", "\t ", "\u3000", " \n"]),
        ),
        max_size=40,
    )
)
def test_tokens_of_the_pieces_are_those_of_the_document(monkeypatch, gpt2, words):
    monkeypatch.setattr(text, "CHUNK_CHARS", 16)
    # Some place to cut is needed in each 16 characters.
    content = "".join(word + space + "a b" for word, space in words)

    pieces = [piece for piece, _ in chunk_document([content])]

    assert [i for p in pieces for i in gpt2.encode(p)] == gpt2.encode(content)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("bad", [b"\xff", b"\xed\xa0\x80", b"\xc3", b"\xe2\x82"])
def test_invalid_utf8_is_told_with_its_line(tmp_path, name, bad):
    path = write(tmp_path / name, b'["a",\n"b",\n"' + bad + b'"]\n')

    with pytest.raises(DataError, match=rf"{name}:3: not UTF-8 .* Save the file as"):
        list(readers.decode_utf8(readers.read_blocks(io.BytesIO(path.read_bytes())), path))
    with pytest.raises(DataError, match=rf"{name}:\d"):
        documents(path)


@pytest.mark.parametrize("block", [1, 2, 3, 1000])
def test_the_line_does_not_depend_on_the_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr(readers, "READ_BLOCK_BYTES", block)

    for bad in (b"\xe2\x28\xa1", b"\0", b"\xe2\x82"):
        path = write(tmp_path / "a.txt", "é\n\n€".encode() + bad)
        with pytest.raises(DataError, match=r"a\.txt:3: (not UTF-8|NUL character)"):
            documents(path)


BAD_JSON = {
    '"a"\n{"text": NaN}': ":2: not JSON: NaN",
    '"a"\n{"text": -Infinity}': ":2: not JSON: -Infinity",
    '"a"\n{"text": "b", "text": "c"}': ":2: not JSON: an object has duplicate keys",
    '"a"\n' + "[" * 100_000: ":2: not JSON: lists or objects are nested more than",
    '"a"\n' + "9" * 5000: ":2: not JSON",
    '"a"\n\n{"text": ': ":3: not JSON: Expecting value",
    '"a" "b"': ":1: ' \"b\"' after the JSON value",
    '"a"\n"\\ud800"': ":2: unpaired surrogate",
    '"a"\n"b\\u0000"': ":2: NUL character",
    '"a"\n3': ":2: the row is 3, not a string",
    '{"text": "a"}\n"b"': ":2: no column 'text'. Columns: none. Choose one with --col",
    '{"text": "a"}\n{"body": "b"}': ":2: no column 'text'. Columns: body.",
    '{"text": "a"}\n{"text": null}': ":2: column 'text' is None, not a string",
}


@pytest.mark.parametrize("content", BAD_JSON)
def test_bad_rows_of_jsonl_are_told_with_their_line(tmp_path, content):
    path = write(tmp_path / "a.jsonl", content)

    with pytest.raises(DataError) as error:
        documents(path)

    assert str(error.value).startswith(f"{path}{BAD_JSON[content]}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ":1: not a JSON array. Put the rows between"),
        ('\n{"text": "a"}', ":1: not a JSON array"),
        ('["a",\n\n"b",]', ":3: not JSON: Expecting value"),
        ('["a"\n\n"b"]', ":3: expected a comma or the closing ]"),
        ('["a",\n"b"', ":2: expected a comma or the closing ]"),
        ('["a"]\n\n["b"]', ":1: expected a comma or the closing ]"),
        ('[\n{"text": "a"},\n{"text": NaN}]', ":3: not JSON: NaN"),
        ('[\n"a",\n\n  7]', ":4: the row is 7, not a string"),
        ("[[[" * 50_000, ":1: not JSON: lists or objects are nested more than"),
    ],
)
def test_bad_json_lists_are_told_with_their_line(tmp_path, content, message):
    path = write(tmp_path / "a.json", content)

    with pytest.raises(DataError) as error:
        documents(path)

    assert str(error.value).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,text\n1,a\n2\n", ":3: 1 fields, but 2 columns"),
        ('id,text\n1,"a\n\nb"\n2,c,d\n', ":5: 3 fields, but 2 columns"),
        ('id,text\n1,"a\nb', ":2: not CSV: unexpected end of data"),
        ('id,text\n1,"a"b\n', ":2: not CSV"),
        ("text,text\na,b\n", ":1: duplicate column name in ['text', 'text']"),
    ],
)
def test_bad_csv_is_told_with_its_line(tmp_path, content, message):
    path = write(tmp_path / "a.csv", content)

    with pytest.raises(DataError) as error:
        documents(path)

    assert str(error.value).startswith(f"{path}{message}")


@quiet
@given(
    st.lists(st.text(max_size=5) | st.dictionaries(st.text(), st.integers())),
    st.sampled_from([None, 0, 3]),
)
def test_json_lists_are_read_as_python_reads_them(tmp_path, items, indent):
    content = json.dumps(items, indent=indent)
    file = io.BytesIO(content.encode())

    found = list(readers.read_json_array(file, tmp_path))

    assert [row for _, row in found] == json.loads(content)
    lines = [line for line, _ in found]
    assert lines == sorted(lines)
    if indent is not None:
        assert lines[:1] == [2] * bool(items)


@settings(quiet, max_examples=400)
@given(
    st.sampled_from(["jsonl", "json", "csv"]),
    st.lists(
        st.sampled_from([b'{"text": "a"}', b"[", b"]", b",", b'"', b"\n", b'"b"', b"{"])
        | st.binary(max_size=3)
    ).map(b"".join),
)
def test_any_bytes_give_text_or_an_error_with_file_and_line(tmp_path, kind, content):
    path = write(tmp_path / f"fuzz.{kind}", content)

    try:
        documents(path)
    except DataError as error:
        assert str(error).startswith(f"{path}:")  # noqa: PT017


def test_rows_that_would_fill_the_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(readers, "MAX_JSON_CHARS", 100)
    long = "x" * 101

    for name, content, message in [
        ("a.jsonl", f'"a"\n"{long}"', ":2: line of more than 100 bytes"),
        ("a.csv", f"text\na\n{long}", ":3: line of more than 100 bytes"),
        ("b.csv", 'text\n"' + "a\n" * 99, ":2: not CSV: field larger than"),
        ("a.json", f'["{long}"]', " has more than 100 characters.* Write it as .jsonl"),
    ]:
        with pytest.raises(DataError, match=name + message):
            documents(write(tmp_path / name, content))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_a_damaged_gzip_file_is_refused(tmp_path, name):
    whole = gzip.compress(b'"text"\n' * 1000)
    flipped = bytearray(whole)
    flipped[-5] ^= 1

    for data in (whole[:-9], bytes(flipped), b"plain text", whole[:12] + b"\xff" * 30):
        with pytest.raises(DataError, match=f"cannot read .*{name}: .*is complete"):
            documents(write(tmp_path / name, data))


def test_reading_takes_memory_for_a_piece_only(tmp_path):
    path = write(tmp_path / "a.txt", "All work and no play.\n" * 500_000)
    (source,) = find_sources([path])
    tracemalloc.start()

    size = sum(len(piece.text) for piece in iter_chunks(source))

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == path.stat().st_size
    assert peak < 3_000_000 < size


@pytest.mark.fast
@pytest.mark.parametrize(
    ("row", "column"),
    [
        ("just a string", ""),
        ({"id": "1", "document": "a"}, "document"),
        ({"content": "a", "text": "b"}, "text"),
        ({"id": 1, "story": "a"}, "story"),
    ],
)
def test_the_column_is_guessed_from_the_first_row(tmp_path, row, column):
    path = write(tmp_path / "a.jsonl", json.dumps(row))

    (source,) = find_sources([path])

    assert source.column == column


def test_an_ambiguous_column_has_to_be_named(tmp_path):
    path = write(tmp_path / "a.csv", "title,body\na,b\n")

    with pytest.raises(DataError, match=r"a\.csv:2: .* columns: title, body. .*text_column"):
        documents(path)
    with pytest.raises(DataError, match=r"a\.csv:2: no column 'bod'. Columns: title,"):
        documents(path, column="bod")
    assert documents(path, column="body") == ["b"]


def test_folders_and_globs_give_known_files_in_order_and_once(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.jsonl", ".hidden/d.txt", "e.png", "sub/.f.md"):
        write(tmp_path / name, f'"{name}"')

    def found(*paths: object) -> list[str]:
        return [source.path.name for source in find_sources([str(p) for p in paths])]

    assert found(tmp_path) == ["a.md", "b.txt", "c.jsonl"]
    assert found(tmp_path / "b.txt", tmp_path) == ["b.txt", "a.md", "c.jsonl"]
    assert found(tmp_path / "*.txt", tmp_path / "**" / "*.jsonl") == ["b.txt", "c.jsonl"]


def test_paths_without_text_are_refused(tmp_path):
    write(tmp_path / "images" / "a.png", b"\x89PNG")

    for path in (tmp_path / "none.txt", tmp_path / "*.txt", tmp_path / "images"):
        with pytest.raises(DataError, match=r"no text files found at .*Give a file, a fold"):
            find_sources([path])
    with pytest.raises(DataError, match=r"unknown file type: .*a\.png\. Rename it to end in"):
        find_sources([tmp_path / "images" / "a.png"])
    with pytest.raises(DataError, match=r"cannot read .*folder.txt"):
        text.read_text_file(tmp_path / "folder.txt")


def test_read_text_is_the_whole_file_of_any_name(tmp_path):
    path = write(tmp_path / "README", "a\n" * 400_000)

    assert text.read_text_file(path) == "a\n" * 400_000


def test_named_sets_are_texts_too(shared_data):
    assert documents("verdict")[0].startswith("I HAD always thought Jack Gisburn")
    assert len(documents("python-help")) > 50
    assert documents("instructions", column="output")[0] == (
        'The spelling of the given phrase "freind" is incorrect, the correct spelling is "friend".'
    )
