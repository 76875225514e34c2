"""Training: photos of landmarks to the network that retrieves unseen ones best."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, ModelCheckpoint

from superglobal.api import load_model
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
from superglobal.files import EXPORT, write_atomically
from superglobal.loggers import training_loggers
from superglobal.models.heads import ArcFace
from superglobal.models.network import RetrievalNetwork
from superglobal.retrieval.report import versions
from superglobal.retrieval.tables import flat
from superglobal.training import TrainingModule

log = logging.getLogger(__name__)


def train(cfg: DictConfig, folder: Path) -> float:
    """Train, validate by retrieval after every epoch, and export the best network.

    Args:
        cfg: composed `TrainConfig`.
        folder: of this run; its `best.safetensors` is what `eval.py` takes. A finished run of the same settings,
            weights and photos is kept and not repeated; an unfinished one begins anew.

    Returns:
        The best validation mAP, in 0..1.

    Raises:
        InputError: anything missing, unreadable or contradicting, or `folder` holds another training.
    """
    config = validated(cfg, TrainConfig)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    photos, held_out, signatures = _photos(config)
    network = _network(config)
    identity = _identity(config, network, photos, signatures)
    done = _claim(folder, identity)
    if done is not None:
        return done
    score = _fit(config, network, photos, held_out, folder)
    export = folder / EXPORT
    save_weights(network, export, {**identity, "val_map": score, "versions": versions()})
    log.info("best validation mAP %.4f; exported: %s", score, export)
    return score


def _photos(config: TrainConfig) -> tuple[TrainList, TrainList, list[str]]:
    """Training photos, held-out photos, and the content signatures of both."""
    d = config.data
    photos, held_out = split_landmarks(read_train(d.root, d.table, d.min_images), d.val_fraction, config.seed)
    landmarks = len(photos.landmarks), len(held_out.landmarks)
    if min(landmarks) < 2:
        raise InputError(
            f"data.val_fraction={d.val_fraction}: {landmarks[0]} landmarks to train on, {landmarks[1]} to validate on; "
            "both need at least two"
        )
    if len(photos) < config.optim.batch_size:
        raise InputError(
            f"optim.batch_size={config.optim.batch_size}: there are only {len(photos)} training photos; lower it"
        )
    log.info("%d photos of %d landmarks", len(photos), landmarks[0])
    log.info("held out for validation: %d photos of %d landmarks", len(held_out), landmarks[1])
    items = [ImageItem(part.path(i)) for part in (photos, held_out) for i in range(len(part))]
    title = "training photos"
    return photos, held_out, require_images([(title, items, how_to_get(Path(d.root)))])[title]


def _network(config: TrainConfig) -> RetrievalNetwork:
    network = load_model(
        config.weights or config.backbone.weights or "timm",
        backbone=config.backbone.name,
        pooling=pooling_overrides(config.pooling),
        scales=1,
        seed=config.seed,
        dim=config.dim,
        trainable=True,
    )
    side = config.data.image_size
    if side < network.min_side():
        raise InputError(
            f"data.image_size={side}: with this pooling the network needs at least {network.min_side()} px a side"
        )
    return network


def _identity(
    config: TrainConfig, network: RetrievalNetwork, photos: TrainList, signatures: list[str]
) -> dict[str, Any]:
    """What makes a training another one: settings, the network it starts from, photos. Plain types."""
    settings = asdict(config)
    # Where it runs, and what the network says of itself: `pooling.relup=true` is `pooling.relup=on`.
    for where in ("paths", "logger", "trainer", "name", "pooling", "backbone", "weights", "dim"):
        del settings[where]
    del settings["data"]["root"]
    digest = hashlib.sha256(photos.digest().encode())
    digest.update("\n".join(signatures).encode())
    identity = {"settings": settings, "start": network.identity(), "photos": digest.hexdigest()}
    return json.loads(json.dumps(identity, default=str))


def _claim(folder: Path, identity: dict[str, Any]) -> float | None:
    """Make `folder` this training's, and give the score if it is finished.

    Raises:
        InputError: it is another training's; nothing there was touched.
    """
    record, export = folder / "training.json", folder / EXPORT
    if record.is_file() or export.is_file():
        try:
            found = json.loads(record.read_text()) if record.is_file() else {}
        except ValueError as error:
            raise InputError(f"{record}: damaged ({error}); remove {folder} to train again") from error
        before, now = flat(found), flat(identity)
        differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if differing:
            raise InputError(
                f"{folder} holds another training; different are {', '.join(differing[:6])}. Give a new name=, or "
                "remove the folder"
            )
    if export.is_file():
        score = float(read_weights(export).provenance["origin"]["val_map"])
        log.info("trained already, validation mAP %.4f: %s (remove the folder to train again)", score, export)
        return score
    if record.is_file():
        log.warning("%s holds the beginning of this training; it begins anew", folder)
        for left in ("checkpoints", "csv"):
            shutil.rmtree(folder / left, ignore_errors=True)
    write_atomically(record, json.dumps(identity, indent=1).encode())
    return None


def _fit(config: TrainConfig, network: RetrievalNetwork, photos: TrainList, held_out: TrainList, folder: Path) -> float:
    """Train `network` in place; it ends as it was at its best epoch, whose validation mAP is returned."""
    d, o, t = config.data, config.optim, config.trainer
    head = ArcFace(network.dim, len(photos.landmarks), config.head.scale, config.head.margin)
    every = min(t.log_every, len(photos) // o.batch_size)
    module = TrainingModule(network, head, o, every)
    best = ModelCheckpoint(folder / "checkpoints", "best", monitor="val/map", mode="max", enable_version_counter=False)
    validation = RetrievalValidation(held_out, d.val_images, d.val_max_side, config.seed)
    data = TrainingDataModule(photos, d.image_size, d.crop, d.jitter, o.batch_size, t.num_workers, config.seed)
    with training_loggers(config, folder) as loggers:
        callbacks: list[Callback] = [validation, best, LearningRateMonitor("step")]
        trainer = make_trainer(t, max_epochs=o.epochs, callbacks=callbacks, logger=loggers, log_every_n_steps=every)
        try:
            trainer.fit(module, data)
        except SystemExit:  # Lightning's answer to Ctrl-C
            log.error(
                "interrupted in epoch %d of %d: nothing was exported, the same command begins anew",
                trainer.current_epoch + 1,
                o.epochs,
            )
            sys.exit(130)
    state = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
    load_strictly(module.cpu(), state, best.best_model_path)
    # The learned p becomes part of what the network says of itself.
    network.set_p(None)
    assert best.best_model_score is not None
    return float(best.best_model_score)
