"""Hub files come from the cache that all Hugging Face tools share, and are verified."""

import contextlib
import hashlib
import json
import re
from pathlib import Path

import huggingface_hub
import pytest

from gptjax.errors import GptjaxError, ModelError, ResourceError
from gptjax.fileio.download import Pin
from gptjax.weights import hub
from tests.servers import COMMIT, head, serving, use_hub
from tests.servers import hub as hub_server

FILES = {
    "config.json": b'{"n_layer": 2}',
    "vocab.json": b"{}",
    "merges.txt": b"#version: 0.2\n",
    "model.safetensors": b"weights" * 1000,
}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = {"weight_map": {"wte": SHARDS[0], "wpe": SHARDS[0], "ln_f": SHARDS[1]}}
SHARDED = {
    **{"config.json": b"{}", "tokenizer.json": b"{}", "chat_template.jinja": b"{{ messages }}"},
    hub.INDEX: json.dumps(INDEX).encode(),
    SHARDS[0]: b"first" * 500,
    SHARDS[1]: b"second" * 500,
}


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Serves these files as every repository of the hub; yields the requests."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the library's retries

    @contextlib.contextmanager
    def serve(files):
        with serving(hub_server(files)) as (url, asked):
            use_hub(monkeypatch, tmp_path, url)
            yield asked

    return serve


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.fast
@pytest.mark.parametrize("files", [FILES, SHARDED])
def test_files_are_downloaded_once_also_if_another_tool_did(host, files):
    with host(files | {"pytorch_model.bin": b"pickle", "README.md": b"#"}) as asked:
        folder = hub.fetch_repo("a/b")
        paths = [request.path for request in asked if not request.path.endswith("/config.json")]
        assert all(path.startswith(f"/a/b/resolve/{COMMIT}/") for path in paths)
        for name in files:
            huggingface_hub.hf_hub_download("c/d", name)
        asked.clear()
        assert hub.fetch_repo("a/b") == hub.fetch_repo(f"a/b@{COMMIT}") == folder
        other = hub.fetch_repo("c/d")

    assert asked == []
    assert read(folder) == read(other) == files


def test_offline_settings_forbid_requests(host, monkeypatch):
    for name in ("GPTJAX_OFFLINE", "HF_HUB_OFFLINE"):
        with host(SHARDED) as asked:
            monkeypatch.setenv(name, "1")  # Hugging Face's is read at import
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", name[:2] == "HF")
            with pytest.raises(ModelError, match=f"config.json of a/b@main .*{name}"):
                hub.fetch_repo("a/b")
        assert asked == []


def test_a_flipped_byte_in_cached_weights_is_an_error(host):
    with host(SHARDED) as asked:
        folder = hub.fetch_repo("a/b")
        for name in SHARDS:
            blob = (folder / name).resolve()
            blob.write_bytes(SHARDED[name][:-1] + b"X")
            asked.clear()
            expected = hashlib.sha256(SHARDED[name]).hexdigest()
            with pytest.raises(ModelError, match=f"{expected}. Delete {blob}"):
                hub.fetch_repo("a/b")
            assert asked == []
            blob.unlink()
            hub.fetch_repo("a/b")
            assert {Path(request.path).name for request in asked} == {name}  # and no other

    assert read(folder) == SHARDED


@pytest.mark.parametrize("wrong", FILES)
def test_pinned_files_must_have_the_pinned_hash(host, monkeypatch, wrong):
    pins = {n: Pin(len(b), hashlib.sha256(b).hexdigest()) for n, b in FILES.items()}
    monkeypatch.setitem(hub.PINNED_REPOS, "gpt2", hub.Repository("o/n", COMMIT, pins))

    with host(FILES | {wrong: FILES[wrong] + b" "}) as asked:
        with pytest.raises(ModelError, match=f"{wrong} .*{pins[wrong].sha256}"):
            hub.fetch_repo("gpt2")
        assert {request.path.split("/")[4] for request in asked} == {COMMIT}


def refuse(status, code=""):
    return lambda handler: head(handler, status, X_Error_Code=code, Content_Length=0)


@pytest.mark.parametrize(
    ("files", "message", "exit_code"),
    [
        ({}, "a/b@main has no config.json", 2),
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "no safetensors.*pytorch_model.bin", 2),
        ({n: b for n, b in SHARDED.items() if n != SHARDS[1]}, f"no {SHARDS[1]}", 2),
        ({"config.json": refuse(404, "RepoNotFound")}, "a/b on the hub.*HF_TOKEN", 2),
        ({"config.json": refuse(500)}, "config.json of a/b@main: .*500", 1),
    ],
)
def test_errors_of_the_hub_are_one_sentence(host, files, message, exit_code):
    with host(files) as asked, pytest.raises(GptjaxError, match=message) as error:
        hub.fetch_repo("a/b")

    assert error.value.exit_code == exit_code
    assert "\n" not in str(error.value)
    assert not any("pytorch_model.bin" in request.path for request in asked)


def test_a_hostile_index_names_nothing_that_is_downloaded(tmp_path):
    path = tmp_path / hub.INDEX
    names = ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "x.bin", "", 1, ["x"]]

    maps = [*({"wte": name} for name in names), {}, []]
    for index in (*({"weight_map": weight_map} for weight_map in maps), {}, []):
        path.write_text(json.dumps(index))
        with pytest.raises(ModelError, match=f"{hub.INDEX} .*weight_map"):
            hub.read_shards(path)


def test_invalid_names_and_an_unreachable_hub_are_errors_without_its_password(
    tmp_path, monkeypatch
):
    use_hub(monkeypatch, tmp_path, "http://user:secret@127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    names = ["gtp2", "a/b/c", "../b", "a/..", "a..b/c", "a/b@", "a/b@../c", "/a/b", "a/b\n", ""]
    for name in names:
        with pytest.raises(ModelError, match="gpt2-medium"):
            hub.fetch_repo(name)
    for name, kind in (("a/b", ResourceError), ("owner/name.git", ModelError)):  # not allowed
        with pytest.raises(kind, match=re.escape(name)) as error:
            hub.fetch_repo(name)
        assert "secret" not in str(error.value)
