"""Files are read as Python's own readers do, or rejected with file and line."""

import gc
import gzip
import json
import os

import pytest

from gptjax.data import readers
from gptjax.data.classification import read_labeled_texts
from gptjax.data.conversations import read_conversations, read_preference_pairs
from gptjax.data.readers import (
    DELIMITER_NAMES,
    count_chars,
    read_rows,
    read_text_file,
    table_format,
    visible_files,
)
from gptjax.data.text import find_sources, iter_chunks
from gptjax.errors import DataError
from tests.data.tables import csv_text, write

TEXTS = ["first", 'two\nlines, "quoted"\t', "🙂 <|endoftext|>"]
OBJECTS = [{"n": "1", "text": t} for t in TEXTS]
TABLES = {  # content and the places of its rows
    "a.jsonl": ("\n\n".join(map(json.dumps, OBJECTS)), [":1", ":3", ":5"]),
    "a.json": (json.dumps(OBJECTS, indent=1), [", row 1", ", row 2", ", row 3"]),
    "a.csv": (csv_text([("n", " text"), *(("1", t) for t in TEXTS)]) + "\n", [":2", ":3", ":5"]),
    "a.tsv": (
        "\n" + csv_text([("n", "text"), *(("1", t) for t in TEXTS)], "\t"),
        [":3", ":4", ":6"],
    ),
}


def rows_of(path):
    return list(read_rows(path))


def texts_of(path):
    return [chunk.text for source in find_sources([path]) for chunk in iter_chunks(source)]


def test_every_format_gives_the_same_rows_with_their_places(tmp_path):
    for name, (content, places) in TABLES.items():
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            write(path, content if path.suffix != ".gz" else "\ufeff" + content)
            expected = [(f"{path}{at}", x) for at, x in zip(places, OBJECTS, strict=True)]
            assert rows_of(path) == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt.gz", "a.txt"])
def test_a_pipe_or_device_is_rejected_and_never_read(tmp_path, name):
    pipe, device = tmp_path / name, tmp_path / f"device-{name}"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    for path in (pipe, device):
        with pytest.raises(DataError, match=f"{name}: .*regular file"):
            read_text_file(path) if ".txt" in name else rows_of(path)


def test_a_message_that_quotes_a_long_text_keeps_its_start_and_end(tmp_path):
    path = write(tmp_path / "a.jsonl", to_jsonl({"text": "a"}, {"x" * 100_000: "a"}))

    with pytest.raises(DataError, match=r"a\.jsonl:2: .*--column") as caught:
        texts_of(path)

    assert str(caught.value).count("x") <= 400


def test_only_newlines_end_a_line(tmp_path):
    text = "a\x85\u2028\u2029b"  # JSON strings have no control characters
    row, table = json.dumps({"text": text}, ensure_ascii=False), f"text\n{text}\x0b\x0c\x1c\x1e"
    for name, content in (("a.jsonl", row), ("a.csv", table), ("a.tsv", table)):
        for end in ("\n", "\r\n"):
            path = write(tmp_path / name, (content + "\n").replace("\n", end))
            assert [row["text"].rstrip() for _, row in rows_of(path)] == [text]


def test_other_delimiters_are_found_in_the_header(tmp_path):
    rows = [{"text": "a, b", "label": "x;y"}, {"text": "c", "label": "d"}]
    fields = [list(rows[0]), *(list(row.values()) for row in rows)]
    for delimiter, name in DELIMITER_NAMES.items():
        for suffix in ("csv", "tsv"):
            for excel in ("", f"sep={delimiter}\n"):
                empty = f"{delimiter}\n {delimiter}\n\n"  # rows that spreadsheets add
                text = excel + csv_text(fields, delimiter) + empty
                path = write(tmp_path / f"a.{suffix}", text)
                assert ([row for _, row in rows_of(path)], table_format(path)) == (rows, name)


def test_links_to_folders_are_followed_and_no_folder_is_read_twice(tmp_path):
    for name in ("set/a.txt", "far/b.txt", "far/.git/c.txt", "up.txt"):
        write(tmp_path / name, "a")
    links = {"set/more": "far", "set/twice": "far", "far/loop": "set", "far/up": "."}
    for name, target in links.items():
        (tmp_path / name).symlink_to(tmp_path / target)

    found = visible_files(tmp_path / "set", [".txt"])

    assert found == [tmp_path / "set/a.txt", tmp_path / "set/more/b.txt"]


