"""Chapter 3: attention from dot products to multiple heads, one step at a time.

The letters in array names are those of `gptjax.model.gpt`; E is the output width of
multi-head attention, equal to D in a GPT. Functions of [T, D] take one sequence; batch
them with `jax.vmap`. The production version is `gptjax.model.attention`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from gptjax.errors import ConfigError

TokenVectors = Float[Array, "T D"]
AnyArray = Array | np.ndarray

# Section 3.3.1: "Your journey starts with one step", one row per word.
EXAMPLE_INPUTS = (
    (0.43, 0.15, 0.89),
    (0.55, 0.87, 0.66),
    (0.57, 0.85, 0.64),
    (0.22, 0.58, 0.33),
    (0.77, 0.25, 0.10),
    (0.05, 0.80, 0.55),
)


# Without trainable weights (section 3.3)


def similarity(x_TD: TokenVectors) -> Float[Array, "T S"]:
    """Attention weights: the softmax of dot products between tokens.

    >>> print(*(f"{weight:.4f}" for weight in similarity(jnp.array(EXAMPLE_INPUTS))[1]))
    0.1385 0.2379 0.2333 0.1240 0.1082 0.1581
    """
    x_SD = x_TD  # the same tokens, as keys
    return jax.nn.softmax(jnp.einsum("TD,SD->TS", x_TD, x_SD))


def simple_attention(x_TD: TokenVectors) -> TokenVectors:
    """Averages all tokens, weighted by similarity.

    >>> print(*(f"{x:.4f}" for x in simple_attention(jnp.array(EXAMPLE_INPUTS))[1]))
    0.4419 0.6515 0.5683
    """
    return similarity(x_TD) @ x_TD


# With queries, keys and values (section 3.4)


class HeadParams(NamedTuple):
    """Query, key and value projections of one head."""

    query_DK: Float[Array, "D K"]
    key_DK: Float[Array, "D K"]
    value_DK: Float[Array, "D K"]


def scaled_scores(
    query_TK: Float[Array, "T K"], key_SK: Float[Array, "S K"]
) -> Float[Array, "T S"]:
    """Dot products over sqrt(K), so that their variance is independent of K."""
    score_TS = jnp.einsum("TK,SK->TS", query_TK, key_SK)
    return score_TS / math.sqrt(key_SK.shape[1])


def self_attention(x_TD: TokenVectors, head_params: HeadParams) -> Float[Array, "T K"]:
    """Single-head attention over all tokens."""
    query_TK, key_SK, value_SK = (x_TD @ kernel for kernel in head_params)
    return jax.nn.softmax(scaled_scores(query_TK, key_SK)) @ value_SK


# Causal mask and dropout (section 3.5)


def causal_mask(length: int) -> Bool[Array, "T S"]:
    """Causal mask: True for the token itself and earlier tokens.

    >>> print(causal_mask(3).astype(int))
    [[1 0 0]
     [1 1 0]
     [1 1 1]]
    """
    return jnp.tril(jnp.ones((length, length), bool))


def mask_future(weight_TS: Float[Array, "T S"]) -> Float[Array, "T S"]:
    """Zeroes the weights of later tokens and renormalizes each row.

    Equal to `causal_attention_weights`, which masks the scores before the softmax.
    """
    masked_TS = weight_TS * causal_mask(len(weight_TS))
    return masked_TS / masked_TS.sum(axis=1, keepdims=True)


def causal_attention_weights(score_TS: Float[Array, "T S"]) -> Float[Array, "T S"]:
    """Softmax of the scores, with later tokens masked by minus infinity."""
    return jax.nn.softmax(jnp.where(causal_mask(len(score_TS)), score_TS, -jnp.inf))


def dropout_mask(key: Key[Array, ""], rate: int | float, shape: tuple[int, ...]) -> Array:
    """Random mask that is True with probability 1 - rate."""
    return jax.random.bernoulli(key, 1 - check_dropout_rate(rate), shape)


def apply_dropout(weight: Array, keep: Array, rate: int | float) -> Array:
    """Applies a dropout mask, scaling kept weights by 1 / (1 - rate).

    >>> print(apply_dropout(jnp.ones(4), jnp.array([True, False, True, True]), 0.5))
    [2. 0. 2. 2.]
    """
    return jnp.where(keep, weight / (1 - check_dropout_rate(rate)), 0)


def check_dropout_rate(rate: int | float) -> int | float:
    """Returns the rate after checking that it is in [0, 1)."""
    if not 0 <= rate < 1:
        raise ConfigError(
            f"the dropout rate={rate} must be at least 0 and less than 1. Use 0.1, for example."
        )
    return rate


def causal_attention(
    x_TD: TokenVectors,
    head_params: HeadParams,
    keep_TS: Bool[Array, "T S"] | None = None,
    rate: int | float = 0.0,
) -> Float[Array, "T K"]:
    """Single-head causal attention.

    Args:
        x_TD: token vectors of one sequence.
        head_params: projections.
        keep_TS: dropout mask; None keeps all weights.
        rate: dropout rate of `keep_TS`.
    """
    query_TK, key_SK, value_SK = (x_TD @ kernel for kernel in head_params)
    weight_TS = causal_attention_weights(scaled_scores(query_TK, key_SK))
    if keep_TS is not None:
        weight_TS = apply_dropout(weight_TS, keep_TS, rate)
    return weight_TS @ value_SK


# Multiple heads (section 3.6)


class MultiHeadParams(NamedTuple):
    """Query, key, value and output projections of H heads."""

    query_DHK: Float[Array, "D H K"]
    key_DHK: Float[Array, "D H K"]
    value_DHK: Float[Array, "D H K"]
    out_HKE: Float[Array, "H K E"]
    bias_E: Float[Array, " E"]


def split_heads(
    query: Float[AnyArray, "width D"],
    key: Float[AnyArray, "width D"],
    value: Float[AnyArray, "width D"],
    out: Float[AnyArray, "E width"],
    bias: Float[AnyArray, " E"],
    n_heads: int,
) -> MultiHeadParams:
    """Splits the weights of four PyTorch Linear layers over `n_heads` heads.

    Raises:
        ConfigError: the width is not divisible by the number of heads.
    """
    width = len(query)
    if n_heads < 1 or width % n_heads:
        raise ConfigError(
            f"the width {width} must be divisible by the number of heads, which is {n_heads}."
        )
    query_DHK, key_DHK, value_DHK = (
        jnp.asarray(weight.T.reshape(-1, n_heads, width // n_heads))
        for weight in (query, key, value)
    )
    out_HKE = jnp.asarray(out.T.reshape(n_heads, width // n_heads, -1))
    return MultiHeadParams(query_DHK, key_DHK, value_DHK, out_HKE, jnp.asarray(bias))


def multi_head_attention(
    x_BTD: Float[Array, "B T D"],
    heads: MultiHeadParams,
    keep_BHTS: Bool[Array, "B H T S"] | None = None,
    rate: int | float = 0.0,
) -> Float[Array, "B T E"]:
    """Multi-head causal attention with an output projection.

    Args:
        x_BTD: token vectors.
        heads: projections.
        keep_BHTS: dropout mask; None keeps all weights.
        rate: dropout rate of `keep_BHTS`.
    """
    x_BSD = x_BTD  # the same tokens, as keys
    query_BTHK = jnp.einsum("BTD,DHK->BTHK", x_BTD, heads.query_DHK)
    key_BSHK = jnp.einsum("BSD,DHK->BSHK", x_BSD, heads.key_DHK)
    value_BSHK = jnp.einsum("BSD,DHK->BSHK", x_BSD, heads.value_DHK)

    score_BHTS = jnp.einsum("BTHK,BSHK->BHTS", query_BTHK, key_BSHK)
    score_BHTS /= math.sqrt(key_BSHK.shape[-1])
    causal_TS = causal_mask(x_BTD.shape[1])
    weight_BHTS = jax.nn.softmax(jnp.where(causal_TS[None, None], score_BHTS, -jnp.inf))
    if keep_BHTS is not None:
        weight_BHTS = apply_dropout(weight_BHTS, keep_BHTS, rate)

    mixed_BTHK = jnp.einsum("BHTS,BSHK->BTHK", weight_BHTS, value_BSHK)
    out_BTE = jnp.einsum("BTHK,HKE->BTE", mixed_BTHK, heads.out_HKE)
    return out_BTE + heads.bias_E[None, None]
