"""Evaluation: extract, search, rerank, score, report."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from superglobal.api import load_model
from superglobal.checks import validated
from superglobal.config import EvalConfig, RerankConfig, pooling_overrides, rerank_parameters
from superglobal.data.folder import folder_set
from superglobal.data.images import ImageItem
from superglobal.data.revisited import revisited_set
from superglobal.data.sets import EvaluationSet, how_to_get_distractors, load_distractors, require_images
from superglobal.engine.common import export_path, make_trainer
from superglobal.errors import InputError
from superglobal.evaluation import ExtractionList, extract_lists
from superglobal.loggers import log_result
from superglobal.models.backbone import has_relup
from superglobal.models.network import RetrievalNetwork
from superglobal.retrieval import report
from superglobal.retrieval.metrics import LABELS, REVISITED, RetrievalResult
from superglobal.retrieval.pictures import draw_sheet
from superglobal.retrieval.rerankers import apply_reranker
from superglobal.retrieval.scoring import evaluate as score
from superglobal.retrieval.search import search
from superglobal.retrieval.statistics import database_statistics, stored_statistics
from superglobal.retrieval.tables import merge
from superglobal.retrieval.vectors import Rows, as_rows, concat

log = logging.getLogger(__name__)
T = TypeVar("T")

# Rows of the ablation that say nothing on a backbone without a place for ReLUP.
_RELUP_ROWS = ("relup", "no_relup")
_PROTOCOLS = {"revisited": REVISITED, "labels": LABELS}


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


def evaluate(cfg: DictConfig, folder: Path) -> float:
    """Extract, search, rerank, score and report, as configured.

    Args:
        cfg: composed `EvalConfig`.
        folder: of this run's results.

    Returns:
        The main metric, for sweepers: mAP (Medium, or over labels) after all enabled stages, in 0..1; NaN for
        a row that does not apply, for a set without labels, and in all processes but the first.

    Raises:
        InputError: anything missing, unreadable or contradicting.
    """
    config = validated(cfg, EvalConfig)
    clock = Clock()
    found = gathered(config, clock)
    if isinstance(found, str):
        log.info("ablation=%s: n/a, %s", config.ablation, found)
        report.write_without_numbers(folder, asdict(config), "n/a", found)
    return _retrieve(config, found, folder, clock) if isinstance(found, Inputs) else math.nan


def gathered(config: EvalConfig, clock: Clock) -> Inputs | str | None:
    """The descriptors to search, extracted where they are missing, under `statistics`.

    Returns the reason for a row of the ablation that does not apply, and None in all processes but the first.
    Raises InputError for anything missing, all of it in one message.
    """
    found = _gathered(config, clock)
    return _less_statistics(config, found, clock) if isinstance(found, Inputs) else found


def _gathered(config: EvalConfig, clock: Clock) -> Inputs | str | None:
    problems: list[str] = []
    dataset = _attempt(problems, _dataset, config)
    distractors = _attempt(problems, _distractors, config) or []
    if config.descriptors.query is not None:
        if problems:
            raise InputError("\n".join(problems))
        return _own_descriptors(config, dataset, distractors)
    network = _attempt(problems, _network, config)
    lists = _checked_lists(config, dataset, distractors, problems, clock)
    assert dataset is not None
    assert network is not None
    if config.ablation in _RELUP_ROWS and not has_relup(network.backbone.net):
        return "this backbone has no plain ReLUs for ReLUP"
    trainer = make_trainer(config.trainer, logger=False, enable_checkpointing=False, inference_mode=True)
    inputs = _extracted(config, network, lists, trainer, clock)
    return replace(inputs, dataset=dataset, distractors=distractors) if trainer.is_global_zero else None


def _attempt(problems: list[str], read: Callable[[EvalConfig], T], config: EvalConfig) -> T | None:
    """What `read` gives; what it lacks goes to `problems`, so that one message tells everything missing."""
    try:
        return read(config)
    except InputError as error:
        problems.append(str(error))
        return None


def _dataset(config: EvalConfig) -> EvaluationSet | None:
    d = config.dataset
    if d.kind == "revisited":
        return revisited_set(d.root, d.name, d.crop_query)
    if d.kind == "folder":
        return folder_set(str(d.database), d.query, d.labels, d.name)
    return None


def _own_descriptors(config: EvalConfig, dataset: EvaluationSet | None, distractors: list[ImageItem]) -> Inputs:
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
        return as_rows(np.load(path, mmap_mode="r", allow_pickle=False), path)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: no readable .npy file of descriptors ({error})") from error


def _distractors(config: EvalConfig) -> list[ImageItem]:
    d = config.distractors
    return load_distractors(d.root, d.name) if d.name else []


def _trained(config: EvalConfig) -> str:
    """The export of the training run `name`."""
    path = export_path(config.paths.outputs, config.name)
    if path.is_file():
        return str(path)
    others = sorted(other.parent.name for other in path.parent.parent.glob(f"*/{path.name}"))
    there = f" (trained are {', '.join(others)}: choose by name=)" if others else ""
    raise InputError(
        f"weights: none given, and no trained network at {path}{there}. python train.py trains one; weights=PATH takes "
        "a CVNet checkpoint or a superglobal export; backbone=efficientnet_lite0 needs no download; weights=timm takes "
        "timm's; weights=random is a baseline"
    )


def _checked_lists(
    config: EvalConfig,
    dataset: EvaluationSet | None,
    distractors: list[ImageItem],
    problems: list[str],
    clock: Clock,
) -> list[ExtractionList]:
    """The image lists to describe, every file checked; whatever is missing is told in one message."""
    sets: list[tuple[str, str, list[ImageItem], str]] = []
    if dataset is not None:
        sets.append(("database", dataset.name, dataset.database, dataset.how_to_get))
        if not dataset.leave_one_out:
            sets.append(("queries", dataset.name, dataset.queries, dataset.how_to_get))
    d = config.distractors
    if d.name and distractors:
        sets.append(("distractors", d.name, distractors, how_to_get_distractors(Path(d.root), d.name)))
    with clock.time("check"):
        signatures = require_images([(title, items, hint) for title, _, items, hint in sets], also=problems)
    max_side = config.dataset.max_side
    return [ExtractionList(title, name, items, signatures[title], max_side) for title, name, items, _ in sets]


def _extracted(
    config: EvalConfig,
    network: RetrievalNetwork,
    lists: list[ExtractionList],
    trainer: pl.Trainer,
    clock: Clock,
) -> Inputs:
    """Descriptors of the lists from their stores, extracted where they are missing."""
    with clock.time("extract"):
        stores, computed = extract_lists(network, lists, Path(config.paths.stores), trainer, config.trainer.num_workers)
    found = {part.title: store for part, store in zip(lists, stores, strict=True)}
    parts = [found[title] for title in ("database", "distractors") if title in found]
    about = {
        "weights": network.weights_label,
        "network": network.identity(),
        "trained_pooling": network.trained_pooling,
        "stores": {t: {k: s.manifest[k] for k in ("fingerprint", "provenance")} for t, s in found.items()},
        "extracted": computed,
    }
    queries = as_rows(found.get("queries", found["database"]), "queries")
    return Inputs(queries, concat(*parts, name="database"), None, [], about)


def _network(config: EvalConfig) -> RetrievalNetwork:
    weights = config.weights or (config.backbone.weights if config.backbone else None)
    if weights is None:
        weights = _trained(config)
    name = config.backbone.name if config.backbone else None
    return load_model(
        weights,
        backbone=name,
        pooling=pooling_overrides(config.pooling),
        scales=config.scales,
        antialias=config.antialias,
        seed=config.seed,
    )


def _less_statistics(config: EvalConfig, inputs: Inputs, clock: Clock) -> Inputs:
    """All descriptors without the searched database's mean, or whitened, as `statistics` says."""
    s = config.statistics
    if s.kind == "none":
        return inputs
    with clock.time("statistics"):
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
        about={**inputs.about, "statistics": about},
    )