def to_jsonl(*rows):
    return "\n".join(map(json.dumps, rows))


USER = {"role": "user", "content": "Is it green?"}
YES, SYSTEM = USER | {"role": "assistant"}, USER | {"role": "system"}
PAIR = {"chosen": [USER, YES], "rejected": [USER, YES]}
AB, BOTH = {"prompt": "a", "completion": "b"}, {"chosen": "y", "rejected": "n"}
INVALID = [  # reader, file, content, start of the message, value in it
    (rows_of, "a.jsonl", '"a"\n\n{"text": ', ":3: ", "not JSON"),
    (rows_of, "a.jsonl", '\u2028{"text": "a"}', ":1: ", "not JSON"),
    (rows_of, "a.json", '\n{"text": "a"}', ":1: ", "["),
    (rows_of, "a.json", '["a",\n\n"b",]', ":3: ", "not JSON"),
    (rows_of, "a.csv", 'id,text\n1,"a\n\nb"\n2,c,d\n', ":5: ", "3 fields, but 2"),
    (rows_of, "a.csv", 'id,text\n1,"a"b\n', ":2: ", "not CSV"),
    (rows_of, "a.csv", "text,id, text\na,b,c\n", ":1: ", "['text', 'id', 'text']"),
    (rows_of, "a.csv", "text\ncaf\xe9\n".encode("latin-1"), ":2: ", "iconv -f latin1"),
    (rows_of, "a.csv", "text\ncaf\xe9\n".encode("utf-16"), ":1: ", "iconv -f utf-16"),
    (rows_of, "a.csv", "text\ncaf\xe9\n".encode("utf-32"), ":1: ", "iconv -f utf-32"),
    (rows_of, "a.csv", b"\0\0\xfe\xff\0\0\0a", ":1: ", "iconv -f utf-32"),
    (rows_of, "a.csv", "text,label\ra,b\r", ":1: ", r"Save it with \n"),
    (rows_of, "a.tsv", 'id\ttext\n1\tb\n2\t"b', ":3: ", "quote"),
    (texts_of, "a.jsonl", '{"body": "b"}\n{"bod": "b"}', ":2: ", "'body'. Did you mean bod?"),
    (texts_of, "a.jsonl", '"b"\n"\\ud800"', ":2: ", r"'\ud800'"),
    (texts_of, "a.jsonl", '"b"\n"\\u0000"', ":2: ", "NUL"),
    (read_labeled_texts, "a.csv", "text,label\na,x\n ,y\n", ":3: ", "empty"),
    (read_labeled_texts, "a.json", "[]", " ", "no rows"),
    (read_labeled_texts, "a.csv", f"text,label\na,{'x' * 201}\n", ":2: ", "201 characters"),
    *(
        (read, "a.csv", f"text,label,{name}\na,x,\na,y,{value}\n", ":3: ", f"'{name}' is '{value}'")
        for read in (read_labeled_texts, texts_of)
        for name, value in [
            ("split", "test"),
            ("Set", "Val"),
            ("is_test", "True"),
            ("train", "false"),
            ("loss", "0"),
            ("mask", "1.0"),
            ("Weight", "0.5"),
            ("loss_weight", "x"),
        ]
    ),
    (read_labeled_texts, "a.jsonl", '{"text": "a", "label": [1]}', ":1: ", "[1]"),
    (read_labeled_texts, "a.csv", "text,label\na,ham\nb,ham\n", ", column 'label': ", "'ham'"),
    (read_labeled_texts, "a.csv", "review,comment,label\na,b,c\n", ":2: ", "--data.text_column"),
    (read_conversations, "a.jsonl", to_jsonl({"a": "b"}), ":1: ", "prompt, completion"),
    (read_conversations, "a.jsonl", to_jsonl(AB | {"completion": 5}), ":1: ", "'completion' is 5"),
    (read_conversations, "a.jsonl", to_jsonl(AB | {"completion": [YES] * 3}), ":1: ", "has 3"),
    (read_conversations, "a.jsonl", to_jsonl(AB | {"split": "trian"}), ":1: ", "mean train?"),
    *(
        (read_conversations, "a.jsonl", to_jsonl(AB, row), ":2: ", value)
        for row, value in [
            (AB | {"history": [["x", "y"]]}, "'history' is [['x', 'y']]"),
            (AB | {"tools": [{"name": "f"}]}, "'tools'"),
            (AB | {"label": False}, "'label' is False"),
            (AB | {"label": "False"}, "'label' is 'False'"),
            (AB | {"Split": "test"}, "'Split' is 'test'"),
            (AB | {"System": "x"}, "'System' is 'x'"),
            (AB | {"suffix": "x"}, "'suffix' is 'x'"),
            (AB | {"input": "x", "context": "y"}, "'input' and 'context'"),
            (AB | {"prompt": [USER], "input": "x"}, "'input' is 'x'"),
            (AB | {"prompt": [USER | {"weight": 0}]}, "'prompt[].weight' is 0"),
            (AB | {"prompt": [USER | {"train": False}]}, "'prompt[].train' is False"),
        ]
    ),
    (read_conversations, "a.jsonl", to_jsonl(AB | {"split": "test"}, AB), ":2: ", "'split'"),
    *(
        (read_conversations, "a.jsonl", to_jsonl({"messages": messages}), f":1{start}", value)
        for messages, start, value in [
            ([USER | {"role": "tool"}], ", message 1: ", "'tool'"),
            ([USER, YES | {"input": "x"}], ", message 2: ", "assistant"),
            ([USER | {"content": [{"type": "image_url"}]}], ", message 1: ", "'text'"),
            ([YES | {"content": [{"type": "thinking", "text": "x"}]}], ", message 1: ", "thinking"),
            ([SYSTEM, USER, YES, USER], ": ", "system, user, assistant, user"),
        ]
    ),
    *(
        (read_preference_pairs, "a.jsonl", to_jsonl(row), ":1: ", value)
        for row, value in [
            ({"chosen": [USER, YES], "rejected": [YES | USER, YES, USER, YES]}, "'rejected'"),
            ({"chosen": "Human: a", "rejected": "b"}, "'chosen' is 'Human: a'"),
            *(
                (PAIR | {"prompt": "Is it green?", name: "x"}, f"'{name}' is 'x'")
                for name in ("input", "context")
            ),
            ({"chosen": [SYSTEM, USER, YES], "rejected": [USER, YES], "system": "s"}, "'system'"),
        ]
    ),
]


