"""The search behind the page: a photo or a part of it in, ranked photos of the database out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.data.images import Box, CorruptImageError, ImageItem, crop, decode_image, image_size, shrink
from superglobal.errors import InputError
from superglobal.models.extract import extract
from superglobal.models.network import RetrievalNetwork
from superglobal.reranking.registry import apply_reranker
from superglobal.retrieval.rows import Rows
from superglobal.retrieval.search import search
from superglobal.retrieval.whitening import Statistics

FirstStage = Callable[[np.ndarray, int, np.ndarray | None], tuple[np.ndarray, np.ndarray]]
"""(queries (Q, D), k, excluded ids (Q,) or None) -> scores (Q, k) and ids (Q, k), best first."""
_AT_ONCE = 4  # photos in memory, each of hundreds of MB at most
_PREVIEW = 800  # px, the longer side of a photo that is shown beside its results


@dataclass(frozen=True)
class Photo:
    """What is searched for: `name` as it is shown, the file, and its id if it is one of the database, which it is then
    not to find.
    """

    name: str
    path: Path
    own: int | None = None


@dataclass(frozen=True)
class Described:
    """A photo with its descriptor.

    Attributes:
        photo, box: what was described; box in pixels of the upright photo, or None for all of it.
        size: (width, height) of the whole upright photo, in pixels.
        preview: (h, w, 3) uint8, the whole photo made small.
        descriptor: (1, D) float32, unit norm, as the network gives it.
        seconds: of "decode" and "describe".
    """

    photo: Photo
    box: Box | None
    size: tuple[int, int]
    preview: np.ndarray
    descriptor: np.ndarray
    seconds: dict[str, float]


@dataclass(frozen=True)
class Hit:
    """A photo of the database at a rank, from 1; `before` is its rank without reranking, `score` None beyond M."""

    id: int
    rank: int
    before: int
    score: float | None


@dataclass(frozen=True)
class Found:
    """Results, best first, and the seconds of "search" and, if there was one, "rerank"."""

    hits: list[Hit]
    reranked: bool
    seconds: dict[str, float]


@dataclass
class PhotoSearch:
    """A database that is searched by photos; safe to call from several threads, which take turns at the network.

    Args:
        network: in evaluation mode, on `device`.
        database: of the network's descriptors, under `statistics` if there are any.
        images, names: of the database, by id.
        max_side: as the database was described.
        kind, fixed: of reranking, with its settings beside M, K and beta.
        statistics: what a descriptor loses before it is compared.
        first: a search by an index; None for the exact one.
        max_pixels: a larger photo is refused.
    """

    network: RetrievalNetwork
    database: Rows
    images: Sequence[ImageItem]
    names: Sequence[str]
    max_side: int | None = None
    device: str = "cpu"
    kind: str = "superglobal"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    statistics: Statistics | None = None
    first: FirstStage | None = None
    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        self._turn = threading.Lock()
        self._at_once = threading.BoundedSemaphore(_AT_ONCE)

    def __len__(self) -> int:
        return len(self.database)

    def photo(self, number: int) -> Photo:
        """A photo of the database; InputError for a number that is none."""
        if not 0 <= number < len(self):
            raise InputError(f"no photo {number} in a database of {len(self)}")
        return Photo(self.names[number], self.images[number].path, number)

    def reachable(self, photo: Photo | None = None) -> int:
        """How many photos a search can find."""
        own = photo is not None and photo.own is not None
        return len(self.database) - len(self.database.skipped) - own

    def describe(self, photo: Photo, box: Box | None = None) -> Described:
        """Decode a photo and describe it, or what `box` cuts out of it.

        Raises:
            InputError: the photo is gone, is none, is larger than `max_pixels`, or the box is empty; it names the
                photo by its name and never by its place on the disk.
        """
        with self._at_once:
            return self._described(photo, box)

    def find(
        self, query: Described, *, M: int = 400, K: int = 9, beta: float = 0.15, rerank: bool = True, count: int = 40
    ) -> Found:
        """The first `count` photos, reranked or not.

        M: of the shortlist, at most all that can be found. K, beta: as the reranking takes them.

        Raises:
            InputError: there is nothing to find, or the reranking refuses K or beta.
        """
        most = self.reachable(query.photo)
        if most < 1:
            raise InputError("the database has no other photo to be found")
        depth = min(max(M, count), most)
        exclude = None if query.photo.own is None else np.array([query.photo.own])
        seconds: dict[str, float] = {}
        with self._turn:
            with _timed(seconds, "search"):
                q = query.descriptor
                if self.statistics is not None:
                    q = np.array(self.statistics.apply(q, "query").block(0, 1))
                scores, ids = self._first(q, depth, exclude)
            order = ids
            if rerank:
                with _timed(seconds, "rerank"):
                    values = {**self.fixed, "M": min(M, depth), "K": K, "beta": beta}
                    second = apply_reranker(self.kind, values, q, self.database, ids, device=self.device)
                    scores, order = second.scores, second.ids
        before = {number: place for place, number in enumerate(ids[0].tolist(), 1)}
        hits = [
            Hit(number, rank, before[number], score if np.isfinite(score) else None)
            for rank, (number, score) in enumerate(zip(order[0].tolist(), scores[0].tolist(), strict=True), 1)
        ]
        return Found(hits[:count], rerank, seconds)

    def _described(self, photo: Photo, box: Box | None) -> Described:
        seconds: dict[str, float] = {}
        try:
            with _timed(seconds, "decode"):
                whole = self._decoded(photo.path)
                part = shrink(whole if box is None else crop(whole, box), self.max_side)
        except OSError as error:
            raise InputError(f"{photo.name} cannot be read any more ({error.strerror}); upload it again") from error
        except CorruptImageError as error:
            raise InputError(f"{photo.name} cannot be searched for: {error}") from error
        with self._turn, _timed(seconds, "describe"):
            descriptor = extract(self.network, np.array(part, order="C"))
        height, width = whole.shape[:2]
        return Described(photo, box, (width, height), shrink(whole, _PREVIEW), descriptor, seconds)

    def _first(self, q: np.ndarray, k: int, exclude: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if self.first is not None:
            return self.first(q, k, exclude)
        return search(q, self.database, k, device=self.device, exclude=exclude)

    def _decoded(self, path: Path) -> np.ndarray:
        """(H, W, 3) uint8, upright; refused by its header where it is too large."""
        data = path.read_bytes()
        width, height = image_size(data)
        if width * height > self.max_pixels:
            limit = self.max_pixels / 1e6
            raise CorruptImageError(
                f"{width} x {height} pixels are more than the {limit:g} megapixels allowed: shrink it"
            )
        return decode_image(data)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


@dataclass(frozen=True)
class Opened:
    """A database that can be searched, and queries of its own that the data set has."""

    name: str
    search: PhotoSearch
    queries: Sequence[ImageItem]
    query_names: Sequence[str]
