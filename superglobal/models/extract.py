"""Extraction of descriptors from images in memory or on disk, by a plain function call."""

from __future__ import annotations

import os
from collections.abc import Iterable
from operator import length_hint
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from superglobal.data.images import ImageItem, image_tensor, pil_pixels, read_image, shrink
from superglobal.errors import InputError
from superglobal.models.inference import fold_network
from superglobal.models.network import RetrievalNetwork
from superglobal.utils.norms import network_norms
from superglobal.utils.precision import full_precision
from superglobal.utils.progress import Progress

_FOLDED_FROM = 8  # number of images for which folding batch norms takes less time than it saves
ImageLike = str | os.PathLike | ImageItem | Image.Image | np.ndarray | Tensor


def extract(
    model: RetrievalNetwork,
    images: Iterable[ImageLike] | ImageLike,
    *,
    max_side: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Extract the descriptors of images, one at a time, each at its own size.

    On the CPU, batch norms are folded into convolutions for lists of 8 or more images, which is faster and changes the
    descriptors by rounding. `eval.py` extracts images of equal size in batches; its descriptors differ from these by up
    to about 1e-6.

    Args:
        model: network from `load_model`, in evaluation mode.
        images: list of images, or a single image: paths, `ImageItem` objects (a path and a box), PIL images with 8 bits
            per channel, uint8 arrays (H, W, 3) RGB or (H, W) grayscale, or tensors (3, H, W), uint8 or float in 0..1.
            Sizes and types may be mixed.
        max_side: maximum length of the longer side in pixels; None for no limit. Larger images are shrunk to it by
            antialiased bicubic interpolation, but larger float tensors raise an error.
        device: device to compute on; the model is moved there. None for the current device of the model.
        progress: whether to print the number of finished images to stderr.

    Returns:
        Array (N, D) float32, unit L2 norm, in the order of the images.

    Raises:
        InputError: an image cannot be read or has an unsupported shape or type (the message names the image), a
            descriptor is not finite, or the model is in training mode.
    """
    single = isinstance(images, str | os.PathLike | ImageItem | Image.Image) or getattr(images, "ndim", 4) < 4
    image_list: Iterable[Any] = [images] if single else images  # type: ignore[assignment]
    if model.training:
        raise InputError("extract: the model is in training mode, expected evaluation mode; call model.eval() first")
    if device is not None:
        model.to(device)
    total, report = length_hint(image_list), Progress("extracted") if progress else None
    network = model
    if total >= _FOLDED_FROM and (model.mean.device.type, model.mean.dtype) == ("cpu", torch.float32):
        network = fold_network(model)
    rows = []
    with torch.inference_mode(), full_precision():
        for i, image in enumerate(image_list):
            rows.append(network(_as_tensor(image, i, max_side)[None].to(model.mean.device))[0].cpu().numpy())
            network_norms(rows[-1][None], f"image {i}".format)
            if report is not None:
                report(i + 1, max(total, i + 1))
    return np.stack(rows) if rows else np.zeros((0, model.dim), np.float32)


def _as_tensor(image: ImageLike, position: int, max_side: int | None) -> Tensor:
    """Convert an image to a tensor (3, H, W), uint8 or float in 0..1.

    Args:
        image: image of any supported type.
        position: index of the image in the list, for error messages.
        max_side: maximum length of the longer side in pixels; None for no limit. Larger images are shrunk, but larger
            float tensors raise an error.
    """
    if isinstance(image, str | os.PathLike):
        image = ImageItem(Path(image))
    if isinstance(image, ImageItem):
        return image_tensor(read_image(image.path, image.box, max_side))
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3 or min(image.shape) < 1:
            raise InputError(f"image {position}: tensor of shape {tuple(image.shape)}, expected (3, H, W)")
        if image.dtype == torch.uint8:
            return image_tensor(shrink(image.permute(1, 2, 0).cpu().numpy(), max_side))
        if not image.is_floating_point() or not bool(((image >= 0) & (image <= 1)).all()):
            raise InputError(f"image {position}: expected a uint8 tensor or a float tensor in 0..1, not standardized")
        if max_side is not None and max(image.shape) > max_side:
            raise InputError(f"image {position}: max_side requires uint8 images; resize float tensors yourself")
        return image
    array = pil_pixels(image) if isinstance(image, Image.Image) else np.asarray(image)
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or min(array.shape) < 1:
        raise InputError(
            f"image {position}: array of shape {array.shape} and dtype {array.dtype}, expected (H, W, 3) uint8 RGB"
        )
    return image_tensor(shrink(array, max_side))
