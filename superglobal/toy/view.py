"""Choose the view of an image at random: camera, light, occluders, and imperfections of the camera."""

from __future__ import annotations

import math
from dataclasses import dataclass

from superglobal.toy.landmark import Landmark
from superglobal.toy.numerics import Color, RandomStream, Vector, cosine, cross, dot, sine, unit

LIGHTS = (*["clear"] * 7, *["overcast"] * 5, *["low"] * 2, "backlit", "night")
SHAPES = ((4, 3), (4, 3), (3, 2), (1, 1), (3, 4), (3, 4), (2, 3), (16, 9))
ORDINARY, QUERY = "ordinary", "query"


@dataclass(frozen=True)
class Camera:
    """A pinhole camera.

    The ray through pixel (x, y) has the direction `forward + (x - cx) / focal * right + (cy - y) / focal * up`.

    Attributes:
        eye: position of the camera in meters.
        forward: unit vector along the optical axis.
        right: unit vector that points to the right in the image.
        up: unit vector that points upwards in the image.
        focal: focal length in pixels.
        cx: horizontal center of the image in pixels.
        cy: vertical center of the image in pixels.
        width: width of the image in pixels.
        height: height of the image in pixels.
    """

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
        """Project a point of the scene into the image.

        Args:
            point: the point in meters.

        Returns:
            The image position x, y in pixels, and the depth along the optical axis in meters. If the depth is 0.1 m or
            less, the image position is only approximate.
        """
        ray = (point[0] - self.eye[0], point[1] - self.eye[1], point[2] - self.eye[2])
        z = dot(ray, self.forward)
        scale = self.focal / z if z > 0.1 else self.focal * 10
        return self.cx + scale * dot(ray, self.right), self.cy - scale * dot(ray, self.up), z


@dataclass(frozen=True)
class Light:
    """Illumination of a scene.

    Attributes:
        kind: kind of light, one of `LIGHTS`.
        sun: unit vector towards the sun or the floodlight.
        sunlight: red, green and blue intensity of the direct light.
        skylight: red, green and blue intensity of the light from the sky.
        zenith: color of the sky at the zenith.
        horizon: color of the sky at the horizon.
        haze: strength of the haze, 0 to 1.
        clouds: cloud cover, 0 to 1.
        glow: brightness of lit windows, 0 by day and 1 at night.
    """

    kind: str
    sun: Vector
    sunlight: Color
    skylight: Color
    zenith: Color
    horizon: Color
    haze: float
    clouds: float
    glow: float


@dataclass(frozen=True)
class Occluder:
    """An object in front of a landmark.

    It is flat: an upright sprite that faces the camera, or a scaffold parallel to the front of the building.

    Attributes:
        kind: "tree", "person", "van", "lamp" or "scaffold".
        at: position (x, y, z) of the center of the bottom edge in meters.
        height: height in meters.
        width: width in meters.
        look: seed of the shape and colors.
    """

    kind: str
    at: Vector
    height: float
    width: float
    look: int


@dataclass(frozen=True)
class Faults:
    """Imperfections of a camera.

    Attributes:
        exposure: factor on the brightness.
        cast: factors on red, green and blue (color cast).
        saturation: factor on the saturation; 0 gives a gray image.
        vignette: strength of the darkening towards the corners, 0 to 1.
        blur: how many times a 3 x 3 blur is applied.
        shake: length of the horizontal motion blur in pixels; 0 for none.
        noise: strength of the noise. The noise changes a pixel value, 0 to 255, by less than twice this number.
        quality: JPEG quality.
    """

    exposure: float
    cast: Color
    saturation: float
    vignette: float
    blur: int
    shake: int
    noise: float
    quality: int


@dataclass(frozen=True)
class View:
    """Camera, light, occluders and camera imperfections. Together with the landmark, they determine an image.

    Attributes:
        yaw: horizontal angle of the camera around the landmark in degrees; 0 is in front of the landmark.
        pitch: angle of the optical axis above the horizon in degrees.
        distance: distance between the camera and the landmark in meters.
        focal: focal length in pixels.
        camera: the camera.
        light: the illumination.
        occluders: objects in front of the landmark.
        faults: imperfections of the camera.
        look: seed of the clouds and of the image noise.
    """

    yaw: float
    pitch: float
    distance: float
    focal: float
    camera: Camera
    light: Light
    occluders: tuple[Occluder, ...]
    faults: Faults
    look: int


