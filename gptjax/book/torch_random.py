"""The random numbers of PyTorch on a CPU, bit for bit, without PyTorch.

`torch.manual_seed(seed)` starts a Mersenne Twister, whose 32-bit numbers `uniform_`,
`normal_` and `randperm` take in order. Two things are not in their formulas:

- A product and the sum after it are rounded once, as one instruction of AVX2 does it.
  Float64 holds the product of two float32 exactly.
- log, cos and sin are those of Moshier's Cephes, as PyTorch has them for AVX2. Each
  depends on one uniform number, of which there are 2**24; for every one of them,
  float64 sums rounded to float32 give what rounding once gives.

Checked against PyTorch 2.13 with AVX2 and with AVX512, where it takes the same path.
Without them (ATEN_CPU_CAPABILITY=default) its own numbers are others: normal ones by up
to 2.4e-6, those of uniform(-0.036, 0.036) by up to 4e-9; permutations are the same.
Not here, for they take other paths: its dropout, its multinomial, and its normal
tensors of fewer than 16 numbers.
"""

import math

import numpy as np
from jaxtyping import Float32, Int64, UInt32

from gptjax.data.torch_order import shuffled
from gptjax.errors import ConfigError

Shape = int | tuple[int, ...]
F32 = np.float32
Factor = np.ndarray | F32
CHUNK = 1 << 15  # numbers at a time, so that intermediate ones stay in the cache
BLOCK = 16  # numbers that Box and Muller's transform makes together
LONGEST = (2**32 - 1) // 20  # where randperm takes to 64-bit numbers
# S. L. Moshier, Cephes: single-precision logf, sinf, cosf.
LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1),
    *(1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1),
    3.3333331174e-1,
)
LN2 = (-2.12194440e-4, 0.693359375)  # small and large part
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
QUARTER_PI = (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)


class TorchGenerator:
    """PyTorch's default generator after `torch.manual_seed(seed)`.

    It is the one object here with a memory: every call goes on where the last ended.

    >>> TorchGenerator(123).permutation(5)
    array([2, 0, 1, 3, 4])
    """

    def __init__(self, seed: int) -> None:
        if not -(2**63) <= seed < 2**64:
            raise ConfigError(
                f"seed={seed} does not fit into 64 bits. Choose a smaller one."
            )
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)

    def numbers(self, count: int) -> UInt32[np.ndarray, " n"]:
        """The next 32-bit numbers, as they come."""
        return self._twister.randint(0, 1 << 32, count, np.uint32)

    def uniform(
        self, shape: Shape, low: int | float = 0.0, high: int | float = 1.0
    ) -> Float32[np.ndarray, "..."]:
        """`torch.empty(shape).uniform_(low, high)`.

        Raises:
            ConfigError: a negative size, or a range that is none in float32.
        """
        most = float(np.finfo(F32).max)
        if not (-most <= low <= high <= most and high - low <= most):
            raise ConfigError(
                f"uniform({low}, {high}) is no range in float32. Give low, then high, "
                f"with less than {most:.2g} between them."
            )
        array = np.empty(sizes(shape), F32)
        start, end = F32(low), F32(high)
        flat = array.reshape(-1)
        for place in chunks(flat):
            fraction = (self.numbers(place.size) & 0xFFFFFF) * F32(2**-24)
            place[...] = rounded_once(fraction, end - start, start)
            place[place == end] = start  # the end is not in the range
        return array

    def normal(self, shape: Shape) -> Float32[np.ndarray, "..."]:
        """`torch.empty(shape).normal_()`, for 16 numbers or more.

        Raises:
            ConfigError: fewer numbers, or a negative size.
        """
        if (count := math.prod(sizes(shape))) < BLOCK:
            raise ConfigError(
                f"normal({shape}) has {count} numbers, but for fewer than {BLOCK} "
                "PyTorch takes another path, which is not here. Draw a larger array."
            )
        array = self.uniform(shape)
        flat = array.reshape(-1)
        for place in chunks(flat[: count - count % BLOCK]):
            place[...] = box_muller(place)
        if count % BLOCK:  # PyTorch draws the last ones anew
            flat[-BLOCK:] = box_muller(self.uniform(BLOCK))
        return array

    def permutation(self, n: int) -> Int64[np.ndarray, " n"]:
        """`torch.randperm(n)`.

        Raises:
            ConfigError: a negative length, or one that takes 64-bit numbers.
        """
        if not 0 <= n < LONGEST:
            raise ConfigError(
                f"permutation({n}) is not covered. Choose a length from 0 to "
                f"{LONGEST - 1}."
            )
        drawn = self.numbers(max(n - 1, 0)).tolist()
        return np.array(shuffled(n, drawn), np.int64)


