"""Attribution of the similarity of two images to the cells of the feature map of one of them.

The similarity of the image's descriptor d to a vector e is s = <e, d> with d = v / |v| and v = W g / |g| + b, where
g = g(x) results from pooling the feature map x (C, h, w), and v is combined over all scales. If |g| and |v| are held
constant, s is positively homogeneous of degree 1 in (x, b), because every step of its computation is: GeM
(g(tx) = t g(x)), Regional-GeM, the mean over scales and Scale-GeM. By Euler's theorem, gradient times input is then an
exact decomposition:

    s  =  sum over cells i of  sum_c x_ci ds/dx_ci   +   <b, ds/db>   +   remainder.

With GeM alone and u = W^T e / (|g| |v|), cell i contributes sum_c u_c g_c x_ci^p / sum_j x_cj^p. The remainder is
the effect of GeM's lower clamp (eps) on values <= 0; with the default eps it is far below 1e-4. Contributions may be
negative. They do not include the effect of a cell on the norms. Receptive fields are large, so the value of a cell
depends on a large part of the image around it.
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
from superglobal.models.pooling import at_least_float32, scale_gem
from superglobal.utils.precision import full_precision


@dataclass(frozen=True)
class Contributions:
    """Decomposition of a similarity into contributions: `similarity` is the sum of all `maps`, `bias` and `remainder`.

    Attributes:
        maps: one array (h, w) float64 per scale, with the contribution of each cell of the feature map.
        bias: contribution of the bias of the whitening layer.
        remainder: effect of GeM's lower clamp.
        similarity: inner product of the vector and the image's descriptor, as computed by `RetrievalNetwork.forward`.
    """

    maps: list[np.ndarray]
    bias: float
    remainder: float
    similarity: float

    def heatmap(self, height: int, width: int) -> np.ndarray:
        """Add up the contributions of all scales at the resolution of an image.

        Contributions are interpolated bilinearly between the centers of the cells, which changes their sum by at most a
        few percent.

        Args:
            height, width: size of the image in pixels.

        Returns:
            Contribution of each pixel, (height, width) float64.
        """
        total = np.zeros((height, width))
        for cells in self.maps:
            x = torch.from_numpy(cells)[None, None]
            pixels = torch.nn.functional.interpolate(x, (height, width), mode="bilinear", align_corners=False)
            total += pixels[0, 0].numpy() * (cells.size / (height * width))
        return total


def contributions(network: RetrievalNetwork, image: Tensor, vector: np.ndarray | None = None) -> Contributions:
    """Decompose the similarity of an image to a descriptor into contributions of the cells of its feature maps.

    Args:
        network: network in evaluation mode.
        image: (3, H, W) RGB, uint8 or float in 0..1.
        vector: (D,) descriptor of the other image, unit norm; None for the image itself, with similarity 1.

    Returns:
        The contributions.

    Raises:
        InputError: the dimension of `vector` is not that of the network's descriptors.
    """
    device = network.mean.device
    with torch.no_grad(), full_precision():
        maps = [at_least_float32(x) for x in network.feature_maps(image[None].to(device))]
        descriptor = network.descriptors(maps)[0]
    target = descriptor if vector is None else torch.from_numpy(np.asarray(vector, np.float32)).to(device)
    if target.shape != descriptor.shape:
        raise InputError(
            f"contributions: vector has shape {tuple(target.shape)}, expected {tuple(descriptor.shape)}; extract it "
            "with the same network"
        )
    maps = [x.detach().requires_grad_() for x in maps]
    layer = network.whitening
    bias = torch.zeros(network.dim, device=device) if layer is None else layer.bias.detach().clone()
    bias.requires_grad_()
    with torch.enable_grad(), full_precision():
        vectors = [_whitened(network, x, bias) for x in maps]
        score = _normalize(_combine(network, vectors))[0] @ target
        *gradients, bias_gradient = torch.autograd.grad(score, [*maps, bias], allow_unused=True)
    cells = [
        np.zeros(x.shape[-2:]) if g is None else _gradient_times_input(x, g)
        for x, g in zip(maps, gradients, strict=True)
    ]
    bias_part = 0.0 if bias_gradient is None else float((bias.detach().double() * bias_gradient.double()).sum())
    similarity = float(descriptor.double() @ target.double())
    remainder = similarity - sum(float(x.sum()) for x in cells) - bias_part
    return Contributions(cells, bias_part, remainder, similarity)


def _gradient_times_input(x: Tensor, gradient: Tensor) -> np.ndarray:
    """Multiply a feature map (1, C, h, w) by its gradient, and return the sum over the channels, (h, w) float64."""
    return (x.detach().double() * gradient.double()).sum(dim=1)[0].cpu().numpy()


def _normalize(x: Tensor) -> Tensor:
    """L2-normalize the last axis of a tensor. The norms are detached, so gradients treat them as constants."""
    return x / x.detach().norm(dim=-1, keepdim=True).clamp(min=1e-12)


def _whitened(network: RetrievalNetwork, x: Tensor, bias: Tensor) -> Tensor:
    """Pool and whiten a feature map. The norm of the pooled vector is detached, so gradients treat it as a constant.

    Args:
        network: network with the pooling and the whitening layer.
        x: (1, C, h, w) feature map.
        bias: (D,) bias to use instead of the bias of the whitening layer.

    Returns:
        Vector (1, D).
    """
    pooled = network.pooling(x)
    if network.whitening is None:
        return pooled
    pooled = _normalize(pooled) if network.config.l2_before_whitening else pooled
    return pooled @ network.whitening.weight.T + bias


def _combine(network: RetrievalNetwork, vectors: Sequence[Tensor]) -> Tensor:
    """Combine the vectors (1, D) of all scales into one vector (1, D), as set by the network's pooling settings.

    Norms are detached, so gradients treat them as constants.
    """
    c = network.config
    if c.scale and math.isinf(c.scale_p):
        return torch.stack([_normalize(v) for v in vectors]).amax(dim=0)
    if c.scale:
        return scale_gem(vectors, c.scale_p)
    return torch.stack([_normalize(v) for v in vectors] if c.unit_scales else list(vectors)).mean(dim=0)
