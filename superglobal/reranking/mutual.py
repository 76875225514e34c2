"""SuperGlobal's reranking with mutual neighbors only, for descriptors with many wrong neighbors.

The method differs from SuperGlobal's reranking (superglobal.py, which defines w, R, s1 and s2) in these steps:

    w_ij = 0 unless i and j are among each other's K nearest images
    E = images among the best K + 1 by s1 that have the query among their k_query nearest images
    e = mean of q and of the refined descriptors of E
    s2 = R e;    score = (s1 + s2) / 2, or s1 if E is empty

With weak descriptors, a few images are near neighbors of almost all others. In SuperGlobal's reranking, these images
affect every refined descriptor and, through the maximum, every component of the expanded query. Here they rarely do,
because they are rarely mutual neighbors, and because one wrong image changes a mean less than a maximum. Mutual
neighbors need no threshold on similarities, which would depend on the network. Finding them takes no further matrix
products, because the Gram matrix is already computed. The steps and the constants were chosen on images of landmarks
rendered by this project; see docs/background/reranking.md.
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
            "an image expands the query if fewer than k_query images are nearer to it than the query is; 0 disables "
            "the expansion",
            minimum=0,
        ),
    },
)
def mutual_scores(
    q: torch.Tensor, T: torch.Tensor, gram: torch.Tensor, *, K: int = 5, beta: float = 0.3, k_query: int = 5
) -> torch.Tensor:
    """Compute the final scores of shortlists: (B, M) float64.

    Args:
        q: (B, D) queries.
        T: (B, M, D) shortlists, best first.
        gram: (B, M, M) Gram matrices T T^T.
        K: number of nearest images of an image; those that are mutual neighbors refine its descriptor.
        beta: weight of a neighbor per unit of similarity.
        k_query: an image can expand the query only if the query is among the k_query images nearest to that image.
    """
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
    """Mark the mutual neighbors among the neighbors of each image.

    Args:
        near: (B, M, K+1) indices of the images nearest to each image, the image itself first.

    Returns:
        Mask (B, M, K+1) bool. An entry is true if the neighbor at this position of `near` also has the image among its
        nearest images. The entry of the image itself is true.
    """
    n_queries, depth, width = near.shape
    batch = torch.arange(n_queries, device=near.device)[:, None, None]
    rows = torch.arange(depth, device=near.device)[None, :, None, None]
    # Columns are processed one at a time, because all columns together would need a tensor (B, M, K+1, K+1).
    columns = [(near[batch, near[..., column : column + 1]] == rows).any(dim=-1) for column in range(width)]
    return torch.cat(columns, dim=-1)
