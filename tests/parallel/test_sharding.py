"""Where arrays lie: rules that cover every parameter, and what does not fit is said."""

import fnmatch
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import gptjax
from gptjax.config import FinetuneConfig, GPTConfig, MeshConfig, OptimConfig, RunConfig
from gptjax.errors import ConfigError
from gptjax.model.layers import embedding_lookup
from gptjax.model.quantization import unstack_layers
from gptjax.parallel import sharding
from gptjax.training.finetune import TRAINABLE_RULES, split_trainable
from gptjax.training.optimizer import make_optimizer
from gptjax.training.train_step import init_state
from gptjax.tree import flatten_with_names
from tests.model.test_gpt import draw_params

# Every letter has a size of its own.
SIZES = {"D": 24, "H": 3, "G": 1, "K": 8, "F": 96, "V": 60, "T": 16, "C": 5, "R": 7}
SHAPE = {"vocab_size": 58, "vocab_multiple": 4, "context_length": 16, "n_layers": 4}
SHAPE |= {"n_heads": 3, "d_model": 24}
MODELS = {"tied": {}, "untied classifier": {"tie_embeddings": False, "n_classes": 5}}
MODELS["untied classifier"] |= {"head_bias": True, "qkv_bias": False}
MODELS["gated"] = {"mlp": "swiglu", "qk_norm": True, "n_kv_heads": 1}
KEY = jax.random.key(0)


def mesh_of(**sizes):
    return sharding.make_mesh(MeshConfig(**sizes))


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
            used |= {x for x in sharding.PARAM_LOGICAL_AXES if fnmatch.fnmatchcase(f"/{name}", x)}
            letters = sharding.logical_axes(name, leaf.ndim)
            for letter, size in zip(letters, leaf.shape, strict=True):
                if letter == "N":
                    assert size in (1, 2, 3, 4), name
                elif letter not in "IO":
                    ungrouped = letter == "G" and MODELS[kind[0]].get("n_kv_heads") is None
                    assert size == SIZES["H" if ungrouped else letter], name
    assert used == set(sharding.PARAM_LOGICAL_AXES)
    params = jax.eval_shape(lambda: unstack_layers(gptjax.init(GPTConfig(**SHAPE), KEY)))
    for name, leaf in flatten_with_names(params).items():
        assert "N" not in sharding.logical_axes(name, leaf.ndim)


def test_every_name_has_one_rule_which_splits_matrices(monkeypatch):
    for rule, letters in sharding.PARAM_LOGICAL_AXES.items():
        if "lora" not in rule and "norm" not in rule and len(letters) > 1:
            assert any(sharding.logical_to_spec(letters, sharding.PARAM_RULES)), rule
    with pytest.raises(ValueError, match=r"blocks/gate/kernel .* none"):
        sharding.logical_axes("blocks/gate/kernel", 3)
    monkeypatch.setitem(sharding.PARAM_LOGICAL_AXES, "*kernel", "DF")
    with pytest.raises(ValueError, match=r"\['\*mlp/up/kernel', '\*kernel'\]"):
        sharding.logical_axes("blocks/mlp/up/kernel", 3)


def test_a_size_that_does_not_split_is_named():
    odd = {"vocab_multiple": 1, "n_heads": 4, "vocab_size": 257}
    for changes, sizes, message in (
        (odd, {"data": 4, "tensor": 2}, "257 along V, .*mesh.tensor=2.*model.vocab_multiple=128"),
        ({"vocab_multiple": 8}, {"data": 4, "tensor": 2}, "/bias .* 3 along G, .*mesh.tensor=2"),
        ({"d_model": 18}, {"data": 2, "fsdp": 4}, "/kernel .* 18 along D, .*mesh.fsdp=4"),
    ):
        params = draw_params(GPTConfig(**(SHAPE | changes)))
        with pytest.raises(ConfigError, match=message):
            sharding.shard_tree(params, mesh_of(**sizes))
    sharding.check_batch_divisible(8, 2, (2, 2, 2))
    with pytest.raises(ConfigError, match=r"=8 .*accumulate=4 .* 2 rows .* 4 dev.*data=2 x .*p=2"):
        sharding.check_batch_divisible(8, 4, (2, 2, 2))


