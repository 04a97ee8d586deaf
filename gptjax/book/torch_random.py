"""PyTorch's random numbers on a CPU, bit for bit, without PyTorch.

`torch.manual_seed(seed)` seeds a Mersenne Twister; `uniform_`, `normal_` and `randperm`
consume its 32-bit numbers in order. Two details determine the last bits:

- Multiply-add rounds once, as the FMA instruction of AVX2 does. A float64 holds the
  product of two float32 numbers exactly.
- log, cos and sin are those of Moshier's Cephes library, as in PyTorch's AVX2 code.
  Each depends on one of 2**24 uniform numbers; for all of these, float64 sums rounded
  to float32 equal the singly rounded result.

Checked against PyTorch 2.13 with AVX2 and AVX-512, which use the same algorithm.
Without them (ATEN_CPU_CAPABILITY=default) PyTorch's own numbers differ: normal ones by
up to 2.4e-6, uniform(-0.036, 0.036) by up to 4e-9; permutations are equal. Dropout,
multinomial and normal tensors of fewer than 16 numbers use other algorithms and are not
implemented.
"""

import math

import numpy as np
from jaxtyping import Float32, Int64, UInt32

from gptjax.errors import ConfigError

Shape = int | tuple[int, ...]
F32 = np.float32
Factor = np.ndarray | F32
NUMBERS_PER_CHUNK = 1 << 15  # numbers per chunk, so that intermediates fit the cache
BOX_MULLER_BLOCK = 16  # numbers per Box-Muller block
MAX_PERMUTATION_LENGTH = (2**32 - 1) // 20  # randperm uses 64-bit numbers from here on
# S. L. Moshier, Cephes: single-precision logf, sinf, cosf.
LOG_COEFFICIENTS = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1),
    *(1.4249322787e-1, -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1),
    3.3333331174e-1,
)
LN2_PARTS = (-2.12194440e-4, 0.693359375)  # small and large part
SIN_COEFFICIENTS = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS_COEFFICIENTS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
QUARTER_PI_PARTS = (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)


class TorchGenerator:
    """PyTorch's default generator after `torch.manual_seed(seed)`.

    Stateful: every call advances the generator.

    >>> TorchGenerator(123).permutation(5)
    array([2, 0, 1, 3, 4])
    """

    def __init__(self, seed: int) -> None:
        if not -(2**63) <= seed < 2**64:
            raise ConfigError(f"seed={seed} must fit into 64 bits. Use a smaller seed.")
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)

    def next_uint32(self, count: int) -> UInt32[np.ndarray, " n"]:
        """Draws the next 32-bit numbers."""
        return self._twister.randint(0, 1 << 32, count, np.uint32)

    def uniform(
        self, shape: Shape, low: int | float = 0.0, high: int | float = 1.0
    ) -> Float32[np.ndarray, "..."]:
        """`torch.empty(shape).uniform_(low, high)`.

        Raises:
            ConfigError: a negative size, or a range that float32 cannot represent.
        """
        max_float = float(np.finfo(F32).max)
        if not (-max_float <= low <= high <= max_float and high - low <= max_float):
            raise ConfigError(
                f"uniform({low}, {high}) is not a float32 range. Use low <= high, at "
                f"most {max_float:.2g} apart."
            )
        array = np.empty(check_shape(shape), F32)
        start, end = F32(low), F32(high)
        flat = array.reshape(-1)
        for chunk in split_into_chunks(flat):
            fraction = (self.next_uint32(chunk.size) & 0xFFFFFF) * F32(2**-24)
            chunk[...] = exact_fma(fraction, end - start, start)
            chunk[chunk == end] = start  # the end is excluded
        return array

    def normal(self, shape: Shape) -> Float32[np.ndarray, "..."]:
        """`torch.empty(shape).normal_()`, for at least 16 numbers.

        Raises:
            ConfigError: fewer than 16 numbers, or a negative size.
        """
        if (count := math.prod(check_shape(shape))) < BOX_MULLER_BLOCK:
            raise ConfigError(
                f"normal({shape}) has {count} numbers, but at least {BOX_MULLER_BLOCK} "
                "are required: PyTorch uses another algorithm for fewer."
            )
        array = self.uniform(shape)
        flat = array.reshape(-1)
        for chunk in split_into_chunks(flat[: count - count % BOX_MULLER_BLOCK]):
            chunk[...] = box_muller(chunk)
        if count % BOX_MULLER_BLOCK:  # PyTorch redraws the last block
            flat[-BOX_MULLER_BLOCK:] = box_muller(self.uniform(BOX_MULLER_BLOCK))
        return array

    def permutation(self, n: int) -> Int64[np.ndarray, " n"]:
        """`torch.randperm(n)`.

        Raises:
            ConfigError: a negative length, or one that needs 64-bit numbers.
        """
        if not 0 <= n < MAX_PERMUTATION_LENGTH:
            raise ConfigError(
                f"permutation({n}) is not supported. Use a length from 0 to "
                f"{MAX_PERMUTATION_LENGTH - 1}."
            )
        order = list(range(n))
        for i, number in enumerate(self.next_uint32(max(n - 1, 0)).tolist()):  # Fisher-Yates
            other = i + number % (n - i)
            order[i], order[other] = order[other], order[i]
        return np.array(order, np.int64)


