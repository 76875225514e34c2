"""From a photo's file to what the network is trained on: decoded no larger than needed, cropped, flipped, jittered."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from superglobal.data.images import decode_image, image_size


class Augment:
    """Random crop of any place, size and shape, resized to a square; mirror image; brightness, contrast, saturation.

    The draws are those of torchvision's `RandomResizedCrop`, `RandomHorizontalFlip` and `ColorJitter`, in that order,
    from torch's generator: without reduced decoding the result is theirs, bit for bit.

    Args:
        crop: smallest share of the photo's area that a crop covers.
        flip: mirror every other photo.
        jitter: strength of the changes of brightness, contrast and saturation.
        ratio: narrowest and widest crop, width over height.
        reduced: decode a JPEG at 1/2, 1/4 or 1/8 of its size where the crop still has as many pixels as asked for.
    """

    def __init__(
        self,
        crop: float,
        flip: bool,
        jitter: float,
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        reduced: bool = True,
    ) -> None:
        self.crop, self.ratio, self.reduced = crop, ratio, reduced
        changes = [v2.RandomHorizontalFlip()] if flip else []
        self.after = v2.Compose([*changes, v2.ColorJitter(jitter, jitter, jitter)])

    def __call__(self, data: bytes, side: int) -> Tensor:
        """(3, side, side) uint8 from an image file's bytes.

        Raises:
            FaultyImageError: they are not a whole image.
        """
        width, height = image_size(data)
        top, left, rows, columns = self.box(width, height)
        pixels = decode_image(data, self.reduction(rows, columns, side))
        # As it was decoded: a photo that is no JPEG comes in full size.
        down, across = pixels.shape[0] / height, pixels.shape[1] / width
        top, bottom = round(top * down), round((top + rows) * down)
        left, right = round(left * across), round((left + columns) * across)
        # A view with the channels last, which torch resizes three times as fast as a copy with them first.
        image = torch.from_numpy(np.array(pixels[top:bottom, left:right], order="C")).permute(2, 0, 1)
        return self.after(F.resize(image, [side, side], antialias=True)).contiguous()

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(top, left, rows, columns) of a random crop, in pixels of the whole photo."""
        draw = v2.RandomResizedCrop(1, scale=(self.crop, 1.0), ratio=self.ratio)
        box = draw.make_params([torch.empty((3, height, width), device="meta")])
        return box["top"], box["left"], box["height"], box["width"]

    def reduction(self, rows: int, columns: int, side: int) -> int:
        """The largest of 8, 4, 2, 1 that leaves a crop of (rows, columns) pixels at least `side` a side."""
        if not self.reduced:
            return 1
        return next((r for r in (8, 4, 2) if min(rows, columns) >= r * (side + 1)), 1)
