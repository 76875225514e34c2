"""Draw the textures of walls, roofs and the ground: color, relief, and windows that are lit at night."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from superglobal.toy.numerics import NOISE, Bytes, Color, Floats, RandomStream, noise_tile

TEXELS = 16  # texels per meter at level 0
LEVELS = 4  # number of mipmap levels; each has half the resolution of the previous one


@dataclass(frozen=True)
class Texture:
    """Texture of a surface at several resolutions (mipmap).

    `color`, `relief` and `glow` contain one array per level; the first one has `TEXELS` texels per meter, and each
    following one has half the resolution. Row 0 of an array is at the bottom.

    Attributes:
        color: (h, w, 3) uint8, gamma-encoded.
        relief: (h, w) float32, height above the plane of the surface in meters; negative for recesses.
        glow: (h, w) uint8, 255 at windows that are lit at night and 0 elsewhere, averaged at lower resolutions.
        tiled: whether the texture repeats.
        flat: whether the relief is 0 everywhere.
    """

    color: tuple[Bytes, ...]
    relief: tuple[Floats, ...]
    glow: tuple[Bytes, ...]
    tiled: bool = False
    flat: bool = False


class Canvas:
    """Canvas on which a texture is drawn.

    All coordinates are in meters from the lower left corner; x points to the right, and z upwards.

    Args:
        width: width of the canvas in meters.
        height: height of the canvas in meters.
        color: background color.

    Attributes:
        color: (h, w, 3) uint8 colors drawn so far, gamma-encoded.
        relief: (h, w) float32 height above the plane of the surface in meters.
        glow: (h, w) uint8 light of the windows at night.
    """

    def __init__(self, width: float, height: float, color: Color) -> None:
        self.width, self.height = width, height
        rows, columns = max(2, math.ceil(height * TEXELS)), max(2, math.ceil(width * TEXELS))
        self.color = np.empty((rows, columns, 3), np.uint8)
        self.color[:] = whole_bytes(color)
        self.relief = np.zeros((rows, columns), np.float32)
        self.glow = np.zeros((rows, columns), np.uint8)

    def _window(self, x0: float, x1: float, z0: float, z1: float) -> tuple[slice, slice]:
        """Return the rows and columns of the texels inside a rectangle.

        The rectangle has the horizontal extent [x0, x1] and the vertical extent [z0, z1] in meters.
        """
        rows = slice(max(0, round(z0 * TEXELS)), max(0, round(z1 * TEXELS)))
        return rows, slice(max(0, round(x0 * TEXELS)), max(0, round(x1 * TEXELS)))

    def band(self, x0: float, x1: float, z0: float, z1: float, color: Color, relief: float = 0.0) -> None:
        """Draw a filled rectangle with horizontal extent [x0, x1] and vertical extent [z0, z1].

        `relief` is the height of the rectangle above the plane of the surface in meters.
        """
        area = self._window(x0, x1, z0, z1)
        self.color[area] = whole_bytes(color)
        self.relief[area] = relief
        self.glow[area] = 0

    def shape(
        self, kind: str, x: float, z: float, width: float, height: float, color: Color, relief: float, glow: int = 0
    ) -> None:
        """Draw a filled shape.

        Args:
            kind: "arch", "pointed", "circle", "gable", or anything else for a rectangle.
            x: horizontal center of the shape.
            z: bottom of the shape.
            width: width of the shape.
            height: height of the shape.
            color: color of the shape.
            relief: height of the shape above the plane of the surface in meters; negative for a recess.
            glow: light of the shape at night, 0 to 255.
        """
        area = self._window(x - width / 2, x + width / 2, z, z + height)
        rows, columns = self.relief[area].shape
        if not rows or not columns:
            return
        across = ((np.arange(columns) + 0.5 + area[1].start) / TEXELS - x)[None, :]
        up = ((np.arange(rows) + 0.5 + area[0].start) / TEXELS - z)[:, None]
        mask = _inside(kind, across, up, width, height)
        self.color[area][mask] = whole_bytes(color)
        self.relief[area][mask] = relief
        self.glow[area][mask] = glow

    def round_off(self, x0: float, x1: float, z0: float, z1: float, depth: float) -> None:
        """Turn a rectangle into a half column: give it a round relief, and darken its left and right sides.

        The rectangle has the horizontal extent [x0, x1] and the vertical extent [z0, z1]. `depth` is the maximum of the
        relief in meters.
        """
        area = self._window(x0, x1, z0, z1)
        columns = self.relief[area].shape[1]
        if not columns:
            return
        side = (np.arange(columns) + 0.5) / columns * 2 - 1
        bulge = np.sqrt(1 - side * side)
        self.relief[area] = (depth * bulge)[None, :]
        self.color[area] = (self.color[area] * (0.72 + 0.28 * bulge)[None, :, None]).astype(np.uint8)

    def weather(self, rng: RandomStream, strength: float) -> None:
        """Add random stains and grain to the colors of the whole canvas.

        Stains and grain each change the brightness by at most the fraction `strength`.
        """
        rows, columns = self.relief.shape
        stain = _cut(noise_tile(32), rng, rows, columns).astype(np.int32) - 128
        grain = _cut(noise_tile(4), rng, rows, columns).astype(np.int32) - 128
        gain = 256 + ((stain + grain) * round(strength * 256)) // 128
        self.color = np.clip(self.color * gain[..., None] // 256, 0, 255).astype(np.uint8)

    def texture(self, tiled: bool = False) -> Texture:
        """Return the drawing as a texture with `LEVELS` levels. `tiled` is True if the texture repeats."""
        color, relief, glow = [self.color], [self.relief], [self.glow]
        for _ in range(LEVELS - 1):
            color.append((_quarter(color[-1].astype(np.uint16)) // 4).astype(np.uint8))
            relief.append(_quarter(relief[-1]) * np.float32(0.25))
            glow.append((_quarter(glow[-1].astype(np.uint16)) // 4).astype(np.uint8))
        flat = not self.relief.any()
        return Texture(tuple(color), tuple(relief), tuple(glow), tiled, flat)


def _quarter(a: NDArray) -> NDArray:
    """Sum each group of 2 x 2 elements of an array: (h, w, ...) -> (ceil(h / 2), ceil(w / 2), ...).

    If h is odd, the last row is repeated first. If w is odd, the last column is repeated first.
    """
    rows, columns = a.shape[0] + a.shape[0] % 2, a.shape[1] + a.shape[1] % 2
    even = np.pad(a, [(0, rows - a.shape[0]), (0, columns - a.shape[1])] + [(0, 0)] * (a.ndim - 2), mode="edge")
    return (even[::2, ::2] + even[1::2, ::2]) + (even[::2, 1::2] + even[1::2, 1::2])


def whole_bytes(color: Color) -> tuple[int, int, int]:
    """Convert red, green and blue to integers from 0 to 255. Values outside this range are clipped."""
    red, green, blue = (min(255, max(0, int(c))) for c in color)
    return red, green, blue


def _cut(tile: Bytes, rng: RandomStream, rows: int, columns: int) -> Bytes:
    """Return a random crop of an endless texture that repeats a tile.

    Args:
        tile: (256, 256) uint8.
        rng: random number generator.
        rows: height of the crop.
        columns: width of the crop.

    Returns:
        (rows, columns) uint8.
    """
    top, left = rng.integer(0, NOISE - 1), rng.integer(0, NOISE - 1)
    return tile[np.ix_((np.arange(rows) + top) % NOISE, (np.arange(columns) + left) % NOISE)]


def _inside(kind: str, x: NDArray, z: NDArray, width: float, height: float) -> NDArray[np.bool_]:
    """Return the mask (h, w) of the positions on a grid that are inside a shape.

    Args:
        kind: "arch", "pointed", "circle", "gable", or anything else for a rectangle.
        x: (1, w) horizontal positions relative to the center of the shape in meters.
        z: (h, 1) vertical positions relative to the bottom of the shape in meters.
        width: width of the shape in meters.
        height: height of the shape in meters.
    """
    half = width / 2
    if kind == "arch":
        spring = max(0.0, height - half)
        return (z < spring) | (x * x + (z - spring) * (z - spring) < half * half)
    if kind == "pointed":
        spring = max(0.0, height - 0.866 * width)
        left, right, above = x + half, x - half, z - spring
        reach = width * width
        return (z < spring) | ((left * left + above * above < reach) & (right * right + above * above < reach))
    if kind == "circle":
        middle = z - height / 2
        return x * x + middle * middle < half * half
    if kind == "gable":
        return abs(x) < half * (1 - z / height)
    return np.broadcast_to(abs(x) <= half, np.broadcast_shapes(x.shape, z.shape))


def roof_texture(rng: RandomStream, color: Color) -> Texture:
    """Draw roof tiles in random shades of `color`, and return a texture of 4 x 4 m that repeats."""
    canvas = Canvas(4, 4, color)
    for row in range(10):
        canvas.band(0, 4, row * 0.4, row * 0.4 + 0.1, darker(color, 0.7))
        for column in range(8):
            x = column * 0.5 + (row % 2) * 0.25
            canvas.band(x, x + 0.44, row * 0.4 + 0.1, row * 0.4 + 0.4, rng.tint(color, 9))
    return canvas.texture(tiled=True)


def ground_texture(rng: RandomStream) -> Texture:
    """Draw paving, asphalt or grass, chosen at random, and return a texture of 8 x 8 m that repeats."""
    kind = rng.choice(("paving", "paving", "asphalt", "grass"))
    color: Color = {"paving": (158, 150, 140), "asphalt": (98, 98, 102), "grass": (92, 118, 62)}[kind]
    canvas = Canvas(8, 8, rng.tint(color, 14))
    if kind == "paving":
        size = rng.choice((0.5, 1.0))
        for step in range(round(8 / size)):
            canvas.band(step * size, step * size + 0.07, 0, 8, darker(color, 0.75))
            canvas.band(0, 8, step * size, step * size + 0.07, darker(color, 0.75))
    canvas.weather(rng, 0.3 if kind == "grass" else 0.15)
    return canvas.texture(tiled=True)


def darker(color: Color, factor: float) -> Color:
    """Multiply a color by a factor. Factors below 1 make it darker, and factors above 1 brighter."""
    return color[0] * factor, color[1] * factor, color[2] * factor
