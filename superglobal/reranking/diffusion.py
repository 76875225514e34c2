"""Diffusion over a shortlist's graph (Iscen et al., CVPR 2017), solved exactly.

A_ij = max(x_i x_j, 0)^gamma  if i and j are among each other's k nearest, else 0;  S = D^-1/2 A D^-1/2
y_i  = max(q x_i, 0)^gamma    for the kq nearest to the query, else 0
(I - alpha S) f = y;          order by f

The defaults are those of the authors' code for global descriptors, which diffuses over the whole database.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from superglobal.reranking.base import dots, mask_of, nearest, require_between, require_whole, rerank_shortlists


def diffuse(
    Q: Any,
    X: Any,
    ids: Any,
    M: int = 400,
    kq: int = 10,
    kd: int = 50,
    alpha: float = 0.99,
    gamma: float = 3.0,
    *,
    device: str | torch.device | None = None,
    batch_size: int = 16,
) -> tuple[np.ndarray, np.ndarray]:
    """Rerank the first min(M, k) of each shortlist by diffusion; the rest stays, with score -inf.

    Q, X, ids: as `rerank` takes them. kq: images that the query starts from. kd: neighbours in the graph, which has
    an edge where both sides count each other. alpha: 0..0.9999; 0 is the first stage's order. gamma: power of a
    similarity, over 0. Memory is that of `batch_size` matrices (M, M) float64, a few times over.

    Returns scores (Q, k) float32, f, and ids (Q, k) int64, best first; equal scores, such as the 0 of what the
    query does not reach, as they stood. Raises InputError for bad ids, bad rows, and parameters out of range.
    """
    require_whole({"kq": kq, "kd": kd})
    require_between({"alpha": alpha}, 0, 0.9999)
    require_between({"gamma": gamma}, 1e-3, 1e3)

    def score(q: torch.Tensor, T: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
        start = dots(T, q).clamp(min=0) ** gamma
        start[:, kq:] = 0  # a shortlist comes best first
        return _solve(_normalised(gram, kd, gamma), start, alpha)

    return rerank_shortlists(Q, X, ids, M, score, batch_size, device, dtype=torch.float64, ties="first")


def _normalised(similarity: torch.Tensor, kd: int, gamma: float) -> torch.Tensor:
    """S (B, M, M) float64 of the mutual kNN graph; an image without an edge has a row of zeros."""
    among = mask_of(nearest(similarity, kd + 1), similarity.shape[-1])
    A = torch.where(among & among.transpose(1, 2), similarity.clamp(min=0) ** gamma, 0.0)
    A.diagonal(dim1=1, dim2=2).zero_()
    degree = A.sum(dim=-1)
    scale = torch.where(degree > 0, degree, 1.0).rsqrt()
    return scale[:, :, None] * A * scale[:, None, :]


def _solve(S: torch.Tensor, start: torch.Tensor, alpha: float) -> torch.Tensor:
    """f (B, M) of (I - alpha S) f = start (B, M); positive definite, as S has no eigenvalue over 1."""
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    factor = torch.linalg.cholesky(eye - alpha * S)
    return torch.cholesky_solve(start[..., None], factor)[..., 0]
