"""Token sampling. All parameters are traced, so changing them never recompiles.

Order: repetition penalty, temperature, top-k, top-p, min-p. Temperature 0 is greedy.
Each filter keeps the tokens with a logit at or above a cutoff, so ties are kept or
dropped together.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32, Key

SOFTMAX_LANES = 1024  # partial sums of the softmax denominator
Logits = Float[Array, "B V"]


class SamplingParams(NamedTuple):
    """Sampling parameters of one call, as device scalars."""

    temperature: Float[Array, ""]  # 0 = greedy
    top_k: Int[Array, ""]  # 0 = off
    top_p: Float[Array, ""]  # 1 = off
    min_p: Float[Array, ""]  # 0 = off
    repetition_penalty: Float[Array, ""]  # 1 = off


def sample(
    logit_BV: Logits, seen_BV: Bool[Array, "B V"], key_B: Key[Array, " B"], sampling: SamplingParams
) -> Int[Array, " B"]:
    """Samples the next token of each row with the row's own key.

    The logits are float32 and exclude the padding of the vocabulary. `seen_BV` marks
    the tokens subject to the repetition penalty.
    """
    logit_BV = apply_repetition_penalty(logit_BV, seen_BV, sampling.repetition_penalty)

    def perturb_logits(logit_BV: Logits) -> Logits:
        # Relative to the maximum, so that no temperature overflows.
        logit_BV = logit_BV - max_logit(logit_BV)
        logit_BV = logit_BV / jnp.maximum(sampling.temperature, 1e-6)
        is_filtered = (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
        logit_BV = jax.lax.cond(
            is_filtered, lambda x_BV: filter_logits(x_BV, sampling), lambda x_BV: x_BV, logit_BV
        )
        vocab_shape = logit_BV.shape[-1:]
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, vocab_shape))(key_B)
        return logit_BV + noise_BV  # Gumbel-max: its argmax is a sample

    noisy_BV = jax.lax.cond(
        sampling.temperature > 0, perturb_logits, lambda logit_BV: logit_BV, logit_BV
    )
    return argmax(noisy_BV)


def argmax(logit_BV: Logits) -> Int[Array, " B"]:
    """Index of the first maximum of each row; the last index if the row has a NaN."""
    # Two vectorized passes take half the time of `jnp.argmax` on CPU.
    index_V = jnp.arange(logit_BV.shape[-1], dtype=jnp.int32)
    is_max_BV = logit_BV == max_logit(logit_BV)
    return jnp.min(jnp.where(is_max_BV, index_V[None], index_V[-1]), axis=-1)


def max_logit(logit_BV: Logits) -> Float[Array, "B 1"]:
    """Maximum of each row, of sortable integers: a tenth of the time on CPU."""
    max_B1 = jnp.max(float_to_sortable_int(logit_BV), axis=-1, keepdims=True)
    bits_B1 = float_to_sortable_int(jax.lax.bitcast_convert_type(max_B1, jnp.float32))
    return jax.lax.bitcast_convert_type(bits_B1, jnp.float32)


def log_prob(logit_BV: Logits, token_B: Int[Array, " B"]) -> Float[Array, " B"]:
    """Log-softmax of the logits at one token per row."""
    shifted_BV = logit_BV - max_logit(logit_BV)
    # Summed lane by lane: XLA vectorizes this on CPU, but not a full reduction.
    exp_BV = jnp.exp(shifted_BV)
    exp_BV = jnp.pad(exp_BV, ((0, 0), (0, -exp_BV.shape[1] % SOFTMAX_LANES)))
    lanes = jnp.split(exp_BV, exp_BV.shape[1] // SOFTMAX_LANES, axis=1)
    sum_B = jnp.sum(sum(lanes), axis=1)
    return shifted_BV[jnp.arange(len(token_B)), token_B] - jnp.log(sum_B)


def apply_repetition_penalty(
    logit_BV: Logits, seen_BV: Bool[Array, "B V"], penalty: Float[Array, ""]
) -> Logits:
    """Penalizes seen tokens: divides positive logits, multiplies negative ones.

    Keskar et al. 2019, "CTRL", sec. 4.1, extended to negative logits.
    """
    penalized_BV = jnp.where(logit_BV > 0, logit_BV / penalty, logit_BV * penalty)
    return jnp.where(seen_BV, penalized_BV, logit_BV)


def filter_logits(logit_BV: Logits, sampling: SamplingParams) -> Logits:
    """Sets logits outside top-k, top-p or min-p to -inf; expects a row maximum of 0.

    Top-k keeps the k highest logits (Fan et al. 2018). Among these, top-p keeps the
    smallest set of the most likely tokens with a total probability of at least p
    (Holtzman et al. 2020), and min-p the tokens with at least p times the maximum
    probability (Nguyen et al. 2024).
    """
    k = jnp.where(sampling.top_k > 0, sampling.top_k, logit_BV.shape[-1])
    p = jnp.where(sampling.top_p < 1, sampling.top_p, jnp.inf)
    sortable_BV = float_to_sortable_int(logit_BV)
    cutoff_B = cutoff_logit(sortable_BV, jnp.ones_like(logit_BV), k.astype(jnp.float32))
    keep_BV = sortable_BV >= cutoff_B[:, None]
    prob_BV = jax.nn.softmax(jnp.where(keep_BV, logit_BV, -jnp.inf))
    keep_BV &= sortable_BV >= cutoff_logit(sortable_BV, prob_BV, p)[:, None]
    keep_BV &= logit_BV >= jnp.log(sampling.min_p)
    return jnp.where(keep_BV, logit_BV, -jnp.inf)


def float_to_sortable_int(x: Float[Array, "*B"]) -> Int32[Array, "*B"]:
    """Maps float32 values to int32 values of the same order.

    Flips all but the sign bit of negative numbers. The mapping is its own inverse on
    the bit patterns.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def cutoff_logit(
    sortable_BV: Int32[Array, "B V"], weight_BV: Logits, target: Float[Array, ""]
) -> Int32[Array, " B"]:
    """Highest cutoff at or above which the weights of a row sum to the target.

    Binary search: 32 sums are several times faster than sorting on CPU, and no slower
    elsewhere. Returns the lowest integer if the total weight is below the target.
    """

    def set_bit(n: Int[Array, ""], cutoff_B: Int32[Array, " B"]) -> Array:
        # Bit 31 is the sign: clearing it raises the value.
        candidate_B = cutoff_B ^ (jnp.int32(1) << (31 - n))
        is_above_BV = (sortable_BV >= candidate_B[:, None]).astype(jnp.float32)
        # A dot product, vectorized on CPU; "highest" keeps float32 on accelerators.
        mass_B = jnp.einsum("BV,BV->B", is_above_BV, weight_BV, precision="highest")
        return jnp.where(mass_B >= target, candidate_B, cutoff_B)

    lowest_B = jnp.full(sortable_BV.shape[0], jnp.iinfo(jnp.int32).min)
    return jax.lax.fori_loop(0, 32, set_bit, lowest_B)
