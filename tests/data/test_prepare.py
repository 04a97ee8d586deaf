"""Every document reaches one split, whole, with the tokenizer that goes with it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import DataConfig
from gptjax.data import prepare as module
from gptjax.data import text
from gptjax.data import text as split
from gptjax.data.prepare import open_dataset, open_prepared, prepare_dataset, sample_windows
from gptjax.data.text import find_sources, iter_split_spans, make_split_rule
from gptjax.data.token_files import TokenDataset, verify_prepared
from gptjax.errors import ConfigError, DataError
from gptjax.tokenizer import tokenizer

EOT = 256  # of the tokenizer "bytes"


def jsonl(path: Path, texts: list[str]) -> Path:
    """A file of one document a line."""
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return path


def texts_of(tokens: TokenDataset | None) -> list[str]:
    """The documents of a split in bytes, and its shape checked."""
    ids = tokens.read(0, len(tokens)).tolist()
    assert ids[0] == ids[-1] == EOT
    whole = "".join("\0" if i == EOT else chr(i) for i in ids[1:-1])
    return [t.encode("latin-1").decode() for t in whole.split("\0")]


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A counter of new folders, as hypothesis runs many examples in one test."""
    return (tmp_path_factory.mktemp("prepare") for _ in iter(int, 1))


TEXTS = [f"Document {n}, größer <|endoftext|> " * (n % 5 + 1) for n in range(20)]


@pytest.mark.fast
@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1),
        min_size=2,
        max_size=12,
    ),
    st.sampled_from([0.01, 0.1, 0.5, 0.99]),
    st.integers(0, 3),
)
def test_every_document_reaches_exactly_one_split(scratch, texts, fraction, seed):
    folder = next(scratch)
    path = jsonl(folder / "a.jsonl", texts)

    prepare_dataset([path], "bytes", folder / "out", val_fraction=fraction, seed=seed)

    train, validation, _ = open_prepared(folder / "out")
    kept, held_out = texts_of(train), texts_of(validation)
    assert sorted(kept + held_out) == sorted(texts)
    rest = iter(texts)
    assert all(t in rest for t in kept)  # in order
    wanted = min(max(round(fraction * len(texts)), 1), len(texts) - 1)
    assert len(held_out) == validation.documents == wanted
    assert train.documents == len(kept)
    assert verify_prepared(folder / "out") == []


@pytest.mark.fast
def test_the_stream_is_as_documented(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ["ab", "", "c<|endoftext|>"])

    info = prepare_dataset([path], "bytes", tmp_path / "out", val_fraction=0.0)

    train, validation, _ = open_prepared(tmp_path / "out")
    assert train.read(0, len(train)).tolist() == ([EOT, *b"ab", EOT, *b"c<|endoftext|>", EOT])
    assert validation is None
    assert info.meta["splits"]["train"] | {"shards": 0} == {
        "documents": 2,
        "tokens": 19,
        "bytes": 16,
        "shards": 0,
    }


