"""One device = eight: each mesh computes what one device computes, whole runs too."""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import gptjax
from gptjax.config import GPTConfig, MeshConfig, OptimConfig
from gptjax.data.lm import make_lm_batch
from gptjax.errors import ConfigError
from gptjax.parallel.sharding import (
    MESH_AXES,
    constrain,
    make_mesh,
    param_shardings,
    shard_batch,
    shard_tree,
    use_mesh,
)
from gptjax.tasks.train import train as train_run
from gptjax.training.loss import batch_loss
from gptjax.training.metrics import read_events
from gptjax.training.optimizer import make_optimizer
from gptjax.training.train_step import TrainState, init_state, make_train_step, pmap_train_step
from gptjax.tree import flatten_with_names
from tests.runs import train_logged
from tests.tasks.test_classify import make_config as classify_config
from tests.tasks.test_dpo import make_config as preference_config
from tests.tasks.test_pretrain import make_config as pretrain_config
from tests.tasks.test_sft import make_config as instruct_config

pytestmark = pytest.mark.mesh

B, T, V = 16, 16, 60
STEPS = 20
SLOW = pytest.mark.slow
SHAPE = {"context_length": T, "n_layers": 2, "n_heads": 4, "d_model": 32}
MODEL = GPTConfig(vocab_size=V, dtype="float32", attention="reference", **SHAPE)
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2)]
OTHERS = [(1, 4, 2), (4, 2, 1), (2, 4, 1), (4, 1, 2), (2, 1, 4), (1, 2, 4)]


class Trained(NamedTuple):
    """What some steps came to."""

    losses: np.ndarray
    state: TrainState


def mesh_of(sizes):
    return make_mesh(MeshConfig(**dict(zip(MESH_AXES, sizes, strict=True))))


@functools.cache
def params_of(config):
    params = jax.jit(functools.partial(gptjax.init, config))(jax.random.key(0))
    return jax.tree.map(np.asarray, params)


def batch_at(step):
    """Rows of several documents, some targets of which do not count."""
    rng = np.random.default_rng(step)
    row = (V * rng.random((B, T + 1)) ** 3).astype(np.int32)  # low ones are frequent
    batch = dict(make_lm_batch(row, eot=3))
    return batch | {"loss_weights": (rng.random((B, T)) < 0.8).astype(np.float32)}


def loss_of(config):
    def loss(params, batch, key):
        dropout_key = key if config.dropout else None
        return batch_loss(config, params, batch, chunk_size=8, dropout_key=dropout_key)

    return loss


@functools.cache
def train(sizes, config=MODEL, accumulate=1, steps=STEPS):
    """As a run trains, on a mesh of these sizes; None: on one device."""
    mesh = mesh_of(sizes) if sizes else None
    optimizer = make_optimizer(OptimConfig(peak_lr=1e-2, warmup_steps=2), STEPS)
    params = shard_tree(jax.tree.map(jnp.array, params_of(config)), mesh)
    state = shard_tree(init_state(params, optimizer, jax.random.key(1)), mesh)
    options = {"donate_argnums": 0}
    if mesh is not None:
        options["out_shardings"] = param_shardings(state, mesh), None
    step = make_train_step(loss_of(config), optimizer, accumulate)
    step_fn, losses = jax.jit(step, **options), []
    with use_mesh(mesh):
        for n in range(steps):
            state, metrics = step_fn(state, shard_batch(batch_at(n), mesh, B))
            losses.append(float(metrics.loss))
    return Trained(np.array(losses), state)


def assert_same_steps(sizes, **options):
    """Sums in another order differ in the last bits; 2e-6 is 16 of them."""
    one, many = train(None, **options), train(sizes, **options)
    np.testing.assert_allclose(many.losses, one.losses, rtol=2e-6)
    assert one.losses[-1] < one.losses[0]


DROPPING = dataclasses.replace(MODEL, dropout=0.1)


@pytest.mark.fast
@pytest.mark.parametrize("sizes", MESHES)
def test_a_mesh_has_the_losses_of_one_device_with_dropout_and_accumulation(sizes):
    assert_same_steps(sizes, config=DROPPING, accumulate=2)


@SLOW
@pytest.mark.parametrize(
    ("sizes", "accumulate", "changes"),
    list(
        itertools.product(
            [*MESHES, *OTHERS],
            [1, 2],
            [
                {},
                {"dropout": 0.1},
                {"remat": "dots"},
                {"remat": "full"},
                {"tie_embeddings": False, "vocab_multiple": 64, "qkv_bias": False},
            ],
        )
    ),
)
def test_any_mesh_has_the_losses_of_one_device(sizes, accumulate, changes):
    config = dataclasses.replace(MODEL, **changes)

    assert_same_steps(sizes, config=config, accumulate=accumulate)


def test_the_state_stays_where_it_was_put():
    state = train((2, 2, 2), config=DROPPING, accumulate=2).state

    where = param_shardings(state, mesh_of((2, 2, 2)))

    for name, leaf in flatten_with_names(state).items():
        assert leaf.sharding.is_equivalent_to(flatten_with_names(where)[name], leaf.ndim)
    up = state.params["blocks"]["mlp"]["up"]["kernel"]
    assert up.addressable_shards[0].data.size == up.size // 4


