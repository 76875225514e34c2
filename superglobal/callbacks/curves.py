"""The numbers of a training, by step."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from superglobal.callbacks.steps import StepCallback
from superglobal.training import TrainingModule

log = logging.getLogger(__name__)

_TOLD_EVERY = 60.0


class Curves(StepCallback):
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
