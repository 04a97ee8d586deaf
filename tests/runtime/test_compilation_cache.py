"""Compiled programs are reused from a directory that nobody else can write to."""

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


def count_events():
    """Listens to JAX; returns a function for the compilations and cache hits so far."""
    events = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: events.append(event)
    )
    return lambda: (events.count(COMPILE_EVENT), events.count(CACHE_HIT_EVENT))


def compile_once():
    """Compiles a function; returns the compilations and cache hits."""
    count = count_events()
    with persistent_cache():
        jax.jit(lambda x: jnp.sin(x) + x**3)(np.float32(2))
    return count()


def test_a_program_is_compiled_once(cache_dir):
    assert compile_once() == (1, 0)
    assert compile_once() == (1, 1)
    assert cache_dir.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir is None


def test_a_directory_that_is_missing_or_that_others_can_write_to_is_not_used(cache_dir, caplog):
    cache_dir.parent.touch()
    assert compile_once() == (1, 0)
    assert "not cached" in caplog.text
    cache_dir.parent.unlink()

    assert compile_once() == (1, 0)
    for mode in (0o720, 0o702):
        cache_dir.chmod(mode)
        assert compile_once() == (1, 0)
        assert f"can write to {cache_dir}" in caplog.text
        caplog.clear()


def test_a_directory_that_the_user_gave_to_jax_is_kept(cache_dir, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))

    compile_once()

    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert not cache_dir.exists()


def test_the_same_run_compiles_nothing_again(cache_dir, tmp_path, capsys):
    options = ["--model.n_layers=1", "--model.d_model=8", "--model.n_heads=1"]
    options += ["--model.context_length=16", "--train.steps=1", "--train.eval_batches=1"]
    command = ["train", "tiny", *options, "--train.sample_prompt=", "--optim.warmup_steps=0"]
    jax.clear_caches()  # programs of other tests would not be written
    assert main([*command, "--run", str(tmp_path / "one")]) == 0
    jax.clear_caches()

    count = count_events()
    assert main([*command, "--run", str(tmp_path / "two"), "--verbose"]) == 0

    compiled, hits = count()
    assert compiled == hits > 0
    lines = capsys.readouterr().err.splitlines()
    names = ["importing", "loading", "compiling", "first step", "total"]
    assert [line[:12].strip() for line in lines] == names
