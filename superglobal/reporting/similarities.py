"""Histograms of similarities, counted exactly over all pairs of queries and database images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from superglobal.retrieval.rows import Rows, as_queries, as_rows
from superglobal.retrieval.scan import Block, scan
from superglobal.retrieval.scores import pair_scores

BINS = 200
EDGES = np.linspace(-1, 1, BINS + 1)
"""Of the bins, [low, high), the last one closed."""
_PER_UNIT = BINS / 2


def bin_of(scores: np.ndarray) -> np.ndarray:
    """The bin of each similarity in -1..1."""
    return np.clip(np.floor((scores + 1) * _PER_UNIT), 0, BINS - 1).astype(np.int64)


def similarity_counts(
    Q: Any,
    X: Any,
    sets: Sequence[Mapping[str, Any]],
    *,
    exclude: np.ndarray | None = None,
    device: str | torch.device | None = None,
    block_rows: int = 65536,
) -> dict[str, np.ndarray]:
    """How many pairs fall into each bin, by what the image is to the query.

    Q: (Q, D), X: (N, D) or anything `as_rows` takes, streamed once. sets: per query set name -> ids, disjoint.
    exclude: (Q,) ids, one per query, that do not count; nor do rows that were skipped.

    Returns the name of each set and "negative", all other images -> (BINS,) int64.
    """
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    (counter,) = scan(queries, rows, lambda tolerance: [_Counter(tolerance)], exclude, device, block_rows)
    names = list(dict.fromkeys(name for one in sets for name in one))
    found = {name: _counts_of(queries, rows, [one.get(name, ()) for one in sets], exclude) for name in names}
    return {**found, "negative": counter.counts - sum(found.values(), np.zeros(BINS, np.int64))}


def _counts_of(queries: np.ndarray, rows: Rows, ids: Sequence[Any], exclude: np.ndarray | None) -> np.ndarray:
    """(BINS,) of some images of each query."""
    query_of = np.repeat(np.arange(len(ids)), [len(one) for one in ids])
    row_of = np.concatenate([np.asarray(one, np.int64) for one in ids])
    counted = ~np.isin(row_of, rows.skipped)
    if exclude is not None:
        counted &= row_of != exclude[query_of]
    scores = pair_scores(queries, rows, query_of[counted], row_of[counted])
    return np.bincount(bin_of(scores), minlength=BINS)


class _Counter:
    """Counts the pairs of every block (a consumer of `scan`); float64 decides what lies near an edge."""

    def __init__(self, tolerance: float) -> None:
        self.counts = np.zeros(BINS, np.int64)
        # How near an edge, in bins, a float32 place does not say which side it is on.
        self._guard = _PER_UNIT * tolerance + 1e-4

    def finish(self) -> float:
        return 0.0

    def add(self, block: Block) -> None:
        place = (block.scores + 1) * _PER_UNIT
        counted = torch.isfinite(place)
        near = counted & ((place - place.round()).abs() < self._guard)
        sure = place[counted & ~near].floor().clamp(0, BINS - 1).long()
        self.counts += torch.bincount(sure, minlength=BINS).cpu().numpy()
        query_of, row_of = (one.cpu().numpy() for one in near.nonzero(as_tuple=True))
        scores = block.pair_scores(query_of, row_of)
        self.counts += np.bincount(bin_of(scores), minlength=BINS)
