"""What the hub gives is checked at every use, and is asked for once."""

import contextlib
import hashlib
import json
import re
from pathlib import Path

import pytest

from gptjax.errors import ModelError
from gptjax.fileio.download import Pin
from gptjax.weights import hub
from tests.file_server import Answer, Handler, endless, file, head, plain, serving

FILES = {
    "config.json": b'{"n_layer": 2}',
    "vocab.json": b"{}",
    "merges.txt": b"#version: 0.2\n",
    "model.safetensors": b"weights" * 1000,
}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
MAP = {"wte": SHARDS[0], "wpe": SHARDS[0], "ln_f": SHARDS[1]}
SHARDED = {name: body for name, body in FILES.items() if "model" not in name} | {
    hub.INDEX: json.dumps({"weight_map": MAP}).encode(),
    SHARDS[0]: b"first" * 500,
    SHARDS[1]: b"second" * 500,
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache's folder of models, and no settings of the user's."""
    for name in ("GPTJAX_OFFLINE", "HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GPTJAX_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "models"


@pytest.fixture
def hosting(monkeypatch):
    """Makes a server the hub, with these files in its repository a/b."""

    @contextlib.contextmanager
    def host(files: dict[str, bytes | Answer], path: str = "/a/b/resolve/main/"):
        def answer(handler: Handler) -> None:
            body = files.get(handler.path.removeprefix(path))
            if body is None:
                head(handler, 404)
            elif isinstance(body, bytes):
                file(body)(handler)
            else:
                body(handler)

        with serving(answer) as (url, asked):
            monkeypatch.setenv("HF_ENDPOINT", url.removesuffix("/file"))
            yield asked

    return host


def read(folder: Path) -> dict[str, bytes]:
    """All files in the folder but the record."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files.pop(hub.RECORD)
    return files


def names(asked) -> list[str]:
    """The files asked for."""
    return [Path(request.path).name for request in asked]


@pytest.mark.fast
@pytest.mark.parametrize(
    "files",
    [
        FILES,
        SHARDED,
        {n: b for n, b in FILES.items() if n != "merges.txt"} | {hub.TOKENIZER: b"{}"},
        {n: b for n, b in FILES.items() if n[-4:] not in (".txt", "json")} | {"config.json": b"{}"},
    ],
)
def test_all_that_a_model_needs_comes_once(cache, hosting, files):
    extra = {"pytorch_model.bin": b"pickle", "README.md": b"#"}
    said = []

    with hosting(files | extra) as asked:
        folder = hub.fetch_repo("a/b", said.append)
        first = len(asked)
        hub.fetch_repo("a/b", said.append)

    assert folder == cache / "a" / "b@main"
    assert read(folder) == files
    assert len(asked) == first == len(set(names(asked)))
    assert set(names(asked)) >= set(files)
    (line,) = said
    assert all(name in line for name in files)
    assert re.search(r"^a/b@main: no hash is pinned for .* not verified$", line)


def test_the_folder_is_found_without_a_network(cache, hosting, monkeypatch):
    with hosting(SHARDED):
        folder = hub.fetch_repo("a/b")
    monkeypatch.setenv("GPTJAX_OFFLINE", "1")
    assert hub.fetch_repo("a/b") == folder

    (folder / SHARDS[1]).unlink()
    with pytest.raises(ModelError, match=f"Copy {SHARDS[1]} of a/b, .* to {folder}"):
        hub.fetch_repo("a/b")


def test_offline_says_what_to_copy_and_takes_what_was_copied(cache, monkeypatch):
    monkeypatch.setenv("GPTJAX_OFFLINE", "1")
    folder = cache / "a" / "b@v1"

    need = "config.json, vocab.json, merges.txt, model.safetensors of a/b, revision v1"
    with pytest.raises(ModelError, match=f"OFFLINE forbids .*Copy {need}, to {folder}"):
        hub.fetch_repo("a/b@v1")
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "tokenizer.json").write_bytes(b"{}")
    said = []
    with pytest.raises(ModelError, match=r"of a/b@v1 is not .* unset GPTJAX_OFFLINE"):
        hub.fetch_repo("a/b@v1", said.append)
    (folder / "model.safetensors").write_bytes(b"w")
    assert hub.fetch_repo("a/b@v1", said.append) == folder

    assert "for config.json, tokenizer.json;" in said[0]
    assert "for model.safetensors;" in said[1]
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"Copy vocab.json, merges.txt of a/b"):
        hub.fetch_repo("a/b@v1")


