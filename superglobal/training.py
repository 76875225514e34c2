"""One training step and its optimiser; the mathematics is in models/."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from superglobal.config import OptimConfig
from superglobal.errors import InputError
from superglobal.models.network import RetrievalNetwork


class TrainingModule(pl.LightningModule):
    """Classification of landmarks through a margin head, at one scale.

    Args:
        network: its pooling and whitening are trained; its scales belong to evaluation.
        head: (B, D) descriptors and (B,) labels -> (B, classes) logits.
        optim: optimiser and schedule.
        check_every: steps between looks at whether the loss still is a number; each makes a GPU wait.
    """

    def __init__(self, network: RetrievalNetwork, head: nn.Module, optim: OptimConfig, check_every: int) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.optim = optim
        self.check_every = check_every

    def on_fit_start(self) -> None:
        # The layout in which convolutions are fastest, on GPUs and CPUs alike; values do not depend on it.
        self.network.to(memory_format=torch.channels_last)

    def training_step(self, batch: list[Tensor] | InputError, batch_idx: int) -> Tensor:
        """Cross entropy of (B, 3, S, S) uint8 photos with (B,) labels.

        Raises:
            InputError: a photo of the batch cannot be read, or the loss is no number any more.
        """
        if isinstance(batch, InputError):
            raise batch
        images, labels = batch
        x = self.network.normalize(images).contiguous(memory_format=torch.channels_last)
        descriptors = self.network.whitened(x)
        logits = self.head(descriptors, labels)
        loss = F.cross_entropy(logits, labels)
        if self.global_step % self.check_every == 0 and not torch.isfinite(loss):
            raise InputError(
                f"epoch {self.current_epoch}, step {self.global_step}: the loss is {loss.item()}; lower optim.lr "
                f"({self.optim.lr})"
            )
        self.log("train/loss", loss, prog_bar=True)
        # Of the logits with their margin, which is harder than recognition itself.
        self.log("train/accuracy", (logits.argmax(1) == labels).float().mean())
        return loss

    def require_sound_pooling(self) -> None:
        """
        Raises:
            InputError: GeM's exponent was trained to where it means nothing.
        """
        p = self.network.pooling.p.item()
        if not p > 0:
            raise InputError(
                f"epoch {self.current_epoch}: GeM's p became {p:.3g}; lower optim.lr or set pooling.learn_p=off"
            )

    def configure_optimizers(self) -> Any:
        o = self.optim
        groups = parameter_groups(self.network, o.lr, o.weight_decay)
        groups += parameter_groups(self.head, o.lr * o.head_lr, o.weight_decay)
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(groups, momentum=o.momentum, nesterov=o.momentum > 0)
            if o.name == "sgd"
            else torch.optim.AdamW(groups)
        )
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, round(o.warmup * steps))
        parts = [LinearLR(optimizer, 1 / warmup, 1.0, warmup), CosineAnnealingLR(optimizer, max(1, steps - warmup))]
        schedule = SequentialLR(optimizer, parts, [warmup])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def parameter_groups(module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Weights with decay; biases, norms and GeM's p (1-D) without."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
