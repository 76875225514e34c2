"""What Lightning reads images through."""

from __future__ import annotations

from collections.abc import Sequence

import pytorch_lightning as pl
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from superglobal.data.images import ImageItem, image_tensor, read_image
from superglobal.errors import InputError

Task = tuple[int, int]
"""Number of an image list and row in it."""


class Images(Dataset):
    """Chosen rows of several image lists, each as (task, (3, H, W) uint8), at its own size.

    An unreadable image comes as (task, InputError): raised inside a worker it would arrive wrapped in the worker's
    traceback.

    Args:
        lists: images and their `max_side` each.
        tasks: which rows of which list.
    """

    def __init__(self, lists: Sequence[tuple[Sequence[ImageItem], int | None]], tasks: Sequence[Task]) -> None:
        self.lists = lists
        self.tasks = tasks

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, position: int) -> tuple[Task, Tensor | InputError]:
        number, row = self.tasks[position]
        items, max_side = self.lists[number]
        try:
            return (number, row), image_tensor(read_image(items[row].path, items[row].box, max_side))
        except InputError as error:
            return (number, row), error


class ExtractionDataModule(pl.LightningDataModule):
    """Images one by one, every rank its own share, decoded ahead of the network by `num_workers` processes."""

    def __init__(
        self,
        lists: Sequence[tuple[Sequence[ImageItem], int | None]],
        tasks: Sequence[Task],
        num_workers: int,
    ) -> None:
        super().__init__()
        self.lists = lists
        self.tasks = tasks
        self.num_workers = num_workers

    def predict_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        # By row, not by place in the list: ranks may find different rows missing when another run fills the store.
        share = [task for task in self.tasks if task[1] % self.trainer.world_size == self.trainer.global_rank]
        # Lightning stops on a rank without data; a row described twice is the same row.
        share = share or list(self.tasks[:1])
        return DataLoader(Images(self.lists, share), num_workers=self.num_workers, collate_fn=_only)


def _only(batch: list[tuple[Task, Tensor | InputError]]) -> tuple[Task, Tensor | InputError]:
    return batch[0]
