"""One training step and its optimiser; the mathematics is in models/."""

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
    """Classification of landmarks through a margin head, at one scale.

    Args:
        network: its pooling and whitening are trained; its scales belong to evaluation.
        head: (B, D) descriptors and (B,) labels -> loss.
        optim: optimiser and schedule.
        total_steps: of the whole training, for the schedule.
        landmarks: (classes,) int64, the landmark_id of each class; goes into the checkpoints.
        how: memory layout and whether torch.compile makes the steps.

    Attributes:
        loss: the last that was looked at, NaN before.
        paused: seconds spent on validation and saving.
    """

    def __init__(
        self,
        network: RetrievalNetwork,
        head: MarginHead,
        optim: OptimConfig,
        total_steps: int,
        landmarks: np.ndarray,
        how: FitConfig,
    ) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.optim = optim
        self.total_steps = total_steps
        self.accumulate = how.accumulate
        self.landmarks = torch.from_numpy(landmarks)
        self.layout = torch.channels_last if how.channels_last else torch.contiguous_format
        # Before DistributedDataParallel lays out its gradients by the parameters' strides: later is not exact.
        network.to(memory_format=self.layout)
        if optim.freeze_backbone:
            network.backbone.requires_grad_(False)
        if optim.batch_norm == "frozen":
            for layer in batch_norms(network):
                layer.requires_grad_(False)
        self.average: AveragedModel | None = None
        if optim.ema is not None:
            average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(optim.ema), use_buffers=True)
            self.average = average.eval().requires_grad_(False)
        extract = network.single_scale_descriptors
        self.describe = torch.compile(extract) if how.compile else extract
        self.loss = math.nan
        self.paused = 0.0

    @property
    def result(self) -> RetrievalNetwork:
        """The network that training is about: the moving average if there is one."""
        network = self.network if self.average is None else self.average.module
        assert isinstance(network, RetrievalNetwork)
        return network

    def train(self, mode: bool = True) -> TrainingModule:
        """Training mode, but for what is frozen and for the average."""
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
        """`result` in evaluation mode."""
        self.result.eval()
        try:
            yield self.result
        finally:
            self.train()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens within is no training time."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.paused += time.perf_counter() - start

    def on_fit_start(self) -> None:
        self.train()

    def training_step(self, batch: Batch | InputError, batch_idx: int) -> dict[str, Tensor]:
        """Loss of (B, 3, S, S) uint8 photos with (B,) labels.

        Raises:
            InputError: no photo could be read, not even as a stand-in.
        """
        if isinstance(batch, InputError):
            raise batch
        x = self.network.normalize(batch.images).contiguous(memory_format=self.layout)
        out = self.head(self.describe(x), batch.labels)
        # Lightning divides "loss" by the number of parts of a step.
        return {
            "loss": out.loss,
            "value": out.loss.detach(),
            "accuracy": out.correct.float().mean(),
            "cosine": out.cosine.mean(),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["landmarks"] = self.landmarks

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Lightning counts the parts of steps; how many make a step may have changed since the checkpoint.
        steps = self.total_steps // self.optim.epochs
        done = checkpoint["global_step"] % steps
        parts = (done or steps) * self.accumulate
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        # Within an epoch a checkpoint is taken before Lightning calls the batch completed.
        progress.update(ready=parts, started=parts, processed=parts, completed=parts - (done > 0))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update_parameters(self.network)

    def configure_optimizers(self) -> Any:
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
    """Share of the peak learning rate at a step from 0 on: linear to 1 in `warmup` steps, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup)))) / 2


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """Its batch norm layers."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]


def parameter_groups(name: str, module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Weights with decay; biases, norms and GeM's p (1-D) without."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"name": name, "params": [p for p in parameters if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"name": f"{name}_1d", "params": [p for p in parameters if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
