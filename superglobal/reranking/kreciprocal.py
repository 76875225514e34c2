"""k-reciprocal reranking of a shortlist (Zhong et al., CVPR 2017), without training or local features.

For images p and g, each of which is the query or an image of its shortlist:

    d(p, g)  = squared Euclidean distance of p and g, divided by the largest distance of p from any image
    R(p, k)  = reciprocal neighbors: images among the k nearest to p that also have p among their k nearest
    R*(p)    = R(p, k1), united with R(r, k1/2) for each r in R(p, k1) if more than 2/3 of R(r, k1/2) is in R(p, k1)
    V(p, g)  = exp(-d(p, g)) for g in R*(p), else 0, divided by the sum over g (the encoding of p)
    V'(p, .) = mean of V(r, .) over the k2 images r nearest to p
    final(g) = (1 - lambda) J(query, g) + lambda d(query, g), where J is the Jaccard distance of V'(query) and V'(g)

In R(p, k), the images nearest to p are p itself and k others. In V', p itself is one of the k2 images nearest to p.
The formulas and the defaults are those of the authors' code (github.com/zhunzhong07/person-re-ranking,
python-version/re_ranking_ranklist.py).
"""

from __future__ import annotations

import numpy as np
import torch

from superglobal.reranking.base import Parameter, dots, mask_of, nearest, register_reranker, with_query


@register_reranker(
    "kreciprocal",
    "k-reciprocal encoding (Zhong et al., CVPR 2017)",
    {
        "k1": Parameter("number of neighbors per image, of which only mutual ones count", minimum=1),
        "k2": Parameter("number of images, including itself, over which an image's encoding is averaged", minimum=1),
        "lambda_": Parameter("weight of the first stage's distance; 1 keeps the first stage's order", 0, 1),
    },
    distances=True,
    ties="first",
)
def kreciprocal_scores(
    q: torch.Tensor, T: torch.Tensor, gram: torch.Tensor, *, k1: int = 20, k2: int = 6, lambda_: float = 0.3
) -> torch.Tensor:
    """Compute the scores (B, M) float64 of shortlists: -final(g) for each image g, as defined above.

    Args:
        q: (B, D) queries.
        T: (B, M, D) shortlists, best first.
        gram: (B, M, M) Gram matrices T T^T.
        k1: number of neighbors among which reciprocal neighbors are found.
        k2: number of images over which the encoding of an image is averaged, including the image itself.
        lambda_: weight of the original distance from the query, in 0..1.
    """
    similarity = with_query(dots(T, q), gram)
    near = nearest(similarity, max(k1 + 1, k2))
    distance = similarity.mul_(-2).add_(2).clamp_(min=0)
    distance.diagonal(dim1=1, dim2=2).zero_()
    # The lower bound avoids a division by 0 if all images are equal.
    distance /= distance.amax(dim=-1, keepdim=True).clamp_(min=1e-12)
    first = distance[:, 0, 1:].to(torch.float64, copy=True)
    V = distance.neg_().exp_().masked_fill_(~_reciprocal(near, k1), 0)
    shared = _shared(V, near[..., :k2])
    # The Jaccard distance is 1 minus intersection / union, the sums of the elementwise minima and maxima of two rows of
    # V'. Each row of V' sums to 1, so the union is 2 minus the intersection.
    return (lambda_ - 1) * (1 - shared / (2 - shared)) - lambda_ * first


def _shared(V: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Compute the sums of the elementwise minima of the query's row of V' and the row of each image: (B, M) float64.

    Args:
        V: (B, M+1, M+1) encodings, the query's first, before the division by the sums of their rows.
        near: (B, M+1, k2) indices of the images over which each encoding is averaged to obtain V'.
    """
    batch = torch.arange(len(V), device=V.device)[:, None]
    total = V.sum(dim=-1, keepdim=True, dtype=torch.float64)
    query = (V[batch, near[:, 0]] / total[batch, near[:, 0]]).mean(dim=1)
    # Only the columns in which the query's row is not 0 matter, and these are few.
    values, columns = query.topk(int((query > 0).sum(dim=-1).max()), dim=-1)
    V = V.gather(2, columns[:, None].expand(-1, V.shape[1], -1)) / total
    averaged = torch.stack([V[batch, near[..., i]] for i in range(near.shape[-1])]).mean(dim=0)
    return torch.minimum(values[:, None], averaged[:, 1:]).sum(dim=-1)


def _reciprocal(near: torch.Tensor, k1: int) -> torch.Tensor:
    """Return the expanded reciprocal neighbors R* of every image.

    Args:
        near: (B, N, n) indices of the images nearest to each of N = M + 1 images, the image itself first.
        k1: number of neighbors among which reciprocal neighbors are found.

    Returns:
        Mask (B, N, N) bool, whose row p marks the images of R*(p), which always include p.
    """
    n_queries, size = near.shape[:2]
    batch = torch.arange(n_queries, device=near.device)[:, None, None]

    def mutual(neighbors: torch.Tensor) -> torch.Tensor:
        return mask_of(neighbors, size).transpose(1, 2).gather(2, neighbors)

    # As in the authors' code, k1 / 2 is rounded by NumPy, which rounds halves to the nearest even number.
    wide, narrow = near[..., : k1 + 1], near[..., : int(np.around(k1 / 2)) + 1]
    in_wide, in_narrow = mutual(wide), mutual(narrow)
    result = torch.zeros(n_queries, size, size, dtype=torch.bool, device=near.device).scatter_(2, wide, in_wide)
    # For each image p and each r of R(p, k1): the images of R(r, k1/2), as indices and a mask (B, N, k1+1, k1/2+1).
    members, valid = narrow[batch, wide], in_narrow[batch, wide]
    shared = result.gather(2, members.flatten(2)).view_as(valid) & valid
    joins = in_wide & (3 * shared.sum(dim=-1) > 2 * valid.sum(dim=-1))
    # Images that are not added to R(p, k1) are replaced by p itself, which is already marked as a member.
    itself = torch.arange(size, device=near.device)[:, None, None]
    joining = torch.where(valid & joins[..., None], members, itself)
    return result.scatter_(2, joining.flatten(2), True)