@pytest.mark.fast
@pytest.mark.parametrize("sizes", MESHES)
def test_a_mesh_reads_the_rows_in_the_order_of_one_device(sizes):
    batch, mesh = batch_at(0), mesh_of(sizes)

    placed = shard_batch(batch, mesh, B)

    shards = sizes[0] * sizes[1]
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        for shard in array.addressable_shards:
            assert shard.data.shape == (B // shards, T)


@pytest.mark.fast
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=SLOW)])
def test_arrays_lie_where_their_letters_say_or_tracing_fails(tied):
    """On explicit axes an array's type has its layout, and `lay` asserts it."""
    config = dataclasses.replace(MODEL, tie_embeddings=tied)
    mesh = jax.make_mesh((2, 2, 2), MESH_AXES, (AxisType.Explicit,) * 3)
    grad = jax.value_and_grad(loss_of(config), has_aux=True)
    params, batch = params_of(config), batch_at(0)
    (nats, _), grads = jax.jit(grad)(params, batch, jax.random.key(0))

    with jax.set_mesh(mesh):
        params = shard_tree(params, mesh)
        placed = shard_batch(batch, mesh, B)
        (found, _), parts = jax.jit(grad)(params, placed, jax.random.key(0))

    assert float(found) == pytest.approx(float(nats), rel=1e-6)
    for name, leaf in flatten_with_names(parts).items():
        one, param = flatten_with_names(grads)[name], flatten_with_names(params)[name]
        np.testing.assert_allclose(leaf, one, rtol=1e-4, atol=1e-4)  # of sums over 256
        assert leaf.sharding == param.sharding, name


def test_an_array_that_lies_elsewhere_than_its_letters_say_is_an_error(monkeypatch):
    mesh = jax.make_mesh((2, 2, 2), MESH_AXES, (AxisType.Explicit,) * 3)
    params = params_of(MODEL)  # by the model as it is
    monkeypatch.setattr(
        "gptjax.model.gpt.constrain", lambda x, letters: constrain(x, letters[::-1])
    )

    with jax.set_mesh(mesh):
        params = shard_tree(params, mesh)
        batch = shard_batch(batch_at(0), mesh, B)
        with pytest.raises(AssertionError, match="acts as an assert"):
            jax.eval_shape(loss_of(MODEL), params, batch, jax.random.key(0))


@pytest.mark.fast
def test_pmap_has_the_losses_of_jit():
    optimizer = make_optimizer(OptimConfig(peak_lr=1e-2, warmup_steps=2), STEPS)
    params = jax.tree.map(jnp.array, params_of(MODEL))
    state, losses = init_state(params, optimizer, jax.random.key(1)), []

    step = pmap_train_step(loss_of(MODEL), optimizer, accumulate=2)
    for n in range(5):
        state, metrics = step(state, batch_at(n))
        losses.append(float(metrics.loss))

    one = train(None, config=MODEL, accumulate=1)
    np.testing.assert_allclose(losses, one.losses[:5], rtol=2e-6)
    assert int(state.step) == 5
    shape = lambda x: (x.shape, x.dtype)  # noqa: E731
    assert jax.tree.map(shape, state) == jax.tree.map(shape, one.state)


@pytest.mark.fast
def test_pmap_refuses_rows_that_do_not_split():
    step = pmap_train_step(loss_of(MODEL), make_optimizer(OptimConfig(), 100), 4)

    with pytest.raises(ConfigError, match=r"batch_size=16 .* 8 devices"):
        step(None, batch_at(0))


def numbers(folder):
    """The losses of a run's events, by kind and step."""
    events = read_events(folder / "metrics.jsonl")
    keys = ("loss", "response_loss")
    return {
        (e["event"], e.get("split"), e["step"]): next(e[k] for k in keys if k in e)
        for e in events
        if e["event"] in ("train", "eval")
    }


def samples(folder):
    events = read_events(folder / "metrics.jsonl")
    return [e["text"] for e in events if e["event"] == "sample"]


def run_both(config, folder, **sizes):
    """The same run on one device and on a mesh: models and losses of each."""
    meshed = dataclasses.replace(config, mesh=MeshConfig(**sizes))
    one = train_run(config, folder / "one")
    said = []
    many = train_logged(meshed, folder / "many", said)
    assert any(line.startswith("device   8 x cpu, as") for line in said)
    return (one, numbers(folder / "one")), (many, numbers(folder / "many"))


def assert_same_runs(one, many):
    """Losses to 1e-5: AdamW divides what differs in the last bits by its own size.

    So parameters whose gradient is nothing but rounding, as that of a key's bias,
    may end elsewhere: models are compared by what they compute.
    """
    (model, found), (other, numbers) = one, many
    assert numbers.keys() == found.keys()
    np.testing.assert_allclose([*numbers.values()], [*found.values()], rtol=1e-5)
    token_BT = jnp.arange(8)[None] * 7 % model.config.vocab_size
    logits = [gptjax.apply(m.config, m.params, token_BT) for m in (model, other)]
    np.testing.assert_allclose(*logits, atol=1e-4)


def test_a_whole_run_on_a_mesh_is_that_on_one_device(tmp_path):
    config = pretrain_config(tmp_path, model__dropout=0.1, model__vocab_multiple=2)

    one, many = run_both(config, tmp_path, data=2, fsdp=2, tensor=2)

    assert_same_runs(one, many)
    assert samples(tmp_path / "many") == samples(tmp_path / "one")
    loaded = gptjax.load(tmp_path / "many")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, many[0].params)


def with_context(config, context):
    """One length of rows, so that there is one program."""
    model = dataclasses.replace(config.model, context_length=context)
    return dataclasses.replace(config, model=model)


@SLOW
@pytest.mark.parametrize(
    ("make", "context", "changes"),
    [
        (instruct_config, 32, {"finetune__trainable": "lora"}),
        (classify_config, 16, {}),
        (preference_config, 16, {}),
    ],
)
def test_fine_tuning_on_a_mesh_is_that_on_one_device(tmp_path, make, context, changes):
    config = make(tmp_path, train__steps=4, train__eval_every=4, **changes)
    config = with_context(config, context)

    one, many = run_both(config, tmp_path, data=2, fsdp=2, tensor=1)

    assert_same_runs(one, many)