def test_an_open_axis_takes_the_devices_that_are_left_or_it_is_an_error(monkeypatch):
    for requested, devices, processes, expected in (
        ((2, -1, 1), 16, 1, (2, 8, 1)),
        ((2, 2, 1), 8, 1, (2, 2, 1)),  # one process may use some of its devices
        ((-1, 3, 1), 8, 1, None),
        ((4, 4, 1), 8, 1, None),
        ((4, 1, 1), 8, 2, None),
    ):
        config = MeshConfig(**dict(zip(sharding.MESH_AXES, requested, strict=True)))
        monkeypatch.setattr(jax, "process_count", lambda processes=processes: processes)
        if expected is None:
            with pytest.raises(ConfigError, match=f"mesh.data={requested[0]}.* {devices} devices"):
                sharding.resolve_mesh_shape(config, devices)
        else:
            assert sharding.resolve_mesh_shape(config, devices) == expected
    monkeypatch.undo()
    assert mesh_of(data=1) is None
    assert sharding.make_mesh(MeshConfig()).shape["data"] == len(jax.devices())


def test_only_the_data_axis_goes_between_slices(monkeypatch):
    kind = {"platform": "cpu", "device_kind": "cpu"}
    fakes = [
        types.SimpleNamespace(id=n, slice_index=n // 4, process_index=n // 4, **kind)
        for n in (6, 1, 4, 3, 0, 7, 2, 5)
    ]
    grids, mesh = [], mesh_of(data=8)
    monkeypatch.setattr(sharding, "Mesh", lambda grid, *_, **__: grids.append(grid) or mesh)

    sharding.make_mesh(MeshConfig(data=4, fsdp=1, tensor=2), fakes)

    ids = np.vectorize(lambda device: device.id)(grids[0])
    assert (ids // 4).reshape(4, 2).tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert sorted(ids.flat) == list(range(8))
    with pytest.raises(ConfigError, match=r"mesh.data=1 is not divisible by the 2 sl"):
        sharding.make_mesh(MeshConfig(data=1, fsdp=8), fakes)


@pytest.mark.fast
def test_a_process_reads_the_rows_of_its_own_devices_once_and_in_order(monkeypatch):
    mesh, batch = mesh_of(data=2, fsdp=2, tensor=2), np.arange(48).reshape(16, 3)

    placed = sharding.shard_batch(batch, mesh, 16)

    for each in (mesh, None):
        assert sharding.local_batch_rows(16, each) == list(range(16))
    np.testing.assert_array_equal(placed, batch)
    assert placed.addressable_shards[0].data.shape == (4, 3)

    rows = types.SimpleNamespace(
        addressable_devices_indices_map=lambda shape: {1: (slice(12, 16),), 0: (slice(8, 12),)}
    )
    monkeypatch.setattr(sharding, "NamedSharding", lambda mesh, spec: rows)

    assert sharding.local_batch_rows(32, mesh_of(data=8)) == list(range(8, 16))


def test_arrays_and_gradients_lie_as_their_letters_say_but_for_axes_that_cannot_split():
    mesh, x = mesh_of(data=2, fsdp=2, tensor=2), jnp.ones((4, 6))
    kernel = sharding.shard_tree({"mlp/up/kernel": x}, mesh)["mlp/up/kernel"]
    use = functools.partial(sharding.all_gather_params, letters="DF")

    def where(function, x):
        with jax.set_mesh(mesh):
            return jax.jit(function)(x).sharding.spec

    activation = functools.partial(sharding.constrain, letters="BF")
    assert where(activation, jnp.ones((8, 6))) == P(("data", "fsdp"), "tensor")
    assert not any(where(activation, jnp.ones((2, 5))))
    assert kernel.sharding.spec == P("fsdp", "tensor")
    assert where(use, kernel) == P(None, "tensor")  # gathered
    grad = jax.grad(lambda kernel: jnp.sum(use(kernel) ** 2))
    assert where(grad, kernel) == P("fsdp", "tensor")
    for other in (None, jax.make_mesh((8,), ("rows",))):  # no mesh of ours
        with sharding.use_mesh(other):
            assert activation(x) is x
            assert use(x) is x


def test_the_gradient_of_a_sharded_table_is_that_of_one_device():
    index_BT = jnp.asarray(np.random.default_rng(0).integers(6, size=(8, 3)))
    table_VD = jnp.arange(24.0).reshape(6, 4)

    def loss(table_VD):
        return jnp.sum(embedding_lookup(table_VD, index_BT, "VD") ** 2)

    with jax.set_mesh(mesh_of(data=2, fsdp=2, tensor=2)):
        grad_VD = jax.jit(jax.grad(loss))(table_VD)

    np.testing.assert_array_equal(grad_VD, jax.grad(loss)(table_VD))
    assert grad_VD.sharding.spec == P("tensor", "fsdp")
