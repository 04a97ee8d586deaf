"""Programs kept in files: taken when they are ours and whole, and never otherwise."""

import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.cli.main import main
from gptjax.runtime import compilation_cache
from gptjax.runtime.compilation_cache import cache_dir_for, persistent_cache
from gptjax.runtime.timing import CACHE_HIT_EVENT, COMPILE_EVENT, listen_to_jax_events


@pytest.fixture
def home(monkeypatch, tmp_path):
    """A user who has named no folder to JAX, unlike other tests."""
    monkeypatch.setenv("GPTJAX_HOME", str(tmp_path / "home"))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "home"
    jax.config.update("jax_compilation_cache_dir", before)


def counted(folder, say=print):
    """What a new function gives, programs compiled for it, those from a file."""
    events, x = [], np.arange(6, dtype=np.float32)

    def cubes(x):
        return jnp.sin(x) + x**3

    with warnings.catch_warnings(), listen_to_jax_events(lambda event, _: events.append(event)):
        warnings.simplefilter("error")
        with persistent_cache(folder, say):
            result = np.asarray(jax.jit(cubes)(x))
    np.testing.assert_allclose(result, np.sin(x) + x**3, rtol=1e-6)
    return events.count(COMPILE_EVENT), events.count(CACHE_HIT_EVENT)


def test_what_was_compiled_once_comes_from_its_file(home, tmp_path):
    folder = tmp_path / "compiled"

    assert counted(folder) == (1, 0)
    assert counted(folder) == (1, 1)
    assert counted(tmp_path / "other") == (1, 0)


def test_damaged_programs_are_compiled_anew_without_a_word(home, tmp_path):
    folder = tmp_path / "compiled"
    counted(folder)

    for place in (0, 0.5, 0.99):
        for path in folder.iterdir():
            data = bytearray(path.read_bytes())
            data[int(place * len(data))] ^= 0x10
            path.write_bytes(data)

        assert counted(folder) == (1, 0)
        assert counted(folder) == (1, 1)  # the damaged one was replaced


def test_a_program_that_another_user_made_is_not_run(home, tmp_path):
    folder = tmp_path / "compiled"
    counted(folder)
    key = home / "programs.key"
    assert key.stat().st_mode & 0o777 == 0o600
    key.unlink()

    assert counted(folder) == (1, 0)


def test_a_program_under_the_name_of_another_is_not_run(home, tmp_path):
    folder = tmp_path / "compiled"
    counted(folder)
    (program,) = folder.glob("*-cache")
    compilation_cache.seal_path(program).rename(folder / "another-seal")
    program.rename(folder / "another-cache")

    counted(folder)

    assert not (folder / "another-cache").exists()


def test_a_folder_that_cannot_be_written_is_gone_without(home, tmp_path):
    (tmp_path / "file").touch()
    told = []

    assert counted(tmp_path / "file" / "compiled", told.append) == (1, 0)

    assert len(told) == 1
    assert "not cached" in told[0]


def test_a_folder_that_the_user_named_to_jax_is_the_one(home, tmp_path):
    own = tmp_path / "own"
    jax.config.update("jax_compilation_cache_dir", str(own))
    try:
        counted(tmp_path / "compiled")
        assert jax.config.jax_compilation_cache_dir == str(own)
    finally:
        jax.config.update("jax_compilation_cache_dir", None)

    assert not (tmp_path / "compiled").exists()


def test_of_too_many_programs_the_oldest_go(home, tmp_path, monkeypatch):
    for n, name in enumerate(("old", "new")):
        (tmp_path / f"{name}-cache").write_bytes(bytes(100))
        os.utime(tmp_path / f"{name}-cache", (n, n))
    compilation_cache.write_seals(tmp_path, b"key")
    monkeypatch.setattr(compilation_cache, "MAX_CACHE_BYTES", 150)

    compilation_cache.evict_invalid(tmp_path, b"key")

    assert {p.name for p in tmp_path.glob("*-*")} == {"new-cache", "new-seal"}


def test_a_run_has_its_programs_and_other_models_share_theirs(home, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").touch()

    assert cache_dir_for(str(tmp_path / "run")) == tmp_path / "run" / "compiled"
    assert cache_dir_for(str(tmp_path / "run" / "model")) == home / "compiled"
    assert cache_dir_for("gpt2") == home / "compiled"


def test_a_run_that_is_resumed_compiles_nothing(home, tmp_path, capsys):
    run, events = tmp_path / "run", []
    small = ["--model.n_layers", "1", "--model.d_model", "16", "--model.n_heads", "1"]
    small += ["--model.context_length", "16", "--data.batch_size", "32"]
    small += ["--train.steps", "2", "--train.log_every", "1", "--train.sample_prompt="]
    small += ["--optim.warmup_steps", "0"]
    command = ["train", "tiny", *small, "--run", str(run)]
    jax.clear_caches()  # what other tests have compiled would not be kept
    assert main(command) == 0
    for path in (run / "checkpoints", run / "metrics.jsonl"):
        path.rename(path.with_name(f"old-{path.name}"))
    jax.clear_caches()

    with listen_to_jax_events(lambda event, _: events.append(event)):
        assert main([*command, "--verbose"]) == 0

    assert events.count(COMPILE_EVENT) == events.count(CACHE_HIT_EVENT) > 0
    lines = capsys.readouterr().err.splitlines()
    names = ["importing", "loading", "compiling", "first step", "total"]
    assert [line[:12].strip() for line in lines] == names
    assert jax.config.jax_compilation_cache_dir is None
