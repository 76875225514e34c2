"""k-reciprocal reranking inside a shortlist (Zhong et al., CVPR 2017): no training, no local features.

    R(p, k)  = images of p's k nearest that have p among their own k nearest
    R*(p)    = R(p, k1) and every R(q, k1/2) of a q in it that shares more than 2/3 with it
    V(p, g)  = exp(-d(p, g)) for g in R*(p), else 0, over its sum;  V <- mean of V over p's k2 nearest
    final    = (1 - lambda) Jaccard distance of V(query) and V(g) + lambda d(query, g)

The images are the query and its shortlist; d is the squared Euclidean distance over the largest of its row, and an
image counts among its own nearest beside its k, all as in the authors' code, whose k1, k2 and lambda are the defaults.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from superglobal.reranking.base import dots, mask_of, nearest, require_between, require_whole, rerank_shortlists


def kreciprocal(
    Q: Any,
    X: Any,
    ids: Any,
    M: int = 400,
    k1: int = 20,
    k2: int = 6,
    lambda_: float = 0.3,
    *,
    device: str | torch.device | None = None,
    batch_size: int = 16,
) -> tuple[np.ndarray, np.ndarray]:
    """Rerank the first min(M, k) of each shortlist by the k-reciprocal distance; the rest stays, with score -inf.

    Q, X, ids: as `rerank` takes them. k1: neighbours that must be mutual. k2: neighbours that V is averaged over,
    itself among them. lambda_: share of the first stage's distance, 0..1; 1 is the first stage's order.
    Memory is that of `batch_size` matrices (M + 1, M + 1) float64, a few times over.

    Returns scores (Q, k) float32, the negative of the final distance, and ids (Q, k) int64, best first, equal
    scores as they stood. Raises InputError for bad ids, bad rows, and parameters out of range.
    """
    require_whole({"k1": k1, "k2": k2})
    require_between({"lambda_": lambda_}, 0, 1)

    def score(q: torch.Tensor, T: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
        return -_distances(_with_query(dots(T, q), gram), k1, k2, lambda_)

    return rerank_shortlists(Q, X, ids, M, score, batch_size, device, dtype=torch.float64, ties="first")


def _with_query(first: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Cosines (B, M+1, M+1) of the query, number 0, and its shortlist: `first` (B, M) those of the query."""
    column = first[..., None]
    top = torch.cat([torch.ones_like(column[:, :1]), column], dim=1)
    return torch.cat([top, torch.cat([column.transpose(1, 2), gram], dim=1)], dim=2)


def _distances(similarity: torch.Tensor, k1: int, k2: int, lambda_: float) -> torch.Tensor:
    """Final distances (B, M) float64 of the shortlist, smallest best."""
    size = similarity.shape[-1]
    distance = (2 - 2 * similarity).clamp(min=0)
    distance.diagonal(dim1=1, dim2=2).zero_()
    # Of images that are all equal the largest distance is 0.
    distance = distance / distance.amax(dim=-1, keepdim=True).clamp(min=1e-12)
    near = nearest(similarity, max(k1 + 1, k2))
    V = _reciprocal(near, k1, size).double() * torch.exp(-distance)
    V = V / V.sum(dim=-1, keepdim=True)
    if k2 > 1:
        mean = mask_of(near[..., :k2], size).double()
        V = torch.bmm(mean / mean.sum(dim=-1, keepdim=True), V)
    # The rows of V sum to 1, so that the union of two is 2 minus what they share.
    shared = torch.minimum(V[:, :1], V[:, 1:]).sum(dim=-1)
    return (1 - lambda_) * (1 - shared / (2 - shared)) + lambda_ * distance[:, 0, 1:]


def _reciprocal(near: torch.Tensor, k1: int, size: int) -> torch.Tensor:
    """R* of every image as a bool matrix (B, size, size); its own column is always set."""

    def mutual(k: int) -> torch.Tensor:
        among = mask_of(near[..., : k + 1], size)
        return among & among.transpose(1, 2)

    # numpy's rounding, as the authors' code has it: halves to the even number.
    wide, narrow = mutual(k1), mutual(int(np.around(k1 / 2)))
    # Counts of at most M + 1 are exact in float32.
    shared = torch.bmm(wide.float(), narrow.float().transpose(1, 2))
    joins = wide & (3 * shared > 2 * narrow.sum(dim=-1)[:, None, :])
    return wide | (torch.bmm(joins.float(), narrow.float()) > 0)
