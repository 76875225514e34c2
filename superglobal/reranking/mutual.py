"""SuperGlobal's reranking with mutual neighbors only, for descriptors whose neighbors are often wrong.

    as SuperGlobal, but  w_ij = 0 unless i and j are among each other's K nearest
    E = those of the best K + 1 by s1 that have the query among their own k_query nearest
    e = mean of q and the R of E;    s2 = R e;    score = (s1 + s2) / 2, and s1 where E is empty

In a weak descriptor space a few rows are near neighbors of nearly all others. SuperGlobal lets them into every
refinement and, by its maximum, into every component of the expanded query. Mutual neighbors need no threshold on
similarities, which would depend on the network, and cost nothing: the Gram matrix is there already. In a mean a wrong
member has only its share. Form and constants were chosen on rendered landmarks: docs/guides/reranking.md.
"""

from __future__ import annotations

import torch

from superglobal.reranking.base import Parameter, dots, first_columns, in_steps, nearest, register_reranker
from superglobal.reranking.superglobal import BETA, combine, normalized, refined


@register_reranker(
    "mutual",
    "SuperGlobal's reranking with mutual neighbors only",
    {
        "K": Parameter("neighbors that refine a descriptor", minimum=1),
        "beta": BETA,
        "k_query": Parameter(
            "an image expands the query if fewer than k_query others are nearer to it; 0 is no expansion",
            minimum=0,
        ),
    },
)
def mutual_scores(
    q: torch.Tensor, T: torch.Tensor, gram: torch.Tensor, *, K: int = 5, beta: float = 0.3, k_query: int = 5
) -> torch.Tensor:
    """Return the final scores (B, M) float64."""
    near = nearest(gram, K + 1)
    weights = gram.gather(2, near).double() * beta
    weights[..., 0] = 1.0
    weights = normalized(weights * _mutual(near), beta)
    first = dots(T, q)
    s1 = combine(weights, near, first)
    best = first_columns(s1, near.shape[-1])
    batch = torch.arange(len(T), device=T.device)[:, None]
    nearer = in_steps(gram[batch, best]) > in_steps(first[batch, best])[..., None]
    nearer.scatter_(2, best[..., None], False)  # an image is not its own neighbor
    joins = nearer.sum(dim=-1) < k_query
    members = refined(T, near, weights, best) * joins[..., None]
    count = joins.sum(dim=1, keepdim=True)
    e = (members.sum(dim=1) + q) / (count + 1)
    s2 = combine(weights, near, dots(T, e))
    return torch.where(count > 0, (s1 + s2) / 2, s1)


def _mutual(near: torch.Tensor) -> torch.Tensor:
    """Return (B, M, K+1) bool: whether a row's neighbor has the row among its own neighbors; a row has itself."""
    n_queries, depth, width = near.shape
    batch = torch.arange(n_queries, device=near.device)[:, None, None]
    own = torch.arange(depth, device=near.device)[None, :, None, None]
    # One slot at a time: all at once would be (B, M, K+1, K+1).
    slots = [(near[batch, near[..., slot : slot + 1]] == own).any(dim=-1) for slot in range(width)]
    return torch.cat(slots, dim=-1)
