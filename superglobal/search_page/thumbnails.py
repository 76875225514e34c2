"""Pictures of a data set for a browser: by number, made small in memory, and nothing else of the disk."""

from __future__ import annotations

import base64
import io
import os
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from superglobal.data.images import CorruptImageError, ImageItem, decode_image, image_size, shrink

SIDES = {"small": 240, "large": 1280}
_KEPT = 4096  # small ones, some 15 KB each
_QUALITY = 85


class Thumbnails:
    """JPEGs of the images of several lists, none larger than 1280 px; the latest small ones are kept.

    Args:
        lists: title -> images, by number.
    """

    def __init__(self, lists: Mapping[str, Sequence[ImageItem]]) -> None:
        self._lists = dict(lists)
        self._small = lru_cache(_KEPT)(lambda title, number: self._made(title, number, SIDES["small"]))
        # Photos are decoded whole, each tens of MB, so not all that are asked for at once.
        self._turns = threading.BoundedSemaphore(os.cpu_count() or 1)

    def jpeg(self, title: str, number: int, size: str) -> bytes | None:
        """The picture, or None where there is none: another list, number or size, or a file that is gone or damaged."""
        if title not in self._lists or size not in SIDES or not 0 <= number < len(self._lists[title]):
            return None
        try:
            return self._small(title, number) if size == "small" else self._made(title, number, SIDES[size])
        except (OSError, CorruptImageError):
            return None

    def _made(self, title: str, number: int, side: int) -> bytes:
        with self._turns:
            data = self._lists[title][number].path.read_bytes()
            spare = max(image_size(data)) // (2 * side)
            pixels = decode_image(data, next((step for step in (8, 4, 2) if spare >= step), 1))
            return encoded(shrink(pixels, side))


def encoded(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 as a JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def as_address(pixels: np.ndarray) -> str:
    """(H, W, 3) uint8 as a data URI, which needs no file and no request."""
    return f"data:image/jpeg;base64,{base64.b64encode(encoded(pixels)).decode()}"
