"""Load the inputs of an evaluation: data set, distractors, network, descriptors and whitening."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from superglobal.config.common import PoolingOverrides
from superglobal.config.evaluation import DatasetConfig, EvalConfig
from superglobal.data.distractors import how_to_get_distractors, load_distractors
from superglobal.data.evaluation_set import EvaluationSet, drop_unreadable, load_evaluation_set, require_images
from superglobal.data.image_checks import CHECKED_IMAGES, CheckCache, check_images
from superglobal.data.images import ImageItem
from superglobal.errors import InputError
from superglobal.evaluation.extraction import extract_lists
from superglobal.evaluation.module import ExtractionList, UnreadableImagesError
from superglobal.evaluation.sweep import sibling_poolings
from superglobal.models.backbone import has_relup
from superglobal.models.factory import load_model
from superglobal.models.network import RetrievalNetwork
from superglobal.models.pooling import make_pooling
from superglobal.retrieval.rows import Rows, as_rows, concat, load_npy
from superglobal.retrieval.store import DescriptorStore
from superglobal.retrieval.whitening import Whitening, stored_whitening
from superglobal.training.run_dir import export_path, is_unfinished
from superglobal.training.trainer import launched_externally, make_trainer

log = logging.getLogger(__name__)
T = TypeVar("T")
# Names of the ablation settings with and without ReLUP. They need a backbone with plain ReLUs, because ReLUP replaces
# these.
_RELUP_ROWS = ("relup", "no_relup")


class NotApplicableError(InputError):
    """Error for a row of the ablation table that the backbone does not support.

    For example, rows with ReLUP need a backbone with plain ReLUs.
    """


class StageTimer:
    """Measure the duration of each stage of an evaluation.

    Attributes:
        seconds: duration of each stage in seconds, by name of the stage.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Measure the duration of the code in a `with` statement, and add it to `seconds[stage]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0) + time.perf_counter() - start


@dataclass
class Inputs:
    """Query and database descriptors, with their data set and provenance."""

    queries: Rows  # (Q, D), unit norm
    database: Rows  # (N, D), unit norm, including the distractors
    dataset: EvaluationSet | None  # None if there are only descriptors
    distractors: list[ImageItem]  # in the database, they follow the images of the data set
    about: dict[str, Any] = field(default_factory=dict)  # weights, network and stores, recorded in results.json

    @classmethod
    def from_stores(
        cls,
        stores: dict[str, DescriptorStore],
        dataset: EvaluationSet | None,
        distractors: list[ImageItem],
        about: dict[str, Any],
    ) -> Inputs:
        """Create the inputs from descriptor stores.

        Args:
            stores: descriptor stores by title: "database" and, optionally, "queries" and "distractors". Without
                "queries", each database image is also a query.
            dataset: evaluation set.
            distractors: distractor images.
            about: provenance of the descriptors.
        """
        queries = as_rows(stores.get("queries", stores["database"]), "queries")
        parts = [stores[title] for title in ("database", "distractors") if title in stores]
        return cls(queries, concat(*parts, name="database"), dataset, distractors, about)

    def query_block(self) -> np.ndarray:
        """Return the query descriptors as one array, (Q, D) float32."""
        return self.queries.block(0, len(self.queries))

    def exclude(self) -> np.ndarray | None:
        """Return the database id of each query image, so that a search can exclude the query from its own results.

        Returns:
            (Q,) int64 database ids; None if the queries are not database images.
        """
        leave_one_out = self.dataset is not None and self.dataset.leave_one_out
        return np.arange(len(self.queries)) if leave_one_out else None


def leave_out_unreadable(load: Callable[[], T], stores: str, shard: str | None = None) -> T:
    """Return the result of `load()`, which extracts descriptors or feature maps.

    Images that cannot be decoded although the check has found no fault are recorded as damaged. In a single process,
    `load` is then called again, and the check removes these images from the data set.

    Args:
        load: function that checks the images and extracts the missing descriptors or feature maps.
        stores: folder of the stores, `paths.stores`.
        shard: `extraction.shard`. Shards end with the error, so that all of them start again with the same images.

    Raises:
        InputError: see `load_inputs`.
    """
    try:
        return load()
    except UnreadableImagesError as error:
        CheckCache(Path(stores) / CHECKED_IMAGES).mark_damaged(error.images)
        if shard is not None or launched_externally() or torch.distributed.is_initialized():
            raise
    return load()


def load_inputs(config: EvalConfig, timer: StageTimer) -> Inputs | None:
    """Load the descriptors to search, extract those that are missing, and apply the whitening.

    Args:
        config: settings of the evaluation.
        timer: records the duration of each stage.

    Returns:
        The inputs in the first process. None in all other processes. None in every process if other shards still have
        images to extract.

    Raises:
        InputError: inputs are missing or unreadable; one message lists all problems.
        NotApplicableError: the row of the ablation table does not apply to the backbone.
    """
    return leave_out_unreadable(partial(_load_inputs, config, timer), config.paths.stores, config.extraction.shard)


def _load_inputs(config: EvalConfig, timer: StageTimer) -> Inputs | None:
    if config.descriptors.query is not None:
        problems: list[str] = []
        images = _try(problems, lambda: evaluation_set(config.dataset))
        distractors = _try(problems, lambda: distractor_images(config))
        if problems:
            raise InputError("\n".join(problems))
        return apply_whitening(config, load_descriptors(config, images, distractors or []), timer)
    dataset, distractors, network, lists = load_sources(config, timer)
    if config.ablation in _RELUP_ROWS and not has_relup(network.backbone.net):
        raise NotApplicableError("this backbone has no plain ReLUs for ReLUP")
    trainer = make_trainer(config.trainer, logger=False, enable_checkpointing=False, inference_mode=True)
    with timer.time("extract"):
        networks = [network, *_sibling_networks(config, network)]
        folder, workers, dtype = Path(config.paths.stores), config.trainer.num_workers, config.store.dtype
        stores, extracted = extract_lists(networks, lists, folder, trainer, config.extraction, workers, dtype)
    remaining = sum(len(store.missing) for store in stores)
    if config.extraction.shard is not None and remaining:
        log.info(
            "Extracted shard %s; %d images remain for the other shards; the last shard computes the metrics",
            config.extraction.shard,
            remaining,
        )
        return None
    if not trainer.is_global_zero:
        return None
    by_title = {images.title: store for images, store in zip(lists, stores, strict=True)}
    about = {
        "weights": network.weights_label,
        "weights_format": network.weights_format,
        "network": network.identity(),
        "trained_pooling": network.trained_pooling,
        "stores": {
            title: {"fingerprint": s.fingerprint(), **{key: s.manifest[key] for key in ("dtype", "provenance")}}
            for title, s in by_title.items()
        },
        "extracted": extracted,
    }
    return apply_whitening(config, Inputs.from_stores(by_title, dataset, distractors, about), timer)


def load_sources(
    config: EvalConfig, timer: StageTimer, queries: bool = True
) -> tuple[EvaluationSet, list[ImageItem], RetrievalNetwork, list[ExtractionList]]:
    """Load the data set, the distractors and the network, and check the image files.

    Args:
        config: settings of the evaluation.
        timer: records the duration of the check.
        queries: whether to check and list the query images, too.

    Returns:
        The data set, the distractors, the network, and the image lists to extract.

    Raises:
        InputError: inputs are missing or unreadable; one message lists all problems.
    """
    problems: list[str] = []
    with timer.time("check"):
        dataset = _try(problems, lambda: evaluation_set(config.dataset, Path(config.paths.stores) / CHECKED_IMAGES))
    distractors = _try(problems, lambda: distractor_images(config)) or []
    network = _try(problems, lambda: load_network(config))
    with timer.time("check"):
        lists = _check_image_lists(config, dataset, distractors, problems, queries)
    assert dataset is not None
    assert network is not None
    return dataset, distractors, network, lists


def _try(problems: list[str], load: Callable[[], T]) -> T | None:
    """Return the result of `load()`. If it raises InputError, append the message to `problems` and return None."""
    try:
        return load()
    except InputError as error:
        problems.append(str(error))
        return None


def evaluation_set(d: DatasetConfig, cache: Path | None = None) -> EvaluationSet | None:
    """Load the configured evaluation set. Its image files are checked only if unreadable ones are to be left out.

    Args:
        d: settings of the set.
        cache: file that keeps the results of the check for later runs; None to read all files.

    Returns:
        The evaluation set; None for dataset=descriptors, which has no images.

    Raises:
        InputError: the files that list the images are missing or invalid, or too many images are unreadable.
    """
    if d.kind == "descriptors":
        return None
    dataset = load_evaluation_set(**asdict(d))
    return drop_unreadable(dataset, cache) if d.unreadable == "skip" else dataset


def distractor_images(config: EvalConfig) -> list[ImageItem]:
    """Return the configured distractor images; an empty list if none are configured.

    Raises:
        InputError: the file that lists the distractors is missing or invalid.
    """
    d = config.distractors
    return load_distractors(d.root, d.name) if d.name else []


def load_descriptors(config: EvalConfig, dataset: EvaluationSet | None, distractors: list[ImageItem]) -> Inputs:
    """Load query and database descriptors from the files `descriptors.query` and `descriptors.database`.

    Args:
        config: settings of the evaluation.
        dataset: evaluation set that the descriptors belong to; None if there are only descriptors.
        distractors: distractor images. In the database file, their descriptors follow those of the data set.

    Raises:
        InputError: a file is unreadable, or its number of rows does not match the images.
    """
    queries, database = (load_npy(str(p)) for p in (config.descriptors.query, config.descriptors.database))
    if dataset is not None:
        images = {"query": len(dataset.queries), "database": len(dataset.database) + len(distractors)}
        for key, rows in (("query", queries), ("database", database)):
            if len(rows) != images[key]:
                raise InputError(
                    f"descriptors.{key}: {len(rows)} rows, but {dataset.name} has {images[key]} images; expected one "
                    "row per image, in the order of its lists (distractors after the database)"
                )
    about = {"weights": "own descriptors", "descriptors": asdict(config.descriptors)}
    return Inputs(queries, database, dataset, distractors, about)


def load_network(config: EvalConfig) -> RetrievalNetwork:
    """Load the configured network in evaluation mode on the CPU. Raises InputError if its weights are missing."""
    backbone = config.backbone
    network = load_model(
        config.weights or (backbone.weights if backbone else None) or _trained_weights(config),
        backbone=backbone.name if backbone else None,
        pooling=config.pooling.overrides(),
        scales=config.scales,
        antialias=config.antialias,
        seed=config.seed,
    )
    network.precision = config.extraction.precision
    return network


def _trained_weights(config: EvalConfig) -> str:
    """Return the path of the weights that the training run `config.name` exported.

    Raises:
        InputError: the training run has not exported any weights.
    """
    path = export_path(config.paths.outputs, config.name)
    if path.is_file():
        if is_unfinished(path.parent):
            log.warning("%s: this training run is not finished; evaluating its best network so far", path.parent)
        return str(path)
    runs = sorted(export.parent.name for export in path.parent.parent.glob(f"*/{path.name}"))
    hint = f" (finished runs: {', '.join(runs)}; choose one with name=)" if runs else ""
    raise InputError(
        f"weights: none given, and there is no trained network at {path}{hint}. Train one with python train.py, or "
        "give weights=PATH of a CVNet checkpoint or a superglobal export, backbone=efficientnet_lite0 (no download), "
        "weights=timm, or weights=random as a baseline"
    )


def _check_image_lists(
    config: EvalConfig,
    dataset: EvaluationSet | None,
    distractors: list[ImageItem],
    problems: list[str],
    queries: bool,
) -> list[ExtractionList]:
    """Check all image files and return the image lists to extract.

    Args:
        config: settings of the evaluation.
        dataset: evaluation set; None if it could not be loaded.
        distractors: distractor images.
        problems: messages of problems that were found earlier. The InputError lists them, too.
        queries: whether to check and list the query images, too.

    Raises:
        InputError: an image is unreadable, or `problems` is not empty.
    """
    sets: list[tuple[str, str, Sequence[ImageItem], str]] = []
    if dataset is not None:
        sets.append(("database", dataset.name, dataset.database, dataset.how_to_get))
        if queries and not dataset.leave_one_out:
            sets.append(("queries", dataset.name, dataset.queries, dataset.how_to_get))
    d, max_side = config.distractors, config.dataset.max_side
    cache = Path(config.paths.stores) / CHECKED_IMAGES
    roots = [Path(config.paths.data), *([] if dataset is None else [dataset.root]), Path(d.root)]
    skipping: list[ExtractionList] = []
    if d.name and distractors and d.unreadable == "skip":
        report = check_images(distractors, cache=cache)
        allowed = d.max_corrupt_fraction
        skipping = [ExtractionList("distractors", d.name, distractors, report, max_side, allowed, roots=roots)]
    elif d.name and distractors:
        sets.append(("distractors", d.name, distractors, how_to_get_distractors(Path(d.root), d.name)))
    reports = require_images([(title, items, hint) for title, _, items, hint in sets], also=problems, cache=cache)
    # The store records absolute paths, so that the search page can open the store from any working directory.
    source = asdict(config.dataset)
    source |= {
        key: str(Path(source[key]).resolve()) for key in ("root", "database", "query") if source[key] is not None
    }
    sources = {"database": source, "queries": source, "distractors": None}
    leaves_out = {title: config.dataset.unreadable == "skip" and title != "distractors" for title in sources}
    return [
        *(
            ExtractionList(title, name, items, reports[title], max_side, None, leaves_out[title], roots, sources[title])
            for title, name, items, _ in sets
        ),
        *skipping,
    ]


def _sibling_networks(config: EvalConfig, network: RetrievalNetwork) -> list[RetrievalNetwork]:
    """Return the networks of the other sweep jobs that extract the same images.

    Networks with equal ReLUP settings share one backbone, so that it processes each image only once.

    Args:
        config: settings of this job.
        network: network of this job, which is not returned.
    """
    networks = [network]
    for overrides in sibling_poolings(config):
        try:
            pooling = make_pooling(overrides, network.trained_pooling)
            same_p = "p" not in overrides and config.pooling.p is None
            sharing = [n for n in networks if same_p and n.shares_feature_maps(pooling)]
            if sharing:
                networks.append(sharing[0].variant(pooling))
            else:
                networks.append(load_network(replace(config, pooling=PoolingOverrides(**overrides))))
        except InputError:  # the sweep job that uses this network reports the error
            continue
    return networks[1:]


def apply_whitening(config: EvalConfig, inputs: Inputs, timer: StageTimer) -> Inputs:
    """Fit the configured whitening on the database, including the distractors, and return the whitened inputs.

    If the descriptors come from stores, the whitening is saved in `paths.stores`, and a later call loads it from there.
    With whitening=none, the inputs are returned unchanged.

    Args:
        config: settings of the evaluation.
        inputs: descriptors before whitening.
        timer: records the duration of the whitening.
    """
    s = config.whitening
    if s.kind == "none":
        return inputs
    with timer.time("whitening"):
        stores = inputs.about.get("stores")
        if stores is None:
            # A stored whitening is found by the fingerprint of a descriptor store. Descriptors from files have none.
            whitening, fingerprint = Whitening(s.kind, s.dims).fit(inputs.database), None
        else:
            fingerprints = [stores[title]["fingerprint"] for title in ("database", "distractors") if title in stores]
            folder = Path(config.paths.stores)
            whitening, fingerprint = stored_whitening(inputs.database, s.kind, s.dims, folder, fingerprints)
    about = {
        **asdict(s),
        "rows": whitening.n_samples_,
        "fingerprint": fingerprint,
        "learned_on": "the searched database",
    }
    return replace(
        inputs,
        queries=whitening.transform_rows(inputs.queries, "queries"),
        database=whitening.transform_rows(inputs.database, "database"),
        about={**inputs.about, "whitening": about},
    )
