"""Training callbacks that seed torch, log curves, record corrupt images, and check for non-finite values."""

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
from superglobal.models.pooling import EXPONENTS, is_exponent
from superglobal.training.module import TrainingModule
from superglobal.utils.io import write_atomically

log = logging.getLogger(__name__)
_REPORT_EVERY = 60.0  # seconds between two log lines that report the progress
_MAX_LISTED = 8


class StepCallback(Callback, ABC):
    """Base class for callbacks whose method `on_step` is called once after each optimizer step.

    If gradients are accumulated over several batches, `on_step` is called only after the last of these batches. For the
    last step of an epoch, `on_step` is called after Lightning has ended the epoch, so that a run that resumes from a
    checkpoint of this step starts with the next epoch.
    """

    last_step = -1

    @abstractmethod
    def on_step(self, trainer: pl.Trainer, module: TrainingModule, epoch_ends: bool) -> None:
        """Run the callback's action after an optimizer step.

        Args:
            trainer: trainer of the run; `trainer.global_step` is the number of the step, starting at 1.
            module: module that is trained.
            epoch_ends: true for the last step of an epoch.
        """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if complete and batch_idx + 1 < trainer.num_training_batches:
            assert isinstance(pl_module, TrainingModule)
            self.last_step = trainer.global_step
            self.on_step(trainer, pl_module, False)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        # If the run stops in the middle of an epoch, `on_train_batch_end` has already called `on_step` for this step.
        if self.last_step != trainer.global_step:
            self.on_step(trainer, pl_module, True)


class StepSeed(Callback):
    """Seed torch before each batch, so that dropout does not depend on earlier batches.

    Each seed is computed from the seed of the run, the rank of the process, the step, and the number of the batch
    within the step. A resumed run thus uses the same random numbers as a run without interruption. Storing the state of
    torch's random generator in checkpoints would not be enough, because a resumed run creates a new iterator of its
    DataLoader, which also draws from the generator.

    Args:
        seed: seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        part = batch_idx % trainer.accumulate_grad_batches
        entropy = [self.seed, trainer.global_rank, trainer.global_step, part]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


def cpu_process_group(trainer: pl.Trainer) -> Any:
    """Return a process group of all processes, for `any_rank`; None for a single process. All processes must call this.

    The processes of the group communicate on the CPU, because communication on the GPU would wait for all queued
    kernels.
    """
    return torch.distributed.new_group(backend="gloo") if trainer.world_size > 1 else None


def any_rank(group: Any, *flags: bool) -> list[bool]:
    """Return, for each flag, whether it is true in any process. All processes must call this.

    Args:
        group: process group from `cpu_process_group`.
        flags: flags of this process, in the same order in all processes.
    """
    if group is None:
        return list(flags)
    values = torch.tensor([float(flag) for flag in flags])
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX, group=group)
    return [bool(value) for value in values.tolist()]


class CurveLogger(StepCallback):
    """Log a point of each training curve every `every` steps, and the progress every minute.

    A point contains these values:

    - the loss, the accuracy and the cosine with the correct landmark, averaged over the images of the current step in
      all processes;
    - the learning rates, the p of GeM, and the number of the epoch;
    - the images per second and the fraction of time spent waiting for data. Both are measured since the previous point,
      without the time of validations and of saving checkpoints;
    - on a GPU, the peak memory since the start of the run, in GB.

    Args:
        every: number of steps between two points.
        batch_size: number of images per step.
    """

    def __init__(self, every: int, batch_size: int) -> None:
        self.every = every
        self.batch_size = batch_size
        self.parts: list[Tensor] = []
        self.last_report = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # The learning rates are read before the batch, because the schedule has already advanced when the batch ends.
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
        if time.monotonic() - self.last_report > _REPORT_EVERY:
            self.last_report = time.monotonic()
            speed, wait = values["images_per_second"], values["data_wait"]
            log.info(
                "epoch %d, step %d/%d: loss %.3f, %.0f images/s, %.0f %% of the time waiting for data",
                trainer.current_epoch + 1,
                trainer.global_step,
                module.total_steps,
                loss,
                speed,
                100 * wait,
            )

    def _speed(self, trainer: pl.Trainer, module: TrainingModule) -> dict[str, float]:
        """Return the speed since the previous point and, on a GPU, the peak memory; then restart the measurement.

        Returns:
            "images_per_second"; "data_wait", the fraction of time spent waiting for data; and on a GPU "gpu_memory_gb".
        """
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
        """Start a new measurement of the speed at the current step."""
        self.start, self.step = time.perf_counter(), trainer.global_step
        self.paused, self.waited = module.paused, self._waited(trainer)

    @staticmethod
    def _waited(trainer: pl.Trainer) -> float:
        """Return the time in seconds that this process has waited for images since the start of the run."""
        return trainer.datamodule.waited  # type: ignore[attr-defined]


class CorruptImageCallback(pl.Callback):
    """Add the corrupt images of each training batch to the run's list of corrupt images."""

    def __init__(self, corrupt_images: CorruptImageList) -> None:
        self.corrupt_images = corrupt_images

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not isinstance(batch, InputError) and batch.corrupt:
            self.corrupt_images.add(batch.corrupt)


