"""What an evaluation searches: descriptors, from stores or as they are given, and what is known of their images."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytorch_lightning as pl

from superglobal.config.common import PoolingOverrides
from superglobal.config.evaluation import DatasetConfig, EvalConfig
from superglobal.data.evaluation_set import (
    EvaluationSet,
    how_to_get_distractors,
    load_distractors,
    load_evaluation_set,
    require_images,
)
from superglobal.data.image_checks import check_images
from superglobal.data.images import ImageItem
from superglobal.errors import InputError
from superglobal.evaluation.extraction import extract_lists
from superglobal.evaluation.module import ExtractionList
from superglobal.evaluation.sweep import sibling_poolings
from superglobal.models.backbone import has_relup
from superglobal.models.factory import load_model
from superglobal.models.network import RetrievalNetwork
from superglobal.models.pooling import make_pooling
from superglobal.retrieval.rows import NPY_FAULTS, Rows, as_rows, concat
from superglobal.retrieval.whitening import database_statistics, stored_statistics
from superglobal.training.run_dir import export_path, is_unfinished
from superglobal.training.trainer import make_trainer

log = logging.getLogger(__name__)
T = TypeVar("T")
# Rows of the ablation that say nothing on a backbone without a place for ReLUP.
_RELUP_ROWS = ("relup", "no_relup")
_PATHS = ("root", "database", "query")


@dataclass
class Inputs:
    """What is searched: descriptors, and whatever is known about the images behind them."""

    queries: Rows
    database: Rows
    dataset: EvaluationSet | None
    distractors: list[ImageItem]
    about: dict[str, Any] = field(default_factory=dict)

    def query_block(self) -> np.ndarray:
        """(Q, D) float32."""
        return self.queries.block(0, len(self.queries))

    def exclude(self) -> np.ndarray | None:
        """The id that each query must not find, its own, where the database is the queries."""
        one_out = self.dataset is not None and self.dataset.leave_one_out
        return np.arange(len(self.queries)) if one_out else None


def gathered(config: EvalConfig, clock: Clock) -> Inputs | str | None:
    """The descriptors to search, extracted where they are missing, under `whitening`.

    Returns the reason for a row of the ablation that does not apply, and None in all processes but the first.
    Raises InputError for anything missing, all of it in one message.
    """
    found = _gathered(config, clock)
    return less_statistics(config, found, clock) if isinstance(found, Inputs) else found


def _gathered(config: EvalConfig, clock: Clock) -> Inputs | str | None:
    problems: list[str] = []
    dataset = attempt(problems, _dataset, config)
    distractors = attempt(problems, distractor_items, config) or []
    if config.descriptors.query is not None:
        if problems:
            raise InputError("\n".join(problems))
        return own_descriptors(config, dataset, distractors)
    network = attempt(problems, evaluated_network, config)
    lists = checked_lists(config, dataset, distractors, problems, clock)
    assert dataset is not None
    assert network is not None
    if config.ablation in _RELUP_ROWS and not has_relup(network.backbone.net):
        return "this backbone has no plain ReLUs for ReLUP"
    trainer = make_trainer(config.trainer, logger=False, enable_checkpointing=False, inference_mode=True)
    inputs = _extracted(config, network, lists, trainer, clock)
    if inputs is None or not trainer.is_global_zero:
        return None
    return replace(inputs, dataset=dataset, distractors=distractors)


def attempt(problems: list[str], read: Callable[[EvalConfig], T], config: EvalConfig) -> T | None:
    """What `read` gives; what it lacks goes to `problems`, so that one message tells everything missing."""
    try:
        return read(config)
    except InputError as error:
        problems.append(str(error))
        return None


def _dataset(config: EvalConfig) -> EvaluationSet | None:
    return evaluation_set(config.dataset)


def own_descriptors(config: EvalConfig, dataset: EvaluationSet | None, distractors: list[ImageItem]) -> Inputs:
    queries, database = (_load_npy(str(p)) for p in (config.descriptors.query, config.descriptors.database))
    if dataset is not None:
        images = {"query": len(dataset.queries), "database": len(dataset.database) + len(distractors)}
        for key, rows in (("query", queries), ("database", database)):
            if len(rows) != images[key]:
                raise InputError(
                    f"descriptors.{key}: {len(rows)} rows, but {dataset.name} has {images[key]} images there; one row "
                    "per image, in the order of its lists (distractors after the database)"
                )
    about = {"weights": "own descriptors", "descriptors": asdict(config.descriptors)}
    return Inputs(queries, database, dataset, distractors, about)


def _load_npy(path: str) -> Rows:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except NPY_FAULTS as error:
        raise InputError(f"{path}: no readable .npy file of descriptors ({error})") from error
    return as_rows(found, path)


def distractor_items(config: EvalConfig) -> list[ImageItem]:
    d = config.distractors
    return load_distractors(d.root, d.name) if d.name else []


def _trained(config: EvalConfig) -> str:
    """The export of the training run `name`."""
    path = export_path(config.paths.outputs, config.name)
    if path.is_file():
        if is_unfinished(path.parent):
            log.warning("%s: that training is not finished; this is its best network so far", path.parent)
        return str(path)
    others = sorted(other.parent.name for other in path.parent.parent.glob(f"*/{path.name}"))
    there = f" (trained are {', '.join(others)}: choose by name=)" if others else ""
    raise InputError(
        f"weights: none given, and no trained network at {path}{there}. python train.py trains one; weights=PATH takes "
        "a CVNet checkpoint or a superglobal export; backbone=efficientnet_lite0 needs no download; weights=timm takes "
        "timm's; weights=random is a baseline"
    )


def checked_lists(
    config: EvalConfig,
    dataset: EvaluationSet | None,
    distractors: list[ImageItem],
    problems: list[str],
    clock: Clock,
    queries: bool = True,
) -> list[ExtractionList]:
    """The image lists to describe, every file checked; whatever is missing is told in one message.

    Without `queries` those of the set are left out.
    """
    max_side = config.dataset.max_side
    sets: list[tuple[str, str, Sequence[ImageItem], str]] = []
    tolerated: list[ExtractionList] = []
    if dataset is not None:
        sets.append(("database", dataset.name, dataset.database, dataset.how_to_get))
        if queries and not dataset.leave_one_out:
            sets.append(("queries", dataset.name, dataset.queries, dataset.how_to_get))
    d = config.distractors
    roots = [Path(config.paths.data), *([] if dataset is None else [dataset.root]), Path(d.root)]
    with clock.time("check"):
        if d.name and distractors and d.unreadable == "skip":
            report = check_images(distractors)
            own = ExtractionList("distractors", d.name, distractors, report, max_side, d.skip_budget, roots)
            tolerated.append(own)
        elif d.name and distractors:
            sets.append(("distractors", d.name, distractors, how_to_get_distractors(Path(d.root), d.name)))
        checked = require_images([(title, items, hint) for title, _, items, hint in sets], also=problems)
    source = _with_whole_paths(config.dataset)
    strict = [
        ExtractionList(
            title,
            name,
            items,
            checked[title],
            max_side,
            roots=roots,
            source=None if title == "distractors" else source,
        )
        for title, name, items, _ in sets
    ]
    return [*strict, *tolerated]


def _with_whole_paths(d: DatasetConfig) -> dict[str, Any]:
    """The settings of a data set, as good in any other folder."""
    paths = {key: str(Path(value).resolve()) for key in _PATHS if (value := getattr(d, key)) is not None}
    return {**asdict(d), **paths}


def _extracted(
    config: EvalConfig,
    network: RetrievalNetwork,
    lists: list[ExtractionList],
    trainer: pl.Trainer,
    clock: Clock,
) -> Inputs | None:
    """Descriptors of the lists from their stores, extracted where they are missing; None after a part of several."""
    how = config.extraction
    networks = [network, *_siblings(config, network)]
    with clock.time("extract"):
        place, dtype = Path(config.paths.stores), config.store.dtype
        stores, computed = extract_lists(networks, lists, place, trainer, how, config.trainer.num_workers, dtype)
    left = sum(len(store.missing) for store in stores)
    if how.shard is not None and left:
        text = "Extracted shard %s; %d images remain for the other shards; the last shard computes the metrics"
        log.info(text, how.shard, left)
        return None
    found = {part.title: store for part, store in zip(lists, stores, strict=True)}
    parts = [found[title] for title in ("database", "distractors") if title in found]
    about = {
        "weights": network.weights_label,
        "weights_format": network.weights_format,
        "network": network.identity(),
        "trained_pooling": network.trained_pooling,
        "stores": {
            t: {"fingerprint": s.fingerprint(), **{k: s.manifest[k] for k in ("dtype", "provenance")}}
            for t, s in found.items()
        },
        "extracted": computed,
    }
    queries = as_rows(found.get("queries", found["database"]), "queries")
    return Inputs(queries, concat(*parts, name="database"), None, [], about)


def evaluated_network(config: EvalConfig) -> RetrievalNetwork:
    weights = config.weights or (config.backbone.weights if config.backbone else None)
    if weights is None:
        weights = _trained(config)
    name = config.backbone.name if config.backbone else None
    network = load_model(
        weights,
        backbone=name,
        pooling=config.pooling.overrides(),
        scales=config.scales,
        antialias=config.antialias,
        seed=config.seed,
    )
    network.precision = config.extraction.precision
    return network


def _siblings(config: EvalConfig, network: RetrievalNetwork) -> list[RetrievalNetwork]:
    """Networks of the sweep's other jobs that describe the same images; those of one ReLUP share their backbone."""
    networks = [network]
    for pooling in sibling_poolings(config):
        try:
            wanted = make_pooling(pooling, network.trained_pooling)
            same_p = "p" not in pooling and config.pooling.p is None
            alike = [one for one in networks if same_p and one.shares_feature_maps(wanted)]
            if alike:
                networks.append(alike[0].variant(wanted))
            else:
                networks.append(evaluated_network(replace(config, pooling=PoolingOverrides(**pooling))))
        except InputError:  # that job's to say
            continue
    return networks[1:]