def shortlist_size(k: int, rerank: RerankConfig, inputs: Inputs) -> int:
    """Results kept per query: k, or what is reranked if that is more, or all that a query can find.

    Raises:
        InputError: a query can find nothing.
    """
    reachable = len(inputs.database) - (inputs.exclude() is not None)
    if reachable < 1:
        raise InputError("nothing to search: leave-one-out needs at least two photos")
    return min(max(k, rerank.M or 1 if rerank.enabled else 1), reachable)


def search_device(config: EvalConfig) -> str:
    """FAISS searches on the CPU; torch wherever extraction runs."""
    gpu = config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "cuda" if gpu and config.index.backend != "faiss" else "cpu"


def _retrieve(config: EvalConfig, inputs: Inputs, folder: Path, clock: Clock) -> float:
    X, dataset, device = inputs.database, inputs.dataset, search_device(config)
    Q, exclude = inputs.query_block(), inputs.exclude()
    k = shortlist_size(config.k, config.rerank, inputs)
    with clock.time("search"):
        stages = {"search": search(Q, X, k, backend=config.index.backend, device=device, exclude=exclude)}
    counted: dict[str, tuple[np.ndarray, Rows, np.ndarray | None]] = {"search": (Q, X, None)}
    if config.rerank.enabled:
        with clock.time("rerank"):
            second = apply_reranker(
                config.rerank.kind,
                rerank_parameters(config.rerank),
                Q,
                X,
                stages["search"][1],
                exclude=exclude,
                backend=config.index.backend,
                device=device,
                folder=folder,
            )
        stages["rerank"] = second.scores, second.ids
        counted["rerank"] = second.queries, second.database, second.shortlist
    results: dict[str, RetrievalResult] = {}
    if dataset is not None and dataset.gnd is not None:
        with clock.time("score"):
            for name, (queries, searched, shortlist) in counted.items():
                results[name] = score_set(dataset, queries, searched, shortlist, exclude, device, config.seed)
    names = _names(inputs)
    summary = report.summarise(asdict(config), inputs.about, names, results, clock.times)
    report.write_result(folder, summary, results, stages, names)
    report.print_result(summary, folder)
    # Own descriptors need no photos, so there may be none to show.
    if dataset is not None and config.pictures.queries and config.descriptors.query is None:
        database = [*dataset.database, *inputs.distractors]
        draw_sheet(folder / "sheet.png", dataset, database, stages, config.pictures.queries, config.pictures.ranks)
    log_result(config, summary, folder)
    return report.main_metric(summary)


