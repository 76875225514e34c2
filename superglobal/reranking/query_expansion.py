"""Query expansion and database augmentation: average descriptors with their neighbors, then search again.

A descriptor v and its n nearest database rows x give the new descriptor

    v' = v + sum over x of max(<v, x>, 0)^alpha x,  normalized to unit length,

where <v, x> is the inner product, the cosine similarity of v and x.

If v is a query, this is alpha query expansion (Radenovic et al., TPAMI 2018), with the values of n and alpha that are
usually cited from the paper. The code that Radenovic et al. published does not contain query expansion, so this
implementation could not be compared with a reference. If v is a database row, this is database augmentation (Turcot
and Lowe, 2009) with the same weights, as implemented in github.com/naver/deep-image-retrieval (dirtorch/test_dir.py).
That code has no default n or alpha; the default n here was chosen for this project.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from superglobal.errors import InputError
from superglobal.reranking.base import RERANKERS, Parameter, register_reranker
from superglobal.retrieval.rows import Rows, as_queries, as_rows
from superglobal.retrieval.search import search
from superglobal.utils.io import write_error

_MAX_ELEMENTS = 1 << 24  # maximum number of float32 values of neighbors that are read at a time (64 MB)
_PARAMETERS = {
    "n": Parameter("number of neighbors that are averaged with a descriptor; 0 keeps the descriptor", minimum=0),
    "alpha": Parameter("exponent of the similarities; negative similarities have weight 0", 0, 1e3),
}


@register_reranker("aqe", "alpha query expansion (Radenovic et al., TPAMI 2018)", _PARAMETERS, searches_again="queries")
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
    """Average each query with its n nearest database rows, for a second search.

    This is alpha query expansion (Radenovic et al., TPAMI 2018). The weight of a database row is its similarity to the
    query, raised to the power of alpha.

    Args:
        Q: (Q, D) queries, unit L2 norm.
        X: (N, D) database, unit L2 norm.
        n: number of rows, >= 0. If the database has fewer rows, all are used; 0 leaves the queries unchanged.
        alpha: exponent of the similarities, 0..1000; a row with negative similarity has weight 0.
        exclude: (Q,) ids of database rows, one per query, that are not averaged with their query.
        backend, device: options of `search`, which finds the nearest rows.

    Returns:
        New queries (Q, D) float32, unit L2 norm.

    Raises:
        InputError: a parameter is out of range, or `search` rejects the input.
    """
    RERANKERS["aqe"].complete({"n": n, "alpha": alpha})
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    count = min(n, len(rows) - len(rows.skipped) - (exclude is not None))
    if count < 1:
        return queries
    scores, ids = search(queries, rows, count, exclude=exclude, backend=backend, device=device)
    return _average(queries, rows, scores, ids, alpha)


@register_reranker("adba", "database augmentation (Turcot and Lowe 2009)", _PARAMETERS, searches_again="database")
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
    """Average each database row with its n nearest other rows, to replace the database in a search.

    This is database augmentation (Turcot and Lowe, 2009) with the weights of `expand_queries`. The computation
    takes N^2 D multiplications, but never stores an N x N matrix.

    Args:
        X: (N, D) database, unit L2 norm.
        n: number of other rows, >= 0. If the database has fewer, all are used; 0 leaves the rows unchanged.
        alpha: exponent of the similarities, 0..1000; a row with negative similarity has weight 0.
        path: .npy file for the result, which is then memory-mapped. None keeps the result in memory (4 N D bytes).
        backend, device: options of `search`, which finds the nearest rows.
        block_rows: number of rows whose neighbors are searched in one pass over the database, >= 1.

    Returns:
        The new database (N, D) float32, unit L2 norm, which `search` accepts; call `block(0, N)` for a NumPy array.

    Raises:
        InputError: a parameter is out of range, the file cannot be written, rows were skipped during extraction, or
            `search` rejects the input.
    """
    RERANKERS["adba"].complete({"n": n, "alpha": alpha})
    if not isinstance(block_rows, int | np.integer) or block_rows < 1:
        raise InputError(f"block_rows={block_rows}: expected an integer >= 1")
    rows = as_rows(X, "database")
    if len(rows.skipped):
        raise InputError(
            f"{rows.name}: {len(rows.skipped)} rows were skipped during extraction and cannot be averaged; remove "
            "their images from the image list, or use another reranker"
        )
    count = min(n, len(rows) - 1)
    if count < 1:
        return rows
    out = _empty_array(path, rows.shape)
    for start, block in rows.blocks(block_rows):
        # A row is excluded from its own neighbors, because the sum already contains it.
        row_ids = np.arange(start, start + len(block))
        scores, ids = search(block, rows, count, exclude=row_ids, backend=backend, device=device)
        out[start : start + len(block)] = _average(block, rows, scores, ids, alpha)
    if isinstance(out, np.memmap):
        out.flush()
    return as_rows(out, "augmented database")


def _empty_array(path: Path | None, shape: tuple[int, int]) -> np.ndarray:
    """Return an uninitialized float32 array.

    Args:
        path: .npy file to create and map into memory; None for an array that is not stored in a file.
        shape: shape of the array.

    Raises:
        InputError: the file cannot be written.
    """
    if path is None:
        return np.empty(shape, np.float32)
    try:
        return np.lib.format.open_memmap(path, "w+", np.float32, shape)
    except OSError as error:
        size = shape[0] * shape[1] * 4 / 2**30
        raise write_error(
            path, error, f"choose another folder (the augmented database takes {size:.1f} GiB)"
        ) from error


def _average(vectors: np.ndarray, rows: Rows, scores: np.ndarray, ids: np.ndarray, alpha: float) -> np.ndarray:
    """Add to each vector the weighted sum of its neighbors, in float64, and normalize the result.

    Args:
        vectors: (B, D) float32.
        rows: (N, D) database descriptors.
        scores: (B, n) similarities of the neighbors.
        ids: (B, n) database rows of the neighbors.
        alpha: exponent of the similarities.

    Returns:
        (B, D) float32, unit L2 norm.
    """
    weights = np.maximum(scores, 0, dtype=np.float64) ** alpha
    weights[scores <= 0] = 0  # with alpha = 0, these weights would be 1, because 0 ** 0 is 1
    out = np.empty(vectors.shape, np.float32)
    step = max(1, _MAX_ELEMENTS // (ids.shape[1] * rows.dim))
    for start in range(0, len(vectors), step):
        batch = slice(start, start + step)
        total = vectors[batch] + np.einsum("bn,bnd->bd", weights[batch], rows.take(ids[batch]))
        out[batch] = total / np.linalg.norm(total, axis=1, keepdims=True)
    return out
