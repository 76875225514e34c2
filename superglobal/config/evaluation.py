"""Settings of `eval.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, make_dataclass
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
    require_within,
)
from superglobal.errors import InputError
from superglobal.metrics.gldv2 import VOTES
from superglobal.models.pooling import relup_mode
from superglobal.reporting.runs import ABLATIONS, MODULES
from superglobal.reranking.registry import RERANKERS, get_reranker
from superglobal.retrieval.ann_index import COMPARED, IndexConfig, validate_index
from superglobal.retrieval.store_files import DTYPES
from superglobal.retrieval.whitening import KINDS as WHITENING_KINDS
from superglobal.utils.precision import PRECISIONS, resolve_precision


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
        neighbors: gldv2_recognition: how many nearest training photos vote.
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
    neighbors: int = 3
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
        shard: "3/16" extracts the third of 16 shards of the images and stops, so that 16 jobs can split the work;
            null extracts all images.
    """

    precision: str = "auto"
    decoder: str = "cpu"
    batch_size: int = 16
    batch_pixels: int | None = None
    shard: str | None = None

    def parse_shard(self) -> tuple[int, int]:
        """Return (index, count) of `shard`, the index counted from 0.

        Raises:
            ValueError: `shard` is not of the form k/n with 1 <= k <= n.
        """
        k, n = map(int, (self.shard or "1/1").split("/"))
        if not 1 <= k <= n:
            raise ValueError(self.shard)
        return k - 1, n


_RERANK = """Reranking (`conf/rerank`) by one kind of reranker. null is the kind's default, in parentheses below. A
parameter that the kind does not have raises an error.

Args:
    enabled: false is no reranking.
    kind: {kinds}.
    junk: "keep" reranks one list with junk in it, as SuperGlobal's code does; "drop" reranks a list for each protocol
        from which the images that it ignores are removed, as CVNet's does. Only scores differ, not lists and figures.
{parameters}
    tuned_on: images on which the parameters were chosen, as in `PoolingSettings`.
"""
JUNK = ("keep", "drop")
_NO_PARAMETERS = ("enabled", "kind", "junk", "tuned_on")


def _make_rerank_config() -> Any:
    """Make `RerankConfig` from the parameters of all rerankers."""
    types: dict[str, set[type]] = {}
    words: dict[str, dict[str, list[str]]] = {}
    for reranker in RERANKERS.values():
        for name, parameter in reranker.parameters.items():
            types.setdefault(name, set()).add(type(parameter.default))
            users = words.setdefault(name, {}).setdefault(parameter.help, [])
            users.append(f"{reranker.name} ({str(parameter.default).lower()})")
    lines = [
        f"    {name}: " + "; ".join(f"{', '.join(users)}: {text}" for text, users in of_name.items())
        for name, of_name in words.items()
    ]
    kinds = "; ".join(f'"{reranker.name}": {reranker.help}' for reranker in RERANKERS.values())
    hints = {name: next(iter(of_name)) | None if len(of_name) == 1 else Any for name, of_name in types.items()}
    return make_dataclass(
        "RerankConfig",
        [
            ("enabled", bool, True),
            ("kind", str, "superglobal"),
            ("junk", str, "keep"),
            *((name, hint, None) for name, hint in hints.items()),
            ("tuned_on", str | None, None),
        ],
        namespace={"__doc__": _RERANK.format(kinds=kinds, parameters="\n".join(lines)), "__module__": __name__},
    )


RerankConfig: Any = _make_rerank_config()


def rerank_parameters(rerank: RerankConfig) -> dict[str, Any]:
    """Return the parameters that are set, of any kind."""
    values = {f.name: getattr(rerank, f.name) for f in fields(rerank) if f.name not in _NO_PARAMETERS}
    return {name: value for name, value in values.items() if value is not None}


@dataclass
class WhiteningConfig:
    """Transformation of all descriptors, fitted without labels on the searched database (`conf/whitening`).

    Args:
        kind: "none", "center" (subtract the mean of the database) or "pca" (PCA whitening), applied before the search.
        dims: pca: number of axes kept; null for all.
    """

    kind: str = "none"
    dims: int | None = None


