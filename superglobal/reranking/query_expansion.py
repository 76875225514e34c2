"""Descriptors averaged with their neighbours, to search again: query expansion and database augmentation.

    v' = v + sum over v's n nearest x of max(v x, 0)^alpha x,  normalised

For queries this is alpha query expansion (Radenovic et al., TPAMI 2018); for the database's own rows, each with its
neighbours in the database, augmentation (Turcot and Lowe 2009) with the same weights. n and alpha of queries are those
that the paper is cited for; for augmentation there are no others' in this form: alpha is the same, n ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from superglobal.errors import InputError
from superglobal.reranking.base import require_between, require_whole
from superglobal.retrieval.rows import Rows, as_queries, as_rows
from superglobal.retrieval.search import search

_GATHERED = 1 << 24  # elements of the neighbours gathered at once: 64 MB of float32


def expand_queries(
    Q: Any,
    X: Any,
    n: int = 50,
    alpha: float = 3.0,
    *,
    exclude: Any = None,
    backend: str = "auto",
    device: str | torch.device | None = None,
) -> np.ndarray:
    """Each query averaged with its n nearest database rows, (Q, D) float32, unit norm, for a second search.

    Q, X, exclude, backend, device: as `search` takes them. n: 0 leaves the queries as they are; more than there are
    is all of them. alpha: power of a similarity, at least 0; a negative similarity weighs nothing.
    Raises InputError for parameters out of range and what `search` refuses.
    """
    require_whole({"n": n}, least=0)
    require_between({"alpha": alpha}, 0, 1e3)
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    count = min(n, len(rows) - len(rows.skipped) - (exclude is not None))
    if count < 1:
        return queries
    scores, ids = search(queries, rows, count, exclude=exclude, backend=backend, device=device)
    return _averaged(queries, rows, scores, ids, alpha)


def augment_database(
    X: Any,
    n: int = 20,
    alpha: float = 3.0,
    *,
    path: Path | None = None,
    backend: str = "auto",
    device: str | torch.device | None = None,
    block_rows: int = 4096,
) -> Rows:
    """Each database row averaged with its n nearest other rows, unit norm, in place of the database.

    X, backend, device: as `search` takes them. n, alpha: as in `expand_queries`. path: of an .npy file for the result,
    float32, which is then memory-mapped; without it the result is in memory, 4 N D bytes. block_rows: rows that are
    searched for at once, each time through the whole database: N^2 D products in all, never an N x N matrix.
    Raises InputError for parameters out of range, a file that cannot be written, and what `search` refuses.
    """
    require_whole({"n": n}, least=0)
    require_whole({"block_rows": block_rows})
    require_between({"alpha": alpha}, 0, 1e3)
    rows = as_rows(X, "database")
    if len(rows.skipped):
        raise InputError(
            f"{rows.name}: {len(rows.skipped)} rows were skipped when descriptors were made and cannot be averaged; "
            "take their images from the list, or rerank another way"
        )
    count = min(n, len(rows) - 1)
    if count < 1:
        return rows
    out = _empty(path, rows.shape)
    for start, block in rows.blocks(block_rows):
        # A row is not its own neighbour: it stands in the sum as itself.
        own = np.arange(start, start + len(block))
        scores, ids = search(block, rows, count, exclude=own, backend=backend, device=device)
        out[start : start + len(block)] = _averaged(block, rows, scores, ids, alpha)
    if isinstance(out, np.memmap):
        out.flush()
    return as_rows(out, "augmented database")


def _empty(path: Path | None, shape: tuple[int, int]) -> np.ndarray:
    if path is None:
        return np.empty(shape, np.float32)
    try:
        return np.lib.format.open_memmap(path, "w+", np.float32, shape)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); the augmented database takes "
            f"{shape[0] * shape[1] * 4 / 2**30:.1f} GiB"
        ) from error


def _averaged(vectors: np.ndarray, rows: Rows, scores: np.ndarray, ids: np.ndarray, alpha: float) -> np.ndarray:
    """(B, D) float32: vectors (B, D) and their neighbours `ids` (B, n) by their `scores`, summed in float64."""
    weights = np.maximum(scores, 0, dtype=np.float64) ** alpha
    weights[scores <= 0] = 0  # also where alpha is 0
    out = np.empty(vectors.shape, np.float32)
    step = max(1, _GATHERED // (ids.shape[1] * rows.dim))
    for start in range(0, len(vectors), step):
        part = slice(start, start + step)
        total = vectors[part] + np.einsum("bn,bnd->bd", weights[part], rows.take(ids[part]))
        out[part] = total / np.linalg.norm(total, axis=1, keepdims=True)
    return out
