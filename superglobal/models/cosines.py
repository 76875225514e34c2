"""Cosines of descriptors with the centres of classes, in little memory, and the angular margin on them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Keeps the slope of sin = sqrt(1 - cos^2) finite at cos = +-1.
_EPS = 1e-6
# A shorter vector has no direction.
_TINY = 1e-12


def with_margin(cosine: Tensor, margin: Tensor, easy: bool = False) -> Tensor:
    """cos(arccos(x) + margin) for x in -1..1, both (B,).

    Beyond pi it is continued straight; with `easy` x itself is taken where x <= 0.
    """
    sine = (1 - cosine.square()).clamp(min=_EPS).sqrt()
    moved = cosine * margin.cos() - sine * margin.sin()
    if easy:
        return torch.where(cosine > 0, moved, cosine)
    return torch.where(cosine > -margin.cos(), moved, cosine - margin * margin.sin())


def class_cosines(x: Tensor, weight: Tensor) -> Tensor:
    """(B, D) against the (S, K, D) centres of S classes -> (B, S) cosine with each class's nearest centre.

    A zero vector has cosine 0 with everything, and no gradient.
    """
    centers = weight.flatten(0, 1)
    cosines: Tensor = _Cosines.apply(x * _inverse_norms(x), centers)
    if weight.shape[1] == 1:
        return cosines
    return cosines.unflatten(1, weight.shape[:2]).max(dim=2).values


def _inverse_norms(x: Tensor) -> Tensor:
    """(n, D) -> (n, 1): 1 / norm, 0 where there is no direction."""
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return 1 / norms.masked_fill(norms <= _TINY, math.inf)


class _Cosines(torch.autograd.Function):
    """Unit vectors (B, D) times the directions of w (N, D): (B, N).

    Normalising w first would hold a second and a third copy of it, forward and backward, and w is by far the largest
    thing here: 5 GB for 203,094 classes with three centres. This needs w's gradient and nothing else of its size.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        inverse = _inverse_norms(w)
        cosines = (x @ w.T).mul_(inverse.T)
        ctx.save_for_backward(x, w, inverse, cosines)
        return cosines

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w, inverse, cosines = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad * inverse.T
            # Of each row of w only the part across its direction moves a cosine.
            along = torch.einsum("bn,bn->n", grad, cosines)[:, None] * inverse
            return grad @ w, (grad.T @ x).addcmul_(w, along, value=-1)
