"""Compute the pixels of a traced scene, with textures, sunlight, shadows, sky, haze and camera imperfections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from superglobal.toy.landmark import Landmark
from superglobal.toy.numerics import NOISE, Bytes, Floats, RandomStream, Vector, dot, noise_tile
from superglobal.toy.solids import Face, Solid
from superglobal.toy.texture import LEVELS, TEXELS, Texture
from superglobal.toy.trace import FIRST, GROUND, SKY, SPRITE, SUPER, Trace, weighted
from superglobal.toy.view import Faults, Light, View

# Linear light for each 8-bit value: its square instead of the usual power of 2.2, because the rounding of `pow` differs
# between machines. `_develop` converts linear light back to 8-bit values with a square root.
_LINEAR = (np.arange(256, dtype=np.float32) * np.float32(1 / 255)) * (
    np.arange(256, dtype=np.float32) * np.float32(1 / 255)
)
_HAZE_REACH = 220.0  # distance in meters at which haze of strength 1 hides half of the color of a surface
_FLOODED = 0.2  # fraction of the floodlight that reaches surfaces other than the landmark


def render(trace: Trace, landmark: Landmark, view: View) -> Bytes:
    """Render an image, and return its pixels before JPEG compression: (H, W, 3) uint8.

    Args:
        trace: intersections of the rays of the image with the scene.
        landmark: the landmark of the scene.
        view: camera, light and camera imperfections.
    """
    light = view.light
    solids = [*landmark.solids, *landmark.houses]
    n_faces = sum(len(solid.faces) for solid in landmark.solids)
    owner = [number for number, solid in enumerate(solids) for _ in solid.faces]
    colors = np.zeros((trace.depth.size, 3), np.float32)
    for surface, rays in _groups(trace.surface):
        if surface == SKY:
            colors[rays] = _sky(trace, rays, light, view.look)
        elif surface == SPRITE:
            lamp = light.skylight[1] + 0.35 * light.sunlight[1] * (1 - 0.7 * light.glow)
            colors[rays] = _LINEAR[trace.paint.reshape(-1, 3)[rays]] * np.float32(lamp)
        elif surface == GROUND:
            colors[rays] = _shade(trace, rays, _ground_face(landmark.ground), solids, -1, view, _FLOODED)
        else:
            number = surface - FIRST
            flood = 1.0 if number < n_faces or light.kind != "night" else _FLOODED
            colors[rays] = _shade(trace, rays, trace.faces[number], solids, owner[number], view, flood)
    _add_haze(colors, trace, light)
    height, width = trace.depth.shape
    return _develop(_merge(colors.reshape(height, width, 3)), view.faults, RandomStream("film", view.look))


def _groups(surface: NDArray[np.int16]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Group the rays by the surface that they hit.

    Args:
        surface: (h, w) number that stands for what each ray hits; `Trace.surface` defines these numbers.

    Yields:
        A value of `surface`, and the flat indices of the rays that have this value, (n,) int64.
    """
    flat = surface.ravel()
    order = np.argsort(flat, kind="stable")
    edges = np.flatnonzero(np.diff(flat[order])) + 1
    for rays in np.split(order, edges):
        yield int(flat[rays[0]]), rays


