"""Puts the parts together: the only file that knows them all."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytorch_lightning as pl
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from superglobal.api import load_model
from superglobal.config import EvalConfig, validated
from superglobal.data.folder import folder_set
from superglobal.data.images import ImageItem
from superglobal.data.revisited import revisited_set
from superglobal.data.sets import EvaluationSet, how_to_get_distractors, load_distractors, require_images
from superglobal.errors import InputError
from superglobal.evaluation import ExtractionList, extract_lists
from superglobal.loggers import log_result
from superglobal.models.backbone import has_relup
from superglobal.models.network import RetrievalNetwork
from superglobal.retrieval import report
from superglobal.retrieval.metrics import LABELS, REVISITED, RetrievalResult
from superglobal.retrieval.pictures import draw_sheet
from superglobal.retrieval.rerank import rerank
from superglobal.retrieval.scoring import evaluate as score
from superglobal.retrieval.search import search
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
        The main metric, for sweepers: mAP (Medium, or over labels) after all enabled stages, in 0..1; NaN for
        a row that does not apply and for a set without labels.

    Raises:
        InputError: anything missing, unreadable or contradicting.
    """
    config = validated(cfg)
    clock = Clock()
    problems: list[str] = []
    dataset = _attempt(problems, _dataset, config)
    distractors = _attempt(problems, _distractors, config) or []
    if config.descriptors.query is not None:
        if problems:
            raise InputError("\n".join(problems))
        return _retrieve(config, _own_descriptors(config, dataset, distractors), folder, clock)
    network = _attempt(problems, _network, config)
    inputs = _extracted(config, dataset, distractors, network, problems, clock)
    return _retrieve(config, inputs, folder, clock) if inputs else _not_applicable(config, folder)


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
        return revisited_set(config.paths.data, d.name, d.crop_query)
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
    return load_distractors(config.paths.data, config.distractors.name) if config.distractors else []


def _extracted(
    config: EvalConfig,
    dataset: EvaluationSet | None,
    distractors: list[ImageItem],
    network: RetrievalNetwork | None,
    problems: list[str],
    clock: Clock,
) -> Inputs | None:
    """Descriptors of the configured images from their stores; None for an ablation row that does not apply."""
    sets: dict[str, tuple[list[ImageItem], str]] = {}
    if dataset is not None:
        sets["database"] = (dataset.database, dataset.how_to_get)
        if not dataset.leave_one_out:
            sets["queries"] = (dataset.queries, dataset.how_to_get)
    if config.distractors is not None and distractors:
        sets["distractors"] = (distractors, how_to_get_distractors(Path(config.paths.data), config.distractors.name))
    with clock.time("check"):
        signatures = require_images([(t, items, hint) for t, (items, hint) in sets.items()], also=problems)
    assert dataset is not None
    assert network is not None
    if config.ablation in _RELUP_ROWS and not has_relup(network.backbone.net):
        return None
    names = {"distractors": config.distractors.name} if config.distractors else {}
    lists = [
        ExtractionList(t, names.get(t, dataset.name), items, signatures[t], config.dataset.max_side)
        for t, (items, _) in sets.items()
    ]
    for part in lists:
        log.info("%s: %d images", part.title, len(part.items))
    with clock.time("extract"):
        trainer = make_trainer(config)
        stores, computed = extract_lists(network, lists, Path(config.paths.stores), trainer, config.trainer.num_workers)
    if not trainer.is_global_zero:
        sys.exit(0)
    found = {part.title: store for part, store in zip(lists, stores, strict=True)}
    parts = [found["database"], *([found["distractors"]] if distractors else [])]
    about = {
        "weights": network.weights_label,
        "network": network.identity(),
        "fingerprints": {title: store.manifest["fingerprint"] for title, store in found.items()},
        "extracted": computed,
        "device": str(trainer.strategy.root_device),
    }
    queries = as_rows(found.get("queries", found["database"]), "queries")
    return Inputs(queries, concat(*parts, name="database"), dataset, distractors, about)


