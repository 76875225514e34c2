"""k-reciprocal reranking inside a shortlist (Zhong et al., CVPR 2017), without training and without local features.

    R(p, k)  = images among p's k nearest that have p among their own k nearest
    R*(p)    = R(p, k1), united with R(q, k1/2) for each q in R(p, k1) if more than 2/3 of R(q, k1/2) is in R(p, k1)
    V(p, g)  = exp(-d(p, g)) for g in R*(p), else 0, divided by its sum;  V <- mean of V over p's k2 nearest
    final    = (1 - lambda) Jaccard distance of V(query) and V(g) + lambda d(query, g)

The images are the query and its shortlist. d is the squared Euclidean distance divided by the largest distance of its
row. The nearest images include the image itself in addition to k others. All this and the defaults are as in the
authors' code (github.com/zhunzhong07/person-re-ranking, python-version/re_ranking_ranklist.py).
"""

from __future__ import annotations

import numpy as np
import torch

from superglobal.reranking.base import Parameter, dots, mask_of, nearest, register_reranker


@register_reranker(
    "kreciprocal",
    "k-reciprocal encoding (Zhong et al., CVPR 2017)",
    {
        "k1": Parameter("number of neighbors that must be mutual", minimum=1),
        "k2": Parameter("number of images, including itself, over which an encoding is averaged", minimum=1),
        "lambda_": Parameter("weight of the first stage's distance; 1 keeps the first stage's order", 0, 1),
    },
    distances=True,
    dtype=torch.float64,
    ties="first",
)
def kreciprocal_scores(
    q: torch.Tensor, T: torch.Tensor, gram: torch.Tensor, *, k1: int = 20, k2: int = 6, lambda_: float = 0.3
) -> torch.Tensor:
    """Return the negative final distances (B, M) float64."""
    return -_distances(_with_query(dots(T, q), gram), k1, k2, lambda_)


def _with_query(first: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Return the cosines (B, M+1, M+1) of the query, at index 0, and its shortlist.

    Args:
        first: (B, M) cosines of the query with its shortlist.
        gram: (B, M, M) cosines within the shortlist.
    """
    column = first[..., None]
    top = torch.cat([torch.ones_like(column[:, :1]), column], dim=1)
    return torch.cat([top, torch.cat([column.transpose(1, 2), gram], dim=1)], dim=2)


def _distances(similarity: torch.Tensor, k1: int, k2: int, lambda_: float) -> torch.Tensor:
    """Return the final distances (B, M) float64 of the shortlist, smallest best."""
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
    # The rows of V sum to 1, so the union of two rows is 2 minus their intersection.
    shared = torch.minimum(V[:, :1], V[:, 1:]).sum(dim=-1)
    return (1 - lambda_) * (1 - shared / (2 - shared)) + lambda_ * distance[:, 0, 1:]


def _reciprocal(near: torch.Tensor, k1: int, size: int) -> torch.Tensor:
    """Return R* of every image as a bool matrix (B, size, size); its own column is always set."""

    def mutual(k: int) -> torch.Tensor:
        neighbors = mask_of(near[..., : k + 1], size)
        return neighbors & neighbors.transpose(1, 2)

    # The authors' code also rounds k1 / 2 by NumPy, which rounds halves to the even number.
    wide, narrow = mutual(k1), mutual(int(np.around(k1 / 2)))
    # Counts of at most M + 1 are exact in float32.
    shared = torch.bmm(wide.float(), narrow.float().transpose(1, 2))
    joins = wide & (3 * shared > 2 * narrow.sum(dim=-1)[:, None, :])
    return wide | (torch.bmm(joins.float(), narrow.float()) > 0)
