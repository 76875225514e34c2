"""Exact nearest neighbours by inner product, the same ids from every backend."""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from superglobal.errors import InputError
from superglobal.retrieval.rows import Rows, as_exclude, as_queries, as_rows
from superglobal.retrieval.scan import Block, scan
from superglobal.retrieval.scores import pair_scores, scored_where

BACKENDS = ("auto", "faiss", "torch")
_EXTRA = 32  # candidates that FAISS is asked for beyond k, so that the edge of a list is mostly settled by them
_CROWD = 1024  # undecided candidates of a query beyond k, from which on they are scored in float64 at once
_UNDER_ALL = np.float32(-2)  # under every inner product of unit vectors


def search(
    Q: Any,
    X: Any,
    k: int = 400,
    *,
    backend: str = "auto",
    device: str | torch.device | None = None,
    block_rows: int = 65536,
    exclude: Any = None,
    dtype: Any = np.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """The k database rows of largest inner product per query, exact, in the total order (-score, id).

    Q: (Q, D), X: (N, D) or anything `as_rows` takes, unit L2 norm. X is streamed in blocks, once. `backend`: "torch"
    (any device), "faiss" (its own search of each block, CPU) or "auto" (torch); all give the same ids, because
    near-ties are settled by float64 scores. `exclude`: (Q,) ids, one per query, never returned (leave-one-out).
    `dtype`: of the scores; `merge_shortlists` needs float64, which order lists of several databases.

    Returns scores (Q, k) and ids (Q, k) int64, best first.
    Raises InputError for k outside 1..N, a bad row (NaN, zero, not unit), or a dimension mismatch.
    """
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    excluded = as_exclude(exclude, len(queries))
    target = torch.device(device or "cpu")
    faiss = _uses_faiss(backend, target)

    def make(tolerance: float) -> list[Shortlist]:
        return [Shortlist(queries, rows, k, excluded, faiss, tolerance)]

    (found,) = scan(queries, rows, make, excluded, target, block_rows, check=faiss)
    scores, ids = found.result()
    return scores.astype(dtype), ids


def merge_shortlists(
    parts: Sequence[tuple[Any, Any]], k: int | None = None, starts: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One list per query out of those of parts of a database that were searched apart: those of the whole, exactly.

    parts: pairs (scores (Q, k_p) float64, ids (Q, k_p)), as `search(..., dtype=np.float64)` gives them with the same
    queries; a part's k_p is k, or all its rows. An id of -1 pads a short list. k: length of the lists, by default
    the longest part's. starts: the number in the whole database of each part's row 0; without it ids are the whole's.

    Returns scores (Q, k) float64 and ids (Q, k) int64; where there are fewer, -inf and -1 at the end.
    Raises InputError for float32 scores (rows that differ in float64 tie there), other shapes, an id in two parts.
    """
    if not parts or (starts is not None and len(starts) != len(parts)):
        raise InputError(f"parts: expected at least one, and as many starts, got {len(parts)} and {starts}")
    pairs = [(np.asarray(scores), np.asarray(ids)) for scores, ids in parts]
    for number, (scores, ids) in enumerate(pairs):
        if scores.shape != ids.shape or scores.ndim != 2 or len(scores) != len(pairs[0][0]):
            raise InputError(f"part {number}: expected scores and ids ({len(pairs[0][0])}, k), got {scores.shape}")
        if scores.dtype != np.float64:
            raise InputError(f"part {number}: scores are {scores.dtype}; search(..., dtype=np.float64) keeps the order")
    offsets = starts or [0] * len(pairs)
    ids = np.concatenate([np.where(i < 0, -1, i + low) for (_, i), low in zip(pairs, offsets, strict=True)], axis=1)
    scores = np.where(ids < 0, -np.inf, np.concatenate([s for s, _ in pairs], axis=1))
    ordered = np.sort(ids, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        raise InputError(f"parts: id {ordered[:, 1:][twice][0]} is in two of them; give starts, or ids of the whole")
    return _best(scores, ids, k or max(s.shape[1] for s, _ in pairs))


def faiss_module(label: str = "") -> Any:
    """Return the module `faiss`. Raises InputError, which begins with `label`, if it is not installed."""
    try:
        return importlib.import_module("faiss")  # by name: its type stubs are incomplete
    except ImportError as error:
        raise InputError(
            f"{label}FAISS is not installed: pip install faiss-cpu (or faiss-gpu), or use index=flat, which gives the "
            "exact result without it"
        ) from error


def _uses_faiss(backend: str, device: torch.device) -> bool:
    if backend not in BACKENDS:
        raise InputError(f"backend: expected auto, faiss or torch, got {backend!r}")
    if backend != "faiss":
        return False
    if device.type != "cpu":
        raise InputError(f"backend faiss runs on the CPU, got device {device}; use backend torch")
    faiss_module("backend faiss: ")
    return True


def _best(scores: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first k of each row in the order (-score, id)."""
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


class Shortlist:
    """The best k rows of each query, out of blocks shown one after the other (a consumer of `scan`).

    Kept is every row whose approximate score is not surely under the k-th best seen so far: under it by twice the
    tolerance, since both may err by it. In the end these few are scored in float64. Where copies of an image would
    make them many, they are scored as they come, equal rows once.
    """

    def __init__(
        self,
        queries: np.ndarray,
        rows: Rows,
        k: int,
        excluded: np.ndarray | None,
        faiss: bool,
        tolerance: float,
    ) -> None:
        """`tolerance`: of the approximate scores. Raises InputError for k outside the rows that can be returned."""
        available = len(rows) - len(rows.skipped) - (excluded is not None)
        if not isinstance(k, int | np.integer) or not 1 <= k <= available:
            raise InputError(f"k: expected 1..{available} for a database of {len(rows)} rows, got {k}")
        self._queries, self._rows, self._k, self._faiss = queries, rows, int(k), faiss
        self._tolerance, self._error = tolerance, 0.0
        self._floor = np.full(len(queries), _UNDER_ALL)
        self._kept = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0, bool))
        self._unsorted = 0

    def add(self, block: Block) -> None:
        """Keep what may be among the best."""
        query_of, row_of, scores = self._candidates(block)
        exact = np.zeros(len(query_of), bool)
        crowded = np.flatnonzero(np.bincount(query_of, minlength=len(self._queries)) > self._k + _CROWD)
        if len(crowded):
            many = np.isin(query_of, crowded)
            scores[many] = block.pair_scores(query_of[many], row_of[many], scores[many])
            exact[many] = True
            keep = ~many
            keep[np.flatnonzero(many)[_first(query_of[many], scores[many], row_of[many], self._k)]] = True
            query_of, row_of, scores, exact = query_of[keep], row_of[keep], scores[keep], exact[keep]
        new = (query_of, row_of + block.start, scores, exact)
        self._kept = tuple(np.concatenate(pair) for pair in zip(self._kept, new, strict=True))  # type: ignore[assignment]
        self._unsorted += len(query_of)
        if self._unsorted > len(self._queries) * self._k // 2:
            self._cut()

    def finish(self) -> float:
        self._cut()
        self._settle(np.ones(len(self._kept[0]), bool))
        return self._error

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores (Q, k) float64 and ids (Q, k), best first, after `finish`."""
        query_of, ids, scores, _ = self._kept
        best = _first(query_of, scores, ids, self._k)
        shape = (len(self._queries), self._k)
        return scores[best].reshape(shape), ids[best].reshape(shape)

    def _candidates(self, block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query, row in the block and approximate score of every pair at or above the floors."""
        if self._faiss and (found := self._by_faiss(block)) is not None:
            return found
        scores = block.scores
        # At first everything is above the floor; the block's own k-th best are a better one.
        if scores.shape[1] > 2 * self._k and (self._floor == _UNDER_ALL).all():
            self._raise_to_kth(scores)
            return self._above_floor(scores)
        candidates = self._above_floor(scores)
        if len(candidates[0]) > 2 * len(scores) * self._k:
            self._raise_to_kth(scores)
            candidates = self._above_floor(scores)
        return candidates

    def _above_floor(self, scores: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return queries, rows of the block and float64 scores."""
        return scored_where(scores >= torch.from_numpy(self._floor).to(scores.device)[:, None], scores)

    def _raise_to_kth(self, scores: torch.Tensor) -> None:
        """Raise the floors to each query's k-th best score (Q, n) of a block of at least k rows."""
        self._raise_floor(scores.topk(self._k, dim=1).values[:, -1].cpu().numpy())

    def _by_faiss(self, block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """FAISS's best of a block; None if more of it than it was asked for may be above the floor."""
        import faiss

        count = min(self._k + _EXTRA, len(block.rows))
        scores, row_of = faiss.knn(self._queries, block.rows, count, metric=faiss.METRIC_INNER_PRODUCT)
        block.pair_scores(np.arange(len(scores)), row_of[:, 0].astype(np.int64), scores[:, 0])
        last = scores.min(axis=1)
        scores[(row_of == block.excluded[:, None]) | np.isin(row_of, block.skipped)] = -np.inf
        if count >= self._k:
            self._raise_floor(-np.partition(-scores, self._k - 1, axis=1)[:, self._k - 1])
        if count < len(block.rows) and (last >= self._floor).any():
            return None
        query_of, place = np.nonzero(scores >= self._floor[:, None])
        return query_of, row_of[query_of, place].astype(np.int64), scores[query_of, place].astype(np.float64)

    def _raise_floor(self, least: np.ndarray) -> None:
        """`least`: (Q,) a score that k rows of each query are known to reach, to within the tolerance."""
        floor = np.nextafter((least - 2 * self._tolerance).astype(np.float32), np.float32(-np.inf))
        self._floor = np.maximum(self._floor, floor)

    def _cut(self) -> None:
        """Drop what is surely not among the best k; score in float64 where that leaves many."""
        query_of, ids, scores, _ = self._kept
        order = np.lexsort((-scores, query_of))
        counts = np.bincount(query_of, minlength=len(self._queries))
        kth = np.minimum(np.cumsum(counts) - counts + self._k - 1, len(order) - 1)
        least = np.where(counts >= self._k, scores[order[kth]] if len(order) else 0, _UNDER_ALL)
        self._raise_floor(least)
        self._keep(scores >= self._floor[query_of])
        counts = np.bincount(self._kept[0], minlength=len(self._queries))
        many = (counts > 2 * (self._k + _CROWD))[self._kept[0]]
        if many.any():
            self._settle(many)
            query_of, ids, scores, _ = self._kept
            keep = ~many
            keep[np.flatnonzero(many)[_first(query_of[many], scores[many], ids[many], self._k)]] = True
            self._keep(keep)
        self._unsorted = 0

    def _settle(self, which: np.ndarray) -> None:
        """Score the chosen of what is kept in float64, unless that was done."""
        query_of, ids, scores, exact = self._kept
        todo = np.flatnonzero(which & ~exact)
        settled = pair_scores(self._queries, self._rows, query_of[todo], ids[todo])
        self._error = max(self._error, float(np.abs(settled - scores[todo]).max(initial=0)))
        scores[todo] = settled
        exact[todo] = True

    def _keep(self, keep: np.ndarray) -> None:
        query_of, ids, scores, exact = self._kept
        self._kept = (query_of[keep], ids[keep], scores[keep], exact[keep])


def _first(query_of: np.ndarray, scores: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
    """Positions of the first k of each query in the order (-score, id), query by query."""
    order = np.lexsort((ids, -scores, query_of))
    ordered = query_of[order]
    place = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return order[place < k]
