"""The retrieval network: uint8 image in, unit descriptor out, through any list of scales."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superglobal.errors import InputError
from superglobal.models.backbone import Backbone, has_relup, install_relup
from superglobal.models.hub import HubModel
from superglobal.models.pooling import MapPooling, PoolingConfig, scale_gem, wide

# The reference's lists (model/resnet.py:269-281); its default is the one of three.
SCALES: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    3: (0.7071, 1.0, 1.4142),
    5: (0.5, 0.7071, 1.0, 1.4142, 2.0),
}
# Raised whenever the same weights and settings begin to give other descriptors: stored ones are then not reused.
DESCRIPTOR_VERSION = 1
# A thread-like crop is stretched rather than grown to a picture of this many pixels a side.
_MAX_ENLARGED_SIDE = 4096


def make_scales(scales: int | Sequence[float]) -> tuple[float, ...]:
    """Expand 1, 3 or 5 to the reference's list; check any other list.

    Raises:
        InputError: unknown count, empty list, or a scale outside 0.1..4.
    """
    wish = "expected 1, 3, 5 or a list such as [0.7071,1.0,1.4142]"
    if isinstance(scales, int | str):
        if scales not in SCALES or isinstance(scales, bool):
            raise InputError(f"scales={scales}: {wish}")
        return SCALES[int(scales)]
    try:
        values = tuple(float(s) for s in scales)
    except (TypeError, ValueError) as error:
        raise InputError(f"scales={scales}: {wish}") from error
    if not values or not all(0.1 <= s <= 4 for s in values):
        raise InputError(f"scales={scales}: {wish}, of numbers in 0.1..4")
    return values


class RetrievalNetwork(nn.Module, HubModel):
    """Backbone, pooling, whitening layer and scales (method of the reference's model/resnet.py:248-288).

    Args:
        backbone: image to feature map.
        pooling: switches and constants; ReLUP is installed into the backbone here.
        dim: outputs of the whitening layer; None for no whitening (D = the backbone's channels).
        scales: 1, 3, 5 or a list of factors.
        antialias: filter when a scale shrinks the image; off is what the paper's runs had.

    Attributes:
        provenance: where the weights come from, as plain types; what `save_pretrained` tells of them.

    Raises:
        InputError: ReLUP on a backbone that has no place for it; a bad list of scales.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        pooling: PoolingConfig,
        dim: int | None = None,
        scales: int | Sequence[float] = 3,
        antialias: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        pooling = self._resolved(pooling)
        self.pooling = MapPooling(pooling)
        self.whitening = nn.Linear(backbone.channels, dim) if dim else None
        self.dim = dim or backbone.channels
        self.scales = make_scales(scales)
        self.antialias = antialias
        self.precision = "float32"
        self.weights_label = "random"
        self.weights_format: str | None = None  # "CVNet" for the reference's
        self.trained_pooling: dict[str, Any] | None = None
        self.provenance: dict[str, Any] = {}
        install_relup(backbone.net, pooling.relup, pooling.relup_alpha)
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1), persistent=False)

    @property
    def config(self) -> PoolingConfig:
        return self.pooling.config

    def set_p(self, p: float | None) -> None:
        """Set GeM's exponent, or with None keep the loaded one; either way `config` says it afterwards."""
        if p is not None:
            self.pooling.p.data.fill_(p)
        # Single-precision weights hold 2.7 as 2.70000005; say the number that was meant.
        self.pooling.config = replace(self.config, p=float(f"{self.pooling.p.item():.6g}"))

    def normalize(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, or float in 0..1, RGB -> standardised with the weights' statistics, in their dtype."""
        images = images.to(self.mean.dtype) / (255 if images.dtype == torch.uint8 else 1)
        return (images - self.mean) / self.std

    def whitened(self, x: Tensor) -> Tensor:
        """Descriptor at one scale before its last normalisation: (B, 3, H, W) standardised -> (B, D)."""
        return self._pooled(self.backbone(x))

    def _pooled(self, feature_map: Tensor) -> Tensor:
        return self._whiten(self.pooling(feature_map))

    def _whiten(self, pooled: Tensor) -> Tensor:
        if self.whitening is None:
            return pooled
        return self.whitening(F.normalize(pooled) if self.config.l2_before_whitening else pooled)

    def forward(self, images: Tensor) -> Tensor:
        """Descriptors of images of one size.

        Args:
            images: (B, 3, H, W) RGB, uint8 or float in 0..1.

        Returns:
            (B, D) float32, unit norm.
        """
        return self.descriptors(self.feature_maps(images))

    def feature_maps(self, images: Tensor) -> Iterator[Tensor]:
        """What is pooled: one map (B, C, h, w) per scale, one after the other, of images as `forward` takes them."""
        images = self._enlarge(images)
        x = images if self.config.opencv_resize else self.normalize(images)
        return (self.backbone(self._at_scale(x, scale)) for scale in self.scales)

    def descriptors(self, feature_maps: Iterable[Tensor]) -> Tensor:
        """Pool, whiten and combine: one map (B, C, h, w) per scale -> (B, D) float32, unit norm."""
        return self._combined([wide(self._pooled(x)) for x in feature_maps])

    def _combined(self, vectors: list[Tensor]) -> Tensor:
        if self.config.scale:
            combined = scale_gem(vectors, self.config.scale_p)
        else:
            combined = torch.stack([F.normalize(v) for v in vectors] if self.config.unit_scales else vectors).mean(0)
        return F.normalize(combined)

    def shares_maps(self, pooling: PoolingConfig) -> bool:
        """Whether a network with these switches has the same feature maps: ReLUP is in the backbone."""
        return _backbone_pass(self._resolved(pooling)) == _backbone_pass(self.config)

    def variant(self, pooling: PoolingConfig) -> RetrievalNetwork:
        """The same network with other switches of the pooling, sharing its weights; p stays.

        Raises:
            InputError: `pooling` has another ReLUP.
        """
        if not self.shares_maps(pooling):
            raise InputError("variant: ReLUP is in the backbone; load_model makes a network with another")
        return self.sharing(self.backbone, replace(self._resolved(pooling), p=self.config.p))

    def sharing(self, backbone: Backbone, pooling: PoolingConfig) -> RetrievalNetwork:
        """A network of this one's whitening layer, p, scales and labels around another backbone of the same kind."""
        other = RetrievalNetwork(backbone, pooling, None, self.scales, self.antialias)
        other.whitening, other.dim, other.pooling.p = self.whitening, self.dim, self.pooling.p
        other.mean, other.std = self.mean, self.std
        other.weights_label, other.weights_format = self.weights_label, self.weights_format
        other.trained_pooling = self.trained_pooling
        other.precision, other.provenance = self.precision, self.provenance
        return other.train(self.training)

    def _resolved(self, pooling: PoolingConfig) -> PoolingConfig:
        """With ReLUP on or off where it is "auto"."""
        if pooling.relup != "auto":
            return pooling
        return replace(pooling, relup="on" if has_relup(self.backbone.net) else "off")

    def _at_scale(self, x: Tensor, scale: float) -> Tensor:
        if self.config.opencv_resize:
            return self.normalize(_opencv_scaled(x, scale))
        return resized(x, scale, self.antialias)

    def min_side(self) -> int:
        """Shorter image side, in pixels, below which `forward` first enlarges the image.

        RegionalGeM's reflect padding needs 3 cells at the smallest scale (ResNet: 92 px at three scales, 130 at
        five, 65 at one), where the reference crashes; without RegionalGeM one cell is enough.
        """
        need = self.backbone.min_side(self.pooling.min_cells)
        smallest = min(self.scales)
        side = int(need / smallest)
        while int(side * smallest) < need:
            side += 1
        return side

    def _enlarge(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        need = self.min_side()
        if min(height, width) >= need:
            return images
        factor = need / min(height, width)
        limit = max(height, width, _MAX_ENLARGED_SIDE)
        size = [max(need, min(round(side * factor), limit)) for side in (height, width)]
        values = images.float() / 255 if images.dtype == torch.uint8 else images
        enlarged = _resize(values, size[0], size[1], antialias=False)
        return (enlarged * 255).round().to(torch.uint8) if self.config.opencv_resize else enlarged

    def identity(self) -> dict[str, Any]:
        """Everything about the network that changes a descriptor, as plain types for a fingerprint."""
        return {
            "descriptor_version": DESCRIPTOR_VERSION,
            "weights": weights_digest(self.state_dict()),
            "backbone": self.backbone.name,
            "mean": list(self.backbone.mean),
            "std": list(self.backbone.std),
            "dim": self.dim,
            "pooling": asdict(self.config),
            "scales": list(self.scales),
            "antialias": self.antialias,
            "min_side": self.min_side(),
            "precision": self.precision,
        }


def describe_all(networks: Sequence[RetrievalNetwork], images: Tensor) -> list[Tensor]:
    """Descriptors of the same images by several variants of one network, each map and each pooling computed once.

    Args:
        networks: sharing weights, scales and ReLUP: see `RetrievalNetwork.variant`.
        images: as `RetrievalNetwork.forward` takes them.

    Returns:
        Per network what it gives itself: (B, D) float32, unit norm.
    """
    found: list[Tensor] = [images] * len(networks)
    side = min(images.shape[-2:])
    # A small image is enlarged for the one that pools by regions and not for the other.
    for need in {max(side, network.min_side()) for network in networks}:
        alike = [i for i, network in enumerate(networks) if max(side, network.min_side()) == need]
        vectors: dict[int, list[Tensor]] = {i: [] for i in alike}
        for x in networks[alike[0]].feature_maps(images):
            pooled: dict[Any, Tensor] = {}
            for i in alike:
                network, key = networks[i], networks[i].pooling.key()
                if key not in pooled:
                    pooled[key] = network.pooling(x)
                vectors[i].append(wide(network._whiten(pooled[key])))
        for i in alike:
            found[i] = networks[i]._combined(vectors[i])
    return found


def _backbone_pass(pooling: PoolingConfig) -> tuple[Any, ...]:
    """What of the pooling settings changes feature maps."""
    return pooling.relup, pooling.relup_alpha if pooling.relup != "off" else None, pooling.opencv_resize


def weights_digest(state: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes: the same for one set of weights in any file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def resized(x: Tensor, scale: float, antialias: bool = False) -> Tensor:
    """Resize (B, C, H, W) bilinearly to int(H * scale) x int(W * scale), as the reference truncates."""
    if scale == 1.0:
        return x
    return _resize(x, int(x.shape[-2] * scale), int(x.shape[-1] * scale), antialias)


def _resize(x: Tensor, height: int, width: int, antialias: bool) -> Tensor:
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=antialias)


def _opencv_scaled(images: Tensor, scale: float) -> Tensor:
    """CVNet's resize: OpenCV on uint8, area below 1 and linear above (its test/dataset.py)."""
    if images.dtype != torch.uint8:
        raise InputError("pooling.opencv_resize works on uint8 images: give (B, 3, H, W) uint8")
    if scale == 1.0:
        return images
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    scaled = [
        cv2.resize(im, None, fx=scale, fy=scale, interpolation=method)
        for im in images.permute(0, 2, 3, 1).cpu().numpy()
    ]
    return torch.from_numpy(np.stack(scaled)).permute(0, 3, 1, 2).to(images.device)
