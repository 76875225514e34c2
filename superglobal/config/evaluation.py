"""Settings of `eval.py` and of the commands that share them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_type_hints

from omegaconf import MISSING

from superglobal.config.common import (
    SEEDS,
    TRAIN_LISTS,
    BackboneConfig,
    LoggerConfig,
    PathsConfig,
    PoolingOverrides,
    TrainerConfig,
    setting,
)
from superglobal.config.help import describe_arguments
from superglobal.data.evaluation_set import loaders
from superglobal.errors import InputError
from superglobal.metrics.gldv2 import VOTES
from superglobal.models.pooling import relup_mode
from superglobal.reporting.ablations import ABLATIONS, MODULES
from superglobal.reranking.registry import RERANKERS, get_reranker
from superglobal.retrieval.ann_index import COMPARED, IndexConfig, validate_index
from superglobal.retrieval.store_files import DTYPES
from superglobal.retrieval.whitening import KINDS as WHITENING_KINDS
from superglobal.utils.precision import PRECISIONS, resolve_precision

_LOADER_LIMITS: dict[str, dict[str, Any]] = {
    "table": {"choices": TRAIN_LISTS},
    "landmarks": {"minimum": 1},
    "seed": {"minimum": 0, "maximum": SEEDS - 1},
    "neighbors": {"minimum": 1},
    "votes": {"choices": VOTES},
}


def _make_loader_settings() -> Any:
    """Make a dataclass of the arguments of all loaders of evaluation sets, apart from `name` and `root`."""
    settings: dict[str, tuple[str, Any, Any]] = {}
    descriptions: dict[str, dict[str, list[str]]] = {}
    for kind, loader in loaders().items():
        words, hints = describe_arguments(loader), get_type_hints(loader)
        for name, parameter in inspect.signature(loader).parameters.items():
            if name in ("name", "root"):
                continue
            required = parameter.default is parameter.empty
            hint, default = _setting_type(hints[name], required), None if required else parameter.default
            _, known, value = settings.setdefault(name, (name, hint, setting(default, **_LOADER_LIMITS.get(name, {}))))
            if (known, value.default) != (hint, default):
                raise InputError(
                    f"dataset.{name}: the loader of dataset.kind={kind} gives it another type or default than an "
                    "earlier loader; rename it"
                )
            descriptions.setdefault(name, {}).setdefault(words[name], []).append(kind)
    lines = [
        f"    {name}: " + " ".join(f"{', '.join(kinds)}: {text}" for text, kinds in of_name.items())
        for name, of_name in descriptions.items()
    ]
    doc = "\n".join(["Settings of the loaders of evaluation sets.", "", "Args:", *lines])
    return make_dataclass("LoaderSettings", settings.values(), namespace={"__doc__": doc})


def _setting_type(hint: Any, required: bool) -> Any:
    """Return the type of the setting of an argument: paths are texts, and null stands for a missing argument."""
    types = [member for member in get_args(hint) or (hint,) if member is not Path]
    return Union[(*types, *([type(None)] if required else []))]


LoaderSettings: Any = _make_loader_settings()


@dataclass
class DatasetConfig(LoaderSettings):
    """An evaluation set (`conf/dataset`).

    Args:
        kind: "revisited" (`<root>/<name>/{jpg/,gnd_<name>.pkl}`), "folder" (your own photos), "descriptors" (no images,
            only the files of `descriptors.*`), or in GLDv2's layout "gldv2" (test images searched for in the index),
            "gldv2_val" (training images of held-out landmarks) and "gldv2_recognition" (test images searched for among
            training images).
        name: name of the set and of its results.
        role: purpose of its results: "test" (reported; no setting is chosen on it), "validation" (settings are chosen
            on it) or "train" (the network was trained on it).
        root: folder of the set; revisited: the folder that contains it.
        trained: default of the top-level `name` for this set.
        max_side: shrink larger images to this longer side in pixels; null keeps their size.
    """

    kind: str = setting(MISSING, choices=(*loaders(), "descriptors"))
    name: str = MISSING
    role: str = setting(MISSING, choices=("train", "validation", "test"))
    root: str = "${paths.data}"
    trained: str = "superglobal"
    max_side: int | None = setting(None, minimum=1)

    def validate(self) -> None:
        """Raise InputError if the images of a folder set are not given."""
        if self.kind == "folder" and not self.database:
            raise InputError("dataset=folder: dataset.database=FOLDER is missing")


@dataclass
class DistractorsConfig:
    """Images added to the database (`conf/distractors`): `<root>/<name>/{jpg/,<name>.txt}`.

    Args:
        name: name of their folder and of the list in it; null for none.
        root: folder that contains that folder.
        unreadable: treatment of missing and corrupt images: "error" ends the run; "skip" lists them in `skipped.txt`
            of their store and never ranks them.
        max_corrupt_fraction: largest fraction of them that may be skipped.
    """

    name: str | None = None
    root: str = "${paths.data}"
    unreadable: str = setting("error", choices=("error", "skip"))
    max_corrupt_fraction: float = setting(0.001, minimum=0, maximum=1)


@dataclass
class DescriptorsConfig:
    """Your own descriptors in place of extraction.

    Args:
        query, database: .npy files, (N, D) float, unit L2 norm, in the order of the lists of the data set.
    """

    query: str | None = None
    database: str | None = None


@dataclass
class ExtractionConfig:
    """How descriptors are extracted; only `precision` and `decoder` change them by more than rounding.

    Args:
        precision: of the weights and maps of the backbone. "auto" is float32 on every device until a measurement of
            mAP allows another. Pooling is always in float32.
        decoder: of JPEG files: "cpu", or "gpu" to decode them on the CUDA device (nvJPEG). Its pixels differ slightly,
            so the descriptors are stored separately. Other formats, and files that are rotated or shrunk, are decoded
            on the CPU.
        batch_size: maximum number of images, all of one size, in a batch.
        batch_pixels: maximum number of pixels in a batch; null for as many as fit in memory.
        shard: "3/16" extracts the third of 16 shards of the images and stops, so that 16 jobs can split the work;
            null extracts all images.
    """

    precision: str = setting("auto", choices=("auto", *PRECISIONS))
    decoder: str = setting("cpu", choices=("cpu", "gpu"))
    batch_size: int = setting(16, minimum=1)
    batch_pixels: int | None = setting(None, minimum=1)
    shard: str | None = None

    def parse_shard(self) -> tuple[int, int]:
        """Return (index, count) of `shard`, the index counted from 0.

        Raises:
            InputError: `shard` is not of the form k/n with 1 <= k <= n.
        """
        try:
            k, n = map(int, (self.shard or "1/1").split("/"))
        except ValueError:
            k, n = 0, 0
        if not 1 <= k <= n:
            raise InputError(f"extraction.shard={self.shard}: expected k/n with 1 <= k <= n, such as 3/16")
        return k - 1, n


_RERANK = """Reranking (`conf/rerank`) by one kind of reranker. null is the kind's default, in parentheses below. A
parameter that the kind does not have raises an error.

