"""Feature maps on disk: what is expensive, computed once, so that other pooling costs no network."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from superglobal.data.datamodules import ImageDataset, ImageLoader
from superglobal.errors import InputError
from superglobal.evaluation.module import ExtractionList
from superglobal.models.network import DESCRIPTOR_VERSION, RetrievalNetwork, weights_digest
from superglobal.tuning.search_space import Settings, configure
from superglobal.utils.io import write_atomically
from superglobal.utils.precision import full_precision

log = logging.getLogger(__name__)
_SECONDS_BETWEEN_NEWS = 20.0


class MapStore:
    """Feature maps (C, h, w) float32 of images by one backbone, one safetensors file an image.

    The folder's name is the fingerprint of everything that changes a map (weights, ReLUP, resizing), a file's that of
    the image's name, box and content, so that maps are never used for others, whatever is tuned on. In a file are the
    maps of all scales. A file is whole or not there; one that lacks a scale is made again.

    Args:
        folder: of all map stores.
        network: on the CPU; its pooling may be changed by `configure`.
        max_side: larger images are shrunk to this longer side, in pixels.
    """

    def __init__(self, folder: Path, network: RetrievalNetwork, max_side: int | None) -> None:
        self.network = network
        self.max_side = max_side
        c = network.config
        self.identity: dict[str, Any] = {
            "descriptor_version": DESCRIPTOR_VERSION,
            "backbone": network.backbone.name,
            "weights": weights_digest(network.backbone.state_dict()),
            "mean": list(network.backbone.mean),
            "std": list(network.backbone.std),
            "relup": [c.relup, c.relup_alpha if c.relup != "off" else 0.0],
            "antialias": network.antialias,
            "opencv_resize": c.opencv_resize,
            "max_side": max_side,
        }
        self.folder = folder / _digest(json.dumps(self.identity, sort_keys=True))

    def path(self, line: str) -> Path:
        """The file of the image that `ExtractionList.lines` calls so."""
        return self.folder / f"{_digest(line)}.safetensors"

    def missing(self, images: ExtractionList, grid: Sequence[Settings]) -> list[int]:
        """Rows of the images whose maps for any settings of the grid are not there."""
        rows = []
        for row, line in enumerate(images.lines()):
            found = self._stored(self.path(line))
            if found is None or not self._keys(grid, found[0]) <= found[1]:
                rows.append(row)
        return rows

    def size(self, images: ExtractionList, rows: Sequence[int], grid: Sequence[Settings]) -> int:
        """Bytes that the maps of these images take, about: from the sizes in their headers."""
        cells, sizes = 0, images.sizes()
        for row in rows:
            height, width = sizes[row]
            for key in self._keys(grid, (height, width)):
                scale, _, need = key.partition(" from ")
                factor = float(scale) * (int(need) / min(height, width) if need else 1.0) / self.network.backbone.stride
                cells += math.ceil(height * factor) * math.ceil(width * factor)
        return 4 * cells * self.network.backbone.channels

    def fill(
        self, images: ExtractionList, rows: Sequence[int], grid: Sequence[Settings], device: str, workers: int
    ) -> None:
        """Compute and write the maps of these images for every settings of the grid.

        Raises:
            InputError: an unreadable image or a place that cannot be written; finished images stay.
        """
        write_atomically(self.folder / "maps.json", json.dumps(self.identity, indent=1).encode())
        lines = images.lines()
        loader = ImageLoader(
            ImageDataset([(images.items, self.max_side)], [(0, row) for row in rows]),
            batch_size=None,
            num_workers=workers,
        )
        self.network.to(device)
        news = time.monotonic()
        for count, ((_, row), image) in enumerate(loader, 1):
            if isinstance(image, InputError):
                raise image
            maps = self._compute(image.to(device), grid)
            about = {"height": str(image.shape[-2]), "width": str(image.shape[-1])}
            write_atomically(self.path(lines[row]), save(maps, about))
            if time.monotonic() - news > _SECONDS_BETWEEN_NEWS:
                news = time.monotonic()
                log.info("%s: feature maps of %d of %d images", images.title, count, len(rows))
        self.network.cpu()

    def _compute(self, image: Tensor, grid: Sequence[Settings]) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = {}
        # The longest lists of scales first: they mostly hold the others'.
        for settings in sorted(grid, key=lambda one: -one.scales):
            keys = self._keys_of(settings, (image.shape[-2], image.shape[-1]))
            if not maps.keys() >= set(keys):
                with torch.inference_mode(), full_precision():
                    found = [x[0].float().cpu().contiguous() for x in self.network.feature_maps(image[None])]
                maps |= dict(zip(keys, found, strict=True))
        return maps

    def descriptors(self, settings: Settings, images: ExtractionList, pooling: RetrievalNetwork) -> np.ndarray:
        """What the network gives with these settings, from the stored maps.

        Args:
            pooling: pools and whitens, on the device where it is; it is configured by the settings.

        Returns:
            (N, D) float32, unit norm.

        Raises:
            InputError: a file is missing or damaged.
        """
        rows = []
        configure(pooling, settings)
        device = str(pooling.mean.device)
        for line in images.lines():
            path = self.path(line)
            try:
                with safe_open(path, "pt", device=device) as file:
                    about = file.metadata()
                    keys = self._keys_of(settings, (int(about["height"]), int(about["width"])))
                    maps = [file.get_tensor(key)[None] for key in keys]
            except (SafetensorError, OSError, KeyError) as error:
                raise InputError(f"{path}: missing or damaged ({error}); delete it and run again") from error
            with torch.inference_mode(), full_precision():
                rows.append(pooling.descriptors(maps)[0].cpu().numpy())
        return np.stack(rows)

    def _keys_of(self, settings: Settings, size: tuple[int, int]) -> list[str]:
        """Names of an image's maps in its file, by scale.

        The settings change a map of given scale only where the image is so small that the network enlarges it.
        """
        configure(self.network, settings)
        need = self.network.min_side()
        origin = "" if min(size) >= need else f" from {need}"
        return [f"{scale:g}{origin}" for scale in self.network.scales]

    def _keys(self, grid: Sequence[Settings], size: tuple[int, int]) -> set[str]:
        return {key for settings in grid for key in self._keys_of(settings, size)}

    @staticmethod
    def _stored(path: Path) -> tuple[tuple[int, int], set[str]] | None:
        """(height, width) of the image and the names of its maps, None where there is no sound file."""
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata()
                return (int(about["height"]), int(about["width"])), set(file.keys())
        except (SafetensorError, OSError, KeyError, TypeError):
            return None


def require_room(folder: Path, needed: int) -> None:
    """
    Raises:
        InputError: fewer than `needed` bytes are free where `folder` lies or will lie.
    """
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"{folder}: the feature maps need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there; lower "
            "max_images, shorten space.relup_alphas or space.scales, or set paths.outputs to a place with room"
        )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