def _ground_face(texture: Texture) -> Face:
    """Return the ground as a horizontal face with the given texture."""
    return Face((0.0, 0.0, 1.0), 0.0, (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (-4096.0, -4096.0), texture, (120, 120, 120))


def _shade(
    trace: Trace, rays: NDArray[np.int64], face: Face, solids: Sequence[Solid], owner: int, view: View, flood: float
) -> Floats:
    """Compute the light that the camera receives along some rays, which all hit the same face.

    Args:
        trace: intersections of the rays of the image with the scene.
        rays: (n,) flat indices of the rays.
        face: face that the rays hit.
        solids: all solids of the scene; they can cast shadows on the face.
        owner: index in `solids` of the solid that has the face; -1 for the ground.
        view: camera and light.
        flood: factor on the direct light; below 1 for surfaces that the floodlight hardly reaches.

    Returns:
        Linear light, (n, 3) float32.
    """
    light = view.light
    depth = trace.depth.ravel()[rays]
    ray = (trace.ray[0].ravel()[rays], trace.ray[1].ravel()[rays], trace.ray[2].ravel()[rays])
    eye = view.camera.eye
    u: Floats = depth * weighted(ray, face.along) + np.float32(dot(eye, face.along) - face.start[0])
    v: Floats = depth * weighted(ray, face.up) + np.float32(dot(eye, face.up) - face.start[1])
    facing = dot(face.normal, light.sun)
    sun: Floats = np.full(depth.shape, max(0.0, facing) * flood, np.float32)
    if facing > 0:
        sun *= _sunny(face, u, v, solids, owner, light.sun)
    texture = face.texture
    if texture is None:
        albedo = np.broadcast_to(_LINEAR[[int(c) for c in face.color]], (len(rays), 3))
        return _lit(albedo, sun, np.float32(_openness(face)), light)
    level = _level(float(depth[len(depth) // 2]) / view.camera.focal / SUPER)
    u, v, height = _parallax(texture, level, u, v, ray, face)
    if facing > 0 and not texture.flat:
        sun *= _relief_sun(texture, level, u, v, height, face, light.sun)
    cells = _cells(texture, level, u, v)
    # Less light from the sky reaches recessed windows and doors.
    sky = np.float32(_openness(face)) * np.where(height < -0.1, np.float32(0.7), np.float32(1))
    shaded = _lit(_LINEAR[texture.color[level][cells]], sun, sky, light)
    if light.glow:
        lamp = texture.glow[level][cells].astype(np.float32) * np.float32(light.glow / 255)
        shaded = shaded + lamp[:, None] * np.asarray((0.75, 0.5, 0.2), np.float32)
    return shaded


def _openness(face: Face) -> float:
    """Return the fraction of the skylight that a face receives: 1 if it faces up, 0.72 if it is vertical."""
    return 0.72 + 0.28 * face.normal[2]


def _lit(albedo: Floats, sun: Floats, sky: Floats | np.float32, light: Light) -> Floats:
    """Compute the light reflected by n points of a surface.

    Args:
        albedo: (n, 3) linear color of the surface.
        sun: (n,) fraction of the direct light that each point receives.
        sky: (n,) fraction of the skylight that each point receives, or one number for all points.
        light: the illumination.

    Returns:
        Linear light, (n, 3) float32.
    """
    sunlight, skylight = np.asarray(light.sunlight, np.float32), np.asarray(light.skylight, np.float32)
    total = sun[:, None] * sunlight + np.broadcast_to(sky, sun.shape)[:, None] * skylight
    return albedo * total


def _level(footprint: float) -> int:
    """Return the texture level whose texels are about as wide as `footprint`.

    `footprint` is the distance in meters between the points where neighboring rays hit the surface.
    """
    level = 0
    while level < LEVELS - 1 and footprint * TEXELS > 1.5 * 2**level:
        level += 1
    return level


def _cells(texture: Texture, level: int, u: Floats, v: Floats) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Find the texels at n points of a texture. A point outside a texture that does not repeat gives the nearest texel.

    Args:
        texture: the texture.
        level: texture level.
        u: (n,) horizontal texture coordinates of the points in meters.
        v: (n,) vertical texture coordinates of the points in meters.

    Returns:
        The rows and the columns of the texels in the arrays of this level, (n,) int32 each.

    """
    rows, columns = texture.relief[level].shape
    scale = np.float32(TEXELS / 2**level)
    row, column = (np.clip(a * scale, -1e6, 1e6).astype(np.int32) for a in (v, u))
    if texture.tiled:
        return row % rows, column % columns
    return np.clip(row, 0, rows - 1), np.clip(column, 0, columns - 1)


def _parallax(
    texture: Texture, level: int, u: Floats, v: Floats, ray: tuple[Floats, Floats, Floats], face: Face
) -> tuple[Floats, Floats, Floats]:
    """Find the points where the rays hit the relief of a texture (parallax mapping).

    Args:
        texture: texture of the face.
        level: texture level.
        u: (n,) horizontal texture coordinates where the rays hit the plane of the face, in meters.
        v: (n,) vertical texture coordinates of the same points.
        ray: x, y and z of the directions of the rays, (n,) each.
        face: face that the rays hit.

    Returns:
        The coordinates u and v where the rays hit the relief, and the height of the relief there, in meters: (n,)
        float32 each. The result is approximate, because only two steps of a fixed-point iteration are computed.
    """
    if texture.flat:
        return u, v, np.zeros(u.shape, np.float32)
    inwards = np.minimum(weighted(ray, face.normal), np.float32(-1e-3))
    right, up = (np.clip(weighted(ray, axis) / inwards, -3, 3) for axis in (face.along, face.up))
    relief = texture.relief[level]
    height = relief[_cells(texture, level, u, v)]
    height = relief[_cells(texture, level, u + height * right, v + height * up)]
    u, v = u + height * right, v + height * up
    return u, v, relief[_cells(texture, level, u, v)]


def _relief_sun(texture: Texture, level: int, u: Floats, v: Floats, height: Floats, face: Face, sun: Vector) -> Floats:
    """Compute the shadows that the relief of a face casts on the face itself.

    Args:
        texture: texture of the face.
        level: texture level.
        u: (n,) horizontal texture coordinates of the points in meters.
        v: (n,) vertical texture coordinates of the points in meters.
        height: (n,) height of the relief at the points in meters.
        face: the face.
        sun: unit vector towards the sun.

    Returns:
        (n,) float32, 0 for points in shadow and 1 for the others.
    """
    out = max(0.1, dot(sun, face.normal))
    right, up = (max(-3.0, min(3.0, dot(sun, axis) / out)) for axis in (face.along, face.up))
    free = np.ones(u.shape, np.float32)
    for rise in (0.12, 0.3, 0.6):
        cells = _cells(texture, level, u + np.float32(right * rise), v + np.float32(up * rise))
        free = np.where(texture.relief[level][cells] > height + np.float32(rise), np.float32(0), free)
    return free


def _sunny(face: Face, u: Floats, v: Floats, solids: Sequence[Solid], owner: int, sun: Vector) -> Floats:
    """Compute the shadows that other solids cast on a face.

    Args:
        face: the face.
        u: (n,) horizontal texture coordinates of the points in meters.
        v: (n,) vertical texture coordinates of the points in meters.
        solids: all solids of the scene.
        owner: index in `solids` of the solid that has the face; -1 for the ground.
        sun: unit vector towards the sun.

    Returns:
        (n,) float32, 0 for points in shadow and 1 for the others.
    """
    free = np.ones(u.shape, bool)
    bounds = (float(u.min()), float(u.max()), float(v.min()), float(v.max()))
    for number, solid in enumerate(solids):
        if number != owner and solid.casts and _may_shade(solid, face, sun, bounds):
            free &= ~_blocked(solid, face, u, v, sun)
    return free.astype(np.float32)


def _may_shade(solid: Solid, face: Face, sun: Vector, bounds: tuple[float, float, float, float]) -> bool:
    """Return False if the solid certainly casts no shadow on a given rectangle of the face, else True.

    `bounds` are the texture coordinates (u1, u2, v1, v2) of the rectangle in meters.
    """
    heights = [dot(face.normal, corner) - face.offset for corner in solid.corners]
    if max(heights) < 0.02:
        return False
    slant = dot(face.normal, sun)
    for axis, start, low, high in (
        (face.along, face.start[0], bounds[0], bounds[1]),
        (face.up, face.start[1], bounds[2], bounds[3]),
    ):
        drift = dot(sun, axis) / slant
        shadow = [dot(c, axis) - start - max(h, 0.0) * drift for c, h in zip(solid.corners, heights, strict=True)]
        if max(shadow) < low or (min(shadow) > high and min(heights) >= 0):
            return False
    return True


def _blocked(solid: Solid, face: Face, u: Floats, v: Floats, sun: Vector) -> NDArray[np.bool_]:
    """Return the mask (n,) of the points of `face` that are in the shadow of the solid.

    `u` and `v`, (n,) each, are the texture coordinates of the points in meters.
    """
    near, far = np.full(u.shape, 0.02, np.float32), np.full(u.shape, 1e6, np.float32)
    for side in solid.faces:
        # The point is in shadow if point + t * sun is inside the solid for some t > 0. Each side of the solid limits
        # the interval of t by normal . (point + t * sun) <= offset, where normal . point is linear in u and v.
        slope = dot(side.normal, sun)
        base = side.offset - face.offset * dot(side.normal, face.normal)
        base += dot(side.normal, face.along) * -face.start[0] + dot(side.normal, face.up) * -face.start[1]
        room = np.float32(base) - (
            u * np.float32(dot(side.normal, face.along)) + v * np.float32(dot(side.normal, face.up))
        )
        if abs(slope) < 1e-6:
            far = np.where(room < 0, np.float32(-1), far)
        elif slope < 0:
            near = np.maximum(near, room * np.float32(1 / slope))
        else:
            far = np.minimum(far, room * np.float32(1 / slope))
    return near < far


def _sky(trace: Trace, rays: NDArray[np.int64], light: Light, look: int) -> Floats:
    """Return the linear light of the sky and its clouds along some rays, (n, 3) float32.

    Args:
        trace: intersections of the rays of the image with the scene.
        rays: (n,) flat indices of the rays.
        light: the illumination.
        look: seed of the clouds.
    """
    x, y, z = (part.ravel()[rays] for part in trace.ray)
    rise = np.clip(z / np.sqrt(x * x + y * y + z * z), 0, 1)
    horizon, zenith = (_LINEAR[[int(c) for c in color]] for color in (light.horizon, light.zenith))
    blend = np.sqrt(rise)[:, None]
    sky = horizon * (1 - blend) + zenith * blend
    flat = np.float32(30) / (np.maximum(z, 0) + np.float32(0.25))
    row = (flat * x).astype(np.int32) + look % NOISE
    column = (flat * y).astype(np.int32) + look // NOISE % NOISE
    cloud = noise_tile(32)[row % NOISE, column % NOISE].astype(np.float32)
    cover = np.clip((cloud - np.float32(190 - 110 * light.clouds)) * np.float32(1 / 70), 0, 1) * np.float32(0.8)
    white = np.float32(0.95 if light.glow == 0 else 0.05)
    return sky + cover[:, None] * (white - sky)


def _add_haze(colors: Floats, trace: Trace, light: Light) -> None:
    """Blend the colors (n, 3) of all rays with the color of the horizon, in place.

    The blending weight increases with the depth. The sky is not changed.
    """
    depth = trace.depth.ravel()
    share = np.float32(light.haze) * (depth / (depth + np.float32(_HAZE_REACH)))
    share = np.where(trace.surface.ravel() == SKY, np.float32(0), share)[:, None]
    colors += share * (_LINEAR[[int(c) for c in light.horizon]] - colors)


def _merge(fine: Floats) -> Floats:
    """Average the colors of the 2 x 2 rays of each pixel: (2H, 2W, 3) -> (H, W, 3)."""
    columns = fine[:, 0::2] + fine[:, 1::2]
    return (columns[0::2] + columns[1::2]) * np.float32(0.25)


def _develop(linear: Floats, faults: Faults, rng: RandomStream) -> Bytes:
    """Apply the camera imperfections to an image, and convert it from linear light to 8-bit values.

    Args:
        linear: (H, W, 3) float32 linear light.
        faults: the camera imperfections.
        rng: random number generator for the noise.

    Returns:
        (H, W, 3) uint8.
    """
    height, width = linear.shape[:2]
    gain = np.asarray([max(0.3, c) * faults.exposure for c in faults.cast], np.float32)
    image = linear * gain
    if faults.vignette:
        y = ((np.arange(height, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / height) - 1)[:, None]
        x = ((np.arange(width, dtype=np.float32) + np.float32(0.5)) * np.float32(2 / width) - 1)[None, :]
        image = image * (1 - np.float32(faults.vignette / 2) * (x * x + y * y))[..., None]
    # Compress highlights smoothly instead of clipping them. Then take the square root, because `_LINEAR` is a square.
    image = np.sqrt(np.clip(image * np.float32(1.15) / (np.float32(0.3) * image + np.float32(0.9)), 0, 1))
    gray = image[..., 0] * np.float32(0.3) + image[..., 1] * np.float32(0.59) + image[..., 2] * np.float32(0.11)
    image = gray[..., None] + (image - gray[..., None]) * np.float32(faults.saturation)
    for _ in range(faults.blur):
        image = _soften(_soften(image, 0), 1)
    if faults.shake:
        image = _smear(image, faults.shake)
    coarse = rng.bytes(height, width, 3).astype(np.float32) - rng.bytes(height, width, 3).astype(np.float32)
    stored = image * np.float32(255) + coarse * np.float32(faults.noise / 128) + np.float32(0.5)
    return np.clip(stored, 0, 255).astype(np.uint8)


def _soften(image: Floats, axis: int) -> Floats:
    """Blur an image along one axis with the kernel (1, 2, 1) / 4. The border pixels are repeated."""
    size = image.shape[axis]
    before = image.take(np.maximum(np.arange(size) - 1, 0), axis)
    after = image.take(np.minimum(np.arange(size) + 1, size - 1), axis)
    return (before + after) * np.float32(0.25) + image * np.float32(0.5)


def _smear(image: Floats, length: int) -> Floats:
    """Apply horizontal motion blur: average `length` neighboring pixels. The border pixels are repeated."""
    width = image.shape[1]
    total = image
    for shift in range(1, length):
        total = total + image.take(np.minimum(np.arange(width) + shift, width - 1), 1)
    return total * np.float32(1 / length)
