"""Train a network on images of landmarks, and export the weights with the best mAP on held-out landmarks."""

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
from superglobal.data.image_checks import CHECKED_IMAGES
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
from superglobal.training.run_dir import CHECKPOINTS, finish_run, finished_score, lock_run, start_run
from superglobal.training.trainer import make_fit_trainer, run_fit, sweep_name
from superglobal.training.validation import RetrievalValidation
from superglobal.utils.distributed import first_process
from superglobal.utils.io import CORRUPT_IMAGES, EXPORT
from superglobal.utils.provenance import git_state, versions

log = logging.getLogger(__name__)


def train(cfg: DictConfig, folder: Path) -> float:
    """Train a network, validate it by retrieval, and export the weights with the best validation mAP.

    Args:
        cfg: composed `TrainConfig`.
        folder: run directory, where `best.safetensors` is exported. A finished run with the same settings, weights and
            images is not repeated; an unfinished run is resumed from its newest checkpoint.

    Returns:
        The best validation mAP, in 0..1, in all processes.

    Raises:
        InputError: inputs are missing or invalid, the folder contains another run or is in use, or the training failed.
    """
    config = validate_config(cfg, TrainConfig)
    first = first_process()
    if not first:
        logging.getLogger("superglobal").setLevel(logging.WARNING)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    training, held_out = _training_lists(config)
    network = _load_network(config)
    # Creating a Trainer and `EpochBatches` validates the settings of Lightning and the batch size. Invalid settings
    # therefore raise an error before any file is written.
    world = make_fit_trainer(config.trainer, config.optim, [], []).world_size
    EpochBatches(len(training), config.optim.batch_size, config.seed, config.trainer.accumulate, world=world)
    # Only the first process checks the images. All other processes are started by the first process later, or wait for
    # it.
    corrupt: list[CorruptImages] = [[], []]
    record: dict[str, Any] = {}
    codes = np.zeros(0, np.uint64)
    if first:
        d = config.data
        cache = Path(config.paths.stores) / CHECKED_IMAGES
        lists = [training, held_out]
        corrupt, codes = check_training_images(lists, d.root, d.table, d.tars, d.max_corrupt_fraction, cache)
        record = _record(config, network, training, held_out)
    with lock_run(folder) if first else nullcontext():
        done = start_run(folder, record, codes, config.resume == "restart") if first else finished_score(folder)
        if done is not None:
            log.info("already trained, validation mAP %.4f: %s (remove the folder to train again)", done, folder)
            return done
        score = _fit(config, folder, network, training, held_out, corrupt, record)
        if first and not (folder / EXPORT).is_file():
            raise InputError(
                f"{folder / EXPORT}: not found; it contained the best network before the training was interrupted. "
                "Set resume=restart to train again"
            )
        if first:
            finish_run(folder, score)
            log.info("best validation mAP %.4f; exported: %s", score, folder / EXPORT)
    return score


def _training_lists(config: TrainConfig) -> tuple[TrainList, TrainList]:
    """Return the list of training images and the list of held-out images, which have different landmarks.

    Raises:
        InputError: a file that lists the images is missing or invalid, or one of the two lists has fewer than two
            landmarks.
    """
    d, fraction = config.data, config.validation.fraction
    listed = read_train(d.root, d.table, d.min_images, d.classes_of, d.leave_out, d.tars)
    training, held_out = split_landmarks(listed, fraction, config.seed)
    landmarks = len(training.landmarks), len(held_out.landmarks)
    if min(landmarks) < 2:
        fix = f"{'raise' if landmarks[1] < 2 else 'lower'} validation.fraction"
        raise InputError(
            f"validation.fraction={'null' if fraction is None else fraction}: {landmarks[0]} landmarks for training, "
            f"{landmarks[1]} for validation, expected at least 2 each; {'add landmarks' if fraction is None else fix}"
        )
    log.info("training: %d images of %d landmarks", len(training), landmarks[0])
    log.info("validation: %d held-out images of %d landmarks", len(held_out), landmarks[1])
    return training, held_out


def _load_network(config: TrainConfig) -> RetrievalNetwork:
    """Load the network to train. Raises InputError if the training settings are incompatible with it."""
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
            raise InputError(f"{setting}: expected at least {network.min_side()} px for this backbone and pooling")
    if config.optim.batch_norm == "sync":
        if not torch.cuda.is_available():
            raise InputError("optim.batch_norm=sync: expected GPUs; use train or frozen")
        # timm's batch norm layers include an activation function. torch's own conversion would drop it.
        network = timm.layers.convert_sync_batchnorm(network)
    return network


def _record(config: TrainConfig, network: RetrievalNetwork, training: TrainList, held_out: TrainList) -> dict[str, Any]:
    """Return the record of a training run, as JSON types.

    The entry "identity" contains the settings, the initial network and digests of the image lists. A run can be resumed
    only if its identity has not changed.
    """
    settings = asdict(config)
    # A resumed run may use another device or other paths, so these settings are left out. The settings of the network
    # are left out because `network.identity` contains them.
    for name in ("paths", "logger", "trainer", "name", "pooling", "backbone", "weights", "dim", "resume"):
        del settings[name]
    for name in ("role", "root", "tars", "max_corrupt_fraction"):
        del settings["data"][name]
    del settings["validation"]["sets"]
    lists = [training.digest(), held_out.digest()]
    identity = {"settings": settings, "start": network.identity(), "images": lists}
    return {
        "identity": json.loads(json.dumps(identity, default=str)),
        "root": config.data.root,
        "tars": config.data.tars,
        "trainer": asdict(config.trainer),
        "versions": versions(),
        "git": git_state(),
    }


