"""SuperGlobal's reranking of a shortlist (paper, section 3; reference modules/reranking): no local features.

    S = T T^T over the shortlist T;  neighbours of i = the K + 1 largest S[i], itself first
    w = beta S, w[self] = 1;         R_i = sum_j w_ij T_j / sum_j w_ij      (refined, not normalised)
    s1 = R q;                        e = elementwise max of the R of the best K + 1 by s1
    s2 = R e;                        score = (s1 + s2) / 2

R = A T with a sparse A, so s1 = A (T q) and s2 = A (T e): of R only the K + 1 rows in e are ever made.
"""

from typing import Any

import numpy as np
import torch

from superglobal.errors import InputError
from superglobal.precision import full_precision
from superglobal.retrieval.vectors import (
    Rows,
    as_queries,
    as_rows,
    fault,
    is_unit,
    to_tensor,
)


def rerank(
    Q: Any,
    X: Any,
    ids: Any,
    M: int = 400,
    K: int = 9,
    beta: float = 0.15,
    *,
    device: str | torch.device | None = None,
    batch_size: int = 16,
) -> tuple[np.ndarray, np.ndarray]:
    """Rerank the first min(M, k) of each shortlist; what comes after keeps its place, with score -inf.

    Q: (Q, D), X: (N, D) or anything `as_rows` takes, unit L2 norm. ids: (Q, k) integers, best first, as
    `search` gives them. K: neighbours that refine a descriptor. beta: their weight per unit of similarity.
    Memory is that of `batch_size` shortlists, (batch_size, M, D) float32, a few times over.

    Returns scores (Q, k) float32 and ids (Q, k) int64, best first, equal scores by the lower id.
    Raises InputError for ids outside 0..N-1 or repeated, bad rows, and parameters out of range.
    """
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    first = check_ids(ids, len(queries), len(rows))
    listed = first[np.isin(first, rows.skipped)]
    if listed.size:
        raise InputError(f"ids: row {listed[0]} was skipped when descriptors were made; leave it out")
    _check_parameters(M, K, beta, batch_size)
    head = first[:, :M]
    scores = np.full(first.shape, -np.inf, np.float32)
    out = first.copy()
    for start in range(0, len(queries), batch_size):
        part = slice(start, start + batch_size)
        final = _rerank_batch(queries[part], rows.take(head[part]), K, beta, device, head[part], "database row")
        order = np.lexsort((head[part], -final), axis=1)
        scores[part, : head.shape[1]] = np.take_along_axis(final, order, axis=1)
        out[part, : head.shape[1]] = np.take_along_axis(head[part], order, axis=1)
    return scores, out


def rerank_candidates(
    Q: Any,
    candidates: Any,
    K: int = 9,
    beta: float = 0.15,
    *,
    device: str | torch.device | None = None,
    batch_size: int = 16,
) -> tuple[np.ndarray, np.ndarray]:
    """`rerank` for candidates given as vectors, as they come from a vector database.

    Q: (Q, D) with candidates (Q, M, D), or (D,) with (M, D); unit L2 norm.
    Returns scores (Q, M) float32 and order (Q, M) int64, positions in `candidates` best first, equal scores by
    the lower position; both (M,) for a single query. Raises InputError as `rerank` does.
    """
    single = np.ndim(Q) == 1
    vectors = candidates if isinstance(candidates, np.ndarray | torch.Tensor) else np.asarray(candidates)
    if vectors.ndim != 3 - single or 0 in vectors.shape:
        raise InputError(
            f"candidates: expected (Q, M, D) for queries (Q, D), or (M, D) for one query (D,), got shape "
            f"{tuple(vectors.shape)} for queries {tuple(np.shape(Q))}"
        )
    n_queries, depth = (1, len(vectors)) if single else vectors.shape[:2]
    flat = as_rows(vectors.reshape(n_queries * depth, -1), "candidates")
    queries = as_queries(Q[None] if single else Q, flat.dim)
    if len(queries) != n_queries:
        raise InputError(f"candidates: expected those of {len(queries)} queries, got {n_queries}")
    _check_parameters(depth, K, beta, batch_size)
    scores = np.empty((n_queries, depth), np.float32)
    out = np.empty((n_queries, depth), np.int64)
    number = np.tile(np.arange(depth), (n_queries, 1))
    for start in range(0, n_queries, batch_size):
        part = slice(start, start + batch_size)
        final = _rerank_batch(queries[part], _shortlists(flat, part, depth), K, beta, device, number[part], "candidate")
        out[part] = np.argsort(-final, axis=1, kind="stable")
        scores[part] = np.take_along_axis(final, out[part], axis=1)
    return (scores[0], out[0]) if single else (scores, out)


def _shortlists(flat: Rows, part: slice, depth: int) -> np.ndarray:
    """The candidates (B, M, D) of a slice of queries out of all of them (Q M, D)."""
    return flat.block(part.start * depth, part.stop * depth).reshape(-1, depth, flat.dim)