Args:
    enabled: false is no reranking.
    kind: {kinds}.
    junk: "keep" reranks one list with junk in it, as SuperGlobal's code does; "drop" reranks a list for each protocol
        from which the images that it ignores are removed, as CVNet's does. Only scores differ, not lists and figures.
{parameters}
    tuned_on: images on which the parameters were chosen, as in `PoolingOverrides`.
"""
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
            ("junk", str, setting("keep", choices=("keep", "drop"))),
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
    """Transformation of all descriptors before the search, fitted without labels on the database (`conf/whitening`).

    Args:
        kind: "none", "center" (subtract the mean of the database) or "pca" (PCA whitening).
        dims: pca: number of axes kept; null for all.
    """

    kind: str = setting("none", choices=WHITENING_KINDS)
    dims: int | None = setting(None, minimum=1)

    def validate(self) -> None:
        """Raise InputError for `dims` without PCA."""
        if self.dims is not None and self.kind != "pca":
            raise InputError(f"whitening.dims={self.dims}: only whitening=pca has axes")


@dataclass
class StoreConfig:
    """Descriptors on disk.

    Args:
        dtype: "float32", or "float16" for half the size.
    """

    dtype: str = setting("float32", choices=DTYPES)


@dataclass
class FiguresConfig:
    """The sheet of queries with their ranked results.

    Args:
        queries: number of queries, spread evenly over the list; 0 for no sheet.
        ranks: number of results of each.
    """

    queries: int = setting(8, minimum=0)
    ranks: int = setting(10, minimum=1)


@dataclass
class EvalConfig:
    """Everything `eval.py` takes.

    Args:
        weights: path of a weights file or of a shared model's folder, "hf:owner/name" (a shared model on the Hugging
            Face Hub), "timm", "package" or "random"; null takes `backbone.weights`, or else the export of the training
            run `name`.
        name: name of a training run.
        scales: 1, 3, 5 or a list of factors; null for a shared model's own, and otherwise 3.
        antialias: filter when a scale shrinks the image; the paper does not. null for a shared model's own, and
            otherwise false.
        k: results kept per query: at least `rerank.M` and as many as the metric needs, at most the database.
        ablation: name of the row, an option of `ablation=`.
        seed: of the bootstrap and of random weights.
    """

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    distractors: DistractorsConfig = field(default_factory=DistractorsConfig)
    descriptors: DescriptorsConfig = field(default_factory=DescriptorsConfig)
    backbone: BackboneConfig | None = None
    weights: str | None = None
    name: str = "${dataset.trained}"
    pooling: PoolingOverrides = field(default_factory=PoolingOverrides)
    scales: Any = None
    antialias: bool | None = None
    extraction: ExtractionConfig = field(default_factory=ExtractionConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    whitening: WhiteningConfig = field(default_factory=WhiteningConfig)
    rerank: RerankConfig = field(default_factory=RerankConfig)
    k: int = setting(400, minimum=1)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    figures: FiguresConfig = field(default_factory=FiguresConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    ablation: str | None = None
    seed: int = setting(0, minimum=0, maximum=2**63 - 1)

    def validate(self) -> None:
        """Check what depends on several settings; resolve "auto" and null where other settings decide.

        Raises:
            InputError: settings contradict each other, or a package is missing.
        """
        self.dataset.validate()
        self.whitening.validate()
        self.logger.validate()
        self.pooling.validate()
        validate_index(self.index)
        if self.index.compare is None:
            self.index.compare = 0 if self.index.kind == "flat" else COMPARED
        complete_rerank(self.rerank)
        self.extraction.parse_shard()
        self.extraction.precision = resolve_precision(self.extraction.precision, self.trainer.accelerator)
        self._validate_descriptors()
        self._validate_rerank()
        self._validate_ablation()
        if self.scales is not None:
            from superglobal.models.network import make_scales  # imports timm, which takes seconds

            make_scales(self.scales)

    def _validate_descriptors(self) -> None:
        d, own, distractors = self.dataset, self.descriptors, self.distractors.name
        if (own.query is None) != (own.database is None):
            raise InputError("descriptors.query and descriptors.database go together: give both .npy files")
        if d.kind == "descriptors" and own.query is None:
            raise InputError("dataset=descriptors needs descriptors.query=Q.npy descriptors.database=X.npy")
        if d.kind == "descriptors" and distractors is not None:
            raise InputError(
                f"distractors={distractors}: dataset=descriptors has no images; add their rows to descriptors.database"
            )
        if d.kind.startswith("gldv2") and distractors is not None:
            raise InputError(f"distractors={distractors}: GLDv2's sets have none; use distractors=none with {d.name}")

    def _validate_rerank(self) -> None:
        """Check reranking against the data set and the index."""
        d, rerank = self.dataset, self.rerank
        if rerank.junk == "drop" and d.kind != "revisited":
            raise InputError(f"rerank.junk=drop: {d.name} has no junk; only Revisited sets have")
        if not rerank.enabled:
            return
        if d.kind == "gldv2_recognition" and rerank.M is not None and d.neighbors > rerank.M:
            raise InputError(
                f"dataset.neighbors={d.neighbors}: expected at most rerank.M={rerank.M}, because only those images "
                "are scored; raise rerank.M, or use rerank=none"
            )
        reranker = get_reranker(rerank.kind)
        if d.kind == "gldv2_recognition" and reranker.distances and d.votes != "nearest":
            raise InputError(
                f"dataset.votes={d.votes}: rerank.kind={rerank.kind} returns distances, of which sums have no meaning; "
                "use dataset.votes=nearest or another rerank="
            )
        if reranker.searches_again is not None and self.index.kind != "flat":
            raise InputError(
                f"rerank.kind={rerank.kind} searches the whole database again, exactly, which cannot be compared with "
                f"the approximate lists of index={self.index.kind}; use index=flat"
            )

    def _validate_ablation(self) -> None:
        """Check that the settings are those of the row that `ablation` names, under which tables list the result."""
        if self.ablation is None:
            return
        if self.ablation not in ABLATIONS:
            raise InputError(f"ablation={self.ablation}: expected one of {', '.join(ABLATIONS)}")
        p = self.pooling
        values = (p.gem_plus, p.regional, p.scale, relup_mode(p.relup) != "off", self.rerank.enabled)
        for switch, expected, value in zip(MODULES, ABLATIONS[self.ablation], values, strict=True):
            if expected != value:
                state = "on" if expected else "off"
                raise InputError(f"ablation={self.ablation} means {switch} {state}; drop the ablation or the override")
        if self.rerank.enabled and self.rerank.kind != "superglobal":
            raise InputError(
                f"ablation={self.ablation} means the paper's reranking; drop it, or rerank={self.rerank.kind}"
            )


@dataclass
class CompareConfig(EvalConfig):
    """Everything `superglobal compare-rerankers` takes: what `eval.py` takes, with `rerankers` in place of `rerank`.

    Args:
        rerankers: options of `conf/rerank`, each optionally followed by settings, such as "superglobal K=1"; the others
            are compared with the first.
    """

    rerankers: list[str] = field(default_factory=list)


def complete_rerank(rerank: RerankConfig) -> None:
    """Put the kind's defaults where parameters are null.

    Raises:
        InputError: a parameter that the kind does not have, or one out of range.
    """
    reranker = get_reranker(rerank.kind)
    for key, value in reranker.complete(rerank_parameters(rerank), "rerank.").items():
        setattr(rerank, key, value)
    if rerank.junk == "drop" and reranker.searches_again is not None:
        raise InputError(
            f"rerank.junk=drop: {rerank.kind} searches the whole database again and has no shortlist; use "
            "rerank.junk=keep"
        )
