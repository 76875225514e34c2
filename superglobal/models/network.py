"""The retrieval network: from images to unit-norm descriptors, over one or several scales."""

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
from superglobal.models.pooling import MapPooling, PoolingConfig, at_least_float32, scale_gem

# The reference's lists of scales (model/resnet.py:269-281); its default is 3.
SCALES: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    3: (0.7071, 1.0, 1.4142),
    5: (0.5, 0.7071, 1.0, 1.4142, 2.0),
}
# Increase this when a change gives other descriptors for the same weights and settings, so that stores are not reused.
DESCRIPTOR_VERSION = 1
# A very elongated image is stretched instead of enlarged beyond this side length, in pixels.
_MAX_ENLARGED_SIDE = 4096


def make_scales(scales: int | Sequence[float]) -> tuple[float, ...]:
    """Expand 1, 3 or 5 to the reference's list of scales; validate any other list.

    Raises:
        InputError: the count is unknown, the list is empty, or a scale is outside 0.1..4.
    """
    expected = "expected 1, 3, 5 or a list such as [0.7071,1.0,1.4142]"
    if isinstance(scales, int | str):
        if scales not in SCALES or isinstance(scales, bool):
            raise InputError(f"scales={scales}: {expected}")
        return SCALES[int(scales)]
    try:
        values = tuple(float(s) for s in scales)
    except (TypeError, ValueError) as error:
        raise InputError(f"scales={scales}: {expected}") from error
    if not values or not all(0.1 <= s <= 4 for s in values):
        raise InputError(f"scales={scales}: {expected}, of numbers in 0.1..4")
    return values