@pytest.mark.fast
@pytest.mark.parametrize("name", SHARDED)
def test_a_flipped_byte_in_the_cache_is_noticed(cache, hosting, name):
    with hosting(SHARDED) as asked:
        folder = hub.fetch_repo("a/b")
        flipped = SHARDED[name][:-1] + bytes([SHARDED[name][-1] ^ 1])
        (folder / name).write_bytes(flipped)
        before = len(asked)
        hashes = [hashlib.sha256(x).hexdigest() for x in (flipped, SHARDED[name])]
        with pytest.raises(ModelError, match=r"{}.* recorded .*{}".format(*hashes)) as e:
            hub.fetch_repo("a/b")
        assert str(folder / name) in str(e.value)
        assert "Delete the file to download it again" in str(e.value)
        assert (folder / name).read_bytes() == flipped
        assert len(asked) == before
        (folder / name).unlink()
        hub.fetch_repo("a/b")

    assert read(folder) == SHARDED


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "model.safetensors"])
def test_a_file_put_there_by_hand_is_checked_from_then_on(cache, hosting, name):
    with hosting({n: b for n, b in SHARDED.items() if n != "vocab.json"}):
        folder, said = hub.fetch_repo("a/b"), []
        (folder / name).write_bytes(b"mine")
        hub.fetch_repo("a/b", said.append)
        assert re.search(f"no hash is pinned for .*{name}", said[0])
        (folder / name).write_bytes(b"else")
        with pytest.raises(ModelError, match=f"{name} has 4 bytes .* recorded 4 bytes"):
            hub.fetch_repo("a/b")


def test_a_file_that_comes_again_has_to_be_what_it_was(cache, hosting):
    with hosting(FILES):
        folder = hub.fetch_repo("a/b")
    (folder / "config.json").unlink()

    with (
        hosting(FILES | {"config.json": b'{"n_layer": 3}'}),
        pytest.raises(ModelError, match=f"config.json .*sha256.*delete {folder} to"),
    ):
        hub.fetch_repo("a/b")

    assert not (folder / "config.json").exists()


def test_pins_come_before_what_is_found(cache, hosting, monkeypatch):
    pins = {n: Pin(len(b), hashlib.sha256(b).hexdigest()) for n, b in FILES.items()}
    path = f"/o/n/resolve/{'1' * 40}/"
    monkeypatch.setitem(hub.PINNED_REPOS, "gpt2", hub.Repository("o/n", "1" * 40, pins))
    said = []

    with hosting(FILES, path):
        folder = hub.fetch_repo("gpt2", said.append)
        assert hub.fetch_repo("o/n") == folder
        assert said == []
        (folder / "vocab.json").write_bytes(b"[]")
        hub.write_entry(folder, "vocab.json", hub.pin_of(folder / "vocab.json"))
        with pytest.raises(ModelError, match=r"vocab.json has 2 bytes.* but pinned are"):
            hub.fetch_repo("gpt2")
        (folder / "vocab.json").unlink()
    with (
        hosting(FILES | {"vocab.json": b"[]"}, path),
        pytest.raises(ModelError, match=r"vocab.json .*pinned"),
    ):
        hub.fetch_repo("gpt2")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "a/b@main has no config.json on the hub, and there is no local folder"),
        (
            {"config.json": b"{}", "pytorch_model.bin": b"x"},
            r"no safetensors, .* pytorch_model.bin.*save_pretrained\(DIR\)",
        ),
        ({n: b for n, b in SHARDED.items() if n != SHARDS[1]}, f"no {SHARDS[1]} on"),
        (FILES | {"config.json": plain(b"", 500)}, "cannot download .*500"),
        (FILES | {"config.json": plain(b"", 401)}, "401.*check the name.*in HF_TOKEN"),
        (FILES | {"config.json": plain(b"", 403)}, "403.*check the name.*in HF_TOKEN"),
        (FILES | {"config.json": endless}, "no Content-Length"),
        (FILES | {"config.json": b" " * 1_000_001}, "1,000,001 bytes, more than 1,0"),
        (SHARDED | {hub.INDEX: b" " * 10_000_001}, "10,000,001 bytes, more than 10,"),
    ],
)
def test_what_the_hub_lacks_or_spoils_is_an_error(cache, hosting, files, message):
    with hosting(files) as asked, pytest.raises(ModelError, match=message):
        hub.fetch_repo("a/b")

    assert "pytorch_model.bin" not in names(asked)


