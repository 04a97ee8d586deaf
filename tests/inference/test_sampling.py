"""Samplers: what they keep and how often they draw it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.inference.sampling import (
    SamplingParams,
    apply_repetition_penalty,
    argmax,
    filter_logits,
    log_prob,
    max_logit,
    sample,
)

SCORES = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32) * 2


def knobs(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    return SamplingParams(
        jnp.float32(temperature),
        jnp.int32(top_k),
        jnp.float32(top_p),
        jnp.float32(min_p),
        jnp.float32(repetition_penalty),
    )


def kept(options):
    shifted = SCORES - SCORES.max(-1, keepdims=True)
    return np.isfinite(np.asarray(filter_logits(jnp.asarray(shifted), knobs(**options))))


def chances(scores):
    weights = np.exp(scores.astype(np.float64) - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("k", [1, 2, 7, 50, 99])
def test_top_k_keeps_the_k_highest(k):
    order = np.argsort(-SCORES, axis=-1)

    mask = kept({"top_k": k})

    assert (mask.sum(-1) == min(k, 50)).all()
    for row in range(3):
        assert set(np.flatnonzero(mask[row])) == set(order[row, :k])


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_reach_p(p):
    for row, mask in zip(chances(SCORES), kept({"top_p": p}), strict=True):
        order = np.argsort(-row)
        count = int(np.searchsorted(np.cumsum(row[order]), p)) + 1
        assert set(np.flatnonzero(mask)) == set(order[:count])


@pytest.mark.parametrize("p", [0.01, 0.3, 1.0])
def test_min_p_keeps_what_is_near_enough_to_the_likeliest(p):
    chance = chances(SCORES)

    np.testing.assert_array_equal(kept({"min_p": p}), chance >= p * chance.max(-1, keepdims=True))


def test_the_repetition_penalty_lowers_seen_tokens_of_either_sign():
    seen = jnp.zeros(SCORES.shape, bool).at[:, :25].set(True)

    lowered = np.asarray(apply_repetition_penalty(jnp.asarray(SCORES), seen, jnp.float32(1.5)))

    assert (lowered[:, :25] < SCORES[:, :25]).all()
    np.testing.assert_array_equal(lowered[:, 25:], SCORES[:, 25:])


@pytest.mark.fast
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 5}])
def test_tokens_come_as_often_as_their_probability_says(options):
    draws = 20_000
    scores = jnp.broadcast_to(jnp.asarray(SCORES[:1]), (draws, 50))
    keys = jax.random.split(jax.random.key(0), draws)
    scaled = SCORES[0] / options.get("temperature", 1.0)
    if k := options.get("top_k"):
        scaled = np.where(scaled >= np.sort(scaled)[-k], scaled, -np.inf)
    expected = chances(scaled) * draws

    tokens = np.asarray(sample(scores, jnp.zeros(scores.shape, bool), keys, knobs(**options)))
    counts = np.bincount(tokens, minlength=50)

    # Chi-square over tokens expected at least 5 times; its mean is their number and
    # its deviation sqrt(2 n): 5 deviations never come by chance.
    often = expected >= 5
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert chi2 < often.sum() + 5 * np.sqrt(2 * often.sum())
    assert counts[expected == 0].sum() == 0


def test_temperature_zero_is_the_highest_score_whatever_the_key():
    keys = jax.random.split(jax.random.key(1), 3)

    tokens = sample(
        jnp.asarray(SCORES), jnp.zeros(SCORES.shape, bool), keys, knobs(temperature=0.0)
    )

    np.testing.assert_array_equal(tokens, SCORES.argmax(-1))


def test_the_first_of_equal_scores_is_the_highest_and_no_number_is_no_crash():
    score_BV = jnp.array([[1.0, 3, 3, 2], [-jnp.inf, -5, -7, -5], [0.0, jnp.nan, 1, 2]])

    np.testing.assert_array_equal(argmax(score_BV), [1, 1, 3])


@pytest.mark.parametrize("sign", [1, -1])
def test_the_highest_score_is_numpys_of_all_kinds_of_numbers(sign):
    tiny = np.finfo(np.float32).tiny
    kinds = [0, tiny, tiny / 4, 1, 1.5, 1e30, np.finfo(np.float32).max, np.inf]
    score_BV = np.float32(sign) * np.array(kinds, np.float32)[:, None]
    score_BV = np.concatenate([score_BV, score_BV[::-1], -abs(score_BV)], axis=1)

    np.testing.assert_array_equal(max_logit(jnp.asarray(score_BV))[:, 0], score_BV.max(-1))


@pytest.mark.parametrize("vocabulary", [1, 1000, 1024, 1025, 50_257])
def test_the_chance_of_a_token_is_that_of_the_softmax(vocabulary):
    random = np.random.default_rng(vocabulary)
    score_BV = random.normal(size=(3, vocabulary)).astype(np.float32) * 9 + 50
    token_B = random.integers(vocabulary, size=3)

    expected = np.log(chances(score_BV)[np.arange(3), token_B])
    found = log_prob(jnp.asarray(score_BV), jnp.asarray(token_B))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=2e-6)
