"""Training: photos of landmarks to the network that retrieves unseen ones best."""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, ModelCheckpoint

from superglobal.api import build_network
from superglobal.callbacks import RetrievalValidation
from superglobal.checkpoint import load_strictly, read_weights, save_weights
from superglobal.checks import validated
from superglobal.config import TrainConfig, pooling_overrides
from superglobal.data.datamodules import TrainingDataModule
from superglobal.data.gldv2 import TrainList, how_to_get, read_train, split_landmarks
from superglobal.data.images import ImageItem
from superglobal.data.sets import require_images
from superglobal.engine.common import make_trainer
from superglobal.errors import InputError
from superglobal.loggers import training_loggers
from superglobal.models.heads import ArcFace
from superglobal.models.network import RetrievalNetwork
from superglobal.retrieval.report import versions
from superglobal.training import TrainingModule

log = logging.getLogger(__name__)


def train(cfg: DictConfig, folder: Path) -> float:
    """Train, validate by retrieval after every epoch, and export the best network.

    Args:
        cfg: composed `TrainConfig`.
        folder: of this run; its `best.safetensors` is what `eval.py` takes. A finished run of the same settings
            and photos is kept and not repeated.

    Returns:
        The best validation mAP, in 0..1.

    Raises:
        InputError: anything missing, unreadable or contradicting, or `folder` holds another training.
    """
    config = validated(cfg, TrainConfig)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    photos, held_out = _photos(config)
    identity = _identity(config, photos, held_out)
    export = folder / "best.safetensors"
    if export.is_file():
        return _finished(export, identity)
    network = _network(config)
    checkpoints = _fit(config, network, photos, held_out, folder)
    score = float(checkpoints.best_model_score or 0)
    save_weights(network, export, {**identity, "val_map": score, "versions": versions()})
    log.info("best validation mAP %.4f; exported: %s", score, export)
    return score


def _photos(config: TrainConfig) -> tuple[TrainList, TrainList]:
    """Training and held-out photos, every file checked."""
    d = config.data
    photos, held_out = split_landmarks(read_train(d.root, d.table, d.min_images), d.val_fraction, config.seed)
    if not len(held_out) or not len(photos):
        raise InputError(
            f"data.val_fraction={d.val_fraction}: {len(photos.landmarks)} landmarks to train on and "
            f"{len(held_out.landmarks)} to validate on; both need at least one"
        )
    if len(photos) < config.optim.batch_size:
        raise InputError(
            f"optim.batch_size={config.optim.batch_size}: there are only {len(photos)} training photos; lower it"
        )
    items = [ImageItem(part.path(i)) for part in (photos, held_out) for i in range(len(part))]
    require_images([("training photos", items, how_to_get(Path(d.root)))])
    log.info("%d photos of %d landmarks", len(photos), len(photos.landmarks))
    log.info("held out for validation: %d photos of %d landmarks", len(held_out), len(held_out.landmarks))
    return photos, held_out


def _identity(config: TrainConfig, photos: TrainList, held_out: TrainList) -> dict[str, Any]:
    """What makes a training another one."""
    settings = asdict(config)
    for where in ("paths", "logger", "trainer", "name"):
        del settings[where]
    del settings["data"]["root"]
    return {"config": settings, "photos": photos.digest(), "held_out": held_out.digest()}


def _finished(export: Path, identity: dict[str, Any]) -> float:
    """The score of the run that is there already.

    Raises:
        InputError: it is another training.
    """
    found = read_weights(export).provenance["origin"]
    if {key: found.get(key) for key in identity} != identity:
        raise InputError(
            f"{export.parent} holds a training with other settings or photos; give a new name=, or remove the folder"
        )
    log.info("trained already, validation mAP %.4f: %s (remove it to train again)", found["val_map"], export)
    return float(found["val_map"])


def _network(config: TrainConfig) -> RetrievalNetwork:
    network = build_network(
        config.weights,
        backbone=config.backbone.name,
        pooling=pooling_overrides(config.pooling),
        scales=1,
        seed=config.seed,
        dim=config.dim,
    )
    side = config.data.image_size
    if side < network.min_side():
        raise InputError(
            f"data.image_size={side}: with this pooling the network needs at least {network.min_side()} px a side"
        )
    return network


def _fit(
    config: TrainConfig, network: RetrievalNetwork, photos: TrainList, held_out: TrainList, folder: Path
) -> ModelCheckpoint:
    """Train `network` in place; it ends as it was at its best epoch."""
    d, o = config.data, config.optim
    head = ArcFace(network.dim, len(photos.landmarks), config.head.scale, config.head.margin)
    module = TrainingModule(network, head, o)
    best = ModelCheckpoint(
        folder / "checkpoints", "best", monitor="val/map", mode="max", save_last=True, enable_version_counter=False
    )
    callbacks: list[Callback] = [RetrievalValidation(held_out, d.val_images, d.val_max_side), best]
    with training_loggers(config, folder) as loggers:
        callbacks.append(LearningRateMonitor("step"))
        trainer = make_trainer(
            config.trainer,
            max_epochs=o.epochs,
            callbacks=callbacks,
            logger=loggers,
            log_every_n_steps=config.trainer.log_every,
        )
        data = TrainingDataModule(
            photos, d.image_size, d.crop, d.jitter, o.batch_size, config.trainer.num_workers, config.seed
        )
        trainer.fit(module, data)
    if trainer.interrupted:
        sys.exit(130)
    state = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
    load_strictly(module.cpu(), state, best.best_model_path)
    # The learned p becomes part of what the network says of itself.
    network.set_p(None)
    return best
