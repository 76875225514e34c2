"""SuperGlobal's reranking of a shortlist without local features (paper, section 3; reference modules/reranking).

For a query q and the descriptors T (M, D) of its shortlist:

    S = T T^T                                similarities; the neighbors of i are the K + 1 largest S_ij, i itself first
    w_ij = beta S_ij, w_ii = 1               weights of the neighbors j of i
    R_i = sum_j w_ij T_j / sum_j w_ij        refined descriptors, not normalized
    s1 = R q                                 first scores
    e = elementwise maximum of R_i           expanded query, over the K + 1 images i with the largest s1
    s2 = R e                                 second scores
    score = (s1 + s2) / 2

R = A T for a sparse matrix A, so s1 = A (T q) and s2 = A (T e), and only the K + 1 rows of R that determine e are
computed. This is the method of the authors' code. The text of the paper suggests s2 = T e with the original
descriptors; `second="original"` computes this variant.
"""

from __future__ import annotations

import torch

from superglobal.errors import InputError
from superglobal.reranking.base import Parameter, dots, register_reranker

BETA = Parameter("weight of a neighbor per unit of similarity", -1e6, 1e6)


@register_reranker(
    "superglobal",
    "SuperGlobal's reranking, as in the authors' code",
    {
        "K": Parameter("number of neighbors that refine a descriptor", minimum=1),
        "beta": BETA,
        "second": Parameter(
            'descriptors that the expanded query is compared with: "refined" (the authors\' code) or "original" '
            "(the paper's text)",
            choices=("refined", "original"),
        ),
        "include_query": Parameter("include the query in the maximum that gives the expanded query"),
    },
)
def superglobal_scores(
    q: torch.Tensor,
    T: torch.Tensor,
    gram: torch.Tensor,
    *,
    K: int = 9,
    beta: float = 0.15,
    second: str = "refined",
    include_query: bool = False,
) -> torch.Tensor:
    """Compute the final scores of shortlists: (B, M) float64.

    Args:
        q: (B, D) queries.
        T: (B, M, D) shortlists, best first.
        gram: (B, M, M) Gram matrices T T^T; overwritten.
        K: number of neighbors that refine a descriptor.
        beta: weight of a neighbor per unit of similarity.
        second: descriptors that the expanded query is compared with, "refined" or "original".
        include_query: True to include the query in the maximum that gives the expanded query.
    """
    near, weights = _neighbors(gram, K, beta)
    s1 = combine(weights, near, dots(T, q))
    best = s1.topk(near.shape[-1], dim=1).indices
    expanded = refined(T, near, weights, best).amax(dim=1)
    if include_query:
        expanded = torch.maximum(expanded, q)
    s2 = dots(T, expanded).double()
    if second == "refined":
        s2 = combine(weights, near, s2)
    return (s1 + s2) / 2


def _neighbors(gram: torch.Tensor, K: int, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the neighbors of each image in its shortlist, and their weights.

    A neighbor with negative similarity has a negative weight, as in the authors' code.

    Args:
        gram: (B, M, M) Gram matrices of the shortlists; overwritten.
        K: number of neighbors, in addition to the image itself.
        beta: weight of a neighbor per unit of similarity.

    Returns:
        Indices (B, M, K+1) int64 of the nearest images, the image itself first, and their weights (B, M, K+1) float64,
        which sum to 1.
    """
    # Due to rounding, a duplicate may score higher than the image itself. Infinity keeps the image first.
    gram.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    similarity, near = gram.topk(min(K + 1, gram.shape[-1]), dim=-1)
    weights = similarity.double() * beta
    weights[..., 0] = 1.0
    return near, normalized(weights, beta)


def normalized(weights: torch.Tensor, beta: float) -> torch.Tensor:
    """Divide weights (B, M, K+1) by their sum along the last axis.

    Raises:
        InputError: a sum is 0; the message names `beta`.
    """
    total = weights.sum(dim=-1, keepdim=True)
    if (total.abs() < 1e-6).any():
        raise InputError(f"beta={beta}: the weights of a candidate and its neighbors sum to 0; choose a smaller beta")
    return weights / total


def combine(weights: torch.Tensor, near: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Compute the weighted sum of values over the neighbors of each image: (B, M) float64.

    Args:
        weights: (B, M, K+1) weights of the neighbors.
        near: (B, M, K+1) indices of the neighbors in the shortlist.
        values: (B, M) one value per image.
    """
    n_queries, depth, width = near.shape
    neighbor_values = values.double().gather(1, near.view(n_queries, depth * width)).view_as(weights)
    return (weights * neighbor_values).sum(dim=-1)


def refined(T: torch.Tensor, near: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Compute the refined descriptors of some images of each shortlist, as weighted sums over their neighbors.

    Args:
        T: (B, M, D) shortlists.
        near: (B, M, K+1) indices of each image's neighbors in the shortlist.
        weights: (B, M, K+1) weights of the neighbors.
        rows: (B, n) indices of the images to refine.

    Returns:
        (B, n, D) float32.
    """
    batch = torch.arange(len(T), device=T.device)[:, None]
    members = T[batch[..., None], near[batch, rows]]  # (B, n, K+1, D)
    return torch.einsum("brn,brnd->brd", weights[batch, rows].float(), members)
