"""Plan batches of images: random batches for training, and batches of images of equal size for extraction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from superglobal.errors import InputError

# Images are sorted by size. At most this many consecutive images are assigned to the same shard or process.
_BLOCK = 32
Size = tuple[int, int]
"""Size of an image: (height, width) in pixels."""


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Training batches of one process, each a list of (epoch, image index) pairs.

    Each epoch is a random permutation of all images, which depends only on the seed and the epoch. It is divided into
    optimizer steps of `batch_size` images; an incomplete last step is dropped. A step is divided into `accumulate`
    contiguous parts of equal size, and each part into one batch per process. The images of a step therefore do not
    depend on the number of processes.

    Args:
        length: number of images.
        batch_size: number of images per optimizer step, summed over all processes and parts.
        seed: seed of the permutations.
        accumulate: number of batches per step that a process computes one after the other (gradient accumulation).
        rank: rank of this process.
        world: number of processes.

    Raises:
        InputError: `batch_size` is not divisible by `world * accumulate`, or is larger than `length`.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, accumulate: int = 1, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size % (world * accumulate):
            raise InputError(
                f"optim.batch_size={batch_size} is not divisible by the number of processes ({world}) times "
                f"trainer.accumulate={accumulate}; choose a multiple of {world * accumulate}"
            )
        if length < batch_size:
            raise InputError(f"optim.batch_size={batch_size}: expected at most the {length} training images; lower it")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.accumulate = accumulate
        self.rank = rank
        self.world = world
        self.steps = length // batch_size
        self.sampler = self  # Lightning calls `sampler.set_epoch` before each epoch.
        self.start_at(0)

    def start_at(self, step: int) -> None:
        """Continue at a given step: set the epoch of the step, and skip the earlier steps of this epoch.

        Args:
            step: number of optimizer steps that are complete, counted over all epochs.
        """
        self._start = divmod(step, self.steps)
        self.epoch = self._start[0]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose batches the next iteration yields."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of batches of this process in a whole epoch."""
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
        count = self.batch_size // (self.world * self.accumulate)
        for step in range(self._start[1] if epoch == self._start[0] else 0, self.steps):
            for part in range(self.accumulate):
                start = step * self.batch_size + (part * self.world + self.rank) * count
                yield [(epoch, int(index)) for index in order[start : start + count]]


class ImageBatch(NamedTuple):
    """Images of equal size that pass through the network together, without padding.

    Attributes:
        number: index of the image list that contains the images.
        rows: indices of the images in the list.
        size: (height, width) of each image in pixels.
    """

    number: int
    rows: tuple[int, ...]
    size: Size


def plan_batches(
    lists: Sequence[Sequence[Size]],
    max_pixels: int,
    max_images: int,
    shard: tuple[int, int] = (0, 1),
    rank: tuple[int, int] = (0, 1),
) -> list[ImageBatch]:
    """Group the images of several lists by size into batches, and return the batches of one process.

    Batches of large images come first, so that a lack of memory is noticed early. The batches depend only on the
    arguments, and not on which descriptors are stored already. A resumed run therefore has the same batches, and
    computes bit-identical descriptors. Which images belong to a shard does not depend on the batch size or the number
    of processes. Shards that run on machines with different memory or devices therefore cover each image exactly once.

    Args:
        lists: for each list, the (height, width) of each image in pixels.
        max_pixels: maximum number of pixels in a batch; a batch of a single image may exceed it.
        max_images: maximum number of images in a batch.
        shard: (k, n) for shard k of n shards; k counts from 0.
        rank: (k, n) for process k of the n processes of this shard; k counts from 0.
    """
    batches: list[ImageBatch] = []
    for number, sizes in enumerate(lists):
        rows = sorted(range(len(sizes)), key=lambda row: (-_area(sizes[row]), sizes[row], row))
        for size, group in groupby(_split(_split(rows, shard), rank), key=lambda row: sizes[row]):
            same = list(group)
            count = max(1, min(max_images, max_pixels // max(1, _area(size))))
            batches += [ImageBatch(number, tuple(same[i : i + count]), size) for i in range(0, len(same), count)]
    return sorted(batches, key=lambda batch: -_area(batch.size))


def select_missing(batches: Iterable[ImageBatch], missing: Sequence[set[int]]) -> list[ImageBatch]:
    """Remove from all batches the images that already have a stored descriptor.

    A batch is dropped if no image remains in it.

    Args:
        batches: batches returned by `plan_batches`.
        missing: for each list, the indices of the images without a stored descriptor.
    """
    remaining = (batch._replace(rows=tuple(r for r in batch.rows if r in missing[batch.number])) for batch in batches)
    return [batch for batch in remaining if batch.rows]


def _split(rows: list[int], part: tuple[int, int]) -> list[int]:
    """Divide image indices among n shards or processes, and return the indices that one of them gets.

    The indices are cut into blocks of at most `_BLOCK` consecutive indices, which are assigned to the shards or
    processes in turn.

    Args:
        rows: indices of images, sorted by image size.
        part: (k, n) for the shard or process k of n; k counts from 0.
    """
    k, n = part
    block = max(1, min(_BLOCK, len(rows) // (4 * n)))
    return [row for position, row in enumerate(rows) if position // block % n == k]


def _area(size: Size) -> int:
    """Return the number of pixels of an image with the (height, width) `size`."""
    return size[0] * size[1]