def test_invalid_files_are_rejected_with_their_place(tmp_path):
    for read, name, content, start, value in INVALID:
        path = write(tmp_path / name, content)
        with pytest.raises(DataError) as error:
            read(path)
        message = str(error.value)
        assert message.startswith(f"{path}{start}")
        assert value in message


def test_an_invalid_file_is_closed_without_the_garbage_collector(tmp_path, monkeypatch):
    files, open_file = [], readers.open_regular_file
    monkeypatch.setattr(
        readers, "open_regular_file", lambda path: files.append(open_file(path)) or files[-1]
    )
    gc.disable()
    try:
        for name, content in (("a.csv", 'a\n"b"c\nd\n'), ("a.jsonl", "1e999\n2\n")):
            with pytest.raises(DataError):
                rows_of(write(tmp_path / name, content))
            assert files.pop().closed
    finally:
        gc.enable()


def test_blocks_may_split_characters(tmp_path, monkeypatch):
    content = "é\n\n€ 🙂\r\n"
    for size in (1, 2, 1000):
        monkeypatch.setattr(readers, "READ_BLOCK_BYTES", size)
        path = write(tmp_path / "README", "\ufeff" + content)
        assert read_text_file(path) == content
        assert count_chars(path) == len(content)
        for invalid in (b"\xe2\x28\xa1", b"\0", b"\xe2\x82"):
            path = write(tmp_path / "a.txt", "é\n\n€".encode() + invalid)
            with pytest.raises(DataError, match=r"a\.txt:3: "):
                read_text_file(path)


def test_corrupt_files_and_rows_that_would_fill_the_memory_are_rejected(tmp_path, monkeypatch):
    whole, path = gzip.compress(b'"text"\n' * 1000), tmp_path / "a.jsonl.gz"
    for data in (whole[:-9], whole[:-5] + b"\0" + whole[-4:], b"plain text", b""):
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"cannot read {path}"):
            rows_of(path)
    for name, limit in (("MAX_LINE_CHARS", 100), ("READ_BLOCK_BYTES", 10), ("MAX_JSON_BLOCKS", 10)):
        monkeypatch.setattr(readers, name, limit)
    long = f'["{"x" * 101}"]'
    for name, content in (("jsonl", long), ("csv", 'text\n"' + "a\n" * 99), ("json", long)):
        with pytest.raises(DataError, match=rf"{name}.*(100|larger)"):
            rows_of(write(tmp_path / f"a.{name}", content))
