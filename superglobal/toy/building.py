"""Construct random buildings of eight types (palace, church, ...) from convex solids.

The front of a building is near y = 0, and its floor plan is centered at x = 0. All lengths are in meters.
"""

from __future__ import annotations

import itertools

from superglobal.toy.facade import Style, draw_facade, draw_layout
from superglobal.toy.numerics import RandomStream, sine
from superglobal.toy.solids import Polygon, Solid, block, ring, solid
from superglobal.toy.texture import Texture


class Builder:
    """Builder that assembles one building from boxes, roofs, towers, columns and domes.

    Each method except `wall` adds one element, or one whole building, to `solids`.

    Args:
        rng: random number generator.
        style: style of the building.
        roof: texture of the roofs.

    Attributes:
        solids: the solids added so far.
    """

    def __init__(self, rng: RandomStream, style: Style, roof: Texture) -> None:
        self.rng, self.style, self.roof = rng, style, roof
        self.solids: list[Solid] = []

    def wall(self, width: float, height: float, front: bool = False) -> Texture:
        """Draw a random wall and return its texture.

        Args:
            width: width of the wall in meters.
            height: height of the wall in meters.
            front: whether the wall can have doors and an ornament.
        """
        layout = draw_layout(self.rng, self.style, width, height, front)
        return draw_facade(self.rng, self.style, layout)

    def box(self, x: float, width: float, y: float, depth: float, z: float, height: float, front: bool = False) -> None:
        """Add a box with random walls, centered at `x`, with its front at `y` and its bottom at `z`.

        If `front` is True, the front and back walls can have doors and an ornament.
        """
        face = self.wall(width, height, front)
        side = self.wall(depth, height)
        self.solids.append(block(x, width, y, depth, z, height, face, side, self.style.roof))

    def ridge(
        self, x: float, width: float, y: float, depth: float, z: float, rise: float, hip: float, turn: bool
    ) -> None:
        """Add a gable roof or a hipped roof on the box centered at `x` with its front at `y`.

        Args:
            x: horizontal center of the box.
            width: width of the box along x.
            y: position of the front of the box.
            depth: depth of the box along y.
            z: height of the eaves above the ground.
            rise: height of the ridge above the eaves.
            hip: horizontal distance between an end of the ridge and the nearest eaves; 0 for a gable roof.
            turn: whether the ridge is parallel to the y axis instead of the x axis.
        """
        x0, x1, y0, y1, top = x - width / 2 - 0.4, x + width / 2 + 0.4, y - 0.4, y + depth + 0.4, z + rise
        a, b, c, d = (x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)
        if turn:
            e, f = (x, y0 + hip, top), (x, y1 - hip, top)
            slopes, ends = [(a, d, f, e), (b, c, f, e)], [(a, b, e), (c, d, f)]
        else:
            e, f = (x0 + hip, (y0 + y1) / 2, top), (x1 - hip, (y0 + y1) / 2, top)
            slopes, ends = [(a, b, f, e), (d, c, f, e)], [(a, d, e), (b, c, f)]
        end = self.roof if hip else None
        faces: list[Polygon] = [(points, self.roof, self.style.roof) for points in slopes]
        faces += [(points, end, self.style.roof if hip else self.style.trim) for points in ends]
        self.solids.append(solid([*faces, ((a, b, c, d), None, self.style.trim)]))

    def spire(self, x: float, y: float, radius: float, z: float, rise: float, sides: int) -> None:
        """Add a pyramid of height `rise`. Its base is a regular polygon with center (x, y, z) and `sides` sides."""
        base = ring(x, y, radius, z, sides)
        faces = [((base[i - 1], base[i], (x, y, z + rise)), self.roof, self.style.roof) for i in range(sides)]
        self.solids.append(solid([*faces, (base, None, self.style.roof)]))

    def prism(self, x: float, y: float, radius: float, z: float, height: float, sides: int, thin: bool = False) -> None:
        """Add an upright prism. Its base is a regular polygon with center (x, y, z) and `sides` sides.

        If `thin` is False, the faces have windows. If it is True, the prism is a plain column that casts no shadow.
        """
        low, high = ring(x, y, radius, z, sides), ring(x, y, radius, z + height, sides)
        texture = None if thin else self.wall(2 * radius * sine(180 / sides), height)
        color = self.style.trim
        faces = [((low[i - 1], low[i], high[i], high[i - 1]), texture, color) for i in range(sides)]
        self.solids.append(solid([*faces, (low, None, color), (high, None, color)], casts=not thin))

    def dome(self, x: float, y: float, radius: float, z: float, rise: float) -> None:
        """Add a dome of three decagonal frustums, with a lantern on top. The center of its base is (x, y, z)."""
        levels = [(0.0, 1.0), (0.45, 0.92), (0.78, 0.68), (1.0, 0.14)]
        for (low, wide), (high, narrow) in itertools.pairwise(levels):
            a, b = ring(x, y, radius * wide, z + rise * low, 10), ring(x, y, radius * narrow, z + rise * high, 10)
            faces = [((a[i - 1], a[i], b[i], b[i - 1]), self.roof, self.style.roof) for i in range(10)]
            self.solids.append(solid([*faces, (a, None, self.style.roof), (b, None, self.style.roof)]))
        self.prism(x, y, radius * 0.14, z + rise, rise * 0.3, 6, thin=True)

    def portico(self, x: float, width: float, height: float, deep: float) -> None:
        """Add a portico in front of the building: a row of columns that carries a pediment.

        Args:
            x: horizontal center of the portico.
            width: width of the portico.
            height: height of the columns.
            deep: distance by which the portico projects from the building.
        """
        count, radius = self.rng.choice((4, 4, 6, 8)), min(0.55, width / 22)
        for i in range(count):
            at = x - width / 2 + radius + (width - 2 * radius) * i / (count - 1)
            self.prism(at, -deep + radius, radius, 0, height, 8, thin=True)
        trim = self.style.trim
        self.solids.append(block(x, width + 0.6, -deep - 0.2, deep + 0.2, height, 1.2, None, None, trim))
        self.ridge(x, width + 0.2, -deep - 0.1, deep + 0.1, height + 1.2, width * self.rng.uniform(0.14, 0.24), 0, True)

    def top(self, x: float, width: float, y: float, depth: float, z: float) -> None:
        """Add a random roof, which may be flat, at height `z` to the box centered at `x` with its front at `y`."""
        kind, rise = (
            self.rng.choice(("hip", "hip", "gable", "flat")),
            self.rng.uniform(2.0, 0.34 * min(width, depth) + 2.5),
        )
        if kind != "flat":
            turn = depth > width
            self.ridge(x, width, y, depth, z, rise, 0.45 * min(width, depth) if kind == "hip" else 0, turn)

    def turret(self, x: float, y: float, side: float, height: float, z: float = 0.0) -> None:
        """Add a square or octagonal tower with a random cap.

        The base has the center (x, y, z) and is about `side` wide.
        """
        if self.rng.chance(0.65):
            self.box(x, side, y - side / 2, side, z, height)
            corners = 4
        else:
            self.prism(x, y, side * 0.54, z, height, 8)
            corners = 8
        cap = self.rng.choice(("spire", "spire", "low", "dome", "flat"))
        radius = side * (0.74 if corners == 4 else 0.58)
        if cap in ("spire", "low"):
            self.spire(
                x, y, radius, z + height, side * (self.rng.uniform(1.4, 2.6) if cap == "spire" else 0.6), corners
            )
        elif cap == "dome":
            self.dome(x, y, side * 0.5, z + height, side * self.rng.uniform(0.5, 0.8))

    def palace(self) -> None:
        """Add a palace: a wide box with a roof, often with a projecting center, a portico, turrets or pavilions."""
        rng = self.rng
        width, depth, height = rng.uniform(20, 36), rng.uniform(10, 16), rng.uniform(10, 18)
        self.box(0, width, 0, depth, 0, height, front=True)
        self.top(0, width, 0, depth, height)
        plan = rng.choice(("plain", "risalit", "portico", "turrets", "pavilions"))
        if plan == "risalit":
            self.box(0, width * 0.3, -1.6, 6, 0, height * rng.uniform(1.05, 1.3), front=True)
        elif plan == "portico":
            self.portico(rng.choice((0.0, 0.0, width * 0.2)), width * 0.4, height * 0.6, 3.5)
        elif plan == "turrets":
            for side in (-1, 1):
                self.turret(side * width / 2, 2.0, rng.uniform(3.5, 5), height * 1.25)
        elif plan == "pavilions":
            for side in (-1, 1):
                self.box(side * width * 0.5, width * 0.24, -1.5, depth, 0, height * 0.8, front=False)
                self.top(side * width * 0.5, width * 0.24, -1.5, depth, height * 0.8)

    def church(self) -> None:
        """Add a church: a nave with a gable roof and up to two towers."""
        rng = self.rng
        width, depth, height = rng.uniform(11, 18), rng.uniform(20, 32), rng.uniform(10, 17)
        self.box(0, width, 0, depth, 0, height, front=True)
        self.ridge(0, width, 0, depth, height, width * rng.uniform(0.4, 0.75), 0, True)
        plan, side = rng.choice(("twin", "left", "right", "middle", "none")), rng.uniform(4.5, 6.5)
        if plan == "twin":
            rise = rng.uniform(1.3, 1.9)
            for sign in (-1, 1):
                self.turret(sign * (width / 2 + side * 0.3), side / 2 - 0.5, side, height * rise)
        elif plan != "none":
            x = {"left": -width / 2 - side * 0.4, "right": width / 2 + side * 0.4, "middle": 0.0}[plan]
            self.turret(x, side / 2 - (1.0 if plan == "middle" else -2.0), side, height * rng.uniform(1.5, 2.2))

    def basilica(self) -> None:
        """Add a basilica: a box with a dome, often with a portico or two towers."""
        rng = self.rng
        width, depth, height = rng.uniform(18, 28), rng.uniform(18, 26), rng.uniform(10, 14)
        self.box(0, width, 0, depth, 0, height, front=True)
        radius, x = rng.uniform(4.5, 7.5), rng.choice((0.0, 0.0, width * 0.2, -width * 0.2))
        drum = rng.uniform(2.5, 6)
        self.prism(x, depth * 0.45, radius, height, drum, 10)
        self.dome(x, depth * 0.45, radius * 1.04, height + drum, radius * rng.uniform(0.8, 1.3))
        if rng.chance(0.6):
            self.portico(0, width * rng.uniform(0.4, 0.7), height * 0.66, 4.0)
        if rng.chance(0.45):
            for sign in (-1, 1):
                self.turret(sign * width * 0.45, 2.5, 4.0, height * rng.uniform(1.3, 1.7))

    def tower(self) -> None:
        """Add a tower with two to four stages, each narrower than the one below, and often a side wing."""
        rng = self.rng
        side, height, stages = rng.uniform(7, 11), rng.uniform(24, 40), rng.integer(2, 4)
        foot = 0.0
        for stage in range(stages):
            tall, wide = height / stages, side * (1 - 0.13 * stage)
            self.box(0, wide, (side - wide) / 2, wide, foot, tall, front=stage in (0, stages - 1))
            foot += tall
        cap, wide = rng.choice(("spire", "dome", "flat", "low")), side * (1 - 0.13 * (stages - 1))
        if cap == "dome":
            self.dome(0, side / 2, wide * 0.5, foot, wide * 0.6)
        elif cap != "flat":
            self.spire(0, side / 2, wide * 0.76, foot, wide * (1.8 if cap == "spire" else 0.6), 4)
        if rng.chance(0.6):
            wing, low = rng.uniform(8, 16), rng.uniform(7, 11)
            x = rng.choice((-1, 1)) * (side / 2 + wing / 2)
            self.box(x, wing, 1.0, side, 0, low)
            self.top(x, wing, 1.0, side, low)

    def townhall(self) -> None:
        """Add a town hall: a box with a roof and a tower, often with dormers."""
        rng = self.rng
        width, depth, height = rng.uniform(18, 30), rng.uniform(9, 14), rng.uniform(10, 16)
        self.box(0, width, 0, depth, 0, height, front=True)
        self.ridge(0, width, 0, depth, height, rng.uniform(4, 8), rng.choice((0.0, 3.0)), False)
        self.turret(
            width * rng.choice((0.0, 0.0, -0.3, 0.3, 0.42)), 2.2, rng.uniform(4.5, 6.5), height * rng.uniform(1.4, 2.3)
        )
        if rng.chance(0.5):
            for step in range(rng.integer(2, 4)):
                x = width * (-0.36 + 0.24 * step)
                self.box(x, 3.0, -0.3, 3.0, height, 2.2)
                self.ridge(x, 3.0, -0.3, 3.4, height + 2.2, 2.4, 0, True)

    def temple(self) -> None:
        """Add a temple: a box behind a portico, often with side wings or a dome."""
        rng = self.rng
        width, depth, height = rng.uniform(14, 26), rng.uniform(16, 26), rng.uniform(8, 12)
        self.box(0, width * 0.88, 0, depth, 0, height, front=True)
        self.portico(0, width, height - 1.2, 4.0)
        self.ridge(0, width, 0, depth, height, width * 0.2, 0, True)
        if rng.chance(0.5):
            for sign in (-1, 1):
                wing = rng.uniform(5, 9)
                self.box(sign * (width * 0.44 + wing / 2), wing, 3, depth * 0.6, 0, height * 0.7)
        if rng.chance(0.3):
            self.prism(0, depth / 2, width * 0.22, height + 1, 4, 8)
            self.dome(0, depth / 2, width * 0.23, height + 5, width * 0.2)

    def fort(self) -> None:
        """Add a fort: a box with battlements and corner towers, often with a keep."""
        rng = self.rng
        width, depth, height = rng.uniform(22, 34), rng.uniform(14, 22), rng.uniform(8, 14)
        self.box(0, width, 0, depth, 0, height, front=True)
        side, rise = rng.uniform(4.5, 7), rng.uniform(1.1, 1.6)
        for sign in (-1, 1):
            self.turret(sign * width / 2, 1.0, side * rng.choice((1.0, 1.0, 1.3)), height * rise)
        if rng.chance(0.6):
            self.turret(rng.uniform(-0.2, 0.2) * width, depth * 0.5, side * 1.3, height * rng.uniform(1.5, 2.1))
        for step in range(int(width / 2.6)):
            x = -width / 2 + 1.6 + 2.6 * step
            self.solids.append(block(x, 1.3, -0.1, 0.8, height, 1.1, None, None, self.style.wall, casts=False))

    def modern(self) -> None:
        """Add a modern building: two or three stacked boxes with flat roofs, often with a tower."""
        rng = self.rng
        z, width, depth = 0.0, rng.uniform(16, 30), rng.uniform(12, 18)
        for level in range(rng.integer(2, 3)):
            tall = rng.uniform(5, 10)
            self.box(rng.uniform(-3, 3), width, rng.uniform(-1, 2), depth, z, tall, front=level == 0)
            z += tall
            width, depth = width * rng.uniform(0.6, 1.05), depth * rng.uniform(0.75, 1.0)
        if rng.chance(0.5):
            self.turret(rng.uniform(-0.4, 0.4) * width, 3, rng.uniform(3, 5), z * rng.uniform(1.1, 1.7))
