"""SuperGlobal's reranking with mutual neighbors only, for descriptors with many wrong neighbors.

    as SuperGlobal, but  w_ij = 0 unless i and j are among each other's K nearest
    E = images among the best K + 1 by s1 that have the query among their own k_query nearest
    e = mean of q and the R of E;    s2 = R e;    score = (s1 + s2) / 2, or s1 if E is empty

With weak descriptors, a few images are near neighbors of almost all others. In SuperGlobal's reranking, these images
affect every refined descriptor and, through the maximum, every component of the expanded query. Mutual neighbors need
no threshold on similarities, which would depend on the network, and no further products, because the Gram matrix is
already computed. In a mean, a wrong image has only the weight of one image. The form and the constants were chosen on
rendered landmarks; see docs/guides/reranking.md.
"""

from __future__ import annotations

import torch

from superglobal.reranking.base import Parameter, dots, first_columns, in_steps, nearest, register_reranker
from superglobal.reranking.superglobal import BETA, combine, normalized, refined


@register_reranker(
    "mutual",
    "SuperGlobal's reranking with mutual neighbors only",
    {
        "K": Parameter("number of neighbors that refine a descriptor", minimum=1),
        "beta": BETA,
        "k_query": Parameter(
            "an image expands the query if fewer than k_query others are nearer to it; 0 disables the expansion",
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
    nearer.scatter_(2, best[..., None], False)  # an image does not count as a neighbor of itself
    joins = nearer.sum(dim=-1) < k_query
    members = refined(T, near, weights, best) * joins[..., None]
    count = joins.sum(dim=1, keepdim=True)
    e = (members.sum(dim=1) + q) / (count + 1)
    s2 = combine(weights, near, dots(T, e))
    return torch.where(count > 0, (s1 + s2) / 2, s1)


def _mutual(near: torch.Tensor) -> torch.Tensor:
    """Return a (B, M, K+1) mask of the neighbors that have the row among their own neighbors, or are the row itself."""
    n_queries, depth, width = near.shape
    batch = torch.arange(n_queries, device=near.device)[:, None, None]
    rows = torch.arange(depth, device=near.device)[None, :, None, None]
    # Neighbors are processed one column at a time, because all at once need a (B, M, K+1, K+1) tensor.
    columns = [(near[batch, near[..., column : column + 1]] == rows).any(dim=-1) for column in range(width)]
    return torch.cat(columns, dim=-1)
