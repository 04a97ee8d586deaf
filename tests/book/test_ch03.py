"""Chapter 3 of the book: its numbers, and the attention that gptjax uses."""

import math
import warnings

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


def is_printed_as(array, numbers):
    """Whether the book has these numbers, which are rounded to four decimals."""
    return np.allclose(array, numbers, rtol=0, atol=6e-5)


def journey():
    return jnp.array(EXAMPLE_INPUTS)


def linear(generator, inner, outer):
    """The weight of PyTorch's Linear without bias, as it is after its creation."""
    bound = 1 / math.sqrt(inner)
    return generator.uniform((outer, inner), -bound, bound)


def three_linears(generator, inner=3, outer=2):
    """The weights for queries, keys and values."""
    return [linear(generator, inner, outer) for _ in range(3)]


def linear_head(generator):
    return HeadParams(*(jnp.asarray(weight.T) for weight in three_linears(generator)))


def random_heads(outer=E):
    keys = jax.random.split(jax.random.key(1), 5)
    shapes = [(D, H, K)] * 3 + [(H, K, outer), (outer,)]
    pairs = zip(keys, shapes, strict=True)
    return MultiHeadParams(*(jax.random.normal(key, shape) for key, shape in pairs))


def random_rows():
    return jax.random.normal(jax.random.key(0), (B, T, D))


# The book's numbers


@pytest.mark.fast
def test_attention_without_weights_has_the_numbers_of_the_book():
    weight_TS, context_TD = similarity(journey()), simple_attention(journey())

    assert is_printed_as(
        weight_TS[:2],
        [
            [0.2098, 0.2006, 0.1981, 0.1242, 0.1220, 0.1452],
            [0.1385, 0.2379, 0.2333, 0.1240, 0.1082, 0.1581],
        ],
    )
    assert is_printed_as(
        context_TD,
        [
            [0.4421, 0.5931, 0.5790],
            [0.4419, 0.6515, 0.5683],
            [0.4431, 0.6496, 0.5671],
            [0.4304, 0.6298, 0.5510],
            [0.4671, 0.5910, 0.5266],
            [0.4177, 0.6503, 0.5645],
        ],
    )


def test_attention_with_uniform_weights_has_the_numbers_of_the_book():
    generator = TorchGenerator(123)
    head = HeadParams(*(jnp.asarray(generator.uniform((3, 2))) for _ in range(3)))
    query_TK, key_SK = journey() @ head.query_DK, journey() @ head.key_DK

    score_TS = scaled_scores(query_TK, key_SK)
    context_TK = self_attention(journey(), head)

    assert is_printed_as(query_TK[1], [0.4306, 1.4551])
    assert is_printed_as(
        score_TS[1] * math.sqrt(2), [1.2705, 1.8524, 1.8111, 1.0795, 0.5577, 1.5440]
    )
    assert is_printed_as(
        jax.nn.softmax(score_TS[1]), [0.1500, 0.2264, 0.2199, 0.1311, 0.0906, 0.1820]
    )
    assert is_printed_as(
        context_TK,
        [
            [0.2996, 0.8053],
            [0.3061, 0.8210],
            [0.3058, 0.8203],
            [0.2948, 0.7939],
            [0.2927, 0.7891],
            [0.2990, 0.8040],
        ],
    )


def test_attention_with_linear_layers_has_the_numbers_of_the_book():
    context_TK = self_attention(journey(), linear_head(TorchGenerator(789)))

    expected = [
        [-0.0739, 0.0713],
        [-0.0748, 0.0703],
        [-0.0749, 0.0702],
        [-0.0760, 0.0685],
        [-0.0763, 0.0679],
        [-0.0754, 0.0693],
    ]
    assert is_printed_as(context_TK, expected)


