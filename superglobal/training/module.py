"""LightningModule for training: training step, optimizer and learning-rate schedule."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from superglobal.config.training import FitConfig, OptimConfig
from superglobal.data.train_dataset import Batch
from superglobal.errors import InputError
from superglobal.models.heads import MarginHead
from superglobal.models.network import RetrievalNetwork


class TrainingModule(pl.LightningModule):
    """Train a retrieval network to classify landmarks with a margin head, on images at one scale.

    Args:
        network: network to train, with its pooling and whitening.
        head: margin head that computes the loss from descriptors (B, D) and labels (B,).
        optim: settings of the optimizer and the schedule.
        total_steps: number of optimizer steps of the complete training run, for the schedule.
        landmarks: (classes,) int64 landmark_id of each class, stored in checkpoints.
        fit: settings of the memory layout, gradient accumulation and torch.compile.

    Attributes:
        loss: most recently logged training loss; NaN before the first.
        paused: time in seconds that was spent on validations and on saving checkpoints.
    """

    def __init__(
        self,
        network: RetrievalNetwork,
        head: MarginHead,
        optim: OptimConfig,
        total_steps: int,
        landmarks: np.ndarray,
        fit: FitConfig,
    ) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.optim = optim
        self.total_steps = total_steps
        self.accumulate = fit.accumulate
        self.landmarks = torch.from_numpy(landmarks)
        self.layout = torch.channels_last if fit.channels_last else torch.contiguous_format
        # The layout of the parameters is set here, before DistributedDataParallel allocates the gradients with the same
        # strides. If the layout changed later, results would differ slightly.
        network.to(memory_format=self.layout)
        if optim.freeze_backbone:
            network.backbone.requires_grad_(False)
        if optim.batch_norm == "frozen":
            for layer in batch_norms(network):
                layer.requires_grad_(False)
        self.average: AveragedModel | None = None
        if optim.ema is not None:
            self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(optim.ema), use_buffers=True)
            self.average.eval().requires_grad_(False)
        extract = network.single_scale_descriptors
        self.extract = torch.compile(extract) if fit.compile else extract
        self.loss = math.nan
        self.paused = 0.0

    @property
    def result(self) -> RetrievalNetwork:
        """Network to validate and export: the moving average if there is one, or else the trained network."""
        network = self.network if self.average is None else self.average.module
        assert isinstance(network, RetrievalNetwork)
        return network

    def train(self, mode: bool = True) -> TrainingModule:
        """Set training mode; frozen layers and the moving average stay in evaluation mode."""
        super().train(mode)
        if self.optim.freeze_backbone:
            self.network.backbone.eval()
        if self.optim.batch_norm == "frozen":
            for layer in batch_norms(self.network):
                layer.eval()
        if self.average is not None:
            self.average.eval()
        return self

    @contextmanager
    def evaluating(self) -> Iterator[RetrievalNetwork]:
        """Yield the network `result` in evaluation mode. At the end of the `with` statement, restore training mode."""
        self.result.eval()
        try:
            yield self.result
        finally:
            self.train()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Add the duration of a `with` statement to `paused`, so that it does not count as training time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.paused += time.perf_counter() - start

    def on_fit_start(self) -> None:
        """Set training mode, but keep frozen layers and the moving average in evaluation mode."""
        self.train()

    def training_step(self, batch: Batch | InputError, batch_idx: int) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            batch: images and labels, or an InputError if a corrupt image could not be replaced.
            batch_idx: number of the batch in the epoch.

        Returns:
            Scalar tensors by name: "loss" is used for the backward pass, "value" is the same loss without gradient,
            "accuracy" is the fraction of correctly classified images, and "cosine" is the mean cosine with the correct
            landmark.

        Raises:
            InputError: an image and all its possible replacements are corrupt.
        """
        if isinstance(batch, InputError):
            raise batch
        x = self.network.normalize(batch.images).contiguous(memory_format=self.layout)
        out = self.head(self.extract(x), batch.labels)
        # Lightning divides "loss" by the number of accumulated batches.
        return {
            "loss": out.loss,
            "value": out.loss.detach(),
            "accuracy": out.correct.float().mean(),
            "cosine": out.cosine.mean(),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the landmark of each class in the checkpoint."""
        checkpoint["landmarks"] = self.landmarks

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adapt the position in the epoch that a checkpoint stores to the current value of `trainer.accumulate`."""
        # Lightning stores the position in the epoch as a number of batches. If trainer.accumulate has changed since the
        # checkpoint was saved, a step now consists of a different number of batches.
        steps = self.total_steps // self.optim.epochs
        done = checkpoint["global_step"] % steps
        parts = (done or steps) * self.accumulate
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        # If a checkpoint was saved within an epoch, Lightning had not yet counted the last batch as completed.
        progress.update(ready=parts, started=parts, processed=parts, completed=parts - (done > 0))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the optimizer and update the moving average."""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update_parameters(self.network)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and the learning-rate schedule, which advances after each optimizer step."""
        o = self.optim
        groups = parameter_groups("network", self.network, o.lr, o.weight_decay)
        groups += parameter_groups("head", self.head, o.lr * o.head_lr, o.weight_decay)
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(groups, momentum=o.momentum, nesterov=o.momentum > 0)
            if o.name == "sgd"
            else torch.optim.AdamW(groups)
        )
        warmup = max(1, round(o.warmup * self.total_steps))
        schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, self.total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Return the learning rate at a step as a fraction of its peak.

    The fraction rises linearly to 1 in `warmup` steps, and then follows a cosine that reaches 0 after `total` steps.
    """
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup)))) / 2


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """Return all batch norm layers in a module."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]


def parameter_groups(name: str, module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameter groups of a module for the optimizer.

    Weight decay is applied only to parameters with more than one dimension. Biases, parameters of normalization layers
    and the p of GeM have at most one dimension, so they get no weight decay. Frozen parameters are left out.

    Args:
        name: prefix of the names of the groups.
        module: module with the parameters.
        lr: peak learning rate.
        weight_decay: weight decay of parameters with more than one dimension.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"name": name, "params": [p for p in parameters if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"name": f"{name}_1d", "params": [p for p in parameters if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