def check_ids(ids: Any, n_queries: int, n_rows: int) -> np.ndarray:
    """Shortlists as (Q, k) int64. Raises InputError for a wrong shape, an id out of range or repeated."""
    array = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
    if array.ndim != 2 or len(array) != n_queries or not array.shape[1] or array.dtype.kind not in "iu":
        raise InputError(
            f"ids: expected integers ({n_queries}, k), one list per query as search gives them, "
            f"got {array.dtype} {array.shape}"
        )
    array = array.astype(np.int64)
    bad = (array < 0) | (array >= n_rows)
    if bad.any():
        query, column = np.argwhere(bad)[0]
        raise InputError(
            f"ids: query {query} lists {array[query, column]}, outside the database's 0..{n_rows - 1}; "
            "were they searched in another database?"
        )
    ordered = np.sort(array, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    if repeated.any():
        raise InputError(f"ids: query {int(repeated.argmax())} lists an id twice; each may stand once")
    return array


def _check_parameters(M: int, K: int, beta: float, batch_size: int) -> None:
    for name, value in (("M", M), ("K", K), ("batch_size", batch_size)):
        if not isinstance(value, int | np.integer) or value < 1:
            raise InputError(f"{name}: expected a whole number of at least 1, got {value}")
    if not np.isfinite(beta):
        raise InputError(f"beta: expected a finite number, got {beta}")


def _rerank_batch(
    queries: np.ndarray,
    shortlists: np.ndarray,
    K: int,
    beta: float,
    device: str | torch.device | None,
    numbers: np.ndarray,
    name: str,
) -> np.ndarray:
    """Final scores (B, M) float64 of shortlists (B, M, D) for queries (B, D); `numbers` (B, M) name bad rows."""
    place = torch.device(device or "cpu")
    q = to_tensor(queries, place)
    T = to_tensor(shortlists, place)
    with full_precision():
        gram = _gram(T)
        _check_norms(gram, numbers, name)
        near, weights = _neighbours(gram, K, beta)
        s1 = _combine(weights, near, _dots(T, q))
        expanded = _expand(T, near, weights, s1)
        s2 = _combine(weights, near, _dots(T, expanded))
    return ((s1 + s2) / 2).cpu().numpy()


def _gram(T: torch.Tensor) -> torch.Tensor:
    """T T^T (B, M, M) float32, by four strips of the upper triangle: 5/8 of the whole product, then mirrored."""
    depth = T.shape[1]
    step = -(-depth // 4)
    gram = T.new_empty(len(T), depth, depth)
    for start in range(0, depth, step):
        stop = min(start + step, depth)
        gram[:, start:stop, start:] = torch.bmm(T[:, start:stop], T[:, start:].transpose(1, 2))
        gram[:, stop:, start:stop] = gram[:, start:stop, stop:].transpose(1, 2)
    return gram


def _dots(T: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """T v (B, M) for vectors v (B, D). As v^T T^T, which the CPU's matrix library does several times faster."""
    return torch.bmm(v[:, None, :], T.transpose(1, 2))[:, 0]


def _check_norms(gram: torch.Tensor, numbers: np.ndarray, name: str) -> None:
    """Raise InputError for a row that is not a unit vector; the diagonal holds the squared norms."""
    norms = gram.diagonal(dim1=1, dim2=2).sqrt().cpu().numpy()
    good = is_unit(norms)
    if not good.all():
        query, row = np.argwhere(~good)[0]
        raise InputError(f"{name} {numbers[query, row]} {fault(float(norms[query, row]))}")


def _neighbours(gram: torch.Tensor, K: int, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row its K + 1 nearest rows, itself first, and their weights, which sum to 1: (B, M, K+1) each.

    A neighbour of negative similarity gets a negative weight, as in the reference. `gram` is overwritten.
    """
    # A duplicate may score above the row itself by rounding; infinity keeps the row in slot 0.
    gram.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    similarity, near = gram.topk(min(K + 1, gram.shape[-1]), dim=-1)
    weights = similarity.double() * beta
    weights[..., 0] = 1.0
    total = weights.sum(dim=-1, keepdim=True)
    if (total.abs() < 1e-6).any():
        raise InputError(f"beta: with {beta} the weights of a candidate's neighbours cancel its own; choose less")
    return near, weights / total


def _combine(weights: torch.Tensor, near: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A v (B, M) float64 for v (B, M), A being the sparse matrix of weights and neighbours (B, M, K+1)."""
    n_queries, depth, width = near.shape
    gathered = values.double().gather(1, near.view(n_queries, depth * width)).view_as(weights)
    return (weights * gathered).sum(dim=-1)


def _expand(T: torch.Tensor, near: torch.Tensor, weights: torch.Tensor, s1: torch.Tensor) -> torch.Tensor:
    """The expanded query (B, D): elementwise max over the refined descriptors of the best K + 1 by s1."""
    best = s1.topk(near.shape[-1], dim=1).indices
    batch = torch.arange(len(T), device=T.device)[:, None]
    members = T[batch[..., None], near[batch, best]]  # (B, K+1, K+1, D)
    refined = torch.einsum("brn,brnd->brd", weights[batch, best].float(), members)
    return refined.amax(dim=1)
