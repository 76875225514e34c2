"""Reranking by `gnn` where the descriptors support it, and none otherwise.

Reranking from neighbors can harm if the descriptors say little about what an image shows, such as those of an untrained
network. Such descriptors vary in few directions. The number of effective dimensions of a shortlist measures this
without labels:

    n = (sum of the eigenvalues)^2 / (sum of their squares), over the eigenvalues of the shortlist's covariance matrix

n is 1 if all images lie on one line, and at most M - 1. Both sums follow from the Gram matrix. On rendered landmarks
and shortlists of 400 images, n was 3 to 9 for an untrained network, and 32 to 74 for two trained ones; see
docs/background/reranking.md.
"""

from __future__ import annotations

import torch

from superglobal.reranking.base import Parameter, dots, register_reranker
from superglobal.reranking.gnn import gnn_scores

_SMALL = 50  # number of images; smaller shortlists need proportionally fewer effective dimensions


@register_reranker(
    "auto",
    "gnn for shortlists that vary in enough directions, and no reranking for others",
    {"min_dims": Parameter("number of effective dimensions below which a shortlist is not reranked", minimum=0)},
    ties="first",
)
def auto_scores(q: torch.Tensor, T: torch.Tensor, gram: torch.Tensor, *, min_dims: float = 10.0) -> torch.Tensor:
    """Compute scores of shortlists, (B, M) float64: those of `gnn`, or the similarities with the query.

    Args:
        q: (B, D) queries.
        T: (B, M, D) shortlists, best first.
        gram: (B, M, M) Gram matrices T T^T.
        min_dims: number of effective dimensions below which a shortlist is not reranked.
    """
    enough = effective_dims(gram) >= min_dims * min(1, T.shape[1] / _SMALL)
    # The running minimum of the similarities keeps the order of the shortlist where rounding would change it.
    return torch.where(enough[:, None], gnn_scores(q, T, gram), torch.cummin(dots(T, q), dim=1).values)


def effective_dims(gram: torch.Tensor) -> torch.Tensor:
    """Return the number of effective dimensions of each shortlist: (B,) float32.

    Args:
        gram: (B, M, M) Gram matrices of the shortlists.

    Returns:
        Numbers in 1..M-1; 0 if all images of a shortlist are equal.
    """
    means = gram.mean(dim=1, keepdim=True)
    centered = gram - means - means.transpose(1, 2) + means.mean(dim=2, keepdim=True)
    total = centered.diagonal(dim1=1, dim2=2).sum(dim=1)
    squares = centered.square_().sum(dim=(1, 2))
    return torch.where(total > 1e-6 * gram.shape[-1], total.square() / squares.clamp(min=1e-12), 0.0)
