"""Compiled programs are reused from a directory that nobody else can write to."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


@contextlib.contextmanager
def count_events():
    """Yields a function that returns the compilations and cache hits in the block."""
    events, active = [], [True]

    def listen(event, duration_secs, **metadata):
        if active:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: (events.count(COMPILE_EVENT), events.count(CACHE_HIT_EVENT))
    active.clear()


def compile_once():
    """Compiles a function; returns the compilations and cache hits."""
    x = np.arange(6, dtype=np.float32)
    with count_events() as count, persistent_cache():
        result = jax.jit(lambda x: jnp.sin(x) + x**3)(x)
    np.testing.assert_allclose(result, np.sin(x) + x**3, rtol=1e-6)
    return count()


def test_a_program_is_compiled_once(cache_dir):
    assert compile_once() == (1, 0)
    assert compile_once() == (1, 1)
    assert cache_dir.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_directory_that_others_can_write_to_is_not_used(cache_dir, mode, caplog):
    assert compile_once() == (1, 0)
    cache_dir.chmod(mode)

    assert compile_once() == (1, 0)

    assert f"can write to {cache_dir}" in caplog.text


def test_a_directory_that_cannot_be_created_is_not_used(cache_dir, caplog):
    cache_dir.parent.touch()

    assert compile_once() == (1, 0)

    assert "not cached" in caplog.text


def test_a_directory_that_the_user_gave_to_jax_is_kept(cache_dir, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))

    compile_once()

    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert not cache_dir.exists()


def test_a_resumed_run_compiles_nothing(cache_dir, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--model.n_layers=1", "--model.d_model=16", "--model.n_heads=1"]
    options += ["--model.context_length=16", "--data.batch_size=32", "--train.steps=2"]
    options += ["--train.log_every=1", "--train.sample_prompt=", "--optim.warmup_steps=0"]
    command = ["train", "tiny", *options, "--run", str(run)]
    jax.clear_caches()  # programs of other tests would not be written
    assert main(command) == 0
    (run / "checkpoints").rename(run / "old-checkpoints")
    (run / "metrics.jsonl").unlink()
    jax.clear_caches()

    with count_events() as count:
        assert main([*command, "--verbose"]) == 0

    compiled, hits = count()
    assert compiled == hits > 0
    assert not (run / "compiled").exists()
    lines = capsys.readouterr().err.splitlines()
    names = ["importing", "loading", "compiling", "first step", "total"]
    assert [line[:12].strip() for line in lines] == names
