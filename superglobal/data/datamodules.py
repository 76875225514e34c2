"""What Lightning reads images through."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from superglobal.data.gldv2 import TrainList
from superglobal.data.images import ImageItem, image_tensor, read_image
from superglobal.data.samplers import EpochSampler
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


class TrainingPhotos(Dataset):
    """Photos as ((3, S, S) uint8, label), augmented; every random draw depends on (seed, epoch, index) alone.

    An unreadable photo comes as the InputError that names it: raised inside a worker it would arrive wrapped in the
    worker's traceback.

    Args:
        photos: the training list.
        augment: (3, H, W) uint8 -> (3, S, S) uint8, drawing from torch's generator.
        seed: of the augmentation.
    """

    def __init__(self, photos: TrainList, augment: Callable[[Tensor], Tensor], seed: int) -> None:
        self.photos = photos
        self.augment = augment
        self.seed = seed

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int] | InputError:
        epoch, index = place
        try:
            image = image_tensor(read_image(self.photos.path(index)))
        except InputError as error:
            return error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0]))
            return self.augment(image), int(self.photos.labels[index])


class TrainingDataModule(pl.LightningDataModule):
    """Shuffled, augmented training photos in batches of ((B, 3, S, S) uint8, (B,) int64).

    Args:
        photos: the training list.
        image_size: S, the side of the square that the network sees, in pixels.
        crop: smallest share of a photo's area that a random crop covers.
        jitter: strength of the changes of brightness, contrast and saturation.
        batch_size: photos a step; the rest of an epoch that fills no batch waits for the next order.
        num_workers: processes that decode ahead.
        seed: of order and augmentation.
    """

    def __init__(
        self,
        photos: TrainList,
        image_size: int,
        crop: float,
        jitter: float,
        batch_size: int,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        steps: list[Callable[[Tensor], Tensor]] = [
            v2.RandomResizedCrop(image_size, scale=(crop, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(jitter, jitter, jitter),
        ]
        self.photos = TrainingPhotos(photos, v2.Compose(steps), seed)
        self.sampler = EpochSampler(len(photos), seed)
        self.batch_size = batch_size
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.photos,
            batch_size=self.batch_size,
            sampler=self.sampler,
            num_workers=self.num_workers,
            drop_last=True,
            collate_fn=_batch,
            persistent_workers=self.num_workers > 0,
        )


def _batch(photos: list[tuple[Tensor, int] | InputError]) -> list[Tensor] | InputError:
    """A batch, or what makes it impossible."""
    return next((photo for photo in photos if isinstance(photo, InputError)), None) or default_collate(photos)