@dataclass
class StoreConfig:
    """Descriptors on disk.

    Args:
        dtype: "float32", or "float16" for half the size.
    """

    dtype: str = "float32"


@dataclass
class FiguresConfig:
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
        ablation: name of the row, an option of `ablation=`.
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
    whitening: WhiteningConfig = field(default_factory=WhiteningConfig)
    rerank: RerankConfig = field(default_factory=RerankConfig)
    k: int = 400
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    figures: FiguresConfig = field(default_factory=FiguresConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    ablation: str | None = None
    seed: int = 0


@dataclass
class CompareConfig(EvalConfig):
    """Everything `superglobal compare-rerankers` takes: what `eval.py` takes, and `rerankers` in place of `rerank`.

    Args:
        rerankers: options of `conf/rerank`, each with settings of its own behind it, such as "superglobal K=1"; the
            first is what the others are compared with.
    """

    rerankers: list[str] = field(default_factory=list)


_KINDS = ("revisited", "folder", "descriptors", "gldv2", "gldv2_val", "gldv2_recognition")
_ROLES = ("train", "validation", "test")


def check_evaluation(config: EvalConfig) -> None:
    """Raise InputError for what `eval.py` and those like it could not do as told; complete what is left to defaults."""
    d, own = config.dataset, config.descriptors
    check_dataset(d)
    _check_index(config.index)
    require_choice("store.dtype", config.store.dtype, DTYPES)
    if (own.query is None) != (own.database is None):
        raise InputError("descriptors.query and descriptors.database go together: give both .npy files")
    if d.kind == "descriptors" and own.query is None:
        raise InputError("dataset=descriptors needs descriptors.query=Q.npy descriptors.database=X.npy")
    if d.kind == "descriptors" and config.distractors.name is not None:
        raise InputError("dataset=descriptors knows no images: put distractors into descriptors.database")
    if d.kind.startswith("gldv2") and config.distractors.name is not None:
        raise InputError(f"{d.name}: distractors={config.distractors.name}: GLDv2's sets have none; distractors=none")
    require_choice("distractors.unreadable", config.distractors.unreadable, ("error", "skip"))
    require_within({"distractors.skip_budget": (config.distractors.skip_budget, 0, 1)})
    _check_extraction(config.extraction, config.trainer.accelerator)
    _check_evaluation_ranges(config)
    _check_reranking(config)
    _check_ablation(config)
    if config.scales is not None:
        from superglobal.models.network import make_scales  # imports timm, which takes seconds

        make_scales(config.scales)


def _check_reranking(config: EvalConfig) -> None:
    """Reranking beside the data set and the index."""
    d = config.dataset
    if config.rerank.junk == "drop" and d.kind != "revisited":
        raise InputError(f"rerank.junk=drop: {d.name} has no junk; only Revisited sets have")
    M = config.rerank.M
    if d.kind == "gldv2_recognition" and config.rerank.enabled and M is not None and d.neighbors > M:
        raise InputError(
            f"dataset.neighbors={d.neighbors}, but reranking scores rerank.M={M} only; raise that, or rerank=none"
        )
    reranker = get_reranker(config.rerank.kind)
    distances = config.rerank.enabled and reranker.distances
    if d.kind == "gldv2_recognition" and distances and d.votes != "nearest":
        raise InputError(
            f"dataset.votes={d.votes}: rerank.kind={reranker.name} returns distances, of which sums have no meaning; "
            "use dataset.votes=nearest or another rerank="
        )
    if config.rerank.enabled and reranker.searches_again is not None and config.index.kind != "flat":
        raise InputError(
            f"rerank.kind={reranker.name} searches the whole database again, exactly, which cannot be compared with "
            f"the approximate lists of index={config.index.kind}; use index=flat"
        )


def _check_extraction(how: ExtractionConfig, accelerator: str) -> None:
    """Check choices and ranges; replace the precision "auto" by what it stands for, which results and stores record."""
    require_choice("extraction.precision", how.precision, ("auto", *PRECISIONS))
    require_choice("extraction.decoder", how.decoder, ("cpu", "gpu"))
    how.precision = resolve_precision(how.precision, accelerator)
    require_within(
        {
            "extraction.batch_size": (how.batch_size, 1, math.inf),
            "extraction.batch_pixels": (how.batch_pixels, 1, math.inf),
        }
    )
    try:
        how.parse_shard()
    except ValueError as error:
        raise InputError(f"extraction.shard={how.shard}: expected k/n with 1 <= k <= n, such as 3/16") from error


def _check_index(index: IndexConfig) -> None:
    """Check choices and ranges; put the kind's default of `compare` where it is null."""
    validate_index(index)
    index.compare = (0 if index.kind == "flat" else COMPARED) if index.compare is None else index.compare


def check_dataset(d: DatasetConfig) -> None:
    """Raise InputError for a set that cannot be."""
    require_choice("dataset.kind", d.kind, _KINDS)
    require_choice("dataset.role", d.role, _ROLES)
    if d.kind == "folder" and not d.database:
        raise InputError("dataset=folder: dataset.database=FOLDER is missing")
    require_choice("dataset.table", d.table, TABLES)
    require_choice("dataset.votes", d.votes, VOTES)
    require_within(
        {
            "dataset.max_side": (d.max_side, 1, math.inf),
            "dataset.landmarks": (d.landmarks, 1, math.inf),
            "dataset.seed": (d.seed, 0, 2**32 - 1),
            "dataset.neighbors": (d.neighbors, 1, math.inf),
        }
    )


def _check_evaluation_ranges(config: EvalConfig) -> None:
    require_within(
        {
            "k": (config.k, 1, math.inf),
            "statistics.dims": (config.whitening.dims, 1, math.inf),
            "trainer.num_workers": (config.trainer.num_workers, 0, math.inf),
            "figures.queries": (config.figures.queries, 0, math.inf),
            "figures.ranks": (config.figures.ranks, 1, math.inf),
            "seed": (config.seed, 0, 2**63 - 1),
        }
    )
    check_logger(config.logger)
    require_choice("statistics.kind", config.whitening.kind, WHITENING_KINDS)
    if config.whitening.dims is not None and config.whitening.kind != "pca":
        raise InputError(f"whitening.dims={config.whitening.dims}: only whitening=pca has axes")
    complete_rerank(config.rerank)


def complete_rerank(rerank: RerankConfig) -> None:
    """Put the kind's defaults where parameters are null.

    Raises:
        InputError: a parameter that the kind does not have, or one out of range.
    """
    reranker = get_reranker(rerank.kind)
    for key, value in reranker.complete(rerank_parameters(rerank), "rerank.").items():
        setattr(rerank, key, value)
    require_choice("rerank.junk", rerank.junk, JUNK)
    if rerank.junk == "drop" and reranker.searches_again is not None:
        raise InputError(
            f"rerank.junk=drop: {rerank.kind} searches the whole database again and has no shortlist; use "
            "rerank.junk=keep"
        )


def _check_ablation(config: EvalConfig) -> None:
    """A row is what its name says, or its number would stand under a wrong name in every table."""
    if config.ablation is None:
        return
    if config.ablation not in ABLATIONS:
        raise InputError(f"ablation={config.ablation}: expected one of {', '.join(ABLATIONS)}")
    p = config.pooling
    found = (p.gem_plus, p.regional, p.scale, relup_mode(p.relup) != "off", config.rerank.enabled)
    for switch, wanted, value in zip(MODULES, ABLATIONS[config.ablation], found, strict=True):
        if wanted != value:
            state = "on" if wanted else "off"
            raise InputError(f"ablation={config.ablation} means {switch} {state}; drop the ablation or the override")
    if config.rerank.enabled and config.rerank.kind != "superglobal":
        raise InputError(
            f"ablation={config.ablation} means the paper's reranking; drop it, or rerank={config.rerank.kind}"
        )