def draw_view(rng: RandomStream, landmark: Landmark, side: int, purpose: str) -> View:
    """Return a random view of a landmark.

    Args:
        rng: random number generator.
        landmark: landmark in the center of the scene.
        side: longer side of the image in pixels.
        purpose: "query" for a well-framed image with few occluders, or "ordinary".
    """
    is_query = purpose == QUERY
    width, height = _frame(rng, side)
    extent = max(landmark.width, landmark.height)
    yaw = round(rng.bell(45 if is_query else 60), 3)
    distance = round(extent * rng.uniform(1.15, 2.6), 3)
    fill = rng.uniform(0.8, 1.05) if is_query else rng.uniform(0.85, 1.25)
    if not is_query:
        fill = rng.choice((fill, fill, fill, fill, fill, rng.uniform(0.4, 0.65), rng.uniform(1.3, 2.2)))
    # This is the scale in pixels per meter at which the landmark just fits into the image.
    fit = min(width / landmark.width, height / landmark.height)
    focal = round(fill * fit * distance, 3)
    lift = rng.choice((1.7, 1.7, 1.7, rng.uniform(2, 9)))
    eye = (distance * sine(yaw), landmark.depth * 0.3 - distance * cosine(yaw), lift)
    spread = 0.1 if is_query else rng.choice((0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.4, 1.5))
    reach = distance / focal
    aim = (
        rng.bell(spread) * max(width * reach, 0.5 * landmark.width),
        landmark.depth * 0.3,
        max(2.0, landmark.height * 0.46 + rng.bell(spread) * max(height * reach, 0.5 * landmark.height)),
    )
    camera = _look(eye, aim, rng.bell(4.0), focal, width, height)
    pitch = round(math.degrees(math.asin(camera.forward[2])), 3)
    light = draw_light(rng)
    occluders = _occluders(rng, landmark, camera, is_query)
    return View(yaw, pitch, distance, focal, camera, light, occluders, _faults(rng, light), rng.integer(0, 2**31))


def _frame(rng: RandomStream, side: int) -> tuple[int, int]:
    """Choose a random aspect ratio, and return the width and height of the image in pixels.

    The longer of the two is `side`.
    """
    a, b = rng.choice(SHAPES)
    short = side * min(a, b) // max(a, b)
    return (side, short) if a >= b else (short, side)


def _look(eye: Vector, aim: Vector, roll: float, focal: float, width: int, height: int) -> Camera:
    """Return a camera that points from `eye` to `aim`, rotated around its optical axis by `roll` degrees.

    Args:
        eye: position of the camera in meters.
        aim: point in the center of the image, in meters.
        roll: rotation in degrees.
        focal: focal length in pixels.
        width: width of the image in pixels.
        height: height of the image in pixels.
    """
    forward = unit((aim[0] - eye[0], aim[1] - eye[1], aim[2] - eye[2]))
    level = unit(cross(forward, (0.0, 0.0, 1.0)))
    top = cross(level, forward)
    s, c = sine(roll), cosine(roll)
    right = (c * level[0] + s * top[0], c * level[1] + s * top[1], c * level[2] + s * top[2])
    up = cross(right, forward)
    return Camera(eye, forward, right, up, focal, width / 2, height / 2, width, height)


def draw_light(rng: RandomStream) -> Light:
    """Return a random illumination. If its kind is "backlit", the sun is behind the building.

    The direction of the sun does not depend on the camera.

    Args:
        rng: random number generator.
    """
    kind = rng.choice(LIGHTS)
    azimuth, high = rng.bell(110), rng.uniform(28, 62)
    sun, sky, zenith, horizon = 1.5, 0.62, (84, 134, 206), (186, 208, 232)
    warm: Color = (1.0, 0.95, 0.86)
    haze, clouds, glow = rng.uniform(0, 0.25), rng.uniform(0, 0.8), 0.0
    if kind == "overcast":
        sun, sky, zenith, horizon, clouds = 0.12, 1.15, (168, 174, 182), (212, 214, 216), 0.3
        haze = rng.uniform(0.05, 0.6)
    elif kind == "low":
        high, sun, sky, warm = rng.uniform(8, 22), 1.5, 0.42, (1.0, 0.74, 0.46)
        zenith, horizon = (88, 110, 164), (244, 196, 150)
    elif kind == "backlit":
        azimuth, sun, sky = 180 + rng.bell(50), 1.5, 0.55
        zenith, horizon = (150, 178, 214), (240, 238, 230)
    elif kind == "night":
        azimuth, high, sun, sky, warm = rng.bell(60), -24.0, rng.uniform(0.35, 0.9), 0.1, (1.0, 0.78, 0.48)
        zenith, horizon, clouds, glow, haze = (14, 18, 36), (46, 42, 54), 0.1, 1.0, 0.0
    direction = (cosine(high) * sine(azimuth), -cosine(high) * cosine(azimuth), sine(high))
    blue: Color = (0.86, 0.94, 1.1) if kind != "overcast" else (1.0, 1.0, 1.0)
    return Light(
        kind,
        direction,
        (warm[0] * sun, warm[1] * sun, warm[2] * sun),
        (blue[0] * sky, blue[1] * sky, blue[2] * sky),
        rng.tint(zenith, 12),
        rng.tint(horizon, 12),
        haze,
        clouds,
        glow,
    )


