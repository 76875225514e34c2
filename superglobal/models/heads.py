"""Margin heads: from descriptors to logits over landmarks, in float32 whatever autocast says."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Keeps the slope of sin = sqrt(1 - cos^2) finite at cos = +-1.
_EPS = 1e-6


class ArcFace(nn.Module):
    """Additive angular margin (Deng et al., CVPR 2019, eq. 3): scale * cos(theta_y + margin) for the label y.

    Where theta + margin would pass pi, cos(theta + margin) rises again; there the target is the straight
    continuation cos(theta) - margin * sin(margin), so that logits keep falling with the angle.

    Args:
        dim: D of the descriptors.
        classes: number of landmarks.
        scale: multiplies every cosine.
        margin: radians, in 0..pi/2.
    """

    def __init__(self, dim: int, classes: int, scale: float, margin: float) -> None:
        super().__init__()
        self.scale = scale
        self.margin = margin
        self.weight = nn.Parameter(torch.empty(classes, dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, descriptors: Tensor, labels: Tensor) -> Tensor:
        """(B, D) of any norm, (B,) int64 labels -> (B, classes) logits, float32 (float64 for float64 descriptors)."""
        with torch.autocast(descriptors.device.type, enabled=False):
            wide = torch.promote_types(descriptors.dtype, torch.float32)
            cosine = F.linear(F.normalize(descriptors.to(wide)), F.normalize(self.weight.to(wide)))
            rows = torch.arange(len(labels), device=labels.device)
            target = with_margin(cosine[rows, labels], self.margin)
            return self.scale * cosine.index_put((rows, labels), target)


def with_margin(cosine: Tensor, margin: float) -> Tensor:
    """cos(arccos(x) + margin), continued straight beyond pi, for x in -1..1."""
    sine = (1 - cosine.square()).clamp(min=_EPS).sqrt()
    moved = cosine * math.cos(margin) - sine * math.sin(margin)
    return torch.where(cosine > -math.cos(margin), moved, cosine - margin * math.sin(margin))
