"""Approximate search by an index of FAISS: its candidates are scored exactly from the descriptors."""

from __future__ import annotations

from typing import Any

import numpy as np

from superglobal.errors import InputError
from superglobal.retrieval.index_plan import IndexSettings, faiss_module
from superglobal.retrieval.vectors import Rows, as_exclude, as_queries, pair_scores

_GPU_LIMIT = 2048  # results a query that FAISS gives on a GPU
_GPU_LISTS = 2048  # and lists that it searches there


class ApproximateIndex:
    """A built index over the rows that can be ranked; from `open_index`."""

    def __init__(self, index: Any, rows: Rows, settings: IndexSettings, on_gpu: bool) -> None:
        self.index = index
        self.rows = rows
        self.settings = settings
        self._kept = kept_rows(rows)
        self._on_gpu = on_gpu
        self._most_probes = min(settings.nlist or 0, _GPU_LISTS if on_gpu else 2**31)
        if (settings.nprobe or 0) > self._most_probes:
            raise InputError(
                f"index.nprobe={settings.nprobe}: FAISS searches at most {_GPU_LISTS} lists on a GPU; lower it, or "
                "trainer.accelerator=cpu"
            )

    def search(self, Q: Any, k: int = 400, *, exclude: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """The best k among the candidates that the index finds, by exact scores, in the order (-score, id).

        Returns scores (Q, k) float32 and ids (Q, k) int64, best first.
        Raises InputError for k that there are not so many rows for, or that the index does not reach.
        """
        queries = as_queries(Q, self.rows.dim)
        excluded = as_exclude(exclude, len(queries))
        available = len(self._kept) - (excluded is not None)
        if not 1 <= k <= available:
            raise InputError(f"k: expected 1..{available} for a database of {len(self.rows)} rows, got {k}")
        count = min(k * int(self.settings.candidates or 1) + (excluded is not None), len(self._kept))
        if self._on_gpu and count > _GPU_LIMIT:
            if k + (excluded is not None) > _GPU_LIMIT:
                raise InputError(f"k={k}: FAISS gives at most {_GPU_LIMIT} on a GPU; trainer.accelerator=cpu")
            count = _GPU_LIMIT
        ids = self._candidates(queries, count, k, excluded)
        query_of, place = np.nonzero(ids >= 0)
        scores = np.full(ids.shape, -np.inf)
        scores[query_of, place] = pair_scores(queries, self.rows, query_of, ids[query_of, place])
        order = np.lexsort((ids, -scores), axis=1)[:, :k]
        return np.take_along_axis(scores, order, axis=1).astype(np.float32), np.take_along_axis(ids, order, axis=1)

    def _candidates(self, queries: np.ndarray, count: int, k: int, excluded: np.ndarray | None) -> np.ndarray:
        """(Q, count) ids, -1 where fewer were found; at least k each. Queries that find too few look further."""
        ids = np.full((len(queries), count), -1)
        todo, probes = np.arange(len(queries)), self.settings.nprobe
        while True:
            found = self._ask(queries[todo], count, probes)
            found = np.where(found < 0, -1, self._kept[found])
            if excluded is not None:
                found[found == excluded[todo][:, None]] = -1
            ids[todo] = found
            todo = todo[(found >= 0).sum(axis=1) < k]
            if not len(todo):
                return ids
            if probes is None or probes >= self._most_probes:
                raise InputError(
                    f"index={self.settings.kind}: only {(ids[todo[0]] >= 0).sum()} of k={k} results of query "
                    f"{todo[0]} were reached; raise index.ef_search or use index=flat"
                )
            probes = min(2 * probes, self._most_probes)

    def _ask(self, queries: np.ndarray, count: int, probes: int | None) -> np.ndarray:
        faiss = faiss_module()
        options = {}
        if probes is not None:
            options["params"] = faiss.SearchParametersIVF(nprobe=probes)
        elif self.settings.kind == "hnsw":
            options["params"] = faiss.SearchParametersHNSW(efSearch=max(count, int(self.settings.ef_search or 0)))
        return self.index.search(queries, count, **options)[1]


def kept_rows(rows: Rows) -> np.ndarray:
    """Ids of the rows in the index, by their number there."""
    return np.setdiff1d(np.arange(len(rows)), rows.skipped, assume_unique=True)


def recall(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """(Q,) share of the exact ids (Q, k) that were found (Q, n)."""
    return np.array([np.isin(true, ids).mean() for true, ids in zip(exact, found, strict=True)])
