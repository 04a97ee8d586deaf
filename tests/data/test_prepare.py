"""Every document reaches one split, whole, with the tokenizer that goes with it."""

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.cli.arguments import apply_overrides
from gptjax.config import DataConfig, RunConfig
from gptjax.data import prepare, text
from gptjax.data.prepare import open_dataset, open_prepared, prepare_dataset
from gptjax.data.token_files import verify_prepared
from gptjax.errors import ConfigError, DataError
from gptjax.runtime import timing
from gptjax.tokenizer.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from gptjax.training.estimate import resolve_config
from tests.data.tables import quick, texts, write

EOT = 256  # of the tokenizer "bytes"
TEXTS = [f"Document {n}, größer <|endoftext|> " * (n % 5 + 1) for n in range(20)]


def jsonl(path, documents):
    return write(path, "".join(json.dumps(document) + "\n" for document in documents))


def documents_of(tokens):
    """The documents of a split in bytes."""
    ids = tokens.read(0, len(tokens)).tolist()
    assert ids[0] == ids[-1] == EOT
    whole = "".join("\0" if i == EOT else chr(i) for i in ids[1:-1])
    return [document.encode("latin-1").decode() for document in whole.split("\0")]


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder), path.read_bytes()) for path in files]


@quick
@given(
    st.lists(texts.filter(bool), min_size=2, max_size=8),
    st.sampled_from([0.0, 0.01, 0.5, 0.99]),
    st.integers(0, 3),
)
def test_every_document_reaches_exactly_one_split(tmp_path_factory, documents, fraction, seed):
    folder = tmp_path_factory.mktemp("prepare")
    path = jsonl(folder / "a.jsonl", documents)

    prepare_dataset([path], "bytes", folder / "out", val_fraction=fraction, seed=seed)

    train, validation, _ = open_prepared(folder / "out")
    kept, held_out = documents_of(train), documents_of(validation) if validation else []
    assert sorted(kept + held_out) == sorted(documents)
    rest = iter(documents)
    assert all(document in rest for document in kept)  # in order
    count = round(fraction * len(documents))
    assert len(held_out) == (min(max(count, 1), len(documents) - 1) if fraction else 0)


def test_documents_start_with_bos_if_the_tokenizer_adds_it(tmp_path):
    tokenizer = dataclasses.replace(load_tokenizer("bytes"), bos_token=257, add_bos=True)
    dataclasses.replace(tokenizer, added_tokens={"<|bos|>": 257}).save(tmp_path / "tokenizer")
    path = jsonl(tmp_path / "a.jsonl", ["ab", "c"])

    prepare_dataset([path], str(tmp_path / "tokenizer"), tmp_path / "out", val_fraction=0.0)

    tokens, *_ = open_prepared(tmp_path / "out")
    stream = [EOT, 257, *b"ab", EOT, 257, *b"c", EOT]
    assert tokens.read(0, len(tokens)).tolist() == stream
    verify_prepared(tmp_path / "out")


