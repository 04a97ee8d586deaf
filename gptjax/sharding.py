"""Where arrays live on a mesh: axes by letter, parameters by name.

A mesh has the axes "data", "fsdp" and "tensor". Rows are split over the first two;
heads, the MLP's width and the vocabulary over the last (Shoeybi et al. 2019, "Megatron-
LM"); what is left of a matrix at rest over "fsdp", which each layer gathers when it is
used (Rajbhandari et al. 2020, "ZeRO", stage 3). The optimiser's state lies as its
parameters do. Letters are those of `gptjax.model`. The mesh is the one in context,
`jax.set_mesh`; without one, everything here leaves arrays as they are.
"""

import contextlib
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from gptjax.config import MeshConfig
from gptjax.errors import ConfigError
from gptjax.tree import path_name

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
SPLIT = {"H": "tensor", "F": "tensor", "V": "tensor"}
USED: Mapping[str, Any] = {"B": BATCH, "X": BATCH, **SPLIT}  # in a product
STORED: Mapping[str, Any] = {"D": "fsdp", **SPLIT}  # at rest

# Letters of each parameter in one layer; a stack of layers has [N] before them. Exact
# cover: each name has one rule. LoRA's [I], [R] and [O] are small and nowhere split.
LETTERS = {
    "*token_embedding/embedding": "VD",
    "*output_embedding/embedding": "VD",
    "*position_embedding/embedding": "TD",
    "*attention/query/kernel": "DHK",
    "*attention/query/bias": "HK",
    "*attention/key/kernel": "DHK",
    "*attention/key/bias": "HK",
    "*attention/value/kernel": "DHK",
    "*attention/value/bias": "HK",
    "*attention/out/kernel": "HKD",
    "*attention/out/bias": "D",
    "*mlp/up/kernel": "DF",
    "*mlp/up/bias": "F",
    "*mlp/down/kernel": "FD",
    "*mlp/down/bias": "D",
    "*norm/scale": "D",
    "*norm/bias": "D",
    "*head/kernel": "DC",
    "*head/bias": "C",
    "*/lora_a": "IR",
    "*/lora_b": "RO",
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh of a run, or None where one device is all there is to use.

    Devices of one slice are neighbours on "fsdp" and "tensor"; between slices, which
    only a slower network connects, goes "data".

    Args:
        config: sizes of the axes.
        devices: to use; default: all of all processes.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_sizes(config, len(devices))
    if math.prod(sizes) == 1:
        return None
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    types = (AxisType.Auto,) * len(AXES)
    if slices == 1:
        devices = devices[: math.prod(sizes)]
        return jax.make_mesh(sizes, AXES, types, devices=devices)
    from jax.experimental.mesh_utils import create_hybrid_device_mesh

    if sizes[0] % slices:
        raise ConfigError(
            f"mesh.data={sizes[0]} does not split over {slices} slices. Make it a "
            "multiple: only the data axis goes between slices."
        )
    inner = (sizes[0] // slices, *sizes[1:])
    grid = create_hybrid_device_mesh(inner, (slices, 1, 1), devices)
    return Mesh(grid, AXES, axis_types=types)


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """How long each axis is; -1 takes the devices that the others leave.

    >>> mesh_sizes(MeshConfig(data=-1, fsdp=2, tensor=2), 8)
    (2, 2, 2)

    Raises:
        ConfigError: they do not fit the number of devices.
    """
    asked = (config.data, config.fsdp, config.tensor)
    fixed = math.prod(size for size in asked if size != -1)
    sizes = tuple(devices // fixed if size == -1 else size for size in asked)
    one = jax.process_count() == 1 and -1 not in asked and fixed < devices
    if math.prod(sizes) != devices and not one:
        names = ", ".join(f"mesh.{n}={s}" for n, s in zip(AXES, asked, strict=True))
        raise ConfigError(
            f"{names} do not fit {devices} devices: they need to multiply to that "
            "number, where -1 stands for what is left. Change the sizes."
        )
    return sizes  # pyrefly: ignore


def check_layout(params: Any, mesh: Mesh) -> None:
    """Whether every parameter splits evenly over the mesh.

    Raises:
        ConfigError: one does not, and which of its axes.
    """

    def check(path: Any, leaf: Any) -> None:
        name = path_name(path)
        letters = letters_of(name, leaf.ndim) if leaf.ndim else ""
        for letter, size, axis in zip(
            letters, leaf.shape, spec(letters, STORED), strict=True
        ):
            parts = mesh.shape[axis] if axis else 1
            if size % parts:
                way = (
                    "Set model.vocab_multiple=128 to pad the vocabulary, or choose"
                    if letter == "V"
                    else "Choose"
                )
                raise ConfigError(
                    f"parameter {name} has {size} along {letter}, which mesh.{axis}="
                    f"{parts} does not divide. {way} another mesh.{axis}."
                )

    jax.tree_util.tree_map_with_path(check, params)


def check_rows(rows: int, accumulate: int, sizes: Sequence[int]) -> None:
    """Whether the rows of each micro-batch split evenly over axes of such lengths.

    Raises:
        ConfigError: they do not.
    """
    data, fsdp, _ = sizes
    parts = data * fsdp
    if rows // accumulate % parts:
        raise ConfigError(
            f"data.batch_size={rows} in train.accumulate={accumulate} micro-batches "
            f"gives {rows // accumulate} rows at a time, which the {parts} devices of "
            f"mesh.data={data} x mesh.fsdp={fsdp} do not divide. Choose a batch size "
            "that is a multiple, or smaller axes."
        )


def letters_of(name: str, axes: int) -> str:
    """The letters of a parameter's axes.

    Raises:
        ValueError: no rule of `LETTERS` or more than one matches the name.

    >>> letters_of("blocks/mlp/up/kernel", 3)
    'NDF'
    """
    hits = [each for each in LETTERS if fnmatch.fnmatchcase(f"/{name}", each)]
    if len(hits) != 1:
        raise ValueError(f"parameter {name} needs one rule but has {hits or 'none'}.")
    letters = LETTERS[hits[0]]
    return "N" * (axes - len(letters)) + letters


def spec(letters: str, table: Mapping[str, Any]) -> P:
    """The mesh axes of an array's axes.

    Raises:
        ValueError: two of them would lie on one mesh axis.

    >>> spec("DF", STORED), spec("DF", USED)
    (P('fsdp', 'tensor'), P(None, 'tensor'))
    """
    if table is STORED and letters.strip("N") == "D":  # too small to be worth it
        return P(*[None] * len(letters))
    axes = [table.get(letter) for letter in letters]
    flat = [axis for axis in axes if axis]
    if len(flat) != len(set(flat)):
        raise ValueError(f"axes {letters} lie on {flat}: one mesh axis twice.")
    return P(*axes)


def stored(x: Array, letters: str) -> Array:
    """A gradient laid out as its parameter is at rest."""
    return constrain(x, spec(letters, STORED)) if axes_here() else x


def layout(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each leaf of parameters or of an optimiser's state."""

    def one(path: Any, leaf: Any) -> NamedSharding:
        letters = letters_of(path_name(path), leaf.ndim) if leaf.ndim else ""
        return NamedSharding(mesh, spec(letters, STORED))

    return jax.tree_util.tree_map_with_path(one, tree)


def lay(x: Array, letters: str) -> Array:
    """The same activation, laid out by its letters; all of an axis that cannot split.

    On a mesh of explicit axes it has to lie so already: then this is an assertion.
    """
    where = fitting(x, letters) if axes_here() else None
    return x if where is None else jax.lax.with_sharding_constraint(x, where)


def axes_here() -> Mapping[str, int]:
    """Sizes of the mesh in context; nothing without one, or in that of `jax.pmap`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape if mesh.axis_names == AXES else {}


def fitting(x: Array, letters: str) -> P:
    """The mesh axes of an activation, without those that do not divide it."""
    here, axes = axes_here(), []
    for size, axis in zip(x.shape, spec(letters, USED), strict=True):
        names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
        parts = math.prod(here[name] for name in names)
        axes.append(axis if size % parts == 0 else None)
    return P(*axes)


def gathered(x: Array, letters: str) -> Array:
    """A parameter as products use it: whole over "fsdp"; its gradient as it is stored.

    The gradient is summed and split in one step instead of being summed whole.
    """
    rest, use = spec(letters, STORED), spec(letters, USED)
    if rest == use or not fully_sharded():
        return x
    whole = jax.custom_vjp(lambda x: constrain(x, use))
    whole.defvjp(
        lambda x: (constrain(x, use), None), lambda _, g: (constrain(g, rest),)
    )
    return whole(x)


def explicit(letters: str) -> P | None:
    """Where a result lies, for an operation that has to be told: on explicit axes."""
    types = jax.sharding.get_abstract_mesh().axis_types
    return spec(letters, USED) if AxisType.Explicit in types else None


def reshaped(x: Array, shape: tuple[int, ...], letters: str) -> Array:
    """The array in another shape; axes that become one have the letter of the first."""
    return x.reshape(shape, out_sharding=explicit(letters))


def constrain(x: Array, where: P) -> Array:
    """The same values laid out like that, moved where they are not."""
    mesh = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, where)
    return jax.lax.with_sharding_constraint(x, where)


def fully_sharded() -> bool:
    """Whether parameters are gathered when they are used."""
    return axes_here().get("fsdp", 1) > 1


def row_shards() -> int:
    """How many parts of a batch are worked on side by side; 0 without a mesh."""
    here = axes_here()
    return here["data"] * here["fsdp"] if here else 0


def locally(
    function: Callable[..., Array], ins: Sequence[str], out: str
) -> Callable[..., Array]:
    """A function of arrays, run on each device's own part of them.

    For kernels that the compiler cannot split.

    Args:
        function: the same for every row, head and so on: no axis that is split mixes.
        ins: letters of its arguments.
        out: letters of its result.
    """
    if not axes_here():
        return function

    def parted(*arrays: Array) -> Array:
        specs = [fitting(x, letters) for x, letters in zip(arrays, ins, strict=True)]
        parts = {
            letter: axis
            for letters, each in zip(ins, specs, strict=True)
            for letter, axis in zip(letters, each, strict=True)
        }
        where = P(*(parts.get(letter) for letter in out))
        own = jax.shard_map(
            function, in_specs=tuple(specs), out_specs=where, check_vma=False
        )
        return own(*arrays)

    return parted


def place(tree: Any, mesh: Mesh | None) -> Any:
    """Parameters, or an optimiser's state, at rest; the same values on any mesh.

    Args:
        tree: the same in every process; leaves that lie on the mesh stay there.
        mesh: None leaves all as it is.

    Raises:
        ConfigError: a parameter does not split evenly.
    """
    if mesh is None:
        return tree
    check_layout(tree, mesh)
    return jax.tree.map(put, tree, layout(tree, mesh))


def put(x: Any, sharding: NamedSharding) -> Array:
    """An array that every process has, where it belongs."""
    if jax.process_count() == 1:
        return jax.device_put(x, sharding)
    if isinstance(x, Array) and x.sharding == sharding:
        return x
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(x), sharding))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda at: host[at])


def rows_here(rows: int, mesh: Mesh | None) -> list[int]:
    """Which rows of a batch the devices of this process work on, in order."""
    if mesh is None:
        return list(range(rows))
    places = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((rows,))
    parts: Any = places.values()
    return sorted({row for (at,) in parts for row in range(rows)[at]})


def place_batch(batch: Any, mesh: Mesh | None, rows: int) -> Any:
    """A batch on the devices, each with its own rows.

    Args:
        batch: arrays that are whole, or of the rows that `rows_here` names.
        mesh: None stands for the one device there is.
        rows: of the whole batch.
    """
    if mesh is None:
        return jax.device_put(batch)
    sharding = NamedSharding(mesh, P(BATCH))
    here = rows_here(rows, mesh)

    def one(leaf: Any) -> Array:
        if len(leaf) == rows:
            return put(leaf, sharding)
        shape = (rows, *leaf.shape[1:])
        first = {row: n for n, row in enumerate(here)}

        def part(at: Any) -> Any:
            start, stop, _ = at[0].indices(rows)
            return leaf[first[start] : first[start] + stop - start]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(one, batch)


def on(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The context in which functions are traced for a mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def replicated(x: Array) -> Array:
    """The same array, whole on each device."""
    return constrain(x, P()) if axes_here() else x


def local(tree: Any) -> Any:
    """The same values, whole in every process that asks together with the others."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental.multihost_utils import process_allgather

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, Array) or leaf.is_fully_addressable:
            return leaf
        return process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)
