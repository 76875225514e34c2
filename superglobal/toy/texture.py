"""Textures drawn once, front on: colours, relief and what glows at night, 16 texels a metre."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from superglobal.toy.draws import NOISE, Bytes, Colour, Draws, Floats, noise_tile

TEXELS = 16
LEVELS = 4


@dataclass(frozen=True)
class Texture:
    """What a wall looks like, row 0 at its foot.

    `colour` (h, w, 3) uint8 as displayed; `relief` (h, w) float32, metres towards the viewer; `glow` (h, w) uint8,
    255 where a lamp is lit behind at night. One entry per level, each half the size of the one before. `tiled` repeats.
    """

    colour: tuple[Bytes, ...]
    relief: tuple[Floats, ...]
    glow: tuple[Bytes, ...]
    tiled: bool = False
    flat: bool = False
    """Whether the relief is 0 everywhere."""


class Canvas:
    """A wall of `width` x `height` metres being drawn; x to the right, z upwards."""

    def __init__(self, width: float, height: float, colour: Colour) -> None:
        self.width, self.height = width, height
        rows, columns = max(2, math.ceil(height * TEXELS)), max(2, math.ceil(width * TEXELS))
        self.colour = np.empty((rows, columns, 3), np.uint8)
        self.colour[:] = whole_bytes(colour)
        self.relief = np.zeros((rows, columns), np.float32)
        self.glow = np.zeros((rows, columns), np.uint8)

    def _window(self, x0: float, x1: float, z0: float, z1: float) -> tuple[slice, slice]:
        rows = slice(max(0, round(z0 * TEXELS)), max(0, round(z1 * TEXELS)))
        return rows, slice(max(0, round(x0 * TEXELS)), max(0, round(x1 * TEXELS)))

    def band(self, x0: float, x1: float, z0: float, z1: float, colour: Colour, relief: float = 0.0) -> None:
        """A filled rectangle."""
        area = self._window(x0, x1, z0, z1)
        self.colour[area] = whole_bytes(colour)
        self.relief[area] = relief
        self.glow[area] = 0

    def shape(
        self, kind: str, x: float, z: float, width: float, height: float, colour: Colour, relief: float, glow: int = 0
    ) -> None:
        """A filled outline (see `_inside`) centred at `x`, standing on `z`."""
        area = self._window(x - width / 2, x + width / 2, z, z + height)
        rows, columns = self.relief[area].shape
        if not rows or not columns:
            return
        across = ((np.arange(columns) + 0.5 + area[1].start) / TEXELS - x)[None, :]
        up = ((np.arange(rows) + 0.5 + area[0].start) / TEXELS - z)[:, None]
        mask = _inside(kind, across, up, width, height)
        self.colour[area][mask] = whole_bytes(colour)
        self.relief[area][mask] = relief
        self.glow[area][mask] = glow

    def round_off(self, x0: float, x1: float, z0: float, z1: float, depth: float) -> None:
        """Makes a rectangle stand out like half a column: round relief, darker to the sides."""
        area = self._window(x0, x1, z0, z1)
        columns = self.relief[area].shape[1]
        if not columns:
            return
        side = (np.arange(columns) + 0.5) / columns * 2 - 1
        bulge = np.sqrt(1 - side * side)
        self.relief[area] = (depth * bulge)[None, :]
        self.colour[area] = (self.colour[area] * (0.72 + 0.28 * bulge)[None, :, None]).astype(np.uint8)

    def weather(self, draws: Draws, strength: float) -> None:
        """Stains and grain over everything."""
        rows, columns = self.relief.shape
        stain = _cut(noise_tile(32), draws, rows, columns).astype(np.int32) - 128
        grain = _cut(noise_tile(4), draws, rows, columns).astype(np.int32) - 128
        gain = 256 + ((stain + grain) * round(strength * 256)) // 128
        self.colour = np.clip(self.colour * gain[..., None] // 256, 0, 255).astype(np.uint8)

    def texture(self, tiled: bool = False) -> Texture:
        colour, relief, glow = [self.colour], [self.relief], [self.glow]
        for _ in range(LEVELS - 1):
            colour.append((_quarter(colour[-1].astype(np.uint16)) // 4).astype(np.uint8))
            relief.append(_quarter(relief[-1]) * np.float32(0.25))
            glow.append((_quarter(glow[-1].astype(np.uint16)) // 4).astype(np.uint8))
        flat = not self.relief.any()
        return Texture(tuple(colour), tuple(relief), tuple(glow), tiled, flat)


def _quarter(a: NDArray) -> NDArray:
    """Sums of 2 x 2 blocks; an odd last row or column is repeated."""
    rows, columns = a.shape[0] + a.shape[0] % 2, a.shape[1] + a.shape[1] % 2
    even = np.pad(a, [(0, rows - a.shape[0]), (0, columns - a.shape[1])] + [(0, 0)] * (a.ndim - 2), mode="edge")
    return (even[::2, ::2] + even[1::2, ::2]) + (even[::2, 1::2] + even[1::2, 1::2])


def whole_bytes(colour: Colour) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, int(c))) for c in colour)
    return red, green, blue


def _cut(tile: Bytes, draws: Draws, rows: int, columns: int) -> Bytes:
    top, left = draws.whole(0, NOISE - 1), draws.whole(0, NOISE - 1)
    return tile[np.ix_((np.arange(rows) + top) % NOISE, (np.arange(columns) + left) % NOISE)]


def _inside(kind: str, x: NDArray, z: NDArray, width: float, height: float) -> NDArray[np.bool_]:
    """Mask of an outline; `x` from its middle, `z` from its foot, metres."""
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


def roof_texture(draws: Draws, colour: Colour) -> Texture:
    """Courses of tiles, 4 x 4 m, repeating."""
    canvas = Canvas(4, 4, colour)
    for row in range(10):
        canvas.band(0, 4, row * 0.4, row * 0.4 + 0.1, darker(colour, 0.7))
        for column in range(8):
            x = column * 0.5 + (row % 2) * 0.25
            canvas.band(x, x + 0.44, row * 0.4 + 0.1, row * 0.4 + 0.4, draws.tint(colour, 9))
    return canvas.texture(tiled=True)


def ground_texture(draws: Draws) -> Texture:
    """Paving, asphalt or grass, 8 x 8 m, repeating."""
    kind = draws.pick(("paving", "paving", "asphalt", "grass"))
    colour: Colour = {"paving": (158, 150, 140), "asphalt": (98, 98, 102), "grass": (92, 118, 62)}[kind]
    canvas = Canvas(8, 8, draws.tint(colour, 14))
    if kind == "paving":
        size = draws.pick((0.5, 1.0))
        for step in range(round(8 / size)):
            canvas.band(step * size, step * size + 0.07, 0, 8, darker(colour, 0.75))
            canvas.band(0, 8, step * size, step * size + 0.07, darker(colour, 0.75))
    canvas.weather(draws, 0.3 if kind == "grass" else 0.15)
    return canvas.texture(tiled=True)


def darker(colour: Colour, factor: float) -> Colour:
    return colour[0] * factor, colour[1] * factor, colour[2] * factor
