"""Next-token cross-entropy, always as (sum, weight), never with all logits at once.

The letters in array names are those of `gptjax.model`; [C] is a chunk of positions,
[X] a shard of the batch, [M] its positions.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from gptjax.attention.call import OLDER_GPU, platform
from gptjax.config import GPTConfig
from gptjax.model import Params, hidden, logits, output_table
from gptjax.sharding import (
    axes_here,
    explicit,
    gathered,
    lay,
    reshaped,
    row_shards,
    stored,
)

ALIGNED = 128  # rows
Scalar = Float[Array, ""]
PerToken = Float[Array, "B T"]
Targets = Int[Array, "B T"]


def next_token_nats(
    logit_BTV: Float[Array, "B T V"], target_BT: Targets, weight_BT: PerToken
) -> tuple[Scalar, Scalar]:
    """Cross-entropy of the next token, summed.

    Args:
        logit_BTV: unnormalised scores; the sum is taken in float32.
        target_BT: the token that follows each position.
        weight_BT: 1 where the target counts; 0 for padding and for prompts.

    Returns:
        Nats, and the weight to divide them by.

    >>> import jax.numpy as jnp
    >>> nats, weight = next_token_nats(
    ...     jnp.zeros((1, 2, 8)), jnp.zeros((1, 2), int), jnp.array([[1.0, 0.0]]))
    >>> print(f"{nats:.4f} nats over {weight:.0f} token")  # ln 8
    2.0794 nats over 1 token
    """
    nats_BT = optax.softmax_cross_entropy_with_integer_labels(
        logit_BTV.astype(jnp.float32), target_BT
    )
    return jnp.sum(nats_BT * weight_BT), jnp.sum(weight_BT)


def token_nats(
    config: GPTConfig,
    x_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    target_BT: Targets,
    chunk: int,
) -> PerToken:
    """Cross-entropy of each target, with logits for `chunk` positions at a time."""

    def one(xs: Any) -> Array:
        x_BCD, target_BC = xs
        logit_BCV = logits(config, table_VD, x_BCD)
        return optax.softmax_cross_entropy_with_integer_labels(logit_BCV, target_BC)

    # Where a gradient is taken, logits are computed again rather than kept.
    chunks = split(x_BTD, chunk), split(target_BT, chunk)
    nats = jax.lax.map(jax.checkpoint(one), chunks)
    return join(nats)


def batch_nats(
    config: GPTConfig,
    params: Params,
    batch: Any,
    *,
    chunk: int,
    dropout_key: Any = None,
    adapters: Params | None = None,
) -> tuple[Scalar, Scalar]:
    """The loss of a `gptjax.data.batches.Batch`, as (sum of nats, sum of weights)."""
    x_BTD = read(config, params, batch, dropout_key=dropout_key, adapters=adapters)
    table_VD = output_table(config, params)
    targets, weights = batch["targets"], batch["weights"]
    nats = weighted_nats(config, x_BTD, table_VD, targets, weights, chunk)
    return nats, weights.sum()


def next_token_loss(
    config: GPTConfig, chunk: int, packed: bool = True
) -> Callable[..., Any]:
    """`batch_nats` as `gptjax.make_train_step` takes it: of (params, batch, key).

    Args:
        config: shape of the model; its dropout decides whether the key is used.
        chunk: positions whose logits exist at a time.
        packed: whether rows hold documents that see nothing of each other; without
            segments some attention kernels are faster.
    """

    def loss(params: Params, batch: Any, key: Any) -> tuple[Scalar, Scalar]:
        batch = batch if packed else {**batch, "segments": None}
        dropout_key = key if config.dropout else None
        return batch_nats(config, params, batch, chunk=chunk, dropout_key=dropout_key)

    return loss


def batch_token_nats(
    config: GPTConfig, params: Params, batch: Any, *, chunk: int, **options: Any
) -> PerToken:
    """The cross-entropy of each target of such a batch, whatever its weight.

    Args:
        config: shape of the model.
        params: of the model.
        batch: tokens, targets, segments and positions, [B, T] each.
        chunk: positions whose logits exist at a time.
        **options: `dropout_key` and `adapters` of `gptjax.hidden`.
    """
    x_BTD = read(config, params, batch, **options)
    table_VD = output_table(config, params)
    return token_nats(config, x_BTD, table_VD, batch["targets"], chunk)


def read(config: GPTConfig, params: Params, batch: Any, **options: Any) -> Array:
    """Final hidden states [B, T, D] of a batch whose rows hold several documents."""
    x_BTD, _ = hidden(
        config,
        params,
        batch["tokens"],
        position_BT=batch["positions"],
        segment_BT=batch["segments"],
        **options,
    )
    return x_BTD


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def weighted_nats(
    config: GPTConfig,
    x_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    target_BT: Targets,
    weight_BT: PerToken,
    chunk: int,
) -> Scalar:
    """The sum of `next_token_nats`, from hidden states, `chunk` positions at a time.

    A sum has a scalar cotangent, so its gradient is computed with each chunk of
    logits while they exist and only scaled in the backward pass: no logits are
    stored or computed twice. T is cut into equal chunks of at most `chunk`.

    Args:
        config: shape of the model.
        x_BTD: final hidden states.
        table_VD: `gptjax.model.output_table`.
        target_BT: the token that follows each position.
        weight_BT: how much each target counts.
        chunk: positions [C] whose logits [B, C, V] exist at a time.
    """
    nats_BT = token_nats(config, x_BTD, table_VD, target_BT, chunk)
    return jnp.sum(nats_BT * weight_BT)


def _forward(
    config: GPTConfig,
    x_BTD: Array,
    table_VD: Array,
    target_BT: Array,
    weight_BT: Array,
    chunk: int,
) -> tuple[Array, Any]:
    """The sum, and its gradients for a cotangent of 1."""
    table = aligned(gathered(table_VD.astype(x_BTD.dtype), "VD"))
    # Each shard [X] of the batch adds up its own gradient of the table, so that these
    # are summed over the devices once, not for every chunk.
    shards = row_shards() or 1
    shards = shards if x_BTD.shape[0] % shards == 0 else 1

    def one(grad_XVD: Array, xs: Any) -> tuple[Array, Any]:
        x_BCD, target_BC, weight_BC = xs
        logit_BCV = logits(config, table, x_BCD)
        top_BC = jnp.max(logit_BCV, axis=-1)
        power_BCV = jnp.exp(logit_BCV - top_BC[..., None])
        total_BC = jnp.sum(power_BCV, axis=-1)
        hit_BCV = target_BC[..., None] == jnp.arange(logit_BCV.shape[-1])[None, None]
        hit_BC = jnp.sum(jnp.where(hit_BCV, logit_BCV, 0.0), axis=-1)
        nats_BC = top_BC + jnp.log(total_BC) - hit_BC
        error_BCV = power_BCV * (weight_BC / total_BC)[..., None]
        error_BCV -= jnp.where(hit_BCV, weight_BC[..., None], 0.0)
        error_BCV = error_BCV.astype(x_BCD.dtype)
        error = error_BCV.reshape(-1, error_BCV.shape[-1])
        grad_XVD += jnp.einsum(
            "XMV,XMD->XVD",
            reshaped(error, (shards, -1, error.shape[-1]), "XMV"),
            reshaped(x_BCD, (shards, -1, x_BCD.shape[-1]), "XMD"),
            preferred_element_type=jnp.float32,
        )
        grad = jnp.matmul(error, table, out_sharding=explicit("BD"))
        grad_BCD = lay(grad.reshape(x_BCD.shape), "BCD")
        return lay(grad_XVD, "XVD"), (nats_BC, grad_BCD)

    chunks = tuple(split(leaf, chunk) for leaf in (x_BTD, target_BT, weight_BT))
    shape, where = (shards, *table.shape), explicit("XVD")
    zeros = lay(jnp.zeros(shape, jnp.float32, out_sharding=where), "XVD")
    grad_XVD, (nats, grad_x) = jax.lax.scan(one, zeros, chunks)
    grad_VD = stored(jnp.sum(grad_XVD, axis=0)[: len(table_VD)], "VD")
    nats_BT = join(nats)
    kept = join(grad_x), grad_VD.astype(table_VD.dtype), nats_BT
    return jnp.sum(nats_BT * weight_BT), kept


def aligned(table_VD: Float[Array, "V D"]) -> Float[Array, "V2 D"]:
    """The table, on a GPU with rows of zeros up to a whole number of `ALIGNED`.

    Products whose sides are odd, as GPT-2's 50,257, take a GPU's slow kernels.
    """
    if platform() not in ("gpu", OLDER_GPU) or axes_here().get("tensor", 1) > 1:
        return table_VD
    return jnp.pad(table_VD, ((0, -len(table_VD) % ALIGNED), (0, 0)))


def _backward(config: GPTConfig, chunk: int, kept: Any, cotangent: Array) -> Any:
    """The kept gradients times the cotangent; targets have none."""
    grad_BTD, grad_VD, nats_BT = kept
    grad_x = (grad_BTD.astype(jnp.float32) * cotangent).astype(grad_BTD.dtype)
    return grad_x, grad_VD * cotangent, None, nats_BT * cotangent


weighted_nats.defvjp(_forward, _backward)


def split(x: Array, chunk: int) -> Array:
    """[B, T, ...] as [T/C, B, C, ...], C the largest divisor of T up to `chunk`."""
    rows, positions, *rest = x.shape
    size = max(c for c in range(1, min(chunk, positions) + 1) if positions % c == 0)
    return jnp.moveaxis(x.reshape(rows, -1, size, *rest), 1, 0)


def join(x: Array) -> Array:
    """The inverse of `split`."""
    chunks, rows, size, *rest = x.shape
    return jnp.moveaxis(x, 0, 1).reshape(rows, chunks * size, *rest)
