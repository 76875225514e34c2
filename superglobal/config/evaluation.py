"""Define the settings of `eval.py`, most of which other commands share."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from superglobal.config.common import (
    FILE_NAME,
    RUN_NAME,
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
from superglobal.errors import InputError, one_of
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
    """Create a dataclass whose fields are the arguments of all evaluation-set loaders.

    The arguments `name` and `root` are left out, because `DatasetConfig` declares them for all evaluation sets.

    Raises:
        InputError: two loaders declare an argument of the same name with different types or defaults.
    """
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
                    f"dataset.{name}: the loader of dataset.kind={kind} declares a different type or default than an "
                    "earlier loader; rename the argument"
                )
            descriptions.setdefault(name, {}).setdefault(words[name], []).append(kind)
    lines = [
        f"    {name}: " + " ".join(f"For kind {', '.join(kinds)}: {text}" for text, kinds in of_name.items())
        for name, of_name in descriptions.items()
    ]
    doc = "\n".join(["Settings of the evaluation-set loaders.", "", "Args:", *lines])
    return make_dataclass("LoaderSettings", settings.values(), namespace={"__doc__": doc})


def _setting_type(hint: Any, required: bool) -> Any:
    """Return the type of the setting that corresponds to an argument of an evaluation-set loader.

    Args:
        hint: type of the argument. `Path` is removed from a union, because a configuration contains paths as strings.
        required: the argument has no default. The default of the setting is then null, so the type also allows null.
    """
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return Union[(*(member for member in members if member is not Path), *([type(None)] if required else []))]


LoaderSettings: Any = _make_loader_settings()


@dataclass
class DatasetConfig(LoaderSettings):
    """Evaluation set (`conf/dataset`).

    Args:
        kind: layout of the set: "revisited" (`<root>/<name>/{jpg/,gnd_<name>.pkl}`), "folder" (your own photos),
            "descriptors" (no images, only the files of `descriptors.*`), or one of GLDv2's: "gldv2" (queries: the test
            images; database: the index images), "gldv2_val" (training images of held-out landmarks) or
            "gldv2_recognition" (queries: the test images; database: the training images).
        name: name of the set, used in file names and results.
        role: purpose of the set: "test" (its results are reported, and no setting is chosen on it), "validation"
            (settings are chosen on it) or "train" (the network was trained on it).
        root: folder of the set; for kind "revisited", the folder that contains the set's folder.
        trained: name of the training run that is evaluated on this set if the top-level setting `name` is not given.
        max_side: images with a longer side above this number of pixels are shrunk to it; null keeps their size.
        unreadable: treatment of missing and corrupt images: "error" stops the run; "skip", the default of
            dataset=folder, leaves them out, lists them in `unreadable.txt` and counts them in the results. If more
            than half are unreadable, the run stops in any case.
    """

    kind: str = setting(MISSING, choices=(*loaders(), "descriptors"))
    name: str = setting(MISSING, name=FILE_NAME)
    role: str = setting(MISSING, choices=("train", "validation", "test"))
    root: str = "${paths.data}"
    trained: str = "superglobal"
    max_side: int | None = setting(None, minimum=1)
    unreadable: str = setting("error", choices=("error", "skip"))

    def validate(self) -> None:
        """Raise InputError if only one of dataset=folder and an image folder is given, or the name is reserved."""
        if self.kind == "folder" and not self.database:
            raise InputError("dataset=folder: the image folder is missing; add dataset.database=FOLDER")
        if self.database and (self.kind in ("revisited", "descriptors") or self.kind.startswith("gldv2")):
            raise InputError(f"dataset.database={self.database}: only for images of your own; add experiment=photos")
        if self.name == "latest":
            raise InputError("dataset.name=latest: reserved for the link to the last evaluation; use another name")


@dataclass
class DistractorsConfig:
    """Distractors (`conf/distractors`): images that are added to the database, in `<root>/<name>/{jpg/,<name>.txt}`.

    Args:
        name: name of the distractors' folder, and of the list in this folder; null for no distractors.
        root: folder that contains the distractors' folder.
        unreadable: treatment of missing and corrupt distractors: "error" stops the run; "skip" lists them in
            `skipped.txt` of their descriptor store and leaves them out of all rankings.
        max_corrupt_fraction: largest fraction of the distractors that may be skipped.
    """

    name: str | None = setting(None, name=FILE_NAME)
    root: str = "${paths.data}"
    unreadable: str = setting("error", choices=("error", "skip"))
    max_corrupt_fraction: float = setting(0.001, minimum=0, maximum=1)


@dataclass
class DescriptorsConfig:
    """Your own descriptors, used instead of extracting descriptors.

    Args:
        query, database: .npy file with an array of floats, (N, D). Each row is a descriptor of unit L2 norm, and the
            rows have the order of the data set's queries or database images.
    """

    query: str | None = None
    database: str | None = None


@dataclass
class ExtractionConfig:
    """Extraction of descriptors; only `precision` and `decoder` change the descriptors by more than rounding.

    Args:
        precision: number type of the backbone's weights and feature maps. "auto" is float32 on every device. Pooling is
            always computed in float32.
        decoder: device that decodes JPEG files: "cpu", or "gpu" for the CUDA device (nvJPEG). The pixels differ
            slightly, so each decoder has its own descriptor stores. Other formats, and images that are rotated or
            shrunk, are always decoded on the CPU.
        batch_size: maximum number of images in a batch; all images of a batch have the same size.
        batch_pixels: maximum number of pixels in a batch; null for as many as fit in memory.
        shard: one shard of the images, so that several jobs can split the work: "3/16" extracts the third of the 16
            shards and stops; null extracts all images.
    """

    precision: str = setting("auto", choices=("auto", *PRECISIONS))
    decoder: str = setting("cpu", choices=("cpu", "gpu"))
    batch_size: int = setting(16, minimum=1)
    batch_pixels: int | None = setting(None, minimum=1)
    shard: str | None = None

    def parse_shard(self) -> tuple[int, int]:
        """Return (index, count) of `shard`; the index starts at 0.

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


