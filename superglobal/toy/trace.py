"""Trace the rays of an image: intersect them with the ground and the solids, then add the occluders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from superglobal.toy.landmark import Landmark
from superglobal.toy.numerics import Bytes, Floats, Vector, dot
from superglobal.toy.solids import Face, Solid
from superglobal.toy.sprites import draw_sprite, scaffold_pattern
from superglobal.toy.view import Camera, Occluder, View

SKY, GROUND, FIRST = -1, 0, 1
SPRITE = 32_000
SUPER = 2  # rays per pixel in each direction
NEAR = 0.3  # minimum depth in meters
FAR = 1e6  # depth of the sky in meters


@dataclass
class Trace:
    """Intersections of the rays with the scene.

    Attributes:
        xs: (w,) horizontal positions of the rays in pixels.
        ys: (h,) vertical positions of the rays in pixels.
        ray: x, y and z of the directions, (h, w) each, scaled to length 1 along the optical axis.
        depth: (h, w) distance along the optical axis in meters.
        surface: (h, w) surface that is hit: SKY, GROUND, FIRST + index into `faces`, or SPRITE.
        paint: (h, w, 3) colors where the surface is SPRITE.
        faces: faces of all solids.
    """

    xs: Floats
    ys: Floats
    ray: tuple[Floats, Floats, Floats]
    depth: Floats
    surface: NDArray[np.int16]
    paint: Bytes
    faces: list[Face]


def sample_positions(size: int) -> Floats:
    """Return the positions of the rays along a side of `size` pixels, (size * SUPER,), in pixels."""
    return (np.arange(size * SUPER, dtype=np.float32) + np.float32(0.5)) * np.float32(1 / SUPER)


def cast(camera: Camera, xs: Floats, ys: Floats, solids: Sequence[Solid]) -> Trace:
    """Intersect the rays through the positions `xs` and `ys` with the sky, the ground and the solids."""
    across = ((xs - np.float32(camera.cx)) * np.float32(1 / camera.focal))[None, :]
    above = ((np.float32(camera.cy) - ys) * np.float32(1 / camera.focal))[:, None]
    x, y, z = (
        (np.float32(f) + np.float32(r) * across) + np.float32(u) * above
        for f, r, u in zip(camera.forward, camera.right, camera.up, strict=True)
    )
    down = z < -1e-4
    depth = np.where(down, np.float32(camera.eye[2]) / np.where(down, -z, np.float32(1)), np.float32(FAR))
    surface = np.where(down, GROUND, SKY).astype(np.int16)
    trace = Trace(xs, ys, (x, y, z), depth, surface, np.zeros((*depth.shape, 3), np.uint8), [])
    for solid in solids:
        _meet(trace, camera, solid)
        trace.faces += solid.faces
    return trace


def _meet(trace: Trace, camera: Camera, solid: Solid) -> None:
    """Add one solid to the trace.

    A ray enters a convex solid at the last plane, among the faces turned to the camera, that it crosses.
    """
    area = _reach(trace, camera, solid.corners)
    if area is None:
        return
    x, y, z = (part[area] for part in trace.ray)
    near = np.full(x.shape, NEAR, np.float32)
    far = trace.depth[area].copy()
    which = np.zeros(x.shape, np.int16)
    for number, face in enumerate(solid.faces):
        room = face.offset - dot(face.normal, camera.eye)  # It is negative if the camera is outside this face.
        slope = weighted((x, y, z), face.normal)
        slope = np.where(slope == 0, np.float32(1e-9), slope)
        t = np.float32(room) / slope
        if room < 0:
            t = np.where(slope < 0, t, np.float32(FAR))
            which = np.where(t > near, np.int16(number), which)
            near = np.maximum(near, t)
        else:
            far = np.minimum(far, np.where(slope > 0, t, np.float32(FAR)))
    met = near < far
    met &= near > NEAR
    trace.depth[area] = np.where(met, near, trace.depth[area])
    first = FIRST + len(trace.faces)
    trace.surface[area] = np.where(met, which + np.int16(first), trace.surface[area])


def weighted(parts: tuple[Floats, Floats, Floats], weights: Vector) -> Floats:
    """Return the weighted sum of three arrays, (h, w). Terms with weight 0 are skipped."""
    total: Floats | None = None
    for part, weight in zip(parts, weights, strict=True):
        if weight:
            term = part * np.float32(weight)
            total = term if total is None else total + term
    return np.zeros(parts[0].shape, np.float32) if total is None else total


def _reach(trace: Trace, camera: Camera, corners: Sequence[Vector]) -> tuple[slice, slice] | None:
    """Return the rows and columns of the rays that can hit a solid, or None if no ray can."""
    seen = [camera.project(corner) for corner in corners]
    if max(z for _, _, z in seen) <= NEAR:
        return None
    if min(z for _, _, z in seen) <= NEAR:
        return slice(0, len(trace.ys)), slice(0, len(trace.xs))
    return _range(trace, [x for x, _, _ in seen], [y for _, y, _ in seen])


def _range(trace: Trace, xs: Sequence[float], ys: Sequence[float]) -> tuple[slice, slice] | None:
    """Return the rows and columns of the rays inside the bounding box of some points, or None if there are none."""
    left, right = (int(np.searchsorted(trace.xs, v)) for v in (min(xs) - 0.01, max(xs) + 0.01))
    top, bottom = (int(np.searchsorted(trace.ys, v)) for v in (min(ys) - 0.01, max(ys) + 0.01))
    return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None


def add_occluders(trace: Trace, camera: Camera, occluders: Sequence[Occluder]) -> None:
    """Draw the occluders over everything that is farther away."""
    for occluder in occluders:
        if occluder.kind == "scaffold":
            _add_scaffold(trace, camera, occluder)
        else:
            _add_sprite(trace, camera, occluder)


def _add_sprite(trace: Trace, camera: Camera, occluder: Occluder) -> None:
    """Draw a sprite that faces the camera."""
    x, foot, z = camera.project(occluder.at)
    if z < 1.0:
        return
    scale = camera.focal / z
    half, tall = occluder.width * scale / 2, occluder.height * scale
    area = _range(trace, [x - half, x + half], [foot - tall, foot])
    if area is None:
        return
    across = ((trace.xs[area[1]] - np.float32(x)) * np.float32(1 / half))[None, :]
    above = ((np.float32(foot) - trace.ys[area[0]]) * np.float32(1 / tall))[:, None]
    mask, color = draw_sprite(occluder.kind, occluder.look, across, above, occluder.width / occluder.height)
    _cover(trace, area, mask & (trace.depth[area] > z), color, np.float32(z))


def _add_scaffold(trace: Trace, camera: Camera, occluder: Occluder) -> None:
    """Draw a scaffold, which is a plane parallel to the front of the building."""
    x0, y, _ = occluder.at
    t = np.float32(y - camera.eye[1]) / np.where(trace.ray[1] > 1e-3, trace.ray[1], np.float32(1e-3))
    across = (t * trace.ray[0] + np.float32(camera.eye[0] - x0 + occluder.width / 2)) * np.float32(1 / occluder.width)
    above = (t * trace.ray[2] + np.float32(camera.eye[2])) * np.float32(1 / occluder.height)
    inside = (across > 0) & (across < 1) & (above > 0) & (above < 1) & (t > NEAR) & (t < trace.depth)
    mask, color = scaffold_pattern(
        occluder.look,
        np.where(inside, across, np.float32(0)) * np.float32(occluder.width),
        np.where(inside, above, np.float32(0)) * np.float32(occluder.height),
        occluder.height,
    )
    everything = (slice(0, len(trace.ys)), slice(0, len(trace.xs)))
    _cover(trace, everything, mask & inside, color, t)


def _cover(
    trace: Trace, area: tuple[slice, slice], mask: NDArray[np.bool_], color: Bytes, depth: np.float32 | Floats
) -> None:
    """Set the depth and color of the rays of `area` where `mask` is True."""
    trace.depth[area] = np.where(mask, depth, trace.depth[area])
    trace.surface[area] = np.where(mask, np.int16(SPRITE), trace.surface[area])
    trace.paint[area] = np.where(mask[..., None], color, trace.paint[area])


def trace_photo(landmark: Landmark, view: View) -> Trace:
    """Trace the whole scene of an image. The faces of the landmark come first in `faces`."""
    camera = view.camera
    solids = [*landmark.solids, *landmark.houses]
    trace = cast(camera, sample_positions(camera.width), sample_positions(camera.height), solids)
    add_occluders(trace, camera, view.occluders)
    return trace


def landmark_mask(trace: Trace, landmark: Landmark) -> NDArray[np.bool_]:
    """Return the mask of the rays that hit the landmark, (h, w)."""
    faces = sum(len(solid.faces) for solid in landmark.solids)
    return (trace.surface >= FIRST) & (trace.surface < FIRST + faces)


def visible_share(trace: Trace, landmark: Landmark, camera: Camera) -> float:
    """Return the fraction of the landmark that is visible.

    It is the number of its pixels in the image, divided by their number in an unlimited image without occluders.
    """
    if not landmark.solids:
        return 0.0
    seen = int(np.count_nonzero(landmark_mask(trace, landmark))) / SUPER**2
    spots = [camera.project(corner) for solid in landmark.solids for corner in solid.corners]
    left, right = min(x for x, _, _ in spots), max(x for x, _, _ in spots)
    top, bottom = min(y for _, y, _ in spots), max(y for _, y, _ in spots)
    step = max(1.0, (right - left) / 120, (bottom - top) / 120)
    xs = np.float32(left) + np.arange(int((right - left) / step) + 1, dtype=np.float32) * np.float32(step)
    ys = np.float32(top) + np.arange(int((bottom - top) / step) + 1, dtype=np.float32) * np.float32(step)
    alone = cast(camera, xs, ys, landmark.solids)
    whole = int(np.count_nonzero(alone.surface >= FIRST)) * step * step
    return round(min(1.0, seen / whole), 4) if whole else 0.0


def visible_box(trace: Trace, landmark: Landmark) -> tuple[int, int, int, int] | None:
    """Return the box (x1, y1, x2, y2) of the visible part of the landmark in pixels, or None if nothing is visible."""
    mask = landmark_mask(trace, landmark)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    x1, y1 = int(columns[0]) // SUPER, int(rows[0]) // SUPER
    return x1, y1, int(columns[-1]) // SUPER + 1, int(rows[-1]) // SUPER + 1