def _validation_sets(config: TrainConfig) -> list[EvaluationSet]:
    """Return the evaluation sets in `validation.sets` whose ground truth is on disk.

    Raises:
        InputError: an image is missing or unreadable; only the first process checks the images.
    """
    sets, first = [], first_process()
    for name in config.validation.sets:
        folder = Path(config.paths.data) / name
        if (folder / f"gnd_{folder.name}.pkl").is_file():
            sets.append(revisited_set(folder.parent, folder.name))
        elif first:
            # These two benchmarks are the default. Many users have not downloaded them and need no warning.
            level = logging.INFO if name in ("roxford5k", "rparis6k") else logging.WARNING
            log.log(level, "validation.sets: skipped %s, not found", folder / f"gnd_{folder.name}.pkl")
    if first:
        images = [(dataset, "queries", dataset.queries) for dataset in sets]
        images += [(dataset, "database", dataset.database) for dataset in sets]
        named = [(f"{dataset.name} {title}", items, dataset.how_to_get) for dataset, title, items in images]
        require_images(named, cache=Path(config.paths.stores) / CHECKED_IMAGES)
    return sets


def _fit(
    config: TrainConfig,
    folder: Path,
    network: RetrievalNetwork,
    training: TrainList,
    held_out: TrainList,
    corrupt: list[CorruptImages],
    record: dict[str, Any],
) -> float:
    """Train a network in place, export it after each new best validation, and return the best validation mAP.

    Args:
        config: settings of the training run.
        folder: run directory.
        network: initial network.
        training: training images.
        held_out: images for validation.
        corrupt: corrupt images in `training` and in `held_out`, by index.
        record: record of the run, which the exported file also contains.
    """
    o, t = config.optim, config.trainer
    steps = EpochBatches(len(training), o.batch_size, config.seed, t.accumulate).steps
    counts = np.bincount(training.labels, minlength=len(training.landmarks))
    head = make_head(dim=network.dim, counts=counts, **asdict(config.head))
    module = TrainingModule(network, head, o, o.epochs * steps, training.landmarks, t)
    lists = [
        CorruptImageList(
            folder / CORRUPT_IMAGES, len(training) + len(held_out), config.data.max_corrupt_fraction, part.location
        )
        for part in (training, held_out)
    ]
    for images, pairs in zip(lists, corrupt, strict=True):
        images.add(pairs)
    every = min(t.log_every, steps)
    guard = NonFiniteGuard(every, folder, training.location)
    checkpoints = CheckpointCallback(folder / CHECKPOINTS, t.save_every_steps, t.save_every_minutes, guard)
    exclude = [index for index, _ in corrupt[1]]
    validation = RetrievalValidation(
        HeldOutDataset(held_out, config.validation.max_images, config.validation.max_side, config.seed, exclude),
        lists[1],
        every_epochs=config.validation.every_epochs,
        every_steps=config.validation.every_steps,
        sets=_validation_sets(config),
        patience=config.validation.patience,
        export=partial(_export, folder, record),
        num_workers=t.num_workers,
        asked_to_stop=lambda: checkpoints.asked_to_stop,
    )
    callbacks: list[Callback] = [StepSeed(config.seed), CorruptImageCallback(lists[0])]
    callbacks += [CurveLogger(every, o.batch_size), guard, validation, checkpoints]
    # With resume=restart, the first process removes all checkpoints. Other processes do not look for checkpoints,
    # because they could find one that is about to be removed.
    ignore = config.resume == "restart" and not first_process()
    checkpoint, step = (None if ignore else newest_checkpoint(folder / CHECKPOINTS)) or (None, 0)
    if checkpoint is not None:
        log.info("resuming from %s: step %d/%d", checkpoint, step, module.total_steps)
    with training_loggers(config, folder, step, record, sweep_name()) as loggers:
        trainer = make_fit_trainer(t, o, callbacks, loggers)
        run_fit(trainer, module, _data(config, training), checkpoint)
    return validation.best


def _export(folder: Path, record: dict[str, Any], best: RetrievalNetwork, score: float, step: int) -> None:
    """Save a network to the file `EXPORT` in the directory of a run.

    Args:
        folder: run directory.
        record: record of the run; stored in the file.
        best: network to save.
        score: validation mAP of the network, in 0..1; stored in the file.
        step: step at which the network was validated; stored in the file.
    """
    best.set_p(None)  # stores the learned p in the configuration of the network
    save_weights(best, folder / EXPORT, {**record, "val_map": score, "step": step})


def _data(config: TrainConfig, training: TrainList) -> TrainingDataModule:
    """Create the data module for the training images."""
    d = config.data
    augment = Augment(d.crop, d.flip, d.jitter, reduced=d.reduced_decode)
    side = partial(image_size_in_epoch, d.image_size, d.stages)
    dataset = TrainingDataset(training, augment, side, config.seed)
    return TrainingDataModule(
        dataset, config.optim.batch_size, config.trainer.accumulate, config.trainer.num_workers, config.seed
    )


def image_size_in_epoch(image_size: int, stages: list[list[int]], epoch: int) -> int:
    """Return the side of the square training images in an epoch, in pixels.

    Args:
        image_size: side after the last stage.
        stages: [number of epochs, side in pixels] of each stage, in order.
        epoch: number of the epoch, starting at 0.
    """
    for epochs, side in stages:
        if epoch < epochs:
            return side
        epoch -= epochs
    return image_size
