"""Plan the images of a toy data set: its size, and one `Shot` per image."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from superglobal.errors import InputError
from superglobal.toy.landmark import DISTRACTORS, EVALUATION, STREETS, TRAINING
from superglobal.toy.view import ORDINARY, QUERY


@dataclass(frozen=True)
class Size:
    """Numbers of landmarks and images.

    Attributes:
        side: longer side of the images, in pixels.
        train: number of training landmarks, and number of images of each.
        evaluation: number of evaluation landmarks, which differ from the training landmarks.
        queries: number of Revisited queries of each landmark with an even and with an odd number.
        database: number of Revisited database images of each evaluation landmark.
        index: number of GLDv2 index images of each evaluation landmark.
        retrieval: number of GLDv2 test images of each evaluation landmark.
        recognition: number of GLDv2 test images of training landmarks.
        distractors: number of distractor landmarks, and number of images of each.
        streets: number of images without a landmark, among the distractors and among the GLDv2 test images.
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
    "large": Size(256, (600, 40), 120, (3, 4), 20, 12, 2, 200, (600, 4), (600, 160)),
}


@dataclass(frozen=True)
class Shot:
    """One image to render.

    Attributes:
        file: path relative to the folder of the data set.
        set: train, index, test, query, database or distractor.
        place: set of landmarks that contains `landmark`: train, evaluation or distractors; or streets, which are images
            without a landmark.
        landmark: number of the landmark.
        view: number of the image among those of its landmark.
        purpose: "query" for the restricted cameras of queries, or "ordinary".
    """

    file: str
    set: str
    place: str
    landmark: int
    view: int
    purpose: str = ORDINARY

    @property
    def key(self) -> tuple[str, str, int, int]:
        """Values that determine the image, together with the seed and the size."""
        return self.set, self.place, self.landmark, self.view


def size_of(name: str) -> Size:
    """Return the size with this name.

    Raises:
        InputError: the name is not in `SIZES`.
    """
    if name not in SIZES:
        raise InputError(f"toy data set: size={name!r}: expected one of {', '.join(SIZES)}")
    return SIZES[name]


def plan(size: Size, seed: int) -> list[Shot]:
    """Return all images, in the order of `photos.csv`."""
    return [*_gldv2(size, seed), *_revisited(size), *_distractors(size)]


def image_id(seed: int, split: str, place: str, landmark: int, view: int) -> str:
    """Return the GLDv2 id of an image, 16 hexadecimal digits."""
    return hashlib.sha256(f"{seed}/{split}/{place}/{landmark}/{view}".encode()).hexdigest()[:16]


def _gldv2(size: Size, seed: int) -> Iterator[Shot]:
    """Plan the train, index and test images."""

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
    """Plan the queries and the database of the Revisited layout."""
    for landmark in range(size.evaluation):
        for view in range(size.queries[landmark % 2]):
            yield Shot(f"toy/jpg/place{landmark:03d}_q{view:05d}.jpg", "query", EVALUATION, landmark, view, QUERY)
        for view in range(size.database):
            yield Shot(f"toy/jpg/place{landmark:03d}_{view:06d}.jpg", "database", EVALUATION, landmark, view)


def _distractors(size: Size) -> Iterator[Shot]:
    """Plan the distractors."""
    folder = "toy_distractors/jpg"
    for landmark in range(size.distractors[0]):
        for view in range(size.distractors[1]):
            yield Shot(f"{folder}/other{landmark:04d}_{view:03d}.jpg", "distractor", DISTRACTORS, landmark, view)
    for number in range(size.streets[0]):
        yield Shot(f"{folder}/street{number:05d}.jpg", "distractor", STREETS, number, 1)
