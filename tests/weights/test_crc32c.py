"""The fast CRC-32C is the CRC-32C."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.weights.tf_checkpoint import FOLD_BLOCK_BYTES, MULTIPLE, crc32c
from tests.tensor_bundle import bytewise


@pytest.mark.fast
@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        # RFC 3720, B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_the_checksum_has_its_published_values(data, crc):
    assert crc32c(data) == bytewise(data) == crc


def test_the_divisor_divides_the_multiple():
    terms = bytes(place in MULTIPLE for place in range(MULTIPLE[0], -1, -1))

    assert sum(terms) == 6
    assert bytewise(terms, 0xFFFFFFFF) == 0xFFFFFFFF


@settings(derandomize=True, max_examples=60)
@given(st.integers(0, 20_000), st.integers(0, 2**32), st.data())
def test_the_checksum_is_that_of_the_bytewise_table(size, seed, data):
    content = np.random.default_rng(seed).bytes(size)
    split = data.draw(st.integers(0, size))
    array = np.frombuffer(content, np.uint8)

    expected = bytewise(content)

    assert crc32c(content) == crc32c(array) == expected
    assert crc32c(content[split:], crc32c(content[:split])) == expected


def test_the_checksum_is_right_at_each_small_size_and_leaves_the_data_alone():
    content = np.random.default_rng(1).bytes(3 * MULTIPLE[0])
    array = np.frombuffer(content, np.uint8).copy()

    crc = 0
    for size in range(len(content) + 1):
        assert crc32c(array[:size]) == crc
        crc = bytewise(content[size : size + 1], crc)
    assert array.tobytes() == content


@pytest.mark.parametrize("more", [3, 777])
def test_the_checksum_goes_on_from_block_to_block(more):
    content = np.random.default_rng(2).bytes(FOLD_BLOCK_BYTES + more)

    assert crc32c(content) == bytewise(content)
