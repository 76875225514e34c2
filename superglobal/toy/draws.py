"""Random draws and small sums whose results are the same on every machine and NumPy version.

Pixels depend on PCG64's raw integers (NumPy promises their stream, not that of its distributions), on elementwise
+ - * / and sqrt in float32 or integers (correctly rounded everywhere), and on sines rounded to 1e-9 (libraries differ
in the last digit). Sums over arrays, matrix products, powers and exponentials are left out: their order of operations,
and so their last bit, is the machine's own.
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
Colour = tuple[float, float, float]
"""Red, green, blue as displayed, 0 to 255."""
Floats = NDArray[np.floating]
"""float32, of which the checker cannot always be sure."""
Bytes = NDArray[np.uint8]
T = TypeVar("T")
NOISE = 256  # side of the noise tile


class Draws:
    """A stream of draws that depends on its key alone: `Draws(seed, "train", 3, "view", 7)`."""

    def __init__(self, *key: int | str) -> None:
        digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
        self._bits = np.random.PCG64(np.random.SeedSequence(int.from_bytes(digest[:16], "little")))

    def real(self, low: float = 0.0, high: float = 1.0) -> float:
        """Uniform in [low, high)."""
        return low + (high - low) * ((int(self._bits.random_raw()) >> 11) * 2.0**-53)

    def bell(self, spread: float) -> float:
        """Bell-shaped around 0, never outside +-`spread`."""
        return spread * (self.real(-1, 1) + self.real(-1, 1) + self.real(-1, 1)) / 3

    def whole(self, low: int, high: int) -> int:
        """Uniform in low..high, both ends included."""
        return low + int(self.real(0, high - low + 1))

    def chance(self, probability: float) -> bool:
        return self.real() < probability

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.whole(0, len(choices) - 1)]

    def bytes(self, *shape: int) -> Bytes:
        """Uniform uint8 of the given shape."""
        count = math.prod(shape)
        raw = np.asarray(self._bits.random_raw((count + 7) // 8), np.uint64)
        return raw.astype("<u8").view(np.uint8)[:count].reshape(shape)

    def tint(self, colour: Colour, spread: float) -> Colour:
        """`colour` a little lighter or darker, and a little off in every channel."""
        common = self.real(-spread, spread)
        red, green, blue = (min(250.0, max(8.0, c + common + self.real(-spread, spread) / 3)) for c in colour)
        return red, green, blue


def sine(degrees: float) -> float:
    return round(math.sin(math.radians(degrees)), 9)


def cosine(degrees: float) -> float:
    return round(math.cos(math.radians(degrees)), 9)


def dot(a: Vector, b: Vector) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def cross(a: Vector, b: Vector) -> Vector:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def unit(a: Vector) -> Vector:
    length = math.sqrt(dot(a, a))
    return a[0] / length, a[1] / length, a[2] / length


@lru_cache(maxsize=4)
def noise_tile(cell: int) -> Bytes:
    """Smooth noise, (256, 256) uint8, periodic; blobs of `cell`, half and a quarter of it, in texels."""
    draws = Draws("noise", cell)
    total = np.zeros((NOISE, NOISE), np.int64)
    for weight, size in ((4, cell), (2, max(1, cell // 2)), (1, max(1, cell // 4))):
        coarse = draws.bytes(NOISE // size, NOISE // size).astype(np.int64)
        total += weight * _stretch(_stretch(coarse, size).T, size).T
    return (total // 7).astype(np.uint8)


def _stretch(rows: NDArray[np.int64], factor: int) -> NDArray[np.int64]:
    """Each row of a periodic array becomes `factor` rows that lead over to the next, in whole numbers."""
    part = np.arange(factor)[None, :, None]
    mixed = (rows[:, None] * (factor - part) + np.roll(rows, -1, axis=0)[:, None] * part) // factor
    return mixed.reshape(-1, rows.shape[1])
