"""Trace the camera rays of an image: find what each ray hits first, among the ground, the solids and the occluders."""

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
SUPER = 2  # rays per pixel along x and along y (supersampling)
NEAR = 0.3  # minimum depth of an intersection in meters
FAR = 1e6  # depth of the sky in meters


@dataclass
class Trace:
    """First intersections of a grid of h x w camera rays with the scene.

    Attributes:
        xs: (w,) horizontal image positions of the rays in pixels.
        ys: (h,) vertical image positions of the rays in pixels.
        ray: x, y and z of the ray directions, (h, w) each. A direction is scaled so that its component along the
            optical axis is 1.
        depth: (h, w) distance of the intersections along the optical axis in meters.
        surface: (h, w) what each ray hits: `SKY`, `GROUND`, `FIRST` + an index into `faces`, or `SPRITE` (an occluder).
        paint: (h, w, 3) uint8 color of the occluder where `surface` is `SPRITE`.
        faces: faces of all solids that have been intersected with the rays so far.
    """

    xs: Floats
    ys: Floats
    ray: tuple[Floats, Floats, Floats]
    depth: Floats
    surface: NDArray[np.int16]
    paint: Bytes
    faces: list[Face]


def sample_positions(size: int) -> Floats:
    """Return the ray positions along an image side of `size` pixels: (size * SUPER,) float32, in pixels."""
    return (np.arange(size * SUPER, dtype=np.float32) + np.float32(0.5)) * np.float32(1 / SUPER)


def cast(camera: Camera, xs: Floats, ys: Floats, solids: Sequence[Solid]) -> Trace:
    """Cast a ray from the camera through each image position, and find what it hits: a solid, the ground or the sky.

    Args:
        camera: the camera.
        xs: (w,) horizontal image positions in pixels.
        ys: (h,) vertical image positions in pixels.
        solids: the solids of the scene.

    Returns:
        The first intersections of the h x w rays, without occluders.
    """
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
    """Intersect the rays with one solid. Update the trace, in place, for the rays that hit this solid first.

    The solid is convex. A ray therefore enters it where the ray crosses the last of the planes of those faces that are
    turned toward the camera.
    """
    area = _reach(trace, camera, solid.corners)
    if area is None:
        return
    x, y, z = (part[area] for part in trace.ray)
    near = np.full(x.shape, NEAR, np.float32)
    far = trace.depth[area].copy()
    which = np.zeros(x.shape, np.int16)
    for number, face in enumerate(solid.faces):
        room = face.offset - dot(face.normal, camera.eye)  # negative if the face is turned toward the camera
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
    """Return the weighted sum of three float32 arrays of the same shape. Terms with weight 0 are skipped."""
    total: Floats | None = None
    for part, weight in zip(parts, weights, strict=True):
        if weight:
            term = part * np.float32(weight)
            total = term if total is None else total + term
    return np.zeros(parts[0].shape, np.float32) if total is None else total


def _reach(trace: Trace, camera: Camera, corners: Sequence[Vector]) -> tuple[slice, slice] | None:
    """Return the rows and columns of the rays that can hit a solid, or None if no ray can hit the solid.

    `corners` are the positions of the corners of the solid in meters.
    """
    seen = [camera.project(corner) for corner in corners]
    if max(z for _, _, z in seen) <= NEAR:
        return None
    if min(z for _, _, z in seen) <= NEAR:
        return slice(0, len(trace.ys)), slice(0, len(trace.xs))
    return _range(trace, [x for x, _, _ in seen], [y for _, y, _ in seen])


def _range(trace: Trace, xs: Sequence[float], ys: Sequence[float]) -> tuple[slice, slice] | None:
    """Return the rows and columns of the rays inside the bounding box of some image positions.

    `xs` and `ys` are the horizontal and vertical image positions in pixels. If no ray is inside the box, return None.
    """
    left, right = (int(np.searchsorted(trace.xs, v)) for v in (min(xs) - 0.01, max(xs) + 0.01))
    top, bottom = (int(np.searchsorted(trace.ys, v)) for v in (min(ys) - 0.01, max(ys) + 0.01))
    return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None


def add_occluders(trace: Trace, camera: Camera, occluders: Sequence[Occluder]) -> None:
    """Draw the occluders into the trace, in place. An occluder replaces only hits that are farther from the camera."""
    for occluder in occluders:
        if occluder.kind == "scaffold":
            _add_scaffold(trace, camera, occluder)
        else:
            _add_sprite(trace, camera, occluder)


def _add_sprite(trace: Trace, camera: Camera, occluder: Occluder) -> None:
    """Draw a sprite into the trace, in place. A sprite that is closer to the camera than 1 m is not drawn."""
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
    """Draw a scaffold into the trace, in place. The scaffold is a plane parallel to the front of the building."""
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
    """Record in the trace, in place, that the rays in `mask` hit an occluder. Their earlier hits are overwritten.

    Args:
        trace: the trace to change.
        area: rows and columns of the rays to which `mask` and `color` belong.
        mask: (h, w), True for the rays that hit the occluder.
        color: (h, w, 3) uint8 color of the occluder.
        depth: distance of the occluder along the optical axis in meters, (h, w) or one number for all rays.
    """
    trace.depth[area] = np.where(mask, depth, trace.depth[area])
    trace.surface[area] = np.where(mask, np.int16(SPRITE), trace.surface[area])
    trace.paint[area] = np.where(mask[..., None], color, trace.paint[area])


def trace_photo(landmark: Landmark, view: View) -> Trace:
    """Trace all rays of an image, including those that hit occluders.

    The faces of the landmark are the first elements of `faces` in the result.
    """
    camera = view.camera
    solids = [*landmark.solids, *landmark.houses]
    trace = cast(camera, sample_positions(camera.width), sample_positions(camera.height), solids)
    add_occluders(trace, camera, view.occluders)
    return trace


def landmark_mask(trace: Trace, landmark: Landmark) -> NDArray[np.bool_]:
    """Return the mask (h, w) of the rays that hit the landmark."""
    faces = sum(len(solid.faces) for solid in landmark.solids)
    return (trace.surface >= FIRST) & (trace.surface < FIRST + faces)


def visible_share(trace: Trace, landmark: Landmark, camera: Camera) -> float:
    """Return the visible fraction of the landmark, rounded to 4 decimal places.

    The fraction is the number of pixels of the landmark in the image, divided by the number of pixels that it would
    have if nothing were in front of it and the image were large enough to contain all of it. Without a landmark, the
    fraction is 0.
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
    """Return the bounding box (x1, y1, x2, y2) of the visible part of the landmark in pixels.

    If nothing of the landmark is visible, return None.
    """
    mask = landmark_mask(trace, landmark)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    x1, y1 = int(columns[0]) // SUPER, int(rows[0]) // SUPER
    return x1, y1, int(columns[-1]) // SUPER + 1, int(rows[-1]) // SUPER + 1
