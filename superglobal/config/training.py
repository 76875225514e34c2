"""Define the settings of `train.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from superglobal.config.common import (
    RUN_NAME,
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
    """Devices, speed and checkpoints of a training run. These settings should not affect the accuracy of the network.

    Args:
        devices: number of devices per machine, a list of their indices, or "auto" for all GPUs (without a GPU, one
            process on the CPU).
        num_nodes: number of machines.
        precision: number type of the computation; "auto" is bf16-mixed on GPUs that support it, 16-mixed on other GPUs,
            and 32-true on CPUs.
        accumulate: number of micro-batches into which each device splits its share of a batch, to save memory. More
            than one changes the results only through batch norm, CurricularFace's moving threshold and the sampling of
            classes (`head.negatives`).
        channels_last: use the memory layout NHWC, in which convolutions are usually fastest.
        compile: compile the network with torch.compile; this takes minutes at the start, and then makes the steps
            faster.
        deterministic: use only operations that give bit-identical results on a GPU when repeated; they are slower.
        log_every: number of steps between two points of the logged curves. At each point, the run checks that all
            losses since the previous point are finite.
        save_every_steps: number of steps between two checkpoints within an epoch; null for no such checkpoints.
        save_every_minutes: minutes between two checkpoints within an epoch; null for no such checkpoints. A checkpoint
            is always written at the end of an epoch.
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
    """Training set in GLDv2's layout, or labeled images of your own (`conf/data`).

    Args:
        name: name of the training set.
        role: purpose of the set, always "train"; the held-out landmarks are the validation set.
        root: folder that contains the training list `table` and the images `train/a/b/c/<id>.jpg`, where a, b and c are
            the first three characters of the id. Without `table`, the folder of your images, which contains one
            sub-folder per class, or a CSV file with the columns path (relative to the folder of the file) and label.
        table: file name of the training list; null for images of your own.
        classes_of: second training list; only landmarks that both lists contain are used. null for no second list.
        leave_out: file with the ids of landmarks that are not used, one per line; null to use all landmarks.
        tars: folder of the official tar files, from which images are read instead of the folder `train/`; null reads
            from `train/`.
        min_images: minimum number of images per landmark; landmarks with fewer images are not used.
        max_corrupt_fraction: maximum fraction of images that may be missing or corrupt. Each of them is replaced by
            another image.
        image_size: side of the square training images, in pixels.
        stages: image sizes of the first epochs as [epochs, side] pairs: with [[8, 256], [4, 384]], eight epochs use
            256 px, four use 384 px, and the others use `image_size`.
        crop: smallest fraction of an image's area that a random crop covers.
        flip: mirror half of the images at random.
        jitter: strength of random changes of brightness, contrast and saturation.
        reduced_decode: decode a JPEG at 1/2, 1/4 or 1/8 of its size if the crop still has enough pixels.
    """

    name: str = MISSING
    role: str = setting("train", choices=("train",))
    root: str = "${paths.data}/gldv2"
    table: str | None = setting("train_clean.csv", choices=TRAIN_LISTS)
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

    def validate(self) -> None:
        """Raise InputError if the folder of your own images is missing, or a setting of GLDv2's layout is given."""
        if self.table is None and not self.root:
            raise InputError("data=folder: the image folder is missing; add data.root=FOLDER")
        for name in ("classes_of", "leave_out", "tars"):
            if self.table is None and (value := getattr(self, name)) is not None:
                raise InputError(f"data.{name}={value}: only for images in GLDv2's layout; remove this setting")


