"""Exact nearest-neighbor search by inner product. All backends return the same ids."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from superglobal.errors import InputError, one_of
from superglobal.retrieval.rows import Rows, as_exclude, as_queries, as_rows, is_host
from superglobal.retrieval.scan import Block, scan
from superglobal.retrieval.scores import pair_scores, scored_where

BACKENDS = ("auto", "faiss", "torch")
FAISS_MAX_ROWS = 20_000
"""Largest number of database rows that the backend "auto" searches with FAISS.

Up to this size, FAISS takes at most a third longer than torch. The CPU time of search and exact ranks with FAISS,
divided by that with torch, is 1.12 for N = 5,000 rows, 1.31 for 20,000, 1.61 for 50,000 and 1.64 for 200,000, measured
on two cores by `python scripts/bench.py search --dtype float32 --rows N`.
"""
FAISS_GPU_RESULTS = 2048
"""Maximum number of results per query that FAISS supports on a GPU."""
_EXTRA = 32  # FAISS returns k + _EXTRA rows; the score of the last one usually proves that no others are needed
_CROWD = 1024  # if a query has more than k + _CROWD undecided candidates, they are scored in float64 immediately
_BELOW_ALL = np.float32(-2)  # less than every inner product of unit vectors


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
    """Find, for each query, the k database rows that have the largest inner products with it. The search is exact.

    Args:
        Q: (Q, D) queries, unit L2 norm.
        X: (N, D) database, unit L2 norm: an array, a memory map, a tensor or a `DescriptorStore`, float16, float32 or
            float64. It is usually read once, in blocks.
        k: number of results per query, 1..N.
        backend: "torch" (any device), "faiss" (the CPU, or a GPU with faiss-gpu) or "auto" (FAISS for up to 20,000 rows
            if it is installed, else torch). All return the same ids, because near-ties are decided by float64 scores.
        device: device to compute on; the CPU by default.
        block_rows: maximum number of database rows that are processed at a time.
        exclude: (Q,) ids, one per query, that are never returned (leave-one-out).
        dtype: dtype of the returned scores; `merge_shortlists` needs float64.

    Returns:
        Scores (Q, k) of `dtype` and ids (Q, k) int64, best first. Among equal scores, the lower id is first.

    Raises:
        InputError: k is outside 1..N, a row is invalid (NaN, zero or not of unit norm), or the dimensions of queries
            and database differ.
    """
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    excluded = as_exclude(exclude, len(queries))
    target = torch.device(device or "cpu")
    faiss = resolve_backend(backend, len(rows), k, target) == "faiss"

    def make(tolerance: float) -> list[Shortlist]:
        return [Shortlist(queries, rows, k, excluded, faiss, tolerance)]

    (shortlist,) = scan(queries, rows, make, excluded, target, block_rows, check=faiss)
    scores, ids = shortlist.result()
    return scores.astype(dtype), ids


def merge_shortlists(
    shards: Sequence[tuple[Any, Any]], k: int | None = None, starts: Sequence[int] | np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Merge the search results of all shards of a database. The result equals that of a search in the whole database.

    Args:
        shards: for each shard, scores (Q, k_s) float64 and ids (Q, k_s) from `search(..., dtype=np.float64)` with the
            same queries. k_s is k, or the number of rows of the shard if that is less. Shorter lists may be padded with
            the id -1.
        k: length of the merged lists; by default that of the longest list.
        starts: for each shard, the id of its first row in the whole database. None if the ids already refer to the
            whole database.

    Returns:
        Scores (Q, k) float64 and ids (Q, k) int64, best first; shorter lists are padded with -inf and -1.

    Raises:
        InputError: the scores are not float64 (different scores may become equal in float32), the shapes do not
            match, or two shards contain the same id.
    """
    if not shards:
        raise InputError("shards: expected at least one shard, got none")
    offsets = np.zeros(len(shards), np.int64) if starts is None else np.asarray(starts)
    if offsets.shape != (len(shards),) or offsets.dtype.kind not in "iu":
        raise InputError(f"starts={starts}: expected {len(shards)} integers, one row id per shard")
    if k is not None and (not isinstance(k, int | np.integer) or k < 1):
        raise InputError(f"k={k}: expected an integer >= 1")
    pairs = [(np.asarray(scores), np.asarray(ids)) for scores, ids in shards]
    for number, (scores, ids) in enumerate(pairs):
        n = len(pairs[0][0])
        if scores.shape != ids.shape or scores.ndim != 2 or len(scores) != n or ids.dtype.kind not in "iu":
            raise InputError(
                f"shard {number}: expected scores and integer ids of shape ({n}, k), got scores {scores.shape} and "
                f"{ids.dtype} ids {ids.shape}"
            )
        if scores.dtype != np.float64:
            raise InputError(f"shard {number}: expected float64 scores, got {scores.dtype}; use search(dtype=float64)")
    ids = np.concatenate([np.where(i < 0, -1, i + low) for (_, i), low in zip(pairs, offsets, strict=True)], axis=1)
    scores = np.where(ids < 0, -np.inf, np.concatenate([s for s, _ in pairs], axis=1))
    ordered = np.sort(ids, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if repeated.any():
        raise InputError(
            f"shards: two shards contain id {ordered[:, 1:][repeated][0]}; give starts, or ids in the whole database"
        )
    order = np.lexsort((ids, -scores), axis=1)[:, : k or max(s.shape[1] for s, _ in pairs)]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def faiss_module(label: str = "", instead: str = "index=flat, which gives the exact result") -> Any:
    """Import and return the module `faiss`.

    Args:
        label: start of the error message, such as "backend=faiss: ".
        instead: setting that does not require FAISS, for the error message.

    Raises:
        InputError: FAISS is not installed.
    """
    try:
        return importlib.import_module("faiss")  # imported by name, because its type stubs are incomplete
    except ImportError as error:
        raise InputError(
            f"{label}FAISS is not installed; run pip install faiss-cpu (or faiss-gpu), or use {instead}"
        ) from error


def faiss_on_gpu() -> bool:
    """Return True if FAISS is installed with GPU support and a GPU is available."""
    try:
        faiss = faiss_module()
    except InputError:
        return False
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def resolve_backend(backend: str, n_rows: int, k: int, device: str | torch.device) -> str:
    """Return the backend to search with, "faiss" or "torch".

    "auto" selects FAISS if it is installed, supports the device and k, and the database has at most `FAISS_MAX_ROWS`
    rows. Otherwise it selects torch.

    Args:
        backend: "auto", "faiss" or "torch".
        n_rows: number of database rows.
        k: number of results per query.
        device: device to compute on.

    Raises:
        InputError: the backend is unknown, or FAISS is requested and cannot be used.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend={backend}: expected {one_of(backend, BACKENDS)}")
    device = torch.device(device)
    supported = device.type == "cpu" or (device.type == "cuda" and faiss_on_gpu())
    fits = device.type == "cpu" or k + _EXTRA <= FAISS_GPU_RESULTS
    if backend == "auto":
        if n_rows > FAISS_MAX_ROWS or not supported or not fits:
            return "torch"
        try:
            faiss_module()
        except InputError:
            return "torch"
        return "faiss"
    if backend == "faiss":
        faiss_module("backend=faiss: ", "backend=torch, which gives the same result")
        if not supported:
            raise InputError(
                f"backend=faiss: expected the CPU, or a GPU and faiss-gpu, got {device}; use backend=torch"
            )
        if not fits:
            raise InputError(
                f"k={k}: expected at most {FAISS_GPU_RESULTS - _EXTRA} for backend=faiss on a GPU; use backend=torch"
            )
    return backend


@functools.cache
def _gpu_resources() -> Any:
    """Return FAISS's GPU resources, which are created once per process."""
    importlib.import_module("faiss.contrib.torch_utils")  # importing it makes FAISS accept tensors
    return faiss_module().StandardGpuResources()


def _faiss_best(block: Block, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the `count` best rows of a block for each query with FAISS, by float32 scores.

    Returns:
        Scores (Q, count) float32 and positions in the block (Q, count) int64, best first.
    """
    faiss = faiss_module()
    if is_host(block.queries.device):
        queries, vectors = block.queries.numpy(), block.vectors.numpy()
        return faiss.knn(queries, vectors, count, metric=faiss.METRIC_INNER_PRODUCT)
    resources = _gpu_resources()
    scores, row_of = faiss.knn_gpu(
        resources, block.queries, block.vectors.contiguous(), count, metric=faiss.METRIC_INNER_PRODUCT
    )
    return scores.cpu().numpy(), row_of.cpu().numpy()


class Shortlist:
    """Consumer of `scan` that collects the best k rows for each query.

    Each query has a floor. Rows with lower scores are dropped. The floor is the k-th best float32 score so far minus
    twice the tolerance, because each of the two compared scores may be wrong by the tolerance. At the end, the scores
    of the remaining rows are computed in float64. If too many rows remain before the end, such as copies of one image,
    their float64 scores are computed immediately.
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
        """Create an empty shortlist.

        Args:
            queries: (Q, D) float32.
            rows: rows of the database.
            k: number of results per query.
            excluded: (Q,) ids, one per query, that are never returned; None for none.
            faiss: True to search the blocks with FAISS.
            tolerance: assumed largest error of a float32 score.

        Raises:
            InputError: k is less than 1 or larger than the number of rows that can be returned.
        """
        available = len(rows) - len(rows.skipped) - (excluded is not None)
        if not isinstance(k, int | np.integer) or not 1 <= k <= available:
            raise InputError(f"k={k}: expected 1..{available} for a database of {len(rows)} rows")
        self._queries, self._rows, self._k, self._faiss = queries, rows, int(k), faiss
        self._tolerance, self._error = tolerance, 0.0
        self._floor = np.full(len(queries), _BELOW_ALL)
        self._kept = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0, bool))
        self._unsorted = 0

    def add(self, block: Block) -> None:
        """Add the rows of a block that may be among the best k."""
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
            self._prune()

    def finish(self) -> float:
        self._prune()
        self._score_exactly(np.ones(len(self._kept[0]), bool))
        return self._error

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return scores (Q, k) float64 and ids (Q, k) int64, best first. Call this after `finish`."""
        query_of, ids, scores, _ = self._kept
        best = _first(query_of, scores, ids, self._k)
        shape = (len(self._queries), self._k)
        return scores[best].reshape(shape), ids[best].reshape(shape)

    def _candidates(self, block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return all pairs of a query and a row of the block whose float32 score is not below the query's floor.

        Returns:
            Queries (P,) int64, positions in the block (P,) int64 and float32 scores (P,) as float64.
        """
        if self._faiss and (candidates := self._faiss_candidates(block)) is not None:
            return candidates
        scores = block.scores
        # Before the first block, the floors are below all scores. The k-th best score in the block gives a higher
        # floor.
        if scores.shape[1] > 2 * self._k and (self._floor == _BELOW_ALL).all():
            self._raise_to_kth(scores)
            return self._above_floor(scores)
        candidates = self._above_floor(scores)
        if len(candidates[0]) > 2 * len(scores) * self._k:
            self._raise_to_kth(scores)
            candidates = self._above_floor(scores)
        return candidates

    def _above_floor(self, scores: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return all pairs of a query and a row whose score is not below the query's floor.

        Args:
            scores: (Q, n) float32 scores of all pairs.

        Returns:
            Query indices (P,), positions in the block (P,) and scores (P,) of the pairs.
        """
        return scored_where(scores >= torch.from_numpy(self._floor).to(scores.device)[:, None], scores)

    def _raise_to_kth(self, scores: torch.Tensor) -> None:
        """Raise the floor of each query to match its k-th best score in `scores` (Q, n), n >= k."""
        self._raise_floor(scores.topk(self._k, dim=1).values[:, -1].cpu().numpy())

    def _faiss_candidates(self, block: Block) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Find, with FAISS, all pairs of a query and a row of the block whose score is not below the query's floor.

        Returns:
            Queries (P,) int64, positions in the block (P,) int64 and float32 scores (P,) as float64. None if there may
            be more such pairs, because FAISS returns only a limited number of rows per query.
        """
        n_rows = len(block.vectors)
        count = min(self._k + _EXTRA, n_rows)
        scores, row_of = _faiss_best(block, count)
        block.pair_scores(np.arange(len(scores)), row_of[:, 0].astype(np.int64), scores[:, 0])
        last = scores.min(axis=1)
        scores[(row_of == block.excluded[:, None]) | np.isin(row_of, block.skipped)] = -np.inf
        if count >= self._k:
            self._raise_floor(-np.partition(-scores, self._k - 1, axis=1)[:, self._k - 1])
        if count < n_rows and (last >= self._floor).any():
            return None
        query_of, column = np.nonzero(scores >= self._floor[:, None])
        return query_of, row_of[query_of, column].astype(np.int64), scores[query_of, column].astype(np.float64)

    def _raise_floor(self, reached: np.ndarray) -> None:
        """Raise the floor of each query to at least `reached` (Q,) minus twice the tolerance.

        `reached` contains, for each query, the k-th best float32 score of some of the rows of the database.
        """
        floor = np.nextafter((reached - 2 * self._tolerance).astype(np.float32), np.float32(-np.inf))
        self._floor = np.maximum(self._floor, floor)

    def _prune(self) -> None:
        """Drop rows that cannot be among the best k of their query.

        If too many rows of a query remain, compute their float64 scores and keep only the k best rows.
        """
        query_of, ids, scores, _ = self._kept
        order = np.lexsort((-scores, query_of))
        counts = np.bincount(query_of, minlength=len(self._queries))
        kth = np.minimum(np.cumsum(counts) - counts + self._k - 1, len(order) - 1)
        reached = np.where(counts >= self._k, scores[order[kth]] if len(order) else 0, _BELOW_ALL)
        self._raise_floor(reached)
        self._keep(scores >= self._floor[query_of])
        counts = np.bincount(self._kept[0], minlength=len(self._queries))
        many = (counts > 2 * (self._k + _CROWD))[self._kept[0]]
        if many.any():
            self._score_exactly(many)
            query_of, ids, scores, _ = self._kept
            keep = ~many
            keep[np.flatnonzero(many)[_first(query_of[many], scores[many], ids[many], self._k)]] = True
            self._keep(keep)
        self._unsorted = 0

    def _score_exactly(self, selected: np.ndarray) -> None:
        """Replace the float32 scores of some of the kept rows with float64 scores.

        `selected` is a bool mask over all kept rows, true for the rows to score.
        """
        query_of, ids, scores, exact = self._kept
        todo = np.flatnonzero(selected & ~exact)
        computed = pair_scores(self._queries, self._rows, query_of[todo], ids[todo])
        self._error = max(self._error, float(np.abs(computed - scores[todo]).max(initial=0)))
        scores[todo] = computed
        exact[todo] = True

    def _keep(self, keep: np.ndarray) -> None:
        """Drop rows from the shortlist. `keep` is a bool mask over all rows in the shortlist, true for rows to keep."""
        query_of, ids, scores, exact = self._kept
        self._kept = (query_of[keep], ids[keep], scores[keep], exact[keep])


def _first(query_of: np.ndarray, scores: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
    """Select the k best pairs of each query among n pairs of a query and a row.

    Pairs are ordered by descending score. Pairs with equal scores are ordered by ascending id.

    Args:
        query_of: (n,) query index of each pair.
        scores: (n,) score of each pair.
        ids: (n,) id of the row of each pair.
        k: maximum number of pairs per query.

    Returns:
        Indices of the selected pairs, int64, query by query, best first.
    """
    order = np.lexsort((ids, -scores, query_of))
    ordered = query_of[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return order[rank < k]
