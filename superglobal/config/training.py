"""Settings of `train.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from superglobal.config.common import (
    TABLES,
    BackboneConfig,
    LoggerConfig,
    PathsConfig,
    PoolingSettings,
    TrainerConfig,
    check_logger,
    require_choice,
    require_wandb,
    require_within,
)
from superglobal.errors import InputError
from superglobal.models.heads import validate_kind


@dataclass
class FitConfig(TrainerConfig):
    """Where and how training runs; nothing here is meant to change what is learnt.

    Args:
        devices: a number per machine, a list of indices, or "auto" for all GPUs (one process on a CPU).
        num_nodes: machines.
        precision: "32-true", "bf16-mixed", "16-mixed", "64-true", or "auto" (bf16-mixed on GPUs that have it, 16-mixed
            on other GPUs, 32-true on CPUs).
        accumulate: parts in which a device goes through its share of a batch, to save memory. Batch norm,
            CurricularFace's moving threshold and sampled classes (`head.negatives`) tell the difference, nothing else.
        channels_last: memory layout in which convolutions are fastest.
        compile: compile the network with torch.compile: minutes at the start, faster steps.
        deterministic: let torch and cuDNN use only what gives the same results bit for bit on a GPU, slower.
        log_every: steps between two points of a curve; every loss in between is checked for being a number then.
        save_every_steps, save_every_minutes: how often a checkpoint is written, besides the end of every epoch; null
            for never.
    """

    devices: Any = "auto"
    num_nodes: int = 1
    precision: str = "auto"
    accumulate: int = 1
    channels_last: bool = True
    compile: bool = False
    deterministic: bool = False
    log_every: int = 50
    save_every_steps: int | None = None
    save_every_minutes: float | None = 15


@dataclass
class DataConfig:
    """A training set in GLDv2's layout (`conf/data`).

    Args:
        name: of the set.
        role: always "train"; its held-out landmarks are the validation set.
        root: folder of `table` and of `train/a/b/c/<id>.jpg`.
        table: "train_clean.csv" or "train.csv".
        classes_of: another list; only landmarks that it has too count.
        leave_out: file of landmark ids, one a line, that do not count.
        tars: folder of the official tar files to read the photos from, in place of the tree.
        min_images: landmarks with fewer photos are left out.
        max_corrupt: maximum fraction of images that may be missing or unreadable; others replace them.
        image_size: side of the square that the network is trained on, in pixels.
        stages: other sides for first epochs, as [epochs, side] pairs: [[8, 256], [4, 384]] is 256 px for eight epochs,
            384 px for four, and then image_size.
        crop: smallest share of a photo's area that a random crop covers.
        flip: mirror every other photo.
        jitter: strength of the changes of brightness, contrast and saturation.
        reduced_decode: decode a JPEG at 1/2, 1/4 or 1/8 of its size where its crop still has enough pixels.
    """

    name: str = MISSING
    role: str = "train"
    root: str = "${paths.data}/gldv2"
    table: str = "train_clean.csv"
    classes_of: str | None = None
    leave_out: str | None = None
    tars: str | None = None
    min_images: int = 2
    max_corrupt: float = 0.001
    image_size: int = 512
    stages: list[list[int]] = field(default_factory=list)
    crop: float = 0.3
    flip: bool = True
    jitter: float = 0.2
    reduced_decode: bool = True


@dataclass
class HeadConfig:
    """Margin head (`conf/head`), the classifier that a network is trained through.

    Args:
        kind: "arcface", "cosface" or "curricularface".
        scale: multiplies every cosine.
        margin: radians; of cosface a difference of cosines.
        dynamic_margin: margins of 0.05 (largest class) to 0.5 (smallest) instead of `margin`; arcface and cosface only.
        easy_margin: no margin where the angle is above 90 degrees, instead of a straight continuation; arcface only.
        centers: of each class, the nearest counts.
        class_weights: weigh photos by 1 / log(1 + photos of their class).
        negatives: share of the classes that a step compares with, always those of the batch among them.
    """

    kind: str = "arcface"
    scale: float = 45.25
    margin: float = 0.15
    dynamic_margin: bool = False
    easy_margin: bool = False
    centers: int = 1
    class_weights: bool = False
    negatives: float = 1.0


@dataclass
class ValidationConfig:
    """Retrieval during training: held-out landmarks decide which network is the best, evaluation sets only watch.

    Args:
        fraction: share of the landmarks that is held out.
        max_images: maximum number of images to validate on, in whole landmarks.
        max_side: larger photos are shrunk to this longer side, in pixels; null leaves them.
        every_epochs: epochs between two validations; the end of training always has one.
        every_steps: steps between two validations within an epoch; null for none.
        sets: evaluation sets in Revisited layout, as paths below `paths.data`; those that are not there are left out.
        patience: validations without a new best after which training stops; null for never.
    """

    fraction: float = 0.01
    max_images: int = 2000
    max_side: int | None = 1024
    every_epochs: int = 1
    every_steps: int | None = None
    sets: list[str] = field(default_factory=lambda: ["roxford5k", "rparis6k"])
    patience: int | None = None


@dataclass
class OptimConfig:
    """Optimiser (`conf/optim`) and its schedule by steps: linear warm-up, then cosine to zero.

    Args:
        name: "sgd" (Nesterov) or "adamw".
        lr: peak learning rate of the network.
        head_lr: factor on it for the head.
        weight_decay: of weights; biases, norms and GeM's p have none.
        momentum: of sgd.
        warmup: share of all steps.
        batch_size: photos a step, over all devices together.
        epochs: times that the photos are gone through.
        clip: gradients longer than this are shortened to it; null for no limit.
        ema: decay of the moving average of the network's weights, which is then what is validated and exported; null
            for none. It needs some 5 / (1 - ema) steps to forget the beginning.
        batch_norm: "train"; "frozen" (statistics, scale and shift stay); "sync" (statistics over all GPUs).
        freeze_backbone: train pooling, whitening and head alone.
    """

    name: str = "sgd"
    lr: float = 0.01
    head_lr: float = 1.0
    weight_decay: float = 1e-4
    momentum: float = 0.9
    warmup: float = 0.05
    batch_size: int = 64
    epochs: int = 30
    clip: float | None = None
    ema: float | None = None
    batch_norm: str = "train"
    freeze_backbone: bool = False


@dataclass
class TrainConfig:
    """Everything `train.py` takes.

    Args:
        name: of the run; its folder is `<paths.outputs>/train/<name>`, where `eval.py name=` finds the export.
        weights: where training starts: "random", "timm", "package" or a path; null takes the backbone's own setting, or
            else "timm".
        dim: outputs of the whitening layer, that of the weights or a new one; 0 for none, null for that of the weights.
        resume: "auto" (from the newest checkpoint that loads) or "restart" (its checkpoints are removed).
        seed: of weights, order, augmentation and the choice of held-out landmarks.
    """

    name: str = "superglobal"
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    weights: str | None = None
    pooling: PoolingSettings = field(default_factory=PoolingSettings)
    dim: int | None = 2048
    head: HeadConfig = field(default_factory=HeadConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    trainer: FitConfig = field(default_factory=FitConfig)
    resume: str = "auto"
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    seed: int = 0


_OPTIMISERS = ("sgd", "adamw")
_PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "64-true")
_BATCH_NORMS = ("train", "frozen", "sync")


def check_training(config: TrainConfig) -> None:
    """Raise InputError for what `train.py` could not do as told."""
    d, o, t, v = config.data, config.optim, config.trainer, config.validation
    require_choice("data.role", d.role, ("train",))
    require_choice("data.table", d.table, TABLES)
    if d.classes_of is not None:
        require_choice("data.classes_of", d.classes_of, TABLES)
    require_choice("optim.name", o.name, _OPTIMISERS)
    require_choice("optim.batch_norm", o.batch_norm, _BATCH_NORMS)
    require_choice("trainer.precision", t.precision, _PRECISIONS)
    require_choice("resume", config.resume, ("auto", "restart"))
    if not config.name or Path(config.name).is_absolute() or ".." in Path(config.name).parts:
        raise InputError(f"name={config.name}: expected the name of a folder inside paths.outputs")
    require_within(
        {
            "data.min_images": (d.min_images, 2, math.inf),
            "data.max_corrupt": (d.max_corrupt, 0, 0.1),
            "data.image_size": (d.image_size, 1, math.inf),
            "data.crop": (d.crop, 0.001, 1),
            "data.jitter": (d.jitter, 0, 1),
            "dim": (config.dim, 0, math.inf),
            "optim.lr": (o.lr, 0, 1e9),
            "optim.head_lr": (o.head_lr, 0, 1e6),
            "optim.weight_decay": (o.weight_decay, 0, 1e6),
            "optim.momentum": (o.momentum, 0, 0.999),
            "optim.warmup": (o.warmup, 0, 0.9),
            "optim.batch_size": (o.batch_size, 2, math.inf),
            "optim.epochs": (o.epochs, 1, math.inf),
            "optim.clip": (o.clip, 1e-9, 1e9),
            "optim.ema": (o.ema, 0, 0.999999),
            "validation.fraction": (v.fraction, 0, 0.5),
            "validation.max_images": (v.max_images, 2, math.inf),
            "validation.max_side": (v.max_side, 1, math.inf),
            "validation.every_epochs": (v.every_epochs, 1, math.inf),
            "validation.every_steps": (v.every_steps, 1, math.inf),
            "validation.patience": (v.patience, 1, math.inf),
            "trainer.num_nodes": (t.num_nodes, 1, math.inf),
            "trainer.num_workers": (t.num_workers, 0, math.inf),
            "trainer.accumulate": (t.accumulate, 1, math.inf),
            "trainer.log_every": (t.log_every, 1, math.inf),
            "trainer.save_every_steps": (t.save_every_steps, 1, math.inf),
            "trainer.save_every_minutes": (t.save_every_minutes, 0, math.inf),
            "seed": (config.seed, 0, 2**32 - 1),
        }
    )
    for stage in d.stages:
        if len(stage) != 2 or min(stage) < 1:
            raise InputError(f"data.stages={d.stages}: expected [epochs, side] pairs, e.g. [[8,256],[4,384]]")
    if d.stages and sum(epochs for epochs, _ in d.stages) >= o.epochs:
        raise InputError(f"data.stages={d.stages} leaves no epoch of optim.epochs={o.epochs} to data.image_size")
    if o.batch_size % t.accumulate:
        raise InputError(f"optim.batch_size={o.batch_size} is no multiple of trainer.accumulate={t.accumulate}")
    _check_head(config.head)
    check_logger(config.logger)
    require_wandb(config.logger)


def _check_head(head: HeadConfig) -> None:
    validate_kind(head.kind, head.dynamic_margin, head.easy_margin)
    require_within(
        {
            "head.scale": (head.scale, 1, 1e4),
            "head.margin": (head.margin, 0, 1 if head.kind == "cosface" else math.pi / 2),
            "head.centers": (head.centers, 1, 100),
            "head.negatives": (head.negatives, 1e-4, 1),
        }
    )
