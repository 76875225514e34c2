"""Facades: what the landmarks of a style share, what is each building's own, and how a wall is put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from superglobal.toy.draws import Colour, Draws
from superglobal.toy.texture import TEXELS, Canvas, Texture, darker, whole_bytes


@dataclass(frozen=True)
class Style:
    """What the landmarks of one group have in common: material, colours, shapes of windows, mouldings."""

    wall: Colour
    second: Colour
    trim: Colour
    roof: Colour
    glass: Colour
    material: str
    windows: tuple[str, ...]
    between: str
    """What stands between the bays: "column", "pilaster" or "nothing"."""
    cornice: float
    hood: bool
    shutters: bool
    forms: tuple[str, ...]
    """Kinds of building, see landmark.py."""


WALLS: tuple[Colour, ...] = (
    (214, 200, 170), (196, 170, 130), (156, 88, 70), (222, 184, 112), (208, 160, 146), (150, 148, 146),
    (226, 224, 216), (182, 192, 172), (122, 72, 62), (188, 128, 92), (168, 176, 188), (134, 120, 104),
)  # fmt: skip
ROOFS: tuple[Colour, ...] = ((84, 88, 98), (164, 84, 60), (104, 156, 136), (120, 122, 124), (110, 84, 66))
MATERIALS = ("plaster", "plaster", "brick", "ashlar", "ashlar", "banded", "panel")
OPENINGS = ("rect", "rect", "arch", "arch", "pointed", "twin", "wide")
FORMS = ("palace", "church", "basilica", "tower", "townhall", "temple", "fort", "modern")


def draw_style(draws: Draws) -> Style:
    wall = draws.tint(draws.pick(WALLS), 14)
    light = draws.chance(0.7)
    trim = (min(250.0, wall[0] + 30), min(248.0, wall[1] + 32), min(240.0, wall[2] + 34))
    first = draws.pick(OPENINGS)
    return Style(
        wall=wall,
        second=draws.tint(draws.pick(WALLS), 10),
        trim=trim if light else (wall[0] * 0.62, wall[1] * 0.6, wall[2] * 0.6),
        roof=draws.tint(draws.pick(ROOFS), 10),
        glass=draws.pick(((36, 44, 54), (52, 62, 70), (28, 30, 34), (64, 76, 92))),
        material=draws.pick(MATERIALS),
        windows=(first, draws.pick(OPENINGS)),
        between=draws.pick(("nothing", "nothing", "pilaster", "column")),
        cornice=draws.real(0.25, 0.7),
        hood=draws.chance(0.5),
        shutters=draws.chance(0.2),
        forms=(draws.pick(FORMS), draws.pick(FORMS)),
    )


@dataclass
class Layout:
    """What makes one building differ from the others of its style."""

    bays: list[float]
    """Widths in metres, from the left."""
    floors: list[float]
    """Heights in metres, from the ground."""
    windows: list[str]
    """Kind per floor."""
    slim: float = 0.45
    """Share of a bay that its window takes."""
    blank: set[tuple[int, int]] = field(default_factory=set)
    """(floor, bay) without a window."""
    doors: set[int] = field(default_factory=set)
    door: str = "arch"
    arcade: bool = False
    ornament: str = ""
    ornament_at: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Middle, foot and size in metres."""


def draw_layout(draws: Draws, style: Style, width: float, height: float, front: bool) -> Layout:
    floors = _split(draws, height, draws.real(3.0, 5.2))
    bays = _rhythm(draws, width, draws.real(2.2, 4.2))
    layout = Layout(bays, floors, [draws.pick(style.windows) for _ in floors], draws.real(0.36, 0.62))
    gap = draws.whole(2, 5)
    if draws.chance(0.4):
        layout.blank = {(f, b) for f in range(len(floors)) for b in range(len(bays)) if (f + b) % gap == 0}
    layout.arcade = draws.chance(0.25)
    if front:
        middle = len(bays) // 2
        layout.doors = draws.pick(({middle}, {middle}, {0}, {middle - 1, middle + 1} if len(bays) > 3 else {middle}))
        layout.door = draws.pick(("arch", "rect", "pointed"))
        layout.ornament = draws.pick(("", "rose", "clock", "niche", "shield", "frieze"))
        size = min(draws.real(2.2, 4.5), width * 0.35)
        layout.ornament_at = (
            width * draws.pick((0.5, 0.5, 0.5, 0.25, 0.75)),
            height - size - style.cornice - 0.6,
            size,
        )
    return layout


def _split(draws: Draws, total: float, size: float) -> list[float]:
    """`total` metres in floors of about `size`, of which one may be taller."""
    count = max(1, round(total / size))
    parts = [1.0] * count
    parts[draws.whole(0, count - 1)] = draws.pick((1.0, 1.3, 1.7))
    whole = math.fsum(parts)
    return [total * part / whole for part in parts]


