"""Draw facades. A facade is determined by the style of a group of landmarks, and by the layout of one wall."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from superglobal.toy.numerics import Color, RandomStream
from superglobal.toy.texture import TEXELS, Canvas, Texture, darker, whole_bytes


@dataclass(frozen=True)
class Style:
    """Architectural style, shared by a group of landmarks.

    Attributes:
        wall: color of the walls.
        second: second color of the walls, used for example for shutters and stripes.
        trim: color of frames, columns and moldings.
        roof: color of the roofs.
        glass: color of the windows.
        material: wall material, one of `MATERIALS`.
        windows: two window shapes from `OPENINGS`.
        between: element between the bays: "column", "pilaster" or "nothing".
        cornice: height of the cornice in meters.
        hood: whether rectangular windows have a hood.
        shutters: whether rectangular windows have shutters.
        forms: two building types from `FORMS`. Each landmark has one of them.
    """

    wall: Color
    second: Color
    trim: Color
    roof: Color
    glass: Color
    material: str
    windows: tuple[str, ...]
    between: str
    cornice: float
    hood: bool
    shutters: bool
    forms: tuple[str, ...]


WALLS: tuple[Color, ...] = (
    (214, 200, 170), (196, 170, 130), (156, 88, 70), (222, 184, 112), (208, 160, 146), (150, 148, 146),
    (226, 224, 216), (182, 192, 172), (122, 72, 62), (188, 128, 92), (168, 176, 188), (134, 120, 104),
)  # fmt: skip
ROOFS: tuple[Color, ...] = ((84, 88, 98), (164, 84, 60), (104, 156, 136), (120, 122, 124), (110, 84, 66))
MATERIALS = ("plaster", "plaster", "brick", "ashlar", "ashlar", "banded", "panel")
OPENINGS = ("rect", "rect", "arch", "arch", "pointed", "twin", "wide")
FORMS = ("palace", "church", "basilica", "tower", "townhall", "temple", "fort", "modern")


def draw_style(rng: RandomStream) -> Style:
    """Return a random architectural style."""
    wall = rng.tint(rng.choice(WALLS), 14)
    light = rng.chance(0.7)
    trim = (min(250.0, wall[0] + 30), min(248.0, wall[1] + 32), min(240.0, wall[2] + 34))
    first = rng.choice(OPENINGS)
    return Style(
        wall=wall,
        second=rng.tint(rng.choice(WALLS), 10),
        trim=trim if light else (wall[0] * 0.62, wall[1] * 0.6, wall[2] * 0.6),
        roof=rng.tint(rng.choice(ROOFS), 10),
        glass=rng.choice(((36, 44, 54), (52, 62, 70), (28, 30, 34), (64, 76, 92))),
        material=rng.choice(MATERIALS),
        windows=(first, rng.choice(OPENINGS)),
        between=rng.choice(("nothing", "nothing", "pilaster", "column")),
        cornice=rng.uniform(0.25, 0.7),
        hood=rng.chance(0.5),
        shutters=rng.chance(0.2),
        forms=(rng.choice(FORMS), rng.choice(FORMS)),
    )


@dataclass
class Layout:
    """Arrangement of the windows, doors and ornament of one wall.

    The layout distinguishes a building from other buildings of the same style.

    Attributes:
        bays: widths of the bays in meters, from left to right.
        floors: heights of the floors in meters, from bottom to top.
        windows: window shape of each floor, one of `OPENINGS`.
        slim: width of a window as a fraction of its bay.
        blank: (floor, bay) pairs without a window.
        doors: indices of the bays with a door on the ground floor.
        door: shape of the doors: "arch", "rect" or "pointed".
        arcade: whether the ground floor has arches instead of windows.
        ornament: "rose", "clock", "niche", "shield", "frieze", or "" for none.
        ornament_at: horizontal center, bottom and size of the ornament in meters.
    """

    bays: list[float]
    floors: list[float]
    windows: list[str]
    slim: float = 0.45
    blank: set[tuple[int, int]] = field(default_factory=set)
    doors: set[int] = field(default_factory=set)
    door: str = "arch"
    arcade: bool = False
    ornament: str = ""
    ornament_at: tuple[float, float, float] = (0.0, 0.0, 0.0)


def draw_layout(rng: RandomStream, style: Style, width: float, height: float, front: bool) -> Layout:
    """Return a random layout for a wall of `width` x `height` meters.

    Doors and an ornament are possible only if `front` is True.
    """
    floors = _split(rng, height, rng.uniform(3.0, 5.2))
    bays = _rhythm(rng, width, rng.uniform(2.2, 4.2))
    layout = Layout(bays, floors, [rng.choice(style.windows) for _ in floors], rng.uniform(0.36, 0.62))
    gap = rng.integer(2, 5)
    if rng.chance(0.4):
        layout.blank = {(f, b) for f in range(len(floors)) for b in range(len(bays)) if (f + b) % gap == 0}
    layout.arcade = rng.chance(0.25)
    if front:
        middle = len(bays) // 2
        layout.doors = rng.choice(({middle}, {middle}, {0}, {middle - 1, middle + 1} if len(bays) > 3 else {middle}))
        layout.door = rng.choice(("arch", "rect", "pointed"))
        layout.ornament = rng.choice(("", "rose", "clock", "niche", "shield", "frieze"))
        size = min(rng.uniform(2.2, 4.5), width * 0.35)
        layout.ornament_at = (
            width * rng.choice((0.5, 0.5, 0.5, 0.25, 0.75)),
            height - size - style.cornice - 0.6,
            size,
        )
    return layout


def _split(rng: RandomStream, total: float, size: float) -> list[float]:
    """Divide a height of `total` meters into floors of about `size` meters. One floor, chosen at random, may be taller.

    Returns:
        The heights of the floors in meters; they sum to `total`.
    """
    count = max(1, round(total / size))
    parts = [1.0] * count
    parts[rng.integer(0, count - 1)] = rng.choice((1.0, 1.3, 1.7))
    whole = math.fsum(parts)
    return [total * part / whole for part in parts]


def _rhythm(rng: RandomStream, total: float, size: float) -> list[float]:
    """Divide a width of `total` meters symmetrically into bays of about `size` meters.

    Two bays in mirrored positions, chosen at random, may be wider than the others.

    Returns:
        The widths of the bays in meters; they sum to `total`.
    """
    count = max(1, round(total / size))
    parts = [1.0] * count
    if count > 2 and rng.chance(0.6):
        wide, factor = rng.integer(0, count // 2), rng.uniform(1.3, 2.0)
        parts[wide] = parts[count - 1 - wide] = factor
    whole = math.fsum(parts)
    return [total * part / whole for part in parts]


def draw_facade(rng: RandomStream, style: Style, layout: Layout) -> Texture:
    """Draw the wall described by `style` and `layout`, and return its texture."""
    width, height = math.fsum(layout.bays), math.fsum(layout.floors)
    canvas = Canvas(width, height, style.wall)
    _lay_material(canvas, rng, style)
    canvas.band(0, width, 0, min(1.0, 0.08 * height), darker(style.wall, 0.7), 0.06)
    foot = 0.0
    for floor, tall in enumerate(layout.floors):
        _floor(canvas, rng, style, layout, floor, foot, tall)
        foot += tall
        canvas.band(0, width, foot - 0.18, foot, style.trim, 0.12)
    if style.between != "nothing":
        _verticals(canvas, style, layout.bays, height)
    _ornament(canvas, style, layout)
    _cornice(canvas, style)
    canvas.weather(rng, 0.16)
    return canvas.texture()


def _lay_material(canvas: Canvas, rng: RandomStream, style: Style) -> None:
    """Draw the bricks, stones or panels of the wall over the whole canvas. Plaster leaves the canvas unchanged."""
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
    hues = rng.bytes(64, 64)[row % 64, column % 64].astype(np.int32) * spread // 255 - spread // 2
    joints = (shifted - column * block < 1.01 / TEXELS) | (z - row * course < 1.01 / TEXELS)
    base = np.broadcast_to(np.asarray(whole_bytes(style.wall), np.int32), (rows, columns, 3))
    if style.material == "banded":
        base = np.where((row % 2 == 0)[..., None], base, np.asarray(whole_bytes(style.second), np.int32))
    canvas.color = np.clip(base + (hues - joints * joint)[..., None], 0, 255).astype(np.uint8)


def _floor(
    canvas: Canvas, rng: RandomStream, style: Style, layout: Layout, floor: int, foot: float, tall: float
) -> None:
    """Draw the windows, doors or arches of one floor.

    Args:
        canvas: canvas of the wall.
        rng: random number generator.
        style: style of the building.
        layout: layout of the wall.
        floor: index of the floor; 0 is the ground floor.
        foot: height of the bottom of the floor in meters.
        tall: height of the floor in meters.
    """
    left = 0.0
    for bay, wide in enumerate(layout.bays):
        middle = left + wide / 2
        left += wide
        if floor == 0 and bay in layout.doors:
            _door(canvas, style, layout.door, middle, min(wide * 0.8, 3.4), tall * 0.86)
        elif floor == 0 and layout.arcade:
            _opening(canvas, rng, style, "arch", middle, 0.0, wide * 0.74, tall * 0.84, -0.9)
        elif (floor, bay) not in layout.blank:
            kind = layout.windows[floor]
            width = wide * (0.84 if kind == "wide" else layout.slim)
            _opening(canvas, rng, style, kind, middle, foot + tall * 0.22, width, tall * 0.58, -0.28)


def _opening(
    canvas: Canvas,
    rng: RandomStream,
    style: Style,
    kind: str,
    x: float,
    z: float,
    width: float,
    height: float,
    deep: float,
) -> None:
    """Draw a window, with its frame, glass, bars, hood and shutters, or an arch of an arcade.

    Args:
        canvas: canvas of the wall.
        rng: random number generator.
        style: style of the building.
        kind: shape, one of `OPENINGS`.
        x: horizontal center in meters.
        z: height of the bottom in meters.
        width: width in meters.
        height: height in meters.
        deep: relief of the glass in meters, negative because the glass is recessed. A value below -0.5 means an arch
            of an arcade, which has no glass.
    """
    outline = "arch" if kind == "twin" else "rect" if kind == "wide" else kind
    if style.shutters and kind == "rect" and deep > -0.5:
        for side in (-1, 1):
            canvas.shape("rect", x + side * width * 0.72, z, width * 0.4, height, darker(style.second, 0.7), 0.06)
    canvas.shape(outline, x, z - 0.1, width + 0.44, height + 0.36, style.trim, 0.08)
    if style.hood and kind == "rect":
        canvas.shape("gable", x, z + height + 0.26, width + 0.9, 0.6, style.trim, 0.2)
    lit = 255 if rng.chance(0.55) else 0
    glass = style.glass if rng.chance(0.8) else darker(style.glass, 1.5)
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
    """Draw a door and its stepped frame at the bottom of the wall, with the horizontal center `x`.

    `kind` is the shape of the door; `width` and `height` include the frame.
    """
    for ring in range(3):
        shrink = 1 - 0.13 * ring
        shade = style.trim if ring % 2 == 0 else darker(style.trim, 0.75)
        canvas.shape(kind, x, 0, width * shrink, height * (1 - 0.06 * ring), shade, 0.1 - 0.2 * ring)
    canvas.shape(kind, x, 0, width * 0.6, height * 0.8, (70, 48, 34), -0.6)
    canvas.shape("rect", x, 0, 0.1, height * 0.7, (30, 22, 18), -0.6)


def _verticals(canvas: Canvas, style: Style, bays: Sequence[float], height: float) -> None:
    """Draw columns or pilasters, with bases and capitals, at the edges of the bays.

    `bays` are the widths of the bays, and `height` is the height of the wall, in meters.
    """
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
    """Draw the ornament of the layout.

    Draw nothing if the layout has no ornament, or if the bottom of the ornament is lower than 1.5 m.
    """
    x, z, size = layout.ornament_at
    if not layout.ornament or z < 1.5:
        return
    if layout.ornament == "rose":
        for share, color, relief in ((1.0, style.trim, 0.2), (0.86, style.glass, -0.3), (0.3, style.trim, 0.0)):
            canvas.shape("circle", x, z + size * (1 - share) / 2, size * share, size * share, color, relief)
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
        for share, color in ((1.0, style.trim), (0.84, (240, 236, 220)), (0.12, (40, 36, 34))):
            canvas.shape("circle", x, z + size * (1 - share) / 2, size * share, size * share, color, 0.2)
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
    """Draw a cornice along the top of the wall, and a row of small brackets below the cornice."""
    top, deep = canvas.height, style.cornice
    canvas.band(0, canvas.width, top - deep, top, style.trim, deep * 0.8)
    canvas.band(0, canvas.width, top - deep - 0.3, top - deep, darker(style.trim, 0.85), deep * 0.3)
    for step in range(int(canvas.width / 0.8)):
        canvas.band(0.2 + 0.8 * step, 0.6 + 0.8 * step, top - deep - 0.3, top - deep, style.trim, deep * 0.7)
