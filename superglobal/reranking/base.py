"""What all reranking of shortlists has in common: checks, batches, sorting, the similarities inside a shortlist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from superglobal.errors import InputError
from superglobal.retrieval.rows import as_queries, as_rows, fault, is_unit, to_tensor
from superglobal.utils.precision import full_precision

# Final scores (B, M) of queries (B, D) and shortlists T (B, M, D), given T T^T (B, M, M), which it may overwrite.
ScoreBatch = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def rerank_shortlists(
    Q: Any,
    X: Any,
    ids: Any,
    M: int,
    score: ScoreBatch,
    batch_size: int,
    device: str | torch.device | None,
    *,
    dtype: torch.dtype = torch.float32,
    ties: str = "id",
) -> tuple[np.ndarray, np.ndarray]:
    """Sort the first min(M, k) of each shortlist by `score`; what comes after keeps its place, with score -inf.

    Q: (Q, D), X: (N, D) or anything `as_rows` takes, unit L2 norm. ids: (Q, k) integers, best first, as `search`
    gives them. dtype: of what `score` is given. ties: equal scores by the lower "id", or as they stood, "first".

    Returns scores (Q, k) float32 and ids (Q, k) int64, best first.
    Raises InputError for ids outside 0..N-1 or repeated, and rows that are no unit vectors.
    """
    require_whole({"M": M, "batch_size": batch_size})
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    first = check_ids(ids, len(queries), len(rows))
    listed = first[np.isin(first, rows.skipped)]
    if listed.size:
        raise InputError(f"ids: row {listed[0]} was skipped when descriptors were made; leave it out")
    head = first[:, :M]
    place = indexed(device)
    scores = np.full(first.shape, -np.inf, np.float32)
    out = first.copy()
    for start in range(0, len(queries), batch_size):
        part = slice(start, start + batch_size)
        shortlists = rows.take_on(head[part], place)
        final = score_batch(queries[part], shortlists, score, head[part], "database row", dtype)
        second = head[part] if ties == "id" else np.broadcast_to(np.arange(head.shape[1]), final.shape)
        order = np.lexsort((second, -final), axis=1)
        scores[part, : head.shape[1]] = np.take_along_axis(final, order, axis=1)
        out[part, : head.shape[1]] = np.take_along_axis(head[part], order, axis=1)
    return scores, out


def score_batch(
    queries: np.ndarray,
    shortlists: torch.Tensor,
    score: ScoreBatch,
    numbers: np.ndarray,
    name: str,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """Return the scores (B, M) of queries (B, D) and shortlists (B, M, D) float32, on the device of the shortlists.

    `name` and `numbers` (B, M) name a bad row. As float32: scores that are given back as equal are equal to whoever
    sorts by them.
    """
    q, T = to_tensor(queries, shortlists.device).to(dtype), shortlists.to(dtype)
    with full_precision():
        gram = gram_of(T)
        check_norms(gram, numbers, name)
        return score(q, T, gram).cpu().numpy().astype(np.float32)


def indexed(device: str | torch.device | None) -> torch.device:
    """Return the device with its index, as tensors have it; None is the CPU."""
    return torch.empty(0, device=device or "cpu").device


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


def require_whole(values: dict[str, Any], least: int = 1) -> None:
    """Raise InputError for a value that is no whole number of at least `least`."""
    for name, value in values.items():
        if not isinstance(value, int | np.integer) or value < least:
            raise InputError(f"{name}: expected a whole number of at least {least}, got {value}")


def require_between(values: dict[str, Any], least: float, most: float) -> None:
    """Raise InputError for a value that is no number in least..most."""
    for name, value in values.items():
        number = isinstance(value, int | float | np.integer | np.floating)
        if not (number and least <= value <= most and np.isfinite(value)):
            raise InputError(f"{name}: expected a finite number of {least:g} to {most:g}, got {value}")


def gram_of(T: torch.Tensor) -> torch.Tensor:
    """T T^T (B, M, M), by four strips of the upper triangle: 5/8 of the whole product, then mirrored."""
    depth = T.shape[1]
    step = -(-depth // 4)
    gram = T.new_empty(len(T), depth, depth)
    for start in range(0, depth, step):
        stop = min(start + step, depth)
        gram[:, start:stop, start:] = torch.bmm(T[:, start:stop], T[:, start:].transpose(1, 2))
        gram[:, stop:, start:stop] = gram[:, start:stop, stop:].transpose(1, 2)
    return gram


def dots(T: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """T v (B, M) for vectors v (B, D). As v^T T^T, which the CPU's matrix library does several times faster."""
    return torch.bmm(v[:, None, :], T.transpose(1, 2))[:, 0]


def check_norms(gram: torch.Tensor, numbers: np.ndarray, name: str) -> None:
    """Raise InputError for a row that is not a unit vector; the diagonal of `gram` holds the squared norms."""
    norms = gram.diagonal(dim1=1, dim2=2).sqrt().cpu().numpy()
    good = is_unit(norms)
    if not good.all():
        query, row = np.argwhere(~good)[0]
        raise InputError(f"{name} {numbers[query, row]} {fault(float(norms[query, row]))}")


def nearest(similarity: torch.Tensor, count: int) -> torch.Tensor:
    """Return per row its `count` most similar columns, itself first: (B, N, min(count, N)) int64.

    similarity: (B, N, N); its diagonal is not read. The order is that of `first_columns`.
    """
    keys = _order_keys(similarity)
    # A duplicate may score above the row itself by rounding; infinity keeps the row in slot 0.
    keys.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return keys.topk(min(count, keys.shape[-1]), dim=-1).indices


def first_columns(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the columns of the `count` largest scores (B, N), best first, equal ones by the lower column: (B, count).

    Scores are compared in steps of about 1e-6, so that rounding, which differs from device to device, seldom decides
    between two copies of an image.
    """
    return _order_keys(scores).topk(count, dim=-1).indices


def in_steps(scores: torch.Tensor) -> torch.Tensor:
    """Return scores as whole numbers of steps of about 1e-6, float64; scores beyond -256..256 are one step."""
    return torch.round(scores.double() * 2**20).clamp(-(2.0**28), 2.0**28)


def _order_keys(scores: torch.Tensor) -> torch.Tensor:
    """Return numbers (..., N), no two of a row equal, that sort as `in_steps` does, then by the lower column."""
    columns = torch.arange(scores.shape[-1], dtype=torch.float64, device=scores.device)
    # Whole numbers below 2^53 are exact in float64.
    return in_steps(scores) * 2**24 - columns


def mask_of(near: torch.Tensor, columns: int) -> torch.Tensor:
    """Lists of columns (B, N, k) as a bool matrix (B, N, columns)."""
    mask = torch.zeros(*near.shape[:2], columns, dtype=torch.bool, device=near.device)
    return mask.scatter_(2, near, True)
