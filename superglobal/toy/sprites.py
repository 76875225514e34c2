"""Draw the occluders: flat sprites of trees, people, vans and street lamps, and the pattern of a scaffold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from superglobal.toy.numerics import NOISE, Bytes, Color, Floats, RandomStream, noise_tile

Mask = NDArray[np.bool_]
CLOTHES: tuple[Color, ...] = (
    (190, 40, 44), (40, 70, 150), (230, 226, 220), (36, 36, 40), (220, 180, 60), (70, 120, 80), (120, 120, 130),
)  # fmt: skip
SKIN: tuple[Color, ...] = ((226, 184, 156), (196, 146, 112), (124, 84, 60), (84, 56, 42))


def draw_sprite(kind: str, look: int, x: Floats, y: Floats, aspect: float) -> tuple[Mask, Bytes]:
    """Draw a sprite, sampled on a grid of h x w positions.

    Args:
        kind: "tree", "person", "van" or "lamp".
        look: seed of the shape and colors.
        x: (1, w) horizontal positions of the grid, from -1 at the left edge of the sprite to 1 at the right edge.
        y: (h, 1) vertical positions of the grid, from 0 at the bottom of the sprite to 1 at the top.
        aspect: width of the sprite divided by its height.

    Returns:
        Mask of the positions that the sprite covers, (h, w), and their colors, (h, w, 3) uint8.
    """
    rng = RandomStream("sprite", kind, look)
    canvas = Cutout(x, y)
    {"tree": _tree, "person": _person, "van": _van, "lamp": _lamp}[kind](canvas, rng, aspect)
    return canvas.mask, canvas.color


class Cutout:
    """Canvas with a transparent background, sampled on a grid of h x w positions.

    All coordinates have the same units as the positions `x` and `y` of the grid.

    Args:
        x: (1, w) horizontal positions of the grid.
        y: (h, 1) vertical positions of the grid.

    Attributes:
        mask: (h, w) bool, True where something has been drawn.
        color: (h, w, 3) uint8, the colors where `mask` is True.
    """

    def __init__(self, x: Floats, y: Floats) -> None:
        self.x, self.y = x, y
        self.mask = np.zeros((y.shape[0], x.shape[1]), bool)
        self.color = np.zeros((*self.mask.shape, 3), np.uint8)

    def fill(self, where: Mask, color: Color | Bytes) -> None:
        """Draw a color at the positions where the mask `where` (h, w) is True.

        `color` is one color, or the colors of all positions, (h, w, 3) uint8.
        """
        self.color = np.where(where[..., None], np.asarray(color, np.uint8), self.color)
        self.mask |= where

    def rectangle(self, x0: float, x1: float, y0: float, y1: float, color: Color) -> None:
        """Draw a filled rectangle with horizontal extent [x0, x1] and vertical extent [y0, y1]."""
        self.fill((self.x >= x0) & (self.x <= x1) & (self.y >= y0) & (self.y <= y1), color)

    def ellipse(self, x: float, y: float, rx: float, ry: float) -> Mask:
        """Return the mask (h, w) of an ellipse with center (x, y) and semi-axes (rx, ry), without drawing it."""
        across, above = (self.x - np.float32(x)) * np.float32(1 / rx), (self.y - np.float32(y)) * np.float32(1 / ry)
        return across * across + above * above < 1


def _tree(canvas: Cutout, rng: RandomStream, aspect: float) -> None:
    """Draw a random broad-leaved tree or conifer over the whole canvas."""
    trunk = rng.uniform(0.03, 0.06) / aspect
    canvas.rectangle(-trunk, trunk, 0, 0.5, rng.tint((86, 66, 50), 16))
    rows = (canvas.y * 97).astype(np.int32) + rng.integer(0, 255)
    columns = (canvas.x * np.float32(48.5 * aspect)).astype(np.int32) + rng.integer(0, 255)
    leaves = noise_tile(8)[rows % NOISE, columns % NOISE] // 2
    rows, columns = (canvas.y * 577).astype(np.int32), (canvas.x * np.float32(288.5 * aspect)).astype(np.int32)
    leaves += noise_tile(16)[rows % NOISE, columns % NOISE] // 2
    crown = np.zeros(canvas.mask.shape, bool)
    if rng.chance(0.25):  # The tree is a conifer.
        crown = (abs(canvas.x) < (1 - canvas.y) * np.float32(0.9)) & (canvas.y > 0.12)
    else:
        for _ in range(rng.integer(6, 11)):
            x, y, r = rng.uniform(-0.55, 0.55), rng.uniform(0.45, 0.8), rng.uniform(0.14, 0.22)
            crown |= canvas.ellipse(x, y, min(0.44, r * 2.0), r)
    crown &= leaves > (70 if rng.chance(0.7) else 118)
    green = np.asarray(rng.tint(rng.choice(((70, 104, 48), (96, 118, 52), (52, 84, 52), (168, 120, 50))), 14))
    shade = leaves.astype(np.int32) + (canvas.y * 90).astype(np.int32)
    canvas.fill(crown, np.clip(green.astype(np.int32) * shade[..., None] // 200, 0, 255).astype(np.uint8))


def _person(canvas: Cutout, rng: RandomStream, aspect: float) -> None:
    """Draw a person in random clothes over the whole canvas."""
    skin, top, legs = rng.choice(SKIN), rng.tint(rng.choice(CLOTHES), 16), rng.tint(rng.choice(CLOTHES), 16)
    for side in (-1, 1):
        canvas.rectangle(side * 0.24 - 0.17, side * 0.24 + 0.17, 0, 0.5, legs)
        canvas.fill(canvas.ellipse(side * 0.62, 0.62, 0.16, 0.2), top)
    canvas.fill(canvas.ellipse(0, 0.63, 0.58, 0.22), top)
    canvas.fill(canvas.ellipse(0, 0.92, 0.24, 0.085), skin)
    hair = rng.choice(((30, 24, 20), (90, 62, 40), (190, 160, 100), (130, 130, 130)))
    canvas.fill(canvas.ellipse(0, 0.945, 0.27, 0.06) & (canvas.y > 0.93), hair)


def _van(canvas: Cutout, rng: RandomStream, aspect: float) -> None:
    """Draw a van of random color over the whole canvas."""
    body = rng.tint(rng.choice(((210, 212, 214), (170, 40, 40), (40, 60, 120), (60, 62, 66), (214, 178, 60))), 12)
    canvas.rectangle(-1, 1, 0.16, 0.72, body)
    canvas.rectangle(-0.8, 0.85, 0.6, 1.0, body)
    canvas.rectangle(-0.72, 0.78, 0.62, 0.9, (42, 50, 58))
    for pillar in (-0.3, 0.2):
        canvas.rectangle(pillar - 0.03, pillar + 0.03, 0.6, 0.92, body)
    for wheel in (-0.62, 0.62):
        canvas.fill(canvas.ellipse(wheel, 0.16, 0.32 / aspect, 0.16), (26, 26, 28))


def _lamp(canvas: Cutout, rng: RandomStream, aspect: float) -> None:
    """Draw a street lamp over the whole canvas."""
    canvas.rectangle(-0.12, 0.12, 0, 0.9, (40, 44, 44))
    canvas.fill(canvas.ellipse(0, 0.94, 0.7, 0.06), (226, 220, 196))


def scaffold_pattern(look: int, x: Floats, z: Floats, height: float) -> tuple[Mask, Bytes]:
    """Draw a scaffold, sampled on a grid of h x w positions.

    It has poles every 2.2 m, boards every 2 m, and a net that covers a random range of heights.

    Args:
        look: seed of the net.
        x: horizontal positions of the grid in meters from the lower left corner; broadcasts to (h, w).
        z: vertical positions of the grid in meters from the lower left corner; broadcasts to (h, w).
        height: height of the scaffold in meters.

    Returns:
        Mask of the positions that the scaffold covers, (h, w), and their colors, (h, w, 3) uint8.
    """
    rng = RandomStream("scaffold", look)
    net_from, net_to = sorted((rng.uniform(0, height), rng.uniform(0, height)))
    canvas = Cutout(x, z)
    weave = ((x * 4).astype(np.int32) * 7 + (z * 4).astype(np.int32) * 3) % 8
    net = rng.choice(((86, 130, 92), (120, 140, 170), (214, 214, 206)))
    canvas.fill((z > net_from) & (z < net_to) & (weave > 0), rng.tint(net, 12))
    pole = x - (x * np.float32(1 / 2.2)).astype(np.int32) * np.float32(2.2) < 0.14
    board = z - (z * np.float32(0.5)).astype(np.int32) * np.float32(2) < 0.26
    canvas.fill(board, (146, 116, 80))
    canvas.fill(pole, (150, 152, 156))
    return canvas.mask, canvas.color
