"""From scores to the next token: every option is a traced value, none recompiles.

Greedy choice is temperature 0. The filters follow each other as top-k, top-p, min-p,
after the repetition penalty and the temperature. Each of them keeps the tokens whose
score is at least some threshold, so equal scores are kept or dropped together.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32, Key

LANES = 1024  # of a sum over the vocabulary
Scores = Float[Array, "B V"]


class Knobs(NamedTuple):
    """The options of one call, as scalars on the device."""

    temperature: Float[Array, ""]  # 0 = greedy
    top_k: Int[Array, ""]  # 0 = off
    top_p: Float[Array, ""]  # 1 = off
    min_p: Float[Array, ""]  # 0 = off
    repetition_penalty: Float[Array, ""]  # 1 = off


def sample(
    logit_BV: Scores, seen_BV: Bool[Array, "B V"], key_B: Key[Array, " B"], knobs: Knobs
) -> Int[Array, " B"]:
    """The next token of each row, drawn with the row's own key.

    Args:
        logit_BV: float32 scores of the real vocabulary, without padding.
        seen_BV: the tokens that the repetition penalty is for.
        key_B: used where the temperature is not 0.
        knobs: how to draw.
    """
    logit_BV = penalized(logit_BV, seen_BV, knobs.repetition_penalty)

    def drawn(logit_BV: Scores) -> Scores:
        # Counted from the highest score down, no temperature can overflow it.
        logit_BV = logit_BV - top(logit_BV)
        logit_BV = logit_BV / jnp.maximum(knobs.temperature, 1e-6)
        filtering = (knobs.top_k > 0) | (knobs.top_p < 1) | (knobs.min_p > 0)
        logit_BV = jax.lax.cond(
            filtering, lambda x_BV: filtered(x_BV, knobs), lambda x_BV: x_BV, logit_BV
        )
        vocabulary = logit_BV.shape[-1:]
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, vocabulary))(key_B)
        return logit_BV + noise_BV  # its maximum is a draw from softmax(logit_BV)

    noisy_BV = jax.lax.cond(
        knobs.temperature > 0, drawn, lambda logit_BV: logit_BV, logit_BV
    )
    return highest(noisy_BV)


def highest(score_BV: Scores) -> Int[Array, " B"]:
    """Where the highest score of each row first is; the last place if that is NaN.

    On a CPU two passes that are vectorised take half the time of `argmax`.
    """
    place_V = jnp.arange(score_BV.shape[-1], dtype=jnp.int32)
    found_BV = score_BV == top(score_BV)
    return jnp.min(jnp.where(found_BV, place_V[None], place_V[-1]), axis=-1)


def top(score_BV: Scores) -> Float[Array, "B 1"]:
    """The highest score of each row.

    It is looked for among whole numbers in the same order, for which a CPU takes a
    tenth of the time.
    """
    most_B1 = jnp.max(ordered(score_BV), axis=-1, keepdims=True)
    bits_B1 = ordered(jax.lax.bitcast_convert_type(most_B1, jnp.float32))
    return jax.lax.bitcast_convert_type(bits_B1, jnp.float32)


def log_chance(logit_BV: Scores, token_B: Int[Array, " B"]) -> Float[Array, " B"]:
    """The logarithm of softmax(logit_BV) at one token of each row."""
    below_BV = logit_BV - top(logit_BV)
    # Summed lane by lane, which a CPU vectorises; a sum of all at once it does not.
    power_BV = jnp.exp(below_BV)
    power_BV = jnp.pad(power_BV, ((0, 0), (0, -power_BV.shape[1] % LANES)))
    lanes = jnp.split(power_BV, power_BV.shape[1] // LANES, axis=1)
    total_B = jnp.sum(sum(lanes), axis=1)
    return below_BV[jnp.arange(len(token_B)), token_B] - jnp.log(total_B)


def penalized(
    logit_BV: Scores, seen_BV: Bool[Array, "B V"], penalty: Float[Array, ""]
) -> Scores:
    """Scores of seen tokens lowered: divided where positive, else multiplied.

    Keskar et al. 2019, "CTRL", section 4.1, with the sign handled.
    """
    lowered_BV = jnp.where(logit_BV > 0, logit_BV / penalty, logit_BV * penalty)
    return jnp.where(seen_BV, lowered_BV, logit_BV)


def filtered(logit_BV: Scores, knobs: Knobs) -> Scores:
    """Scores counted from the highest down, -inf where a filter drops the token.

    top-k keeps the k highest (Fan et al. 2018). Of what that leaves, top-p keeps the
    fewest highest whose probabilities sum to p or more (Holtzman et al. 2020), and
    min-p those of at least p times the highest probability (Nguyen et al. 2024).
    """
    count = jnp.where(knobs.top_k > 0, knobs.top_k, logit_BV.shape[-1])
    mass = jnp.where(knobs.top_p < 1, knobs.top_p, jnp.inf)
    rank_BV = ordered(logit_BV)
    least_B = threshold(rank_BV, jnp.ones_like(logit_BV), count.astype(jnp.float32))
    keep_BV = rank_BV >= least_B[:, None]
    chance_BV = jax.nn.softmax(jnp.where(keep_BV, logit_BV, -jnp.inf))
    keep_BV &= rank_BV >= threshold(rank_BV, chance_BV, mass)[:, None]
    keep_BV &= logit_BV >= jnp.log(knobs.min_p)
    return jnp.where(keep_BV, logit_BV, -jnp.inf)


def ordered(x: Float[Array, "*B"]) -> Int32[Array, "*B"]:
    """Integers in the order of the float32 numbers that they stand for.

    The bits of negative numbers count away from 0, and are turned round; what is turned
    twice is as it was.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def threshold(
    rank_BV: Int32[Array, "B V"], weight_BV: Scores, target: Float[Array, ""]
) -> Int32[Array, " B"]:
    """The highest rank at or above which the weights of a row sum to the target.

    The lowest integer where all of them together do not. Found bit by bit: 32 sums are
    several times faster than sorting a vocabulary on a CPU, and no slower elsewhere.
    """

    def with_bit(n: Int[Array, ""], least_B: Int32[Array, " B"]) -> Array:
        # The first bit is the sign, without which an integer is higher.
        higher_B = least_B ^ (jnp.int32(1) << (31 - n))
        above_BV = (rank_BV >= higher_B[:, None]).astype(jnp.float32)
        # As a product, which a CPU vectorises; "highest": as exact as a sum elsewhere.
        mass_B = jnp.einsum("BV,BV->B", above_BV, weight_BV, precision="highest")
        return jnp.where(mass_B >= target, higher_B, least_B)

    start_B = jnp.full(rank_BV.shape[0], jnp.iinfo(jnp.int32).min)
    return jax.lax.fori_loop(0, 32, with_bit, start_B)