def test_the_result_depends_neither_on_workers_nor_on_chunks(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    monkeypatch.setattr(prepare, "TASK_CHARS", 50)
    for workers, chunk_chars in ((1, 1000), (4, 20)):
        monkeypatch.setattr(text, "CHUNK_CHARS", chunk_chars)
        out = tmp_path / str(workers)
        prepare_dataset([path], "bpe:280", out, workers=workers, shard_tokens=37)

    assert contents(tmp_path / "1") == contents(tmp_path / "4")
    assert len(list((tmp_path / "1").glob("train-*.bin"))) > 3


def test_the_same_call_does_nothing_and_another_is_rejected(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is fine
    first = prepare_dataset([path], "bytes", out)
    monkeypatch.setattr(prepare, "write_prepared", None)  # would fail if it were called

    assert prepare_dataset([path], "bytes", out) == first
    options = {"tokenizer": "bytes", "out": out}
    for change in ({"seed": 1}, {"val_fraction": 0.2}, {"tokenizer": "bpe:280"}, {"out": tmp_path}):
        with pytest.raises(DataError, match=str(tmp_path)):
            prepare_dataset([path], **options | change)
    jsonl(path, TEXTS[:-1])
    with pytest.raises(DataError, match=f"{out} "):
        prepare_dataset([path], **options)


def test_columns_and_empty_documents_that_are_not_read_are_reported(tmp_path):
    rows = [{"text": "a"}, {"text": "", "id": 1}, {"text": "b", "title": "c"}, {"text": "d"}]

    info = prepare_dataset([jsonl(tmp_path / "a.jsonl", rows)], "bytes", tmp_path / "out")

    unread = "not read: empty documents (1), id (1), title (1)"
    assert str(info).endswith(unread)
    assert open_prepared(tmp_path / "out").train.unread == f"; {unread}"


def test_a_second_process_waits_and_uses_the_same_result(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    started, write_prepared = [], prepare.write_prepared

    def write_slowly(*args):
        started.append(args)
        if len(started) == 1:
            second = pool.submit(prepare_dataset, [path], "bytes", tmp_path / "out")
            with pytest.raises(TimeoutError):
                second.result(0.3)
            results.append(second)
        return write_prepared(*args)

    results = []
    monkeypatch.setattr(prepare, "write_prepared", write_slowly)
    with ThreadPoolExecutor() as pool:
        first = prepare_dataset([path], "bytes", tmp_path / "out")
        assert results[0].result() == first

    assert len(started) == 1
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]


def test_many_files_with_long_names_are_summarized(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(timing, "FIRST_PROGRESS_SECONDS", 0)
    caplog.set_level("INFO", "gptjax")
    folder, sizes = tmp_path / "text", []
    folder.mkdir()
    for count in (3, 60):
        for n in range(count):
            (folder / f"{n:0200d}.txt").write_text(f"text {n % 3}")
        out = tmp_path / str(count)
        info = str(prepare_dataset([folder], "bytes", out))
        sizes.append((out / "meta.json").stat().st_size)
        assert len(info.splitlines()) <= 8
        assert verify_prepared(out) == []

    assert sizes[1] <= sizes[0] + 20  # more digits
    assert "60 files" in info
    assert {line.split()[0] for line in caplog.messages} >= {"hashing", "encoding"}
    names = [json.loads(line)["file"] for line in (out / "sources.jsonl").read_text().splitlines()]
    assert names == sorted(os.listdir(folder))
    (out / "sources.jsonl").write_text("")
    assert "sources.jsonl" in verify_prepared(out)[0]


@pytest.mark.parametrize("change", [Path.unlink, lambda path: path.write_text("x")])
def test_a_file_that_changes_meanwhile_is_an_error(tmp_path, monkeypatch, change):
    path, write_prepared = jsonl(tmp_path / "a.jsonl", TEXTS), prepare.write_prepared

    def write_then_change(*args):
        meta = write_prepared(*args)
        change(path)
        return meta

    monkeypatch.setattr(prepare, "write_prepared", write_then_change)
    with pytest.raises(DataError, match=f"{path} changed"):
        prepare_dataset([path], "bytes", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_no_folder(tmp_path, monkeypatch):
    for documents, options, error, value in [
        (["a"], {}, DataError, "val_fraction=0.1"),
        (TEXTS, {"shard_tokens": 0}, ConfigError, "shard_tokens=0"),
    ]:
        path = jsonl(tmp_path / "a.jsonl", documents)
        with pytest.raises(error, match=value):
            prepare_dataset([path], **{"tokenizer": "bytes", "out": tmp_path / "out"} | options)
    full = mock.Mock(side_effect=OSError("no space left on device"))
    monkeypatch.setattr(Tokenizer, "encode_array", full)
    with pytest.raises(DataError, match="out: no space left on device"):
        prepare_dataset([path], "bytes", tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_prepared_data_is_opened_only_with_its_own_tokenizer(tmp_path):
    words = [f"{word} " * 50 for word in ("apple", "stone", "river", "cloud", "bread")]
    path = jsonl(tmp_path / "a.jsonl", words)
    prepare_dataset([path], "bytes", tmp_path / "bytes")
    prepare_dataset([path], "bpe:270", tmp_path / "bpe")

    def open_tokenizer(source, name):
        config = DataConfig(source=str(tmp_path / source), tokenizer=name)
        return open_dataset(config, tmp_path / "run").tokenizer

    tokenizer = open_tokenizer("bpe", "bpe:270")
    assert open_tokenizer("bpe", str(tmp_path / "bpe" / "tokenizer")).hash == tokenizer.hash
    kept = documents_of(open_prepared(tmp_path / "bytes").train)  # it is trained on these
    assert tokenizer.hash == train_tokenizer(kept, 270).hash != train_tokenizer(words, 270).hash
    assert (tokenizer.name, open_tokenizer("bytes", "").name) == ("bpe:270", "bytes")
    source = ["--data.source", str(tmp_path / "bpe")]  # the config's tokenizer is not the user's
    config = apply_overrides(RunConfig(data=DataConfig(tokenizer="bytes")), source)
    assert open_dataset(config.data, tmp_path / "run").tokenizer.hash == tokenizer.hash
    assert resolve_config(config).model.vocab_size == 270
    for name, value in (("val_fraction", 0.5), ("split_seed", 2), ("text_column", "a")):
        other = RunConfig(data=DataConfig(**{name: value}))
        open_dataset(apply_overrides(other, source).data, tmp_path / "run")
        named = apply_overrides(RunConfig(), [*source, f"--data.{name}", str(value)])
        with pytest.raises(ConfigError, match=rf"data\.{name}={value!r}"):
            open_dataset(named.data, tmp_path / "run")
    named = apply_overrides(RunConfig(), [*source, "--data.tokenizer", "bytes"])
    assert named.data.tokenizer == "bytes"
    for source, name in (("bpe", "bytes"), ("bytes", "bpe:270")):
        with pytest.raises(DataError, match=r"data\.tokenizer="):
            open_tokenizer(source, name)
    train_tokenizer(words, 270).save(tmp_path / "bpe" / "tokenizer")
    with pytest.raises(DataError, match="hash"):
        open_prepared(tmp_path / "bpe")


def test_real_texts_are_prepared_as_nanogpt_counts_them(tmp_path, shared_data):
    config = DataConfig(source="tinyshakespeare", tokenizer="gpt2")

    splits = open_dataset(config, tmp_path / "run")

    # nanoGPT's readme: 301,966 and 36,059 tokens; ours have an eot at each end.
    assert (len(splits.train), len(splits.validation)) == (301_966 + 2, 36_059 + 2)