def _rhythm(draws: Draws, total: float, size: float) -> list[float]:
    """Bays mirrored about the middle, some wider."""
    count = max(1, round(total / size))
    parts = [1.0] * count
    if count > 2 and draws.chance(0.6):
        wide, factor = draws.whole(0, count // 2), draws.real(1.3, 2.0)
        parts[wide] = parts[count - 1 - wide] = factor
    whole = math.fsum(parts)
    return [total * part / whole for part in parts]


def draw_facade(draws: Draws, style: Style, layout: Layout) -> Texture:
    """The whole wall: material, floors of windows, mouldings, doors, ornament."""
    width, height = math.fsum(layout.bays), math.fsum(layout.floors)
    canvas = Canvas(width, height, style.wall)
    _lay_material(canvas, draws, style)
    canvas.band(0, width, 0, min(1.0, 0.08 * height), darker(style.wall, 0.7), 0.06)
    foot = 0.0
    for floor, tall in enumerate(layout.floors):
        _floor(canvas, draws, style, layout, floor, foot, tall)
        foot += tall
        canvas.band(0, width, foot - 0.18, foot, style.trim, 0.12)
    if style.between != "nothing":
        _verticals(canvas, style, layout.bays, height)
    _ornament(canvas, style, layout)
    _cornice(canvas, style)
    canvas.weather(draws, 0.16)
    return canvas.texture()


def _lay_material(canvas: Canvas, draws: Draws, style: Style) -> None:
    block, course, joint, spread = {
        "plaster": (0.0, 0.0, 0, 0),
        "brick": (0.5, 0.25, 26, 44),
        "ashlar": (1.3, 0.62, 30, 26),
        "banded": (1.6, 0.8, 14, 12),
        "panel": (3.0, 1.5, 40, 16),
    }[style.material]
    if not block:
        return
    rows, columns = canvas.relief.shape
    z, x = np.arange(rows)[:, None] / TEXELS, np.arange(columns)[None, :] / TEXELS
    row = (z / course).astype(np.int64)
    shifted = x + (row % 2) * (0 if style.material == "panel" else block / 2)
    column = (shifted / block).astype(np.int64)
    hues = draws.bytes(64, 64)[row % 64, column % 64].astype(np.int32) * spread // 255 - spread // 2
    joints = (shifted - column * block < 1.01 / TEXELS) | (z - row * course < 1.01 / TEXELS)
    base = np.broadcast_to(np.asarray(whole_bytes(style.wall), np.int32), (rows, columns, 3))
    if style.material == "banded":
        base = np.where((row % 2 == 0)[..., None], base, np.asarray(whole_bytes(style.second), np.int32))
    canvas.colour = np.clip(base + (hues - joints * joint)[..., None], 0, 255).astype(np.uint8)


def _floor(canvas: Canvas, draws: Draws, style: Style, layout: Layout, floor: int, foot: float, tall: float) -> None:
    left = 0.0
    for bay, wide in enumerate(layout.bays):
        middle = left + wide / 2
        left += wide
        if floor == 0 and bay in layout.doors:
            _door(canvas, style, layout.door, middle, min(wide * 0.8, 3.4), tall * 0.86)
        elif floor == 0 and layout.arcade:
            _opening(canvas, draws, style, "arch", middle, 0.0, wide * 0.74, tall * 0.84, -0.9)
        elif (floor, bay) not in layout.blank:
            kind = layout.windows[floor]
            width = wide * (0.84 if kind == "wide" else layout.slim)
            _opening(canvas, draws, style, kind, middle, foot + tall * 0.22, width, tall * 0.58, -0.28)


def _opening(
    canvas: Canvas, draws: Draws, style: Style, kind: str, x: float, z: float, width: float, height: float, deep: float
) -> None:
    """A window or arcade arch with surround, glass, bars, and sometimes hood or shutters."""
    outline = "arch" if kind == "twin" else "rect" if kind == "wide" else kind
    if style.shutters and kind == "rect" and deep > -0.5:
        for side in (-1, 1):
            canvas.shape("rect", x + side * width * 0.72, z, width * 0.4, height, darker(style.second, 0.7), 0.06)
    canvas.shape(outline, x, z - 0.1, width + 0.44, height + 0.36, style.trim, 0.08)
    if style.hood and kind == "rect":
        canvas.shape("gable", x, z + height + 0.26, width + 0.9, 0.6, style.trim, 0.2)
    lit = 255 if draws.chance(0.55) else 0
    glass = style.glass if draws.chance(0.8) else darker(style.glass, 1.5)
    canvas.shape(outline, x, z, width, height, darker(style.glass, 0.5) if deep < -0.5 else glass, deep, lit)
    if deep < -0.5:
        return
    bar = style.trim if kind != "wide" else darker(style.wall, 0.5)
    if kind == "twin":
        canvas.shape("rect", x, z, 0.2, height * 0.8, style.trim, 0.0)
        canvas.shape("circle", x, z + height - width * 0.5, width * 0.3, width * 0.3, style.trim, 0.0)
    else:
        for step in range(1, max(2, round(width / 0.9))):
            canvas.shape(
                "rect", x - width / 2 + step * width / max(2, round(width / 0.9)), z, 0.09, height * 0.9, bar, deep / 2
            )
    canvas.band(x - width * 0.49, x + width * 0.49, z + height * 0.55, z + height * 0.55 + 0.08, bar, deep / 2)
    canvas.band(x - width / 2 - 0.25, x + width / 2 + 0.25, z - 0.2, z, style.trim, 0.2)


def _door(canvas: Canvas, style: Style, kind: str, x: float, width: float, height: float) -> None:
    for ring in range(3):
        shrink = 1 - 0.13 * ring
        shade = style.trim if ring % 2 == 0 else darker(style.trim, 0.75)
        canvas.shape(kind, x, 0, width * shrink, height * (1 - 0.06 * ring), shade, 0.1 - 0.2 * ring)
    canvas.shape(kind, x, 0, width * 0.6, height * 0.8, (70, 48, 34), -0.6)
    canvas.shape("rect", x, 0, 0.1, height * 0.7, (30, 22, 18), -0.6)


def _verticals(canvas: Canvas, style: Style, bays: Sequence[float], height: float) -> None:
    """Columns or pilasters at the edges of the bays, with base and capital."""
    half = 0.3 if style.between == "column" else 0.24
    top = height - style.cornice - 0.3
    edges = [math.fsum(bays[:i]) for i in range(len(bays) + 1)]
    for edge in edges:
        x = min(max(edge, half + 0.05), canvas.width - half - 0.05)
        canvas.band(x - half, x + half, 0.0, top, style.trim, 0.14)
        if style.between == "column":
            canvas.round_off(x - half, x + half, 0.0, top, 0.4)
        canvas.band(x - half - 0.12, x + half + 0.12, 0.0, 0.6, style.trim, 0.3)
        canvas.band(x - half - 0.12, x + half + 0.12, top - 0.5, top, style.trim, 0.34)


def _ornament(canvas: Canvas, style: Style, layout: Layout) -> None:
    x, z, size = layout.ornament_at
    if not layout.ornament or z < 1.5:
        return
    if layout.ornament == "rose":
        for share, colour, relief in ((1.0, style.trim, 0.2), (0.86, style.glass, -0.3), (0.3, style.trim, 0.0)):
            canvas.shape("circle", x, z + size * (1 - share) / 2, size * share, size * share, colour, relief)
        for angle in range(8):
            dx, dz = (
                (0.31, 0),
                (0.22, 0.22),
                (0, 0.31),
                (-0.22, 0.22),
                (-0.31, 0),
                (-0.22, -0.22),
                (0, -0.31),
                (0.22, -0.22),
            )[angle]
            part = size * 0.18
            canvas.shape("circle", x + dx * size, z + (0.5 + dz) * size - part / 2, part, part, style.trim, 0.0)
    elif layout.ornament == "clock":
        for share, colour in ((1.0, style.trim), (0.84, (240, 236, 220)), (0.12, (40, 36, 34))):
            canvas.shape("circle", x, z + size * (1 - share) / 2, size * share, size * share, colour, 0.2)
        canvas.band(x - 0.08, x + 0.08, z + size * 0.5, z + size * 0.86, (40, 36, 34), 0.2)
        canvas.band(x, x + size * 0.28, z + size * 0.46, z + size * 0.54, (40, 36, 34), 0.2)
    elif layout.ornament == "niche":
        canvas.shape("arch", x, z, size * 0.5, size, darker(style.wall, 0.55), -0.5)
        canvas.shape("rect", x, z, size * 0.2, size * 0.6, style.trim, -0.1)
        canvas.shape("circle", x, z + size * 0.58, size * 0.18, size * 0.18, style.trim, -0.1)
    elif layout.ornament == "shield":
        canvas.shape("rect", x, z + size * 0.3, size * 0.7, size * 0.6, style.second, 0.25)
        canvas.shape("rect", x, z + size * 0.3, size * 0.2, size * 0.6, style.trim, 0.28)
    else:
        canvas.band(0.4, canvas.width - 0.4, z + size * 0.5, z + size * 0.9, darker(style.second, 0.9), 0.1)
        for step in range(int(canvas.width / 1.2)):
            canvas.shape("circle", 0.9 + 1.2 * step, z + size * 0.5, size * 0.36, size * 0.36, style.trim, 0.2)


def _cornice(canvas: Canvas, style: Style) -> None:
    top, deep = canvas.height, style.cornice
    canvas.band(0, canvas.width, top - deep, top, style.trim, deep * 0.8)
    canvas.band(0, canvas.width, top - deep - 0.3, top - deep, darker(style.trim, 0.85), deep * 0.3)
    for step in range(int(canvas.width / 0.8)):
        canvas.band(0.2 + 0.8 * step, 0.6 + 0.8 * step, top - deep - 0.3, top - deep, style.trim, deep * 0.7)
