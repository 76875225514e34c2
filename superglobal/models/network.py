"""Retrieval network, which maps images to descriptors of unit norm, at one or several scales."""

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

# Scale factors by the number of scales, as in the reference (model/resnet.py:269-281), whose default is 3 scales.
SCALES: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    3: (0.7071, 1.0, 1.4142),
    5: (0.5, 0.7071, 1.0, 1.4142, 2.0),
}
# Increase this number when a code change affects the descriptors for the same weights and settings, so that stores with
# old descriptors are not reused.
DESCRIPTOR_VERSION = 1
# Maximum length, in pixels, of the longer side of an enlarged image. The longer side of a very elongated image is
# therefore enlarged by a smaller factor than the shorter side, which distorts the image.
_MAX_ENLARGED_SIDE = 4096


def make_scales(scales: int | Sequence[float]) -> tuple[float, ...]:
    """Return a tuple of scale factors.

    Args:
        scales: number of scales (1, 3 or 5, with the scale factors of the authors' code), or a list of factors.

    Raises:
        InputError: the number of scales is not 1, 3 or 5, the list is empty, or a scale is outside 0.1..4.
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
        raise InputError(f"scales={scales}: {expected}, with numbers in 0.1..4")
    return values


class RetrievalNetwork(nn.Module):
    """Network that maps images to descriptors: backbone, pooling, whitening layer and combination of scales.

    It follows the reference (model/resnet.py, lines 248-288). Use `load_model` to create a network.

    Args:
        backbone: network that maps images to feature maps; it is changed in place if ReLUP is on.
        pooling: settings of the pooling and of ReLUP.
        dim: number of outputs of the whitening layer; None for no whitening layer, so that D is the number of channels
            of the backbone.
        scales: number of scales (1, 3 or 5, with the scale factors of the authors' code), or a list of factors.
        antialias: apply a low-pass filter when an image is resized to a smaller scale; the paper uses no such filter.

    Attributes:
        dim: dimension D of the descriptors.
        scales: scale factors.
        precision: floating-point precision of the backbone during extraction, "float32" by default.
        weights_label: value of the setting `weights` from which the network was loaded, such as a path.
        weights_format: "CVNet" for weights of the reference, else None.
        trained_pooling: pooling settings stored with the weights; None if there are none.
        provenance: origin of the weights, as plain types.

    Raises:
        InputError: the backbone does not support ReLUP, or the scales are invalid.
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
        self.weights_format: str | None = None
        self.trained_pooling: dict[str, Any] | None = None
        self.provenance: dict[str, Any] = {}
        install_relup(backbone.net, pooling.relup, pooling.relup_alpha)
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1), persistent=False)

    @property
    def config(self) -> PoolingConfig:
        """Settings of the pooling and of ReLUP."""
        return self.pooling.config

    def set_p(self, p: float | None) -> None:
        """Set the exponent p of GeM in the parameter and in `config`; None copies p from the parameter to `config`."""
        if p is not None:
            self.pooling.p.data.fill_(p)
        # In float32, p = 2.7 becomes 2.70000005. Rounding to six digits restores the intended number.
        self.pooling.config = replace(self.config, p=float(f"{self.pooling.p.item():.6g}"))

    def normalize(self, images: Tensor) -> Tensor:
        """Standardize RGB images (B, 3, H, W), uint8 or float in 0..1: subtract `mean`, and divide by `std`.

        The result has the dtype of `mean`.
        """
        images = images.to(self.mean.dtype) / (255 if images.dtype == torch.uint8 else 1)
        return (images - self.mean) / self.std

    def single_scale_descriptors(self, x: Tensor) -> Tensor:
        """Compute descriptors (B, D) of standardized images (B, 3, H, W) at one scale, without L2 normalization."""
        return self._pool(self.backbone(x))

    def _pool(self, feature_map: Tensor) -> Tensor:
        """Pool and whiten feature maps (B, C, h, w), and return vectors (B, D)."""
        return self._whiten(self.pooling(feature_map))

    def _whiten(self, pooled: Tensor) -> Tensor:
        """Apply the whitening layer, if there is one, to pooled vectors (B, C), and return vectors (B, D)."""
        if self.whitening is None:
            return pooled
        return self.whitening(F.normalize(pooled) if self.config.l2_before_whitening else pooled)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the descriptors of a batch of images. Small images are enlarged first; see `min_side`.

        Args:
            images: (B, 3, H, W) RGB, uint8 or float in 0..1.

        Returns:
            (B, D) float32, unit norm.
        """
        return self.descriptors(self.feature_maps(images))

    def feature_maps(self, images: Tensor) -> Iterator[Tensor]:
        """Return an iterator that computes the feature maps (B, C, h, w) of images, one per scale.

        Args:
            images: (B, 3, H, W) RGB, uint8 or float in 0..1.
        """
        images = self._enlarge(images)
        x = images if self.config.opencv_resize else self.normalize(images)
        return (self.backbone(self._at_scale(x, scale)) for scale in self.scales)

    def descriptors(self, feature_maps: Iterable[Tensor]) -> Tensor:
        """Compute descriptors (B, D) float32, unit norm, from one feature map (B, C, h, w) per scale."""
        return self._combine([at_least_float32(self._pool(x)) for x in feature_maps])

    def _combine(self, vectors: list[Tensor]) -> Tensor:
        """Combine one batch of vectors (B, D) per scale, and return L2-normalized vectors (B, D)."""
        if self.config.scale:
            combined = scale_gem(vectors, self.config.scale_p)
        else:
            combined = torch.stack([F.normalize(v) for v in vectors] if self.config.unit_scales else vectors).mean(0)
        return F.normalize(combined)

    def shares_feature_maps(self, pooling: PoolingConfig) -> bool:
        """Return True if this network would compute the same feature maps with the settings `pooling`.

        Among these settings, only ReLUP, which is in the backbone, and the method of resizing affect feature maps.
        """
        return _backbone_settings(self._resolve_relup(pooling)) == _backbone_settings(self.config)

    def variant(self, pooling: PoolingConfig) -> RetrievalNetwork:
        """Return a network with the settings `pooling` that shares its weights, including p, with this network.

        Raises:
            InputError: the settings require different feature maps.
        """
        if not self.shares_feature_maps(pooling):
            raise InputError("variant: ReLUP and resizing cannot be changed here; call load_model instead")
        return self.with_backbone(self.backbone, replace(self._resolve_relup(pooling), p=self.config.p))

    def with_backbone(self, backbone: Backbone, pooling: PoolingConfig) -> RetrievalNetwork:
        """Return a network with the given backbone and pooling settings, which shares all else with this network.

        Args:
            backbone: backbone of the same architecture.
            pooling: settings of the pooling and of ReLUP.
        """
        network = RetrievalNetwork(backbone, pooling, None, self.scales, self.antialias)
        network.whitening, network.dim, network.pooling.p = self.whitening, self.dim, self.pooling.p
        network.mean, network.std = self.mean, self.std
        network.weights_label, network.weights_format = self.weights_label, self.weights_format
        network.trained_pooling = self.trained_pooling
        network.precision, network.provenance = self.precision, self.provenance
        return network.train(self.training)

    def _resolve_relup(self, pooling: PoolingConfig) -> PoolingConfig:
        """Return the settings with the ReLUP mode "auto" resolved: "on" if the backbone supports ReLUP, else "off"."""
        if pooling.relup != "auto":
            return pooling
        return replace(pooling, relup="on" if has_relup(self.backbone.net) else "off")

    def _at_scale(self, x: Tensor, scale: float) -> Tensor:
        """Resize a batch (B, 3, H, W) by a scale factor, and return standardized images.

        If `opencv_resize` is on, `x` contains uint8 images, which are standardized after resizing. Otherwise, `x`
        contains images that are already standardized.
        """
        if self.config.opencv_resize:
            return self.normalize(_opencv_resize(x, scale))
        return resize(x, scale, self.antialias)

    def min_side(self) -> int:
        """Return the smallest supported image side in pixels. `forward` enlarges images with a shorter side.

        The reflect padding of Regional-GeM needs a feature map of 3 x 3 cells at the smallest scale. For a ResNet, this
        requires sides of 65 px at one scale, 92 px at three scales and 130 px at five scales. The reference fails for
        smaller images. Without Regional-GeM, a feature map of one cell is enough.
        """
        required = self.backbone.min_side(self.pooling.min_cells)
        smallest = min(self.scales)
        side = int(required / smallest)
        while int(side * smallest) < required:
            side += 1
        return side

    def _enlarge(self, images: Tensor) -> Tensor:
        """If images (B, 3, H, W) have a side shorter than `min_side`, enlarge them; otherwise return them unchanged."""
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
        """Return a dict of JSON types with all properties of the network that affect its descriptors."""
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
    """Compute the descriptors of the same images with several networks that differ only in their pooling settings.

    Feature maps and pooled vectors that are equal for several networks are computed only once.

    Args:
        networks: networks that share weights, scales and ReLUP (see `RetrievalNetwork.variant`).
        images: (B, 3, H, W) RGB, uint8 or float in 0..1.

    Returns:
        The result of `forward` for each network: (B, D) float32, unit norm.
    """
    descriptors: list[Tensor] = [images] * len(networks)
    side = min(images.shape[-2:])
    # Variants share feature maps only if they enlarge small images to the same size, which depends on Regional-GeM.
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
    """Return a tuple of the pooling settings that affect feature maps."""
    return pooling.relup, pooling.relup_alpha if pooling.relup != "off" else None, pooling.opencv_resize


def weights_digest(state: dict[str, Tensor]) -> str:
    """Return the SHA-256 digest, in hexadecimal, of the names, shapes, dtypes and values of a state dict.

    The digest does not depend on the format of the weights file.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def resize(x: Tensor, scale: float, antialias: bool = False) -> Tensor:
    """Resize a batch (B, C, H, W) bilinearly by a scale factor.

    As in the reference, the new sides are truncated: int(H * scale) and int(W * scale).
    """
    if scale == 1.0:
        return x
    return _interpolate(x, int(x.shape[-2] * scale), int(x.shape[-1] * scale), antialias)


def _interpolate(x: Tensor, height: int, width: int, antialias: bool) -> Tensor:
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=antialias)


def _opencv_resize(images: Tensor, scale: float) -> Tensor:
    """Resize images (B, 3, H, W) uint8 with OpenCV, as in CVNet (test/dataset.py).

    Scales below 1 use area interpolation, scales above 1 bilinear interpolation.
    """
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
