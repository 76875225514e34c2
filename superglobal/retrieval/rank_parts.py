"""Exact ranks over a database in parts, each searched apart: a rank is the sum of the parts' numbers of better rows.

1. Whoever has a target's row tells its score: `target_scores(Q, part, ids)`.
2. Each part counts, for all targets: `count_better(Q, part, scores, ids, start)`.
3. The counts of all parts, added up, are the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from superglobal.errors import InputError
from superglobal.retrieval.ranks import Counter, check_targets
from superglobal.retrieval.scan import scan
from superglobal.retrieval.vectors import as_exclude, as_queries, as_rows, pair_scores


def target_scores(Q: Any, X: Any, targets: Sequence[Any]) -> list[np.ndarray]:
    """The float64 scores by which rows of this part are ordered.

    Q: (Q, D), X: (n, D) or anything `as_rows` takes, unit L2 norm. targets: per query ids of rows of this part, counted
    from its own first.

    Returns per query a float64 array, in the order of its targets.
    Raises InputError for an id outside the part, or of a skipped row.
    """
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    ids = check_targets(targets, len(queries), rows, None)
    counts = [len(one) for one in ids]
    scores = pair_scores(queries, rows, np.repeat(np.arange(len(queries)), counts), np.concatenate(ids))
    return np.split(scores, np.cumsum(counts)[:-1])


def count_better(
    Q: Any,
    X: Any,
    scores: Sequence[Any],
    ids: Sequence[Any],
    start: int = 0,
    *,
    device: str | torch.device | None = None,
    block_rows: int = 65536,
    exclude: Any = None,
) -> list[np.ndarray]:
    """How many rows of this part come before each target in the order (-score, id) of the whole database.

    Q: (Q, D), the same for all parts, X: (n, D) or anything `as_rows` takes, unit L2 norm; rows start..start+n-1 of the
    whole. scores, ids: per query the targets' `target_scores` and their ids in the whole, wherever they lie. exclude:
    (Q,) ids in the whole, one per query, taken out of the ranking. Machines whose float64 sums differ in the last bit
    may order rows that are no nearer than that otherwise.

    Returns per query an int64 array, in the order of its targets.
    Raises InputError for scores that no inner product of unit vectors has or that are not float64, for an excluded
    target, a skipped row of this part, or descriptors that `search` refuses.
    """
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    if start < 0:
        raise InputError(f"start: expected the number of the part's first row in the whole database, got {start}")
    excluded = as_exclude(exclude, len(queries))
    flat, places, counts = _flat_targets(scores, ids, len(queries), excluded)
    skipped = np.isin(places, rows.skipped + start)
    if skipped.any():
        raise InputError(f"targets: image {places[skipped][0]} was skipped when descriptors were made: it has no rank")
    local = None if excluded is None else np.maximum(excluded - start, -1)

    def make(tolerance: float) -> list[Counter]:
        return [Counter(queries, flat, places, counts, device, tolerance, start)]

    (counter,) = scan(queries, rows, make, local, device, block_rows)
    return counter.ranks()


def _flat_targets(
    scores: Sequence[Any], ids: Sequence[Any], n_queries: int, excluded: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(T,) float64 scores, (T,) int64 ids, and how many each query has."""
    if len(scores) != n_queries or len(ids) != n_queries:
        raise InputError(f"targets: expected scores and ids of {n_queries} queries, got {len(scores)} and {len(ids)}")
    flat, places = [], []
    for query, (one, own) in enumerate(zip(scores, ids, strict=True)):
        values, numbers = np.asarray(one), np.asarray(own)
        if values.shape != numbers.shape or values.ndim != 1:
            raise InputError(
                f"targets of query {query}: expected a score for each id, got {values.shape} and {numbers.shape}"
            )
        if values.size and (values.dtype != np.float64 or numbers.dtype.kind not in "iu" or numbers.min() < 0):
            raise InputError(
                f"targets of query {query}: expected float64 scores, as of target_scores, and ids from 0, got "
                f"{values.dtype} and {numbers.dtype}"
            )
        if not (np.abs(values) < 1.01).all():
            raise InputError(f"targets of query {query}: expected scores of unit vectors, between -1 and 1")
        if excluded is not None and (numbers == excluded[query]).any():
            raise InputError(f"targets of query {query}: id {excluded[query]} is excluded, so it has no rank")
        flat.append(values.astype(np.float64))
        places.append(numbers.astype(np.int64))
    return np.concatenate(flat), np.concatenate(places), np.array([len(one) for one in flat])