@dataclass
class HeadConfig:
    """Margin head (`conf/head`): the classifier that is trained together with the network.

    Args:
        kind: type of margin loss.
        scale: factor by which all cosines are multiplied.
        margin: margin of the correct class: for "cosface" a difference of cosines, up to 1; for the other kinds an
            angle in radians, up to pi/2.
        dynamic_margin: use a margin per class instead of `margin`, from 0.05 for the largest class to 0.5 for the
            smallest ("arcface" and "cosface" only).
        easy_margin: use no margin for images at 90 degrees or more from the center of their class. By default, the
            margin applies at all angles ("arcface" only).
        centers: number of centers per class; an image is compared with the nearest center of each class.
        class_weights: weight the loss of each image by 1 / log(1 + number of images of its class).
        negatives: fraction of all classes with which each step compares the images. The classes are chosen at random,
            but the classes of the images in the batch are always included.
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
        """Raise InputError if the kind of head does not support the margin settings."""
        validate_kind(self.kind, self.dynamic_margin, self.easy_margin)
        limit = 1 if self.kind == "cosface" else math.pi / 2
        if self.margin > limit:
            raise InputError(f"head.margin={self.margin}: expected {range_text('a number', 0, limit)} for {self.kind}")


@dataclass
class ValidationConfig:
    """Validation during training. The best network is chosen on held-out landmarks, never on evaluation sets.

    Args:
        fraction: fraction of the landmarks that is held out from training; null for a fifth of them, at least 2 and at
            most 50.
        max_images: maximum number of held-out images used for validation; a landmark is used with all of its images or
            not at all.
        max_side: images with a longer side above this number of pixels are shrunk to it; null keeps their size.
        every_epochs: number of epochs between two validations; training always ends with a validation.
        every_steps: number of steps between two additional validations within an epoch; null for none.
        sets: evaluation sets in the Revisited layout whose metrics are logged too, as paths relative to `paths.data`;
            missing sets are skipped.
        patience: number of validations without improvement after which training stops early; null to train for all
            epochs.
    """

    fraction: float | None = setting(0.01, minimum=0, maximum=0.5)
    max_images: int = setting(2000, minimum=2)
    max_side: int | None = setting(1024, minimum=1)
    every_epochs: int = setting(1, minimum=1)
    every_steps: int | None = setting(None, minimum=1)
    sets: list[str] = field(default_factory=lambda: ["roxford5k", "rparis6k"])
    patience: int | None = setting(None, minimum=1)


@dataclass
class OptimConfig:
    """Optimizer (`conf/optim`) and learning rate schedule: linear warm-up and cosine decay to zero, updated every step.

    Args:
        name: optimizer: "sgd" (with Nesterov momentum) or "adamw".
        lr: peak learning rate of the network.
        head_lr: factor by which the learning rate is multiplied for the head.
        weight_decay: weight decay; it is not applied to biases, normalization layers and GeM's p.
        momentum: momentum of "sgd".
        warmup: fraction of all steps during which the learning rate rises.
        batch_size: number of images per step, over all devices together.
        epochs: number of passes over the training images.
        clip: maximum norm of the gradient; null for no limit.
        ema: decay of the exponential moving average of the network's weights. The average is validated and exported
            instead of the weights, and takes about 5 / (1 - ema) steps to forget the initial weights. null for no
            average.
        batch_norm: mode of batch norm: "train", "frozen" (statistics, scale and shift do not change) or "sync"
            (statistics are computed over all GPUs).
        freeze_backbone: train only pooling, whitening layer and head.
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
    """Top-level settings of `train.py`.

    Args:
        name: name of the run. The folder of the run is `<paths.outputs>/train/<name>`. `eval.py name=<name>` loads the
            weights that the run exports to this folder.
        weights: initial weights: "random", "timm" (timm's pretrained weights), "package" (weights from a Python
            package) or the path of a weights file. null uses `backbone.weights`, or if that is null too, "timm".
        dim: number of outputs of the whitening layer. If the weights contain no whitening layer, a new one is created.
            0 for no whitening layer; null to use the layer in the weights, if any.
        resume: action if the folder of the run exists: "auto" resumes from the newest checkpoint that can be loaded;
            "restart" deletes the checkpoints and starts from the beginning.
        seed: seed of the initial weights, the order of the images, the augmentation and the choice of held-out
            landmarks.
    """

    name: str = setting("superglobal", name=RUN_NAME)
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
        """Check settings that depend on each other.

        Raises:
            InputError: settings contradict each other, or a package is missing.
        """
        stages, optim = self.data.stages, self.optim
        self.data.validate()
        if any(len(stage) != 2 or min(stage) < 1 for stage in stages):
            raise InputError(f"data.stages={stages}: expected [epochs, side] pairs, e.g. [[8,256],[4,384]]")
        if stages and sum(epochs for epochs, _ in stages) >= optim.epochs:
            raise InputError(
                f"data.stages={stages}: expected fewer epochs in total than optim.epochs={optim.epochs}; increase "
                "optim.epochs or shorten the stages"
            )
        if optim.batch_size % self.trainer.accumulate:
            raise InputError(
                f"optim.batch_size={optim.batch_size}: not divisible; expected a multiple of "
                f"trainer.accumulate={self.trainer.accumulate}"
            )
        self.head.validate()
        self.pooling.validate()
        self.logger.validate()
        require_wandb(self.logger)
