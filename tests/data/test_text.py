"""Documents of text files and tables, their chunks, and the validation split."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data import text
from gptjax.data.text import chunk_document, find_sources, iter_chunks
from gptjax.errors import DataError
from gptjax.tokenizer.tokenizer import load_tokenizer
from tests.data.tables import csv_text, quick, write


def documents(*paths, column="", unread=None):
    chunks = [c for source in find_sources(paths, column) for c in iter_chunks(source, unread)]
    joined = "".join(chunk.text + "\1" * chunk.is_last for chunk in chunks)
    assert joined.endswith("\1") or not chunks
    return joined.split("\1")[:-1]


def test_a_text_file_is_a_document_and_each_row_of_a_table_is_one(tmp_path):
    content = "One.\r\n\r\n\n  <|endoftext|> Zwölf 🙂\t\n"
    texts = ["first", 'two\nlines, "quoted"', "🙂 <|endoftext|>", ""]  # empty ones are dropped
    rows = "\n".join(json.dumps({"n": 1, "text": t}) for t in texts)
    table = csv_text([("id", "answer"), *enumerate(texts)])
    for name, data, column, expected in [
        ("a.MD", content, "", [content]),
        ("a.txt.gz", content, "", [content]),
        ("empty.txt", b"\xef\xbb\xbf", "", []),
        ("a.jsonl", rows, "", texts[:3]),
        ("b.jsonl.gz", "\n".join(map(json.dumps, texts)), "", texts[:3]),
        ("d.csv", table, "answer", texts[:3]),
    ]:
        unread = Counter()
        assert documents(write(tmp_path / name, data), column=column, unread=unread) == expected
        columns = {".csv": {"id": 4}, ".jsonl": {"n": 4}} if name[0] in "ad" else {}
        empty = {"empty documents": 1} if expected == texts[:3] or name == "empty.txt" else {}
        assert unread == columns.get(name[1:], {}) | empty


@quick
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["we're", "Zwölf", "1234", "--", "x.", "'s", "🙂é"]),
            st.sampled_from([" ", "\n", "  ", "\n\n ", "\r\n", "\t ", "\u3000", " \n"]),
        ),
        max_size=40,
    )
)
def test_chunks_are_short_and_have_the_tokens_of_the_document(monkeypatch, words):
    monkeypatch.setattr(text, "CHUNK_CHARS", 16)
    gpt2 = load_tokenizer("gpt2")
    # Each 16 characters need a position to split at.
    content = "".join(word + space + "a b" for word, space in words)

    pairs = list(chunk_document([content[:5], content[5:]]))
    chunks = [chunk for chunk, _ in pairs]

    assert "".join(chunks) == content
    assert all(0 < len(chunk) <= 16 for chunk in chunks)
    assert [last for _, last in pairs] == [False] * (len(chunks) - 1) + [True] * bool(words)
    assert [chunk for chunk, _ in chunk_document(["x" * 40])] == ["x" * 16, "x" * 16, "x" * 8]
    long_word = ["a" * 15, " " + "b" * 15, "b" * 15]
    assert [chunk for chunk, _ in chunk_document(["".join(long_word)])] == long_word
    assert [i for chunk in chunks for i in gpt2.encode(chunk)] == gpt2.encode(content)


def test_folders_globs_and_data_sets_give_known_files_in_order_and_once(tmp_path, shared_data):
    for name in ("b.txt", "a.md", "sub/c.jsonl", ".hidden/d.txt", "images/e.png", "sub/.f.md"):
        write(tmp_path / name, f'"{name}"')

    for paths, names in [
        ([tmp_path], ["a.md", "b.txt", "c.jsonl"]),
        ([tmp_path / "b.txt", tmp_path], ["b.txt", "a.md", "c.jsonl"]),
        ([tmp_path / "*.txt", tmp_path / "**" / "*.jsonl"], ["b.txt", "c.jsonl"]),
        (["verdict", "python-help"], ["the-verdict.txt", "python-help"]),
    ]:
        assert [source.path.name for source in find_sources(paths)] == names
    assert len(documents("python-help")) > 50
    with pytest.raises(DataError, match=r"images.*jsonl"):
        find_sources([tmp_path / "images"])
    write(tmp_path / "sub/out/meta.json", '{"format": "gptjax tokens 2"}')
    with pytest.raises(DataError, match="sub/out is prepared data"):
        find_sources([tmp_path])


def test_both_parts_of_a_single_document_have_one_start_and_one_end(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CHUNK_CHARS", 3)
    sources = find_sources([write(tmp_path / "a.txt", "ab cd ef")])

    for cut in range(1, 8):
        spans = list(text.iter_split_spans(sources, text.SplitRule(0, 0.0, cut), ""))
        for split, content in (("train", "ab cd ef"[:cut]), ("validation", "ab cd ef"[cut:])):
            part = [span for span in spans if span.split == split]
            assert "".join(span.text for span in part) == content
            assert [span.is_first for span in part] == [True] + [False] * (len(part) - 1)
            assert [span.is_last for span in part] == [False] * (len(part) - 1) + [True]
    # It is cut where nanoGPT cuts it: int(0.9 * 8).
    assert text.make_split_rule(sources, 0.1, 0).train_chars == 7


def test_many_documents_are_held_out_by_their_hash(tmp_path):
    count = 1200  # more than are counted for a fraction of 0.1
    sources = find_sources([write(tmp_path / "a.jsonl", "".join(f'"{n}"\n' for n in range(count)))])

    def held_out(seed):
        spans = text.iter_split_spans(sources, text.make_split_rule(sources, 0.1, seed), "")
        return [span.text for span in spans if span.split == "validation"]

    assert 0.07 * count < len(held_out(0)) < 0.13 * count
    assert held_out(0) == held_out(0) != held_out(1)


def test_the_work_for_a_long_document_is_linear(monkeypatch):
    monkeypatch.setattr(text, "CHUNK_CHARS", 10)
    copied = 0

    class Document(str):
        __slots__ = ()

        def __getitem__(self, index):
            nonlocal copied
            part = str(self)[index]
            copied += len(part)
            return Document(part)

        def __radd__(self, other):
            return Document(f"{other}{self}")

    for size in (1_000, 10_000):
        copied = 0
        assert len(list(chunk_document([Document("a " * (size // 2))]))) >= size // 10
        assert copied <= 2 * size
