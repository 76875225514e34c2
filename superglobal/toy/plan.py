"""Which photos a toy set has: sizes, and one `Shot` per photo. Nothing is rendered here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from superglobal.errors import InputError
from superglobal.toy.landmark import DISTRACTORS, EVALUATION, STREETS, TRAINING
from superglobal.toy.view import ORDINARY, QUERY


@dataclass(frozen=True)
class Size:
    """Numbers of landmarks and of photos of each; `side` is a photo's longer side in pixels."""

    side: int
    train: tuple[int, int]
    """Landmarks, photos of each."""
    evaluation: int
    """Landmarks, none of them in training."""
    queries: tuple[int, int]
    """Photos of every even and of every odd evaluation landmark."""
    database: int
    index: int
    retrieval: int
    """Queries of the GLDv2-like test set, for each evaluation landmark."""
    recognition: int
    """Test photos of training landmarks, one each."""
    distractors: tuple[int, int]
    """Landmarks, photos of each."""
    streets: tuple[int, int]
    """Photos without a landmark: distractors, test."""


SIZES = {
    "tiny": Size(160, (12, 8), 8, (1, 2), 7, 4, 1, 6, (6, 3), (6, 6)),
    "small": Size(160, (160, 8), 28, (2, 3), 14, 6, 2, 24, (60, 4), (60, 20)),
    "large": Size(256, (600, 40), 120, (3, 4), 20, 12, 2, 200, (600, 4), (600, 160)),
}


@dataclass(frozen=True)
class Shot:
    """One photo to take. `set` is train, index, test, query, database or distractor."""

    file: str
    """Below the folder of the toy set."""
    set: str
    place: str
    """Which landmarks `landmark` counts in: train, evaluation, distractors, or streets, which have no landmark."""
    landmark: int
    view: int
    purpose: str = ORDINARY

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What, with the seed, decides the photo."""
        return self.set, self.place, self.landmark, self.view


def size_of(name: str) -> Size:
    """
    Raises:
        InputError: no such size.
    """
    if name not in SIZES:
        raise InputError(f"toy set: size {name!r} is unknown; choose one of {', '.join(SIZES)}")
    return SIZES[name]


def plan(size: Size, seed: int) -> list[Shot]:
    """All photos, in the order of `photos.csv`."""
    return [*_gldv2(size, seed), *_revisited(size), *_distractors(size)]


def image_id(seed: int, split: str, place: str, landmark: int, view: int) -> str:
    """The name of a photo in the GLDv2-like tree, 16 hexadecimal digits."""
    return hashlib.sha256(f"{seed}/{split}/{place}/{landmark}/{view}".encode()).hexdigest()[:16]


def _gldv2(size: Size, seed: int) -> Iterator[Shot]:
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
    for landmark in range(size.evaluation):
        for view in range(size.queries[landmark % 2]):
            yield Shot(f"toy/jpg/place{landmark:03d}_q{view:05d}.jpg", "query", EVALUATION, landmark, view, QUERY)
        for view in range(size.database):
            yield Shot(f"toy/jpg/place{landmark:03d}_{view:06d}.jpg", "database", EVALUATION, landmark, view)


def _distractors(size: Size) -> Iterator[Shot]:
    folder = "toy_distractors/jpg"
    for landmark in range(size.distractors[0]):
        for view in range(size.distractors[1]):
            yield Shot(f"{folder}/other{landmark:04d}_{view:03d}.jpg", "distractor", DISTRACTORS, landmark, view)
    for number in range(size.streets[0]):
        yield Shot(f"{folder}/street{number:05d}.jpg", "distractor", STREETS, number, 1)
