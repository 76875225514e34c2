"""What watches a training run."""

from __future__ import annotations

import logging

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from superglobal.api import extract
from superglobal.data.gldv2 import TrainList
from superglobal.errors import InputError
from superglobal.retrieval.metrics import LABELS
from superglobal.retrieval.scoring import evaluate
from superglobal.training import TrainingModule

log = logging.getLogger(__name__)


class RetrievalValidation(Callback):
    """After each epoch: mAP of held-out landmarks, each photo searched for among all others ("val/map", 0..1).

    Photos are described at one scale, as in training, and scored by the functions that score an evaluation. No
    evaluation set is touched, so that nothing is chosen on one.

    Args:
        photos: of landmarks that are not trained on.
        max_images: whole landmarks are drawn until one more would pass this; two at least.
        max_side: larger photos are shrunk to this longer side, in pixels.
        seed: of the draw.

    Raises:
        InputError: under two landmarks are held out.
    """

    def __init__(self, photos: TrainList, max_images: int, max_side: int | None, seed: int) -> None:
        if len(photos.landmarks) < 2:
            raise InputError("retrieval validation needs two landmarks; raise data.val_fraction")
        order = np.random.default_rng(seed).permutation(len(photos.landmarks))
        total = np.cumsum(np.bincount(photos.labels)[order])
        drawn = order[: max(2, np.searchsorted(total, max_images, side="right"))]
        chosen = np.flatnonzero(np.isin(photos.labels, drawn))
        self.paths = [photos.path(int(i)) for i in chosen]
        self.labels = photos.labels[chosen]
        self.max_side = max_side
        self.gnd = [
            {"positive": np.setdiff1d(np.flatnonzero(self.labels == label), i)} for i, label in enumerate(self.labels)
        ]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        network = pl_module.network
        pl_module.require_sound_pooling()
        network.eval()
        X = extract(network, self.paths, max_side=self.max_side)
        network.train()
        exclude = np.arange(len(X))
        result = evaluate(X, X, self.gnd, LABELS, clusters=self.labels.tolist(), exclude=exclude, samples=1)
        pl_module.log("val/map", result.map["all"], prog_bar=True)
        loss = float(trainer.callback_metrics["train/loss"])
        log.info("epoch %d: loss %.3f, validation mAP %.4f", trainer.current_epoch + 1, loss, result.map["all"])
