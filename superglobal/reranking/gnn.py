"""Reranking by propagation on the neighbor graph of a shortlist, after Zhang et al. (arXiv 2012.07620).

For images i and j, each of which is the query or an image of its shortlist:

    r_ij = number of images that are nearer to i than j is; r_ii = 0
    A_ij = 1 - r_ij / k1 if r_ij < k1, else 0
    w_ij = s_ij^2 A_ji if j is among the k2 neighbors nearest to i, w_ii = 1, else 0
    twice: A <- (A + A^T) / 2, then A_i <- sum_j w_ij A_j
    score(i) = cosine of the rows of the query and of i in A

s_ij is the cosine of two descriptors, or 0 if it is negative. In w, A is that of the second line. An image whose
neighbors are those of the query is thus ranked high even if its own similarity with the query is low. The authors' code
(github.com/Xuanmeng-Zhang/gnn-re-ranking) differs: it propagates over the whole database instead of a shortlist, A is 1
for all k1 images, w_ij is s_ij^2 whether or not i is near j, i itself counts among the k2, and the rows of A are
normalized in each round. These changes and the constants were chosen on rendered landmarks; see
docs/background/reranking.md.
"""

from __future__ import annotations

import torch

from superglobal.reranking.base import Parameter, dots, in_steps, nearest, register_reranker, with_query


@register_reranker(
    "gnn",
    "propagation on the neighbor graph of the shortlist (Zhang et al., 2020)",
    {
        "k1": Parameter("number of images, including itself, that an image is connected to at first", minimum=1),
        "k2": Parameter("number of neighbors whose connections are added to those of an image", minimum=0),
    },
    ties="first",
)
def gnn_scores(q: torch.Tensor, T: torch.Tensor, gram: torch.Tensor, *, k1: int = 16, k2: int = 3) -> torch.Tensor:
    """Compute scores of shortlists, in 0..1: (B, M) float64.

    Args:
        q: (B, D) queries.
        T: (B, M, D) shortlists, best first.
        gram: (B, M, M) Gram matrices T T^T.
        k1: number of images that an image is connected to at first, including itself.
        k2: number of neighbors whose connections are added to those of an image; 0 adds none.
    """
    similarity = with_query(dots(T, q), gram)
    n_queries, size = similarity.shape[:2]
    near = nearest(similarity, max(k1, k2 + 1))
    neighbors = near[..., 1 : k2 + 1]
    by_rank = 1 - torch.arange(near.shape[-1], device=T.device, dtype=similarity.dtype) / k1
    A = torch.zeros_like(similarity).scatter_(2, near, by_rank.clamp_(min=0).expand(near.shape))
    weights = similarity.gather(2, neighbors).clamp_(min=0).square_() * A.transpose(1, 2).gather(2, neighbors)
    # The rows of all matrices are numbered consecutively, because index_select copies whole rows.
    numbers = neighbors + size * torch.arange(n_queries, device=T.device)[:, None, None]
    for _ in range(2):
        rows = A + A.transpose(1, 2)  # without the factor 1/2, which does not change cosines
        A = rows.clone()
        for column in range(neighbors.shape[-1]):
            added = rows.flatten(0, 1).index_select(0, numbers[..., column].flatten())
            A.addcmul_(weights[..., column, None], added.view_as(A))
    norms = torch.linalg.vector_norm(A, dim=-1)
    # Rounding to multiples of about 1e-6 makes copies of an image tie, so that they keep their order.
    return in_steps(dots(A[:, 1:], A[:, 0]) / (norms[:, 1:] * norms[:, :1])) / 2**20
