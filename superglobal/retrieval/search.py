"""Exact nearest neighbours by inner product, the same ids from every backend."""

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from superglobal.errors import InputError
from superglobal.precision import full_precision
from superglobal.retrieval.vectors import (
    TOLERANCE,
    Rows,
    as_exclude,
    as_queries,
    as_rows,
    block_pair_scores,
    block_size,
    pair_scores,
    to_tensor,
)

_EXTRA = 32  # candidates fetched beyond k, so that the edge of the list is mostly settled by the first pass

# A fetcher gives the best `count` of a block for every query: approximate scores and row numbers, (Q, count).
Fetch = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def search(
    Q: Any,
    X: Any,
    k: int = 400,
    *,
    backend: str = "auto",
    device: str | torch.device | None = None,
    block_rows: int = 65536,
    exclude: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k database rows of largest inner product per query, exact, in the total order (-score, id).

    Q: (Q, D), X: (N, D) or anything `as_rows` takes, unit L2 norm. X is streamed in blocks, once, and once more
    if ties at the edge of a list are left open. `backend`: "faiss" (CPU), "torch" (any device) or "auto"
    (FAISS where it is installed and the device is the CPU); all give the same ids, because near-ties are
    settled by float64 scores. `exclude`: (Q,) ids, one per query, never returned (leave-one-out).

    Returns scores (Q, k) float32 and ids (Q, k) int64, best first.
    Raises InputError for k outside 1..N, a bad row (NaN, zero, not unit), or a dimension mismatch.
    """
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    excluded = as_exclude(exclude, len(queries))
    available = len(rows) - (excluded is not None)
    if not isinstance(k, int | np.integer) or not 1 <= k <= available:
        raise InputError(f"k: expected 1..{available} for a database of {len(rows)} rows, got {k}")
    target = torch.device(device or "cpu")
    size = block_size(block_rows, len(queries))
    fetch = _fetcher(queries, backend, target)
    count = min(k + _EXTRA, len(rows))
    rough, ids = _fetch_all(rows, fetch, count, size, len(queries))
    query_of = np.repeat(np.arange(len(queries)), count)
    exact = pair_scores(queries, rows, query_of, ids.ravel()).reshape(ids.shape)
    if excluded is not None:
        exact[ids == excluded[:, None]] = -np.inf
    scores, best = _best(exact, ids, k)
    if count < len(rows):
        # Whatever was not fetched scores at most the worst fetched score, to within the tolerance.
        unsettled = np.flatnonzero(scores[:, -1] <= rough.min(axis=1) + 2 * TOLERANCE)
        if unsettled.size:
            skip = None if excluded is None else excluded[unsettled]
            scores[unsettled], best[unsettled] = _settle(
                queries[unsettled], rows, scores[unsettled], best[unsettled], skip, size, target
            )
    return scores.astype(np.float32), best


def _fetcher(queries: np.ndarray, backend: str, device: torch.device) -> Fetch:
    """The fetch function of a backend."""
    if backend not in ("auto", "faiss", "torch"):
        raise InputError(f"backend: expected auto, faiss or torch, got {backend!r}")
    has_faiss = importlib.util.find_spec("faiss") is not None
    if backend == "auto":
        backend = "faiss" if has_faiss and device.type == "cpu" else "torch"
    if backend == "torch":
        return _torch_fetcher(queries, device)
    if device.type != "cpu":
        raise InputError(f"backend faiss runs on the CPU, got device {device}; use backend torch")
    if not has_faiss:
        raise InputError(
            "backend faiss: FAISS is not installed; pip install 'superglobal[cpu]' or 'superglobal[gpu]', "
            "or use backend torch, which gives the same result"
        )
    return _faiss_fetcher(queries)


def _faiss_fetcher(queries: np.ndarray) -> Fetch:
    import faiss

    def fetch(block: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        return faiss.knn(queries, block, count, metric=faiss.METRIC_INNER_PRODUCT)

    return fetch


def _torch_fetcher(queries: np.ndarray, device: torch.device) -> Fetch:
    on_device = to_tensor(queries, device)

    def fetch(block: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        with full_precision():
            scores, numbers = (on_device @ to_tensor(block, device).T).topk(count, dim=1)
        return scores.cpu().numpy(), numbers.cpu().numpy()

    return fetch


def _fetch_all(rows: Rows, fetch: Fetch, count: int, size: int, n_queries: int) -> tuple[np.ndarray, np.ndarray]:
    """The best `count` of all rows by approximate score, unordered: scores and ids, (Q, count)."""
    scores = np.empty((n_queries, 0), np.float32)
    ids = np.empty((n_queries, 0), np.int64)
    for start, block in rows.blocks(size):
        more, numbers = fetch(block, min(count, len(block)))
        scores = np.concatenate([scores, more], axis=1)
        ids = np.concatenate([ids, numbers.astype(np.int64) + start], axis=1)
        if scores.shape[1] > count:
            keep = np.argpartition(-scores, count - 1, axis=1)[:, :count]
            scores = np.take_along_axis(scores, keep, axis=1)
            ids = np.take_along_axis(ids, keep, axis=1)
    return scores, ids


def _best(scores: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first k of each row in the order (-score, id)."""
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


def _settle(
    queries: np.ndarray,
    rows: Rows,
    scores: np.ndarray,
    ids: np.ndarray,
    excluded: np.ndarray | None,
    size: int,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """Exact lists of U queries with many candidates at the edge, by one more pass over X.

    `scores` and `ids` (U, k) are the lists found so far. Their k-th score can only rise, so every row that may
    still enter scores at least that, less the tolerance. Those are scored exactly and merged, block by block.
    """
    n_queries, k = ids.shape
    own = np.repeat(np.arange(n_queries), k)
    on_device = to_tensor(queries, device)
    for start, block in rows.blocks(size, check=False):
        with full_precision():
            rough = (on_device @ to_tensor(block, device).T).cpu().numpy()
        query_of, row_of = np.nonzero(rough >= (scores[:, -1:] - TOLERANCE))
        listed = np.isin(query_of * len(rows) + row_of + start, own * len(rows) + ids.ravel())
        if excluded is not None:
            listed |= row_of + start == excluded[query_of]
        query_of, row_of = query_of[~listed], row_of[~listed]
        exact = block_pair_scores(queries, block, query_of, row_of)
        all_queries = np.concatenate([own, query_of])
        all_ids = np.concatenate([ids.ravel(), row_of + start])
        all_scores = np.concatenate([scores.ravel(), exact])
        order = np.lexsort((all_ids, -all_scores, all_queries))
        first = np.searchsorted(all_queries[order], np.arange(n_queries))
        keep = order[first[:, None] + np.arange(k)]
        scores, ids = all_scores[keep], all_ids[keep]
    return scores, ids
