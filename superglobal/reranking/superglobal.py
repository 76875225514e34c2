"""SuperGlobal's reranking of a shortlist (paper, section 3; reference modules/reranking): no local features.

    S = T T^T over the shortlist T;  neighbours of i = the K + 1 largest S[i], itself first
    w = beta S, w[self] = 1;         R_i = sum_j w_ij T_j / sum_j w_ij      (refined, not normalised)
    s1 = R q;                        e = elementwise max of the R of the best K + 1 by s1
    s2 = R e;                        score = (s1 + s2) / 2

R = A T with a sparse A, so s1 = A (T q) and s2 = A (T e): of R only the K + 1 rows in e are ever made.
That is the authors' code. Their paper is read as s2 = T e, with the original descriptors: second="original".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from superglobal.errors import InputError
from superglobal.reranking.base import dots, indexed, require_between, require_whole, rerank_shortlists, score_batch
from superglobal.retrieval.rows import Rows, as_queries, as_rows

SECOND = ("refined", "original")
"""Which descriptors the expanded query is compared with."""


def rerank(
    Q: Any,
    X: Any,
    ids: Any,
    M: int = 400,
    K: int = 9,
    beta: float = 0.15,
    *,
    second: str = "refined",
    include_query: bool = False,
    device: str | torch.device | None = None,
    batch_size: int = 16,
) -> tuple[np.ndarray, np.ndarray]:
    """Rerank the first min(M, k) of each shortlist; what comes after keeps its place, with score -inf.

    Q: (Q, D), X: (N, D) or anything `as_rows` takes, unit L2 norm. ids: (Q, k) integers, best first, as
    `search` gives them. K: neighbours that refine a descriptor. beta: their weight per unit of similarity.
    second: what the expanded query is compared with, "refined" (the code) or "original" (the paper).
    include_query: the query joins the max.
    Memory is that of `batch_size` shortlists, (batch_size, M, D) float32, a few times over.

    Returns scores (Q, k) float32 and ids (Q, k) int64, best first, equal scores by the lower id.
    Raises InputError for ids outside 0..N-1 or repeated, bad rows, and parameters out of range.
    """
    return rerank_shortlists(Q, X, ids, M, _Options(K, beta, second, include_query).scores, batch_size, device)


def rerank_candidates(
    Q: Any,
    candidates: Any,
    K: int = 9,
    beta: float = 0.15,
    *,
    second: str = "refined",
    include_query: bool = False,
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
    options = _Options(K, beta, second, include_query)
    require_whole({"batch_size": batch_size})
    scores = np.empty((n_queries, depth), np.float32)
    out = np.empty((n_queries, depth), np.int64)
    place = indexed(device)
    number = np.tile(np.arange(depth), (n_queries, 1))
    for start in range(0, n_queries, batch_size):
        part = slice(start, start + batch_size)
        lists = _shortlists(flat, part, depth, place)
        final = score_batch(queries[part], lists, options.scores, number[part], "candidate")
        out[part] = np.argsort(-final, axis=1, kind="stable")
        scores[part] = np.take_along_axis(final, out[part], axis=1)
    return (scores[0], out[0]) if single else (scores, out)


def _shortlists(flat: Rows, part: slice, depth: int, device: torch.device) -> torch.Tensor:
    """Return the candidates (B, M, D) of a slice of queries out of all of them (Q M, D), on `device`."""
    return flat.block_on(part.start * depth, part.stop * depth, device).view(-1, depth, flat.dim)


@dataclass(frozen=True)
class _Options:
    """What `rerank` takes, checked."""

    K: int
    beta: float
    second: str
    include_query: bool

    def __post_init__(self) -> None:
        require_whole({"K": self.K})
        require_between({"beta": self.beta}, -1e6, 1e6)
        if self.second not in SECOND:
            raise InputError(f"second: expected one of {', '.join(SECOND)}, got {self.second!r}")

    def scores(self, q: torch.Tensor, T: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
        """Final scores (B, M) float64 of shortlists (B, M, D) for queries (B, D)."""
        near, weights = neighbours(gram, self.K, self.beta)
        s1 = combine(weights, near, dots(T, q))
        expanded = _expand(T, near, weights, s1)
        if self.include_query:
            expanded = torch.maximum(expanded, q)
        s2 = dots(T, expanded).double()
        if self.second == "refined":
            s2 = combine(weights, near, s2)
        return (s1 + s2) / 2


def neighbours(gram: torch.Tensor, K: int, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Per row its K + 1 nearest rows, itself first, and their weights, which sum to 1: (B, M, K+1) each.

    A neighbour of negative similarity gets a negative weight, as in the reference. `gram` is overwritten.
    """
    # A duplicate may score above the row itself by rounding; infinity keeps the row in slot 0.
    gram.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    similarity, near = gram.topk(min(K + 1, gram.shape[-1]), dim=-1)
    weights = similarity.double() * beta
    weights[..., 0] = 1.0
    return near, normalised(weights, beta)


def normalised(weights: torch.Tensor, beta: float) -> torch.Tensor:
    """Weights (B, M, K+1) over their sum. Raises InputError where that is 0."""
    total = weights.sum(dim=-1, keepdim=True)
    if (total.abs() < 1e-6).any():
        raise InputError(f"beta: with {beta} the weights of a candidate's neighbours cancel its own; choose less")
    return weights / total


def combine(weights: torch.Tensor, near: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A v (B, M) float64 for v (B, M), A being the sparse matrix of weights and neighbours (B, M, K+1)."""
    n_queries, depth, width = near.shape
    gathered = values.double().gather(1, near.view(n_queries, depth * width)).view_as(weights)
    return (weights * gathered).sum(dim=-1)


def refined(T: torch.Tensor, near: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The refined descriptors (B, n, D) of the rows `chosen` (B, n)."""
    batch = torch.arange(len(T), device=T.device)[:, None]
    members = T[batch[..., None], near[batch, chosen]]  # (B, n, K+1, D)
    return torch.einsum("brn,brnd->brd", weights[batch, chosen].float(), members)


def _expand(T: torch.Tensor, near: torch.Tensor, weights: torch.Tensor, s1: torch.Tensor) -> torch.Tensor:
    """The expanded query (B, D): elementwise max over the refined descriptors of the best K + 1 by s1."""
    best = s1.topk(near.shape[-1], dim=1).indices
    return refined(T, near, weights, best).amax(dim=1)
