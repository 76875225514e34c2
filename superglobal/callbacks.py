"""What watches a training run."""

from __future__ import annotations

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from superglobal.api import extract
from superglobal.data.gldv2 import TrainList
from superglobal.retrieval.metrics import LABELS
from superglobal.retrieval.scoring import evaluate
from superglobal.training import TrainingModule


class RetrievalValidation(Callback):
    """After each epoch: mAP of held-out landmarks, each photo searched for among all others ("val/map", 0..1).

    The photos are described as `eval.py` describes them and scored by the same functions. No evaluation set is
    touched, so that nothing is chosen on one.

    Args:
        photos: of landmarks that are not trained on.
        max_images: of them, an even sample; photos whose landmark has no other photo there are queries no more.
        max_side: larger photos are shrunk to this longer side, in pixels.
    """

    def __init__(self, photos: TrainList, max_images: int, max_side: int | None) -> None:
        count = min(max_images, len(photos))
        chosen = np.unique(np.linspace(0, len(photos) - 1, count).round().astype(int)) if count else np.zeros(0, int)
        self.paths = [photos.path(int(i)) for i in chosen]
        self.max_side = max_side
        labels = photos.labels[chosen]
        others = ~np.eye(len(labels), dtype=bool)
        self.gnd = [{"positive": np.flatnonzero((labels == label) & others[i])} for i, label in enumerate(labels)]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        network = pl_module.network
        network.eval()
        X = extract(network, self.paths, max_side=self.max_side)
        network.train()
        result = evaluate(X, X, self.gnd, LABELS, exclude=np.arange(len(X)), samples=1)
        pl_module.log("val/map", result.map["all"], prog_bar=True)
