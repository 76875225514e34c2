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

from superglobal.reranking.base import Parameter, dots, mask_of, nearest, register_reranker


@register_reranker(
    "kreciprocal",
    "k-reciprocal encoding (Zhong et al., CVPR 2017)",
    {
        "k1": Parameter("number of neighbors per image, of which only mutual ones count", minimum=1),
        "k2": Parameter("number of images, including itself, over which an image's encoding is averaged", minimum=1),
        "lambda_": Parameter("weight of the first stage's distance; 1 keeps the first stage's order", 0, 1),
    },
    distances=True,
    dtype=torch.float64,
    ties="first",
)
def kreciprocal_scores(
    q: torch.Tensor, T: torch.Tensor, gram: torch.Tensor, *, k1: int = 20, k2: int = 6, lambda_: float = 0.3
) -> torch.Tensor:
    """Compute scores of shortlists: the negative final distances, (B, M) float64.

    Args:
        q: (B, D) queries.
        T: (B, M, D) shortlists, best first.
        gram: (B, M, M) Gram matrices T T^T.
        k1: number of neighbors among which reciprocal neighbors are found.
        k2: number of images over which the encoding of an image is averaged, including the image itself.
        lambda_: weight of the original distance from the query, in 0..1.
    """
    return -_distances(_with_query(dots(T, q), gram), k1, k2, lambda_)


def _with_query(first: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Add the query to the Gram matrix of its shortlist, at index 0: (B, M+1, M+1).

    Args:
        first: (B, M) cosines of the query with its shortlist.
        gram: (B, M, M) cosines within the shortlist.
    """
    column = first[..., None]
    top = torch.cat([torch.ones_like(column[:, :1]), column], dim=1)
    return torch.cat([top, torch.cat([column.transpose(1, 2), gram], dim=1)], dim=2)


def _distances(similarity: torch.Tensor, k1: int, k2: int, lambda_: float) -> torch.Tensor:
    """Compute the final distances (B, M) float64 of shortlists from their queries.

    Args:
        similarity: (B, M+1, M+1) cosines of each query, at index 0, and its shortlist.
        k1: number of neighbors among which reciprocal neighbors are found.
        k2: number of images over which the encoding of an image is averaged, including the image itself.
        lambda_: weight of the original distance from the query, in 0..1.
    """
    size = similarity.shape[-1]
    distance = (2 - 2 * similarity).clamp(min=0)
    distance.diagonal(dim1=1, dim2=2).zero_()
    # The lower bound avoids a division by 0 if all images are equal.
    distance = distance / distance.amax(dim=-1, keepdim=True).clamp(min=1e-12)
    near = nearest(similarity, max(k1 + 1, k2))
    V = _reciprocal(near, k1, size).double() * torch.exp(-distance)
    V = V / V.sum(dim=-1, keepdim=True)
    if k2 > 1:
        mean = mask_of(near[..., :k2], size).double()
        V = torch.bmm(mean / mean.sum(dim=-1, keepdim=True), V)
    # The Jaccard distance is 1 - intersection / union. The intersection is the sum of the elementwise minima of two
    # rows of V, the union that of the maxima. Each row of V sums to 1, so the union is 2 - intersection.
    shared = torch.minimum(V[:, :1], V[:, 1:]).sum(dim=-1)
    return (1 - lambda_) * (1 - shared / (2 - shared)) + lambda_ * distance[:, 0, 1:]


def _reciprocal(near: torch.Tensor, k1: int, size: int) -> torch.Tensor:
    """Return the expanded reciprocal neighbors R* of every image.

    Args:
        near: (B, size, n) indices of the images nearest to each image, the image itself first.
        k1: number of neighbors among which reciprocal neighbors are found.
        size: number of images, M + 1.

    Returns:
        Mask (B, size, size) bool, whose row p marks the images of R*(p), which always include p.
    """

    def mutual(k: int) -> torch.Tensor:
        neighbors = mask_of(near[..., : k + 1], size)
        return neighbors & neighbors.transpose(1, 2)

    # As in the authors' code, k1 / 2 is rounded by NumPy, which rounds halves to the nearest even number.
    wide, narrow = mutual(k1), mutual(int(np.around(k1 / 2)))
    # The product counts common neighbors. The counts are at most M + 1, so they are exact in float32.
    shared = torch.bmm(wide.float(), narrow.float().transpose(1, 2))
    joins = wide & (3 * shared > 2 * narrow.sum(dim=-1)[:, None, :])
    return wide | (torch.bmm(joins.float(), narrow.float()) > 0)
