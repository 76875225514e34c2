"""Taking one photo of the plan: its pixels, its JPEG, and its line in `photos.csv`."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from PIL import Image

from superglobal.toy.draws import Bytes, Draws
from superglobal.toy.landmark import STREETS, Landmark, landmark_of, style_number
from superglobal.toy.plan import Shot
from superglobal.toy.render import render
from superglobal.toy.trace import Trace, trace_photo, visible_box, visible_share
from superglobal.toy.view import QUERY, View, draw_view
from superglobal.utils.io import write_atomically

QUERY_SHARE = 0.55  # a query shows at least this share of its landmark
_ATTEMPTS = 40


@dataclass(frozen=True)
class Photo:
    """A line of `photos.csv`. Angles in degrees, distance in metres, focal length and box in pixels.

    `share` is how much of the landmark is seen: its pixels over those it would have in a frame without edges and with
    nothing in the way. The box (x1, y1, x2, y2) is drawn around what is seen; all 0 where nothing is.
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
        """Pixels that a metre at the landmark takes."""
        return self.focal / self.distance

    def row(self) -> list[str]:
        return [str(value) for value in asdict(self).values()]


COLUMNS = tuple(field.name for field in fields(Photo))


@dataclass(frozen=True)
class Taken:
    """A photo that is framed, and known in all but its colours."""

    landmark: Landmark
    view: View
    trace: Trace
    photo: Photo

    def pixels(self) -> Bytes:
        """(H, W, 3) uint8, before JPEG."""
        return render(self.trace, self.landmark, self.view)


def frame(seed: int, side: int, shot: Shot) -> Taken:
    """Find the camera, light and occluders of a photo, and what every ray meets.

    Depends on the seed and the shot's key alone. Queries are framed anew until enough of the landmark is seen.
    """
    landmark = landmark_of(seed, shot.place, shot.landmark)
    for attempt in range(_ATTEMPTS):
        view = draw_view(Draws(seed, *shot.key, attempt), landmark, side, shot.purpose)
        trace = trace_photo(landmark, view)
        share = visible_share(trace, landmark, view.camera)
        if shot.purpose != QUERY or share >= QUERY_SHARE:
            break
    x1, y1, x2, y2 = visible_box(trace, landmark) or (0, 0, 0, 0)
    style = "" if shot.place == STREETS else "{}-{}".format(*style_number(shot.place, shot.landmark))
    camera, kinds = view.camera, " ".join(sorted({one.kind for one in view.occluders}))
    photo = Photo(
        shot.file, shot.set, shot.place, shot.landmark, shot.view, style, view.yaw, view.pitch, view.distance,
        view.focal, camera.width, camera.height, view.light.kind, share, x1, y1, x2, y2, kinds,
    )  # fmt: skip
    return Taken(landmark, view, trace, photo)


def take(root: Path, seed: int, side: int, shot: Shot) -> Photo:
    """Write the photo below `root`, unless it is there already, and describe it."""
    taken = frame(seed, side, shot)
    path = root / shot.file
    if not path.exists():
        write_atomically(path, jpeg(taken.pixels(), taken.view.faults.quality))
    return taken.photo


def jpeg(pixels: Bytes, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()