_RERANK = """Reranking (`conf/rerank`). A parameter that is null has the default of the chosen kind, shown in
parentheses below. Setting a parameter that the kind does not have raises an error.

Args:
    enabled: rerank the results of the search; false for no reranking.
    kind: reranking method: {kinds}.
    junk: treatment of junk images, which the protocol ignores. "keep" reranks one list that contains them, as in
        SuperGlobal's code. "drop" removes them first, and reranks a separate list for each protocol, as in CVNet's
        code. The setting changes only the metrics; the saved rankings and figures are always those of "keep".
{parameters}
    tuned_on: name of the image set on which `superglobal tune` chose the parameters. It is shown with every result, but
        does not affect the scores.
"""
_NO_PARAMETERS = ("enabled", "kind", "junk", "tuned_on")


def _make_rerank_config() -> Any:
    """Create the dataclass `RerankConfig`, which has one field for each parameter of any reranker."""
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
    """Return the parameters of the reranker that are not null, such as M and K: name -> value."""
    values = {f.name: getattr(rerank, f.name) for f in fields(rerank) if f.name not in _NO_PARAMETERS}
    return {name: value for name, value in values.items() if value is not None}


@dataclass
class WhiteningConfig:
    """Whitening (`conf/whitening`): applied to all descriptors before search; fitted on the database without labels.

    Args:
        kind: type of whitening: "none", "center" (subtract the mean of the database) or "pca" (PCA whitening).
        dims: number of principal axes that "pca" keeps; null for all.
    """

    kind: str = setting("none", choices=WHITENING_KINDS)
    dims: int | None = setting(None, minimum=1)

    def validate(self) -> None:
        """Raise InputError if `dims` is set although `kind` is not "pca"."""
        if self.dims is not None and self.kind != "pca":
            raise InputError(f"whitening.dims={self.dims}: only PCA whitening has axes; add whitening=pca")


@dataclass
class StoreConfig:
    """Storage of descriptors on disk.

    Args:
        dtype: number type of the stored descriptors: "float32", or "float16" for half the size.
    """

    dtype: str = setting("float32", choices=DTYPES)


@dataclass
class FiguresConfig:
    """Figure that an evaluation draws (`sheet.png`): some queries with their top results.

    Args:
        queries: number of queries shown, spread evenly over the list of all queries; 0 for no figure.
        ranks: number of results shown per query.
    """

    queries: int = setting(8, minimum=0)
    ranks: int = setting(10, minimum=1)


