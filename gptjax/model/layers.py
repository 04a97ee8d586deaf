"""Layers of the transformer blocks, sharding-aware.

Each layer is written as one 2D matmul or one gather whose axes are named by letters,
so that `gptjax.parallel.sharding` can constrain them. Dimension letters: see
`gptjax.model.gpt`; in addition [M] positions of one shard and [X] shards of the batch.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from gptjax.model.quantization import QKV_NAMES, decode_matmul
from gptjax.parallel.sharding import (
    COMPUTE_RULES,
    all_gather_params,
    constrain_param_grad,
    constrain_to_spec,
    logical_axes,
    logical_to_spec,
    num_batch_shards,
    out_sharding,
    reshape_sharded,
)
from gptjax.runtime.device import target_platform

HiddenStates = Float[Array, "B T D"]


class Linear(nn.Module):
    """Linear layer over the last axes of its input, computed as one 2D matmul.

    On CPU, XLA runs [B*T, D] @ [D, F] much faster than the batched form. A kernel in a
    decode-time layout of `gptjax.model.quantization` is the leaf "packed" in place of
    "kernel"; it is never sharded.
    """

    features: tuple[int, ...]  # output axes, e.g. (H, K)
    init_std: float = 0.02  # of the kernel
    num_input_axes: int = 1  # last axes of the input that are contracted
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*inner"]) -> Float[Array, "*outer"]:
        """Replaces the last `num_input_axes` axes of x by `features`."""
        rows, input_shape = x.shape[: -self.num_input_axes], x.shape[-self.num_input_axes :]
        num_inputs, num_outputs = math.prod(input_shape), math.prod(self.features)
        if self.has_variable("params", "packed"):
            packed = self.get_variable("params", "packed")
            y_BO = decode_matmul(x.reshape(-1, num_inputs), packed)
            if self.use_bias:
                y_BO += self.get_variable("params", "bias").astype(x.dtype).reshape(1, -1)
            return y_BO.reshape(*rows, *self.features)
        shape = (*input_shape, *self.features)
        letters = logical_axes("/".join((*self.path, "kernel")), len(shape))
        into, out = letters[0], letters[self.num_input_axes :]
        x_BI = reshape_sharded(x, (-1, num_inputs), "B" + into)
        kernel = self.param("kernel", nn.initializers.normal(self.init_std), shape)
        kernel = all_gather_params(kernel.astype(x.dtype), letters)
        kernel_IO = reshape_sharded(kernel, (num_inputs, num_outputs), into + out[0])
        y_BO = self.matmul(x_BI, kernel_IO, out[0])
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features)
            bias = reshape_sharded(bias.astype(x.dtype), (1, num_outputs), "_" + out[0])
            y_BO += bias
        letters = f"{'B':_<{len(rows)}}{out}"
        return reshape_sharded(y_BO, (*rows, *self.features), letters)

    def matmul(
        self, x_BI: Float[Array, "B I"], kernel_IO: Float[Array, "I O"], out: str
    ) -> Float[Array, "B O"]:
        """Multiplies rows by the kernel; `gptjax.model.lora` extends this method."""
        return jnp.matmul(x_BI, kernel_IO, out_sharding=out_sharding("B" + out))


def project_qkv(
    module: nn.Module, x_BTD: HiddenStates, heads: tuple[int, ...], head_dim: int, use_bias: bool
) -> list[Array]:
    """Projects the normalized residual stream to queries, keys and values [B, T, ., K].

    `heads` are their numbers of heads. One matmul if the parameters of `module` are
    fused for decoding.
    """
    if module.has_variable("params", "qkv"):
        qkv = Linear((sum(heads), head_dim), use_bias=use_bias, name="qkv")
        return jnp.split(qkv(x_BTD), [heads[0], heads[0] + heads[1]], axis=2)
    return [
        Linear((num_heads, head_dim), use_bias=use_bias, name=name)(x_BTD)
        for name, num_heads in zip(QKV_NAMES, heads, strict=True)
    ]


class Embedding(nn.Module):
    """Embedding table [num_embeddings, features]."""

    num_embeddings: int
    features: int
    init_std: float

    @nn.compact
    def __call__(self, index: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """Looks up the embedding of each index."""
        shape = (self.num_embeddings, self.features)
        table = self.param("embedding", nn.initializers.normal(self.init_std), shape)
        letters = logical_axes("/".join((*self.path, "embedding")), 2)
        return embedding_lookup(table, index, letters)


def embedding_lookup(
    table: Float[Array, "V D"], index: Int[Array, "*B"], letters: str
) -> Float[Array, "*B D"]:
    """Looks up rows of an embedding table, with a sharded backward pass.

    Each shard of the batch sums its own gradient of the table before these are summed
    across devices; by default XLA would all-gather the gradients of all positions.
    `letters` are the logical axes of the table.
    """
    shards = num_batch_shards()
    if not shards or index.shape[0] % shards:
        return all_gather_params(table, letters)[index]

    def forward(table: Array) -> tuple[Array, None]:
        out = out_sharding("BTD")
        return all_gather_params(table, letters).at[index].get(out_sharding=out), None

    def backward(_: None, grad: Array) -> tuple[Array]:
        def scatter_add(index_M: Array, grad_MD: Array) -> Array:
            return jnp.zeros(table.shape, grad.dtype).at[index_M].add(grad_MD)

        index_XM = reshape_sharded(index, (shards, -1), "XM")
        grad_XMD = reshape_sharded(grad, (shards, -1, grad.shape[-1]), "XMD")
        grads = jax.vmap(scatter_add)(index_XM, grad_XMD)
        grads = constrain_to_spec(grads, logical_to_spec(f"X{letters}", COMPUTE_RULES))
        return (constrain_param_grad(jnp.sum(grads, axis=0), letters),)

    lookup = jax.custom_vjp(lambda table: forward(table)[0])
    lookup.defvjp(forward, backward)
    return lookup(table)


class Norm(nn.Module):
    """LayerNorm, or RMSNorm (Zhang & Sennrich 2019), with float32 statistics."""

    kind: str  # "layer" or "rms"
    epsilon: float
    use_bias: bool = False  # of LayerNorm

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalizes over the last axis, then applies scale and bias."""
        if self.kind == "rms":
            norm: Any = nn.RMSNorm(self.epsilon, dtype=jnp.float32)
        else:
            norm = nn.LayerNorm(
                self.epsilon, jnp.float32, use_bias=self.use_bias, use_fast_variance=False
            )
        nn.share_scope(self, norm)
        return norm(x.astype(jnp.float32)).astype(x.dtype)


def materialize_on_cpu(x_BTD: HiddenStates) -> HiddenStates:
    """Identity; on CPU an optimization barrier, forward and backward.

    Without it, XLA fuses the sum of gradients along the residual stream into each
    layer that uses it, and reads up to 170 arrays to recompute it. See
    `gptjax.runtime.cpu_flags.FAST_CPU_XLA_FLAGS`.
    """
    return jax.lax.optimization_barrier(x_BTD) if target_platform() == "cpu" else x_BTD


class Dropout(nn.Module):
    """Dropout, active if a "dropout" key was passed to `apply`.

    Each call of one instance draws a new mask. `flax.linen.Dropout`, if created inside
    another module and called twice, repeats its mask.
    """

    rate: float

    def __call__(self, x: Array) -> Array:
        """Zeroes elements with probability `rate` and scales up the others."""
        if not self.has_rng("dropout"):
            return x
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), 0)