def _network(config: EvalConfig) -> RetrievalNetwork:
    weights = config.weights or (config.backbone.weights if config.backbone else None)
    if weights is None:
        raise InputError(
            "weights: none given. weights=PATH takes a CVNet checkpoint or a superglobal export; "
            "backbone=efficientnet_lite0 needs no download; weights=timm takes timm's; weights=random is a baseline"
        )
    name = config.backbone.name if config.backbone else None
    return load_model(
        weights,
        backbone=name,
        pooling=config.pooling,
        scales=config.scales,
        antialias=config.antialias,
        seed=config.seed,
    )


def make_trainer(config: EvalConfig) -> pl.Trainer:
    """A Trainer that only predicts and leaves no files."""
    t = config.trainer
    return pl.Trainer(
        accelerator=t.accelerator,
        devices=t.devices,
        strategy=t.strategy,
        use_distributed_sampler=False,
        precision="32-true",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=t.progress,
        inference_mode=True,
    )


def _retrieve(config: EvalConfig, inputs: Inputs, folder: Path, clock: Clock) -> float:
    Q, X = inputs.queries, inputs.database
    dataset = inputs.dataset
    exclude = np.arange(len(Q)) if dataset is not None and dataset.leave_one_out else None
    reachable = len(X) - (exclude is not None)
    k = min(max(config.k, config.rerank.M if config.rerank.enabled else 1), reachable)
    with clock.time("search"):
        scores, ids = search(Q.block(0, len(Q)), X, k, backend=config.index.backend, exclude=exclude)
    stages = {"search": (scores, ids)}
    if config.rerank.enabled:
        r = config.rerank
        with clock.time("rerank"):
            stages["rerank"] = rerank(Q.block(0, len(Q)), X, ids, M=r.M, K=r.K, beta=r.beta)
    results: dict[str, RetrievalResult] = {}
    if dataset is not None and dataset.gnd is not None:
        with clock.time("score"):
            for name, (_, order) in stages.items():
                results[name] = _score(config, inputs, order if name == "rerank" else None, exclude)
    summary = report.summarise(asdict(config), inputs.about, _names(inputs), results, clock.times)
    report.write_result(folder, summary, results, stages, _names(inputs))
    if dataset is not None and config.pictures.queries:
        database = [*dataset.database, *inputs.distractors]
        draw_sheet(folder / "sheet.png", dataset, database, stages, config.pictures.queries, config.pictures.ranks)
    report.print_result(summary, folder)
    log_result(config, summary, folder)
    return report.main_metric(summary)


def _score(
    config: EvalConfig, inputs: Inputs, shortlist: np.ndarray | None, exclude: np.ndarray | None
) -> RetrievalResult:
    dataset = inputs.dataset
    assert dataset is not None
    gnd = dataset.gnd or []
    if exclude is not None:
        gnd = [{"positive": entry["positive"]} for entry in gnd]
    return score(
        inputs.queries.block(0, len(inputs.queries)),
        inputs.database,
        gnd,
        _PROTOCOLS[dataset.protocols],
        shortlist,
        clusters=dataset.clusters,
        exclude=exclude,
        seed=config.seed,
    )


def _names(inputs: Inputs) -> report.Names:
    if inputs.dataset is None:
        queries = [f"query {i}" for i in range(len(inputs.queries))]
        return report.Names(queries, [str(i) for i in range(len(inputs.database))], None)
    root = inputs.dataset.root
    database = [_relative(item.path, root) for item in [*inputs.dataset.database, *inputs.distractors]]
    return report.Names(
        [_relative(item.path, root) for item in inputs.dataset.queries], database, inputs.dataset.clusters
    )


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _not_applicable(config: EvalConfig, folder: Path) -> float:
    reason = "this backbone has no plain ReLUs for ReLUP"
    log.info("ablation=%s: n/a, %s", config.ablation, reason)
    report.write_not_applicable(folder, asdict(config), reason)
    return float("nan")


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
    """Hydra callback: ends a multirun with one table of all its jobs."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        report.merge(Path(config.hydra.sweep.dir))
