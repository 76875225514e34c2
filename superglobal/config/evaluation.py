"""Settings of `eval.py`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING

from superglobal.config.common import BackboneConfig, LoggerConfig, PathsConfig, PoolingSettings, TrainerConfig


@dataclass
class DatasetConfig:
    """An evaluation set (`conf/dataset`).

    Args:
        kind: "revisited" (`<root>/<name>/{jpg/,gnd_<name>.pkl}`), "folder" (own photos) or "descriptors"
            (only the files of `descriptors.*`).
        name: of the set; names the results too.
        role: what its numbers are for: "test" (reported, nothing is chosen on it), "validation" (settings are chosen
            on it) or "train" (the network saw it).
        root: revisited kind: the folder that holds the set's own.
        trained: the training run that `name` means by default on this set.
        crop_query: crop each query to its box, as the reference does; false is the un-cropped protocol.
        max_side: shrink larger images to this longer side in pixels; null leaves them.
        database, query: folder kind: where the photos are.
        labels: folder kind: the first-level sub-folder of a photo is its label, so that results can be scored.
    """

    kind: str = MISSING
    name: str = MISSING
    role: str = MISSING
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
class RerankConfig:
    """Reranking (`conf/rerank`), of one kind. null is the kind's default; what a kind does not take is refused.

    Args:
        enabled: false is no reranking.
        kind: "superglobal" (the paper's), "mutual", "kreciprocal" or "diffusion", which reorder a shortlist; "aqe"
            (query expansion) or "adba" (database augmentation), which search again.
        M: images in the shortlist.
        K, beta: superglobal, mutual: neighbours that refine a descriptor, and their weight per unit of similarity.
        second, include_query: superglobal: what the expanded query is compared with, "refined" (the authors' code) or
            "original" (the paper's text); whether the query joins the max.
        k_query: mutual: how near the query must be to an image that joins its expansion.
        k1, k2, lambda_: kreciprocal: mutual neighbours, neighbours averaged over, share of the first distance.
        kq, kd, gamma: diffusion: where the query starts, neighbours in the graph, power of a similarity.
        n: aqe, adba: neighbours that a descriptor is averaged with.
        alpha: diffusion: share that is passed on; aqe, adba: power of a similarity.
        tuned_on: on which photos they were chosen, as in `PoolingSettings`.
    """

    enabled: bool = True
    kind: str = "superglobal"
    M: int | None = None
    K: int | None = None
    beta: float | None = None
    second: str | None = None
    include_query: bool | None = None
    k_query: int | None = None
    k1: int | None = None
    k2: int | None = None
    lambda_: float | None = None
    kq: int | None = None
    kd: int | None = None
    gamma: float | None = None
    n: int | None = None
    alpha: float | None = None
    tuned_on: str | None = None


def rerank_parameters(rerank: RerankConfig) -> dict[str, Any]:
    """The parameters that are given, of whatever kind."""
    values = {f.name: getattr(rerank, f.name) for f in fields(rerank) if f.name not in ("enabled", "kind", "tuned_on")}
    return {name: value for name, value in values.items() if value is not None}


@dataclass
class StatisticsConfig:
    """What the searched database itself, without labels, takes out of all descriptors (`conf/statistics`).

    Args:
        kind: "none", "mean" (its mean is subtracted) or "whiten" (PCA whitening), before the search.
        dims: whiten: axes kept; null for all.
    """

    kind: str = "none"
    dims: int | None = None


@dataclass
class IndexConfig:
    """Exact search (`conf/index`): backend "auto", "faiss" or "torch"."""

    backend: str = "auto"


@dataclass
class PicturesConfig:
    """The sheet of queries with their ranked results; 0 queries for none."""

    queries: int = 8
    ranks: int = 10


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
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)
    rerank: RerankConfig = field(default_factory=RerankConfig)
    k: int = 400
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    ablation: str | None = None
    seed: int = 0


@dataclass
class CompareConfig(EvalConfig):
    """Everything `scripts/compare_rerankers.py` takes: what `eval.py` takes, and `rerankers` in place of `rerank`.

    Args:
        rerankers: options of `conf/rerank`, each with settings of its own behind it, such as "superglobal K=1"; the
            first is what the others are compared with.
    """

    rerankers: list[str] = field(default_factory=list)
