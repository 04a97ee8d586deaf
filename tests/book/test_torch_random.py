"""PyTorch's random numbers, bit for bit, and the arithmetic behind them."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.book import TorchGenerator, torch_random
from gptjax.book.torch_random import BOX_MULLER_BLOCK, box_muller, cos_sin, exact_fma, log_float32
from gptjax.errors import ConfigError
from tests.torch_peer import import_exact_torch

FLOATS = st.floats(-4, 4, width=32).filter(lambda x: abs(x) > 2**-60 or x == 0)
SEEDS = [0, 1, 123, 2**32 + 5, 2**63 - 1, 2**64 - 1, -7]


def short_hash(array):
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def assert_same_bits(one, other):
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert one.tobytes() == other.tobytes()


def test_draws_are_those_of_pytorch():
    generator = TorchGenerator(123)  # the digits: PyTorch 2.13, AVX512
    assert generator.uniform(2).tolist() == [0.29611194133758545, 0.516562283039093]
    assert generator.uniform((2, 1)).tolist() == [[0.2516707181930542], [0.6885567903518677]]
    assert generator.permutation(8).tolist() == [4, 0, 2, 5, 7, 6, 1, 3]
    last = generator.uniform(3, -0.5, 0.25).tolist()
    assert last == [0.015330001711845398, -0.44327351450920105, -0.3525213599205017]

    generator = TorchGenerator(2**63 + 7)
    assert short_hash(generator.normal(100_003)) == "5eb5e92227a3e308"
    assert short_hash(generator.uniform(100_003, -0.1, 0.3)) == "53f1486708be7a60"
    assert short_hash(generator.permutation(1000)) == "e8cc9ae1a48e9ff9"
    assert short_hash(generator.normal((4, 4))) == "54f44591d189d787"


def test_an_incomplete_last_block_is_redrawn():
    generator, other = TorchGenerator(5), TorchGenerator(5)

    normal = generator.normal(BOX_MULLER_BLOCK + 3)

    other.next_uint32(BOX_MULLER_BLOCK + 3)
    assert_same_bits(normal[3:], other.normal(BOX_MULLER_BLOCK))
    assert_same_bits(generator.uniform(4), other.uniform(4))
    # No minus sign for a radius of 0.
    assert_same_bits(box_muller(np.zeros(BOX_MULLER_BLOCK, np.float32)), np.zeros(16, np.float32))


def test_the_end_of_a_range_is_excluded():
    for low, high in [(5, 5.000001), (-0.25, 0.25), (3, 3)]:
        drawn = TorchGenerator(0).uniform(10_000, low, high)
        assert drawn.min() >= np.float32(low)
        assert low == high or drawn.max() < np.float32(high)


@given(FLOATS, FLOATS, FLOATS)
def test_a_fused_multiply_add_is_rounded_once(x, y, z):
    (result,) = exact_fma(np.array([x], np.float32), np.float32(y), np.float32(z))

    exact = Fraction(x) * Fraction(y) + Fraction(z)
    for side in (-np.inf, np.inf):
        neighbor = np.nextafter(result, np.float32(side))
        assert abs(Fraction(float(result)) - exact) <= abs(Fraction(float(neighbor)) - exact)


def test_what_float64_loses_decides_between_two_floats():
    for sign in (1, -1):
        for x, y, z, nearest in [
            # x * y is half of z's last bit and a 2**33rd more, or a 2**46th less
            (1 + 2**-11, 1 - 2**-11 + 2**-22, 1, 1 + 2**-23),
            (1 + 2**-23, 1 - 2**-23, 1 + 2**-23, 1 + 2**-23),
        ]:
            arguments = np.float32([sign * x * 2**-24]), np.float32(y), np.float32(sign * z)
            assert exact_fma(*arguments) == sign * nearest
            assert torch_random.fma(*arguments) != sign * nearest


@pytest.mark.parametrize("stride", [257, pytest.param(1, marks=pytest.mark.slow, id="all of them")])
def test_logarithm_and_circle_are_as_if_rounded_once(monkeypatch, stride):
    def curves(numbers):
        fraction = numbers.astype(np.float32) * np.float32(2**-24)
        angle = np.float32(2 * np.pi) * fraction
        return np.stack([log_float32(1 - fraction), *cos_sin(angle)])

    for start in range(0, 1 << 24, stride << 20):
        numbers = np.arange(start, min(start + (stride << 20), 1 << 24), stride)
        once = curves(numbers)
        with monkeypatch.context() as patched:
            patched.setattr(torch_random, "fma", exact_fma)
            assert_same_bits(once, curves(numbers))


def test_invalid_calls_are_rejected_and_draw_nothing():
    for message, draw in [
        (r"normal\(15\)", lambda g: g.normal(15)),
        (r"shape \(-4, -4\)", lambda g: g.normal((-4, -4))),
        (r"shape \(-1,\)", lambda g: g.uniform(-1)),
        (r"uniform\(1, 0\)", lambda g: g.uniform(3, 1, 0)),
        (r"uniform\(0, nan\)", lambda g: g.uniform(3, 0, float("nan"))),
        (r"3.4e\+38", lambda g: g.uniform(3, -3e38, 3e38)),
        (r"permutation\(-1\)", lambda g: g.permutation(-1)),
        ("214748363", lambda g: g.permutation(10**9)),
        (f"seed={2**64}", lambda g: TorchGenerator(2**64)),
    ]:
        generator = TorchGenerator(1)
        with pytest.raises(ConfigError, match=message):
            draw(generator)
        assert_same_bits(generator.next_uint32(3), TorchGenerator(1).next_uint32(3))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS)
def test_any_sequence_of_calls_is_that_of_pytorch(seed):
    torch = import_exact_torch()
    choices, generator = np.random.default_rng(abs(seed)), TorchGenerator(seed)
    torch.manual_seed(seed)
    for _ in range(30):
        n = int(choices.integers(0, 5000))
        low, width = float(choices.normal()), float(choices.exponential())
        low = 2.0**-60 if n % 5 == 0 else low
        theirs = torch.empty(n, 2).uniform_(low, low + width)
        assert_same_bits(generator.uniform((n, 2), low, low + width), theirs.numpy())
        assert_same_bits(generator.normal((2, n + 8)), torch.empty(2, n + 8).normal_().numpy())
        assert_same_bits(generator.permutation(n), torch.randperm(n).numpy())