def test_causal_weights_have_the_numbers_of_the_book_also_after_dropout():
    head = linear_head(TorchGenerator(789))
    score_TS = scaled_scores(journey() @ head.query_DK, journey() @ head.key_DK)
    keep_TS = jnp.array(  # what torch.manual_seed(123) keeps of 6 x 6 (cell 115)
        [
            [1, 1, 0, 1, 1, 0],
            [0, 0, 0, 1, 0, 1],
            [1, 1, 1, 1, 0, 1],
            [0, 1, 1, 0, 0, 1],
            [0, 1, 0, 1, 0, 1],
            [0, 1, 1, 1, 1, 0],
        ],
        bool,
    )

    weight_TS = causal_attention_weights(score_TS)

    assert is_printed_as(
        weight_TS,
        [
            [1.0000, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000],
            [0.5517, 0.4483, 0.0000, 0.0000, 0.0000, 0.0000],
            [0.3800, 0.3097, 0.3103, 0.0000, 0.0000, 0.0000],
            [0.2758, 0.2460, 0.2462, 0.2319, 0.0000, 0.0000],
            [0.2175, 0.1983, 0.1984, 0.1888, 0.1971, 0.0000],
            [0.1935, 0.1663, 0.1666, 0.1542, 0.1666, 0.1529],
        ],
    )
    assert is_printed_as(
        apply_dropout(weight_TS, keep_TS, 0.5),
        [
            [2.0000, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000],
            [0.0000, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000],
            [0.7599, 0.6194, 0.6206, 0.0000, 0.0000, 0.0000],
            [0.0000, 0.4921, 0.4925, 0.0000, 0.0000, 0.0000],
            [0.0000, 0.3966, 0.0000, 0.3775, 0.0000, 0.0000],
            [0.0000, 0.3327, 0.3331, 0.3084, 0.3331, 0.0000],
        ],
    )


def test_two_causal_heads_have_the_numbers_of_the_book():
    generator = TorchGenerator(123)
    heads = [linear_head(generator) for _ in range(2)]
    x_BTD = jnp.stack([journey()] * 2)

    over_a_batch = jax.vmap(causal_attention, in_axes=(0, None))
    context = jnp.concatenate([over_a_batch(x_BTD, head) for head in heads], -1)

    expected = [
        [-0.4519, 0.2216, 0.4772, 0.1063],
        [-0.5874, 0.0058, 0.5891, 0.3257],
        [-0.6300, -0.0632, 0.6202, 0.3860],
        [-0.5675, -0.0843, 0.5478, 0.3589],
        [-0.5526, -0.0981, 0.5321, 0.3428],
        [-0.5299, -0.1081, 0.5077, 0.3493],
    ]
    assert is_printed_as(context, [expected] * 2)


def test_multi_head_attention_has_the_numbers_of_the_book():
    generator = TorchGenerator(123)
    query, key, value = three_linears(generator)
    out = linear(generator, 2, 2)
    bias = generator.uniform(2, -1 / math.sqrt(2), 1 / math.sqrt(2))
    heads = split_heads(query, key, value, out, bias, 2)

    context_BTE = multi_head_attention(jnp.stack([journey()] * 2), heads)

    expected = [
        [0.3190, 0.4858],
        [0.2943, 0.3897],
        [0.2856, 0.3593],
        [0.2693, 0.3873],
        [0.2639, 0.3928],
        [0.2575, 0.4028],
    ]
    assert is_printed_as(context_BTE, [expected] * 2)


# What holds for any numbers


def test_multi_head_attention_is_that_of_gptjax():
    x_BTD, heads = random_rows(), random_heads()

    context_BTE = jax.jit(multi_head_attention)(x_BTD, heads)

    query_BTHK, key_BSHK, value_BSHK = (jnp.tensordot(x_BTD, kernel, 1) for kernel in heads[:3])
    mixed_BTHK = reference_attention(query_BTHK, key_BSHK, value_BSHK, AttentionMask())
    expected = jnp.tensordot(mixed_BTHK, heads.out_HKE, 2) + heads.bias_E[None, None]
    # float32 sums of numbers up to 30, in another order
    np.testing.assert_allclose(context_BTE, expected, atol=1e-4)


def test_many_heads_are_single_ones_whose_outputs_are_joined():
    x_BTD = random_rows()
    joint = jnp.eye(H * K).reshape(H, K, H * K)
    heads = random_heads()._replace(out_HKE=joint, bias_E=jnp.zeros(H * K))

    context_BTE = multi_head_attention(x_BTD, heads)

    singles = [HeadParams(*(kernel[:, h] for kernel in heads[:3])) for h in range(H)]
    over_a_batch = jax.vmap(causal_attention, in_axes=(0, None))
    expected = jnp.concatenate([over_a_batch(x_BTD, head) for head in singles], -1)
    np.testing.assert_allclose(context_BTE, expected, atol=2e-5)


def test_each_head_has_its_own_rows_of_the_linear_layers():
    query, key, value = three_linears(TorchGenerator(0), D, H * K)
    out, bias = linear(TorchGenerator(1), H * K, E), np.zeros(E, np.float32)

    heads = split_heads(query, key, value, out, bias, H)

    for h in range(H):
        rows = slice(h * K, (h + 1) * K)
        np.testing.assert_array_equal(heads.query_DHK[:, h], query[rows].T)
        np.testing.assert_array_equal(heads.key_DHK[:, h], key[rows].T)
        np.testing.assert_array_equal(heads.value_DHK[:, h], value[rows].T)
        np.testing.assert_array_equal(heads.out_HKE[h], out[:, rows].T)


