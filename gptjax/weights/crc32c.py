"""CRC-32C, the checksum of TensorFlow's files, at the speed of NumPy's XOR.

A CRC is the remainder of the data, taken as a polynomial over GF(2), after division
by a fixed polynomial. Any multiple of the divisor may be taken away first, and this
one has six terms, all of whole bytes (`MULTIPLE` are its exponents over 8):

    x^(8 * 290) + x^(8 * 136) + x^(8 * 113) + x^(8 * 107) + x^(8 * 32) + 1

So a byte that lies 290 places in front of another may be deleted once it has been
XORed into that one and into four between them. Over GF(2) the square of a sum is the
sum of the squares, so that the same holds with all distances doubled, any number of
times: long data is folded in long slices, and only its last bytes take the table.
"""

import numpy as np
from jaxtyping import UInt8

DIVISOR = 0x82F63B78  # Castagnoli's, RFC 3720 sec. 12.1; lowest bit, highest power
# The first with all but the highest within its lower half; found by trying all.
MULTIPLE = (290, 136, 113, 107, 32, 0)
ONES = 0xFFFFFFFF
BLOCK = 1 << 20  # bytes that are copied and folded at a time; fits in a cache


def remainder(byte: int) -> int:
    """What the register becomes when this byte leaves it."""
    for _ in range(8):
        byte = byte >> 1 ^ DIVISOR * (byte & 1)
    return byte


TABLE = [remainder(byte) for byte in range(256)]


def crc32c(data: bytes | UInt8[np.ndarray, " _"], crc: int = 0) -> int:
    """The CRC-32C of `data`, or of what had `crc` with `data` behind it.

    >>> hex(crc32c(b"56789", crc32c(b"1234")))
    '0xe3069283'
    """
    register = crc ^ ONES
    whole = np.frombuffer(data, np.uint8)
    for start in range(0, len(whole), BLOCK):
        rest = whole[start : start + BLOCK]
        if len(rest) > MULTIPLE[0]:
            rest = rest.copy()
            rest[:4] ^= np.frombuffer(register.to_bytes(4, "little"), np.uint8)
            rest, register = folded(rest), 0
        for byte in rest.tolist():
            register = TABLE[(register ^ byte) & 0xFF] ^ register >> 8
    return register ^ ONES


def folded(rest: UInt8[np.ndarray, " _"]) -> UInt8[np.ndarray, " _"]:
    """The last bytes of `rest`, in place, with the remainder that all of it had."""
    highest, *places = MULTIPLE
    scale = 1 << len(rest).bit_length()
    while len(rest) > highest:
        while scale * highest >= len(rest):
            scale //= 2
        # No more than can be deleted before one of them is XORed into.
        count = min(len(rest) - scale * highest, scale * (highest - places[0]))
        for place in places:
            start = scale * (highest - place)
            rest[start : start + count] ^= rest[:count]
        rest = rest[count:]
    return rest
