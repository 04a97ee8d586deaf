"""Parameters in the forms that writing reads fastest, made once for a model.

On a CPU a product of a few rows reads a kernel stored as [O, I] up to a third faster
than one stored as [I, O]; elsewhere kernels are cast once and not for every token.
With 8 bits a kernel is whole numbers from -127 to 127 and one scale for each of its
outputs, so that a quarter of the bytes are read.

    I inputs of a kernel    O its outputs    B rows
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32

from gptjax.tree import named_leaves, part, unnamed

MOST = 127  # the largest whole number of a kernel
FINE = 128  # a row is a coarse part times this and a fine part, 15 bits together
SUM = 2**31 - 2**10  # 32 bits hold it, and what rounding adds
HEADS = "query", "key", "value"  # are one product when they are packed

Params = dict[str, Any]


class Transposed(NamedTuple):
    """A kernel in float32, for a CPU."""

    kernel_OI: Float[Array, "O I"]


class Whole(NamedTuple):
    """A kernel in 8 bits."""

    kernel_OI: Int8[Array, "O I"]
    scale_O: Float[Array, " O"]
    most: Float[Array, ""]  # whole numbers of a row up to it have sums of 32 bits


Packed = Transposed | Whole


def unstack(params: Params) -> Params:
    """The parameters of `GPT(stacked=False)`: one array per layer."""
    rest = {name: leaf for name, leaf in params.items() if name != "blocks"}
    blocks = params["blocks"]
    layers = {
        f"block_{n}": jax.tree.map(lambda leaf, n=n: part(leaf, n), blocks)
        for n in range(len(jax.tree.leaves(blocks)[0]))
    }
    return rest | layers


def packed(layers: Params, dtype: Any, int8: bool = False) -> Params:
    """The same parameters, kernels and the table of outputs as they are read fastest.

    Args:
        layers: as `unstack` makes them.
        dtype: of activations; what is not packed is cast to it.
        int8: whether kernels and the table become `Whole`; they must have been
            `rounded`, so that nothing changes.
    """
    on_cpu = jax.default_backend() == "cpu" and dtype == jnp.float32

    def form(leaves: dict[str, Array]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        table_VD = leaves[table_name(leaves)]
        for name, leaf in (together(leaves) if int8 or on_cpu else leaves).items():
            *path, last = name.split("/")
            if last != "kernel" or "head" in path:
                found[name] = leaf
            elif int8 or on_cpu:
                kernel_OI = flat(name, leaf).T
                pack = whole if int8 else Transposed
                found["/".join((*path, "packed"))] = pack(kernel_OI)
            else:
                found[name] = leaf.astype(dtype)
        if int8:
            found["output"] = whole(table_VD)
        elif not on_cpu:
            found["output"] = table_VD.astype(dtype)
        return found

    leaves = named_leaves(layers)
    tree = unnamed(jax.jit(form)(leaves))
    if on_cpu and not int8:  # the table is stored so already
        tree["output"] = Transposed(leaves[table_name(leaves)])
    return tree


def together(leaves: dict[str, Array]) -> dict[str, Array]:
    """Kernels and biases of `HEADS` as one of "qkv", [D, 3, H, K] and [3, H, K]."""
    found = {}
    for name, leaf in leaves.items():
        *path, kind, last = name.split("/")
        if kind == HEADS[0]:
            parts = [leaves["/".join((*path, part, last))] for part in HEADS]
            found["/".join((*path, "qkv", last))] = jnp.stack(parts, axis=-3)
        elif kind not in HEADS:
            found[name] = leaf
    return found


def rounded(params: Params) -> Params:
    """The same parameters, with kernels and the table of outputs in 8 bits' values.

    Each output of a kernel has its own scale, so that its largest weight is kept.
    """
    leaves = named_leaves(params)
    table = table_name(leaves)

    def nearest(name: str, leaf: Array) -> Array:
        if name == table:
            return near(leaf, (1,))
        if not name.endswith("/kernel") or name.startswith("head/"):
            return leaf
        return near(leaf, tuple(range(1, 1 + inner_axes(name, leaf.ndim - 1))))

    return unnamed({name: nearest(name, leaf) for name, leaf in leaves.items()})


def near(x: Array, axes: tuple[int, ...]) -> Array:
    """Whole multiples of a scale, one for all numbers along the axes."""
    scale = scales(x, axes)
    return jnp.round(x / scale) * scale


def scales(x: Array, axes: tuple[int, ...]) -> Array:
    """What 1 stands for, where the largest number stands for `MOST`."""
    most = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    return jnp.where(most > 0, most / MOST, 1.0)


def whole(kernel_OI: Float[Array, "O I"]) -> Whole:
    """A kernel in whole numbers."""
    scale_O1 = scales(kernel_OI, (1,))
    whole_OI = jnp.round(kernel_OI / scale_O1)
    largest = jnp.maximum(jnp.max(jnp.sum(jnp.abs(whole_OI), axis=1)), 1.0)
    most = jnp.minimum(MOST * FINE, jnp.floor(SUM / largest))
    return Whole(whole_OI.astype(jnp.int8), scale_O1[:, 0], most)


def table_name(names: Any) -> str:
    """The parameter that logits are made with."""
    untied = "output_embedding/embedding"
    return untied if untied in names else "token_embedding/embedding"


def inner_axes(name: str, axes: int) -> int:
    """How many axes of a layer's kernel are inputs: of "out" heads and their width."""
    return axes - 1 if name.endswith("out/kernel") else 1


