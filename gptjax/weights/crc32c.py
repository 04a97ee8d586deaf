"""CRC-32C, the checksum of TensorFlow's files, vectorized with NumPy.

A CRC is the remainder of the data, as a polynomial over GF(2), modulo a fixed
polynomial. Adding a multiple of the divisor does not change it. This multiple has six
terms, all aligned to bytes (`MULTIPLE` lists the exponents divided by 8):

    x^(8 * 290) + x^(8 * 136) + x^(8 * 113) + x^(8 * 107) + x^(8 * 32) + 1

Hence a byte 290 positions ahead of another can be removed after XORing it into that
one and four bytes in between. Over GF(2) the square of a sum is the sum of the squares,
so the same holds with all distances multiplied by any power of two: long data is folded
in long slices, and only its last bytes are processed with the table.
"""

import numpy as np
from jaxtyping import UInt8

DIVISOR = 0x82F63B78  # Castagnoli, RFC 3720 sec. 12.1; the low bit is the highest power
# The first one with all other exponents in the lower half; found by search.
MULTIPLE = (290, 136, 113, 107, 32, 0)
ONES = 0xFFFFFFFF
FOLD_BLOCK_BYTES = 1 << 20  # bytes copied and folded at a time; fits in the CPU cache


def remainder(byte: int) -> int:
    """Returns the CRC table entry of a byte."""
    for _ in range(8):
        byte = byte >> 1 ^ DIVISOR * (byte & 1)
    return byte


CRC_TABLE = [remainder(byte) for byte in range(256)]


def crc32c(data: bytes | UInt8[np.ndarray, " _"], crc: int = 0) -> int:
    """Returns the CRC-32C of `data`, or continues from the `crc` of preceding data.

    >>> hex(crc32c(b"56789", crc32c(b"1234")))
    '0xe3069283'
    """
    register = crc ^ ONES
    whole = np.frombuffer(data, np.uint8)
    for start in range(0, len(whole), FOLD_BLOCK_BYTES):
        rest = whole[start : start + FOLD_BLOCK_BYTES]
        if len(rest) > MULTIPLE[0]:
            rest = rest.copy()
            rest[:4] ^= np.frombuffer(register.to_bytes(4, "little"), np.uint8)
            rest, register = folded(rest), 0
        for byte in rest.tolist():
            register = CRC_TABLE[(register ^ byte) & 0xFF] ^ register >> 8
    return register ^ ONES


def folded(rest: UInt8[np.ndarray, " _"]) -> UInt8[np.ndarray, " _"]:
    """Folds `rest` in place into its last bytes, which have the same remainder."""
    highest, *places = MULTIPLE
    scale = 1 << len(rest).bit_length()
    while len(rest) > highest:
        while scale * highest >= len(rest):
            scale //= 2
        # Only bytes that are not the target of an XOR in this step can be removed.
        count = min(len(rest) - scale * highest, scale * (highest - places[0]))
        for place in places:
            start = scale * (highest - place)
            rest[start : start + count] ^= rest[:count]
        rest = rest[count:]
    return rest
