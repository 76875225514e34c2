"""Construct convex solids with textured faces.

Coordinates are in meters: x points to the right along the front of a building, y away from the viewer, and z upwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from superglobal.toy.numerics import Color, Vector, cosine, cross, dot, sine, unit
from superglobal.toy.texture import Texture

Polygon = tuple[Sequence[Vector], Texture | None, Color]
"""A face of a solid: its corners in clockwise or counterclockwise order, its texture or None, and its color.

The color is used if there is no texture.
"""


@dataclass(frozen=True)
class Face:
    """A face of a solid.

    The solid lies in the half-space of the points p with `normal . p <= offset`. The texture coordinates of a point p
    of the face are `(p . along - start[0], p . up - start[1])` in meters.

    Attributes:
        normal: unit vector that points out of the solid.
        offset: signed distance of the plane of the face from the origin, along `normal`, in meters.
        along: unit vector of the horizontal texture axis.
        up: unit vector of the vertical texture axis.
        start: offset of the texture coordinates in meters.
        texture: texture of the face, or None for a face of a single color.
        color: color of a face without a texture.
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
    """A convex solid: the intersection of the half-spaces of its faces.

    Attributes:
        faces: the faces.
        corners: the positions of the corners in meters.
        casts: whether the solid casts shadows on other solids.
    """

    faces: tuple[Face, ...]
    corners: tuple[Vector, ...]
    casts: bool = True


def solid(polygons: Sequence[Polygon], casts: bool = True) -> Solid:
    """Return the convex solid whose faces are `polygons`. It casts shadows on other solids if `casts` is True."""
    corners = tuple(dict.fromkeys(corner for points, _, _ in polygons for corner in points))
    total = len(corners)
    middle = (
        math.fsum(c[0] for c in corners) / total,
        math.fsum(c[1] for c in corners) / total,
        math.fsum(c[2] for c in corners) / total,
    )
    return Solid(tuple(_face(points, middle, texture, color) for points, texture, color in polygons), corners, casts)


def _face(points: Sequence[Vector], middle: Vector, texture: Texture | None, color: Color) -> Face:
    """Return the face with the corners `points`. The normal points away from `middle`, a point inside the solid."""
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
    """Return the corners of a horizontal regular polygon with center (x, y, z) and circumradius `radius`.

    A side of the polygon, not a corner, faces the front.
    """
    angles = [360 * (i + 0.5) / sides for i in range(sides)]
    return [(x + radius * sine(angle), y - radius * cosine(angle), z) for angle in angles]


def block(
    x: float, width: float, y: float, depth: float, z: float, height: float,
    front: Texture | None, side: Texture | None, color: Color, casts: bool = True,
) -> Solid:  # fmt: skip
    """Return a box centered at `x`, with its front at `y` and its bottom at `z`.

    Args:
        x: horizontal center of the box in meters.
        width: extent along x in meters.
        y: position of the front in meters.
        depth: extent along y in meters.
        z: height of the bottom in meters.
        height: extent along z in meters.
        front: texture of the front and the back; None for a single color.
        side: texture of the left and right sides; None for a single color.
        color: color of the top, the bottom, and the walls without a texture.
        casts: whether the box casts shadows on other solids.
    """
    x0, x1, y0, y1, z1 = x - width / 2, x + width / 2, y, y + depth, z + height
    walls: list[Polygon] = [(((x0, y, z), (x1, y, z), (x1, y, z1), (x0, y, z1)), front, color) for y in (y0, y1)]
    walls += [(((x, y0, z), (x, y1, z), (x, y1, z1), (x, y0, z1)), side, color) for x in (x0, x1)]
    lids = [(((x0, y0, h), (x1, y0, h), (x1, y1, h), (x0, y1, h)), None, color) for h in (z, z1)]
    return solid([*walls, *lids], casts)
