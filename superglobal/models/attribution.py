"""What a similarity is made of: the share that each place of an image adds to it.

The descriptor's similarity with a vector e is s = <e, d>, d = v / |v|, v = W g / |g| + b, where g pools the feature map
x (C, h, w) and several scales are combined into one v. With the norms |g|, |v| held at their values, s is a function of
x and b that is positively homogeneous of degree 1: so is GeM, g(tx) = t g(x), and so are RegionalGeM, the mean over the
scales and Scale-GeM. By Euler's theorem it is then, without approximation, gradient times input,

    s  =  sum over places i of  sum_c x_ci ds/dx_ci   +   <b, ds/db>   +   rest.

Under GeM alone, with u = W^T e / (|g| |v|), place i adds sum_c u_c g_c x_ci^p / sum_j x_cj^p: each channel of the
pooled vector is dealt out by the weights that the pool itself gives to the places. `rest` is what the clamp of GeM
(eps) puts in for values that are zero or negative, with the usual eps far below 1e-4. Shares may be negative. The
norms are what a share does not answer for: a brighter place also makes |v| larger. A place of the map sees much of the
image, since receptive fields are wide: where it stands is the middle of what it sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from superglobal.errors import InputError
from superglobal.models.network import RetrievalNetwork
from superglobal.models.pooling import scale_gem, wide
from superglobal.utils.precision import full_precision


@dataclass(frozen=True)
class Contributions:
    """Shares of one similarity: sum of all `maps` + `bias` + `rest` = `similarity`.

    Attributes:
        maps: per scale (h, w) float64, the share of each place of the feature map.
        bias: share of the whitening layer's bias, which no place answers for.
        rest: what clamping adds.
        similarity: of the image's descriptor (float32, as `RetrievalNetwork.forward` gives it) with the vector.
    """

    maps: list[np.ndarray]
    bias: float
    rest: float
    similarity: float

    def over(self, height: int, width: int) -> np.ndarray:
        """The shares of all scales, spread over a picture of this size: (height, width) float64, share per pixel.

        Between the centres of places they are interpolated, which keeps the sum to a few percent.
        """
        total = np.zeros((height, width))
        for one in self.maps:
            cells = torch.from_numpy(one)[None, None]
            spread = torch.nn.functional.interpolate(cells, (height, width), mode="bilinear", align_corners=False)
            total += spread[0, 0].numpy() * (one.size / (height * width))
        return total


def contributions(network: RetrievalNetwork, image: Tensor, vector: np.ndarray | None = None) -> Contributions:
    """Share by share, the similarity of an image with another descriptor, or with itself.

    Args:
        network: in evaluation mode.
        image: (3, H, W) as `RetrievalNetwork.forward` takes it.
        vector: (D,) unit norm; None for the image's own descriptor, whose similarity is 1.

    Raises:
        InputError: a vector of another dimension.
    """
    device = network.mean.device
    with torch.no_grad(), full_precision():
        maps = [wide(x) for x in network.feature_maps(image[None].to(device))]
        descriptor = network.descriptors(maps)[0]
    target = descriptor if vector is None else torch.from_numpy(np.asarray(vector, np.float32)).to(device)
    if target.shape != descriptor.shape:
        raise InputError(
            f"contributions: a vector {tuple(target.shape)}, but descriptors are {tuple(descriptor.shape)}"
        )
    maps = [x.detach().requires_grad_() for x in maps]
    layer = network.whitening
    bias = torch.zeros(network.dim, device=device) if layer is None else layer.bias.detach().clone()
    bias.requires_grad_()
    with torch.enable_grad(), full_precision():
        score = _held(_combined(network, [_whitened(network, x, bias) for x in maps]))[0] @ target
        *slopes, bias_slope = torch.autograd.grad(score, [*maps, bias], allow_unused=True)
    shares = [np.zeros(x.shape[-2:]) if g is None else _places(x, g) for x, g in zip(maps, slopes, strict=True)]
    of_bias = 0.0 if bias_slope is None else float((bias.detach().double() * bias_slope.double()).sum())
    similarity = float(descriptor.double() @ target.double())
    return Contributions(shares, of_bias, similarity - sum(float(one.sum()) for one in shares) - of_bias, similarity)


def _places(x: Tensor, slope: Tensor) -> np.ndarray:
    """Gradient times input, summed over channels: (1, C, h, w) twice -> (h, w)."""
    return (x.detach().double() * slope.double()).sum(dim=1)[0].cpu().numpy()


def _held(x: Tensor) -> Tensor:
    """Unit rows, the norm counting as a constant."""
    return x / x.detach().norm(dim=-1, keepdim=True).clamp(min=1e-12)


def _whitened(network: RetrievalNetwork, x: Tensor, bias: Tensor) -> Tensor:
    """`RetrievalNetwork.whitened` from the feature map on, with norms held and the bias as an input."""
    pooled = network.pooling(x)
    if network.whitening is None:
        return pooled
    pooled = _held(pooled) if network.config.l2_before_whitening else pooled
    return pooled @ network.whitening.weight.T + bias


def _combined(network: RetrievalNetwork, vectors: Sequence[Tensor]) -> Tensor:
    """One vector (1, D) out of the scales', norms held."""
    c = network.config
    if c.scale and math.isinf(c.scale_p):
        return torch.stack([_held(v) for v in vectors]).amax(dim=0)
    if c.scale:
        return scale_gem(vectors, c.scale_p)
    return torch.stack([_held(v) for v in vectors] if c.unit_scales else list(vectors)).mean(dim=0)