def flat(name: str, kernel: Array) -> Float[Array, "I O"]:
    """A kernel of one layer with one axis of inputs and one of outputs."""
    inner = math.prod(kernel.shape[: inner_axes(name, kernel.ndim)])
    return kernel.reshape(inner, -1)


def product(x_BI: Float[Array, "B I"], kernel: Any) -> Float[Array, "B O"]:
    """The product of rows and a packed kernel, in the dtype of the rows."""
    if isinstance(kernel, Transposed):
        if len(x_BI) == 1:
            return (kernel.kernel_OI @ x_BI[0])[None]
        y_OB = jnp.einsum("OI,BI->OB", kernel.kernel_OI, x_BI)
        # Else XLA turns the product round, and reads the kernel more slowly again.
        return jax.lax.optimization_barrier(y_OB).T
    if jax.default_backend() != "cpu":
        y_BO = x_BI @ kernel.kernel_OI.astype(x_BI.dtype).T
        return y_BO * kernel.scale_O.astype(x_BI.dtype)[None]
    return whole_product(x_BI, kernel)


def whole_product(x_BI: Float[Array, "B I"], kernel: Whole) -> Float[Array, "B O"]:
    """The same in whole numbers, which a CPU multiplies as fast as it reads them.

    A row is rounded to 15 bits of its largest number, or to as many as fit.
    """
    step_B1 = jnp.max(jnp.abs(x_BI), axis=1, keepdims=True) / kernel.most
    step_B1 = jnp.where(step_B1 > 0, step_B1, 1.0)
    steps_BI = jnp.round(x_BI / step_B1)
    sums = sums_of_row if len(x_BI) == 1 else sums_of_rows
    y_BO = sums(steps_BI, kernel.kernel_OI).astype(jnp.float32)
    return (y_BO * step_B1 * kernel.scale_O[None]).astype(x_BI.dtype)


def sums_of_row(
    steps_1I: Float[Array, "1 I"], kernel_OI: Int8[Array, "O I"]
) -> Int32[Array, "1 O"]:
    """One row: a loop over the kernel as it lies, with what `gptjax.decoding` sets."""
    # Else a loop over tokens would be given kernels of 32 bits, made before it.
    row_I, kernel_OI = jax.lax.optimization_barrier(
        (steps_1I[0].astype(jnp.int16), kernel_OI)
    )
    products_OI = kernel_OI.astype(jnp.int32) * row_I.astype(jnp.int32)[None]
    return jnp.sum(products_OI, axis=1)[None]


def sums_of_rows(
    steps_BI: Float[Array, "B I"], kernel_OI: Int8[Array, "O I"]
) -> Int32[Array, "B O"]:
    """Several rows: a product of 8 bits for the coarse parts and the fine ones."""
    coarse_BI = jnp.round(steps_BI / FINE)
    sums = jnp.einsum(
        "BI,OI->BO",
        jnp.concatenate([coarse_BI, steps_BI - FINE * coarse_BI]).astype(jnp.int8),
        kernel_OI,
        preferred_element_type=jnp.int32,
    )
    rows = len(steps_BI)
    return FINE * sums[:rows] + sums[rows:]
