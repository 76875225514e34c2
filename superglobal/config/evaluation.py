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
        kind: "revisited" (`<root>/<name>/{jpg/,gnd_<name>.pkl}`), "folder" (own photos), "descriptors" (only the files
            of `descriptors.*`), or in GLDv2's layout "gldv2" (test images searched for in the index), "gldv2_val"
            (training photos of held-out landmarks) and "gldv2_recognition" (test images among training photos).
        name: of the set; names the results too.
        role: what its numbers are for: "test" (reported, nothing is chosen on it), "validation" (settings are chosen
            on it) or "train" (the network saw it).
        root: revisited kind: the folder that holds the set's own; gldv2 kinds: that of the lists.
        trained: the training run that `name` means by default on this set.
        crop_query: crop each query to its box, as the reference does; false is the un-cropped protocol.
        max_side: shrink larger images to this longer side in pixels; null leaves them.
        database, query: folder kind: where the photos are.
        labels: folder kind: the first-level sub-folder of a photo is its label, so that results can be scored.
        solution: gldv2 and gldv2_recognition: the version of the ground truth, or the path of its file.
        table: gldv2_val and gldv2_recognition: the training list, "train_clean.csv" or "train.csv".
        landmarks: gldv2_val: how many; a training that holds out as many (`validation.fraction`) saw none of them.
        seed: gldv2_val: that of the training.
        neighbours: gldv2_recognition: how many nearest training photos vote.
        votes: gldv2_recognition: "similarity" (a landmark's score is the sum of s over its photos among them),
            "distance" (of 2 s - 1) or "nearest" (the nearest photo alone); after reranking its scores take the place of
            the cosine s.
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
    solution: str = "v2.1"
    table: str = "train_clean.csv"
    landmarks: int = 800
    seed: int = 0
    neighbours: int = 3
    votes: str = "similarity"


@dataclass
class DistractorsConfig:
    """Images joined to the database (`conf/distractors`): `<root>/<name>/{jpg/,<name>.txt}`.

    Args:
        name: of their folder and list; null for none.
        root: folder of that folder.
        unreadable: what becomes of one that is missing or cannot be read: "error" ends the run, "skip" lists it in
            `skipped.txt` of its store and never ranks it.
        skip_budget: largest share of them that may be skipped.
    """

    name: str | None = None
    root: str = "${paths.data}"
    unreadable: str = "error"
    skip_budget: float = 0.001


@dataclass
class DescriptorsConfig:
    """Your own descriptors in place of extraction.

    Args:
        query, database: .npy files, (n, D) float, unit norm, in the order of the data set's lists.
    """

    query: str | None = None
    database: str | None = None


@dataclass
class ExtractionConfig:
    """How descriptors are extracted; only `precision` and `decoder` change them by more than rounding.

    Args:
        precision: of the backbone's weights and maps: "float32", "bfloat16", "float16", or "auto", which is float32 on
            every device until a measurement of mAP allows another; pooling is always in float32.
        decoder: of JPEG files: "cpu", or "gpu" to decode them on the CUDA device (nvJPEG), whose pixels differ a
            little, so that the descriptors are stored separately. Other formats, and files that are rotated or shrunk,
            are decoded on the CPU.
        batch_size: maximum number of images, all of one size, in a batch.
        batch_pixels: maximum number of pixels in a batch; null for what memory has room for.
        part: "3/16" extracts the third of 16 parts of the images and ends there, so that as many jobs can share the
            work; null for all images.
    """

    precision: str = "auto"
    decoder: str = "cpu"
    batch_size: int = 16
    batch_pixels: int | None = None
    part: str | None = None

    def share(self) -> tuple[int, int]:
        """(k, n), counted from 0, of `part`; ValueError if it is none."""
        k, n = map(int, (self.part or "1/1").split("/"))
        if not 1 <= k <= n:
            raise ValueError(self.part)
        return k - 1, n


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
        junk: "keep" reranks one list with junk in it, as SuperGlobal's code; "drop" a list for each protocol from which
            the images that it ignores are gone, as CVNet's. Scores tell the difference; lists and pictures do not.
        tuned_on: on which photos they were chosen, as in `PoolingSettings`.
    """

    enabled: bool = True
    kind: str = "superglobal"
    junk: str = "keep"
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


_NO_PARAMETERS = ("enabled", "kind", "junk", "tuned_on")


def rerank_parameters(rerank: RerankConfig) -> dict[str, Any]:
    """The parameters that are given, of whatever kind."""
    values = {f.name: getattr(rerank, f.name) for f in fields(rerank) if f.name not in _NO_PARAMETERS}
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
    """How the database is searched (`conf/index`); null is the kind's default, mostly by the database's size
    (retrieval/index_plan.py). What a kind does not take is refused.

    Args:
        kind: "flat" is exact; "flat_fp16", "ivf_flat", "ivf_pq" and "hnsw" are FAISS's indexes, built once and kept
            under `paths.stores`, whose candidates are scored exactly.
        backend: flat: "auto", "faiss" or "torch", with the same result.
        nlist, nprobe: lists of ivf_flat and ivf_pq, and how many are searched.
        pq_m: bytes a row of ivf_pq.
        M, ef_construction, ef_search: links of a row of hnsw, and the width of its searches.
        candidates: all but flat: rows fetched from the index for each one wanted.
        compare: all but flat: queries that are also searched exactly, for recall and the difference in mAP or mAP@100;
            100 by default, 0 for none.
    """

    kind: str = "flat"
    backend: str = "auto"
    nlist: int | None = None
    nprobe: int | None = None
    pq_m: int | None = None
    M: int | None = None
    ef_construction: int | None = None
    ef_search: int | None = None
    candidates: int | None = None
    compare: int | None = None


@dataclass
class StoreConfig:
    """Descriptors on disk.

    Args:
        dtype: "float32", or "float16" for half the size.
    """

    dtype: str = "float32"


@dataclass
class PicturesConfig:
    """The sheet of queries with their ranked results.

    Args:
        queries: shown, spread over the list; 0 for no sheet.
        ranks: results of each.
    """

    queries: int = 8
    ranks: int = 10


@dataclass
class EvalConfig:
    """Everything `eval.py` takes.

    Args:
        weights: path (of a shared model its folder), "hf:owner/name" of one on Hugging Face's hub, "timm", "package" or
            "random"; null takes the backbone's own setting, or else the export of the training run `name`.
        name: of a training run.
        scales: 1, 3, 5 or a list of factors; null for a shared model's own, and 3 elsewhere.
        antialias: filter when a scale shrinks the image; false is what the paper's runs had. null for a shared model's
            own, and false elsewhere.
        k: results kept per query (at least `rerank.M` and what the metric counts, at most the database).
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
    scales: Any = None
    antialias: bool | None = None
    extraction: ExtractionConfig = field(default_factory=ExtractionConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
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
