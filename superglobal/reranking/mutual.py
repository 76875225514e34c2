"""SuperGlobal's reranking with mutual neighbours only: made for descriptors that are often wrong about neighbours.

    as SuperGlobal, but  w_ij = 0 unless i and j are among each other's K nearest
    E = those of the best K + 1 by s1 that have the query among their own k_query nearest
    e = mean of q and the R of E;    s2 = R e;    score = (s1 + s2) / 2, and s1 where E is empty

Neighbourhood in one direction is cheap: in a weak space a few rows are everybody's neighbours. SuperGlobal lets them
into every refinement and, by its max, into every component of the expanded query. A mutual neighbour is evidence from
both sides, needs no threshold on similarities, whose scale differs from network to network, and costs nothing: it is
all in the Gram matrix that is there already. A mean takes a wrong member with its share, a max in full.
Form and constants were chosen on rendered landmarks: docs/reranking.md.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from superglobal.reranking.base import (
    dots,
    first_columns,
    in_steps,
    nearest,
    require_between,
    require_whole,
    rerank_shortlists,
)
from superglobal.reranking.superglobal import combine, normalised, refined


def rerank_mutual(
    Q: Any,
    X: Any,
    ids: Any,
    M: int = 400,
    K: int = 5,
    beta: float = 0.3,
    k_query: int = 5,
    *,
    device: str | torch.device | None = None,
    batch_size: int = 16,
) -> tuple[np.ndarray, np.ndarray]:
    """Rerank the first min(M, k) of each shortlist with mutual neighbours; the rest stays, with score -inf.

    Q, X, ids, M, K, beta: as `rerank` takes them. k_query: how near the query must be to an image that joins the
    expansion: fewer than k_query of the shortlist's others are nearer. 0 leaves the expansion out.

    Returns scores (Q, k) float32 and ids (Q, k) int64, best first, equal scores by the lower id.
    Raises InputError as `rerank` does.
    """
    require_whole({"K": K})
    require_whole({"k_query": k_query}, least=0)
    require_between({"beta": beta}, -1e6, 1e6)
    score = partial(_scores, K=K, beta=beta, k_query=k_query)
    return rerank_shortlists(Q, X, ids, M, score, batch_size, device)


def _scores(q: torch.Tensor, T: torch.Tensor, gram: torch.Tensor, K: int, beta: float, k_query: int) -> torch.Tensor:
    """Final scores (B, M) float64 of shortlists (B, M, D) for queries (B, D)."""
    near = nearest(gram, K + 1)
    weights = gram.gather(2, near).double() * beta
    weights[..., 0] = 1.0
    weights = normalised(weights * _mutual(near), beta)
    first = dots(T, q)
    s1 = combine(weights, near, first)
    best = first_columns(s1, near.shape[-1])
    batch = torch.arange(len(T), device=T.device)[:, None]
    nearer = in_steps(gram[batch, best]) > in_steps(first[batch, best])[..., None]
    nearer.scatter_(2, best[..., None], False)  # an image is no neighbor of its own
    joins = nearer.sum(dim=-1) < k_query
    members = refined(T, near, weights, best) * joins[..., None]
    count = joins.sum(dim=1, keepdim=True)
    e = (members.sum(dim=1) + q) / (count + 1)
    s2 = combine(weights, near, dots(T, e))
    return torch.where(count > 0, (s1 + s2) / 2, s1)


def _mutual(near: torch.Tensor) -> torch.Tensor:
    """(B, M, K+1) bool: whether a row's neighbour has the row among its own; a row has itself."""
    n_queries, depth, width = near.shape
    batch = torch.arange(n_queries, device=near.device)[:, None, None]
    own = torch.arange(depth, device=near.device)[None, :, None, None]
    # One slot at a time: all at once would be (B, M, K+1, K+1).
    slots = [(near[batch, near[..., slot : slot + 1]] == own).any(dim=-1) for slot in range(width)]
    return torch.cat(slots, dim=-1)
