"""Plan batches of images: random batches for training, and batches of equal image size for extraction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from superglobal.errors import InputError

_BLOCK = 32  # maximum number of adjacent images, sorted by size, that are assigned to one process together
Size = tuple[int, int]
"""(height, width) in pixels."""


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Training batches of one process, as lists of (epoch, index).

    Each epoch is a new permutation, split into steps of `batch_size` images; an incomplete last step is dropped. A step
    is split into contiguous parts, first by `accumulate`, then by rank, so that the images of a step do not depend on
    the number of processes. The order depends only on the seed and the epoch.

    Args:
        length: number of images.
        batch_size: number of images per step, in all processes and parts together.
        seed: seed of the permutations.
        accumulate: number of parts of a step that a process computes one after the other.
        rank: rank of this process.
        world: number of processes.

    Raises:
        InputError: `batch_size` is not divisible by the number of parts, or larger than `length`.
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
        self.sampler = self  # Lightning calls `set_epoch` on this attribute before each epoch.
        self.start_at(0)

    def start_at(self, step: int) -> None:
        """Start at a step that is counted over all epochs: set its epoch, and skip the earlier steps of that epoch."""
        self._start = divmod(step, self.steps)
        self.epoch = self._start[0]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of parts of a whole epoch."""
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
    """Images of one size that are extracted together, without padding.

    Attributes:
        number: index of the image list.
        rows: rows of the images in the list.
        size: (height, width) in pixels.
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
    """Group the images of several lists into batches, the largest images first.

    Large images come first so that a lack of memory is noticed early. The plan depends only on the arguments, and not
    on the descriptors that are stored already: a resumed run has the same batches and therefore bit-identical
    descriptors. The images of a shard do not depend on the batch size or the ranks, so that shards on machines with
    different memory or devices cover each image once.

    Args:
        lists: (height, width) of each image of each list, in pixels.
        max_pixels: maximum number of pixels in a batch; a single image may have more.
        max_images: maximum number of images in a batch.
        shard: (k, n) for shard k of n, counted from 0.
        rank: (k, n) for process k of the n processes of this shard, counted from 0.
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
    """Return the batches without the images whose descriptors are stored already.

    Args:
        batches: batches of `plan_batches`.
        missing: rows of each list without a stored descriptor.
    """
    remaining = (batch._replace(rows=tuple(r for r in batch.rows if r in missing[batch.number])) for batch in batches)
    return [batch for batch in remaining if batch.rows]


def _split(rows: list[int], part: tuple[int, int]) -> list[int]:
    """Return part k of n parts, each of which consists of blocks of adjacent rows."""
    k, n = part
    block = max(1, min(_BLOCK, len(rows) // (4 * n)))
    return [row for position, row in enumerate(rows) if position // block % n == k]


def _area(size: Size) -> int:
    return size[0] * size[1]
