"""Exact ranks of chosen database rows, counted in one pass over the database and never by sorting it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from superglobal.errors import InputError
from superglobal.precision import full_precision
from superglobal.retrieval.vectors import (
    TOLERANCE,
    as_exclude,
    as_queries,
    as_rows,
    block_pair_scores,
    block_size,
    pair_scores,
    to_tensor,
)


def exact_ranks(
    Q: Any,
    X: Any,
    targets: Sequence[Any],
    *,
    device: str | torch.device | None = None,
    block_rows: int = 65536,
    exclude: Any = None,
) -> list[np.ndarray]:
    """The 0-based rank of each target under the order (-score, id), score = float64 inner product.

    Q: (Q, D), X: (N, D) or anything `as_rows` takes, unit L2 norm. `targets`: per query the database ids whose
    ranks are wanted, in any order. `exclude`: (Q,) ids, one per query, taken out of the ranking.
    A rank is the number of rows that are better. A block of X is compared with the sorted target scores by
    binary search; only pairs nearer than the tolerance are scored again in float64.

    Returns per query an int64 array, in the order of its targets.
    Raises InputError for an id outside 0..N-1, an excluded target, or descriptors that `search` refuses.
    """
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    n_queries = len(queries)
    excluded = as_exclude(exclude, n_queries)
    ids = _check_targets(targets, n_queries, len(rows), excluded)
    counts = np.array([len(one) for one in ids])
    query_of, flat = np.repeat(np.arange(n_queries), counts), np.concatenate(ids)
    scores = pair_scores(queries, rows, query_of, flat)

    # Targets worst first, so that a row's place among them is the number of targets that it beats.
    order = np.lexsort((-flat, scores, query_of))
    slot = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
    sorted_scores = np.full((n_queries, max(1, counts.max())), np.inf)
    sorted_scores[query_of, slot] = scores[order]

    beaten = _count_beaten(queries, rows, sorted_scores, (query_of, scores, flat), excluded, device, block_rows)
    better = np.flip(np.cumsum(np.flip(beaten[:, 1:], axis=1), axis=1), axis=1)  # rows that beat target j
    ranks = np.empty(len(flat), np.int64)
    ranks[order] = better[query_of, slot]
    return np.split(ranks, np.cumsum(counts)[:-1])


def _check_targets(
    targets: Sequence[Any], n_queries: int, n_rows: int, excluded: np.ndarray | None
) -> list[np.ndarray]:
    """The targets as int64 arrays, all of them valid ids."""
    if len(targets) != n_queries:
        raise InputError(f"targets: expected one list of ids per query, {n_queries}, got {len(targets)}")
    ids = []
    for query, one in enumerate(targets):
        array = np.asarray(one)
        if array.size and array.dtype.kind not in "iu":
            raise InputError(f"targets of query {query}: expected integer ids, got {array.dtype}")
        array = array.astype(np.int64).ravel()
        outside = array[(array < 0) | (array >= n_rows)]
        if outside.size:
            raise InputError(f"targets of query {query}: id {outside[0]} is outside the database, 0..{n_rows - 1}")
        if excluded is not None and (array == excluded[query]).any():
            raise InputError(f"targets of query {query}: id {excluded[query]} is excluded, so it has no rank")
        ids.append(array)
    return ids


def _count_beaten(
    queries: np.ndarray,
    rows: Any,
    sorted_scores: np.ndarray,
    flat_targets: tuple[np.ndarray, np.ndarray, np.ndarray],
    excluded: np.ndarray | None,
    device: str | torch.device | None,
    block_rows: int,
) -> np.ndarray:
    """(Q, T+1) int64: how many rows beat exactly t of a query's targets, `sorted_scores` (Q, T) worst first."""
    place = torch.device(device or "cpu")
    n_queries, n_targets = sorted_scores.shape
    on_device = to_tensor(queries, place)
    above = to_tensor((sorted_scores + TOLERANCE).astype(np.float32), place)
    below = to_tensor((sorted_scores - TOLERANCE).astype(np.float32), place)
    offset = torch.arange(n_queries, device=place)[:, None] * (n_targets + 1)
    counts = np.zeros(n_queries * (n_targets + 1), np.int64)
    for start, block in rows.blocks(block_size(block_rows, n_queries)):
        with full_precision():
            rough = on_device @ to_tensor(block, place).T
        if excluded is not None:
            inside = np.flatnonzero((excluded >= start) & (excluded < start + len(block)))
            rough[inside, excluded[inside] - start] = -torch.inf
        surely = torch.searchsorted(above, rough)  # targets beaten beyond doubt
        near = torch.searchsorted(below, rough, right=True) > surely
        counts += torch.bincount((surely + offset)[~near], minlength=counts.size).cpu().numpy()
        query_of, row_of = (index.cpu().numpy() for index in near.nonzero(as_tuple=True))
        exact = block_pair_scores(queries, block, query_of, row_of)
        settled = _place_among(flat_targets, query_of, exact, row_of + start)
        counts += np.bincount(query_of * (n_targets + 1) + settled, minlength=counts.size)
    return counts.reshape(n_queries, n_targets + 1)


def _place_among(
    targets: tuple[np.ndarray, np.ndarray, np.ndarray], query_of: np.ndarray, scores: np.ndarray, ids: np.ndarray
) -> np.ndarray:
    """(P,) number of its query's targets that each row beats, by (-score, id); a row does not beat itself.

    `targets`: query numbers, float64 scores and ids of all targets; the others describe P rows alike.
    """
    target_query, target_score, target_id = targets
    n_rows = len(query_of)
    is_target = np.repeat([False, True], [n_rows, len(target_query)])
    all_queries = np.concatenate([query_of, target_query])
    keys = (
        is_target,  # at equal id a row comes before itself as a target, so it does not count it
        -np.concatenate([ids, target_id]),
        np.concatenate([scores, target_score]),
        all_queries,
    )
    order = np.lexsort(keys)
    seen = np.empty(len(order), np.int64)
    seen[order] = np.cumsum(is_target[order])
    earlier = np.searchsorted(target_query, query_of)  # targets of the queries before; target_query is sorted
    return seen[:n_rows] - earlier
