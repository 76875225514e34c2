"""Typed schemas of every setting, registered with Hydra: a wrong type or a typo ends the run with the choices.

Without them Hydra would take `pooling.regional=off` for the string "off", which is true.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from superglobal.errors import InputError
from superglobal.models.pooling import PoolingConfig

KINDS = ("revisited", "folder", "descriptors")


@dataclass
class DatasetConfig:
    """An evaluation set (`conf/dataset`).

    Args:
        kind: "revisited" (`<paths.data>/<name>/{jpg/,gnd_<name>.pkl}`), "folder" (own photos) or "descriptors"
            (only the files of `descriptors.*`).
        name: of the set; names the results too.
        crop_query: crop each query to its box, as the reference does; false is the un-cropped protocol.
        max_side: shrink larger images to this longer side in pixels; null leaves them.
        database, query: folder kind: where the photos are.
        labels: folder kind: the first-level sub-folder of a photo is its label, so that results can be scored.
    """

    kind: str = MISSING
    name: str = MISSING
    crop_query: bool = True
    max_side: int | None = None
    database: str | None = None
    query: str | None = None
    labels: bool = False


@dataclass
class DistractorsConfig:
    """A folder of images joined to the database (`conf/distractors`): `<paths.data>/<name>/{jpg/,<name>.txt}`."""

    name: str = MISSING


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
    """Where extraction runs (`conf/trainer`)."""

    accelerator: str = "auto"
    devices: Any = 1
    strategy: str = "auto"
    num_workers: int = 2
    progress: bool = True


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
        weights: path, "timm", "package" or "random"; null takes the backbone's own setting.
        scales: 1, 3, 5 or a list of factors.
        antialias: filter when a scale shrinks the image; off is what the paper's runs had.
        k: results kept per query (at least `rerank.M`, at most the database).
        ablation: name of the row, set by `conf/ablation`.
        seed: of the bootstrap and of random weights.
    """

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    distractors: DistractorsConfig | None = None
    descriptors: DescriptorsConfig = field(default_factory=DescriptorsConfig)
    backbone: BackboneConfig | None = None
    weights: str | None = None
    pooling: PoolingConfig = field(default_factory=PoolingConfig)
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


def register() -> None:
    """Make the schemas known to Hydra; called by the entry points before composing."""
    ConfigStore.instance().store(name="eval_schema", node=EvalConfig)


def validated(cfg: DictConfig) -> EvalConfig:
    """Composed configuration as typed objects.

    Raises:
        InputError: a setting is missing or out of its choices.
    """
    missing = sorted(str(key) for key in OmegaConf.missing_keys(cfg))
    if missing:
        raise InputError(
            f"missing settings: {', '.join(missing)}; give them on the command line, e.g. {missing[0]}=..."
        )
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, EvalConfig)
    choices = [("dataset.kind", config.dataset.kind, KINDS), ("index.backend", config.index.backend, BACKENDS)]
    for key, value, allowed in choices:
        if value not in allowed:
            raise InputError(f"{key}={value}: expected one of {', '.join(allowed)}")
    if config.k < 1 or (config.dataset.max_side is not None and config.dataset.max_side < 1):
        raise InputError("k and dataset.max_side must be positive")
    if (config.descriptors.query is None) != (config.descriptors.database is None):
        raise InputError("descriptors.query and descriptors.database go together: give both .npy files")
    if config.dataset.kind == "descriptors" and config.descriptors.query is None:
        raise InputError("dataset=descriptors needs descriptors.query=Q.npy descriptors.database=X.npy")
    return config


BACKENDS = ("auto", "faiss", "torch")
