"""Chapter 3, attention: from dot products to many heads, one step at a time.

The letters in array names are those of `gptjax.model`; E is the width that comes out
of the last function, in a GPT the same as D. Functions of [T, D] take one text;
`jax.vmap` makes them functions of a batch. What gptjax itself uses is
`gptjax.attention`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from gptjax.errors import ConfigError

Text = Float[Array, "T D"]
AnyArray = Array | np.ndarray

JOURNEY = (  # section 3.3.1: "Your journey starts with one step", a row for each word
    (0.43, 0.15, 0.89),
    (0.55, 0.87, 0.66),
    (0.57, 0.85, 0.64),
    (0.22, 0.58, 0.33),
    (0.77, 0.25, 0.10),
    (0.05, 0.80, 0.55),
)


# Without weights to learn (section 3.3)


def similarity(x_TD: Text) -> Float[Array, "T S"]:
    """How much each word takes of each: a softmax of their dot products.

    >>> print(*(f"{weight:.4f}" for weight in similarity(jnp.array(JOURNEY))[1]))
    0.1385 0.2379 0.2333 0.1240 0.1082 0.1581
    """
    x_SD = x_TD  # the same words, as those that are looked at
    return jax.nn.softmax(jnp.einsum("TD,SD->TS", x_TD, x_SD))


def simple_attention(x_TD: Text) -> Text:
    """For each word the mean of all, weighted with their similarity to it.

    >>> print(*(f"{x:.4f}" for x in simple_attention(jnp.array(JOURNEY))[1]))
    0.4419 0.6515 0.5683
    """
    return similarity(x_TD) @ x_TD


# With queries, keys and values (section 3.4)


class Projections(NamedTuple):
    """What a head learns: how a word asks, how it is found, and what it then gives."""

    query_DK: Float[Array, "D K"]
    key_DK: Float[Array, "D K"]
    value_DK: Float[Array, "D K"]


def scores(
    query_TK: Float[Array, "T K"], key_SK: Float[Array, "S K"]
) -> Float[Array, "T S"]:
    """Dot products over sqrt(K), which keeps their variance from growing with K."""
    score_TS = jnp.einsum("TK,SK->TS", query_TK, key_SK)
    return score_TS / math.sqrt(key_SK.shape[1])


def self_attention(x_TD: Text, head: Projections) -> Float[Array, "T K"]:
    """For each word the weighted mean of the values of all."""
    query_TK, key_SK, value_SK = (x_TD @ kernel for kernel in head)
    return jax.nn.softmax(scores(query_TK, key_SK)) @ value_SK


# Without the future, and with dropout (section 3.5)


def past(length: int) -> Bool[Array, "T S"]:
    """True where a word may look: at itself and at what came before it.

    >>> print(past(3).astype(int))
    [[1 0 0]
     [1 1 0]
     [1 1 1]]
    """
    return jnp.tril(jnp.ones((length, length), bool))


def without_future(weight_TS: Float[Array, "T S"]) -> Float[Array, "T S"]:
    """The weights of the past, scaled so that each row sums to 1 again.

    The result is that of `causal_weights`: a softmax over fewer scores is a softmax
    over all, cut and scaled.
    """
    past_TS = weight_TS * past(len(weight_TS))
    return past_TS / past_TS.sum(axis=1, keepdims=True)


def causal_weights(score_TS: Float[Array, "T S"]) -> Float[Array, "T S"]:
    """The softmax of the scores, of which those of the future are minus infinity."""
    return jax.nn.softmax(jnp.where(past(len(score_TS)), score_TS, -jnp.inf))


def kept(key: Key[Array, ""], rate: int | float, shape: tuple[int, ...]) -> Array:
    """True for what dropout keeps, on average the share 1 - rate."""
    return jax.random.bernoulli(key, 1 - checked_rate(rate), shape)


def dropped(weight: Array, keep: Array, rate: int | float) -> Array:
    """The weights that are kept, scaled so that their mean stays; 0 for the others.

    >>> print(dropped(jnp.ones(4), jnp.array([True, False, True, True]), 0.5))
    [2. 0. 2. 2.]
    """
    return jnp.where(keep, weight / (1 - checked_rate(rate)), 0)


def checked_rate(rate: int | float) -> int | float:
    """The rate, if dropout with it leaves something."""
    if not 0 <= rate < 1:
        raise ConfigError(
            f"a dropout rate={rate} needs to be at least 0 and less than 1. Choose "
            "0.1, for example."
        )
    return rate


def causal_attention(
    x_TD: Text,
    head: Projections,
    keep_TS: Bool[Array, "T S"] | None = None,
    rate: int | float = 0.0,
) -> Float[Array, "T K"]:
    """For each word the weighted mean of the values so far.

    Args:
        x_TD: the words of one text.
        head: what is learned.
        keep_TS: the weights that dropout keeps; None keeps all.
        rate: of dropout, which `keep_TS` was drawn with.
    """
    query_TK, key_SK, value_SK = (x_TD @ kernel for kernel in head)
    weight_TS = causal_weights(scores(query_TK, key_SK))
    if keep_TS is not None:
        weight_TS = dropped(weight_TS, keep_TS, rate)
    return weight_TS @ value_SK


# Many heads (section 3.6)


class Heads(NamedTuple):
    """Projections of H heads, and of their joint output."""

    query_DHK: Float[Array, "D H K"]
    key_DHK: Float[Array, "D H K"]
    value_DHK: Float[Array, "D H K"]
    out_HKE: Float[Array, "H K E"]
    bias_E: Float[Array, " E"]


def heads_of(
    query: Float[AnyArray, "width D"],
    key: Float[AnyArray, "width D"],
    value: Float[AnyArray, "width D"],
    out: Float[AnyArray, "E width"],
    bias: Float[AnyArray, " E"],
    count: int,
) -> Heads:
    """The weights of four of PyTorch's Linear layers, split over `count` heads.

    Raises:
        ConfigError: the width does not split over so many heads.
    """
    width = len(query)
    if count < 1 or width % count:
        raise ConfigError(
            f"a width of {width} does not split over {count} heads. Choose a number "
            "of heads that divides it."
        )
    query_DHK, key_DHK, value_DHK = (
        jnp.asarray(weight.T.reshape(-1, count, width // count))
        for weight in (query, key, value)
    )
    out_HKE = jnp.asarray(out.T.reshape(count, width // count, -1))
    return Heads(query_DHK, key_DHK, value_DHK, out_HKE, jnp.asarray(bias))


def multi_head_attention(
    x_BTD: Float[Array, "B T D"],
    heads: Heads,
    keep_BHTS: Bool[Array, "B H T S"] | None = None,
    rate: int | float = 0.0,
) -> Float[Array, "B T E"]:
    """Causal attention of several heads at once, whose outputs one projection joins.

    Args:
        x_BTD: the words of several texts.
        heads: what is learned.
        keep_BHTS: the weights that dropout keeps; None keeps all.
        rate: of dropout, which `keep_BHTS` was drawn with.
    """
    x_BSD = x_BTD  # the same words, as those that are looked at
    query_BTHK = jnp.einsum("BTD,DHK->BTHK", x_BTD, heads.query_DHK)
    key_BSHK = jnp.einsum("BSD,DHK->BSHK", x_BSD, heads.key_DHK)
    value_BSHK = jnp.einsum("BSD,DHK->BSHK", x_BSD, heads.value_DHK)

    score_BHTS = jnp.einsum("BTHK,BSHK->BHTS", query_BTHK, key_BSHK)
    score_BHTS /= math.sqrt(key_BSHK.shape[-1])
    past_TS = past(x_BTD.shape[1])
    weight_BHTS = jax.nn.softmax(jnp.where(past_TS[None, None], score_BHTS, -jnp.inf))
    if keep_BHTS is not None:
        weight_BHTS = dropped(weight_BHTS, keep_BHTS, rate)

    mixed_BTHK = jnp.einsum("BHTS,BSHK->BTHK", weight_BHTS, value_BSHK)
    out_BTE = jnp.einsum("BTHK,HKE->BTE", mixed_BTHK, heads.out_HKE)
    return out_BTE + heads.bias_E[None, None]
