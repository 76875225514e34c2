"""SuperGlobal's reranking of a shortlist without local features (paper, section 3; reference modules/reranking).

    S = T T^T over the shortlist T;  neighbors of i = the K + 1 largest S[i], itself first
    w = beta S, w[self] = 1;         R_i = sum_j w_ij T_j / sum_j w_ij      (refined, not normalized)
    s1 = R q;                        e = elementwise max of the R of the best K + 1 by s1
    s2 = R e;                        score = (s1 + s2) / 2

R = A T with a sparse A, so s1 = A (T q) and s2 = A (T e), and only the K + 1 rows of R that determine e are computed.
This is the method of the authors' code. The text of the paper suggests s2 = T e, with the original descriptors, which
second="original" computes.
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
        "include_query": Parameter("include the query in the maximum"),
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
    """Return the final scores (B, M) float64."""
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
    """Return the K + 1 nearest rows of each row, itself first, and their weights, which sum to 1: (B, M, K+1) each.

    A neighbor with negative similarity has a negative weight, as in the reference. `gram` is overwritten.
    """
    # By rounding, a duplicate may score higher than the row itself. Infinity keeps the row in the first position.
    gram.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    similarity, near = gram.topk(min(K + 1, gram.shape[-1]), dim=-1)
    weights = similarity.double() * beta
    weights[..., 0] = 1.0
    return near, normalized(weights, beta)


def normalized(weights: torch.Tensor, beta: float) -> torch.Tensor:
    """Divide weights (B, M, K+1) by their sum. Raises InputError if a sum is 0."""
    total = weights.sum(dim=-1, keepdim=True)
    if (total.abs() < 1e-6).any():
        raise InputError(f"beta={beta}: the weights of a candidate and its neighbors sum to 0; choose a smaller beta")
    return weights / total


def combine(weights: torch.Tensor, near: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return A v (B, M) float64 for v (B, M); A is the sparse matrix of weights and neighbors (B, M, K+1)."""
    n_queries, depth, width = near.shape
    neighbor_values = values.double().gather(1, near.view(n_queries, depth * width)).view_as(weights)
    return (weights * neighbor_values).sum(dim=-1)


def refined(T: torch.Tensor, near: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the refined descriptors (B, n, D) of `rows` (B, n)."""
    batch = torch.arange(len(T), device=T.device)[:, None]
    members = T[batch[..., None], near[batch, rows]]  # (B, n, K+1, D)
    return torch.einsum("brn,brnd->brd", weights[batch, rows].float(), members)
