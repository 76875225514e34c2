"""Typed schemas of every setting, registered with Hydra: a wrong type or a typo ends the run with the choices.

Without them Hydra would take `pooling.regional=off` for the string "off", which is true.
"""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from superglobal.models.pooling import PoolingConfig

PoolingSettings: Any = make_dataclass(
    "PoolingSettings",
    [(name, Any if hint is Any else hint | None, None) for name, hint in get_type_hints(PoolingConfig).items()],
)
"""`PoolingConfig` (`conf/pooling`) with every setting optional: null is what the weights file says."""


@dataclass
class DatasetConfig:
    """An evaluation set (`conf/dataset`).

    Args:
        kind: "revisited" (`<root>/<name>/{jpg/,gnd_<name>.pkl}`), "folder" (own photos) or "descriptors"
            (only the files of `descriptors.*`).
        name: of the set; names the results too.
        root: revisited kind: the folder that holds the set's own.
        trained: the training run that `name` means by default on this set.
        crop_query: crop each query to its box, as the reference does; false is the un-cropped protocol.
        max_side: shrink larger images to this longer side in pixels; null leaves them.
        database, query: folder kind: where the photos are.
        labels: folder kind: the first-level sub-folder of a photo is its label, so that results can be scored.
    """

    kind: str = MISSING
    name: str = MISSING
    root: str = "${paths.data}"
    trained: str = "superglobal"
    crop_query: bool = True
    max_side: int | None = None
    database: str | None = None
    query: str | None = None
    labels: bool = False


@dataclass
class DistractorsConfig:
    """Images joined to the database (`conf/distractors`): `<root>/<name>/{jpg/,<name>.txt}`; name null for none."""

    name: str | None = None
    root: str = "${paths.data}"


@dataclass
class DescriptorsConfig:
    """Your own descriptors in place of extraction: .npy files, (n, D) float, unit norm, in the order of the lists."""

    query: str | None = None
    database: str | None = None


@dataclass
class BackboneConfig:
    """A timm model (`conf/backbone`) and the weights it takes when `weights` is not given."""

    name: str = MISSING
    weights: str | None = None


@dataclass
class RerankConfig:
    """SuperGlobal reranking (`conf/rerank`): M images, K neighbours each, weighted by beta (method: section 3.3)."""

    enabled: bool = True
    M: int = 400
    K: int = 9
    beta: float = 0.15


@dataclass
class IndexConfig:
    """Exact search (`conf/index`): backend "auto", "faiss" or "torch"."""

    backend: str = "auto"


@dataclass
class TrainerConfig:
    """Where extraction and training run (`conf/trainer`); training logs every `log_every` steps."""

    accelerator: str = "auto"
    devices: Any = 1
    strategy: str = "auto"
    num_workers: int = 2
    progress: bool = True
    log_every: int = 10


@dataclass
class LoggerConfig:
    """Beside the CSV, which is always written: Weights & Biases (`conf/logger`)."""

    wandb: bool = True
    project: str = "superglobal"


@dataclass
class PicturesConfig:
    """The sheet of queries with their ranked results; 0 queries for none."""

    queries: int = 8
    ranks: int = 10


@dataclass
class PathsConfig:
    """Folders (`conf/paths`)."""

    data: str = "data"
    outputs: str = "outputs"
    stores: str = "${paths.outputs}/stores"


@dataclass
class EvalConfig:
    """Everything `eval.py` takes.

    Args:
        weights: path, "timm", "package" or "random"; null takes the backbone's own setting, or else the export of
            the training run `name`.
        name: of a training run.
        scales: 1, 3, 5 or a list of factors.
        antialias: filter when a scale shrinks the image; off is what the paper's runs had.
        k: results kept per query (at least `rerank.M`, at most the database).
        ablation: name of the row, set by `conf/ablation`.
        seed: of the bootstrap and of random weights.
    """

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    distractors: DistractorsConfig = field(default_factory=DistractorsConfig)
    descriptors: DescriptorsConfig = field(default_factory=DescriptorsConfig)
    backbone: BackboneConfig | None = None
    weights: str | None = None
    name: str = "${dataset.trained}"
    pooling: PoolingSettings = field(default_factory=PoolingSettings)
    scales: Any = 3
    antialias: bool = False
    index: IndexConfig = field(default_factory=IndexConfig)
    rerank: RerankConfig = field(default_factory=RerankConfig)
    k: int = 400
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    ablation: str | None = None
    seed: int = 0


@dataclass
class DataConfig:
    """A training set in GLDv2's layout (`conf/data`).

    Args:
        name: of the set.
        root: folder of `table` and of `train/a/b/c/<id>.jpg`.
        table: "train_clean.csv" or "train.csv".
        min_images: landmarks with fewer photos are left out.
        val_fraction: share of the landmarks that is held out for retrieval validation.
        val_images: most photos of them to validate on, in whole landmarks.
        val_max_side: larger ones are shrunk to this longer side, in pixels; null leaves them.
        image_size: side of the square that the network is trained on, in pixels.
        crop: smallest share of a photo's area that a random crop covers.
        jitter: strength of the changes of brightness, contrast and saturation.
    """

    name: str = MISSING
    root: str = "${paths.data}/gldv2"
    table: str = "train_clean.csv"
    min_images: int = 2
    val_fraction: float = 0.01
    val_images: int = 2000
    val_max_side: int | None = 1024
    image_size: int = 512
    crop: float = 0.3
    jitter: float = 0.2


@dataclass
class HeadConfig:
    """Margin head (`conf/head`): ArcFace's scale and margin (radians)."""

    scale: float = 45.25
    margin: float = 0.15


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
        batch_size: photos a step.
        epochs: times that the photos are gone through.
    """

    name: str = "sgd"
    lr: float = 0.01
    head_lr: float = 1.0
    weight_decay: float = 1e-4
    momentum: float = 0.9
    warmup: float = 0.05
    batch_size: int = 64
    epochs: int = 30


@dataclass
class TrainConfig:
    """Everything `train.py` takes.

    Args:
        name: of the run; its folder is `<paths.outputs>/train/<name>`, where `eval.py name=` finds the export.
        weights: where training starts: "random", "timm", "package" or a path; null takes the backbone's own setting, or
            else "timm".
        dim: outputs of the whitening layer, that of the weights or a new one; 0 for none, null for that of the weights.
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
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    seed: int = 0


def register() -> None:
    """Make the schemas known to Hydra; called by the entry points before composing."""
    ConfigStore.instance().store(name="eval_schema", node=EvalConfig)
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)


def pooling_overrides(settings: Any) -> dict[str, Any]:
    """The pooling settings that were given."""
    return {name: value for name, value in vars(settings).items() if value is not None}