class RetrievalNetwork(nn.Module):
    """Network from image to descriptor: backbone, pooling, whitening layer and scales.

    The method is that of the reference (model/resnet.py, lines 248-288). Use `load_model` to create one.

    Args:
        backbone: network from image to feature map.
        pooling: switches and constants; ReLUP is installed into the backbone here.
        dim: outputs of the whitening layer; None for no whitening (D = the backbone's channels).
        scales: 1, 3, 5 or a list of factors.
        antialias: apply a low-pass filter when a scale shrinks the image; the paper's results are without one.

    Attributes:
        dim: D of the descriptors.
        provenance: origin of the weights, as plain types.

    Raises:
        InputError: ReLUP on a backbone that does not support it; invalid scales.
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
        pooling = self._resolve_relup(pooling)
        self.pooling = MapPooling(pooling)
        self.whitening = nn.Linear(backbone.channels, dim) if dim else None
        self.dim = dim or backbone.channels
        self.scales = make_scales(scales)
        self.antialias = antialias
        self.precision = "float32"
        self.weights_label = "random"
        self.weights_format: str | None = None  # "CVNet" for the reference's weights
        self.trained_pooling: dict[str, Any] | None = None
        self.provenance: dict[str, Any] = {}
        install_relup(backbone.net, pooling.relup, pooling.relup_alpha)
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1), persistent=False)

    @property
    def config(self) -> PoolingConfig:
        """Settings of the pooling."""
        return self.pooling.config

    def set_p(self, p: float | None) -> None:
        """Set GeM's exponent p and store it in `config`; None keeps the loaded p."""
        if p is not None:
            self.pooling.p.data.fill_(p)
        # The float32 parameter is 2.70000005 for p = 2.7; rounding restores the intended number.
        self.pooling.config = replace(self.config, p=float(f"{self.pooling.p.item():.6g}"))

    def normalize(self, images: Tensor) -> Tensor:
        """Standardize (B, 3, H, W) RGB, uint8 or float in 0..1, with `mean` and `std`, in the dtype of `mean`."""
        images = images.to(self.mean.dtype) / (255 if images.dtype == torch.uint8 else 1)
        return (images - self.mean) / self.std

    def single_scale_descriptors(self, x: Tensor) -> Tensor:
        """Compute descriptors at one scale, before L2 normalization: (B, 3, H, W) standardized -> (B, D)."""
        return self._pool(self.backbone(x))

    def _pool(self, feature_map: Tensor) -> Tensor:
        return self._whiten(self.pooling(feature_map))

    def _whiten(self, pooled: Tensor) -> Tensor:
        if self.whitening is None:
            return pooled
        return self.whitening(F.normalize(pooled) if self.config.l2_before_whitening else pooled)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the descriptors of a batch of images; small images are enlarged first, see `min_side`.

        Args:
            images: (B, 3, H, W) RGB, uint8 or float in 0..1.

        Returns:
            (B, D) float32, unit norm.
        """
        return self.descriptors(self.feature_maps(images))

    def feature_maps(self, images: Tensor) -> Iterator[Tensor]:
        """Compute one feature map (B, C, h, w) per scale, lazily, from images in the format of `forward`."""
        images = self._enlarge(images)
        x = images if self.config.opencv_resize else self.normalize(images)
        return (self.backbone(self._at_scale(x, scale)) for scale in self.scales)

    def descriptors(self, feature_maps: Iterable[Tensor]) -> Tensor:
        """Pool, whiten and combine one map (B, C, h, w) per scale into (B, D) float32, unit norm."""
        return self._combine([at_least_float32(self._pool(x)) for x in feature_maps])

    def _combine(self, vectors: list[Tensor]) -> Tensor:
        if self.config.scale:
            combined = scale_gem(vectors, self.config.scale_p)
        else:
            combined = torch.stack([F.normalize(v) for v in vectors] if self.config.unit_scales else vectors).mean(0)
        return F.normalize(combined)

    def shares_feature_maps(self, pooling: PoolingConfig) -> bool:
        """Return whether a network with these settings computes the same feature maps (ReLUP is in the backbone)."""
        return _backbone_settings(self._resolve_relup(pooling)) == _backbone_settings(self.config)

    def variant(self, pooling: PoolingConfig) -> RetrievalNetwork:
        """Return a network with other pooling settings that shares this one's weights and p.

        Raises:
            InputError: `pooling` requires different feature maps.
        """
        if not self.shares_feature_maps(pooling):
            raise InputError("variant: these settings require other feature maps (ReLUP, resizing); use load_model")
        return self.with_backbone(self.backbone, replace(self._resolve_relup(pooling), p=self.config.p))

    def with_backbone(self, backbone: Backbone, pooling: PoolingConfig) -> RetrievalNetwork:
        """Return a network with another backbone of the same kind that shares everything else with this network."""
        network = RetrievalNetwork(backbone, pooling, None, self.scales, self.antialias)
        network.whitening, network.dim, network.pooling.p = self.whitening, self.dim, self.pooling.p
        network.mean, network.std = self.mean, self.std
        network.weights_label, network.weights_format = self.weights_label, self.weights_format
        network.trained_pooling = self.trained_pooling
        network.precision, network.provenance = self.precision, self.provenance
        return network.train(self.training)

    def _resolve_relup(self, pooling: PoolingConfig) -> PoolingConfig:
        """Replace ReLUP "auto" by "on" or "off"."""
        if pooling.relup != "auto":
            return pooling
        return replace(pooling, relup="on" if has_relup(self.backbone.net) else "off")

    def _at_scale(self, x: Tensor, scale: float) -> Tensor:
        if self.config.opencv_resize:
            return self.normalize(_opencv_resize(x, scale))
        return resize(x, scale, self.antialias)

    def min_side(self) -> int:
        """Return the shorter image side, in pixels, below which `forward` first enlarges the image.

        Regional-GeM's reflect padding needs 3 cells at the smallest scale (ResNet: 92 px at three scales, 130 at five,
        65 at one), where the reference crashes; without Regional-GeM one cell is enough.
        """
        required = self.backbone.min_side(self.pooling.min_cells)
        smallest = min(self.scales)
        side = int(required / smallest)
        while int(side * smallest) < required:
            side += 1
        return side

    def _enlarge(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        min_side = self.min_side()
        if min(height, width) >= min_side:
            return images
        factor = min_side / min(height, width)
        limit = max(height, width, _MAX_ENLARGED_SIDE)
        size = [max(min_side, min(round(side * factor), limit)) for side in (height, width)]
        values = images.float() / 255 if images.dtype == torch.uint8 else images
        enlarged = _interpolate(values, size[0], size[1], antialias=False)
        return (enlarged * 255).round().to(torch.uint8) if self.config.opencv_resize else enlarged

    def identity(self) -> dict[str, Any]:
        """Return everything about the network that affects a descriptor, as plain types for a fingerprint."""
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


def forward_variants(networks: Sequence[RetrievalNetwork], images: Tensor) -> list[Tensor]:
    """Compute the descriptors of the same images by several variants of one network.

    Each feature map and each different pooling is computed once.

    Args:
        networks: networks that share weights, scales and ReLUP (see `RetrievalNetwork.variant`).
        images: (B, 3, H, W) RGB, uint8 or float in 0..1.

    Returns:
        For each network the result of its `forward`: (B, D) float32, unit norm.
    """
    descriptors: list[Tensor] = [images] * len(networks)
    side = min(images.shape[-2:])
    # A small image is enlarged only for variants with Regional-GeM, so other variants do not share its feature maps.
    for min_side in {max(side, network.min_side()) for network in networks}:
        group = [i for i, network in enumerate(networks) if max(side, network.min_side()) == min_side]
        vectors: dict[int, list[Tensor]] = {i: [] for i in group}
        for x in networks[group[0]].feature_maps(images):
            pooled: dict[Any, Tensor] = {}
            for i in group:
                network, key = networks[i], networks[i].pooling.key()
                if key not in pooled:
                    pooled[key] = network.pooling(x)
                vectors[i].append(at_least_float32(network._whiten(pooled[key])))
        for i in group:
            descriptors[i] = networks[i]._combine(vectors[i])
    return descriptors


def _backbone_settings(pooling: PoolingConfig) -> tuple[Any, ...]:
    """Return the pooling settings that affect feature maps."""
    return pooling.relup, pooling.relup_alpha if pooling.relup != "off" else None, pooling.opencv_resize


def weights_digest(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 of a state dict's names, shapes, dtypes and bytes, independent of the file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def resize(x: Tensor, scale: float, antialias: bool = False) -> Tensor:
    """Resize (B, C, H, W) bilinearly to int(H * scale) x int(W * scale), truncated as in the reference."""
    if scale == 1.0:
        return x
    return _interpolate(x, int(x.shape[-2] * scale), int(x.shape[-1] * scale), antialias)


def _interpolate(x: Tensor, height: int, width: int, antialias: bool) -> Tensor:
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=antialias)


def _opencv_resize(images: Tensor, scale: float) -> Tensor:
    """Resize uint8 images with OpenCV as CVNet does (test/dataset.py): by area below scale 1, linearly above."""
    if images.dtype != torch.uint8:
        raise InputError(f"pooling.opencv_resize=true: images are {images.dtype}, expected (B, 3, H, W) uint8")
    if scale == 1.0:
        return images
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    resized = [
        cv2.resize(im, None, fx=scale, fy=scale, interpolation=method)
        for im in images.permute(0, 2, 3, 1).cpu().numpy()
    ]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(images.device)
