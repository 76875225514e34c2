"""Training: photos of landmarks to the network that retrieves unseen ones best."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import timm.layers
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback

from superglobal.config.common import validate_config
from superglobal.config.training import TrainConfig
from superglobal.data.datamodules import HeldOutDataset, TrainingDataModule
from superglobal.data.evaluation_set import EvaluationSet, require_images
from superglobal.data.gldv2 import TrainList, read_train, split_landmarks
from superglobal.data.revisited import revisited_set
from superglobal.data.samplers import EpochBatches
from superglobal.data.train_dataset import (
    Augment,
    CorruptImageList,
    CorruptImages,
    TrainingDataset,
    check_training_images,
)
from superglobal.errors import InputError
from superglobal.loggers import training_loggers
from superglobal.models.factory import load_model
from superglobal.models.heads import make_head
from superglobal.models.network import RetrievalNetwork
from superglobal.models.weights import save_weights
from superglobal.training.callbacks import CorruptImageCallback, CurveLogger, NonFiniteGuard, StepSeed
from superglobal.training.checkpointing import CheckpointCallback, newest_checkpoint
from superglobal.training.module import TrainingModule
from superglobal.training.run_dir import CHECKPOINTS, claim, finish, finished, locked
from superglobal.training.trainer import make_fit_trainer, run_fit, sweep_name
from superglobal.training.validation import RetrievalValidation
from superglobal.utils.distributed import first_process
from superglobal.utils.io import CORRUPT_IMAGES, EXPORT
from superglobal.utils.provenance import git_state, versions

log = logging.getLogger(__name__)


def train(cfg: DictConfig, folder: Path) -> float:
    """Train, validate by retrieval as it goes on, and export the best network.

    Args:
        cfg: composed `TrainConfig`.
        folder: of this run; its `best.safetensors` is what `eval.py` takes. A finished run of the same settings,
            weights and photos is kept and not repeated; an unfinished one goes on from its newest checkpoint.

    Returns:
        The best validation mAP, in 0..1, in every process.

    Raises:
        InputError: anything missing, unreadable or contradicting, `folder` holds another training, another process
            trains there, or what ended the training.
    """
    config = validate_config(cfg, TrainConfig)
    first = first_process()
    if not first:
        logging.getLogger("superglobal").setLevel(logging.WARNING)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    photos, held_out = _photos(config)
    network = _network(config)
    # Refuses what Lightning refuses, and a batch that cannot be dealt out, before anything is touched.
    world = make_fit_trainer(config.trainer, config.optim, [], []).world_size
    EpochBatches(len(photos), config.optim.batch_size, config.seed, config.trainer.accumulate, world=world)
    # The other processes are children of this one, or wait for it to join them: it checks for all.
    bad: list[CorruptImages] = [[], []]
    about: dict[str, Any] = {}
    codes = np.zeros(0, np.uint64)
    if first:
        d = config.data
        bad, codes = check_training_images([photos, held_out], d.root, d.table, d.tars, d.max_corrupt)
        identity = _identity(config, network, photos, held_out)
        about = {
            "identity": identity,
            "root": d.root,
            "tars": d.tars,
            "trainer": asdict(config.trainer),
            "versions": versions(),
            "git": git_state(),
        }
    with locked(folder) if first else nullcontext():
        done = claim(folder, about, codes, config.resume == "restart") if first else finished(folder)
        if done is not None:
            log.info("trained already, validation mAP %.4f: %s (remove the folder to train again)", done, folder)
            return done
        score = _fit(config, folder, network, photos, held_out, bad, about)
        if first and not (folder / EXPORT).is_file():
            raise InputError(
                f"{folder / EXPORT}: the best network was exported before the training was interrupted, and is gone; "
                "resume=restart trains again"
            )
        if first:
            finish(folder, score)
            log.info("best validation mAP %.4f; exported: %s", score, folder / EXPORT)
    return score


def _photos(config: TrainConfig) -> tuple[TrainList, TrainList]:
    """Training photos and held-out photos."""
    d, fraction = config.data, config.validation.fraction
    listed = read_train(d.root, d.table, d.min_images, d.classes_of, d.leave_out, d.tars)
    photos, held_out = split_landmarks(listed, fraction, config.seed)
    landmarks = len(photos.landmarks), len(held_out.landmarks)
    if min(landmarks) < 2:
        raise InputError(
            f"validation.fraction={fraction}: {landmarks[0]} landmarks to train on, {landmarks[1]} to validate on; "
            f"both need at least two: {'raise' if landmarks[1] < 2 else 'lower'} validation.fraction"
        )
    log.info("%d photos of %d landmarks", len(photos), landmarks[0])
    log.info("held out for validation: %d photos of %d landmarks", len(held_out), landmarks[1])
    return photos, held_out


def _network(config: TrainConfig) -> RetrievalNetwork:
    network = load_model(
        config.weights or config.backbone.weights or "timm",
        backbone=config.backbone.name,
        pooling=config.pooling.overrides(),
        scales=1,
        seed=config.seed,
        dim=config.dim,
        trainable=True,
    )
    sides = [(f"data.image_size={config.data.image_size}", config.data.image_size)]
    sides += [(f"data.stages={config.data.stages}", side) for _, side in config.data.stages]
    for setting, side in sides:
        if side < network.min_side():
            raise InputError(f"{setting}: with this pooling the network needs at least {network.min_side()} px a side")
    if config.optim.batch_norm == "sync":
        if not torch.cuda.is_available():
            raise InputError("optim.batch_norm=sync works between GPUs; use train or frozen here")
        # torch's own would drop the activation that timm's layers bring along.
        network = timm.layers.convert_sync_batchnorm(network)
    return network


def _identity(config: TrainConfig, network: RetrievalNetwork, photos: TrainList, held_out: TrainList) -> dict[str, Any]:
    """What makes a training another one: settings, the network it starts from, lists of photos. Plain types."""
    settings = asdict(config)
    # Where it runs, and what the network says of itself: `pooling.relup=true` is `pooling.relup=on`.
    for where in ("paths", "logger", "trainer", "name", "pooling", "backbone", "weights", "dim", "resume"):
        del settings[where]
    for where in ("role", "root", "tars", "max_corrupt"):
        del settings["data"][where]
    del settings["validation"]["sets"]
    lists = [photos.digest(), held_out.digest()]
    identity = {"settings": settings, "start": network.identity(), "photos": lists}
    return json.loads(json.dumps(identity, default=str))


def _watched(config: TrainConfig) -> list[EvaluationSet]:
    """The evaluation sets that are there, their images checked by the first process."""
    found, first = [], first_process()
    for entry in config.validation.sets:
        place = Path(config.paths.data) / entry
        if (place / f"gnd_{place.name}.pkl").is_file():
            found.append(revisited_set(place.parent, place.name))
        elif first:
            # The two benchmarks of the default are often not there.
            level = logging.INFO if entry in ("roxford5k", "rparis6k") else logging.WARNING
            text = "validation.sets: %s is not there, nothing is watched on it (FOLDER/gnd_FOLDER.pkl)"
            log.log(level, text, place / f"gnd_{place.name}.pkl")
    if first:
        parts = [
            (one, title, items)
            for one in found
            for title, items in (("queries", one.queries), ("database", one.database))
        ]
        require_images([(f"{one.name} {title}", items, one.how_to_get) for one, title, items in parts])
    return found


def _fit(
    config: TrainConfig,
    folder: Path,
    network: RetrievalNetwork,
    photos: TrainList,
    held_out: TrainList,
    bad: list[CorruptImages],
    about: dict[str, Any],
) -> float:
    """Train `network` in place and export it whenever it is the best; the best validation mAP."""
    d, o, t, v = config.data, config.optim, config.trainer, config.validation
    steps = EpochBatches(len(photos), o.batch_size, config.seed, t.accumulate).steps
    every = min(t.log_every, steps)
    counts = np.bincount(photos.labels, minlength=len(photos.landmarks))
    head = make_head(dim=network.dim, counts=counts, **asdict(config.head))
    module = TrainingModule(network, head, o, o.epochs * steps, photos.landmarks, t)
    missed, missed_held_out = (
        CorruptImageList(folder / CORRUPT_IMAGES, len(photos) + len(held_out), d.max_corrupt, part.location)
        for part in (photos, held_out)
    )
    missed.add(bad[0])
    missed_held_out.add(bad[1])
    guard = NonFiniteGuard(every, folder, photos.location)
    checkpoints = CheckpointCallback(folder / CHECKPOINTS, t.save_every_steps, t.save_every_minutes, guard)
    photos_held_out = HeldOutDataset(
        held_out, v.max_images, v.max_side, config.seed, exclude=[index for index, _ in bad[1]]
    )
    validation = RetrievalValidation(
        photos_held_out,
        missed_held_out,
        every_epochs=v.every_epochs,
        every_steps=v.every_steps,
        sets=_watched(config),
        patience=v.patience,
        export=partial(_export, folder, about),
        num_workers=t.num_workers,
        asked_to_stop=lambda: checkpoints.asked_to_stop,
    )
    watchers: list[Callback] = [
        StepSeed(config.seed),
        CorruptImageCallback(missed),
        CurveLogger(every, o.batch_size),
        guard,
        validation,
        checkpoints,
    ]
    # Where a run begins anew, the other processes may still see what the first one has removed.
    anew = config.resume == "restart" and not first_process()
    checkpoint, step = (None if anew else newest_checkpoint(folder / CHECKPOINTS)) or (None, 0)
    if checkpoint is not None:
        log.info("going on from %s: step %d of %d", checkpoint, step, module.total_steps)
    with training_loggers(config, folder, step, about, sweep_name()) as loggers:
        trainer = make_fit_trainer(t, o, watchers, loggers)
        run_fit(trainer, module, _data(config, photos), checkpoint)
    return validation.best


def _export(folder: Path, about: dict[str, Any], best: RetrievalNetwork, score: float, step: int) -> None:
    # The learned p becomes part of what the network says of itself.
    best.set_p(None)
    save_weights(best, folder / EXPORT, {**about, "val_map": score, "step": step})


def _data(config: TrainConfig, photos: TrainList) -> TrainingDataModule:
    d = config.data
    augment = Augment(d.crop, d.flip, d.jitter, reduced=d.reduced_decode)
    side = partial(image_size_in_epoch, d.image_size, d.stages)
    return TrainingDataModule(
        TrainingDataset(photos, augment, side, config.seed),
        config.optim.batch_size,
        config.trainer.accumulate,
        config.trainer.num_workers,
        config.seed,
    )


def image_size_in_epoch(image_size: int, stages: list[list[int]], epoch: int) -> int:
    """Side of the training photos in an epoch, counted from 0: the stages one after the other, then `image_size`."""
    for epochs, side in stages:
        if epoch < epochs:
            return side
        epoch -= epochs
    return image_size
