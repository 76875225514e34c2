"""Hooks by optimiser step, which Lightning's hooks by batch and by epoch are not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from superglobal.training import TrainingModule


class StepCallback(Callback, ABC):
    """Calls `on_step` once after every optimiser step, when everything that belongs to the step is done.

    That is never between the parts of an accumulated batch, and for the last step of an epoch at the epoch's end,
    where a checkpoint resumes in the next epoch.
    """

    done = -1

    @abstractmethod
    def on_step(self, trainer: pl.Trainer, module: TrainingModule, epoch_ends: bool) -> None:
        """After step number `trainer.global_step` (the first is 1)."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if complete and batch_idx + 1 < trainer.num_training_batches:
            assert isinstance(pl_module, TrainingModule)
            self.done = trainer.global_step
            self.on_step(trainer, pl_module, False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        # A run that stops early within an epoch ends the epoch at a step that was dealt with.
        if self.done != trainer.global_step:
            self.on_step(trainer, pl_module, True)


class StepSeed(Callback):
    """Seeds torch before every batch by (seed, rank, step, part): dropout and the like depend on nothing before.

    A saved generator state would not do: making a DataLoader's iterator draws from the generator too.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        part = batch_idx % trainer.accumulate_grad_batches
        entropy = [self.seed, trainer.global_rank, trainer.global_step, part]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


def side_group(trainer: pl.Trainer) -> Any:
    """A process group for `any_rank` beside the one that gradients take, None for one process; every process asks.

    It works on the CPU: an answer by way of the GPU would come after all that the GPU has been told to do.
    """
    return torch.distributed.new_group(backend="gloo") if trainer.world_size > 1 else None


def any_rank(group: Any, *flags: bool) -> list[bool]:
    """Each flag, true if it is in any process of a `side_group`; every process has to ask."""
    if group is None:
        return list(flags)
    found = torch.tensor([float(flag) for flag in flags])
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX, group=group)
    return [bool(flag) for flag in found.tolist()]
