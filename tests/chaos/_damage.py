"""Random changes to the bytes of a file."""

import random
from collections.abc import Sequence


def flip_bit(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def damage_bytes(rng: random.Random, data: bytes, words: Sequence[bytes] = (b"\0",)) -> bytes:
    """Data with one to three changes, most of them near the start, where headers are.

    `words` are values with a meaning in the format, which are inserted.
    """
    new = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(new) if rng.random() < 0.5 else min(600, len(new)))
        size, other = rng.choice((2, 64)), rng.randint(0, len(new))
        one, two = new[at : at + size], new[other : other + size]
        match rng.randrange(8):
            case 0 if at < len(new):
                new[at] ^= 1 << rng.randrange(8)
            case 1:
                new[at : at + 8] = bytes(len(new[at : at + 8]))
            case 2:
                del new[at:]
            case 3:
                del new[at : at + rng.randint(1, 20)]
            case 4:
                new[at:at] = rng.randbytes(rng.randint(1, 9))
            case 5 if len(one) == len(two) and abs(at - other) >= size:
                new[at : at + size], new[other : other + size] = two, one
            case 6 | 7:
                new[at : at + rng.choice((0, 0, 1, 4))] = rng.choice(words)
    return bytes(new)
