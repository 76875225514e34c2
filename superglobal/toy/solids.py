"""Represent convex solids with textured faces.

Coordinates are in meters: x points to the right along the front of a building, y away from the viewer, and z upwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from superglobal.toy.numerics import Color, Vector, cosine, cross, dot, sine, unit
from superglobal.toy.texture import Texture

Polygon = tuple[Sequence[Vector], Texture | None, Color]
"""Corners in clockwise or counterclockwise order, texture, and the color of a face without a texture."""


@dataclass(frozen=True)
class Face:
    """A face of a solid, which lies in the half-space `normal . p <= offset`.

    A point p has the texture coordinates (p . along - start[0], p . up - start[1]) in meters.

    Attributes:
        normal: unit vector that points out of the solid.
        offset: distance of the plane from the origin along `normal`, in meters.
        along: unit vector of the horizontal texture axis.
        up: unit vector of the vertical texture axis.
        start: origin of the texture coordinates.
        texture: texture, or None for a plain face.
        color: color of a plain face.
    """

    normal: Vector
    offset: float
    along: Vector
    up: Vector
    start: tuple[float, float]
    texture: Texture | None
    color: Color


@dataclass(frozen=True)
class Solid:
    """A convex solid, the intersection of the half-spaces of its faces.

    Attributes:
        faces: the faces.
        corners: the corners.
        casts: whether it casts shadows on other solids.
    """

    faces: tuple[Face, ...]
    corners: tuple[Vector, ...]
    casts: bool = True


def solid(polygons: Sequence[Polygon], casts: bool = True) -> Solid:
    """Return the convex solid bounded by `polygons`."""
    corners = tuple(dict.fromkeys(corner for points, _, _ in polygons for corner in points))
    total = len(corners)
    middle = (
        math.fsum(c[0] for c in corners) / total,
        math.fsum(c[1] for c in corners) / total,
        math.fsum(c[2] for c in corners) / total,
    )
    return Solid(tuple(_face(points, middle, texture, color) for points, texture, color in polygons), corners, casts)


def _face(points: Sequence[Vector], middle: Vector, texture: Texture | None, color: Color) -> Face:
    """Return the face through `points`, whose normal points away from `middle`."""
    a, b, c = points[:3]
    normal = unit(cross((b[0] - a[0], b[1] - a[1], b[2] - a[2]), (c[0] - a[0], c[1] - a[1], c[2] - a[2])))
    if dot(normal, middle) > dot(normal, a):
        normal = (-normal[0], -normal[1], -normal[2])
    flat = abs(normal[0]) + abs(normal[1]) < 1e-6
    along = (1.0, 0.0, 0.0) if flat else unit(cross((0.0, 0.0, 1.0), normal))
    up = cross(normal, along)
    start = (min(dot(p, along) for p in points), min(dot(p, up) for p in points))
    return Face(normal, dot(normal, a), along, up, start, texture, color)


def ring(x: float, y: float, radius: float, z: float, sides: int) -> list[Vector]:
    """Return the corners of a horizontal regular polygon, which has a side and not a corner at the front."""
    angles = [360 * (i + 0.5) / sides for i in range(sides)]
    return [(x + radius * sine(angle), y - radius * cosine(angle), z) for angle in angles]


def block(
    x: float, width: float, y: float, depth: float, z: float, height: float,
    front: Texture | None, side: Texture | None, color: Color, casts: bool = True,
) -> Solid:  # fmt: skip
    """Return a box centered at `x`, with its front at `y` and its bottom at `z`. The back looks like the front."""
    x0, x1, y0, y1, z1 = x - width / 2, x + width / 2, y, y + depth, z + height
    walls: list[Polygon] = [(((x0, y, z), (x1, y, z), (x1, y, z1), (x0, y, z1)), front, color) for y in (y0, y1)]
    walls += [(((x, y0, z), (x, y1, z), (x, y1, z1), (x, y0, z1)), side, color) for x in (x0, x1)]
    lids = [(((x0, y0, h), (x1, y0, h), (x1, y1, h), (x0, y1, h)), None, color) for h in (z, z1)]
    return solid([*walls, *lids], casts)
