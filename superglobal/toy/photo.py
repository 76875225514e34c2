"""Render one image of the toy data set: its pixels, its JPEG file, and its row in `photos.csv`."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from PIL import Image

from superglobal.toy.landmark import STREETS, Landmark, landmark_of, style_number
from superglobal.toy.numerics import Bytes, RandomStream
from superglobal.toy.plan import Shot
from superglobal.toy.render import render
from superglobal.toy.trace import Trace, trace_photo, visible_box, visible_share
from superglobal.toy.view import QUERY, View, draw_view
from superglobal.utils.io import write_atomically

QUERY_SHARE = 0.55  # a query shows at least this fraction of its landmark
_ATTEMPTS = 40  # maximum number of random views tried for a query


@dataclass(frozen=True)
class Photo:
    """A row of `photos.csv`.

    Attributes:
        file: path of the image, relative to the folder of the data set.
        set: "train", "index", "test", "query", "database" or "distractor".
        place: set of landmarks that contains `landmark`: "train", "evaluation" or "distractors"; "streets" for images
            without a landmark.
        landmark: number of the landmark in that set.
        view: number of the image among the images that have the same `landmark` and the same `set`.
        style: group of landmarks with the same style, e.g. "train-3"; "" for images without a landmark.
        yaw: horizontal angle of the camera around the landmark in degrees; 0 is in front of the landmark.
        pitch: angle of the optical axis above the horizon in degrees.
        distance: distance between the camera and the landmark in meters.
        focal: focal length in pixels.
        width: width of the image in pixels.
        height: height of the image in pixels.
        light: kind of light, one of `superglobal.toy.view.LIGHTS`.
        share: visible fraction of the landmark: the number of its pixels in the image, divided by their number if
            nothing were in front of the landmark and the image were large enough to contain all of it.
        x1: left edge of the bounding box of the visible part of the landmark in pixels. All four edges are 0 if
            nothing of it is visible.
        y1: top edge of the bounding box.
        x2: right edge of the bounding box.
        y2: bottom edge of the bounding box.
        occluders: kinds of occluders in the scene, separated by spaces.
    """

    file: str
    set: str
    place: str
    landmark: int
    view: int
    style: str
    yaw: float
    pitch: float
    distance: float
    focal: float
    width: int
    height: int
    light: str
    share: float
    x1: int
    y1: int
    x2: int
    y2: int
    occluders: str

    @property
    def scale(self) -> float:
        """Scale of the landmark in the image, in pixels per meter."""
        return self.focal / self.distance

    def row(self) -> list[str]:
        """Return the values of all columns of `photos.csv` as strings, in the order of the columns."""
        return [str(value) for value in asdict(self).values()]


COLUMNS = tuple(field.name for field in fields(Photo))


@dataclass(frozen=True)
class Taken:
    """An image whose view is chosen and whose camera rays are traced, but whose pixels are not computed yet.

    Attributes:
        landmark: the landmark of the scene.
        view: camera, light and occluders.
        trace: intersections of the rays with the scene.
        photo: row of `photos.csv`.
    """

    landmark: Landmark
    view: View
    trace: Trace
    photo: Photo

    def pixels(self) -> Bytes:
        """Render the image, and return its pixels before JPEG compression: (H, W, 3) uint8."""
        return render(self.trace, self.landmark, self.view)


def frame(seed: int, side: int, shot: Shot) -> Taken:
    """Choose the camera, light and occluders of an image at random, and trace its rays.

    The result depends only on `seed`, `side` and `shot`. For a query, random views are drawn until one shows at least
    the fraction `QUERY_SHARE` of the landmark. If none of 40 views does, the last one is used.

    Args:
        seed: seed of the data set.
        side: longer side of the image in pixels.
        shot: the planned image.
    """
    landmark = landmark_of(seed, shot.place, shot.landmark)
    for attempt in range(_ATTEMPTS):
        view = draw_view(RandomStream(seed, *shot.key, attempt), landmark, side, shot.purpose)
        trace = trace_photo(landmark, view)
        share = visible_share(trace, landmark, view.camera)
        if shot.purpose != QUERY or share >= QUERY_SHARE:
            break
    x1, y1, x2, y2 = visible_box(trace, landmark) or (0, 0, 0, 0)
    style = "" if shot.place == STREETS else "{}-{}".format(*style_number(shot.place, shot.landmark))
    camera, kinds = view.camera, " ".join(sorted({occluder.kind for occluder in view.occluders}))
    photo = Photo(
        shot.file, shot.set, shot.place, shot.landmark, shot.view, style, view.yaw, view.pitch, view.distance,
        view.focal, camera.width, camera.height, view.light.kind, share, x1, y1, x2, y2, kinds,
    )  # fmt: skip
    return Taken(landmark, view, trace, photo)


def take(root: Path, seed: int, side: int, shot: Shot) -> Photo:
    """Write the JPEG file of an image, unless it exists, and return the row of the image in `photos.csv`.

    Args:
        root: folder of the data set.
        seed: seed of the data set.
        side: longer side of the image in pixels.
        shot: the planned image.
    """
    taken = frame(seed, side, shot)
    path = root / shot.file
    if not path.exists():
        write_atomically(path, jpeg(taken.pixels(), taken.view.faults.quality))
    return taken.photo


def jpeg(pixels: Bytes, quality: int) -> bytes:
    """Encode an image, (H, W, 3) uint8, as JPEG with the given quality, and return the contents of the file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()