def _occluders(rng: RandomStream, landmark: Landmark, camera: Camera, is_query: bool) -> tuple[Occluder, ...]:
    """Return the trees around the landmark, and random occluders in front of it.

    If `is_query` is True, there are fewer random occluders.
    """
    occluders = [
        Occluder("tree", (x, y, 0.0), height, height * 0.8, number)
        for number, (x, y, height) in enumerate(landmark.trees)
    ]
    crowd = rng.choice((0, 0, 2, 4)) if is_query else rng.choice((0, 1, 3, 6, 12))
    for _ in range(crowd):
        occluders.append(_between(rng, camera, "person", rng.uniform(0.25, 0.95), 0.9, rng.uniform(1.5, 1.9), 0.5))
    if rng.chance(0.1 if is_query else 0.28):
        tall = rng.uniform(5, 12)
        occluders.append(_between(rng, camera, "tree", rng.uniform(0.35, 0.8), 0.8, tall, tall * rng.uniform(0.6, 1.0)))
    if rng.chance(0.1 if is_query else 0.24):
        occluders.append(
            _between(rng, camera, "van", rng.uniform(0.5, 0.9), 0.9, rng.uniform(1.6, 3.2), rng.uniform(4, 8))
        )
    if rng.chance(0.2):
        occluders.append(_between(rng, camera, "lamp", rng.uniform(0.4, 0.9), 0.8, rng.uniform(5, 8), 0.8))
    if not is_query and rng.chance(0.14):  # A person poses close to the camera.
        occluders.append(_between(rng, camera, "person", rng.uniform(0.06, 0.12), 0.5, 1.72, 0.5))
    if not is_query and rng.chance(0.1):  # The branches of a tree are close to the camera.
        occluders.append(
            _between(rng, camera, "tree", rng.uniform(0.16, 0.3), 0.8, rng.uniform(5, 9), rng.uniform(5, 8))
        )
    if rng.chance(0.04 if is_query else 0.12):
        wide, tall = landmark.width * rng.uniform(0.3, 0.8), landmark.height * rng.uniform(0.4, 0.9)
        x = rng.uniform(-0.5, 0.5) * (landmark.width - wide)
        occluders.append(Occluder("scaffold", (x, -2.4, 0.0), tall, wide, rng.integer(0, 10**6)))
    return tuple(occluders)


def _between(
    rng: RandomStream, camera: Camera, kind: str, share: float, spread: float, height: float, width: float
) -> Occluder:
    """Return an occluder between the camera and the building, at a random horizontal position in the image.

    Args:
        rng: random number generator.
        camera: the camera.
        kind: kind of occluder.
        share: distance from the camera, as a fraction of the distance between the camera and the building.
        spread: maximum horizontal distance from the center of the image, as a fraction of half the image width.
        height: height of the occluder in meters.
        width: width of the occluder in meters.
    """
    way = -camera.eye[1] / camera.forward[1] if camera.forward[1] > 0.05 else 20.0
    way = max(2.5, min(way, 150.0) * share)
    aside = rng.uniform(-spread, spread) * camera.cx / camera.focal * way
    x = camera.eye[0] + camera.forward[0] * way + camera.right[0] * aside
    y = camera.eye[1] + camera.forward[1] * way + camera.right[1] * aside
    return Occluder(kind, (x, y, 0.0), height, width, rng.integer(0, 10**6))


def _faults(rng: RandomStream, light: Light) -> Faults:
    """Return random camera imperfections. Night images get more noise, and backlit images a longer exposure."""
    warmth = rng.bell(0.08)
    return Faults(
        exposure=rng.uniform(0.8, 1.2) * (1.3 if light.kind == "backlit" else 1.0),
        cast=(1 + warmth, 1 + rng.bell(0.04), 1 - warmth),
        saturation=rng.choice((1.0, rng.uniform(0.6, 1.3), rng.uniform(0.6, 1.3), 0.0 if rng.chance(0.15) else 1.0)),
        vignette=rng.choice((0.0, rng.uniform(0, 0.35))),
        blur=rng.choice((0, 0, 0, 0, 0, 1, 1, 2)),
        shake=rng.choice((0, 0, 0, 0, 0, 0, 2, 3)),
        noise=rng.uniform(0, 7) if light.kind != "night" else rng.uniform(5, 16),
        quality=rng.choice((35, 50, 65, 75, 85, 92)),
    )
