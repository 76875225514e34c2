"""Diffusion on the neighbor graph of a shortlist (Iscen et al., CVPR 2017), solved exactly.

For a query q and the images x_1, x_2, ... of its shortlist, where q x_i and x_i x_j are inner products:

    A_ij = max(x_i x_j, 0)^gamma  if i and j are among each other's kd nearest images, else 0 (affinity matrix)
    S    = D^-1/2 A D^-1/2        with the diagonal matrix D of the row sums of A (normalized affinity matrix)
    y_i  = max(q x_i, 0)^gamma    for the kq images nearest to the query, else 0
    f    = (I - alpha S)^-1 y     scores, by which the images are sorted

The defaults are those of the authors' code for global descriptors, which diffuses over the whole database instead of a
shortlist (github.com/ahmetius/diffusion-retrieval, run_test.m).
"""

from __future__ import annotations

import torch

from superglobal.reranking.base import Parameter, dots, mask_of, nearest, register_reranker


@register_reranker(
    "diffusion",
    "diffusion on the graph of the shortlist (Iscen et al., CVPR 2017)",
    {
        "kq": Parameter("number of images nearest to the query, from which the diffusion starts", minimum=1),
        "kd": Parameter("number of neighbors per image; the graph connects mutual neighbors", minimum=1),
        "alpha": Parameter("fraction of the scores that is passed on to neighbors; 0 keeps the order", 0, 0.9999),
        "gamma": Parameter("exponent of the similarities", 1e-3, 100),
    },
    dtype=torch.float64,
    ties="first",
)
def diffusion_scores(
    q: torch.Tensor,
    T: torch.Tensor,
    gram: torch.Tensor,
    *,
    kq: int = 10,
    kd: int = 50,
    alpha: float = 0.99,
    gamma: float = 3.0,
) -> torch.Tensor:
    """Compute the diffusion scores of shortlists.

    Args:
        q: (B, D) queries.
        T: (B, M, D) shortlists, best first.
        gram: (B, M, M) Gram matrices T T^T.
        kq: number of images nearest to the query, from which the diffusion starts.
        kd: number of neighbors per image; two images are connected if each is a neighbor of the other.
        alpha: fraction of the scores that is passed on to neighbors, in 0..0.9999.
        gamma: exponent of the similarities.

    Returns:
        Scores f (B, M) float64. An image has the score 0 if no path in the graph connects it to one of the kq images
        nearest to the query.
    """
    start = dots(T, q).clamp(min=0) ** gamma
    start[:, kq:] = 0  # shortlists are sorted, so the first kq images are nearest to the query
    return _solve(_normalized_graph(gram, kd, gamma), start, alpha)


def _normalized_graph(similarity: torch.Tensor, kd: int, gamma: float) -> torch.Tensor:
    """Return the normalized affinity matrices S = D^-1/2 A D^-1/2 of mutual kNN graphs.

    Args:
        similarity: (B, M, M) cosines of the images of each shortlist.
        kd: number of neighbors per image; two images are connected if each is a neighbor of the other.
        gamma: exponent of the similarities in the affinity matrix A.

    Returns:
        (B, M, M) float64; the row of an image without neighbors is zero.
    """
    neighbors = mask_of(nearest(similarity, kd + 1), similarity.shape[-1])
    A = torch.where(neighbors & neighbors.transpose(1, 2), similarity.clamp(min=0) ** gamma, 0.0)
    A.diagonal(dim1=1, dim2=2).zero_()
    degree = A.sum(dim=-1)
    scale = torch.where(degree > 0, degree, 1.0).rsqrt()
    return scale[:, :, None] * A * scale[:, None, :]


def _solve(S: torch.Tensor, start: torch.Tensor, alpha: float) -> torch.Tensor:
    """Solve (I - alpha S) f = start for f (B, M), given S (B, M, M) and start (B, M)."""
    # Cholesky factorization needs a positive definite matrix. I - alpha S is positive definite, because alpha < 1 and
    # no eigenvalue of S exceeds 1.
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    factor = torch.linalg.cholesky(eye - alpha * S)
    return torch.cholesky_solve(start[..., None], factor)[..., 0]
