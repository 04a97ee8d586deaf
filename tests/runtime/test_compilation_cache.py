"""Compiled programs are reused from a directory that nobody else can write to."""

import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.cli import doctor
from gptjax.cli.main import main
from gptjax.runtime.compilation_cache import persistent_cache
from gptjax.runtime.timing import CACHE_HIT_EVENT, COMPILE_EVENT


@pytest.fixture
def cache_dir(monkeypatch, tmp_path):
    """The cache of a user who has not configured JAX's, unlike other tests."""
    monkeypatch.setenv("GPTJAX_HOME", str(tmp_path / "home"))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "home" / "xla"
    jax.config.update("jax_compilation_cache_dir", before)


def count_events(function):
    """Calls the function; returns the numbers of compilations and cache hits."""
    events = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: events.append(event)
    )
    function()
    return [events.count(COMPILE_EVENT), events.count(CACHE_HIT_EVENT)]


def compile_once():
    with persistent_cache():
        return count_events(lambda: jax.jit(lambda x: jnp.sin(x) + x**3)(np.float32(2)))


def test_a_program_is_compiled_once(cache_dir, tmp_path):
    assert compile_once() == [1, 0]
    assert compile_once() == [1, 1]
    assert cache_dir.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir is None

    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))  # the user's
    compile_once()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")


def test_a_directory_that_is_missing_or_that_others_can_write_to_is_not_used(cache_dir, caplog):
    cache_dir.parent.touch()
    assert compile_once() == [1, 0]
    assert "not cached" in caplog.text
    cache_dir.parent.unlink()

    assert compile_once() == [1, 0]
    for mode in (0o710, 0o704):
        caplog.clear()
        cache_dir.chmod(mode)
        assert compile_once() == [1, 0]
        assert f"can access {cache_dir}" in caplog.text
    cache_dir.chmod(0o700)
    cache_dir.parent.chmod(0o777)  # others could replace the directory
    assert compile_once() == [1, 0]
    assert f"can write to {cache_dir.parent}" in caplog.text
    cache_dir.parent.chmod(0o1777)  # as /tmp
    assert compile_once() == [1, 1]


def test_without_a_home_directory_programs_are_not_cached(cache_dir, caplog, monkeypatch):
    monkeypatch.delenv("GPTJAX_HOME")
    monkeypatch.setattr(Path, "expanduser", no_home)

    assert compile_once() == [1, 0]

    assert "Set HOME" in caplog.text
    assert doctor.run_doctor() == 0


def no_home(path):
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_another_user_cannot_put_a_program_into_the_cache_while_it_is_in_use(cache_dir):
    with persistent_cache():
        command = ["sh", "-c", 'echo program > "$0/name" || mv "$0" "$0.old"', str(cache_dir)]
        intruder = subprocess.run(command, user=65534, capture_output=True, check=False)

    assert intruder.stderr.count(b"Permission denied") == 2
    assert [path.name for path in cache_dir.parent.iterdir()] == ["xla"]
    assert not (cache_dir / "name").exists()


def test_the_same_run_compiles_nothing_again(cache_dir, tmp_path, capsys):
    shape = ["--model.n_layers=1", "--model.d_model=8", "--model.n_heads=1"]
    steps = ["--train.steps=1", "--train.eval_batches=1", "--optim.warmup_steps=0"]
    options = [*shape, *steps, "--model.context_length=16", "--train.sample_prompt=", "--verbose"]
    for run in ("one", "two"):
        jax.clear_caches()  # programs of other tests would not be written
        command = ["train", "tiny", *options, "--run", str(tmp_path / run)]
        compilations, cache_hits = count_events(lambda command=command: main(command))

    assert compilations == cache_hits > 0
    lines = capsys.readouterr().err.splitlines()[-5:]
    names = ["importing", "loading", "compiling", "first step", "total"]
    assert [line[:12].strip() for line in lines] == names
