"""Compute random numbers, vectors and noise that are identical on every machine and with every NumPy version.

The pixels of the toy data set must not depend on the machine. The renderer therefore uses only:

- the raw integers of the PCG64 generator, because NumPy guarantees that these never change, unlike the numbers drawn
  from its distributions;
- elementwise + - * / and sqrt in float32 or integers, because every machine rounds them correctly;
- sines and cosines rounded to 9 decimal places, because math libraries differ in the last digit.

It avoids floating-point sums over arrays, matrix products, powers and exponentials, because their rounding differs
between machines.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Vector = tuple[float, float, float]
Color = tuple[float, float, float]
"""Red, green and blue: gamma-encoded values from 0 to 255, or one factor per channel."""
Floats = NDArray[np.floating]
"""Array of float32. The type also allows other precisions because mypy cannot always infer float32."""
Bytes = NDArray[np.uint8]
T = TypeVar("T")
NOISE = 256  # width and height of the noise tile in texels


class RandomStream:
    """Random number generator seeded by a key, e.g. `RandomStream(seed, "train", 3, "view", 7)`.

    Equal keys give equal numbers.

    Args:
        key: integers and strings.
    """

    def __init__(self, *key: int | str) -> None:
        digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
        self._bits = np.random.PCG64(np.random.SeedSequence(int.from_bytes(digest[:16], "little")))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Return a uniform random number in [low, high)."""
        return low + (high - low) * ((int(self._bits.random_raw()) >> 11) * 2.0**-53)

    def bell(self, spread: float) -> float:
        """Return a random number in [-spread, spread], the mean of three uniform numbers (roughly Gaussian)."""
        return spread * (self.uniform(-1, 1) + self.uniform(-1, 1) + self.uniform(-1, 1)) / 3

    def integer(self, low: int, high: int) -> int:
        """Return a uniform random integer in [low, high], with both ends included."""
        return low + int(self.uniform(0, high - low + 1))

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self.uniform() < probability

    def choice(self, choices: Sequence[T]) -> T:
        """Return a random element of `choices`."""
        return choices[self.integer(0, len(choices) - 1)]

    def bytes(self, *shape: int) -> Bytes:
        """Return an array of the given shape filled with uniform random uint8 values."""
        count = math.prod(shape)
        raw = np.asarray(self._bits.random_raw((count + 7) // 8), np.uint64)
        return raw.astype("<u8").view(np.uint8)[:count].reshape(shape)

    def tint(self, color: Color, spread: float) -> Color:
        """Return a random color near `color`.

        Each channel is shifted by the sum of two random numbers: one in [-spread, spread] that all channels share, and
        one in [-spread / 3, spread / 3] that is drawn for this channel alone. The result is clipped to [8, 250].
        """
        common = self.uniform(-spread, spread)
        red, green, blue = (min(250.0, max(8.0, c + common + self.uniform(-spread, spread) / 3)) for c in color)
        return red, green, blue


def sine(degrees: float) -> float:
    """Return the sine of an angle in degrees, rounded to 9 decimal places."""
    return round(math.sin(math.radians(degrees)), 9)


def cosine(degrees: float) -> float:
    """Return the cosine of an angle in degrees, rounded to 9 decimal places."""
    return round(math.cos(math.radians(degrees)), 9)


def dot(a: Vector, b: Vector) -> float:
    """Return the dot product of two vectors."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def cross(a: Vector, b: Vector) -> Vector:
    """Return the cross product of two vectors."""
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def unit(a: Vector) -> Vector:
    """Return a vector scaled to length 1."""
    length = math.sqrt(dot(a, a))
    return a[0] / length, a[1] / length, a[2] / length


@lru_cache(maxsize=4)
def noise_tile(cell: int) -> Bytes:
    """Return a tile of smooth noise, (256, 256) uint8, that repeats seamlessly.

    The tile is the weighted mean of three grids of random values, each upsampled to 256 x 256. Neighboring values of
    the grids are `cell`, `cell` / 2 and `cell` / 4 texels apart. `cell` must be a power of 2.
    """
    rng = RandomStream("noise", cell)
    total = np.zeros((NOISE, NOISE), np.int64)
    for weight, size in ((4, cell), (2, max(1, cell // 2)), (1, max(1, cell // 4))):
        coarse = rng.bytes(NOISE // size, NOISE // size).astype(np.int64)
        total += weight * _stretch(_stretch(coarse, size).T, size).T
    return (total // 7).astype(np.uint8)


def _stretch(rows: NDArray[np.int64], factor: int) -> NDArray[np.int64]:
    """Upsample an array (h, w) to (h * factor, w) by linear interpolation between rows, in integer arithmetic.

    The array is periodic: the last row is followed by the first row.
    """
    part = np.arange(factor)[None, :, None]
    mixed = (rows[:, None] * (factor - part) + np.roll(rows, -1, axis=0)[:, None] * part) // factor
    return mixed.reshape(-1, rows.shape[1])