class NonFiniteGuard(StepCallback):
    """End the run in all processes if a loss or a weight is not finite.

    Losses stay on the device and are checked only every `every` steps, because each check waits for the GPU.
    `CheckpointCallback` also calls `check` before each save, so that all weights in a checkpoint are finite.

    Args:
        every: number of steps between two checks.
        folder: run directory; its `nonfinite.txt` lists the images of the first batch with a non-finite loss.
        location: function that takes the index of an image and returns its path or its position in a tar file, which is
            written to `nonfinite.txt`.
    """

    def __init__(self, every: int, folder: Path, location: Callable[[int], str]) -> None:
        self.every = every
        self.folder = folder
        self.location = location
        self.window: list[tuple[int, Tensor, Tensor]] = []
        self.group: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.group = cpu_process_group(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.window.append((self._step(trainer, batch_idx), batch.indices, torch.isfinite(outputs["value"])))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, epoch_ends: bool) -> None:
        if trainer.global_step % self.every == 0 or epoch_ends:
            self.check(trainer, module)

    def check(self, trainer: pl.Trainer, module: TrainingModule) -> None:
        """Check the losses since the last check, all weights, and the p of GeM. All processes must call this.

        Raises:
            InputError: in all processes, if a loss or a weight is not finite, or p is not in `EXPONENTS`.
        """
        window, self.window = self.window, []
        losses = bool(torch.stack([finite for _, _, finite in window]).all()) if window else True
        total = torch.stack(torch._foreach_norm([p.detach() for p in module.parameters()])).sum()
        p, (low, high) = module.network.pooling.p, EXPONENTS
        problems = any_rank(self.group, not losses, not torch.isfinite(total), not is_exponent(p.item()))
        if problems[0]:
            raise InputError(self._loss_message(trainer, window) + self._hint(trainer, module))
        where = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}"
        if problems[1]:
            raise InputError(f"{where}: a weight is not finite{self._hint(trainer, module)}")
        if problems[2]:
            raise InputError(
                f"{where}: the p of GeM is {p.item():.3g}, expected {low:g} to {high:g}; lower optim.lr, or set "
                "pooling.learn_p=off"
            )

    def _loss_message(self, trainer: pl.Trainer, window: list[tuple[int, Tensor, Tensor]]) -> str:
        """List the images of the first step with a non-finite loss in `nonfinite.txt`, and return the error message.

        Args:
            trainer: trainer of the run.
            window: for each batch since the last check, the step, the indices of the images, and whether the loss is
                finite.
        """
        first = next(((step, indices.tolist()) for step, indices, finite in window if not finite), None)
        firsts: list[Any] = [first]
        if trainer.world_size > 1:
            firsts = [None] * trainer.world_size
            torch.distributed.all_gather_object(firsts, first)
        step = min(entry[0] for entry in firsts if entry)
        images = [self.location(index) for entry in firsts if entry and entry[0] == step for index in entry[1]]
        path = self.folder / "nonfinite.txt"
        if trainer.is_global_zero:
            write_atomically(path, "".join(f"{image}\n" for image in images).encode())
        shown = ", ".join(images[:_MAX_LISTED]) + (", ..." if len(images) > _MAX_LISTED else "")
        return (
            f"epoch {trainer.current_epoch + 1}, step {step}: the loss is not finite; images of that batch (all are "
            f"listed in {path}): {shown}"
        )

    @staticmethod
    def _hint(trainer: pl.Trainer, module: TrainingModule) -> str:
        """Return a hint for the end of an error message: settings to change so that all values stay finite."""
        half = "" if trainer.precision.startswith(("32", "64")) else ", or trainer.precision=32-true"
        return f"; lower optim.lr ({module.optim.lr}), or set optim.clip{half}, with a new name="

    @staticmethod
    def _step(trainer: pl.Trainer, batch_idx: int) -> int:
        """Return the number of the step that the batch `batch_idx` belongs to, starting at 1.

        After the last batch of a step, Lightning has already increased `trainer.global_step`. For the other batches,
        this method adds 1.
        """
        return trainer.global_step + ((batch_idx + 1) % trainer.accumulate_grad_batches != 0)
