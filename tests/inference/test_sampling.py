"""Sampling: which tokens each filter keeps and how often they are drawn."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.inference import sampling
from gptjax.inference.sampling import SamplingParams, argmax, max_logit

LOGITS = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32) * 2
RANK = np.argsort(np.argsort(-LOGITS))  # 0: the highest
sample = jax.jit(sampling.sample)
filter_logits = jax.jit(sampling.filter_logits)


def make_params(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    values = np.array([temperature, top_p, min_p, repetition_penalty], np.float32)
    return SamplingParams(values[0], np.int32(top_k), *values[1:])


def kept_tokens(**options):
    shifted = LOGITS - LOGITS.max(-1, keepdims=True)
    return np.isfinite(np.asarray(filter_logits(shifted, make_params(**options))))


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_filters_keep_the_most_likely_tokens():
    # Top-p keeps the fewest that reach p among the top k; min-p those near the maximum.
    for k in (1, 2, 7, 50, 99):
        np.testing.assert_array_equal(kept_tokens(top_k=k), k > RANK)
    for p, k in itertools.product((0.05, 0.5, 0.9, 0.999), (0, 7)):
        for logits, mask in zip(LOGITS, kept_tokens(top_p=p, top_k=k), strict=True):
            order = np.argsort(-logits)[: k or None]
            count = int(np.searchsorted(np.cumsum(softmax(logits[order])), p)) + 1
            assert set(np.flatnonzero(mask)) == set(order[:count])
    probs = softmax(LOGITS)
    for p in (0.01, 0.3, 1.0):
        expected = probs >= p * probs.max(-1, keepdims=True)
        np.testing.assert_array_equal(kept_tokens(min_p=p), expected)


def test_repetition_penalty_lowers_the_logits_of_seen_tokens():
    logit_BV, seen_BV = jnp.asarray(LOGITS), jnp.broadcast_to(jnp.arange(50) < 25, LOGITS.shape)

    penalized = sampling.apply_repetition_penalty(logit_BV, seen_BV, jnp.float32(1.5))

    expected = np.where(seen_BV, np.where(LOGITS > 0, LOGITS / 1.5, LOGITS * 1.5), LOGITS)
    np.testing.assert_allclose(penalized, expected, rtol=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"top_k": 5, "temperature": 2.0}])
def test_tokens_are_drawn_as_often_as_their_probability_says(options):
    draws = 20_000
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[:1]), (draws, 50))
    keys = jax.random.split(jax.random.key(0), draws)
    unseen = jnp.zeros(logits.shape, bool)
    scaled = LOGITS[0] / options.get("temperature", 1.0)
    if k := options.get("top_k"):
        scaled = np.where(RANK[0] < k, scaled, -np.inf)
    expected = softmax(scaled) * draws

    tokens = sample(logits, unseen, keys, make_params(**options))
    counts = np.bincount(np.asarray(tokens), minlength=50)
    greedy = sample(logits, unseen, keys, make_params(temperature=0.0))

    # Chi-square of tokens expected at least 5 times: 5 deviations never come by chance.
    often = expected >= 5
    chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum()
    assert chi2 < often.sum() + 5 * np.sqrt(2 * often.sum())
    assert counts[expected == 0].sum() == 0
    np.testing.assert_array_equal(greedy, LOGITS[0].argmax())


def test_maximum_is_that_of_numpy_for_all_kinds_of_numbers():
    tiny = np.finfo(np.float32).tiny
    kinds = [0, tiny, tiny / 4, 1, 1.5, 1e30, np.finfo(np.float32).max, np.inf]
    for sign in (1, -1):
        logit_BV = np.float32(sign) * np.array(kinds, np.float32)[:, None]
        logit_BV = np.concatenate([logit_BV, logit_BV[::-1], -abs(logit_BV)], axis=1)
        np.testing.assert_array_equal(max_logit(jnp.asarray(logit_BV))[:, 0], logit_BV.max(-1))

    ties = jnp.array([[1.0, 3, 3, 2], [-jnp.inf, -5, -7, -5], [0.0, jnp.nan, 1, 2]])
    np.testing.assert_array_equal(argmax(ties), [1, 1, 3])
