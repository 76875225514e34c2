"""Store feature maps on disk, so that each pooling setting can be tried without running the network again."""

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

from superglobal.data.datamodules import ImageDataset, ImageLoader, is_permanent
from superglobal.errors import InputError
from superglobal.evaluation.module import ExtractionList, UnreadableImagesError
from superglobal.models.network import DESCRIPTOR_VERSION, RetrievalNetwork, weights_digest
from superglobal.tuning.search_space import Settings, configure
from superglobal.utils.io import write_atomically
from superglobal.utils.norms import network_norms
from superglobal.utils.precision import full_precision

log = logging.getLogger(__name__)
_PROGRESS_SECONDS = 20.0


class MapStore:
    """Store of feature maps (C, H, W) float32 of one backbone, with one safetensors file per image.

    The name of the store's folder is a fingerprint of everything that affects the maps of all images: weights, ReLUP
    and resizing. The name of a file is a fingerprint of the image's name, box and content. A file contains the maps of
    all scales of the image. Files are written atomically. If a file lacks the map of a scale, all maps of the image are
    computed again.

    Args:
        folder: parent folder of all map stores.
        network: network on the CPU. The methods of the store change its pooling settings and scales.
        max_side: longer side in pixels to which larger images are shrunk; None for no limit.
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
        """Return the path of the file that contains the maps of an image.

        Args:
            line: text that identifies the image, from the list that `ExtractionList.lines` returns.
        """
        return self.folder / f"{_digest(line)}.safetensors"

    def missing(self, images: ExtractionList, grid: Sequence[Settings]) -> list[int]:
        """Return the indices of the images for which at least one required map is not stored.

        Args:
            images: list of images.
            grid: settings to try. All maps that at least one of these settings uses are required.
        """
        rows = []
        for row, line in enumerate(images.lines()):
            stored = _stored(self.path(line))
            if stored is None or not self._grid_keys(grid, stored[0]) <= stored[1]:
                rows.append(row)
        return rows

    def size(self, images: ExtractionList, rows: Sequence[int], grid: Sequence[Settings]) -> int:
        """Estimate the size in bytes of the maps of some images, from the sizes of the images.

        Args:
            images: list of images.
            rows: indices of the images to count.
            grid: settings to try. All maps that at least one of these settings uses are counted.
        """
        cells, sizes = 0, images.sizes()
        for row in rows:
            height, width = sizes[row]
            for key in self._grid_keys(grid, (height, width)):
                scale, _, min_side = key.partition(" from ")
                factor = (
                    float(scale)
                    * (int(min_side) / min(height, width) if min_side else 1.0)
                    / self.network.backbone.stride
                )
                cells += math.ceil(height * factor) * math.ceil(width * factor)
        return 4 * cells * self.network.backbone.channels

    def fill(
        self, images: ExtractionList, rows: Sequence[int], grid: Sequence[Settings], device: str, workers: int
    ) -> None:
        """Compute and write the maps of some images for all settings in a grid.

        Args:
            images: list of images.
            rows: indices of the images whose maps are computed.
            grid: settings to try. All maps that at least one of these settings uses are computed.
            device: device to compute on.
            workers: number of processes that decode images.

        Raises:
            InputError: an image is corrupt, or a file cannot be written. Finished files are kept. The error is an
                `UnreadableImagesError`, at the end, if all corrupt images can be left out.
        """
        write_atomically(self.folder / "maps.json", json.dumps(self.identity, indent=1).encode())
        lines = images.lines()
        dataset = ImageDataset([images.files()], [(0, row) for row in rows])
        loader = ImageLoader(dataset, batch_size=None, num_workers=workers)
        self.network.to(device)
        reported = time.monotonic()
        unreadable: dict[tuple[Path, str], InputError] = {}
        for count, ((_, row), image) in enumerate(loader, 1):
            if isinstance(image, InputError):
                _, image = dataset[count - 1]  # A worker process returns an error without its cause.
            if isinstance(image, InputError):
                if not (images.leaves_out and is_permanent(image)):
                    raise image
                unreadable[images.items[row].path, images.checked.signatures[row]] = image
                continue
            maps = self._compute(image.to(device), grid)
            metadata = {"height": str(image.shape[-2]), "width": str(image.shape[-1])}
            write_atomically(self.path(lines[row]), save(maps, metadata))
            if time.monotonic() - reported > _PROGRESS_SECONDS:
                reported = time.monotonic()
                log.info("Computed feature maps of %d/%d %s images", count, len(rows), images.title)
        self.network.cpu()
        if unreadable:
            raise UnreadableImagesError("\n".join(map(str, unreadable.values())), list(unreadable))

    def _compute(self, image: Tensor, grid: Sequence[Settings]) -> dict[str, Tensor]:
        """Compute the feature maps of one image for all settings in a grid.

        Args:
            image: (3, H, W) image on the device of the network.
            grid: settings to try.

        Returns:
            Feature maps (C, H, W) float32 on the CPU, by name (see `_keys`).
        """
        maps: dict[str, Tensor] = {}
        # Settings with the most scales come first, because their maps usually include the maps for fewer scales. The
        # network then does not need to run again for fewer scales.
        for settings in sorted(grid, key=lambda settings: -settings.scales):
            keys = self._keys(settings, (image.shape[-2], image.shape[-1]))
            if not maps.keys() >= set(keys):
                with torch.inference_mode(), full_precision():
                    computed = [x[0].float().cpu().contiguous() for x in self.network.feature_maps(image[None])]
                maps |= dict(zip(keys, computed, strict=True))
        return maps

    def descriptors(self, settings: Settings, images: ExtractionList, pooling: RetrievalNetwork) -> np.ndarray:
        """Compute descriptors from the stored maps.

        Args:
            settings: pooling settings.
            images: images whose maps are stored.
            pooling: network whose pooling and whitening layers are applied; `settings` are applied to it first.

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
                    metadata = file.metadata()
                    keys = self._keys(settings, (int(metadata["height"]), int(metadata["width"])))
                    maps = [file.get_tensor(key)[None] for key in keys]
            except (SafetensorError, OSError, KeyError) as error:
                raise InputError(
                    f"{path}: missing or damaged ({error}); delete it and run the command again"
                ) from error
            with torch.inference_mode(), full_precision():
                rows.append(pooling.descriptors(maps)[0].cpu().numpy())
        X = np.stack(rows)
        network_norms(X, lambda i: str(images.items[i].path))
        return X

    def _keys(self, settings: Settings, size: tuple[int, int]) -> list[str]:
        """Return the names under which the feature maps of an image are stored in its file, one name per scale.

        The network enlarges an image whose shorter side is below a minimum, and this minimum depends on the settings.
        The names of the maps of such an image therefore contain the minimum, as in "1 from 90". The map of a larger
        image depends only on the scale, so its name is the scale, as in "1".

        Args:
            settings: settings of the scales and the pooling.
            size: (height, width) of the image in pixels.
        """
        configure(self.network, settings)
        min_side = self.network.min_side()
        suffix = "" if min(size) >= min_side else f" from {min_side}"
        return [f"{scale:g}{suffix}" for scale in self.network.scales]

    def _grid_keys(self, grid: Sequence[Settings], size: tuple[int, int]) -> set[str]:
        """Return the names (see `_keys`) of all maps that at least one of the settings in a grid uses.

        Args:
            grid: settings to try.
            size: (height, width) of the image in pixels.
        """
        return {key for settings in grid for key in self._keys(settings, size)}


def _stored(path: Path) -> tuple[tuple[int, int], set[str]] | None:
    """Read the size of an image and the names of its feature maps from the file that contains the maps.

    Args:
        path: file of the image in a `MapStore`.

    Returns:
        (height, width) of the image in pixels, and the names of the maps; None if the file is missing or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            return (int(metadata["height"]), int(metadata["width"])), set(file.keys())
    except (SafetensorError, OSError, KeyError, TypeError):
        return None


def require_space(folder: Path, needed: int) -> None:
    """Raise InputError unless `needed` bytes are free on the disk of `folder`, which need not exist yet."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"{folder}: not enough disk space, the feature maps need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are "
            "free; lower max_images, shorten space.relup_alphas or space.scales, or set paths.outputs to another disk"
        )


def _digest(text: str) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 checksum of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
