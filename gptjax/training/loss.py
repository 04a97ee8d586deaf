"""Cross-entropy as (sum, weight); that of next tokens in chunks of positions.

All losses are a sum in nats and the sum of weights to divide it by, so that
micro-batches and shards with different numbers of targets are averaged exactly. Logits
[B, T, V] are never stored all at once.

Dimension letters: see `gptjax.model.gpt`; here, [C] is positions of a chunk, [X] shards
of the batch and [M] positions of one shard in a chunk.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from gptjax.config import GPTConfig
from gptjax.model.gpt import hidden_states, lm_logits, unembedding_matrix
from gptjax.parallel.sharding import (
    all_gather_params,
    constrain,
    constrain_param_grad,
    current_mesh_shape,
    num_batch_shards,
    out_sharding,
    reshape_sharded,
)
from gptjax.runtime.device import GPU_PRE_AMPERE, target_platform
from gptjax.tree import Params

VOCAB_ALIGNMENT = 128  # on GPU, [V] is padded to a multiple of this
Scalar = Float[Array, ""]
PerToken = Float[Array, "B T"]
Targets = Int[Array, "B T"]


def cross_entropy_sum(
    logits: Float[Array, "*B V"], targets: Int[Array, "*B"], weights: Float[Array, "*B"]
) -> tuple[Scalar, Scalar]:
    """Summed cross-entropy (nats) of tokens or labels, and the sum of weights.

    The weight is 1 for targets that count, and 0 for padding and masked prompts.

    >>> import jax.numpy as jnp
    >>> nats, weight = cross_entropy_sum(
    ...     jnp.zeros((1, 2, 8)), jnp.zeros((1, 2), int), jnp.array([[1.0, 0.0]]))
    >>> print(f"{nats:.4f} nats over {weight:.0f} token")  # ln 8
    2.0794 nats over 1 token
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return jnp.sum(losses * weights), jnp.sum(weights)


def per_token_loss(
    config: GPTConfig,
    x_BTD: Float[Array, "B T D"],
    unembedding_VD: Float[Array, "V D"],
    target_BT: Targets,
    chunk_size: int,
) -> PerToken:
    """Cross-entropy (nats) of each target; arguments as for `fused_cross_entropy`."""

    def chunk_loss(xs: Any) -> Array:
        x_BCD, target_BC = xs
        logit_BCV = lm_logits(config, unembedding_VD, x_BCD)
        return optax.softmax_cross_entropy_with_integer_labels(logit_BCV, target_BC)

    # Under grad, logits are recomputed instead of stored.
    chunks = to_chunks(x_BTD, chunk_size), to_chunks(target_BT, chunk_size)
    losses = jax.lax.map(jax.checkpoint(chunk_loss), chunks)
    return from_chunks(losses)


def batch_loss(
    config: GPTConfig, params: Params, batch: Any, *, chunk_size: int, **options: Any
) -> tuple[Scalar, Scalar]:
    """Loss of a `gptjax.data.lm.Batch`, as (sum in nats, sum of weights).

    `options` are `dropout_key` and `adapters` of `gptjax.hidden_states`.
    """
    x_BTD = batch_hidden_states(config, params, batch, **options)
    unembedding_VD = unembedding_matrix(config, params)
    targets, weights = batch["targets"], batch["loss_weights"]
    loss_sum = fused_cross_entropy(config, x_BTD, unembedding_VD, targets, weights, chunk_size)
    return loss_sum, weights.sum()


def make_lm_loss_fn(
    config: GPTConfig, chunk_size: int, use_segment_ids: bool = True
) -> Callable[..., Any]:
    """Returns `batch_loss` as a function (params, batch, key) for `make_train_step`.

    Without segment ids, attention crosses documents, and some kernels run faster.
    """

    def loss_fn(params: Params, batch: Any, key: Any) -> tuple[Scalar, Scalar]:
        batch = batch if use_segment_ids else {**batch, "segment_ids": None}
        dropout_key = key if config.dropout else None
        return batch_loss(config, params, batch, chunk_size=chunk_size, dropout_key=dropout_key)

    return loss_fn


def batch_per_token_loss(
    config: GPTConfig, params: Params, batch: Any, *, chunk_size: int, **options: Any
) -> PerToken:
    """Unweighted cross-entropy (nats) of each target; arguments as `batch_loss`."""
    x_BTD = batch_hidden_states(config, params, batch, **options)
    unembedding_VD = unembedding_matrix(config, params)
    return per_token_loss(config, x_BTD, unembedding_VD, batch["targets"], chunk_size)


def batch_hidden_states(config: GPTConfig, params: Params, batch: Any, **options: Any) -> Array:
    """Final hidden states [B, T, D] of a batch."""
    x_BTD, _ = hidden_states(
        config,
        params,
        batch["tokens"],
        position_BT=batch["positions"],
        segment_id_BT=batch["segment_ids"],
        **options,
    )
    return x_BTD


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def fused_cross_entropy(
    config: GPTConfig,
    x_BTD: Float[Array, "B T D"],
    unembedding_VD: Float[Array, "V D"],
    target_BT: Targets,
    weight_BT: PerToken,
    chunk_size: int,
) -> Scalar:
    """Summed cross-entropy from hidden states, a chunk of positions at a time.

    The forward pass also computes the gradients, while the logits of a chunk exist:
    the loss is a scalar sum, so the backward pass only multiplies them by its
    cotangent. No logits are stored, and none are computed twice. Liger Kernel (Hsu et
    al. 2024, "FusedLinearCrossEntropy") works in the same way.

    T is split into equal chunks of at most `chunk_size` positions [C]. The matrix is
    from `gptjax.model.gpt.unembedding_matrix`.
    """
    loss_BT = per_token_loss(config, x_BTD, unembedding_VD, target_BT, chunk_size)
    return jnp.sum(loss_BT * weight_BT)


