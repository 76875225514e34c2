"""Search behind the page: an image or a box in it goes in, ranked images of the database come out."""

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
from superglobal.retrieval.whitening import Whitening

FirstStage = Callable[[np.ndarray, int, np.ndarray | None], tuple[np.ndarray, np.ndarray]]
"""(queries (Q, D), k, excluded ids (Q,) or None) -> scores (Q, k) and ids (Q, k), best first."""
_MAX_DECODED = 4  # images decoded at the same time, each of up to hundreds of MB
_PREVIEW_SIDE = 800  # pixels, longer side of the query image shown beside its results


@dataclass(frozen=True)
class QueryImage:
    """An image to search for."""

    name: str  # shown on the page
    path: Path
    id: int | None = None  # of a database image, which is excluded from its own results


@dataclass(frozen=True)
class Query:
    """An image with its descriptor."""

    image: QueryImage
    box: Box | None  # in pixels of the upright image; None for the whole image
    size: tuple[int, int]  # (width, height) of the whole upright image, in pixels
    preview: np.ndarray  # (h, w, 3) uint8, the whole image shrunk
    descriptor: np.ndarray  # (1, D) float32, unit norm, before whitening
    seconds: dict[str, float]  # of "decode" and "extract"


@dataclass(frozen=True)
class Hit:
    """A database image in the results."""

    id: int
    rank: int  # from 1
    rank_before: int  # from 1, before reranking
    score: float | None  # of the last stage; None beyond the M reranked images


@dataclass(frozen=True)
class SearchResult:
    """Hits, best first, and the seconds of "search" and "rerank"."""

    hits: list[Hit]
    reranked: bool
    seconds: dict[str, float]


@dataclass
class ImageSearch:
    """A database that can be searched by image; thread-safe, one thread at a time uses the network."""

    network: RetrievalNetwork  # in evaluation mode, on `device`
    database: Rows  # descriptors of the network, after `whitening`
    images: Sequence[ImageItem]  # of the database, by id
    names: Sequence[str]  # of the database, by id
    max_side: int | None = None  # longer side in pixels that the database images were shrunk to; None for no limit
    device: str = "cpu"
    kind: str = "superglobal"  # of reranking
    parameters: Mapping[str, Any] = field(default_factory=dict)  # of reranking, without M, K and beta
    whitening: Whitening | None = None  # applied to queries
    first_stage: FirstStage | None = None  # search of an index; None for exact search
    max_pixels: int = 100_000_000  # images with more are rejected

    def __post_init__(self) -> None:
        self._network_lock = threading.Lock()
        self._decoding = threading.BoundedSemaphore(_MAX_DECODED)

    def __len__(self) -> int:
        return len(self.database)

    def database_image(self, number: int) -> QueryImage:
        """Return a database image as query; raises InputError if there is no such id."""
        if not 0 <= number < len(self):
            raise InputError(f"no photo {number} in a database of {len(self)}")
        return QueryImage(self.names[number], self.images[number].path, number)

    def count_reachable(self, image: QueryImage | None = None) -> int:
        """Return the number of images that a search can find."""
        excluded = image is not None and image.id is not None
        return len(self.database) - len(self.database.skipped) - excluded

    def extract(self, image: QueryImage, box: Box | None = None) -> Query:
        """Decode an image and extract its descriptor, or that of a box in it.

        Raises:
            InputError: the file is gone, is not an image, has more than `max_pixels`, or the box is empty. The message
                contains the name of the image and never its path.
        """
        seconds: dict[str, float] = {}
        with self._decoding:
            try:
                with _timed(seconds, "decode"):
                    whole = self._decode(image.path)
                    pixels = shrink(whole if box is None else crop(whole, box), self.max_side)
            except OSError as error:
                raise InputError(f"{image.name} cannot be read ({error.strerror}); upload it again") from error
            except CorruptImageError as error:
                raise InputError(f"{image.name} cannot be searched for: {error}") from error
            with self._network_lock, _timed(seconds, "extract"):
                descriptor = extract(self.network, np.array(pixels, order="C"))
            height, width = whole.shape[:2]
            return Query(image, box, (width, height), shrink(whole, _PREVIEW_SIDE), descriptor, seconds)

    def find_similar(
        self, query: Query, *, M: int = 400, K: int = 9, beta: float = 0.15, rerank: bool = True, count: int = 40
    ) -> SearchResult:
        """Search and, if `rerank`, rerank; return at most `count` hits.

        `M` is limited to the images that can be found.

        Raises:
            InputError: there is no image to find, or the reranking rejects K or beta.
        """
        reachable = self.count_reachable(query.image)
        if reachable < 1:
            raise InputError("the database has no other photo to be found")
        k = min(max(M, count), reachable)
        exclude = None if query.image.id is None else np.array([query.image.id])
        seconds: dict[str, float] = {}
        with self._network_lock:
            with _timed(seconds, "search"):
                q = query.descriptor
                if self.whitening is not None:
                    q = np.array(self.whitening.transform_rows(q, "query").block(0, 1))
                if self.first_stage is not None:
                    scores, first_ids = self.first_stage(q, k, exclude)
                else:
                    scores, first_ids = search(q, self.database, k, device=self.device, exclude=exclude)
            ids = first_ids
            if rerank:
                with _timed(seconds, "rerank"):
                    values = {**self.parameters, "M": min(M, k), "K": K, "beta": beta}
                    reranked = apply_reranker(self.kind, values, q, self.database, ids, device=self.device)
                    scores, ids = reranked.scores, reranked.ids
        rank_before = {number: rank for rank, number in enumerate(first_ids[0].tolist(), 1)}
        hits = [
            Hit(number, rank, rank_before[number], score if np.isfinite(score) else None)
            for rank, (number, score) in enumerate(zip(ids[0].tolist(), scores[0].tolist(), strict=True), 1)
        ]
        return SearchResult(hits[:count], rerank, seconds)

    def _decode(self, path: Path) -> np.ndarray:
        """Return (H, W, 3) uint8, upright; check the size in the header before decoding."""
        data = path.read_bytes()
        width, height = image_size(data)
        if width * height > self.max_pixels:
            limit = self.max_pixels / 1e6
            raise CorruptImageError(
                f"{width} x {height} pixels, expected at most {limit:g} megapixels; shrink the image"
            )
        return decode_image(data)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


@dataclass(frozen=True)
class SearchDatabase:
    """A named database that can be searched, and example queries of its data set."""

    name: str
    search: ImageSearch
    queries: Sequence[ImageItem]
    query_names: Sequence[str]