def less_statistics(config: EvalConfig, inputs: Inputs, clock: Clock) -> Inputs:
    """All descriptors without the searched database's mean, or whitened, as `whitening` says."""
    s = config.whitening
    if s.kind == "none":
        return inputs
    with clock.time("whitening"):
        stores = inputs.about.get("stores")
        if stores is None:
            # Own descriptors have no fingerprint to know them by.
            found, fingerprint = database_statistics(inputs.database, s.kind, s.dims), None
        else:
            fingerprints = [stores[title]["fingerprint"] for title in ("database", "distractors") if title in stores]
            place = Path(config.paths.stores)
            found, fingerprint = stored_statistics(inputs.database, s.kind, s.dims, place, fingerprints)
    about = {**asdict(s), "rows": found.rows, "fingerprint": fingerprint, "learned_on": "the searched database"}
    return replace(
        inputs,
        queries=found.apply(inputs.queries, "queries"),
        database=found.apply(inputs.database, "database"),
        about={**inputs.about, "whitening": about},
    )


class Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.times[stage] = time.perf_counter() - start


def evaluation_set(d: DatasetConfig) -> EvaluationSet | None:
    """The set that is configured, its images not looked at; None where there are only descriptors.

    Raises:
        InputError: its lists or its ground truth are missing or faulty.
    """
    return None if d.kind == "descriptors" else load_evaluation_set(**asdict(d))
