"""Typed schemas of every setting, registered with Hydra: a wrong type or a typo ends the run with the choices.

Without them Hydra would take `pooling.regional=off` for the string "off", which is true.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field, make_dataclass
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from superglobal.errors import InputError
from superglobal.models.network import make_scales
from superglobal.models.pooling import PoolingConfig, relup_mode
from superglobal.retrieval.report import LADDER, SWITCHES

KINDS = ("revisited", "folder", "descriptors")
BACKENDS = ("auto", "faiss", "torch")


PoolingSettings: Any = make_dataclass(
    "PoolingSettings",
    [(name, Any if hint is Any else hint | None, None) for name, hint in get_type_hints(PoolingConfig).items()],
)
"""`PoolingConfig` (`conf/pooling`) with every setting optional: null is what the weights file says."""


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


def register() -> None:
    """Make the schemas known to Hydra; called by the entry points before composing."""
    ConfigStore.instance().store(name="eval_schema", node=EvalConfig)


def validated(cfg: DictConfig) -> EvalConfig:
    """Composed configuration as typed objects.

    Raises:
        InputError: a setting is missing, out of its choices, or contradicts another.
    """
    missing = sorted(str(key) for key in OmegaConf.missing_keys(cfg))
    if missing:
        raise InputError(
            f"missing settings: {', '.join(missing)}; give them on the command line, e.g. {missing[0]}=..."
        )
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, EvalConfig)
    _check_choices(config)
    _check_ranges(config)
    _check_ablation(config)
    make_scales(config.scales)
    return config


def pooling_overrides(settings: Any) -> dict[str, Any]:
    """The pooling settings that were given."""
    return {name: value for name, value in vars(settings).items() if value is not None}


def _check_choices(config: EvalConfig) -> None:
    d, own = config.dataset, config.descriptors
    for key, value, allowed in (("dataset.kind", d.kind, KINDS), ("index.backend", config.index.backend, BACKENDS)):
        if value not in allowed:
            raise InputError(f"{key}={value}: expected one of {', '.join(allowed)}")
    if config.index.backend == "faiss" and importlib.util.find_spec("faiss") is None:
        raise InputError("index=faiss: FAISS is not installed; pip install faiss-cpu (or faiss-gpu), or index=torch")
    if d.kind == "folder" and not d.database:
        raise InputError("dataset=folder: dataset.database=FOLDER is missing")
    if (own.query is None) != (own.database is None):
        raise InputError("descriptors.query and descriptors.database go together: give both .npy files")
    if d.kind == "descriptors" and own.query is None:
        raise InputError("dataset=descriptors needs descriptors.query=Q.npy descriptors.database=X.npy")
    if d.kind == "descriptors" and config.distractors is not None:
        raise InputError("dataset=descriptors knows no images: put distractors into descriptors.database")
    if config.pooling.relup is not None:
        relup_mode(config.pooling.relup)


def _check_ranges(config: EvalConfig) -> None:
    at_least = {
        "k": (config.k, 1),
        "rerank.M": (config.rerank.M, 1),
        "rerank.K": (config.rerank.K, 1),
        "dataset.max_side": (config.dataset.max_side, 1),
        "trainer.num_workers": (config.trainer.num_workers, 0),
        "pictures.queries": (config.pictures.queries, 0),
        "pictures.ranks": (config.pictures.ranks, 1),
        "seed": (config.seed, 0),
    }
    for key, (value, least) in at_least.items():
        if value is not None and value < least:
            raise InputError(f"{key}={value}: expected at least {least}")
    if config.seed >= 2**63:
        raise InputError(f"seed={config.seed}: expected less than 2^63")
    if not math.isfinite(config.rerank.beta):
        raise InputError(f"rerank.beta={config.rerank.beta}: expected a finite number")


def _check_ablation(config: EvalConfig) -> None:
    """A row is what its name says, or its number would stand under a wrong name in every table."""
    if config.ablation is None:
        return
    if config.ablation not in LADDER:
        raise InputError(f"ablation={config.ablation}: expected one of {', '.join(LADDER)}")
    p = config.pooling
    found = (p.gem_plus, p.regional, p.scale, relup_mode(p.relup) != "off", config.rerank.enabled)
    for switch, wanted, value in zip(SWITCHES, LADDER[config.ablation], found, strict=True):
        if wanted != value:
            state = "on" if wanted else "off"
            raise InputError(f"ablation={config.ablation} means {switch} {state}; drop the ablation or the override")
