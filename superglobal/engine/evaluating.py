"""Evaluation: extract, search, rerank, score, report."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig

from superglobal.api import load_model
from superglobal.checks import validated
from superglobal.config import EvalConfig, PoolingSettings, pooling_overrides
from superglobal.data.images import ImageItem
from superglobal.data.lazy import chained, file_names
from superglobal.data.sets import EvaluationSet, how_to_get_distractors, load_distractors, require_images
from superglobal.engine.common import evaluation_set, export_path, make_trainer
from superglobal.engine.extracting import extract_lists
from superglobal.engine.searching import first_stage
from superglobal.engine.sweeps import sibling_poolings
from superglobal.errors import InputError
from superglobal.evaluation import ExtractionList
from superglobal.files import write_atomically
from superglobal.loggers import log_result
from superglobal.models.backbone import has_relup
from superglobal.models.network import RetrievalNetwork
from superglobal.models.pooling import make_pooling
from superglobal.retrieval import report
from superglobal.retrieval.metrics import LABELS, REVISITED, Protocol, Result, RetrievalResult
from superglobal.retrieval.pictures import draw_sheet
from superglobal.retrieval.rerank import rerank
from superglobal.retrieval.scoring import evaluate as score
from superglobal.retrieval.scoring import make_scorer
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


def evaluate(cfg: DictConfig, folder: Path) -> float:
    """Extract, search, rerank, score and report, as configured.

    Args:
        cfg: composed `EvalConfig`.
        folder: of this run's results.

    Returns:
        The main metric, for sweepers: mAP (Medium, or over labels), mAP@100 or GAP after all enabled stages, in 0..1;
        NaN for a row that does not apply, for a set without labels, and in all processes but the first.

    Raises:
        InputError: anything missing, unreadable or contradicting.
    """
    config = validated(cfg, EvalConfig)
    clock = Clock()
    problems: list[str] = []
    dataset = _attempt(problems, _dataset, config)
    distractors = _attempt(problems, _distractors, config) or []
    if config.descriptors.query is not None:
        if problems:
            raise InputError("\n".join(problems))
        return _retrieve(config, _own_descriptors(config, dataset, distractors), folder, clock)
    network = _attempt(problems, _network, config)
    lists = _checked_lists(config, dataset, distractors, problems, clock)
    assert dataset is not None
    assert network is not None
    if config.ablation in _RELUP_ROWS and not has_relup(network.backbone.net):
        return _not_applicable(config, folder)
    trainer = make_trainer(config.trainer, logger=False, enable_checkpointing=False, inference_mode=True)
    inputs = _extracted(config, network, lists, trainer, clock)
    if inputs is None or not trainer.is_global_zero:
        return math.nan
    return _retrieve(config, replace(inputs, dataset=dataset, distractors=distractors), folder, clock)


def _attempt(problems: list[str], read: Callable[[EvalConfig], T], config: EvalConfig) -> T | None:
    """What `read` gives; what it lacks goes to `problems`, so that one message tells everything missing."""
    try:
        return read(config)
    except InputError as error:
        problems.append(str(error))
        return None


def _dataset(config: EvalConfig) -> EvaluationSet | None:
    return evaluation_set(config.dataset)


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
    sets: list[tuple[str, str, Sequence[ImageItem], str]] = []
    if dataset is not None:
        sets.append(("database", dataset.name, dataset.database, dataset.how_to_get))
        if not dataset.leave_one_out:
            sets.append(("queries", dataset.name, dataset.queries, dataset.how_to_get))
    d = config.distractors
    if d.name and distractors:
        sets.append(("distractors", d.name, distractors, how_to_get_distractors(Path(d.root), d.name)))
    with clock.time("check"):
        checked = require_images([(title, items, hint) for title, _, items, hint in sets], also=problems)
    max_side = config.dataset.max_side
    return [ExtractionList(title, name, items, checked[title], max_side) for title, name, items, _ in sets]


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
    if how.part is not None and left:
        text = "part %s is described; %d images are left to the others, after which any of them goes on to the results"
        log.info(text, how.part, left)
        return None
    found = {part.title: store for part, store in zip(lists, stores, strict=True)}
    parts = [found[title] for title in ("database", "distractors") if title in found]
    about = {
        "weights": network.weights_label,
        "network": network.identity(),
        "trained_pooling": network.trained_pooling,
        "stores": {t: {k: s.manifest[k] for k in ("fingerprint", "dtype", "provenance")} for t, s in found.items()},
        "extracted": computed,
    }
    queries = as_rows(found.get("queries", found["database"]), "queries")
    return Inputs(queries, concat(*parts, name="database"), None, [], about)


def _network(config: EvalConfig) -> RetrievalNetwork:
    weights = config.weights or (config.backbone.weights if config.backbone else None)
    if weights is None:
        weights = _trained(config)
    name = config.backbone.name if config.backbone else None
    network = load_model(
        weights,
        backbone=name,
        pooling=pooling_overrides(config.pooling),
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
            alike = [one for one in networks if one.shares_maps(wanted) and "p" not in pooling]
            if alike:
                networks.append(alike[0].variant(wanted))
            else:
                networks.append(_network(replace(config, pooling=PoolingSettings(**pooling))))
        except InputError:  # that job's to say
            continue
    return networks[1:]


def _search_device(config: EvalConfig) -> str:
    """Where extraction runs."""
    return "cuda" if config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu"


def _retrieve(config: EvalConfig, inputs: Inputs, folder: Path, clock: Clock) -> float:
    X, dataset, device = inputs.database, inputs.dataset, _search_device(config)
    Q = inputs.queries.block(0, len(inputs.queries))
    exclude = np.arange(len(Q)) if dataset is not None and dataset.leave_one_out else None
    reachable = len(X) - len(X.skipped) - (exclude is not None)
    if reachable < 1:
        raise InputError("nothing to search: leave-one-out needs at least two photos")
    task = None if dataset is None else dataset.task
    needed = max(config.rerank.M if config.rerank.enabled else 1, 1 if task is None else task.depth)
    k = min(max(config.k, needed), reachable)
    scorer = None
    if dataset is not None and dataset.gnd is not None and task is None:
        gnd, protocols = _truth(dataset, exclude)
        scorer = make_scorer(gnd, len(Q), len(X), protocols, clusters=dataset.clusters, seed=config.seed)
    with clock.time("search"):
        first = first_stage(config, Q, X, k, scorer, exclude, device)
    stages = {"search": (first.scores, first.ids)}
    if config.rerank.enabled:
        r = config.rerank
        with clock.time("rerank"):
            stages["rerank"] = rerank(Q, X, stages["search"][1], r.M, r.K, r.beta, device=device)
    results: dict[str, Result] = {}
    with clock.time("score"):
        if task is not None:
            results = {name: task.score(*stage, config.seed) for name, stage in stages.items()}
        elif scorer is not None:
            results["search"] = scorer.score(first.ranks)
            if "rerank" in stages:
                results["rerank"] = scorer.score(scorer.reranked(first.ranks, stages["rerank"][1]))
    names = _names(inputs)
    about = {**inputs.about, **({} if dataset is None else dataset.about), "skipped": len(X.skipped)}
    about |= {"index": first.about} if first.about else {}
    summary = report.summarise(asdict(config), about, names, results, clock.times)
    if task is not None:
        write_atomically(folder / "submission.csv", task.submission(*list(stages.values())[-1]))
    report.write_result(folder, summary, results, stages, names)
    report.print_result(summary, folder)
    # Own descriptors need no photos, so there may be none to show.
    if dataset is not None and config.pictures.queries and config.descriptors.query is None:
        database = chained(dataset.database, inputs.distractors)
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
    gnd, protocols = _truth(dataset, exclude)
    clusters = dataset.clusters
    return score(Q, X, gnd, protocols, shortlist, clusters=clusters, exclude=exclude, device=device, seed=seed)


def _truth(dataset: EvaluationSet, exclude: np.ndarray | None) -> tuple[list[dict[str, Any]], Mapping[str, Protocol]]:
    """Ground truth and protocols."""
    gnd = dataset.gnd or []
    if exclude is not None:
        # An excluded image has no rank, so it cannot be listed as junk.
        gnd = [{"positive": entry["positive"]} for entry in gnd]
    return gnd, _PROTOCOLS[dataset.protocols]


def _names(inputs: Inputs) -> report.Names:
    dataset = inputs.dataset
    if dataset is None:
        queries = [f"query {i}" for i in range(len(inputs.queries))]
        return report.Names(queries, [str(i) for i in range(len(inputs.database))], None)
    images = chained(dataset.database, inputs.distractors)
    return report.Names(file_names(dataset.queries, dataset.root), file_names(images, dataset.root), dataset.clusters)


def _not_applicable(config: EvalConfig, folder: Path) -> float:
    reason = "this backbone has no plain ReLUs for ReLUP"
    log.info("ablation=%s: n/a, %s", config.ablation, reason)
    report.write_without_numbers(folder, asdict(config), "n/a", reason)
    return math.nan


class Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.times[stage] = time.perf_counter() - start
