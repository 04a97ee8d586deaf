"""PyTorch's random numbers, bit for bit."""

import hashlib

import numpy as np
import pytest

from gptjax.book import TorchGenerator
from tests.torch_peer import import_exact_torch

SEEDS = [0, 1, 123, 2**32 + 5, 2**63 - 1, 2**64 - 1, -7]


def short_hash(array):
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def assert_same_bits(one, other):
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert one.tobytes() == other.tobytes()


def test_draws_are_those_of_pytorch():
    generator = TorchGenerator(123)  # the digits: PyTorch 2.13, AVX512
    assert generator.uniform(2).tolist() == [0.29611194133758545, 0.516562283039093]

    generator = TorchGenerator(2**63 + 7)
    assert short_hash(generator.normal(100_003)) == "5eb5e92227a3e308"
    assert short_hash(generator.uniform(100_003, -0.1, 0.3)) == "53f1486708be7a60"
    assert short_hash(generator.permutation(1000)) == "e8cc9ae1a48e9ff9"
    assert short_hash(generator.normal((4, 4))) == "54f44591d189d787"


def test_the_end_of_a_range_is_excluded():
    for low, high in [(5, 5.000001), (-0.25, 0.25), (3, 3)]:
        drawn = TorchGenerator(0).uniform(10_000, low, high)
        assert drawn.min() >= np.float32(low)
        assert low == high or drawn.max() < np.float32(high)


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
