"""Hooks by optimiser step, which Lightning's hooks by batch and by epoch are not."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from superglobal.data.train_dataset import CorruptImageList
from superglobal.errors import InputError
from superglobal.training.module import TrainingModule
from superglobal.utils.io import write_atomically


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


log = logging.getLogger(__name__)
_TOLD_EVERY = 60.0


class CurveLogger(StepCallback):
    """Every `every` steps, of the step itself: loss, accuracy, cosine with the true landmark, over all processes;
    learning rates, GeM's p; and since the last time: images/s, share of the time that was spent waiting for data, and
    the peak of GPU memory so far in GB. Validation and saving do not count as time.

    Args:
        every: steps between two points.
        batch_size: photos a step.
    """

    def __init__(self, every: int, batch_size: int) -> None:
        self.every = every
        self.batch_size = batch_size
        self.parts: list[Tensor] = []
        self.told = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # At the end of the batch the schedule is at the next step already.
        (optimizer,) = trainer.optimizers
        self.rates = {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        names = ("value", "accuracy", "cosine")
        self.parts.append(torch.stack([outputs[name].float() for name in names]))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, epoch_ends: bool) -> None:
        parts, self.parts = self.parts, []
        if trainer.global_step % self.every:
            return
        means: Any = trainer.strategy.reduce(torch.stack(parts).mean(0), reduce_op="mean")
        loss, accuracy, cosine = means.tolist()
        values = {"train/loss": loss, "train/accuracy": accuracy, "train/cosine": cosine}
        values |= {"p": module.network.pooling.p.item(), "epoch": trainer.current_epoch + 1}
        values |= self.rates | self._speed(trainer, module)
        module.loss = loss
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        if time.monotonic() - self.told > _TOLD_EVERY:
            self.told = time.monotonic()
            speed, wait = values["images_per_second"], values["data_wait"]
            text = "epoch %d, step %d of %d: loss %.3f, %.0f images/s, %.0f %% of the time waiting for data"
            told = trainer.current_epoch + 1, trainer.global_step, module.total_steps, loss, speed, 100 * wait
            log.info(text, *told)

    def _speed(self, trainer: pl.Trainer, module: TrainingModule) -> dict[str, float]:
        seconds = max(1e-9, time.perf_counter() - self.start - (module.paused - self.paused))
        steps = trainer.global_step - self.step
        speed = {
            "images_per_second": steps * self.batch_size / seconds,
            "data_wait": min(1.0, (self._waited(trainer) - self.waited) / seconds),
        }
        if module.device.type == "cuda":
            speed["gpu_memory_gb"] = torch.cuda.max_memory_allocated(module.device) / 1e9
        self._restart(trainer, module)
        return speed

    def _restart(self, trainer: pl.Trainer, module: Any) -> None:
        self.start, self.step = time.perf_counter(), trainer.global_step
        self.paused, self.waited = module.paused, self._waited(trainer)

    @staticmethod
    def _waited(trainer: pl.Trainer) -> float:
        return trainer.datamodule.waited  # type: ignore[attr-defined]


_SHOWN = 8


class CorruptImageCallback(pl.Callback):
    """Enters the photos that stand-ins took the place of into the list of bad ones."""

    def __init__(self, bad: CorruptImageList) -> None:
        self.bad = bad

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(batch, InputError) and batch.corrupt:
            self.bad.add(batch.corrupt)


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
