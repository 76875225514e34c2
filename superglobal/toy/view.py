"""How one photo is taken: camera, light, what stands in the way, and the camera's own faults."""

from __future__ import annotations

import math
from dataclasses import dataclass

from superglobal.toy.draws import Colour, Draws, Vector, cosine, cross, dot, sine, unit
from superglobal.toy.landmark import Landmark

LIGHTS = (*["clear"] * 7, *["overcast"] * 5, *["low"] * 2, "backlit", "night")
SHAPES = ((4, 3), (4, 3), (3, 2), (1, 1), (3, 4), (3, 4), (2, 3), (16, 9))
ORDINARY, QUERY, SCENE = "ordinary", "query", "scene"


@dataclass(frozen=True)
class Camera:
    """A pin-hole camera. Pixel (x, y) sees along forward + (x - cx) / focal * right + (cy - y) / focal * up."""

    eye: Vector
    forward: Vector
    right: Vector
    up: Vector
    focal: float
    cx: float
    cy: float
    width: int
    height: int

    def project(self, point: Vector) -> tuple[float, float, float]:
        """(x, y) in pixels and the distance along the optical axis in metres."""
        ray = (point[0] - self.eye[0], point[1] - self.eye[1], point[2] - self.eye[2])
        z = dot(ray, self.forward)
        scale = self.focal / z if z > 0.1 else self.focal * 10
        return self.cx + scale * dot(ray, self.right), self.cy - scale * dot(ray, self.up), z


@dataclass(frozen=True)
class Light:
    """`sun` points towards the light; its colour and the sky's are factors on a surface's own."""

    kind: str
    sun: Vector
    sunlight: Colour
    skylight: Colour
    zenith: Colour
    horizon: Colour
    haze: float
    clouds: float
    glow: float


@dataclass(frozen=True)
class Occluder:
    """An upright cut-out that faces the camera, or a scaffold flat before the front."""

    kind: str
    at: Vector
    """Foot, in the middle."""
    height: float
    width: float
    look: int
    """Seed of its shape and colours."""


@dataclass(frozen=True)
class Faults:
    """Exposure, colour cast, saturation, vignette, blur, noise, JPEG."""

    exposure: float
    cast: Colour
    saturation: float
    vignette: float
    blur: int
    shake: int
    noise: float
    quality: int


@dataclass(frozen=True)
class View:
    """One photo, before it is taken. Angles in degrees, distance in metres, focal length in pixels."""

    yaw: float
    pitch: float
    distance: float
    focal: float
    camera: Camera
    light: Light
    occluders: tuple[Occluder, ...]
    faults: Faults
    look: int


def draw_view(draws: Draws, landmark: Landmark, side: int, purpose: str) -> View:
    """A photo with a longer side of `side` pixels. A "query" is taken as one takes a picture of a landmark."""
    calm = purpose == QUERY
    width, height = _frame(draws, side)
    extent = max(landmark.width, landmark.height)
    yaw = round(draws.bell(45 if calm else 60), 3)
    distance = round(extent * draws.real(1.15, 2.6), 3)
    fill = draws.real(0.8, 1.05) if calm else draws.real(0.85, 1.25)
    if not calm:
        fill = draws.pick((fill, fill, fill, fill, fill, draws.real(0.4, 0.65), draws.real(1.3, 2.2)))
    fit = min(width / landmark.width, height / landmark.height)  # pixels a metre if it just fits
    focal = round(fill * fit * distance, 3)
    lift = draws.pick((1.7, 1.7, 1.7, draws.real(2, 9)))
    eye = (distance * sine(yaw), landmark.depth * 0.3 - distance * cosine(yaw), lift)
    spread = 0.1 if calm else draws.pick((0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.4, 1.5))
    reach = distance / focal
    aim = (
        draws.bell(spread) * max(width * reach, 0.5 * landmark.width),
        landmark.depth * 0.3,
        max(2.0, landmark.height * 0.46 + draws.bell(spread) * max(height * reach, 0.5 * landmark.height)),
    )
    camera = _look(eye, aim, draws.bell(4.0), focal, width, height)
    pitch = round(math.degrees(math.asin(camera.forward[2])), 3)
    light = draw_light(draws, yaw)
    occluders = _occluders(draws, landmark, camera, calm)
    return View(yaw, pitch, distance, focal, camera, light, occluders, _faults(draws, light), draws.whole(0, 2**31))


def _frame(draws: Draws, side: int) -> tuple[int, int]:
    a, b = draws.pick(SHAPES)
    short = side * min(a, b) // max(a, b)
    return (side, short) if a >= b else (short, side)


def _look(eye: Vector, aim: Vector, roll: float, focal: float, width: int, height: int) -> Camera:
    forward = unit((aim[0] - eye[0], aim[1] - eye[1], aim[2] - eye[2]))
    level = unit(cross(forward, (0.0, 0.0, 1.0)))
    top = cross(level, forward)
    s, c = sine(roll), cosine(roll)
    right = (c * level[0] + s * top[0], c * level[1] + s * top[1], c * level[2] + s * top[2])
    up = cross(right, forward)
    return Camera(eye, forward, right, up, focal, width / 2, height / 2, width, height)


