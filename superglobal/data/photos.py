"""Training photos, with a stand-in for each one that cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from superglobal.data.gldv2 import TrainList
from superglobal.data.images import FaultyImageError
from superglobal.errors import InputError

_STAND_INS = 10

Bad = list[tuple[int, str]]
"""Photos that cannot be read: index and reason each."""


class Photo(NamedTuple):
    """A photo as the network sees it.

    Attributes:
        image: (3, S, S) uint8.
        label: its class.
        index: which photo it is, a stand-in perhaps.
        bad: photos that it stands in for.
    """

    image: Tensor
    label: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks a photo for
    bad: Bad


class Batch(NamedTuple):
    """Photos of a step: images (B, 3, S, S) uint8, labels (B,) int64, indices (B,) int64, and `Photo.bad` of all."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    bad: Bad


class TrainingPhotos(Dataset):
    """Photos by (epoch, index), augmented; every random draw depends on (seed, epoch, index) alone.

    In the place of a photo that cannot be read comes one drawn among all, so that a step has its full batch and a run
    of weeks outlives a damaged file. Where ten in a row cannot be read an InputError comes: raised inside a worker it
    would arrive wrapped in the worker's traceback.

    Args:
        photos: the training list.
        augment: (a photo's file, S) -> (3, S, S) uint8, drawing from torch's generator.
        side: epoch -> S, in pixels.
        seed: of augmentation and stand-ins.
    """

    def __init__(
        self, photos: TrainList, augment: Callable[[bytes, int], Tensor], side: Callable[[int], int], seed: int
    ) -> None:
        self.photos = photos
        self.augment = augment
        self.side = side
        self.seed = seed

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, place: tuple[int, int]) -> Photo | InputError:
        epoch, asked = place
        bad: Bad = []
        index = asked
        for attempt in range(1 + _STAND_INS):
            if attempt:
                index = int(np.random.default_rng([self.seed, epoch, asked, attempt]).integers(len(self)))
            try:
                image = self._augmented(epoch, asked, self.photos.read(index))
            except FaultyImageError as error:
                bad.append((index, str(error)))
            else:
                return Photo(image, int(self.photos.labels[index]), index, bad)
        first = f"{self.photos.place(asked)}: {bad[0][1]}"
        return InputError(
            f"image cannot be read: {first}; nor could {_STAND_INS} others in its stead: most photos are missing or "
            "damaged, scripts/prepare_gldv2.py lists them"
        )

    def _augmented(self, epoch: int, asked: int, data: bytes) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([self.seed, epoch, asked]).generate_state(1)[0]))
            return self.augment(data, self.side(epoch))


def collate(photos: list[Photo | InputError]) -> Batch | InputError:
    """A batch, or what makes it impossible."""
    sound: list[Photo] = []
    for photo in photos:
        if isinstance(photo, InputError):
            return photo
        sound.append(photo)
    images, labels, indices, bad = zip(*sound, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(indices), [one for few in bad for one in few])
