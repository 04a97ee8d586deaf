"""Where arrays lie: rules that cover every parameter, and what does not fit is said."""

import fnmatch
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import gptjax
from gptjax.config import FinetuneConfig, GPTConfig, MeshConfig, OptimConfig, RunConfig
from gptjax.errors import ConfigError
from gptjax.model.layers import embedding_lookup
from gptjax.model.quantization import unstack_layers
from gptjax.parallel import sharding
from gptjax.parallel.sharding import (
    COMPUTE_RULES,
    MESH_AXES,
    PARAM_LOGICAL_AXES,
    PARAM_RULES,
    all_gather_params,
    constrain,
    local_batch_rows,
    logical_axes,
    logical_to_spec,
    make_mesh,
    resolve_mesh_shape,
    shard_batch,
    shard_tree,
    use_mesh,
)
from gptjax.training.finetune import TRAINABLE_RULES, split_trainable
from gptjax.training.optimizer import make_optimizer
from gptjax.training.train_step import init_state
from gptjax.tree import flatten_with_names
from tests.model.test_gpt import draw_params

# Every letter has a size of its own.
SIZES = {"D": 24, "H": 3, "K": 8, "F": 96, "V": 60, "T": 16, "C": 5, "R": 7}
SHAPE = {"vocab_size": 58, "vocab_multiple": 4, "context_length": 16, "n_layers": 4}
SHAPE |= {"n_heads": 3, "d_model": 24}
MODELS = {"tied": {}, "untied classifier": {"tie_embeddings": False, "n_classes": 5}}
MODELS["untied classifier"] |= {"head_bias": True, "qkv_bias": False}
KEY = jax.random.key(0)


def mesh_of(**sizes):
    return make_mesh(MeshConfig(**sizes))


@functools.cache
def state_of(model, trainable="all"):
    """Shapes of a run's state, and of what it does not train."""
    c = RunConfig(
        model=GPTConfig(**(SHAPE | MODELS[model])),
        finetune=FinetuneConfig(trainable=trainable, lora_rank=7),
    )

    def make(key):
        trained, frozen = split_trainable(c, gptjax.init(c.model, key), key)
        return init_state(trained, make_optimizer(OptimConfig(), 100), key), frozen

    return jax.eval_shape(make, KEY)


def test_letters_say_how_long_the_axes_of_every_array_of_a_state_are_and_every_rule_is_used():
    used = set()
    for kind in [(model, trainable) for model in MODELS for trainable in TRAINABLE_RULES]:
        for name, leaf in flatten_with_names(state_of(*kind)).items():
            used |= {x for x in PARAM_LOGICAL_AXES if fnmatch.fnmatchcase(f"/{name}", x)}
            for letter, size in zip(logical_axes(name, leaf.ndim), leaf.shape, strict=True):
                if letter == "N":
                    assert size in (1, 2, 3, 4), name
                elif letter not in "IO":
                    assert size == SIZES[letter], name
    assert used == set(PARAM_LOGICAL_AXES)
    params = jax.eval_shape(lambda: unstack_layers(gptjax.init(GPTConfig(**SHAPE), KEY)))
    for name, leaf in flatten_with_names(params).items():
        assert "N" not in logical_axes(name, leaf.ndim)


def test_every_name_has_one_rule_which_splits_matrices_and_no_two_axes_alike(monkeypatch):
    for rule, letters in PARAM_LOGICAL_AXES.items():
        for table in (PARAM_RULES, COMPUTE_RULES):
            flat = [axis for axis in logical_to_spec(f"N{letters}", table) if axis]
            assert len(flat) == len(set(flat))
        if "lora" not in rule and "norm" not in rule and len(letters) > 1:
            assert any(logical_to_spec(letters, PARAM_RULES)), rule
    with pytest.raises(ValueError, match=r"blocks/gate/kernel .* none"):
        logical_axes("blocks/gate/kernel", 3)
    monkeypatch.setitem(PARAM_LOGICAL_AXES, "*kernel", "DF")
    with pytest.raises(ValueError, match=r"\['\*mlp/up/kernel', '\*kernel'\]"):
        logical_axes("blocks/mlp/up/kernel", 3)


def test_a_size_that_does_not_split_is_named():
    for changes, sizes, message in (
        (
            {"vocab_multiple": 1, "n_heads": 4, "vocab_size": 257},
            {"data": 4, "tensor": 2},
            "token_embedding/embedding .*257 along V, .*mesh.tensor=2.*model.vocab_multiple=128",
        ),
        ({"vocab_multiple": 8}, {"data": 4, "tensor": 2}, "/bias .* 3 along H, .*mesh.tensor=2"),
        ({"d_model": 18}, {"data": 2, "fsdp": 4}, "/kernel .* 18 along D, .*mesh.fsdp=4"),
    ):
        params = draw_params(GPTConfig(**(SHAPE | changes)))
        with pytest.raises(ConfigError, match=message):
            shard_tree(params, mesh_of(**sizes))
    sharding.check_batch_divisible(8, 2, (2, 2, 2))
    with pytest.raises(ConfigError, match=r"=8 .*accumulate=4 .* 2 rows .* 4 dev.*data=2 x .*p=2"):
        sharding.check_batch_divisible(8, 4, (2, 2, 2))


