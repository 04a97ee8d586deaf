"""One device = eight: each mesh computes what one device computes, whole runs too."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import gptjax
from gptjax.config import GPTConfig, MeshConfig, OptimConfig
from gptjax.data.lm import make_lm_batch
from gptjax.errors import ConfigError
from gptjax.parallel import sharding
from gptjax.tasks.train import train as train_run
from gptjax.training.loss import make_lm_loss_fn
from gptjax.training.metrics import read_events
from gptjax.training.optimizer import make_optimizer
from gptjax.training.train_step import init_state, make_train_step, pmap_train_step
from gptjax.tree import flatten_with_names
from tests.model.test_gpt import draw_params
from tests.runs import train_logged
from tests.small_models import LLAMA
from tests.tasks.test_classify import make_config as classify_config
from tests.tasks.test_dpo import make_config as preference_config
from tests.tasks.test_pretrain import make_config as pretrain_config
from tests.tasks.test_sft import make_config as instruct_config

pytestmark = pytest.mark.mesh
slow = functools.partial(pytest.param, marks=pytest.mark.slow)

B, T, V = 16, 16, 60
STEPS = 4
SHAPE = {"context_length": T, "n_layers": 2, "n_heads": 4, "d_model": 16}
MODEL = GPTConfig(vocab_size=V, dtype="float32", attention="reference", **SHAPE)
UNTIED = {"tie_embeddings": False, "vocab_multiple": 64, "qkv_bias": False}


def mesh_of(sizes):
    return sharding.make_mesh(MeshConfig(**dict(zip(sharding.MESH_AXES, sizes, strict=True))))


def batch_at(step):
    """Rows of several documents, some targets of which do not count."""
    rng = np.random.default_rng(step)
    row = (V * rng.random((B, T + 1)) ** 3).astype(np.int32)  # low ones are frequent
    batch = dict(make_lm_batch(row, eot=3))
    return batch | {"loss_weights": (rng.random((B, T)) < 0.8).astype(np.float32)}


def new_state(config, mesh=None):
    optimizer = make_optimizer(OptimConfig(peak_lr=1e-2, warmup_steps=2), STEPS)
    params = sharding.shard_tree(jax.tree.map(jnp.array, draw_params(config, 0.1)), mesh)
    return optimizer, sharding.shard_tree(init_state(params, optimizer, jax.random.key(1)), mesh)


def train(sizes, config, accumulate):
    """Losses and state, as a run trains on a mesh; None: on one device."""
    mesh, losses = mesh_of(sizes) if sizes else None, []
    optimizer, state = new_state(config, mesh)
    options = {"out_shardings": (sharding.param_shardings(state, mesh), None)} if mesh else {}
    step = make_train_step(make_lm_loss_fn(config, 8), optimizer, accumulate)
    step_fn = jax.jit(step, donate_argnums=0, **options)
    with sharding.use_mesh(mesh):
        for n in range(STEPS):
            state, metrics = step_fn(state, sharding.shard_batch(batch_at(n), mesh, B))
            losses.append(float(metrics.loss))
    return np.array(losses), state


@pytest.mark.fast
@pytest.mark.parametrize(
    ("sizes", "accumulate", "changes"),
    [
        ((1, 8, 1), 2, UNTIED),
        ((2, 2, 2), 1, {"dropout": 0.1, "remat": "full"}),
        ((2, 2, 2), 1, LLAMA | {"mlp_dim": 16, "attention": "flash"}),
    ],
)
def test_a_mesh_has_the_losses_of_one_device_and_keeps_the_state_in_its_place(
    sizes, accumulate, changes
):
    config = dataclasses.replace(MODEL, **changes)

    (one_losses, one), (losses, state) = (train(x, config, accumulate) for x in (None, sizes))

    # Sums in another order differ in the last bits; 2e-6 is 16 of them.
    np.testing.assert_allclose(losses, one_losses, rtol=2e-6)
    assert losses[-1] < losses[0]

    where = flatten_with_names(sharding.param_shardings(state, mesh_of(sizes)))
    for name, leaf in flatten_with_names(state).items():
        assert leaf.sharding.is_equivalent_to(where[name], leaf.ndim)
    up = state.params["blocks"]["mlp"]["up"]["kernel"]
    assert up.addressable_shards[0].data.size == up.size // (sizes[1] * sizes[2])
    if accumulate == 2:  # `jax.pmap` is compared with the same losses of one device
        optimizer, state = new_state(config)
        step, losses = pmap_train_step(make_lm_loss_fn(config, 8), optimizer, accumulate), []
        for n in range(STEPS):
            state, metrics = step(state, batch_at(n))
            losses.append(float(metrics.loss))
        np.testing.assert_allclose(losses, one_losses, rtol=2e-6)
        assert jax.eval_shape(lambda: state) == jax.eval_shape(lambda: one)
        with pytest.raises(ConfigError, match="8 devices"):
            step(state, jax.tree.map(lambda leaf: leaf[1:], batch_at(0)))


@pytest.mark.fast
def test_arrays_are_sharded_as_their_letters_say_or_tracing_fails():
    """On explicit axes, the type of an array has its sharding, which is asserted."""
    config = dataclasses.replace(MODEL, tie_embeddings=False, n_layers=1)
    mesh = jax.make_mesh((2, 2, 2), sharding.MESH_AXES, (AxisType.Explicit,) * 3)
    grad = jax.value_and_grad(make_lm_loss_fn(config, 8), has_aux=True)
    params, batch = draw_params(config, 0.1), batch_at(0)
    (nats, _), grads = jax.jit(grad)(params, batch, jax.random.key(0))

    with jax.set_mesh(mesh):
        params = sharding.shard_tree(params, mesh)
        sharded_batch = sharding.shard_batch(batch, mesh, B)
        (found, _), found_grads = jax.jit(grad)(params, sharded_batch, jax.random.key(0))

    assert float(found) == pytest.approx(float(nats), rel=1e-6)
    for name, leaf in flatten_with_names(found_grads).items():
        one, param = flatten_with_names(grads)[name], flatten_with_names(params)[name]
        np.testing.assert_allclose(leaf, one, rtol=1e-4, atol=1e-4)  # of sums over 256
        assert leaf.sharding == param.sharding, name


def losses_of(folder):
    events = [e for e in read_events(folder / "metrics.jsonl") if e["event"] in ("train", "eval")]
    return [e["loss"] if "loss" in e else e["response_loss"] for e in events]


@pytest.mark.parametrize(
    ("make", "context", "tensor", "changes"),
    [
        (pretrain_config, 16, 2, {"model__vocab_multiple": 2}),
        slow(instruct_config, 32, 1, {"finetune__trainable": "lora"}),
        slow(classify_config, 16, 1, {}),
        slow(preference_config, 16, 1, {}),
    ],
)
def test_a_whole_run_on_a_mesh_is_that_on_one_device(tmp_path, make, context, tensor, changes):
    """Losses to 1e-5: AdamW divides what differs in the last bits by its own size.

    So parameters whose gradient is nothing but rounding, as that of a key's bias, may
    end elsewhere: models are compared by what they compute.
    """
    config = make(tmp_path, train__steps=4, train__eval_every=4, **changes)
    model = dataclasses.replace(config.model, context_length=context)  # one length of rows
    config, lines = dataclasses.replace(config, model=model), []
    meshed = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2, tensor=tensor))

    one = train_run(config, tmp_path / "one")
    many = train_logged(meshed, tmp_path / "many", lines)

    assert any("cpu, as data 2 x fsdp 2" in line for line in lines)
    losses = [losses_of(tmp_path / name) for name in ("many", "one")]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    token_BT = jnp.arange(8)[None] * 7 % one.config.vocab_size
    logits = [gptjax.apply(m.config, m.params, token_BT) for m in (one, many)]
    np.testing.assert_allclose(*logits, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, gptjax.load(tmp_path / "many").params, many.params)