@dataclass
class EvalConfig:
    """Top-level settings of `eval.py`.

    Args:
        weights: weights of the network: path of a weights file or of a shared model's folder, "hf:owner/name" (a shared
            model on the Hugging Face Hub), "timm" (timm's pretrained weights), "package" (weights from a Python
            package) or "random". null uses `backbone.weights`, or if that is null too, the exported weights of the
            training run `name`.
        name: name of the training run that is evaluated if no weights are given.
        scales: image scales: their number (1, 3 or 5), or a list of factors. null uses the scales of a shared model,
            and 3 for other weights.
        antialias: apply an antialiasing filter when a scale shrinks the image; the paper applies none. null uses the
            setting of a shared model, and false for other weights.
        k: number of results kept per query. If `rerank.M` or the number that the metric needs is larger, the larger
            number is used, but never more than the size of the database.
        ablation: name of a row of the ablation table, set by the group `ablation=`; the other settings must match it.
        seed: seed of the bootstrap and of random weights.
    """

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    distractors: DistractorsConfig = field(default_factory=DistractorsConfig)
    descriptors: DescriptorsConfig = field(default_factory=DescriptorsConfig)
    backbone: BackboneConfig | None = None
    weights: str | None = None
    name: str = setting("${dataset.trained}", name=RUN_NAME)
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
        """Check settings that depend on each other, and replace values that other settings determine.

        The replaced values are the precision "auto", null for the reranking parameters, `index.compare` and
        `logger.wandb`, and `dataset.unreadable` if descriptors are read from files.

        Raises:
            InputError: settings contradict each other, or a package is missing.
        """
        self.dataset.validate()
        self.whitening.validate()
        self.logger.validate(own_images=self.dataset.kind == "folder")
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
            from superglobal.models.network import make_scales  # This import loads timm, which takes seconds.

            make_scales(self.scales)

    def _validate_descriptors(self) -> None:
        """Raise InputError if the data set does not support the descriptor files or the distractors."""
        d, files, distractors = self.dataset, self.descriptors, self.distractors.name
        if files.query is not None:
            d.unreadable = "error"  # The rows belong to all images, which need not be on this machine.
        if (files.query is None) != (files.database is None):
            raise InputError(
                "descriptors: only one of descriptors.query and descriptors.database is set; give both .npy files"
            )
        if d.kind == "descriptors" and files.query is None:
            raise InputError(
                "dataset=descriptors: the files are missing; add descriptors.query=Q.npy descriptors.database=X.npy"
            )
        if d.kind == "descriptors" and distractors is not None:
            raise InputError(
                f"distractors={distractors}: dataset=descriptors has no images; use distractors=none and append the "
                "descriptors of the distractors to descriptors.database"
            )
        if d.kind.startswith("gldv2") and distractors is not None:
            raise InputError(
                f"distractors={distractors}: {d.name} cannot be combined with distractors; use distractors=none"
            )

    def _validate_rerank(self) -> None:
        """Raise InputError if the data set or the index does not support the reranking settings."""
        d, rerank = self.dataset, self.rerank
        if rerank.junk == "drop" and d.kind != "revisited":
            raise InputError(
                f"rerank.junk=drop: {d.name} has no junk images; use rerank.junk=keep (only Revisited sets have junk)"
            )
        if not rerank.enabled:
            return
        if d.kind == "gldv2_recognition" and rerank.M is not None and d.neighbors > rerank.M:
            raise InputError(
                f"dataset.neighbors={d.neighbors}: expected at most rerank.M={rerank.M}, because reranking scores "
                "only that many images; raise rerank.M, or use rerank=none"
            )
        reranker = get_reranker(rerank.kind)
        if d.kind == "gldv2_recognition" and reranker.distances and d.votes != "nearest":
            raise InputError(
                f"dataset.votes={d.votes}: rerank.kind={rerank.kind} returns distances, which cannot be summed as "
                "votes; use dataset.votes=nearest or another rerank="
            )
        if d.kind == "gldv2_recognition" and rerank.kind == "auto":
            raise InputError(
                "rerank.kind=auto: the scores of queries that it reranks and of others are on different scales, and "
                "recognition compares them; use rerank=gnn or rerank=none"
            )
        if reranker.searches_again is not None and self.index.kind != "flat":
            raise InputError(
                f"rerank.kind={rerank.kind} runs an exact search of the whole database, so its results cannot be "
                f"compared with those of the approximate index={self.index.kind}; use index=flat"
            )

    def _validate_ablation(self) -> None:
        """Raise InputError if settings contradict the ablation row.

        Tables show the result under the name of the row, so exactly the modules of this row must be on.
        """
        if self.ablation is None:
            return
        if self.ablation not in ABLATIONS:
            raise InputError(f"ablation={self.ablation}: expected {one_of(self.ablation, ABLATIONS)}")
        p = self.pooling
        values = (p.gem_plus, p.regional, p.scale, relup_mode(p.relup) != "off", self.rerank.enabled)
        for switch, expected, value in zip(MODULES, ABLATIONS[self.ablation], values, strict=True):
            if expected != value:
                state = "on" if expected else "off"
                raise InputError(
                    f"ablation={self.ablation} requires {switch} {state}; remove the ablation or the other setting"
                )
        if self.rerank.enabled and self.rerank.kind != "superglobal":
            raise InputError(
                f"ablation={self.ablation} requires the paper's reranking (rerank=superglobal); remove the ablation "
                f"or rerank={self.rerank.kind}"
            )


@dataclass
class CompareConfig(EvalConfig):
    """Top-level settings of `superglobal compare-rerankers`: those of `eval.py`, with `rerankers` instead of `rerank`.

    Args:
        rerankers: rerankers to compare. Each is an option of `conf/rerank`, optionally followed by settings, such as
            "superglobal K=1". The first reranker is the baseline for the others.
    """

    rerankers: list[str] = field(default_factory=list)


def complete_rerank(rerank: RerankConfig) -> None:
    """Replace reranking parameters that are null by the defaults of the chosen reranker. `rerank` is modified.

    Raises:
        InputError: the reranker does not have a parameter that is set, a value is out of range, or the reranker does
            not support the value of `junk`.
    """
    reranker = get_reranker(rerank.kind)
    for key, value in reranker.complete(rerank_parameters(rerank), "rerank.").items():
        setattr(rerank, key, value)
    if rerank.junk == "drop" and reranker.searches_again is not None:
        raise InputError(
            f"rerank.junk=drop: rerank.kind={rerank.kind} searches the whole database again and has no shortlist; use "
            "rerank.junk=keep"
        )
