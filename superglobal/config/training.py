"""Settings of `train.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from superglobal.config.common import (
    SEEDS,
    TRAIN_LISTS,
    BackboneConfig,
    LoggerConfig,
    PathsConfig,
    PoolingOverrides,
    TrainerConfig,
    range_text,
    require_wandb,
    setting,
)
from superglobal.errors import InputError
from superglobal.models.heads import HEADS, validate_kind


@dataclass
class FitConfig(TrainerConfig):
    """Where and how training runs; these settings are not meant to change what is learned.

    Args:
        devices: number of devices per machine, list of their indices, or "auto" for all GPUs (one process on a CPU).
        num_nodes: number of machines.
        precision: "auto" is bf16-mixed on GPUs that support it, 16-mixed on other GPUs, and 32-true on CPUs.
        accumulate: number of parts in which a device computes its share of a batch, to save memory. It changes batch
            norm, CurricularFace's moving threshold and sampled classes (`head.negatives`), and nothing else.
        channels_last: use the memory layout in which convolutions are fastest.
        compile: compile the network with torch.compile, which takes minutes at the start and makes steps faster.
        deterministic: use only operations whose results are the same bit for bit on a GPU, which are slower.
        log_every: steps between two points of a curve; then the losses since the last one are checked to be finite.
        save_every_steps, save_every_minutes: how often a checkpoint is written, besides the end of every epoch; null
            for never.
    """

    devices: Any = "auto"
    num_nodes: int = setting(1, minimum=1)
    precision: str = setting("auto", choices=("auto", "32-true", "bf16-mixed", "16-mixed", "64-true"))
    accumulate: int = setting(1, minimum=1)
    channels_last: bool = True
    compile: bool = False
    deterministic: bool = False
    log_every: int = setting(50, minimum=1)
    save_every_steps: int | None = setting(None, minimum=1)
    save_every_minutes: float | None = setting(15, minimum=0)


@dataclass
class DataConfig:
    """A training set in GLDv2's layout (`conf/data`).

    Args:
        name: name of the set.
        role: always "train"; held-out landmarks are the validation set.
        root: folder of `table` and of `train/a/b/c/<id>.jpg`.
        table: training list.
        classes_of: use only landmarks that this list contains, too.
        leave_out: file of landmark ids, one per line, that are not used.
        tars: folder of the official tar files to read images from, in place of the folder tree.
        min_images: landmarks with fewer images are not used.
        max_corrupt_fraction: maximum fraction of images that may be missing or unreadable; others replace them.
        image_size: side of the square training images, in pixels.
        stages: other sides for the first epochs, as [epochs, side] pairs: [[8, 256], [4, 384]] is 256 px for eight
            epochs, 384 px for four, and then `image_size`.
        crop: smallest fraction of an image's area that a random crop covers.
        flip: mirror half of the images at random.
        jitter: strength of random changes of brightness, contrast and saturation.
        reduced_decode: decode a JPEG at 1/2, 1/4 or 1/8 of its size where its crop still has enough pixels.
    """

    name: str = MISSING
    role: str = setting("train", choices=("train",))
    root: str = "${paths.data}/gldv2"
    table: str = setting("train_clean.csv", choices=TRAIN_LISTS)
    classes_of: str | None = setting(None, choices=TRAIN_LISTS)
    leave_out: str | None = None
    tars: str | None = None
    min_images: int = setting(2, minimum=2)
    max_corrupt_fraction: float = setting(0.001, minimum=0, maximum=0.1)
    image_size: int = setting(512, minimum=1)
    stages: list[list[int]] = field(default_factory=list)
    crop: float = setting(0.3, minimum=0.001, maximum=1)
    flip: bool = True
    jitter: float = setting(0.2, minimum=0, maximum=1)
    reduced_decode: bool = True


@dataclass
class HeadConfig:
    """Margin head (`conf/head`): the classifier that the network is trained with.

    Args:
        kind: loss.
        scale: factor of every cosine.
        margin: in radians, up to pi/2; cosface: a difference of cosines, up to 1.
        dynamic_margin: arcface, cosface: margins from 0.05 (largest class) to 0.5 (smallest) in place of `margin`.
        easy_margin: arcface: no margin where the angle is above 90 degrees, in place of a linear continuation.
        centers: number of centers per class, of which the nearest counts.
        class_weights: weight images by 1 / log(1 + number of images of their class).
        negatives: fraction of the classes that a step compares with; it always includes those of the batch.
    """

    kind: str = setting("arcface", choices=HEADS)
    scale: float = setting(45.25, minimum=1, maximum=10000)
    margin: float = setting(0.15, minimum=0)
    dynamic_margin: bool = False
    easy_margin: bool = False
    centers: int = setting(1, minimum=1, maximum=100)
    class_weights: bool = False
    negatives: float = setting(1.0, minimum=1e-4, maximum=1)

    def validate(self) -> None:
        """Raise InputError for a margin that the kind of head does not have."""
        validate_kind(self.kind, self.dynamic_margin, self.easy_margin)
        limit = 1 if self.kind == "cosface" else math.pi / 2
        if self.margin > limit:
            raise InputError(f"head.margin={self.margin}: expected {range_text('a number', 0, limit)} for {self.kind}")


@dataclass
class ValidationConfig:
    """Retrieval during training: held-out landmarks select the best network; evaluation sets are only reported.

    Args:
        fraction: fraction of the landmarks that is held out.
        max_images: maximum number of images to validate on, in whole landmarks.
        max_side: shrink larger images to this longer side in pixels; null keeps their size.
        every_epochs: epochs between two validations; training always ends with one.
        every_steps: steps between two validations within an epoch; null for none.
        sets: evaluation sets in Revisited layout, as paths below `paths.data`; missing ones are skipped.
        patience: number of validations without a new best after which training stops; null for never.
    """

    fraction: float = setting(0.01, minimum=0, maximum=0.5)
    max_images: int = setting(2000, minimum=2)
    max_side: int | None = setting(1024, minimum=1)
    every_epochs: int = setting(1, minimum=1)
    every_steps: int | None = setting(None, minimum=1)
    sets: list[str] = field(default_factory=lambda: ["roxford5k", "rparis6k"])
    patience: int | None = setting(None, minimum=1)


@dataclass
class OptimConfig:
    """Optimizer (`conf/optim`) and its schedule by steps: linear warm-up, then cosine decay to zero.

    Args:
        name: "sgd" (with Nesterov momentum) or "adamw".
        lr: peak learning rate of the network.
        head_lr: factor of the learning rate for the head.
        weight_decay: of weights; biases, norms and GeM's p have none.
        momentum: of sgd.
        warmup: fraction of all steps.
        batch_size: images per step, over all devices together.
        epochs: number of passes over the images.
        clip: maximum norm of the gradient; null for no limit.
        ema: decay of the moving average of the network's weights, which is then validated and exported; null for none.
            It needs about 5 / (1 - ema) steps to forget the initial weights.
        batch_norm: "train"; "frozen" (statistics, scale and shift do not change); "sync" (statistics over all GPUs).
        freeze_backbone: train only pooling, whitening and head.
    """

    name: str = setting("sgd", choices=("sgd", "adamw"))
    lr: float = setting(0.01, minimum=0)
    head_lr: float = setting(1.0, minimum=0)
    weight_decay: float = setting(1e-4, minimum=0)
    momentum: float = setting(0.9, minimum=0, maximum=0.999)
    warmup: float = setting(0.05, minimum=0, maximum=0.9)
    batch_size: int = setting(64, minimum=2)
    epochs: int = setting(30, minimum=1)
    clip: float | None = setting(None, minimum=1e-9)
    ema: float | None = setting(None, minimum=0, maximum=0.999999)
    batch_norm: str = setting("train", choices=("train", "frozen", "sync"))
    freeze_backbone: bool = False


@dataclass
class TrainConfig:
    """Everything `train.py` takes.

    Args:
        name: name of the run; its folder is `<paths.outputs>/train/<name>`, where `eval.py name=` finds the export.
        weights: initial weights: "random", "timm", "package" or a path; null takes `backbone.weights`, or else "timm".
        dim: outputs of the whitening layer, that of the weights or a new one; 0 for none, null for that of the weights.
        resume: "auto" (from the newest checkpoint that loads) or "restart" (its checkpoints are removed).
        seed: of weights, order, augmentation and the choice of held-out landmarks.
    """

    name: str = "superglobal"
    data: DataConfig = field(default_factory=DataConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    weights: str | None = None
    pooling: PoolingOverrides = field(default_factory=PoolingOverrides)
    dim: int | None = setting(2048, minimum=0)
    head: HeadConfig = field(default_factory=HeadConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    trainer: FitConfig = field(default_factory=FitConfig)
    resume: str = setting("auto", choices=("auto", "restart"))
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    seed: int = setting(0, minimum=0, maximum=SEEDS - 1)

    def validate(self) -> None:
        """Check what depends on several settings.

        Raises:
            InputError: settings contradict each other, or a package is missing.
        """
        stages, optim = self.data.stages, self.optim
        if not self.name or Path(self.name).is_absolute() or ".." in Path(self.name).parts:
            raise InputError(f"name={self.name}: expected the name of a folder inside paths.outputs")
        if any(len(stage) != 2 or min(stage) < 1 for stage in stages):
            raise InputError(f"data.stages={stages}: expected [epochs, side] pairs, e.g. [[8,256],[4,384]]")
        if stages and sum(epochs for epochs, _ in stages) >= optim.epochs:
            raise InputError(f"data.stages={stages}: expected fewer epochs in all than optim.epochs={optim.epochs}")
        if optim.batch_size % self.trainer.accumulate:
            raise InputError(
                f"optim.batch_size={optim.batch_size}: expected a multiple of "
                f"trainer.accumulate={self.trainer.accumulate}"
            )
        self.head.validate()
        self.pooling.validate()
        self.logger.validate()
        require_wandb(self.logger)