def _fwd(
    config: GPTConfig,
    x_BTD: Array,
    unembedding_VD: Array,
    target_BT: Array,
    weight_BT: Array,
    chunk_size: int,
) -> tuple[Array, Any]:
    """Returns the sum, and its gradients for a cotangent of 1 as residuals.

    With p = softmax(logits) and weight w of a target y, the gradient of the logits is
    w (p - onehot(y)).
    """
    unembedding = pad_vocab(all_gather_params(unembedding_VD.astype(x_BTD.dtype), "VD"))
    # Each shard [X] of the batch accumulates its own gradient of the matrix, so that
    # there is one all-reduce in the end instead of one per chunk.
    shards = num_batch_shards() or 1
    shards = shards if x_BTD.shape[0] % shards == 0 else 1

    def scan_chunk(grad_XVD: Array, xs: Any) -> tuple[Array, Any]:
        x_BCD, target_BC, weight_BC = xs
        logit_BCV = lm_logits(config, unembedding, x_BCD)
        max_logit_BC = jnp.max(logit_BCV, axis=-1)
        exp_BCV = jnp.exp(logit_BCV - max_logit_BC[..., None])
        sum_exp_BC = jnp.sum(exp_BCV, axis=-1)
        is_target_BCV = target_BC[..., None] == jnp.arange(logit_BCV.shape[-1])[None, None]
        target_logit_BC = jnp.sum(jnp.where(is_target_BCV, logit_BCV, 0.0), axis=-1)
        loss_BC = max_logit_BC + jnp.log(sum_exp_BC) - target_logit_BC
        grad_logit_BCV = exp_BCV * (weight_BC / sum_exp_BC)[..., None]
        grad_logit_BCV -= jnp.where(is_target_BCV, weight_BC[..., None], 0.0)
        grad_logit_BCV = grad_logit_BCV.astype(x_BCD.dtype)
        grad_logit = grad_logit_BCV.reshape(-1, grad_logit_BCV.shape[-1])
        grad_XVD += jnp.einsum(
            "XMV,XMD->XVD",
            reshape_sharded(grad_logit, (shards, -1, grad_logit.shape[-1]), "XMV"),
            reshape_sharded(x_BCD, (shards, -1, x_BCD.shape[-1]), "XMD"),
            preferred_element_type=jnp.float32,
        )
        grad = jnp.matmul(grad_logit, unembedding, out_sharding=out_sharding("BD"))
        grad_BCD = constrain(grad.reshape(x_BCD.shape), "BCD")
        return constrain(grad_XVD, "XVD"), (loss_BC, grad_BCD)

    chunks = tuple(to_chunks(leaf, chunk_size) for leaf in (x_BTD, target_BT, weight_BT))
    shape, sharding = (shards, *unembedding.shape), out_sharding("XVD")
    zeros = constrain(jnp.zeros(shape, jnp.float32, out_sharding=sharding), "XVD")
    grad_XVD, (losses, grad_x) = jax.lax.scan(scan_chunk, zeros, chunks)
    grad_VD = constrain_param_grad(jnp.sum(grad_XVD, axis=0)[: len(unembedding_VD)], "VD")
    loss_BT = from_chunks(losses)
    residuals = from_chunks(grad_x), grad_VD.astype(unembedding_VD.dtype), loss_BT
    return jnp.sum(loss_BT * weight_BT), residuals


def pad_vocab(unembedding_VD: Float[Array, "V D"]) -> Float[Array, "V2 D"]:
    """Pads [V] with zeros to a multiple of `VOCAB_ALIGNMENT`, on GPU only.

    Matmuls with odd sizes, such as GPT-2's V = 50,257, run in slow GPU kernels.
    """
    is_gpu = target_platform() in ("gpu", GPU_PRE_AMPERE)
    if not is_gpu or current_mesh_shape().get("tensor", 1) > 1:
        return unembedding_VD
    return jnp.pad(unembedding_VD, ((0, -len(unembedding_VD) % VOCAB_ALIGNMENT), (0, 0)))


def _bwd(config: GPTConfig, chunk_size: int, residuals: Any, cotangent: Array) -> Any:
    """Multiplies the stored gradients by the cotangent; targets have no gradient."""
    grad_BTD, grad_VD, loss_BT = residuals
    grad_x = (grad_BTD.astype(jnp.float32) * cotangent).astype(grad_BTD.dtype)
    return grad_x, grad_VD * cotangent, None, loss_BT * cotangent


fused_cross_entropy.defvjp(_fwd, _bwd)


def to_chunks(x: Array, chunk_size: int) -> Array:
    """Reshapes [B, T, ...] to [T/C, B, C, ...]; C divides T and is <= `chunk_size`."""
    rows, positions, *rest = x.shape
    size = max(c for c in range(1, min(chunk_size, positions) + 1) if positions % c == 0)
    return jnp.moveaxis(x.reshape(rows, -1, size, *rest), 1, 0)


def from_chunks(x: Array) -> Array:
    """Reshapes [T/C, B, C, ...] to [B, T, ...]: the inverse of `to_chunks`."""
    chunks, rows, size, *rest = x.shape
    return jnp.moveaxis(x, 0, 1).reshape(rows, chunks * size, *rest)