def score_set(
    dataset: EvaluationSet,
    Q: np.ndarray,
    X: Rows,
    shortlist: np.ndarray | None,
    exclude: np.ndarray | None,
    device: str,
    seed: int,
) -> RetrievalResult:
    """`evaluate` of the public functions, with the data set's own ground truth, protocols and landmarks."""
    gnd = dataset.gnd or []
    if exclude is not None:
        # An excluded image has no rank, so it cannot be listed as junk.
        gnd = [{"positive": entry["positive"]} for entry in gnd]
    protocols = _PROTOCOLS[dataset.protocols]
    clusters = dataset.clusters
    return score(Q, X, gnd, protocols, shortlist, clusters=clusters, exclude=exclude, device=device, seed=seed)


def _names(inputs: Inputs) -> report.Names:
    dataset = inputs.dataset
    if dataset is None:
        queries = [f"query {i}" for i in range(len(inputs.queries))]
        return report.Names(queries, [str(i) for i in range(len(inputs.database))], None)
    database = [_relative(item.path, dataset.root) for item in [*dataset.database, *inputs.distractors]]
    return report.Names([_relative(item.path, dataset.root) for item in dataset.queries], database, dataset.clusters)


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


class Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.times[stage] = time.perf_counter() - start


class MergedTable(Callback):
    """Hydra callback: ends a multirun with one table of all its jobs, and with status 2 if one of them failed."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        if any(row["status"] == "failed" for row in merge(Path(config.hydra.sweep.dir))):
            sys.exit(2)
