"""Train networks on random images for a few steps, for the benchmarks and the GPU report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from torch.utils.data import Dataset

from superglobal import load_model
from superglobal.config.training import FitConfig, OptimConfig
from superglobal.data.datamodules import TrainingDataModule
from superglobal.data.train_dataset import TrainingImage
from superglobal.models.heads import make_head
from superglobal.training.module import TrainingModule
from superglobal.training.trainer import make_fit_trainer


class RandomImages(Dataset):
    """Data set of random images, which are kept in memory.

    Args:
        count: length of the data set. It repeats 64 different images.
        side: height and width of the images in pixels.
        classes: number of classes.
    """

    def __init__(self, count: int, side: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pool = torch.randint(0, 256, (64, 3, side, side), dtype=torch.uint8, generator=generator)
        self.count, self.classes = count, classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: tuple[int, int]) -> TrainingImage:
        index = item[1]
        return TrainingImage(self.pool[index % len(self.pool)], index % self.classes, index, [])


class StepTimes(pl.Callback):
    """Callback that records the time at which each training step begins, as `time.perf_counter()` in seconds."""

    def __init__(self) -> None:
        self.begins: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.begins.append(time.perf_counter())


def make_network_and_head(
    backbone: str, dim: int, classes: int, head: str = "arcface", scale: float = 16, margin: float = 0.1, **options: Any
) -> tuple[Any, Any]:
    """Return a network and a margin head with random weights. The weights are the same in every call.

    Args:
        backbone: name of the backbone, as in `load_model`.
        dim: number of dimensions of the descriptors.
        classes: number of classes.
        head: kind of head, as in `make_head`.
        scale: factor by which the head multiplies all cosines.
        margin: margin of the head.
        **options: more arguments of `load_model`.

    Returns:
        The network and the head.
    """
    torch.manual_seed(0)
    network = load_model("random", backbone=backbone, scales=1, dim=dim, trainable=True, **options)
    return network, make_head(head, dim, [1] * classes, scale=scale, margin=margin)


def fit(
    network: Any,
    head: Any,
    optim: OptimConfig,
    config: FitConfig,
    images: RandomImages,
    callbacks: Sequence[pl.Callback],
    loggers: Sequence[Logger] = (),
) -> tuple[TrainingModule, TrainingDataModule]:
    """Train a network for one epoch with superglobal's Trainer.

    Args:
        network: network to train.
        head: margin head to train together with the network.
        optim: optimizer settings, which include the batch size.
        config: settings of the Trainer.
        images: training images.
        callbacks: callbacks of the Trainer.
        loggers: loggers of the Trainer.

    Returns:
        The training module and the data module after training.
    """
    data = TrainingDataModule(images, optim.batch_size, 1, config.num_workers, 0)  # type: ignore[arg-type]
    steps = len(images) // optim.batch_size
    module = TrainingModule(network, head, optim, steps, np.arange(images.classes), config)
    make_fit_trainer(config, optim, list(callbacks), list(loggers)).fit(module, data)
    return module, data
