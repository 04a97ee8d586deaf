"""Decode-time parameter layouts (fused QKV, transposed, int8), prepared once per model.

Decoding is bound by memory bandwidth: each token reads all kernels once. On CPU, a
matmul with a few rows reads a kernel stored as [O, I] up to a third faster than one
stored as [I, O]; elsewhere, kernels are cast once instead of for every token. Int8
kernels (symmetric absmax quantization, one scale per output) are a quarter of the
bytes of float32.

    I inputs of a kernel    O outputs of a kernel    B rows
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, Int32

from gptjax.tree import Params, flatten_with_names, layer_slice, unflatten_names

INT8_MAX = 127  # symmetric range of int8 weights: [-127, 127]
SPLIT_BASE = 128  # a 15-bit activation is high * 128 + low, both int8
MAX_INT32_SUM = 2**31 - 2**10  # largest int32 sum, less a margin for rounding
QKV_NAMES = "query", "key", "value"  # fused into one matmul for decoding


class TransposedKernel(NamedTuple):
    """Float32 kernel stored as [O, I], for CPU."""

    kernel_OI: Float[Array, "O I"]


class Int8Kernel(NamedTuple):
    """Int8 kernel: `kernel_OI * scale_O[:, None]` is the float32 kernel."""

    kernel_OI: Int8[Array, "O I"]
    scale_O: Float[Array, " O"]
    max_abs: Float[Array, ""]  # integer activations up to it cannot overflow int32 sums


DecodeKernel = TransposedKernel | Int8Kernel


def unstack_layers(params: Params) -> Params:
    """Splits stacked block parameters [N, ...] into "block_0", "block_1", ..."""
    rest = {name: leaf for name, leaf in params.items() if name != "blocks"}
    blocks = params["blocks"]
    layers = {
        f"block_{n}": jax.tree.map(lambda leaf, n=n: layer_slice(leaf, n), blocks)
        for n in range(len(jax.tree.leaves(blocks)[0]))
    }
    return rest | layers


def prepare_decode_params(params: Params, dtype: Any, int8: bool = False) -> Params:
    """Converts kernels and the unembedding matrix to the fastest layout for decoding.

    With `int8`, kernels become `Int8Kernel`; on CPU in float32, `TransposedKernel`; in
    both cases query, key and value are fused. Otherwise kernels are cast to `dtype`.
    Embeddings, norms and a classification head stay as they are. The parameters are
    from `unstack_layers`; with `int8` from `fake_quantize` before, which makes
    quantization lossless. `dtype` is that of activations.
    """
    on_cpu = jax.default_backend() == "cpu" and dtype == jnp.float32

    def convert(leaves: dict[str, Array]) -> dict[str, Any]:
        converted: dict[str, Any] = {}
        unembedding_VD = leaves[unembedding_name(leaves)]
        for name, leaf in (fuse_qkv(leaves) if int8 or on_cpu else leaves).items():
            *path, last = name.split("/")
            if last != "kernel" or "head" in path:
                converted[name] = leaf
            elif int8 or on_cpu:
                num_inputs = math.prod(leaf.shape[: num_input_axes(name, leaf.ndim)])
                kernel_OI = leaf.reshape(num_inputs, -1).T
                to_decode_kernel = quantize_int8 if int8 else TransposedKernel
                converted["/".join((*path, "packed"))] = to_decode_kernel(kernel_OI)
            else:
                converted[name] = leaf.astype(dtype)
        if int8:
            converted["output"] = quantize_int8(unembedding_VD)
        elif not on_cpu:
            converted["output"] = unembedding_VD.astype(dtype)
        return converted

    leaves = flatten_with_names(params)
    tree = unflatten_names(jax.jit(convert)(leaves))
    if on_cpu and not int8:  # the embedding table already is [O, I]
        tree["output"] = TransposedKernel(leaves[unembedding_name(leaves)])
    return tree


def fuse_qkv(leaves: dict[str, Array]) -> dict[str, Array]:
    """Joins query, key and value along their heads: kernel "qkv" [D, H + 2 G, K]."""
    fused = {}
    for name, leaf in leaves.items():
        *path, kind, last = name.split("/")
        if kind == QKV_NAMES[0]:
            parts = [leaves["/".join((*path, part, last))] for part in QKV_NAMES]
            fused["/".join((*path, "qkv", last))] = jnp.concatenate(parts, axis=-2)
        elif kind not in QKV_NAMES:
            fused[name] = leaf
    return fused


def fake_quantize(params: Params) -> Params:
    """Rounds kernels and the unembedding matrix to values that int8 represents exactly.

    Each output of a kernel has its own scale, so its largest weight is unchanged.
    """
    leaves = flatten_with_names(params)
    unembedding = unembedding_name(leaves)
    rounded = dict(leaves)
    for name, leaf in leaves.items():
        if name == unembedding:
            axes = (1,)
        elif name.endswith("/kernel") and not name.startswith("head/"):
            axes = tuple(range(1, 1 + num_input_axes(name, leaf.ndim - 1)))
        else:
            continue
        scale = absmax_scale(leaf, axes)
        rounded[name] = jnp.round(leaf / scale) * scale
    return unflatten_names(rounded)


def absmax_scale(x: Array, axes: tuple[int, ...]) -> Array:
    """Returns the scale that maps the largest magnitude over `axes` to `INT8_MAX`."""
    max_abs = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    return jnp.where(max_abs > 0, max_abs / INT8_MAX, 1.0)


def quantize_int8(kernel_OI: Float[Array, "O I"]) -> Int8Kernel:
    """Quantizes a kernel to int8, with one scale per output."""
    scale_O1 = absmax_scale(kernel_OI, (1,))
    int8_OI = jnp.round(kernel_OI / scale_O1)
    max_weight_sum = jnp.maximum(jnp.max(jnp.sum(jnp.abs(int8_OI), axis=1)), 1.0)
    max_abs = jnp.minimum(INT8_MAX * SPLIT_BASE, jnp.floor(MAX_INT32_SUM / max_weight_sum))
    return Int8Kernel(int8_OI.astype(jnp.int8), scale_O1[:, 0], max_abs)


def unembedding_name(names: Any) -> str:
    """Returns the name of the unembedding matrix; the token embedding if tied."""
    untied = "output_embedding/embedding"
    return untied if untied in names else "token_embedding/embedding"


def num_input_axes(name: str, num_axes: int) -> int:
    """Returns the number of input axes of a kernel: 2 for "out" ([H, K]), else 1."""
    return num_axes - 1 if name.endswith("out/kernel") else 1


def decode_matmul(x_BI: Float[Array, "B I"], kernel: Any) -> Float[Array, "B O"]:
    """Multiplies rows by a decode-time kernel, in the dtype of the rows."""
    if isinstance(kernel, TransposedKernel):
        if len(x_BI) == 1:
            return (kernel.kernel_OI @ x_BI[0])[None]
        y_OB = jnp.einsum("OI,BI->OB", kernel.kernel_OI, x_BI)
        # Otherwise XLA swaps the operands and reads the kernel in the slower order.
        return jax.lax.optimization_barrier(y_OB).T
    if jax.default_backend() != "cpu":
        y_BO = x_BI @ kernel.kernel_OI.astype(x_BI.dtype).T
        return y_BO * kernel.scale_O.astype(x_BI.dtype)[None]
    return int8_matmul(x_BI, kernel)


def int8_matmul(x_BI: Float[Array, "B I"], kernel: Int8Kernel) -> Float[Array, "B O"]:
    """Multiplies rows by an int8 kernel in integer arithmetic; memory-bound on CPU.

    Activations are quantized per row to 15 bits, or to as many as keep the int32 sums
    from overflowing.
    """
    scale_B1 = jnp.max(jnp.abs(x_BI), axis=1, keepdims=True) / kernel.max_abs
    scale_B1 = jnp.where(scale_B1 > 0, scale_B1, 1.0)
    quantized_BI = jnp.round(x_BI / scale_B1)
    multiply = int8_matvec if len(x_BI) == 1 else int8_matmul_split
    y_BO = multiply(quantized_BI, kernel.kernel_OI).astype(jnp.float32)
    return (y_BO * scale_B1 * kernel.scale_O[None]).astype(x_BI.dtype)


def int8_matvec(
    quantized_1I: Float[Array, "1 I"], kernel_OI: Int8[Array, "O I"]
) -> Int32[Array, "1 O"]:
    """Multiplies one row, reading the int8 kernel in place.

    Needs the XLA options `DISABLED_XLA_PASSES` of `gptjax.inference.engine`.
    """
    # Otherwise XLA hoists the cast to int32 out of the loop over tokens.
    row_I, kernel_OI = jax.lax.optimization_barrier((quantized_1I[0].astype(jnp.int16), kernel_OI))
    products_OI = kernel_OI.astype(jnp.int32) * row_I.astype(jnp.int32)[None]
    return jnp.sum(products_OI, axis=1)[None]


def int8_matmul_split(
    quantized_BI: Float[Array, "B I"], kernel_OI: Int8[Array, "O I"]
) -> Int32[Array, "B O"]:
    """Multiplies several 15-bit rows: one int8 matmul of their high and low parts."""
    high_BI = jnp.round(quantized_BI / SPLIT_BASE)
    sums = jnp.einsum(
        "BI,OI->BO",
        jnp.concatenate([high_BI, quantized_BI - SPLIT_BASE * high_BI]).astype(jnp.int8),
        kernel_OI,
        preferred_element_type=jnp.int32,
    )
    rows = len(quantized_BI)
    return SPLIT_BASE * sums[:rows] + sums[rows:]
