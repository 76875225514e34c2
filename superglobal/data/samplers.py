"""Orders of training photos that depend on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from superglobal.errors import InputError


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """One process's share of every batch, as lists of (epoch, index).

    Every epoch is a new permutation, cut into steps of `batch_size` photos; what fills no step waits for the next
    permutation. A step is dealt out in contiguous parts, first by `accumulate`, then by rank: however many processes
    there are, step k is made of the same photos.

    Args:
        length: number of photos.
        batch_size: photos a step, over all processes and parts together.
        seed: of the permutations.
        accumulate: parts of a step that a process goes through one after the other.
        rank, world: this process, and how many there are.

    Raises:
        InputError: a step cannot be dealt out evenly, or there are fewer photos than it takes.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, accumulate: int = 1, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size % (world * accumulate):
            raise InputError(
                f"optim.batch_size={batch_size} cannot be dealt out evenly to {world} processes in "
                f"trainer.accumulate={accumulate} parts; choose a multiple of {world * accumulate}"
            )
        if length < batch_size:
            raise InputError(f"optim.batch_size={batch_size}: there are only {length} training photos; lower it")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.accumulate = accumulate
        self.rank = rank
        self.world = world
        self.steps = length // batch_size
        # Lightning looks here for what it calls `set_epoch` on before each epoch.
        self.sampler = self
        self.start_at(0)

    def start_at(self, step: int) -> None:
        """Go on from a step of the whole training: its epoch, and in that epoch from it on."""
        self._begin = divmod(step, self.steps)
        self.epoch = self._begin[0]

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Parts of a whole epoch."""
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
        share = self.batch_size // (self.world * self.accumulate)
        for step in range(self._begin[1] if epoch == self._begin[0] else 0, self.steps):
            for part in range(self.accumulate):
                start = step * self.batch_size + (part * self.world + self.rank) * share
                yield [(epoch, int(index)) for index in order[start : start + share]]
