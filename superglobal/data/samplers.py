"""Orders of training photos that depend on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class EpochSampler(Sampler[tuple[int, int]]):
    """A permutation per epoch as (epoch, index) pairs: the data set seeds its augmentation from the pair.

    Args:
        length: number of photos.
        seed: of all epochs.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; Lightning calls it before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in np.random.default_rng([self.seed, self.epoch]).permutation(self.length):
            yield self.epoch, int(index)