def sizes(shape: Shape) -> tuple[int, ...]:
    """The shape as a tuple, without negative sizes."""
    shape = (shape,) if isinstance(shape, int) else shape
    if min(shape, default=0) < 0:
        raise ConfigError(f"the shape {shape} has a negative size. Choose 0 or more.")
    return shape


def chunks(flat: np.ndarray) -> list[np.ndarray]:
    """Views of CHUNK numbers each, and of the rest."""
    return [flat[start : start + CHUNK] for start in range(0, flat.size, CHUNK)]


def fused(x: np.ndarray, y: Factor, z: Factor) -> np.ndarray:
    """The float32 nearest to x * y + z, taken in float64."""
    return np.add(np.multiply(x, y, dtype=np.float64), z).astype(F32)


def rounded_once(x: np.ndarray, y: Factor, z: Factor) -> np.ndarray:
    """The float32 nearest to x * y + z, all of it.

    The sum in float64 is rounded too. That matters where it then lies midway between
    two float32: there the part that was lost decides.
    """
    product = np.multiply(x, y, dtype=np.float64)
    total = product + z
    midway = (total.view(np.int64) & (2**29 - 1)) == 2**28
    if midway.any():
        product, near = product[midway], total[midway]
        back = near - product
        rest = np.broadcast_to(z, midway.shape)[midway] - back
        lost = (product - (near - back)) + rest  # Knuth's TwoSum
        toward = np.copysign(np.inf, lost)
        total[midway] = np.where(lost, np.nextafter(near, toward), near)
    return total.astype(F32)


def horner(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    """The polynomial at x, its highest coefficient first."""
    first, *rest = map(F32, coefficients)
    y = np.full_like(x, first)
    for coefficient in rest:
        y = fused(y, x, coefficient)
    return y


def box_muller(uniform: np.ndarray) -> np.ndarray:
    """Normal numbers from uniform ones, 8 radii and 8 angles a block."""
    blocks = uniform.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(F32(-2) * log(1 - blocks[:, 0]))
    cosine, sine = cosine_and_sine(F32(2 * math.pi) * blocks[:, 1])
    both = np.stack([radius * cosine, radius * sine], axis=1)
    return both.reshape(-1) + F32(0)  # no -0.0


def log(x: np.ndarray) -> np.ndarray:
    """The logarithm of positive numbers."""
    fraction, exponent = np.frexp(x)
    small = fraction < F32(math.sqrt(0.5))
    exponent = (exponent - small).astype(F32)
    x = np.where(small, fraction + fraction, fraction) - 1
    square = x * x
    y = fused(horner(x, LOG) * x, square, exponent * F32(LN2[0]))
    y = fused(square, F32(-0.5), y)
    return fused(exponent, F32(LN2[1]), x + y)


def cosine_and_sine(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of angles in [0, 2 pi], by the octant."""
    octant = ((x * F32(4 / math.pi)).astype(np.int32) + 1) & ~1
    for part in QUARTER_PI:
        x = fused(octant.astype(F32), F32(part), x)
    square = x * x
    even = fused(horner(square, COS) * square, square, F32(-0.5) * square) + 1
    odd = fused(horner(square, SIN) * square, x, x)
    along = (octant & 2) == 0
    cosine, sine = np.where(along, even, odd), np.where(along, odd, even)
    return (
        np.where((octant - 2) & 4, cosine, -cosine),
        np.where(octant & 4, -sine, sine),
    )