@pytest.mark.parametrize(
    "index",
    [
        *({"weight_map": {"wte": name}} for name in ["../x.safetensors", "/x.safetensors"]),
        *({"weight_map": {"wte": name}} for name in ["a/b.safetensors", "x.bin", ""]),
        *({"weight_map": {"wte": name}} for name in [".safetensors", "x.safetensors\n"]),
        *({"weight_map": {"wte": name}} for name in ["é.safetensors", 1, None, ["x"]]),
        *({"weight_map": {}}, {"weight_map": []}, {}, [], 1, "x"),
    ],
)
def test_a_hostile_index_names_nothing_that_is_asked_for(cache, hosting, index):
    files = SHARDED | {hub.INDEX: json.dumps(index).encode()}

    with hosting(files) as asked, pytest.raises(ModelError, match=r"index.json cannot"):
        hub.fetch_repo("a/b")

    assert names(asked)[-1] == hub.INDEX
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize("index", [b"{", b"[" * 100_000, b"\xff"])
def test_an_index_that_is_no_json_is_an_error(cache, hosting, index):
    with (
        hosting(SHARDED | {hub.INDEX: index}),
        pytest.raises(ModelError, match=r"index.json cannot be used"),
    ):
        hub.fetch_repo("a/b")


def test_an_index_of_any_size_is_not_read_into_memory(cache, monkeypatch):
    monkeypatch.setenv("GPTJAX_OFFLINE", "1")
    folder = cache / "a" / "b@main"
    folder.mkdir(parents=True)
    for name in SHARDED:
        (folder / name).write_bytes(b" " * 10_000_001 if name == hub.INDEX else b"{}")

    with pytest.raises(ModelError, match=r"cannot be used: it has more than 10,000,000"):
        hub.fetch_repo("a/b")


@pytest.mark.parametrize("record", ["", "[]", '{"a": 1}', '{"a": {"bytes": "x"}}'])
def test_a_damaged_record_is_an_error(cache, hosting, record):
    with hosting(FILES):
        folder = hub.fetch_repo("a/b")
        (folder / hub.RECORD).write_text(record)
        with pytest.raises(ModelError, match=r"sha256.json cannot be used.*Delete it"):
            hub.fetch_repo("a/b")


def test_the_token_goes_to_the_hub_and_nowhere_else(cache, hosting, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret\n")

    with serving(file(FILES["model.safetensors"])) as (elsewhere, foreign):
        moved = {
            "vocab.json": plain(b"", 307, Location="/a/b/resolve/main/merges.txt"),
            "model.safetensors": plain(b"", 302, Location=elsewhere),
        }
        with hosting(FILES | moved) as asked:
            folder = hub.fetch_repo("a/b")

    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert [request.headers["authorization"] for request in asked] == (["Bearer secret"] * 6)
    (request,) = foreign
    assert "authorization" not in request.headers
    assert "secret" not in str(request.headers)


def test_a_token_that_cannot_be_one_is_refused_unseen(cache, hosting, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "sec\nret")

    with hosting(FILES) as asked, pytest.raises(ModelError, match="HF_TOKEN con") as e:
        hub.fetch_repo("a/b")

    assert "sec" not in str(e.value)
    assert not asked


@pytest.mark.parametrize("url", ["ftp://x", "x", "https://me:pw@x", "https://x?y", "/"])
def test_an_endpoint_that_is_no_address_is_refused(cache, monkeypatch, url):
    monkeypatch.setenv("HF_ENDPOINT", url)

    with pytest.raises(ModelError, match=r"HF_ENDPOINT=.* is not the URL of a hub"):
        hub.fetch_repo("a/b")


NO_NAMES = ["gtp2", "a", "a/b/c", "../b", "a/..", "a..b/c", "a/.b", "a/b@", "a/b@../c"]


@pytest.mark.parametrize("name", [*NO_NAMES, "", "/a/b", "a/b@c/d", "a b/c", "a/b\n", "é/a"])
def test_what_is_no_name_is_an_error(cache, name):
    assert not hub.is_repo_id(name)
    with pytest.raises(ModelError, match=r"no model .* Use one of gpt2, gpt2-medium"):
        hub.fetch_repo(name)


def test_the_public_sizes_are_known_by_both_names(cache):
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        assert hub.is_repo_id(name)
        assert hub.resolve_repo(name) is hub.resolve_repo(f"openai-community/{name}")
        assert hub.resolve_repo(f"openai-community/{name}@v1").pins == {}
    with pytest.raises(ModelError, match=r"'gpt2-larg'.*Did you mean gpt2-large"):
        hub.resolve_repo("gpt2-larg")


def test_the_pinned_merges_are_those_that_ship_with_the_package():
    shipped = Path(hub.__file__).parents[1] / "tokenizer" / "gpt2" / "gpt2-merges.txt"

    pin = hub.PINNED_REPOS["gpt2"].pins["merges.txt"]
    assert pin == hub.pin_of(shipped)
