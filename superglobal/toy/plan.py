"""Plan the images of a toy data set: the predefined sizes, and one `Shot` per image to render."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from superglobal.errors import InputError, one_of
from superglobal.toy.landmark import DISTRACTORS, EVALUATION, STREETS, TRAINING
from superglobal.toy.view import ORDINARY, QUERY


@dataclass(frozen=True)
class Size:
    """Numbers of landmarks and images in a toy data set.

    Attributes:
        side: longer side of the images in pixels.
        train: number of training landmarks, and number of images per landmark.
        evaluation: number of evaluation landmarks, which differ from the training landmarks.
        queries: number of queries in the Revisited layout per evaluation landmark with an even number, and per
            evaluation landmark with an odd number.
        database: number of database images in the Revisited layout, per evaluation landmark.
        index: number of GLDv2 index images, per evaluation landmark.
        retrieval: number of GLDv2 test images, per evaluation landmark.
        recognition: total number of GLDv2 test images that show training landmarks.
        distractors: number of distractor landmarks, and number of images per landmark.
        streets: number of distractors without a landmark, and number of GLDv2 test images without a landmark.
    """

    side: int
    train: tuple[int, int]
    evaluation: int
    queries: tuple[int, int]
    database: int
    index: int
    retrieval: int
    recognition: int
    distractors: tuple[int, int]
    streets: tuple[int, int]


SIZES = {
    "tiny": Size(160, (12, 8), 8, (1, 2), 7, 4, 1, 6, (6, 3), (6, 6)),
    "small": Size(160, (160, 8), 28, (2, 3), 14, 6, 2, 24, (60, 4), (60, 20)),
    "medium": Size(320, (160, 8), 28, (2, 3), 14, 6, 2, 24, (60, 4), (60, 20)),
    "views": Size(320, (45, 40), 8, (1, 2), 7, 4, 1, 6, (6, 3), (6, 6)),
    "large": Size(256, (600, 40), 120, (3, 4), 20, 12, 2, 200, (600, 4), (600, 160)),
}


@dataclass(frozen=True)
class Shot:
    """One image to render.

    Attributes:
        file: path of the image, relative to the folder of the data set.
        set: "train", "index", "test", "query", "database" or "distractor".
        place: set of landmarks that contains `landmark`: "train", "evaluation" or "distractors"; "streets" for images
            without a landmark.
        landmark: number of the landmark in that set.
        view: number of the image among the images that have the same `landmark` and the same `set`.
        purpose: "query" for a well-framed image with few occluders, or "ordinary".
    """

    file: str
    set: str
    place: str
    landmark: int
    view: int
    purpose: str = ORDINARY

    @property
    def key(self) -> tuple[str, str, int, int]:
        """Key of the image. The key, the seed and the size of the data set together determine the image."""
        return self.set, self.place, self.landmark, self.view


def size_of(name: str) -> Size:
    """Return the `Size` with the name `name`.

    Raises:
        InputError: `name` is not in `SIZES`.
    """
    if name not in SIZES:
        raise InputError(f"toy data set: size={name!r}: expected {one_of(name, SIZES)}")
    return SIZES[name]


def plan(size: Size, seed: int) -> list[Shot]:
    """Return one `Shot` per image of the data set. The rows of `photos.csv` have the same order."""
    return [*_gldv2(size, seed), *_revisited(size), *_distractors(size)]


def image_id(seed: int, split: str, place: str, landmark: int, view: int) -> str:
    """Return the GLDv2 id of an image: the first 16 hexadecimal digits of a hash of the arguments."""
    return hashlib.sha256(f"{seed}/{split}/{place}/{landmark}/{view}".encode()).hexdigest()[:16]


def _gldv2(size: Size, seed: int) -> Iterator[Shot]:
    """Yield the train, index and test images of the GLDv2 layout."""

    def shot(split: str, place: str, landmark: int, view: int, purpose: str = ORDINARY) -> Shot:
        name = image_id(seed, split, place, landmark, view)
        return Shot(f"gldv2/{split}/{name[0]}/{name[1]}/{name[2]}/{name}.jpg", split, place, landmark, view, purpose)

    for landmark in range(size.train[0]):
        yield from (shot("train", TRAINING, landmark, view) for view in range(size.train[1]))
    for landmark in range(size.evaluation):
        yield from (shot("index", EVALUATION, landmark, view) for view in range(size.index))
        yield from (shot("test", EVALUATION, landmark, view, QUERY) for view in range(size.retrieval))
    yield from (shot("test", TRAINING, landmark % size.train[0], 0) for landmark in range(size.recognition))
    yield from (shot("test", STREETS, number, 0) for number in range(size.streets[1]))


def _revisited(size: Size) -> Iterator[Shot]:
    """Yield the query and database images of the Revisited layout."""
    for landmark in range(size.evaluation):
        for view in range(size.queries[landmark % 2]):
            yield Shot(f"toy/jpg/place{landmark:03d}_q{view:05d}.jpg", "query", EVALUATION, landmark, view, QUERY)
        for view in range(size.database):
            yield Shot(f"toy/jpg/place{landmark:03d}_{view:06d}.jpg", "database", EVALUATION, landmark, view)


def _distractors(size: Size) -> Iterator[Shot]:
    """Yield the distractors: images of distractor landmarks, then images without a landmark."""
    folder = "toy_distractors/jpg"
    for landmark in range(size.distractors[0]):
        for view in range(size.distractors[1]):
            yield Shot(f"{folder}/other{landmark:04d}_{view:03d}.jpg", "distractor", DISTRACTORS, landmark, view)
    for number in range(size.streets[0]):
        yield Shot(f"{folder}/street{number:05d}.jpg", "distractor", STREETS, number, 1)
