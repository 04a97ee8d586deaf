"""What the blocks are built from; the letters are those of `gptjax.model`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from gptjax import packing
from gptjax.attention.call import platform
from gptjax.sharding import (
    USED,
    constrain,
    explicit,
    gathered,
    letters_of,
    reshaped,
    row_shards,
    spec,
    stored,
)

LORA = ("lora_a", "lora_b")
Residual = Float[Array, "B T D"]


class Linear(nn.Module):
    """A product with the last `axes` axes of x, as one two-dimensional product.

    On a CPU, XLA runs [B*T, D] @ [D, F] much faster than the batched form. Where the
    collection "adapters" has `lora_a` [in, R] and `lora_b` [R, out], their product is
    added to the kernel without being made (Hu et al. 2021, "LoRA", eq. 3).
    """

    features: tuple[int, ...]
    std: float = 0.02
    axes: int = 1
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*inner"]) -> Float[Array, "*outer"]:
        """The last axes of x become `features`."""
        inner, outer = x.shape[-self.axes :], math.prod(self.features)
        shape = (*inner, *self.features)
        packed = self.has_variable("params", "packed")  # then on one device
        name = "/".join((*self.path, "kernel"))
        letters = "_" * len(shape) if packed else letters_of(name, len(shape))
        into, out = letters[0], letters[self.axes :]
        flat = reshaped(x, (-1, math.prod(inner)), "B" + into)
        if packed:
            y = packing.product(flat, self.get_variable("params", "packed"))
        else:
            kernel = self.param("kernel", nn.initializers.normal(self.std), shape)
            kernel = gathered(kernel.astype(x.dtype), letters)
            kernel = reshaped(kernel, (math.prod(inner), outer), into + out[0])
            y = jnp.matmul(flat, kernel, out_sharding=explicit("B" + out[0]))
        if self.has_variable("adapters", "lora_a"):
            a, b = (self.get_variable("adapters", name) for name in LORA)
            y += (flat @ a.astype(x.dtype)) @ b.astype(x.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features)
            y += reshaped(bias.astype(x.dtype), (1, outer), "_" + out[0])
        rows = x.shape[: -self.axes]
        return reshaped(y, (*rows, *self.features), f"{'B':_<{len(rows)}}{out}")


def heads_of(
    module: nn.Module, x_BTD: Residual, width: tuple[int, int], use_bias: bool
) -> tuple[Float[Array, "B T H K"], ...]:
    """Queries, keys and values; where the module's parameters are packed, at once."""

    def linear(name: str, *features: int) -> Array:
        return Linear(features, use_bias=use_bias, name=name)(x_BTD)

    if module.has_variable("params", "qkv"):
        return jnp.unstack(linear("qkv", 3, *width), axis=2)
    return tuple(linear(name, *width) for name in packing.HEADS)


class Embedding(nn.Module):
    """A table of `rows` vectors."""

    rows: int
    width: int
    std: float

    @nn.compact
    def __call__(self, index: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """The vector of each index."""
        shape = (self.rows, self.width)
        table = self.param("embedding", nn.initializers.normal(self.std), shape)
        letters = letters_of("/".join((*self.path, "embedding")), 2)
        return looked_up(table, index, letters)


def looked_up(
    table: Float[Array, "V D"], index: Int[Array, "*B"], letters: str
) -> Float[Array, "*B D"]:
    """Rows of a table; each shard of a batch adds up its own gradient of them.

    Without that, XLA would send the gradients of all positions to all devices.
    """
    shards = row_shards()
    if not shards or index.shape[0] % shards:
        return gathered(table, letters)[index]

    def forward(table: Array) -> tuple[Array, None]:
        out = explicit("BTD")
        return gathered(table, letters).at[index].get(out_sharding=out), None

    def backward(_: None, grad: Array) -> tuple[Array]:
        def add(index_M: Array, grad_MD: Array) -> Array:
            return jnp.zeros(table.shape, grad.dtype).at[index_M].add(grad_MD)

        index_XM = reshaped(index, (shards, -1), "XM")
        grad_XMD = reshaped(grad, (shards, -1, grad.shape[-1]), "XMD")
        grads = jax.vmap(add)(index_XM, grad_XMD)
        grads = constrain(grads, spec(f"X{letters}", USED))
        return (stored(jnp.sum(grads, axis=0), letters),)

    look = jax.custom_vjp(lambda table: forward(table)[0])
    look.defvjp(forward, backward)
    return look(table)


class Norm(nn.Module):
    """LayerNorm with float32 statistics."""

    @nn.compact
    def __call__(self, x_BTD: Residual) -> Residual:
        """Mean 0 and variance 1 over the width, then scale and bias."""
        norm = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32)
        nn.share_scope(self, norm)
        return norm(x_BTD.astype(jnp.float32)).astype(x_BTD.dtype)


def once(x_BTD: Residual) -> Residual:
    """The same, and on a CPU an array of its own, as its gradient is.

    Else XLA adds the gradients along the residual stream up anew for each layer, as
    sums are cheap, and reads up to 170 arrays for it; see `gptjax.cpu.FLAGS`.
    """
    return jax.lax.optimization_barrier(x_BTD) if platform() == "cpu" else x_BTD


class Dropout(nn.Module):
    """Zeroes activations where the call was given a dropout key, else nothing.

    Each call of the same module drops others; Flax's own, made within another module,
    drops the same again.
    """

    rate: float

    def __call__(self, x: Array) -> Array:
        """The kept activations, scaled up so that their mean stays."""
        if not self.has_rng("dropout"):
            return x
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), 0)


def changed(module: nn.Module, name: str, value: Array) -> Array:
    """The value and what the caller adds to it; costs nothing where it adds nothing."""
    if not module.has_variable("added", name):
        return value
    return value + module.get_variable("added", name).astype(value.dtype)


def capture(module: nn.Module, name: str, value: Array) -> None:
    """Keeps `value` for a caller that asked for it; costs nothing otherwise."""
    keep: Any = lambda _, new: new  # noqa: E731 (Flax types it as a tuple's)
    module.sow("captured", name, value, init_fn=tuple, reduce_fn=keep)
