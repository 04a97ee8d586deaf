"""PyTorch's random numbers: its digits, its order, and the arithmetic behind them."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptjax.book
from gptjax.book import TorchGenerator, torch_random
from gptjax.book.torch_random import (
    BOX_MULLER_BLOCK,
    box_muller,
    cos_sin,
    exact_fma,
    log_float32,
    torch_randperm,
)
from gptjax.errors import ConfigError
from tests.torch_peer import import_exact_torch

EVERY = 1 << 24  # uniform numbers that there are
FLOATS = st.floats(-4, 4, width=32).filter(lambda x: abs(x) > 2**-60 or x == 0)


def digest(array):
    """The first digits of the hash of its numbers."""
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def assert_same_bits(one, other):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)
    assert one.tobytes() == other.tobytes()


def test_an_embedding_starts_with_the_digits_of_the_books_second_chapter():
    table = TorchGenerator(123).normal((6, 3))  # nn.Embedding(6, 3), 18 numbers

    np.testing.assert_array_equal(
        table.round(4),
        np.float32(
            [
                [0.3374, -0.1778, -0.1690],
                [0.9178, 1.5810, 1.3010],
                [1.2753, -0.2010, -0.1606],
                [-0.4015, 0.9666, -1.1481],
                [-1.1589, 0.3255, -0.6315],
                [-2.8400, -0.7849, -1.4096],
            ]
        ),
    )


def test_a_sequence_of_calls_gives_what_it_gives_in_pytorch():
    generator = TorchGenerator(123)  # the digits: PyTorch 2.13, AVX512

    assert generator.uniform(2).tolist() == [0.29611194133758545, 0.516562283039093]
    assert generator.uniform((2, 1)).tolist() == [[0.2516707181930542], [0.6885567903518677]]
    assert generator.permutation(8).tolist() == [4, 0, 2, 5, 7, 6, 1, 3]
    last = generator.uniform(3, -0.5, 0.25).tolist()
    assert last == [0.015330001711845398, -0.44327351450920105, -0.3525213599205017]


def test_long_arrays_are_pytorchs_to_the_last_bit():
    generator = TorchGenerator(2**63 + 7)  # the digits: PyTorch 2.13, AVX512

    assert digest(generator.normal(100_003)) == "5eb5e92227a3e308"
    assert digest(generator.uniform(100_003, -0.1, 0.3)) == "53f1486708be7a60"
    assert digest(generator.permutation(1000)) == "e8cc9ae1a48e9ff9"
    assert digest(generator.normal((4, 4))) == "54f44591d189d787"


@settings(max_examples=20)
@given(st.lists(st.integers(0, 40_000), max_size=4), st.integers(-9, 9))
def test_uniform_numbers_drawn_in_parts_are_those_drawn_at_once(parts, seed):
    generator = TorchGenerator(seed)

    drawn = [generator.uniform(n, -1, 1) for n in parts]

    whole = TorchGenerator(seed).uniform(sum(parts), -1, 1)
    assert_same_bits(np.concatenate([np.empty(0, np.float32), *drawn]), whole)


@given(st.integers(BOX_MULLER_BLOCK, 200), st.integers(-(2**63), 2**64 - 1))
def test_normal_numbers_are_box_mullers_of_the_uniform_ones(count, seed):
    uniform = TorchGenerator(seed).uniform(count).astype(np.float64)

    normal = TorchGenerator(seed).normal(count)

    for start in range(
        0, count - 2 * BOX_MULLER_BLOCK + 1, BOX_MULLER_BLOCK
    ):  # the last may be drawn anew
        first, second = uniform[start : start + BOX_MULLER_BLOCK].reshape(2, -1)
        radius, angle = np.sqrt(-2 * np.log(1 - first)), 2 * np.pi * second
        expected = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        # Seven digits of float32, of numbers below 5.8.
        np.testing.assert_allclose(normal[start : start + BOX_MULLER_BLOCK], expected, atol=3e-6)


def test_a_last_block_that_is_not_full_is_drawn_anew():
    generator = TorchGenerator(5)

    cut = generator.normal(BOX_MULLER_BLOCK + 3)

    other = TorchGenerator(5)
    other.next_uint32(BOX_MULLER_BLOCK + 3)
    assert_same_bits(cut[3:], other.normal(BOX_MULLER_BLOCK))
    assert_same_bits(cut[:3], TorchGenerator(5).normal(BOX_MULLER_BLOCK)[:3])
    assert_same_bits(generator.uniform(4), other.uniform(4))


@given(st.integers(0, 300), st.integers(0, 2**63 - 1))
def test_a_permutation_is_that_of_a_sampler_with_the_same_seed(n, seed):
    order = TorchGenerator(seed).permutation(n)

    assert order.tolist() == torch_randperm(seed, n)
    assert sorted(order) == list(range(n))


@pytest.mark.parametrize(("low", "high"), [(5, 5.000001), (0.1, 0.1000002), (-0.25, 0.25), (3, 3)])
def test_the_upper_end_of_a_range_is_never_drawn(low, high):
    drawn = TorchGenerator(0).uniform(10_000, low, high)

    assert drawn.min() >= np.float32(low)
    assert low == high or drawn.max() < np.float32(high)


def assert_nearest(got, exact):
    """No float32 is nearer to the exact number."""
    for side in (-np.inf, np.inf):
        beside = np.nextafter(got, np.float32(side))
        assert abs(Fraction(float(got)) - exact) <= abs(Fraction(float(beside)) - exact)


@given(FLOATS, FLOATS, FLOATS)
def test_a_fused_sum_is_the_float_nearest_to_the_exact_one(x, y, z):
    (got,) = exact_fma(np.array([x], np.float32), np.float32(y), np.float32(z))

    assert_nearest(got, Fraction(x) * Fraction(y) + Fraction(z))


def test_a_uniform_number_is_too_where_its_range_begins_next_to_nothing():
    drawn = TorchGenerator(0).uniform(100, 2.0**-60, 1.5)

    for one, got in zip(TorchGenerator(0).uniform(100), drawn, strict=True):
        assert_nearest(got, Fraction(float(one)) * Fraction(3, 2) + Fraction(1, 2**60))


def test_a_radius_of_nothing_leaves_no_minus_sign():
    assert_same_bits(box_muller(np.zeros(BOX_MULLER_BLOCK, np.float32)), np.zeros(16, np.float32))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("x", "y", "z", "nearest"),
    [  # x * y is half of z's last bit and a 2**33rd more, or a 2**46th less
        (1 + 2**-11, 1 - 2**-11 + 2**-22, 1, 1 + 2**-23),
        (1 + 2**-23, 1 - 2**-23, 1 + 2**-23, 1 + 2**-23),
    ],
)
def test_what_float64_loses_of_a_sum_decides_between_two_floats(x, y, z, nearest, sign):
    arguments = np.float32([sign * x * 2**-24]), np.float32(y), np.float32(sign * z)

    assert exact_fma(*arguments) == sign * nearest
    assert torch_random.fma(*arguments) != sign * nearest


def curves(numbers):
    """All that a normal number is made of, for these uniform ones."""
    fraction = numbers.astype(np.float32) * np.float32(2**-24)
    angle = np.float32(2 * np.pi) * fraction
    return np.stack([log_float32(1 - fraction), *cos_sin(angle)])


def assert_one_rounding(monkeypatch, numbers):
    once = curves(numbers)
    with monkeypatch.context() as patched:
        patched.setattr(torch_random, "fma", exact_fma)
        assert_same_bits(once, curves(numbers))


def test_logarithm_and_circle_are_as_if_each_sum_were_rounded_once(monkeypatch):
    assert_one_rounding(monkeypatch, np.arange(0, EVERY, 257))


@pytest.mark.slow
def test_so_they_are_for_every_uniform_number(monkeypatch):
    for start in range(0, EVERY, 1 << 20):
        assert_one_rounding(monkeypatch, np.arange(start, start + (1 << 20)))


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda g: g.normal(15), r"normal\(15\) has 15 numbers, but at least 16"),
        (lambda g: g.normal((3, 5)), r"normal\(\(3, 5\)\) has 15 numbers"),
        (lambda g: g.normal((0, 16)), "has 0 numbers"),
        (lambda g: g.normal((-4, -4)), r"the shape \(-4, -4\) must not"),
        (lambda g: g.uniform(-1), r"the shape \(-1,\) must not .* a negative size"),
        (lambda g: g.uniform(3, 1, 0), r"uniform\(1, 0\) is not a float32 range"),
        (lambda g: g.uniform(3, 0, float("nan")), r"uniform\(0, nan\) is not a"),
        (lambda g: g.uniform(3, -3e38, 3e38), r"at most 3.4e\+38 apart"),
        (lambda g: g.permutation(-1), r"permutation\(-1\) is not supported"),
        (lambda g: g.permutation(10**9), "Use a length from 0 to 214748363"),
        (lambda g: TorchGenerator(2**64), f"seed={2**64} must fit into 64 bits"),
        (lambda g: TorchGenerator(-(2**63) - 1), "must fit into 64 bits"),
    ],
)
def test_what_is_not_covered_says_so_and_draws_nothing(draw, message):
    generator = TorchGenerator(1)

    with pytest.raises(ConfigError, match=message):
        draw(generator)

    assert_same_bits(generator.next_uint32(3), TorchGenerator(1).next_uint32(3))


@pytest.mark.parametrize("name", gptjax.book.__all__)
def test_every_public_name_of_the_book_is_there(name):
    assert name in dir(gptjax.book)
    assert getattr(gptjax.book, name) is not None


def test_other_names_of_the_book_are_attribute_errors():
    with pytest.raises(AttributeError, match=r"'gptjax.book' has no attribute 'TG'"):
        _ = gptjax.book.TG


@pytest.fixture(scope="module")
def torch():
    return import_exact_torch()


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", [0, 1, 123, 2**32 + 5, 2**63 - 1, 2**64 - 1, -7])
def test_any_sequence_of_calls_is_pytorchs(torch, seed):
    choices = np.random.default_rng(abs(seed))
    generator = TorchGenerator(seed)
    torch.manual_seed(seed)

    for _ in range(60):
        n = int(choices.integers(0, 5000))
        low, width = float(choices.normal()), float(choices.exponential())
        low = 2.0**-60 if n % 5 == 0 else low
        match choices.integers(0, 4):
            case 0:
                ours = generator.uniform((n, 2), low, low + width)
                theirs = torch.empty(n, 2).uniform_(low, low + width)
            case 1:
                ours = generator.normal((2, n + 8))
                theirs = torch.empty(2, n + 8).normal_()
            case 2:
                ours, theirs = generator.permutation(n), torch.randperm(n)
            case _:
                ours, theirs = generator.uniform(n), torch.rand(n)
        assert_same_bits(ours, theirs.numpy())


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_a_thousand_permutations_are_pytorchs(torch):
    generator = TorchGenerator(42)
    torch.manual_seed(42)

    for n in range(1000):
        assert_same_bits(generator.permutation(n), torch.randperm(n).numpy())


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_millions_of_normal_numbers_are_pytorchs(torch):
    torch.manual_seed(9)
    theirs = torch.empty(5_000_003).normal_().numpy()

    assert_same_bits(TorchGenerator(9).normal(5_000_003), theirs)