def draw_light(draws: Draws, yaw: float) -> Light:
    """Light of an hour; the sun's direction is random, in front of the building but for "backlit"."""
    kind = draws.pick(LIGHTS)
    azimuth, high = draws.bell(110), draws.real(28, 62)
    sun, sky, zenith, horizon = 1.5, 0.62, (84, 134, 206), (186, 208, 232)
    warm: Colour = (1.0, 0.95, 0.86)
    haze, clouds, glow = draws.real(0, 0.25), draws.real(0, 0.8), 0.0
    if kind == "overcast":
        sun, sky, zenith, horizon, clouds = 0.12, 1.15, (168, 174, 182), (212, 214, 216), 0.3
        haze = draws.real(0.05, 0.6)
    elif kind == "low":
        high, sun, sky, warm = draws.real(8, 22), 1.5, 0.42, (1.0, 0.74, 0.46)
        zenith, horizon = (88, 110, 164), (244, 196, 150)
    elif kind == "backlit":
        azimuth, sun, sky = 180 + draws.bell(50), 1.5, 0.55
        zenith, horizon = (150, 178, 214), (240, 238, 230)
    elif kind == "night":
        azimuth, high, sun, sky, warm = draws.bell(60), -24.0, draws.real(0.35, 0.9), 0.1, (1.0, 0.78, 0.48)
        zenith, horizon, clouds, glow, haze = (14, 18, 36), (46, 42, 54), 0.1, 1.0, 0.0
    direction = (cosine(high) * sine(azimuth), -cosine(high) * cosine(azimuth), sine(high))
    blue: Colour = (0.86, 0.94, 1.1) if kind != "overcast" else (1.0, 1.0, 1.0)
    return Light(
        kind,
        direction,
        (warm[0] * sun, warm[1] * sun, warm[2] * sun),
        (blue[0] * sky, blue[1] * sky, blue[2] * sky),
        draws.tint(zenith, 12),
        draws.tint(horizon, 12),
        haze,
        clouds,
        glow,
    )


def _occluders(draws: Draws, landmark: Landmark, camera: Camera, calm: bool) -> tuple[Occluder, ...]:
    """Trees of the place, and what happens to stand there: more of it where not `calm`."""
    found = [
        Occluder("tree", (x, y, 0.0), height, height * 0.8, number)
        for number, (x, y, height) in enumerate(landmark.trees)
    ]
    crowd = draws.pick((0, 0, 2, 4)) if calm else draws.pick((0, 1, 3, 6, 12))
    for _ in range(crowd):
        found.append(_between(draws, camera, "person", draws.real(0.25, 0.95), 0.9, draws.real(1.5, 1.9), 0.5))
    if draws.chance(0.1 if calm else 0.28):
        tall = draws.real(5, 12)
        found.append(_between(draws, camera, "tree", draws.real(0.35, 0.8), 0.8, tall, tall * draws.real(0.6, 1.0)))
    if draws.chance(0.1 if calm else 0.24):
        found.append(_between(draws, camera, "van", draws.real(0.5, 0.9), 0.9, draws.real(1.6, 3.2), draws.real(4, 8)))
    if draws.chance(0.2):
        found.append(_between(draws, camera, "lamp", draws.real(0.4, 0.9), 0.8, draws.real(5, 8), 0.8))
    if not calm and draws.chance(0.14):  # someone posing right before the camera
        found.append(_between(draws, camera, "person", draws.real(0.06, 0.12), 0.5, 1.72, 0.5))
    if not calm and draws.chance(0.1):  # branches hanging into the picture
        found.append(_between(draws, camera, "tree", draws.real(0.16, 0.3), 0.8, draws.real(5, 9), draws.real(5, 8)))
    if draws.chance(0.04 if calm else 0.12):
        wide, tall = landmark.width * draws.real(0.3, 0.8), landmark.height * draws.real(0.4, 0.9)
        x = draws.real(-0.5, 0.5) * (landmark.width - wide)
        found.append(Occluder("scaffold", (x, -2.4, 0.0), tall, wide, draws.whole(0, 10**6)))
    return tuple(found)


def _between(
    draws: Draws, camera: Camera, kind: str, share: float, spread: float, height: float, width: float
) -> Occluder:
    """Somewhere in the picture's width, `share` of the way from the camera to the building."""
    way = -camera.eye[1] / camera.forward[1] if camera.forward[1] > 0.05 else 20.0
    way = max(2.5, min(way, 150.0) * share)
    aside = draws.real(-spread, spread) * camera.cx / camera.focal * way
    x = camera.eye[0] + camera.forward[0] * way + camera.right[0] * aside
    y = camera.eye[1] + camera.forward[1] * way + camera.right[1] * aside
    return Occluder(kind, (x, y, 0.0), height, width, draws.whole(0, 10**6))


def _faults(draws: Draws, light: Light) -> Faults:
    warmth = draws.bell(0.08)
    return Faults(
        exposure=draws.real(0.8, 1.2) * (1.3 if light.kind == "backlit" else 1.0),
        cast=(1 + warmth, 1 + draws.bell(0.04), 1 - warmth),
        saturation=draws.pick((1.0, draws.real(0.6, 1.3), draws.real(0.6, 1.3), 0.0 if draws.chance(0.15) else 1.0)),
        vignette=draws.pick((0.0, draws.real(0, 0.35))),
        blur=draws.pick((0, 0, 0, 0, 0, 1, 1, 2)),
        shake=draws.pick((0, 0, 0, 0, 0, 0, 2, 3)),
        noise=draws.real(0, 7) if light.kind != "night" else draws.real(5, 16),
        quality=draws.pick((35, 50, 65, 75, 85, 92)),
    )
