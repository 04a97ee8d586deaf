"""Every document reaches one split, whole, with the tokenizer that goes with it."""

import json
import os
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import DataConfig
from gptjax.data import prepare, text
from gptjax.data.prepare import open_dataset, open_prepared, prepare_dataset, sample_windows
from gptjax.data.token_files import verify_prepared
from gptjax.errors import ConfigError, DataError
from gptjax.tokenizer.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from tests.data.tables import quick, texts, write

EOT = 256  # of the tokenizer "bytes"
TEXTS = [f"Document {n}, größer <|endoftext|> " * (n % 5 + 1) for n in range(20)]


def jsonl(path, documents):
    """A file of one document per line."""
    return write(path, "".join(json.dumps(document) + "\n" for document in documents))


def documents_of(tokens):
    """The documents of a split in bytes."""
    ids = tokens.read(0, len(tokens)).tolist()
    assert ids[0] == ids[-1] == EOT
    whole = "".join("\0" if i == EOT else chr(i) for i in ids[1:-1])
    return [document.encode("latin-1").decode() for document in whole.split("\0")]


def contents(folder):
    """All files of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """New folders."""
    return (tmp_path_factory.mktemp("prepare") for _ in iter(int, 1))


@pytest.mark.fast
@quick
@given(
    st.lists(texts.filter(bool), min_size=2, max_size=8),
    st.sampled_from([0.01, 0.1, 0.5, 0.99]),
    st.integers(0, 3),
)
def test_every_document_reaches_exactly_one_split(folders, documents, fraction, seed):
    folder = next(folders)
    path = jsonl(folder / "a.jsonl", documents)

    info = prepare_dataset([path], "bytes", folder / "out", val_fraction=fraction, seed=seed)

    train, validation, _ = open_prepared(folder / "out")
    kept, held_out = documents_of(train), documents_of(validation)
    assert sorted(kept + held_out) == sorted(documents)
    rest = iter(documents)
    assert all(document in rest for document in kept)  # in order
    assert len(held_out) == min(max(round(fraction * len(documents)), 1), len(documents) - 1)
    assert [s["documents"] for s in info.meta["splits"].values()] == [len(kept), len(held_out)]
    assert verify_prepared(folder / "out") == []


@pytest.mark.fast
def test_the_stream_is_as_documented(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ["ab", "", "c<|endoftext|>"])

    info = prepare_dataset([path], "bytes", tmp_path / "out", val_fraction=0.0)

    train, validation, _ = open_prepared(tmp_path / "out")
    assert train.read(0, len(train)).tolist() == [EOT, *b"ab", EOT, *b"c<|endoftext|>", EOT]
    assert validation is None
    counts = {"documents": 2, "tokens": 19, "bytes": 16}
    assert info.meta["splits"]["train"].items() >= counts.items()
    shard = info.meta["splits"]["train"]["shards"][0]
    assert np.fromfile(tmp_path / "out" / "train-00000.idx", "<u8").tolist() == [3, 18]
    assert shard["documents"] == 2


def test_the_result_depends_neither_on_workers_nor_on_chunks(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    monkeypatch.setattr(prepare, "TASK_CHARS", 50)
    monkeypatch.setattr(text, "CHUNK_CHARS", 20)
    for workers in (1, 4):
        out = tmp_path / str(workers)
        prepare_dataset([path], "bpe:280", out, workers=workers, shard_tokens=37)
    content = " ".join(f"word{n}\n\n don't" for n in range(50))
    whole = write(tmp_path / "a.txt", content)
    gpt2 = load_tokenizer("gpt2")

    prepare_dataset([whole], "gpt2", tmp_path / "out", val_fraction=0.0)

    assert contents(tmp_path / "1") == contents(tmp_path / "4")
    assert len(list((tmp_path / "1").glob("train-*.bin"))) > 3
    train = open_prepared(tmp_path / "out").train
    ids = [gpt2.eot_token, *gpt2.encode(content), gpt2.eot_token]
    assert train.read(0, len(train)).tolist() == ids


@pytest.mark.fast
def test_a_single_document_is_cut_where_nanogpt_cuts_it(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CHUNK_CHARS", 10)
    content = "größer " * 31
    path = write(tmp_path / "a.txt", content)
    n = int(len(content) * 0.9)

    info = prepare_dataset([path], "bytes", tmp_path / "out")

    train, validation, _ = open_prepared(tmp_path / "out")
    assert documents_of(train) == [content[:n]]
    assert documents_of(validation) == [content[n:]]
    assert [split["documents"] for split in info.meta["splits"].values()] == [1, 1]


def test_an_own_tokenizer_is_trained_on_the_training_split(tmp_path):
    texts = [f"{word} " * 50 for word in ["apple", "stone", "river", "cloud", "bread"]]
    path = jsonl(tmp_path / "a.jsonl", texts)

    info = prepare_dataset([path], "bpe:270", tmp_path / "out", val_fraction=0.2)

    train, _, tokenizer = open_prepared(tmp_path / "out")
    ends = np.fromfile(tmp_path / "out" / "train-00000.idx", "<u8").tolist()
    kept = [
        tokenizer.decode(train.read(start + 1, stop - start - 1))
        for start, stop in zip([0, *ends[:-1]], ends, strict=True)
    ]
    assert len(kept) == 4
    assert tokenizer.hash == info.meta["tokenizer"]["hash"] == train_tokenizer(kept, 270).hash
    assert tokenizer.hash != train_tokenizer(texts, 270).hash
    assert (tokenizer.name, tokenizer.vocab_size) == ("bpe:270", 270)
    with pytest.raises(ConfigError, match="'bpe:many'"):
        prepare_dataset([path], "bpe:many", tmp_path / "other")


@pytest.mark.fast
def test_the_same_call_does_nothing_and_another_is_rejected(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is fine
    first = prepare_dataset([path], "bytes", out)
    before = contents(out), (out / "meta.json").stat().st_mtime_ns

    assert prepare_dataset([path], "bytes", out) == first
    for change in ({"seed": 1}, {"val_fraction": 0.2}, {"tokenizer": "bpe:280"}):
        with pytest.raises(DataError, match=f"{out} "):
            prepare_dataset([path], **{"tokenizer": "bytes", "out": out, **change})
    jsonl(path, TEXTS[:-1])
    for other in (out, path, path.parent, path / "below"):
        with pytest.raises(DataError, match=f"{other}"):
            prepare_dataset([path], "bytes", other)
    assert (contents(out), (out / "meta.json").stat().st_mtime_ns) == before


@pytest.mark.parametrize(("broken", "calls"), [("encode_array", 9), ("save", 0)])
def test_a_failure_leaves_no_folder(tmp_path, monkeypatch, broken, calls):
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    monkeypatch.setattr(prepare, "TASK_CHARS", 50)
    original, remaining = getattr(Tokenizer, broken), list(range(calls))

    def fail(self, *args):
        if not remaining:
            raise OSError("no space left on device")
        remaining.pop()
        return original(self, *args)

    monkeypatch.setattr(Tokenizer, broken, fail)
    with pytest.raises(DataError, match=r"out: no space left on device"):
        prepare_dataset([path], "bytes", tmp_path / "out")

    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_too_little_text_and_invalid_options_are_rejected(tmp_path):
    for documents, value in [([], "empty"), (["", ""], "empty"), (["a"], "val_fraction=0.1")]:
        path = jsonl(tmp_path / "a.jsonl", documents)
        with pytest.raises(DataError, match=value):
            prepare_dataset([path], "bytes", tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.jsonl"]
    for name, value in (("val_fraction", 1.0), ("val_fraction", -0.1), ("shard_tokens", 0)):
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            prepare_dataset([path], "bytes", tmp_path / "out", **{name: value})


def test_the_summary_and_windows_show_the_data(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"body": text} for text in TEXTS])

    info = prepare_dataset([path], "bytes", tmp_path / "out")

    for value in ("a.jsonl, column 'body'", "bytes tokens", "18 documents"):
        assert value in str(info)
    assert " MB/s" in info.format_throughput(2)
    windows = sample_windows(tmp_path / "out", n=3, length=20)
    assert [len(window) >= 20 for window in windows] == [True] * 3
    assert windows[0].startswith("<|endoftext|>Document ")


@pytest.mark.fast
def test_a_run_prepares_its_text_once(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    config = DataConfig(source=str(path), tokenizer="bytes")

    first = open_dataset(config, tmp_path / "run")
    monkeypatch.setattr(prepare, "write_prepared", None)  # would fail if it were called
    second = open_dataset(config, tmp_path / "run")

    assert documents_of(first.train) == documents_of(second.train)
    assert first.tokenizer == second.tokenizer == load_tokenizer("bytes")


def test_prepared_data_is_opened_only_with_its_own_tokenizer(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare_dataset([path], "bytes", tmp_path / "bytes")
    prepare_dataset([path], "bpe:280", tmp_path / "bpe")

    def open_tokenizer(source, name):
        config = DataConfig(source=str(tmp_path / source), tokenizer=name)
        return open_dataset(config, tmp_path / "run").tokenizer

    folder = str(tmp_path / "bpe" / "tokenizer")
    assert len({open_tokenizer("bpe", name).hash for name in ("bpe:280", "", folder)}) == 1
    assert open_tokenizer("bytes", "bytes").name == open_tokenizer("bytes", "").name == "bytes"
    assert not (tmp_path / "run").exists()
    for source, name in (("bpe", "bytes"), ("bytes", "bpe:280"), ("bytes", folder)):
        with pytest.raises(DataError, match=r"data\.tokenizer="):
            open_tokenizer(source, name)
    meta_path = tmp_path / "bytes" / "meta.json"
    meta = json.loads(meta_path.read_text())
    meta_path.write_text(json.dumps(meta | {"eot": 3}))
    with pytest.raises(DataError, match="eot=3"):
        open_prepared(tmp_path / "bytes")
    train_tokenizer(TEXTS, 260).save(tmp_path / "bpe" / "tokenizer")
    with pytest.raises(DataError, match="hash"):
        open_prepared(tmp_path / "bpe")


def test_external_tokens_are_opened_with_the_configured_tokenizer(tmp_path):
    np.array([*b"ab", EOT, *b"c", EOT], "<u2").tofile(tmp_path / "val.bin")
    config = DataConfig(source=str(tmp_path), tokenizer="bytes")

    with pytest.raises(DataError, match=f"{tmp_path} has validation"):
        open_dataset(config, tmp_path / "run")
    (tmp_path / "val.bin").rename(tmp_path / "train.bin")
    train, validation, tokenizer = open_dataset(config, tmp_path / "run")

    assert train.read(0, 5).tolist() == [*b"ab", EOT, *b"c", EOT]
    assert (train.eot, train.vocab_size) == (tokenizer.eot_token, tokenizer.vocab_size)
    assert validation is None


def test_progress_is_shown_on_a_terminal_only(tmp_path, monkeypatch, capsys):
    sources = text.find_sources([jsonl(tmp_path / "a.jsonl", TEXTS)])

    list(text.iter_all_chunks(sources, "encoding"))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(text.iter_all_chunks(sources, "encoding"))

    shown = capsys.readouterr()
    assert shown.out == ""
    assert "encoding:   0%" in shown.err


def test_real_texts_are_prepared_as_nanogpt_counts_them(tmp_path, shared_data):
    splits = prepare_dataset(["tinyshakespeare"], "gpt2", tmp_path / "out").meta["splits"]

    # nanoGPT's readme: 301,966 and 36,059 tokens; ours have an eot at each end.
    assert splits["train"]["tokens"] == 301_966 + 2
    assert splits["validation"]["tokens"] == 36_059 + 2
