"""Evaluation: search, rerank, score and report what was gathered."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from superglobal.config.common import validate_config
from superglobal.config.evaluation import EvalConfig, RerankConfig, rerank_parameters
from superglobal.data.evaluation_set import EvaluationSet, chain_sequences, file_names
from superglobal.errors import InputError
from superglobal.evaluation.first_stage import FirstStage, first_stage
from superglobal.evaluation.inputs import Clock, Inputs, gathered
from superglobal.loggers import evaluation_loggers
from superglobal.loggers.record import EvaluationRecord
from superglobal.metrics.evaluate import Scorer, make_scorer, most_ignored, score_without_junk
from superglobal.metrics.evaluate import evaluate as score
from superglobal.metrics.gldv2 import required_depth, score_truth, submission
from superglobal.metrics.revisited import LABELS, REVISITED, Protocol, Result, RetrievalResult
from superglobal.reporting import results as report
from superglobal.reporting.ranking_figures import draw_sheet
from superglobal.reranking.registry import Reranked, apply_reranker
from superglobal.retrieval.ranks import exact_ranks
from superglobal.retrieval.rows import Rows
from superglobal.training.trainer import sweep_name
from superglobal.utils.io import write_atomically

log = logging.getLogger(__name__)
_PROTOCOLS = {"revisited": REVISITED, "labels": LABELS}


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
    config = validate_config(cfg, EvalConfig)
    clock = Clock()
    with evaluation_loggers(config, folder, sweep_name()) as track:
        found = gathered(config, clock)
        if isinstance(found, str):
            log.info("ablation=%s: n/a, %s", config.ablation, found)
            report.write_status(folder, asdict(config), "n/a", found)
        return _retrieve(config, found, folder, clock, track) if isinstance(found, Inputs) else math.nan


def shortlist_size(k: int, rerank: RerankConfig, inputs: Inputs) -> int:
    """Results kept per query: k, or what is reranked if that is more, or all that a query can find.

    Raises:
        InputError: a query can find nothing.
    """
    reachable = len(inputs.database) - len(inputs.database.skipped) - (inputs.exclude() is not None)
    if reachable < 1:
        raise InputError("nothing to search: leave-one-out needs at least two photos")
    return min(max(k, rerank.M or 1 if rerank.enabled else 1), reachable)


def search_device(config: EvalConfig) -> str:
    """FAISS searches on the CPU; torch wherever extraction runs."""
    gpu = config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "cuda" if gpu and config.index.backend != "faiss" else "cpu"


def _retrieve(
    config: EvalConfig, inputs: Inputs, folder: Path, clock: Clock, track: Callable[[EvaluationRecord], None]
) -> float:
    X, dataset, device = inputs.database, inputs.dataset, search_device(config)
    Q, exclude = inputs.query_block(), inputs.exclude()
    truth = None if dataset is None else dataset.landmark_truth
    k = shortlist_size(max(config.k, 1 if truth is None else required_depth(truth)), config.rerank, inputs)
    scorer, drops = None, config.rerank.enabled and config.rerank.junk == "drop"
    if dataset is not None and dataset.gnd is not None and truth is None:
        gnd, protocols = ground_truth(dataset, exclude)
        scorer = make_scorer(gnd, len(Q), len(X), protocols, clusters=dataset.clusters, seed=config.seed)
        if drops:
            k = shortlist_size(k + most_ignored(scorer), config.rerank, inputs)
    with clock.time("search"):
        first = first_stage(config, Q, X, k, scorer, truth, exclude, device)
    stages = {"search": (first.scores, first.ids)}
    second = None
    if config.rerank.enabled:
        with clock.time("rerank"):
            second = apply_reranker(
                config.rerank.kind,
                rerank_parameters(config.rerank),
                Q,
                X,
                first.ids,
                exclude=exclude,
                backend=config.index.backend,
                device=device,
                folder=folder,
            )
        stages["rerank"] = second.scores, second.ids
    results: dict[str, Result] = {}
    with clock.time("score"):
        if truth is not None:
            results = {name: score_truth(truth, *stage, config.seed) for name, stage in stages.items()}
        elif scorer is not None:
            results["search"] = scorer.score(first.ranks)
            if second is not None and drops:

                def reorder(queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
                    values = rerank_parameters(config.rerank)
                    return apply_reranker(config.rerank.kind, values, Q[queries], X, ids, device=device).ids

                results["rerank"] = score_without_junk(scorer, first.ranks, first.ids, reorder)
            elif second is not None:
                results["rerank"] = scorer.score(_second_ranks(scorer, first, second, exclude, device))
    names = _names(inputs)
    about = {**inputs.about, **({} if dataset is None else dataset.about), "skipped": len(X.skipped)}
    about |= {"index": first.about} if first.about else {}
    summary = report.summarize(asdict(config), about, names, results, clock.times)
    if truth is not None:
        write_atomically(folder / "submission.csv", submission(truth, *list(stages.values())[-1]))
    report.write_result(folder, summary, results, stages, names)
    report.print_result(summary, folder)
    database = chain_sequences(dataset.database, inputs.distractors) if dataset is not None else []
    # Own descriptors need no photos, so there may be none to show.
    if dataset is not None and config.figures.queries and config.descriptors.query is None:
        draw_sheet(folder / "sheet.png", dataset, database, stages, config.figures.queries, config.figures.ranks)
    track(EvaluationRecord(summary, results, stages, names, Q, X, dataset, database))
    return report.main_metric(summary)


def _second_ranks(
    scorer: Scorer, first: FirstStage, second: Reranked, exclude: np.ndarray | None, device: str
) -> list[np.ndarray]:
    """Ranks after reranking: of a reordered shortlist they follow from the first stage's, of new vectors not."""
    if second.shortlist is not None:
        return scorer.reranked(first.ranks, second.shortlist)
    return exact_ranks(second.queries, second.database, scorer.targets, device=device, exclude=exclude)


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
    gnd, protocols = ground_truth(dataset, exclude)
    clusters = dataset.clusters
    return score(Q, X, gnd, protocols, shortlist, clusters=clusters, exclude=exclude, device=device, seed=seed)


def ground_truth(
    dataset: EvaluationSet, exclude: np.ndarray | None
) -> tuple[list[dict[str, Any]], Mapping[str, Protocol]]:
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
    images = chain_sequences(dataset.database, inputs.distractors)
    return report.Names(file_names(dataset.queries, dataset.root), file_names(images, dataset.root), dataset.clusters)
