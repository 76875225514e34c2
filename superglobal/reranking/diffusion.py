"""Diffusion on the graph of a shortlist (Iscen et al., CVPR 2017), solved exactly.

A_ij = max(x_i x_j, 0)^gamma  if i and j are among each other's k nearest, else 0;  S = D^-1/2 A D^-1/2
y_i  = max(q x_i, 0)^gamma    for the kq nearest to the query, else 0
(I - alpha S) f = y;          order by f

The defaults are those of the authors' code for global descriptors, which diffuses over the whole database
(github.com/ahmetius/diffusion-retrieval, run_test.m).
"""

from __future__ import annotations

import torch

from superglobal.reranking.base import Parameter, dots, mask_of, nearest, register_reranker


@register_reranker(
    "diffusion",
    "diffusion on the graph of the shortlist (Iscen et al., CVPR 2017)",
    {
        "kq": Parameter("number of nearest images to the query, from which the diffusion starts", minimum=1),
        "kd": Parameter("number of neighbors per image; mutual neighbors are connected in the graph", minimum=1),
        "alpha": Parameter("fraction of the scores that is passed on to neighbors; 0 keeps the order", 0, 0.9999),
        "gamma": Parameter("exponent of the similarities", 1e-3, 1e3),
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
    """Return the scores f (B, M) float64; they are 0 for images that are not connected with the query."""
    start = dots(T, q).clamp(min=0) ** gamma
    start[:, kq:] = 0  # shortlists are sorted, best first
    return _solve(_normalized_graph(gram, kd, gamma), start, alpha)


def _normalized_graph(similarity: torch.Tensor, kd: int, gamma: float) -> torch.Tensor:
    """Return S (B, M, M) float64 of the mutual kNN graph; an image without an edge has a row of zeros."""
    neighbors = mask_of(nearest(similarity, kd + 1), similarity.shape[-1])
    A = torch.where(neighbors & neighbors.transpose(1, 2), similarity.clamp(min=0) ** gamma, 0.0)
    A.diagonal(dim1=1, dim2=2).zero_()
    degree = A.sum(dim=-1)
    scale = torch.where(degree > 0, degree, 1.0).rsqrt()
    return scale[:, :, None] * A * scale[:, None, :]


def _solve(S: torch.Tensor, start: torch.Tensor, alpha: float) -> torch.Tensor:
    """Solve (I - alpha S) f = start for f (B, M); the matrix is positive definite, as no eigenvalue of S exceeds 1."""
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    factor = torch.linalg.cholesky(eye - alpha * S)
    return torch.cholesky_solve(start[..., None], factor)[..., 0]