def test_the_result_does_not_depend_on_workers_or_the_moment(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    monkeypatch.setattr(module, "TASK_CHARS", 50)
    monkeypatch.setattr(text, "CHUNK_CHARS", 20)

    for workers in (1, 4):
        out = tmp_path / str(workers)
        prepare_dataset([path], "bpe:280", out, workers=workers, shard_tokens=37)

    assert contents(tmp_path / "1") == contents(tmp_path / "4")
    assert len(list((tmp_path / "1").glob("train-*.bin"))) > 3


def test_pieces_leave_the_tokens_of_a_long_document_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CHUNK_CHARS", 64)
    monkeypatch.setattr(module, "TASK_CHARS", 100)
    content = " ".join(f"word{n}\n\n don't" for n in range(200))
    (tmp_path / "a.txt").write_text(content)
    gpt2 = tokenizer.load_tokenizer("gpt2")

    prepare_dataset([tmp_path / "a.txt"], "gpt2", tmp_path / "out", val_fraction=0.0)

    train = open_prepared(tmp_path / "out").train
    ids = [gpt2.eot_token, *gpt2.encode(content), gpt2.eot_token]
    assert train.read(0, len(train)).tolist() == ids


@pytest.mark.fast
def test_a_single_document_is_cut_where_nanogpt_cuts_it(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CHUNK_CHARS", 10)
    content = "größer " * 31
    (tmp_path / "a.txt").write_text(content)
    n = int(len(content) * 0.9)

    prepare_dataset([tmp_path / "a.txt"], "bytes", tmp_path / "out")

    train, validation, _ = open_prepared(tmp_path / "out")
    assert texts_of(train) == [content[:n]]
    assert texts_of(validation) == [content[n:]]
    assert (train.documents, validation.documents) == (1, 1)


def test_many_documents_are_held_out_by_lot(tmp_path):
    def held_out(seed: int) -> list[str]:
        parts = iter_split_spans(sources, make_split_rule(sources, 0.1, seed), "")
        return [part.text for part in parts if part.split == "validation"]

    count = 5000  # above the number up to which documents are counted
    sources = find_sources([jsonl(tmp_path / "a.jsonl", [str(n) for n in range(count)])])

    assert 0.085 * count < len(held_out(0)) < 0.115 * count
    assert held_out(0) == held_out(0) != held_out(1)


def test_an_own_tokenizer_is_learned_from_what_is_not_held_out(tmp_path):
    texts = [f"{word} " * 50 for word in ["apple", "stone", "river", "cloud", "bread"]]
    path = jsonl(tmp_path / "a.jsonl", texts)

    info = prepare_dataset([path], "bpe:270", tmp_path / "out", val_fraction=0.2)

    train, _, mine = open_prepared(tmp_path / "out")
    kept = [
        mine.decode(train.read(start + 1, stop - start - 1))
        for start, stop in map(train.document_range, range(train.documents))
    ]
    assert len(kept) == 4
    assert mine.hash == info.meta["tokenizer"]["hash"]
    assert mine.hash == tokenizer.train_tokenizer(kept, 270).hash
    assert mine.hash != tokenizer.train_tokenizer(texts, 270).hash
    assert (mine.name, mine.vocab_size) == ("bpe:270", 270)
    with pytest.raises(ConfigError, match=r"'bpe:many' has no size"):
        prepare_dataset([path], "bpe:many", tmp_path / "other")


@pytest.mark.fast
def test_the_same_call_again_finds_its_work_done_and_another_is_refused(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out"
    first = prepare_dataset([path], "bytes", out)
    before = contents(out), (out / "meta.json").stat().st_mtime_ns

    assert prepare_dataset([path], "bytes", out) == first
    for change in ({"seed": 1}, {"val_fraction": 0.2}, {"tokenizer": "bpe:280"}):
        with pytest.raises(DataError, match="out already holds other data, or the same"):
            prepare_dataset([path], **{"tokenizer": "bytes", "out": out, **change})
    jsonl(path, TEXTS[:-1])
    with pytest.raises(DataError, match="Choose another folder, or remove this one"):
        prepare_dataset([path], "bytes", out)
    assert (contents(out), (out / "meta.json").stat().st_mtime_ns) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out"
    out.mkdir()
    prepare_dataset([path], "bytes", out)  # an empty one is fine

    for other in (path, path.parent):
        with pytest.raises(DataError, match="already holds other data"):
            prepare_dataset([path], "bytes", other)
    with pytest.raises(DataError, match=r"cannot write .*Choose a writable folder"):
        prepare_dataset([path], "bytes", path / "below")


@pytest.mark.parametrize("broken", ["encode_array", "save"])
def test_a_failure_leaves_nothing_that_looks_finished(tmp_path, monkeypatch, broken):
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    monkeypatch.setattr(module, "TASK_CHARS", 50)
    calls = []
    original = getattr(tokenizer.Tokenizer, broken)

    def fails(self, *args):
        calls.append(args)
        if len(calls) > {"encode_array": 9, "save": 0}[broken]:
            raise OSError("no space left on device")
        return original(self, *args)

    monkeypatch.setattr(tokenizer.Tokenizer, broken, fails)
    with pytest.raises(DataError, match=r"cannot write .*out: no space left on device"):
        prepare_dataset([path], "bytes", tmp_path / "out")

    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_text_that_is_not_there_or_too_short_is_refused(tmp_path):
    for texts, message in [
        ([], "no text: all files and rows are empty"),
        (["", ""], "no text: all files and rows are empty"),
        (["a"], "too short for val_fraction=0.1.* --val-fraction 0"),
    ]:
        path = jsonl(tmp_path / "a.jsonl", texts)
        with pytest.raises(DataError, match=message):
            prepare_dataset([path], "bytes", tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.jsonl"]
    for values in ({"val_fraction": 1.0}, {"val_fraction": -0.1}, {"shard_tokens": 0}):
        with pytest.raises(ConfigError, match=r"must be in \[0, 1\), and shard_tokens"):
            prepare_dataset([path], "bytes", tmp_path / "out", **values)


def test_a_summary_and_windows_show_what_was_made(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))

    info = str(prepare_dataset([path], "bytes", tmp_path / "out"))

    assert "a.jsonl, column 'body'" in info
    assert "bytes tokens" in info
    assert "18 documents" in info
    windows = sample_windows(tmp_path / "out", n=3, length=20)
    assert len(windows) == 3
    assert windows[0].startswith("<|endoftext|>Document ")


@pytest.mark.fast
def test_text_is_prepared_once_for_a_run(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    config = DataConfig(source=str(path), tokenizer="bytes")

    first = open_dataset(config, tmp_path / "run")
    monkeypatch.setattr(module, "write_prepared", None)  # would fail if it were called
    second = open_dataset(config, tmp_path / "run")

    assert texts_of(first.train) == texts_of(second.train)
    assert first.tokenizer == second.tokenizer == tokenizer.load_tokenizer("bytes")


def test_a_prepared_folder_is_opened_with_its_own_tokenizer_only(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare_dataset([path], "bytes", tmp_path / "bytes")
    prepare_dataset([path], "bpe:280", tmp_path / "bpe")

    def opened(source: str, name: str) -> tokenizer.Tokenizer:
        config = DataConfig(source=str(tmp_path / source), tokenizer=name)
        return open_dataset(config, tmp_path / "run").tokenizer

    folder = str(tmp_path / "bpe" / "tokenizer")
    hashes = {opened("bpe", name).hash for name in ("bpe:280", "", folder)}
    assert len(hashes) == 1
    assert opened("bytes", "bytes").name == opened("bytes", "").name == "bytes"
    assert not (tmp_path / "run").exists()
    for source, name in (("bpe", "bytes"), ("bytes", "bpe:280"), ("bytes", folder)):
        with pytest.raises(DataError, match=r"data\.tokenizer=.* does not match .*prepared"):
            opened(source, name)


def test_a_swapped_tokenizer_is_noticed(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare_dataset([path], "bytes", tmp_path / "out")
    tokenizer.train_tokenizer(TEXTS, 260).save(tmp_path / "out" / "tokenizer")

    with pytest.raises(DataError, match=r"tokenizer has the hash .* prepared with .*Prepare th"):
        open_prepared(tmp_path / "out")


def test_foreign_tokens_are_opened_with_the_configured_tokenizer(tmp_path):
    np.array([*b"ab", EOT, *b"c", EOT], "<u2").tofile(tmp_path / "val.bin")
    config = DataConfig(source=str(tmp_path), tokenizer="bytes")

    with pytest.raises(DataError, match=r"has validation tokens only"):
        open_dataset(config, tmp_path / "run")
    (tmp_path / "val.bin").rename(tmp_path / "train.bin")
    train, validation, bytes_ = open_dataset(config, tmp_path / "run")

    assert train.read(0, 5).tolist() == [*b"ab", EOT, *b"c", EOT]
    assert (train.eot, train.vocab_size) == (bytes_.eot_token, bytes_.vocab_size)
    assert validation is None


def test_a_bar_is_shown_on_a_terminal_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(split, "PROGRESS_BAR_SECONDS", -1)
    sources = find_sources([jsonl(tmp_path / "a.jsonl", TEXTS)])

    list(split.iter_all_chunks(sources, "encoding"))
    quiet = capsys.readouterr()
    monkeypatch.setattr(split.sys.stderr, "isatty", lambda: True)
    list(split.iter_all_chunks(sources, "encoding"))

    assert (quiet.out, quiet.err) == ("", "")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"\rencoding [{'#' * 30}] 100%" in shown.err


def test_real_texts_are_prepared_as_nanogpt_counts_them(tmp_path, shared_data):
    splits = prepare_dataset(["tinyshakespeare"], "gpt2", tmp_path / "out").meta["splits"]

    # nanoGPT's readme: 301,966 and 36,059 tokens; ours have an eot at each end.
    assert splits["train"]["tokens"] == 301_966 + 2
    assert splits["validation"]["tokens"] == 36_059 + 2
