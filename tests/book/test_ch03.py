"""Chapter 3: its numbers, and agreement with the attention of gptjax."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.book import TorchGenerator, ch03
from gptjax.book.ch03 import HeadParams, MultiHeadParams
from gptjax.model.attention.mask import AttentionMask
from gptjax.model.attention.reference import reference_attention

B, T, D, H, K, E = 3, 7, 6, 2, 4, 5
JOURNEY = jnp.array(ch03.EXAMPLE_INPUTS)


def assert_printed(array, *numbers):
    """The book rounds to four decimals."""
    np.testing.assert_allclose(np.ravel(array), numbers, rtol=0, atol=6e-5)


def linear_weight(generator, inner, outer):
    """The weight of a new Linear of PyTorch."""
    return generator.uniform((outer, inner), -1 / math.sqrt(inner), 1 / math.sqrt(inner))


def linear_head(generator):
    return HeadParams(*(jnp.asarray(linear_weight(generator, 3, 2).T) for _ in range(3)))


def test_attention_without_a_mask_has_the_numbers_of_the_book():
    weight_S, row_TD = ch03.similarity(JOURNEY)[1], ch03.simple_attention(JOURNEY)[:2]
    assert_printed(weight_S, 0.1385, 0.2379, 0.2333, 0.1240, 0.1082, 0.1581)
    assert_printed(row_TD, 0.4421, 0.5931, 0.5790, 0.4419, 0.6515, 0.5683)
    generator = TorchGenerator(123)
    head = HeadParams(*(jnp.asarray(generator.uniform((3, 2))) for _ in range(3)))
    score_S = ch03.scaled_scores(JOURNEY @ head.query_DK, JOURNEY @ head.key_DK)[1]
    assert_printed(score_S * math.sqrt(2), 1.2705, 1.8524, 1.8111, 1.0795, 0.5577, 1.5440)
    row_TD = ch03.self_attention(JOURNEY, head)[1:4]
    assert_printed(row_TD, 0.3061, 0.8210, 0.3058, 0.8203, 0.2948, 0.7939)
    head = linear_head(TorchGenerator(789))
    assert_printed(ch03.self_attention(JOURNEY, head)[:2], -0.0739, 0.0713, -0.0748, 0.0703)


def test_causal_weights_have_the_numbers_of_the_book_also_after_dropout():
    head = linear_head(TorchGenerator(789))
    score_TS = ch03.scaled_scores(JOURNEY @ head.query_DK, JOURNEY @ head.key_DK)
    # The mask after torch.manual_seed(123) (cell 115).
    keep = ["110110", "000101", "111101", "011001", "010101", "011110"]
    keep_TS = jnp.array([[c == "1" for c in row] for row in keep])

    weight_TS = ch03.causal_attention_weights(score_TS)

    lower = weight_TS[np.tril_indices(6)]
    assert_printed(lower[:6], 1, 0.5517, 0.4483, 0.3800, 0.3097, 0.3103)
    np.testing.assert_array_equal(weight_TS[np.triu_indices(6, 1)], 0)
    np.testing.assert_allclose(weight_TS, ch03.mask_future(jax.nn.softmax(score_TS)), atol=1e-6)
    dropped_TS = ch03.apply_dropout(weight_TS, keep_TS, 0.5)
    assert_printed(dropped_TS[dropped_TS > 0][:6], 2.0000, 0.7599, 0.6194, 0.6206, 0.4921, 0.4925)
    np.testing.assert_array_equal(dropped_TS > 0, keep_TS & ch03.causal_mask(6))


def test_several_heads_have_the_numbers_of_the_book():
    generator = TorchGenerator(123)
    heads = [linear_head(generator) for _ in range(2)]
    rows = jnp.concatenate([ch03.causal_attention(JOURNEY, head) for head in heads], 1)
    assert_printed(rows[:2], -0.4519, 0.2216, 0.4772, 0.1063, -0.5874, 0.0058, 0.5891, 0.3257)
    generator = TorchGenerator(123)
    weights = [linear_weight(generator, 3, 2) for _ in range(3)]
    out = linear_weight(generator, 2, 2)
    bias = generator.uniform(2, -1 / math.sqrt(2), 1 / math.sqrt(2))
    params = ch03.split_heads(*weights, out, bias, 2)
    output_BTE = ch03.multi_head_attention(jnp.stack([JOURNEY] * 2), params)
    assert_printed(output_BTE[1, :3], 0.3190, 0.4858, 0.2943, 0.3897, 0.2856, 0.3593)


def test_multi_head_attention_with_dropout_is_that_of_gptjax():
    numbers = np.random.default_rng(0)
    shapes = [(D, H, K)] * 3 + [(H, K, E), (E,), (B, T, D)]
    *leaves, x_BTD = (numbers.normal(size=shape).astype(np.float32) for shape in shapes)
    keep_BHTS = numbers.random((B, H, T, T)) < 0.5

    @jax.jit
    def outputs(heads, x_BTD, keep_BHTS):
        def drop(weight_BHTS):
            return 2 * weight_BHTS * keep_BHTS

        projected = (jnp.tensordot(x_BTD, kernel, 1) for kernel in heads[:3])
        mixed_BTHK = reference_attention(*projected, AttentionMask(), drop)
        expected = jnp.tensordot(mixed_BTHK, heads.out_HKE, 2) + heads.bias_E[None, None]
        return ch03.multi_head_attention(x_BTD, heads, keep_BHTS, 0.5), expected

    ours, expected = outputs(MultiHeadParams(*leaves), x_BTD, keep_BHTS)
    # float32 sums of numbers up to 30, in another order
    np.testing.assert_allclose(ours, expected, atol=1e-4)
