"""Chapter 3: its numbers, and agreement with the attention of gptjax."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.book import TorchGenerator
from gptjax.book.ch03 import (
    EXAMPLE_INPUTS,
    HeadParams,
    MultiHeadParams,
    apply_dropout,
    causal_attention,
    causal_attention_weights,
    causal_mask,
    dropout_mask,
    mask_future,
    multi_head_attention,
    scaled_scores,
    self_attention,
    similarity,
    simple_attention,
    split_heads,
)
from gptjax.errors import ConfigError
from gptjax.model.attention.mask import AttentionMask
from gptjax.model.attention.reference import reference_attention

B, T, D, H, K, E = 3, 7, 6, 2, 4, 5
JOURNEY = jnp.array(EXAMPLE_INPUTS)


def assert_printed(array, numbers):
    """The book rounds to four decimals."""
    np.testing.assert_allclose(array, np.reshape(numbers, array.shape), rtol=0, atol=6e-5)


def linear_weight(generator, inner, outer):
    """The weight of a new Linear of PyTorch."""
    return generator.uniform((outer, inner), -1 / math.sqrt(inner), 1 / math.sqrt(inner))


def linear_head(generator):
    return HeadParams(*(jnp.asarray(linear_weight(generator, 3, 2).T) for _ in range(3)))


def test_attention_without_a_mask_has_the_numbers_of_the_book():
    assert_printed(
        similarity(JOURNEY)[:2],
        [
            *(0.2098, 0.2006, 0.1981, 0.1242, 0.1220, 0.1452),
            *(0.1385, 0.2379, 0.2333, 0.1240, 0.1082, 0.1581),
        ],
    )
    assert_printed(
        simple_attention(JOURNEY),
        [
            *(0.4421, 0.5931, 0.5790, 0.4419, 0.6515, 0.5683, 0.4431, 0.6496, 0.5671),
            *(0.4304, 0.6298, 0.5510, 0.4671, 0.5910, 0.5266, 0.4177, 0.6503, 0.5645),
        ],
    )
    generator = TorchGenerator(123)
    head = HeadParams(*(jnp.asarray(generator.uniform((3, 2))) for _ in range(3)))
    query_TK, key_SK = JOURNEY @ head.query_DK, JOURNEY @ head.key_DK
    score_S = scaled_scores(query_TK, key_SK)[1]
    assert_printed(query_TK[1], [0.4306, 1.4551])
    assert_printed(score_S * math.sqrt(2), [1.2705, 1.8524, 1.8111, 1.0795, 0.5577, 1.5440])
    assert_printed(jax.nn.softmax(score_S), [0.1500, 0.2264, 0.2199, 0.1311, 0.0906, 0.1820])
    assert_printed(
        self_attention(JOURNEY, head),
        [
            *(0.2996, 0.8053, 0.3061, 0.8210, 0.3058, 0.8203),
            *(0.2948, 0.7939, 0.2927, 0.7891, 0.2990, 0.8040),
        ],
    )
    assert_printed(
        self_attention(JOURNEY, linear_head(TorchGenerator(789))),
        [
            *(-0.0739, 0.0713, -0.0748, 0.0703, -0.0749, 0.0702),
            *(-0.0760, 0.0685, -0.0763, 0.0679, -0.0754, 0.0693),
        ],
    )


def test_causal_weights_have_the_numbers_of_the_book_also_after_dropout():
    head = linear_head(TorchGenerator(789))
    score_TS = scaled_scores(JOURNEY @ head.query_DK, JOURNEY @ head.key_DK)
    # The mask after torch.manual_seed(123) (cell 115).
    keep = ["110110", "000101", "111101", "011001", "010101", "011110"]
    keep_TS = jnp.array([[c == "1" for c in row] for row in keep])

    weight_TS = causal_attention_weights(score_TS)

    printed = [
        *(0.5517, 0.4483, 0.3800, 0.3097, 0.3103, 0.2758, 0.2460, 0.2462, 0.2319),
        *(0.2175, 0.1983, 0.1984, 0.1888, 0.1971, 0.1935, 0.1663, 0.1666, 0.1542),
        *(0.1666, 0.1529),
    ]
    assert_printed(weight_TS[np.tril_indices(6)], [1, *printed])
    np.testing.assert_array_equal(weight_TS[np.triu_indices(6, 1)], 0)
    np.testing.assert_allclose(weight_TS, mask_future(jax.nn.softmax(score_TS)), atol=1e-6)
    dropped_TS = apply_dropout(weight_TS, keep_TS, 0.5)
    assert_printed(
        dropped_TS[dropped_TS > 0],
        [
            *(2.0000, 0.7599, 0.6194, 0.6206, 0.4921, 0.4925, 0.3966, 0.3775),
            *(0.3327, 0.3331, 0.3084, 0.3331),
        ],
    )
    np.testing.assert_array_equal(dropped_TS > 0, keep_TS & causal_mask(6))


def test_several_heads_have_the_numbers_of_the_book():
    generator = TorchGenerator(123)
    heads = [linear_head(generator) for _ in range(2)]
    assert_printed(
        jnp.concatenate([causal_attention(JOURNEY, head) for head in heads], 1),
        [
            *(-0.4519, 0.2216, 0.4772, 0.1063, -0.5874, 0.0058, 0.5891, 0.3257),
            *(-0.6300, -0.0632, 0.6202, 0.3860, -0.5675, -0.0843, 0.5478, 0.3589),
            *(-0.5526, -0.0981, 0.5321, 0.3428, -0.5299, -0.1081, 0.5077, 0.3493),
        ],
    )
    generator = TorchGenerator(123)
    weights = [linear_weight(generator, 3, 2) for _ in range(3)]
    out = linear_weight(generator, 2, 2)
    bias = generator.uniform(2, -1 / math.sqrt(2), 1 / math.sqrt(2))
    heads = split_heads(*weights, out, bias, 2)
    printed = [
        *(0.3190, 0.4858, 0.2943, 0.3897, 0.2856, 0.3593),
        *(0.2693, 0.3873, 0.2639, 0.3928, 0.2575, 0.4028),
    ]
    assert_printed(multi_head_attention(jnp.stack([JOURNEY] * 2), heads), printed * 2)


def test_multi_head_attention_with_dropout_is_that_of_gptjax():
    numbers = np.random.default_rng(0)
    shapes = [(D, H, K)] * 3 + [(H, K, E), (E,), (B, T, D)]
    *leaves, x_BTD = (numbers.normal(size=shape).astype(np.float32) for shape in shapes)
    keep_BHTS = numbers.random((B, H, T, T)) < 0.5
    identity, zeros = np.eye(H * K, dtype=np.float32), np.zeros(H * K, np.float32)
    joined = split_heads(*(x.reshape(D, H * K).T for x in leaves[:3]), identity, zeros, H)

    @jax.jit
    def outputs(heads, x_BTD, keep_BHTS):
        def expect(drop):
            projected = (jnp.tensordot(x_BTD, kernel, 1) for kernel in heads[:3])
            mixed_BTHK = reference_attention(*projected, AttentionMask(), drop)
            return jnp.tensordot(mixed_BTHK, heads.out_HKE, 2) + heads.bias_E[None, None]

        singles = [HeadParams(*(kernel[:, h] for kernel in heads[:3])) for h in range(H)]
        one_by_one = [causal_attention(x_BTD[0], head, keep_BHTS[0, 0], 0.5) for head in singles]
        together = multi_head_attention(x_BTD, joined, keep_BHTS[:, :1].repeat(H, 1), 0.5)
        dropped = multi_head_attention(x_BTD, heads, keep_BHTS, 0.5)
        return [
            (multi_head_attention(x_BTD, heads), expect(None)),
            (dropped, expect(lambda weight_BHTS: 2 * weight_BHTS * keep_BHTS)),
            (together[0], jnp.concatenate(one_by_one, 1)),
        ]

    for ours, expected in outputs(MultiHeadParams(*leaves), x_BTD, keep_BHTS):
        # float32 sums of numbers up to 30, in another order
        np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_dropout_keeps_its_share_and_the_mean():
    keep = dropout_mask(jax.random.key(0), 0.2, (100, 100))

    # The standard deviation of the share is 0.004.
    assert keep.mean() == pytest.approx(0.8, abs=0.02)
    assert apply_dropout(jnp.ones((100, 100)), keep, 0.2).mean() == pytest.approx(1, abs=0.025)
    for rate in (-0.1, 1, float("nan")):
        with pytest.raises(ConfigError, match=f"rate={rate}"):
            dropout_mask(jax.random.key(0), rate, (2,))
    x = np.ones((6, 3), np.float32)
    with pytest.raises(ConfigError, match=r"width 6 .* 4"):
        split_heads(x, x, x, np.ones((6, 6), np.float32), np.ones(6, np.float32), 4)
