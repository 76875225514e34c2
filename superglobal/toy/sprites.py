"""Cut-outs that stand in the way: trees, people, vans, lamps; and the pattern of a scaffold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from superglobal.toy.draws import NOISE, Bytes, Colour, Draws, Floats, noise_tile

Mask = NDArray[np.bool_]
CLOTHES: tuple[Colour, ...] = (
    (190, 40, 44), (40, 70, 150), (230, 226, 220), (36, 36, 40), (220, 180, 60), (70, 120, 80), (120, 120, 130),
)  # fmt: skip
SKIN: tuple[Colour, ...] = ((226, 184, 156), (196, 146, 112), (124, 84, 60), (84, 56, 42))


def draw_sprite(kind: str, look: int, x: Floats, y: Floats, aspect: float) -> tuple[Mask, Bytes]:
    """Mask (h, w) and colours (h, w, 3) of a cut-out; `x` (1, w) from -1 to 1, `y` (h, 1) from 0 at its foot to 1.

    `aspect` is its width over its height.
    """
    draws = Draws("sprite", kind, look)
    canvas = Cutout(x, y)
    {"tree": _tree, "person": _person, "van": _van, "lamp": _lamp}[kind](canvas, draws, aspect)
    return canvas.mask, canvas.colour


class Cutout:
    """Mask and colours being drawn in a cut-out's own coordinates."""

    def __init__(self, x: Floats, y: Floats) -> None:
        self.x, self.y = x, y
        self.mask = np.zeros((y.shape[0], x.shape[1]), bool)
        self.colour = np.zeros((*self.mask.shape, 3), np.uint8)

    def fill(self, where: Mask, colour: Colour | Bytes) -> None:
        self.colour = np.where(where[..., None], np.asarray(colour, np.uint8), self.colour)
        self.mask |= where

    def rectangle(self, x0: float, x1: float, y0: float, y1: float, colour: Colour) -> None:
        self.fill((self.x >= x0) & (self.x <= x1) & (self.y >= y0) & (self.y <= y1), colour)

    def ellipse(self, x: float, y: float, rx: float, ry: float) -> Mask:
        across, above = (self.x - np.float32(x)) * np.float32(1 / rx), (self.y - np.float32(y)) * np.float32(1 / ry)
        return across * across + above * above < 1


def _tree(canvas: Cutout, draws: Draws, aspect: float) -> None:
    trunk = draws.real(0.03, 0.06) / aspect
    canvas.rectangle(-trunk, trunk, 0, 0.5, draws.tint((86, 66, 50), 16))
    rows = (canvas.y * 97).astype(np.int32) + draws.whole(0, 255)
    columns = (canvas.x * np.float32(48.5 * aspect)).astype(np.int32) + draws.whole(0, 255)
    leaves = noise_tile(8)[rows % NOISE, columns % NOISE] // 2
    rows, columns = (canvas.y * 577).astype(np.int32), (canvas.x * np.float32(288.5 * aspect)).astype(np.int32)
    leaves += noise_tile(16)[rows % NOISE, columns % NOISE] // 2
    crown = np.zeros(canvas.mask.shape, bool)
    if draws.chance(0.25):  # a conifer
        crown = (abs(canvas.x) < (1 - canvas.y) * np.float32(0.9)) & (canvas.y > 0.12)
    else:
        for _ in range(draws.whole(6, 11)):
            x, y, r = draws.real(-0.55, 0.55), draws.real(0.45, 0.8), draws.real(0.14, 0.22)
            crown |= canvas.ellipse(x, y, min(0.44, r * 2.0), r)
    crown &= leaves > (70 if draws.chance(0.7) else 118)
    green = np.asarray(draws.tint(draws.pick(((70, 104, 48), (96, 118, 52), (52, 84, 52), (168, 120, 50))), 14))
    shade = leaves.astype(np.int32) + (canvas.y * 90).astype(np.int32)
    canvas.fill(crown, np.clip(green.astype(np.int32) * shade[..., None] // 200, 0, 255).astype(np.uint8))


def _person(canvas: Cutout, draws: Draws, aspect: float) -> None:
    skin, top, legs = draws.pick(SKIN), draws.tint(draws.pick(CLOTHES), 16), draws.tint(draws.pick(CLOTHES), 16)
    for side in (-1, 1):
        canvas.rectangle(side * 0.24 - 0.17, side * 0.24 + 0.17, 0, 0.5, legs)
        canvas.fill(canvas.ellipse(side * 0.62, 0.62, 0.16, 0.2), top)
    canvas.fill(canvas.ellipse(0, 0.63, 0.58, 0.22), top)
    canvas.fill(canvas.ellipse(0, 0.92, 0.24, 0.085), skin)
    hair = draws.pick(((30, 24, 20), (90, 62, 40), (190, 160, 100), (130, 130, 130)))
    canvas.fill(canvas.ellipse(0, 0.945, 0.27, 0.06) & (canvas.y > 0.93), hair)


def _van(canvas: Cutout, draws: Draws, aspect: float) -> None:
    body = draws.tint(draws.pick(((210, 212, 214), (170, 40, 40), (40, 60, 120), (60, 62, 66), (214, 178, 60))), 12)
    canvas.rectangle(-1, 1, 0.16, 0.72, body)
    canvas.rectangle(-0.8, 0.85, 0.6, 1.0, body)
    canvas.rectangle(-0.72, 0.78, 0.62, 0.9, (42, 50, 58))
    for pillar in (-0.3, 0.2):
        canvas.rectangle(pillar - 0.03, pillar + 0.03, 0.6, 0.92, body)
    for wheel in (-0.62, 0.62):
        canvas.fill(canvas.ellipse(wheel, 0.16, 0.32 / aspect, 0.16), (26, 26, 28))


def _lamp(canvas: Cutout, draws: Draws, aspect: float) -> None:
    canvas.rectangle(-0.12, 0.12, 0, 0.9, (40, 44, 44))
    canvas.fill(canvas.ellipse(0, 0.94, 0.7, 0.06), (226, 220, 196))


def scaffold_pattern(look: int, x: Floats, z: Floats, height: float) -> tuple[Mask, Bytes]:
    """Poles every 2.2 m, boards every 2 m, netting over a part; metres from the lower left corner."""
    draws = Draws("scaffold", look)
    net_from, net_to = sorted((draws.real(0, height), draws.real(0, height)))
    canvas = Cutout(x, z)
    weave = ((x * 4).astype(np.int32) * 7 + (z * 4).astype(np.int32) * 3) % 8
    net = draws.pick(((86, 130, 92), (120, 140, 170), (214, 214, 206)))
    canvas.fill((z > net_from) & (z < net_to) & (weave > 0), draws.tint(net, 12))
    pole = x - (x * np.float32(1 / 2.2)).astype(np.int32) * np.float32(2.2) < 0.14
    board = z - (z * np.float32(0.5)).astype(np.int32) * np.float32(2) < 0.26
    canvas.fill(board, (146, 116, 80))
    canvas.fill(pole, (150, 152, 156))
    return canvas.mask, canvas.colour
