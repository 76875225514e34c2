"""What Lightning reads images through."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from superglobal.data.images import ImageItem, read_image
from superglobal.errors import InputError


class ImageRows(Dataset):
    """Chosen rows of an image list, each as (row, (3, H, W) uint8), at its own size.

    An unreadable image comes as (row, InputError): raised inside a worker it would arrive wrapped in the worker's
    traceback.
    """

    def __init__(self, items: Sequence[ImageItem], rows: np.ndarray, max_side: int | None) -> None:
        self.items = items
        self.rows = rows
        self.max_side = max_side

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[int, Tensor | InputError]:
        row = int(self.rows[position])
        item = self.items[row]
        try:
            return row, image_tensor(read_image(item.path, item.box, self.max_side))
        except InputError as error:
            return row, error


def image_tensor(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) uint8 tensor."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def extraction_loader(
    items: Sequence[ImageItem], rows: np.ndarray, max_side: int | None, num_workers: int
) -> DataLoader:
    """Images one by one, decoded ahead of the network by `num_workers` processes."""
    return DataLoader(ImageRows(items, rows, max_side), batch_size=1, num_workers=num_workers, collate_fn=_only)


def _only(batch: list[tuple[int, Tensor | InputError]]) -> tuple[int, Tensor | InputError]:
    return batch[0]
