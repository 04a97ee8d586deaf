"""Sharding rules: from parameter names to dimension letters to mesh axes.

The mesh axes are "data", "fsdp" and "tensor". Batch rows are sharded over the first
two; heads, MLP width and vocabulary over "tensor" (Shoeybi et al. 2019, "Megatron-LM");
the model width of stored parameters over "fsdp", which each layer all-gathers before
use (Rajbhandari et al. 2020, "ZeRO", stage 3). Optimizer state is sharded like its
parameters. The letters are those of `gptjax.model.gpt`. Functions use the mesh set by
`jax.set_mesh`; without one they leave arrays unchanged.
"""

import contextlib
import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from gptjax.config import MeshConfig
from gptjax.errors import ConfigError
from gptjax.tree import flatten_with_names, path_str

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
SHARDED_AXES = dict.fromkeys("HGFV", "tensor")
# Mesh axes of activations and of parameters in use.
COMPUTE_RULES: Mapping[str, Any] = {"B": BATCH_AXES, "X": BATCH_AXES, **SHARDED_AXES}
# Mesh axes of stored parameters.
PARAM_RULES: Mapping[str, Any] = {"D": "fsdp", **SHARDED_AXES}

# Axes of each parameter in one layer; stacked layers have a leading [N]. Exactly one
# rule matches each name. LoRA's [I], [R] and [O] are never sharded: they are small.
PARAM_LOGICAL_AXES = {
    "*token_embedding/embedding": "VD",
    "*output_embedding/embedding": "VD",
    "*position_embedding/embedding": "TD",
    "*attention/query/kernel": "DHK",
    "*attention/query/bias": "HK",
    "*attention/[kv]*/kernel": "DGK",
    "*attention/[kv]*/bias": "GK",
    "*attention/*_norm/scale": "K",
    "*attention/out/kernel": "HKD",
    "*attention/out/bias": "D",
    "*mlp/gate/kernel": "DF",
    "*mlp/gate/bias": "F",
    "*mlp/up/kernel": "DF",
    "*mlp/up/bias": "F",
    "*mlp/down/kernel": "FD",
    "*mlp/down/bias": "D",
    "*/attention_norm/*": "D",
    "*/mlp_norm/*": "D",
    "*/final_norm/*": "D",
    "*head/kernel": "DC",
    "*head/bias": "C",
    "*/lora_a": "IR",
    "*/lora_b": "RO",
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh | None:
    """Makes the mesh of a run, by default of all devices; None for a single device.

    Only "data" spans slices, which are connected by a slower network.
    """
    devices = jax.devices() if devices is None else list(devices)
    mesh_shape = resolve_mesh_shape(config, len(devices))
    if math.prod(mesh_shape) == 1:
        return None
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    if num_slices == 1:
        devices = devices[: math.prod(mesh_shape)]
        return jax.make_mesh(mesh_shape, MESH_AXES, axis_types, devices=devices)
    from jax.experimental.mesh_utils import create_hybrid_device_mesh

    if mesh_shape[0] % num_slices:
        raise ConfigError(
            f"mesh.data={mesh_shape[0]} is not divisible by the {num_slices} slices. "
            "Make it a multiple: only the data axis spans slices."
        )
    shape_per_slice = (mesh_shape[0] // num_slices, *mesh_shape[1:])
    device_grid = create_hybrid_device_mesh(shape_per_slice, (num_slices, 1, 1), devices)
    return Mesh(device_grid, MESH_AXES, axis_types=axis_types)


def resolve_mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, int, int]:
    """Resolves the mesh shape; -1 takes the remaining devices.

    >>> resolve_mesh_shape(MeshConfig(data=-1, fsdp=2, tensor=2), 8)
    (2, 2, 2)
    """
    requested = config.data, config.fsdp, config.tensor
    fixed = math.prod(size for size in requested if size != -1)
    sizes = tuple(num_devices // fixed if size == -1 else size for size in requested)
    uses_subset = jax.process_count() == 1 and -1 not in requested and fixed < num_devices
    if math.prod(sizes) != num_devices and not uses_subset:
        names = ", ".join(f"mesh.{n}={s}" for n, s in zip(MESH_AXES, requested, strict=True))
        raise ConfigError(
            f"{names} do not fit {num_devices} devices: the sizes must multiply to "
            "that number, where -1 means the remaining devices. Change the sizes."
        )
    return sizes  # pyrefly: ignore


def check_divisible(params: Any, mesh: Mesh) -> None:
    """Raises ConfigError if a parameter is not divisible over the mesh."""
    for name, leaf in flatten_with_names(params).items():
        letters = logical_axes(name, leaf.ndim)
        axes = logical_to_spec(letters, PARAM_RULES)
        for letter, size, axis in zip(letters, leaf.shape, axes, strict=True):
            if axis and size % mesh.shape[axis]:
                padding = "Set model.vocab_multiple=128 to pad the vocabulary, or choose"
                advice = padding if letter == "V" else "Choose"
                raise ConfigError(
                    f"parameter {name} has size {size} along {letter}, which is not "
                    f"divisible by mesh.{axis}={mesh.shape[axis]}. {advice} another "
                    f"mesh.{axis}."
                )


def check_batch_divisible(rows: int, accumulate: int, mesh_shape: Sequence[int]) -> None:
    """Raises ConfigError if a micro-batch is not divisible over a mesh shape."""
    data, fsdp, _ = mesh_shape
    if rows // accumulate % (data * fsdp):
        raise ConfigError(
            f"data.batch_size={rows} in train.accumulate={accumulate} micro-batches "
            f"gives {rows // accumulate} rows each, which are not divisible by the "
            f"{data * fsdp} devices of mesh.data={data} x mesh.fsdp={fsdp}. Choose a "
            "batch size that is a multiple, or smaller axes."
        )


def logical_axes(name: str, num_axes: int) -> str:
    """Logical axes of a parameter, one letter each.

    >>> logical_axes("blocks/mlp/up/kernel", 3)
    'NDF'
    """
    if not num_axes:  # of the state of the optimizer
        return ""
    matches = [x for x in PARAM_LOGICAL_AXES if fnmatch.fnmatchcase(f"/{name}", x)]
    if len(matches) != 1:
        raise ValueError(f"parameter {name} must match one rule, not {matches or 'none'}.")
    letters = PARAM_LOGICAL_AXES[matches[0]]
    return "N" * (num_axes - len(letters)) + letters


def logical_to_spec(letters: str, rules: Mapping[str, Any]) -> P:
    """Maps logical axes to a partition spec.

    >>> logical_to_spec("DF", PARAM_RULES), logical_to_spec("DF", COMPUTE_RULES)
    (P('fsdp', 'tensor'), P(None, 'tensor'))
    """
    if rules is PARAM_RULES and letters.strip("N") == "D":  # vectors are not sharded
        return P(*[None] * len(letters))
    return P(*(rules.get(letter) for letter in letters))


def constrain_param_grad(x: Array, letters: str) -> Array:
    """Constrains a gradient to the sharding of its stored parameter."""
    spec = logical_to_spec(letters, PARAM_RULES)
    return constrain_to_spec(x, spec) if current_mesh_shape() else x


def param_shardings(tree: Any, mesh: Mesh) -> Any:
    """Sharding of each leaf of parameters or optimizer state."""

    def leaf_sharding(path: Any, leaf: Any) -> NamedSharding:
        letters = logical_axes(path_str(path), leaf.ndim)
        return NamedSharding(mesh, logical_to_spec(letters, PARAM_RULES))

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def constrain(x: Array, letters: str) -> Array:
    """Constrains an activation to its sharding; axes not divisible are replicated.

    With explicit mesh axes, only asserts that it already has this sharding.
    """
    spec = divisible_spec(x, letters) if current_mesh_shape() else None
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def current_mesh_shape() -> Mapping[str, int]:
    """Axis sizes of the current mesh; empty without one and in `jax.pmap`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape if mesh.axis_names == MESH_AXES else {}


def divisible_spec(x: Array, letters: str) -> P:
    """Partition spec of an activation, without mesh axes that do not divide it."""
    mesh_shape, axes = current_mesh_shape(), []
    for size, axis in zip(x.shape, logical_to_spec(letters, COMPUTE_RULES), strict=True):
        names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
        num_shards = math.prod(mesh_shape[name] for name in names)
        axes.append(axis if size % num_shards == 0 else None)
    return P(*axes)


def all_gather_params(x: Array, letters: str) -> Array:
    """All-gathers a parameter over "fsdp" for computation.

    Its gradient is reduce-scattered rather than all-reduced.
    """
    param_spec = logical_to_spec(letters, PARAM_RULES)
    compute_spec = logical_to_spec(letters, COMPUTE_RULES)
    if param_spec == compute_spec or not is_fsdp():
        return x
    gather = jax.custom_vjp(lambda x: constrain_to_spec(x, compute_spec))
    gather.defvjp(
        lambda x: (constrain_to_spec(x, compute_spec), None),
        lambda _, g: (constrain_to_spec(g, param_spec),),
    )
    return gather(x)


def out_sharding(letters: str) -> P | None:
    """Output sharding for operations that require one with explicit mesh axes."""
    axis_types = jax.sharding.get_abstract_mesh().axis_types
    return logical_to_spec(letters, COMPUTE_RULES) if AxisType.Explicit in axis_types else None


def reshape_sharded(x: Array, shape: tuple[int, ...], letters: str) -> Array:
    """Reshapes an array; a merged axis has the letter of its first part."""
    return x.reshape(shape, out_sharding=out_sharding(letters))


def constrain_to_spec(x: Array, spec: P) -> Array:
    """Constrains or, with explicit mesh axes, reshards an array."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def is_fsdp() -> bool:
    """True if parameters are all-gathered before use."""
    return current_mesh_shape().get("fsdp", 1) > 1


def num_batch_shards() -> int:
    """Number of shards of a batch; 0 without a mesh."""
    mesh_shape = current_mesh_shape()
    return mesh_shape["data"] * mesh_shape["fsdp"] if mesh_shape else 0


def shard_tree(tree: Any, mesh: Mesh | None) -> Any:
    """Shards parameters or optimizer state, equal in all processes, for storage."""
    if mesh is None:
        return tree
    check_divisible(tree, mesh)
    return jax.tree.map(make_global_array, tree, param_shardings(tree, mesh))


def make_global_array(x: Any, sharding: NamedSharding) -> Array:
    """Makes a global array from a value that every process holds in full."""
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    if isinstance(x, Array) and x.sharding == sharding:
        return x
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(make_global_array(jax.random.key_data(x), sharding))
    host_array = np.asarray(x)
    return jax.make_array_from_callback(host_array.shape, sharding, lambda at: host_array[at])


def local_batch_rows(rows: int, mesh: Mesh | None) -> list[int]:
    """Sorted rows of a batch that belong to devices of this process."""
    if mesh is None:
        return list(range(rows))
    device_indices = NamedSharding(mesh, P(BATCH_AXES)).addressable_devices_indices_map((rows,))
    slices: Any = device_indices.values()
    return sorted({row for (at,) in slices for row in range(rows)[at]})


def shard_batch(batch: Any, mesh: Mesh | None, rows: int) -> Any:
    """Shards a batch of `rows` rows: all of them, or those of `local_batch_rows`."""
    if mesh is None:
        return jax.device_put(batch)
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    row_position = {row: n for n, row in enumerate(local_batch_rows(rows, mesh))}

    def shard_leaf(leaf: Any) -> Array:
        if len(leaf) == rows:
            return make_global_array(leaf, sharding)

        def local_slice(at: Any) -> Any:
            start, stop, _ = at[0].indices(rows)
            return leaf[row_position[start] : row_position[start] + stop - start]

        return jax.make_array_from_callback((rows, *leaf.shape[1:]), sharding, local_slice)

    return jax.tree.map(shard_leaf, batch)


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Context manager that sets the mesh, if there is one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def replicate(x: Array) -> Array:
    """Replicates an array on all devices."""
    return constrain_to_spec(x, P()) if current_mesh_shape() else x


def to_host(tree: Any) -> Any:
    """Gathers arrays in full in every process; a collective operation."""
    from jax.experimental.multihost_utils import process_allgather

    def gather_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, Array) or leaf.is_fully_addressable:
            return leaf
        return process_allgather(leaf, tiled=True)

    return jax.tree.map(gather_leaf, tree)