def test_an_open_axis_takes_the_devices_that_are_left_or_it_is_an_error(monkeypatch):
    for requested, devices, processes, expected in (
        ((-1, 2, 2), 8, 1, (2, 2, 2)),
        ((2, -1, 1), 16, 1, (2, 8, 1)),
        ((2, 2, 1), 8, 1, (2, 2, 1)),  # one process may use some of its devices
        ((-1, 3, 1), 8, 1, None),
        ((4, 4, 1), 8, 1, None),
        ((4, 1, 1), 8, 2, None),
    ):
        config = MeshConfig(**dict(zip(MESH_AXES, requested, strict=True)))
        monkeypatch.setattr(jax, "process_count", lambda processes=processes: processes)
        if expected is None:
            with pytest.raises(ConfigError, match=f"mesh.data={requested[0]}.* {devices} devices"):
                resolve_mesh_shape(config, devices)
        else:
            assert resolve_mesh_shape(config, devices) == expected
    monkeypatch.undo()
    assert mesh_of(data=1) is None
    assert make_mesh(MeshConfig()).shape["data"] == len(jax.devices())


def test_only_the_data_axis_goes_between_slices(monkeypatch):
    fakes = [
        types.SimpleNamespace(
            id=n, slice_index=n // 4, process_index=n // 4, platform="cpu", device_kind="cpu"
        )
        for n in (6, 1, 4, 3, 0, 7, 2, 5)
    ]

    def real(grid, axes, axis_types):
        grid = np.vectorize(lambda fake: jax.devices()[fake.id])(grid)
        return Mesh(grid, axes, axis_types=axis_types)

    monkeypatch.setattr(sharding, "Mesh", real)

    mesh = make_mesh(MeshConfig(data=4, fsdp=1, tensor=2), fakes)

    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert (ids // 4).reshape(4, 2).tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert sorted(ids.flat) == list(range(8))
    with pytest.raises(ConfigError, match=r"mesh.data=1 is not divisible by the 2 sl"):
        make_mesh(MeshConfig(data=1, fsdp=8), fakes)


@pytest.mark.fast
def test_a_mesh_reads_all_rows_once_and_in_order():
    mesh, batch = mesh_of(data=2, fsdp=2, tensor=2), np.arange(48).reshape(16, 3)

    placed = shard_batch(batch, mesh, 16)

    assert local_batch_rows(16, mesh) == local_batch_rows(16, None) == list(range(16))
    np.testing.assert_array_equal(placed, batch)
    for shard in placed.addressable_shards:
        assert shard.data.shape == (4, 3)


def test_a_process_reads_the_rows_of_its_own_devices(monkeypatch):
    rows = types.SimpleNamespace(
        addressable_devices_indices_map=lambda shape: {1: (slice(12, 16),), 0: (slice(8, 12),)}
    )
    monkeypatch.setattr(sharding, "NamedSharding", lambda mesh, spec: rows)

    assert local_batch_rows(32, mesh_of(data=8)) == list(range(8, 16))


def test_arrays_and_gradients_lie_as_their_letters_say_but_for_axes_that_cannot_split():
    mesh, x = mesh_of(data=2, fsdp=2, tensor=2), jnp.ones((4, 6))
    kernel = shard_tree({"mlp/up/kernel": x}, mesh)["mlp/up/kernel"]
    use = functools.partial(all_gather_params, letters="DF")

    def where(function, x):
        with jax.set_mesh(mesh):
            return jax.jit(function)(x).sharding.spec

    assert where(lambda x: constrain(x, "BF"), jnp.ones((8, 6))) == P(("data", "fsdp"), "tensor")
    assert not any(where(lambda x: constrain(x, "BF"), jnp.ones((2, 5))))
    assert kernel.sharding.spec == P("fsdp", "tensor")
    assert where(use, kernel) == P(None, "tensor")  # gathered
    grad = jax.grad(lambda kernel: jnp.sum(use(kernel) ** 2))
    assert where(grad, kernel) == P("fsdp", "tensor")
    for other in (None, jax.make_mesh((8,), ("rows",))):  # no mesh of ours
        with use_mesh(other):
            assert constrain(x, "BF") is x
            assert all_gather_params(x, "DF") is x


def test_the_gradient_of_a_sharded_table_is_that_of_one_device():
    index_BT = jnp.asarray(np.random.default_rng(0).integers(6, size=(8, 3)))
    table_VD = jnp.arange(24.0).reshape(6, 4)

    def loss(table_VD):
        return jnp.sum(embedding_lookup(table_VD, index_BT, "VD") ** 2)

    with jax.set_mesh(mesh_of(data=2, fsdp=2, tensor=2)):
        grad_VD = jax.jit(jax.grad(loss))(table_VD)

    np.testing.assert_array_equal(grad_VD, jax.grad(loss)(table_VD))
    assert grad_VD.sharding.spec == P("tensor", "fsdp")