def test_no_word_learns_from_later_ones():
    x_BTD, heads = random_rows(), random_heads()
    head = HeadParams(*(kernel[:, 0] for kernel in heads[:3]))

    def one(x_TD):
        return causal_attention(x_TD, head).sum(-1)

    def many(x_TD):
        return multi_head_attention(x_TD[None], heads)[0].sum(-1)

    for function in (one, many):
        slope = jnp.abs(jax.jacobian(function)(x_BTD[0])).sum(-1)
        np.testing.assert_array_equal(slope > 0, causal_mask(T))


def test_masking_scores_is_masking_weights_and_scaling_them():
    score_TS = jax.random.normal(jax.random.key(0), (T, T))

    weight_TS = causal_attention_weights(score_TS)

    np.testing.assert_allclose(weight_TS, mask_future(jax.nn.softmax(score_TS)), atol=1e-6)
    np.testing.assert_allclose(weight_TS.sum(1), 1, atol=1e-6)


def test_dropout_keeps_the_given_share_and_the_mean():
    keep = dropout_mask(jax.random.key(0), 0.2, (100, 100))

    weights = apply_dropout(jnp.ones((100, 100)), keep, 0.2)

    # Of 10,000 weights the share varies by 0.004 (one standard deviation).
    assert keep.mean() == pytest.approx(0.8, abs=0.02)
    assert weights.mean() == pytest.approx(1, abs=0.025)
    np.testing.assert_array_equal(weights > 0, keep)


def test_attention_drops_the_weights_that_are_not_kept():
    x_BTD, heads = random_rows(), random_heads()
    head = HeadParams(*(kernel[:, 0] for kernel in heads[:3]))
    keep_BHTS = dropout_mask(jax.random.key(2), 0.5, (B, H, T, T))
    everything = jnp.ones((B, H, T, T), bool)

    whole_TK = causal_attention(x_BTD[0], head)
    whole_BTE = multi_head_attention(x_BTD, heads)

    np.testing.assert_allclose(
        causal_attention(x_BTD[0], head, everything[0, 0], 0.5), 2 * whole_TK, atol=1e-5
    )
    np.testing.assert_allclose(
        multi_head_attention(x_BTD, heads, everything, 0.0), whole_BTE, atol=1e-5
    )
    nothing_BTE = multi_head_attention(x_BTD, heads, ~everything, 0.5)
    np.testing.assert_array_equal(nothing_BTE[0, 0], heads.bias_E)

    query_BTHK, key_BSHK, value_BSHK = (jnp.tensordot(x_BTD, kernel, 1) for kernel in heads[:3])
    mixed_BTHK = reference_attention(
        *(query_BTHK, key_BSHK, value_BSHK, AttentionMask()),
        lambda weight_BHTS: 2 * weight_BHTS * keep_BHTS,
    )
    expected = jnp.tensordot(mixed_BTHK, heads.out_HKE, 2) + heads.bias_E[None, None]
    context_BTE = multi_head_attention(x_BTD, heads, keep_BHTS, 0.5)
    np.testing.assert_allclose(context_BTE, expected, atol=1e-4)  # as above


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan")])
def test_a_dropout_rate_that_leaves_nothing_is_refused(rate):
    with pytest.raises(ConfigError, match=f"dropout rate={rate} must be at least"):
        dropout_mask(jax.random.key(0), rate, (2,))


@pytest.mark.parametrize("count", [0, 4])
def test_a_width_that_does_not_split_is_refused(count):
    x = np.ones((6, 3), np.float32)

    with pytest.raises(ConfigError, match=f"width 6 must be divisible by .* {count}"):
        split_heads(x, x, x, np.ones((6, 6), np.float32), np.ones(6, np.float32), count)


# PyTorch


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")  # its own, of coming versions
def test_multi_head_attention_is_that_of_pytorch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    projections = [torch.nn.Linear(D, H * K, bias=False) for _ in range(3)]
    out = torch.nn.Linear(H * K, E)
    x_BTD = random_rows()
    with torch.no_grad():
        x = torch.tensor(np.asarray(x_BTD))
        split = [p(x).view(B, T, H, K).transpose(1, 2) for p in projections]
        attend = torch.nn.functional.scaled_dot_product_attention
        mixed = attend(*split, is_causal=True)
        expected = out(mixed.transpose(1, 2).reshape(B, T, H * K)).numpy()
    weights = [p.weight.detach().numpy() for p in (*projections, out)]

    heads = split_heads(*weights, out.bias.detach().numpy(), H)

    np.testing.assert_allclose(multi_head_attention(x_BTD, heads), expected, atol=1e-6)
