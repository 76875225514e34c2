"""Search the database of the search page for images similar to a query image or to a box in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.data.images import (
    MAX_PIXELS,
    Box,
    CorruptImageError,
    ImageItem,
    crop,
    decode_image,
    file_signature,
    shrink,
)
from superglobal.errors import InputError
from superglobal.models.extract import extract
from superglobal.models.network import RetrievalNetwork
from superglobal.reranking.registry import apply_reranker, get_reranker
from superglobal.retrieval.rows import Rows
from superglobal.retrieval.search import search
from superglobal.retrieval.whitening import Whitening
from superglobal.utils.io import read_file

FirstStage = Callable[[np.ndarray, int, np.ndarray | None], tuple[np.ndarray, np.ndarray]]
"""Search function: takes queries (Q, D), k and excluded ids (Q,) or None; returns scores and ids (Q, k), best first."""
MAX_RESULTS = 2000  # maximum number of results that the page shows; FAISS returns at most 2048 on a GPU
_MAX_DECODED = 2  # maximum number of images decoded at the same time; each can take more than 1 GB
_MAX_SECONDS = 10.0  # maximum time to wait until an image can be decoded, and then to decode it
_PREVIEW_SIDE = 800  # longer side of the query image that the page shows, in pixels
_MIN_SHORTLIST = 50  # minimum number of images in the first search for a query
_SAMPLE = 256  # maximum number of database images whose nearest neighbors show how similar related images are
_MAX_FALSE_ALARMS = 0.1  # default of `is_probably_absent`


@dataclass(frozen=True)
class QueryImage:
    """Image file to search for."""

    name: str  # name shown on the page
    path: Path
    id: int | None = None  # database id of the image, to exclude it from the results; None if it is not in the database


@dataclass(frozen=True)
class Query:
    """Query image with its descriptor."""

    image: QueryImage
    box: Box | None  # in pixels of the upright image; None for the whole image
    size: tuple[int, int]  # (width, height) of the whole upright image, in pixels
    preview: np.ndarray  # (h, w, 3) uint8, the whole image shrunk for the page
    descriptor: np.ndarray  # (1, D) float32, unit norm, whitened like the database
    seconds: dict[str, float]  # duration of the stages "decode" and, if the descriptor was not stored, "extract"


@dataclass(frozen=True)
class Hit:
    """Database image in the results of a search."""

    id: int
    rank: int  # starts at 1
    rank_before: int  # rank before reranking, starts at 1
    score: float | None  # similarity or, after reranking, the new score; None if only other images were reranked


@dataclass(frozen=True)
class SearchResult:
    """Results of a search."""

    hits: list[Hit]  # best first
    reranked: bool
    seconds: dict[str, float]  # duration of the stages "search" and, if reranked, "rerank"
    is_absent: bool = False  # whether the database probably contains no image of the query's object


@dataclass
class ImageSearch:
    """Database that can be searched by image.

    The methods are thread-safe; only one thread at a time uses the network.
    """

    network: RetrievalNetwork  # in evaluation mode, on `device`
    database: Rows  # descriptors of the database images, extracted by `network` and whitened by `whitening`
    images: Sequence[ImageItem]  # database images, indexed by database id
    names: Sequence[str]  # names of the database images, indexed by database id
    max_side: int | None = None  # longer side in pixels to which larger images are shrunk; None for no limit
    device: str = "cpu"
    kind: str = "superglobal"  # name of the reranker
    parameters: Mapping[str, Any] = field(default_factory=dict)  # parameters of the reranker, except M, K and beta
    whitening: Whitening | None = None  # whitening to apply to queries; None for no whitening
    first_stage: FirstStage | None = None  # search with an approximate index; None for exact search
    max_pixels: int = MAX_PIXELS  # images with more pixels are rejected
    signatures: Sequence[str] = ()  # `file_signature` of each database image when its descriptor was extracted

    def __post_init__(self) -> None:
        self._network_lock = threading.Lock()
        self._decoding = threading.BoundedSemaphore(_MAX_DECODED)
        self._nearest = self._nearest_similarities()

    def __len__(self) -> int:
        return len(self.database)

    def database_image(self, number: int) -> QueryImage:
        """Return the database image with the id `number`, so that it can be searched for.

        Raises:
            InputError: there is no image with this id.
        """
        if not 0 <= number < len(self):
            raise InputError(f"there is no photo {number}: expected a number from 0 to {len(self) - 1}")
        return QueryImage(self.names[number], self.images[number].path, number)

    def count_reachable(self, image: QueryImage | None = None) -> int:
        """Count the database images that a search can return, without the query `image` if it is a database image."""
        excluded = image is not None and image.id is not None
        return len(self.database) - len(self.database.skipped) - excluded

    def extract(self, image: QueryImage, box: Box | None = None) -> Query:
        """Decode an image, and extract the descriptor of the whole image or of a box.

        The descriptor of a whole database image is read from the database, unless its file has changed.

        Raises:
            InputError: the file was deleted, is not an image, has more than `max_pixels` pixels or takes too long to
                decode, the server is busy, or the box is empty. The message contains the name of the image but not its
                path, which the page must not reveal.
        """
        seconds: dict[str, float] = {}
        with self._decoding_slot():
            try:
                with _timed(seconds, "decode"):
                    data = read_file(image.path)
                    whole = decode_image(data, max_pixels=self.max_pixels, seconds=_MAX_SECONDS)
                    pixels = shrink(whole if box is None else crop(whole, box), self.max_side)
            except OSError as error:
                raise InputError(
                    f"{image.name}: cannot be read ({error.strerror}); upload the image, or choose another one"
                ) from error
            except CorruptImageError as error:
                raise InputError(f"{image.name}: cannot be used as a query: {error}") from error
            if box is None and self._is_stored(image, data):
                descriptor = self.database.take(np.array([image.id]))
            else:
                with self._network_lock, _timed(seconds, "extract"):
                    descriptor = extract(self.network, np.array(pixels, order="C"))
                    if self.whitening is not None:
                        descriptor = np.array(self.whitening.transform_rows(descriptor, "query").block(0, 1))
            height, width = whole.shape[:2]
            return Query(image, box, (width, height), shrink(whole, _PREVIEW_SIDE), descriptor, seconds)

    def _is_stored(self, image: QueryImage, data: bytes) -> bool:
        """Return True if the database contains the descriptor of an image whose file now has the contents `data`."""
        if image.id is None or not self.signatures or image.id in self.database.skipped:
            return False
        return self.images[image.id].box is None and self.signatures[image.id] == file_signature(data)

    def find_similar(
        self, query: Query, *, M: int = 400, K: int = 9, beta: float = 0.15, rerank: bool = True, count: int = 40
    ) -> SearchResult:
        """Search for the images most similar to a query, and rerank them if requested.

        Args:
            query: query with its descriptor.
            M: number of images to rerank. If the search can return fewer images, all of them are reranked.
            K: number of neighbors in reranking, for rerankers with this parameter.
            beta: weight of the neighbors in reranking, for rerankers with this parameter.
            rerank: whether to rerank.
            count: maximum number of images in the result. With an approximate index, at most M or `MAX_RESULTS` are
                returned, whichever is larger.

        Raises:
            InputError: the database contains no image that can be returned, or K or beta is invalid.
        """
        reachable = self.count_reachable(query.image)
        if reachable < 1:
            raise InputError("the database contains no photos besides the query; add photos to it")
        k = min(max(M, _MIN_SHORTLIST, count if self.first_stage is None else 0), reachable)
        longest = min(max(k, MAX_RESULTS), reachable)
        count = min(count, longest)
        exclude = None if query.image.id is None else np.array([query.image.id])
        seconds: dict[str, float] = {}
        with self._network_lock:
            with _timed(seconds, "search"):
                q = query.descriptor
                first_scores, first_ids = self._search(q, k, exclude)
                # A longer search with an approximate index can find other images, even some with higher scores. These
                # are added after those found so far, which keep their ranks.
                while first_ids.shape[1] < count:
                    length = min(2 * first_ids.shape[1], longest)
                    further_scores, further_ids = self._search(q, length, exclude)
                    new = np.flatnonzero(~np.isin(further_ids[0], first_ids))[: length - first_ids.shape[1]]
                    first_scores = np.concatenate([first_scores, further_scores[:, new]], axis=1)
                    first_ids = np.concatenate([first_ids, further_ids[:, new]], axis=1)
            scores, ids = first_scores, first_ids
            if rerank:
                with _timed(seconds, "rerank"):
                    known = get_reranker(self.kind).parameters
                    controls = {"M": min(M, k), "K": K, "beta": beta}
                    values = {**self.parameters, **{name: v for name, v in controls.items() if name in known}}
                    reranked = apply_reranker(self.kind, values, q, self.database, ids, device=self.device)
                    scores, ids = reranked.scores, reranked.ids
        rank_before = {number: rank for rank, number in enumerate(first_ids[0].tolist(), 1)}
        hits = [
            Hit(number, rank, rank_before[number], score if np.isfinite(score) else None)
            for rank, (number, score) in enumerate(zip(ids[0].tolist(), scores[0].tolist(), strict=True), 1)
        ]
        # Boxes are less similar to whole images than whole images are to each other, so the estimate is not for boxes.
        is_absent = query.box is None and is_probably_absent(first_scores[0, 0], self._nearest)
        return SearchResult(hits[:count], rerank, seconds, is_absent)

    def _nearest_similarities(self) -> np.ndarray:
        """Return the similarity of each image of a sample of the database to its nearest other image, (n,)."""
        ids = np.setdiff1d(np.arange(len(self)), self.database.skipped)
        if len(ids) < 2:
            return np.empty(0)
        sample = np.sort(np.random.default_rng(0).choice(ids, min(_SAMPLE, len(ids)), replace=False))
        return self._search(self.database.take(sample), 1, sample)[0][:, 0]

    def _search(self, q: np.ndarray, k: int, exclude: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and ids (Q, k) of the database images most similar to queries (Q, D), before reranking."""
        if self.first_stage is not None:
            return self.first_stage(q, k, exclude)
        return search(q, self.database, k, device=self.device, exclude=exclude)

    @contextmanager
    def _decoding_slot(self) -> Iterator[None]:
        """Wait until fewer than `_MAX_DECODED` images are in memory, and count one more during a `with` statement.

        Raises:
            InputError: the wait takes more than `_MAX_SECONDS`.
        """
        if not self._decoding.acquire(timeout=_MAX_SECONDS):
            raise InputError("the server is busy with other photos; try again in a minute")
        try:
            yield
        finally:
            self._decoding.release()


def is_probably_absent(similarity: float, nearest: np.ndarray, max_false_alarms: float = _MAX_FALSE_ALARMS) -> bool:
    """Return True if a database probably contains no image of the object that a query shows.

    This is so if the nearest image is less similar to the query than nearly all database images are to theirs.

    Args:
        similarity: cosine similarity of the query and its nearest database image, before reranking.
        nearest: (n,) similarities of database images to their nearest other database image.
        max_false_alarms: maximum rate of false alarms for queries like the database images, by the conformal p-value.
    """
    return bool((1 + (nearest <= similarity).sum()) / (1 + len(nearest)) <= max_false_alarms)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Measure the duration of the code in a `with` statement, and store it in `seconds[stage]`."""
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


@dataclass(frozen=True)
class SearchDatabase:
    """Database that the page searches.

    Attributes:
        name: name of the data set, shown on the page.
        search: object that searches the database.
        queries: example queries from the same data set; empty if the data set has no queries of its own.
        query_names: name of each example query, shown on the page.
    """

    name: str
    search: ImageSearch
    queries: Sequence[ImageItem]
    query_names: Sequence[str]
