"""What ends a training that has nothing to win any more, with the cause."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from superglobal.callbacks.steps import StepCallback, any_rank, side_group
from superglobal.data.bad_photos import BadPhotos
from superglobal.errors import InputError
from superglobal.files import write_atomically
from superglobal.training import TrainingModule

_SHOWN = 8


class BadPhotoGuard(pl.Callback):
    """Enters the photos that stand-ins took the place of into the list of bad ones."""

    def __init__(self, bad: BadPhotos) -> None:
        self.bad = bad

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(batch, InputError) and batch.bad:
            self.bad.add(batch.bad)


class NonFiniteGuard(StepCallback):
    """Ends the run, in all processes together, when a loss or a weight is no number; no checkpoint holds one.

    Losses are kept on the device and looked at every `every` steps, since each look makes a GPU wait.

    Args:
        every: steps between two looks.
        folder: of the run; the photos of the batch go into `nonfinite.txt` there.
        place: index of a photo -> where it is.
    """

    def __init__(self, every: int, folder: Path, place: Callable[[int], str]) -> None:
        self.every = every
        self.folder = folder
        self.place = place
        self.window: list[tuple[int, Tensor, Tensor]] = []
        self.group: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.group = side_group(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.window.append((self._step(trainer, batch_idx), batch.indices, torch.isfinite(outputs["value"])))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, epoch_ends: bool) -> None:
        if trainer.global_step % self.every == 0 or epoch_ends:
            self.check(trainer, module)

    def check(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Look now; every process has to.

        Raises:
            InputError: in every process: a loss since the last look, or a weight, is no number, or GeM's exponent
                was trained to where it means nothing.
        """
        window, self.window = self.window, []
        losses = bool(torch.stack([finite for _, _, finite in window]).all()) if window else True
        total = torch.stack(torch._foreach_norm([p.detach() for p in module.parameters()])).sum()
        p = module.network.pooling.p
        problems = any_rank(self.group, not losses, not torch.isfinite(total), not bool(p > 0))
        if problems[0]:
            raise InputError(self._told(trainer, window) + self._mend(trainer, module))
        where = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}"
        if problems[1]:
            raise InputError(f"{where}: a weight is no number any more{self._mend(trainer, module)}")
        if problems[2]:
            raise InputError(f"{where}: GeM's p became {p.item():.3g}; lower optim.lr or set pooling.learn_p=off")

    def _told(self, trainer: pl.Trainer, window: list[tuple[int, Tensor, Tensor]]) -> str:
        """The first bad step of any process, its photos in the file and the first of them in the message."""
        first = next(((step, indices.tolist()) for step, indices, finite in window if not finite), None)
        found: list[Any] = [first]
        if trainer.world_size > 1:
            found = [None] * trainer.world_size
            torch.distributed.all_gather_object(found, first)
        step = min(entry[0] for entry in found if entry)
        places = [self.place(index) for entry in found if entry and entry[0] == step for index in entry[1]]
        listing = self.folder / "nonfinite.txt"
        if trainer.is_global_zero:
            write_atomically(listing, "".join(f"{place}\n" for place in places).encode())
        shown = ", ".join(places[:_SHOWN]) + (", ..." if len(places) > _SHOWN else "")
        return (
            f"epoch {trainer.current_epoch + 1}, step {step}: the loss is no number; the photos of that batch (all of "
            f"them in {listing}): {shown}"
        )

    @staticmethod
    def _mend(trainer: pl.Trainer, module: TrainingModule) -> str:
        half = "" if trainer.precision.startswith(("32", "64")) else ", or trainer.precision=32-true"
        return f"; lower optim.lr ({module.optim.lr}) or set optim.clip{half}, with a new name="

    @staticmethod
    def _step(trainer: pl.Trainer, batch_idx: int) -> int:
        """The step that a batch belongs to; Lightning has counted it already if the batch completes it."""
        return trainer.global_step + ((batch_idx + 1) % trainer.accumulate_grad_batches != 0)