def check_shape(shape: Shape) -> tuple[int, ...]:
    """Returns the shape as a tuple after checking its sizes."""
    shape = (shape,) if isinstance(shape, int) else shape
    if min(shape, default=0) < 0:
        raise ConfigError(f"the shape {shape} must not have a negative size.")
    return shape


def split_into_chunks(flat: np.ndarray) -> list[np.ndarray]:
    """Splits a flat array into views of at most NUMBERS_PER_CHUNK numbers."""
    return [
        flat[start : start + NUMBERS_PER_CHUNK] for start in range(0, flat.size, NUMBERS_PER_CHUNK)
    ]


def fma(x: np.ndarray, y: Factor, z: Factor) -> np.ndarray:
    """Multiply-add in float64, rounded to float32; inexact in rare cases."""
    return np.add(np.multiply(x, y, dtype=np.float64), z).astype(F32)


def exact_fma(x: np.ndarray, y: Factor, z: Factor) -> np.ndarray:
    """Multiply-add with a single, exact rounding to float32.

    The float64 sum is itself rounded. If it lies midway between two float32 numbers,
    its rounding error decides the result.
    """
    product = np.multiply(x, y, dtype=np.float64)
    total = product + z
    midway = (total.view(np.int64) & (2**29 - 1)) == 2**28
    if midway.any():
        product, nearest = product[midway], total[midway]
        z_part = nearest - product
        z_error = np.broadcast_to(z, midway.shape)[midway] - z_part
        rounding_error = (product - (nearest - z_part)) + z_error  # Knuth's TwoSum
        direction = np.copysign(np.inf, rounding_error)
        total[midway] = np.where(rounding_error, np.nextafter(nearest, direction), nearest)
    return total.astype(F32)


def horner(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    """Evaluates a polynomial by Horner's rule, highest coefficient first."""
    first, *rest = map(F32, coefficients)
    y = np.full_like(x, first)
    for coefficient in rest:
        y = fma(y, x, coefficient)
    return y


def box_muller(uniform: np.ndarray) -> np.ndarray:
    """Box-Muller transform: 8 radii and 8 angles per block."""
    blocks = uniform.reshape(-1, 2, BOX_MULLER_BLOCK // 2)
    radius = np.sqrt(F32(-2) * log_float32(1 - blocks[:, 0]))
    cosine, sine = cos_sin(F32(2 * math.pi) * blocks[:, 1])
    pairs = np.stack([radius * cosine, radius * sine], axis=1)
    return pairs.reshape(-1) + F32(0)  # no -0.0


def log_float32(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of positive float32 numbers."""
    fraction, exponent = np.frexp(x)
    below_sqrt_half = fraction < F32(math.sqrt(0.5))
    exponent = (exponent - below_sqrt_half).astype(F32)
    x = np.where(below_sqrt_half, fraction + fraction, fraction) - 1
    square = x * x
    y = fma(horner(x, LOG_COEFFICIENTS) * x, square, exponent * F32(LN2_PARTS[0]))
    y = fma(square, F32(-0.5), y)
    return fma(exponent, F32(LN2_PARTS[1]), x + y)


def cos_sin(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of angles in [0, 2 pi], reduced by octant."""
    octant = ((x * F32(4 / math.pi)).astype(np.int32) + 1) & ~1
    for part in QUARTER_PI_PARTS:
        x = fma(octant.astype(F32), F32(part), x)
    square = x * x
    even = fma(horner(square, COS_COEFFICIENTS) * square, square, F32(-0.5) * square) + 1
    odd = fma(horner(square, SIN_COEFFICIENTS) * square, x, x)
    is_even_quadrant = (octant & 2) == 0
    cosine = np.where(is_even_quadrant, even, odd)
    sine = np.where(is_even_quadrant, odd, even)
    return (np.where((octant - 2) & 4, cosine, -cosine), np.where(octant & 4, -sine, sine))
