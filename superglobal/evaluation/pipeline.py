"""Evaluate retrieval on a data set: extract descriptors, search, rerank, score and report."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from superglobal.config.common import validate_config
from superglobal.config.evaluation import EvalConfig, RerankConfig, rerank_parameters
from superglobal.data.evaluation_set import EvaluationSet, RecognitionTruth, RetrievalTruth, notes_of
from superglobal.data.lazy_sequence import chain_sequences, file_names
from superglobal.errors import InputError
from superglobal.evaluation.inputs import Inputs, NotApplicableError, StageTimer, load_inputs
from superglobal.loggers import evaluation_loggers
from superglobal.loggers.record import EvaluationRecord
from superglobal.metrics.evaluate import Scorer, make_scorer, score_without_junk
from superglobal.metrics.evaluate import evaluate as score_descriptors
from superglobal.metrics.gldv2 import required_depth, score_truth, submission, subset
from superglobal.metrics.revisited import LABELS, REVISITED, Protocol, Result, RetrievalResult
from superglobal.reporting import results as result_files
from superglobal.reporting.ranking_figures import draw_sheet
from superglobal.reranking.registry import Reranked, apply_reranker
from superglobal.retrieval.ann_index import ApproximateIndex, open_index, recall
from superglobal.retrieval.ranks import exact_ranks, search_and_rank
from superglobal.retrieval.rows import Rows
from superglobal.retrieval.search import faiss_on_gpu, resolve_backend, search
from superglobal.training.trainer import sweep_name
from superglobal.utils.io import link_latest, write_atomically

log = logging.getLogger(__name__)
_PROTOCOLS = {"revisited": REVISITED, "labels": LABELS}


@dataclass(frozen=True)
class Task:
    """Descriptors to search, and the ground truth for scoring the results."""

    inputs: Inputs
    queries: np.ndarray  # (Q, D) float32, unit norm
    exclude: np.ndarray | None  # (Q,) database id to exclude from the results of each query; None to exclude none
    device: str  # device of exact search and reranking
    scorer: Scorer | None  # computes mAP from ranks; None without labels and for GLDv2
    truth: RetrievalTruth | RecognitionTruth | None  # ground truth for the metrics of GLDv2; None for other sets

    @property
    def database(self) -> Rows:
        return self.inputs.database


@dataclass
class FirstStage:
    """Results of the search, before reranking."""

    scores: np.ndarray  # (Q, k), best first
    ids: np.ndarray  # (Q, k) database ids
    ranks: list[np.ndarray]  # for each query, the ranks of its labeled images (`Scorer.targets`); -1 if not retrieved
    about: dict[str, Any]  # for results.json: the backend as "search", and the approximate index, if used, as "index"


def evaluate(cfg: DictConfig, folder: Path) -> float:
    """Run an evaluation: extract descriptors, search, rerank, score the rankings and write the results.

    Args:
        cfg: composed `EvalConfig`.
        folder: folder for the results.

    Returns:
        The main metric after the last stage, in 0..1: mAP (for Revisited sets, under the Medium protocol), mAP@100 or
        GAP. NaN without labels, for a row of the ablation table that does not apply, and in all processes except the
        first.

    Raises:
        InputError: input or settings are missing, invalid or contradict each other.
    """
    config = validate_config(cfg, EvalConfig)
    timer = StageTimer()
    with evaluation_loggers(config, folder, sweep_name()) as track:
        try:
            inputs = load_inputs(config, timer)
        except NotApplicableError as error:
            log.info("ablation=%s does not apply, so this run has no metrics: %s", config.ablation, error)
            result_files.write_status(folder, asdict(config), "n/a", str(error))
            return math.nan
        if inputs is None:
            return math.nan
        task = make_task(config, inputs)
        k = results_per_query(config, task)
        with timer.time("search"):
            first = search_database(config, task, k)
        stages = {"search": (first.scores, first.ids)}
        reranked = None
        if config.rerank.enabled:
            with timer.time("rerank"):
                reranked = rerank_results(config, task, first.ids, folder)
            stages["rerank"] = reranked.scores, reranked.ids
        with timer.time("score"):
            results = score_stages(config, task, first, reranked)
        evaluated = write_report(config, task, first.about, results, stages, timer.seconds, folder)
        link_latest(Path(config.paths.outputs) / "eval", folder)
        track(evaluated)
        return result_files.main_metric(evaluated.summary)


def make_task(config: EvalConfig, inputs: Inputs) -> Task:
    """Combine descriptors with the ground truth of their data set, and choose the device of the search."""
    dataset, queries, exclude = inputs.dataset, inputs.query_block(), inputs.exclude()
    truth = None if dataset is None else dataset.landmark_truth
    scorer = None
    if dataset is not None and dataset.gnd is not None and truth is None:
        gnd, protocols = ground_truth(dataset, exclude)
        n_rows = len(inputs.database)
        scorer = make_scorer(gnd, len(queries), n_rows, protocols, clusters=dataset.clusters, seed=config.seed)
    return Task(inputs, queries, exclude, search_device(config), scorer, truth)


def search_device(config: EvalConfig) -> str:
    """Return the device for search and reranking: a GPU if it may be used and the search backend supports it."""
    gpu = config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "cuda" if gpu and (config.index.backend != "faiss" or faiss_on_gpu()) else "cpu"


def ground_truth(
    dataset: EvaluationSet, exclude: np.ndarray | None
) -> tuple[list[dict[str, Any]], Mapping[str, Protocol]]:
    """Return the ground truth and the protocols of a data set.

    Args:
        dataset: evaluation set.
        exclude: (Q,) database id to exclude from the results of each query; None to exclude none. The returned ground
            truth does not contain this id.

    Returns:
        The ground truth, one dict per query from the relevance, such as "positive", to database ids; and the protocols
        by name.
    """
    gnd = dataset.gnd or []
    if exclude is not None:
        # The ground truth of a leave-one-out query may list the query itself as junk. Because the query is excluded
        # from its own results, it has no rank and must not stay in the ground truth.
        gnd = [{name: ids[ids != own] for name, ids in entry.items()} for entry, own in zip(gnd, exclude, strict=True)]
    return gnd, _PROTOCOLS[dataset.protocols]


def results_per_query(config: EvalConfig, task: Task) -> int:
    """Return the number of results to keep per query: `config.k`, or more if the metric or the reranker needs more."""
    needed = 1 if task.truth is None else required_depth(task.truth)
    k = shortlist_size(max(config.k, needed), config.rerank, task.inputs)
    if k < config.k != EvalConfig.k:
        log.warning("k=%d: %d results per query, because the database has no more images", config.k, k)
    if task.scorer is not None and config.rerank.enabled and config.rerank.junk == "drop":
        k = shortlist_size(k + task.scorer.max_ignored, config.rerank, task.inputs)
    return k


def shortlist_size(k: int, rerank: RerankConfig, inputs: Inputs) -> int:
    """Return how many results to retrieve per query: k, or `rerank.M` if reranking is enabled and `rerank.M` is larger.

    The number never exceeds the number of images that a search can return.

    Raises:
        InputError: a search cannot return any image.
    """
    reachable = len(inputs.database) - len(inputs.database.skipped) - (inputs.exclude() is not None)
    if reachable < 1:
        raise InputError("nothing to search: leave-one-out evaluation needs at least two images")
    return min(max(k, rerank.M or 1 if rerank.enabled else 1), reachable)


def search_database(config: EvalConfig, task: Task, k: int) -> FirstStage:
    """Return k results per query, by exact search or with the approximate index that `config.index` selects.

    Raises:
        InputError: descriptors are invalid, or the index cannot be built.
    """
    Q, X, scorer, exclude, device = task.queries, task.database, task.scorer, task.exclude, task.device
    if config.index.kind != "flat":
        index = open_configured_index(config, X, device)
        scores, ids = index.search(Q, k, exclude=exclude)
        about: dict[str, Any] = {"settings": index.config.index_settings(), "exact": False}
        if config.index.compare:
            about["compared_to_exact"] = _compare_with_exact(config, task, scores, ids)
        ranks = [] if scorer is None else scorer.ranks_in_lists(ids)
        return FirstStage(scores, ids, ranks, {"search": f"faiss-{config.index.kind}", "index": about})
    backend = resolve_backend(config.index.backend, len(X), k, device)
    about = {"search": "faiss-flat" if backend == "faiss" else backend}
    if scorer is None:
        return FirstStage(*search(Q, X, k, backend=backend, device=device, exclude=exclude), [], about)
    targets = scorer.targets
    (scores, ids), ranks = search_and_rank(Q, X, k, targets, backend=backend, device=device, exclude=exclude)
    return FirstStage(scores, ids, ranks, about)


def open_configured_index(config: EvalConfig, X: Rows, device: str) -> ApproximateIndex:
    """Open the approximate index that `config.index` selects; build and store it if it does not exist yet.

    Args:
        config: settings of the evaluation.
        X: (N, D) database descriptors.
        device: device on which the index is built and searched.
    """
    return open_index(X, config.index, Path(config.paths.stores), device=device)


def _compare_with_exact(config: EvalConfig, task: Task, scores: np.ndarray, ids: np.ndarray) -> dict[str, Any]:
    """Compare the results of an approximate index with exact search, on a random sample of the queries.

    Args:
        config: settings of the evaluation.
        task: descriptors and ground truth.
        scores: (Q, k) scores of the approximate results.
        ids: (Q, k) ids of the approximate results.

    Returns:
        A dict for results.json: the number of sampled queries, k, the mean and the minimum recall of the exact results,
        and, with labels, the difference in the main metric by protocol.
    """
    sample = np.sort(np.random.default_rng(config.seed).permutation(len(task.queries))[: config.index.compare])
    scorer = None if task.scorer is None else task.scorer.subset(sample)
    truth = None if task.truth is None else subset(task.truth, sample)
    targets = [np.empty(0, np.int64)] * len(sample) if scorer is None else scorer.targets
    exclude = None if task.exclude is None else task.exclude[sample]
    (exact_scores, exact_ids), ranks = search_and_rank(
        task.queries[sample], task.database, ids.shape[1], targets, device=task.device, exclude=exclude
    )
    recalls = recall(ids[sample], exact_ids)
    about: dict[str, Any] = {"queries": len(sample), "k": ids.shape[1]}
    about |= {"recall": float(recalls.mean()), "min_recall": float(recalls.min())}
    if scorer is not None:
        approximate: Result = scorer.score(scorer.ranks_in_lists(ids[sample]))
        exact: Result = scorer.score(ranks)
    elif truth is not None:
        approximate = score_truth(truth, scores[sample], ids[sample], config.seed)
        exact = score_truth(truth, exact_scores, exact_ids, config.seed)
    else:
        return about
    values, exact_values = (result_files.main_scores(result.to_dict()) for result in (approximate, exact))
    pairs = {protocol: (value, exact_values[protocol]) for protocol, value in values.items()}
    about[f"{result_files.metric_key(exact.to_dict())}_difference"] = {
        protocol: None if a is None or b is None else a - b for protocol, (a, b) in pairs.items()
    }
    return about


def rerank_results(config: EvalConfig, task: Task, ids: np.ndarray, folder: Path) -> Reranked:
    """Rerank search results with the reranker that `config.rerank` selects.

    Args:
        config: settings of the evaluation.
        task: descriptors that were searched.
        ids: (Q, k) ids of the results, best first.
        folder: folder for large temporary files.
    """
    return apply_reranker(
        config.rerank.kind,
        rerank_parameters(config.rerank),
        task.queries,
        task.database,
        ids,
        exclude=task.exclude,
        backend=config.index.backend,
        device=task.device,
        folder=folder,
    )


def score_stages(config: EvalConfig, task: Task, first: FirstStage, reranked: Reranked | None) -> dict[str, Result]:
    """Compute the metrics of each stage.

    Args:
        config: settings of the evaluation.
        task: descriptors and ground truth.
        first: results of the search.
        reranked: results after reranking; None without reranking.

    Returns:
        Metrics by stage, "search" and "rerank"; an empty dict without labels.
    """
    if task.truth is not None:
        stages: dict[str, FirstStage | Reranked] = {
            "search": first,
            **({} if reranked is None else {"rerank": reranked}),
        }
        return {name: score_truth(task.truth, stage.scores, stage.ids, config.seed) for name, stage in stages.items()}
    if task.scorer is None:
        return {}
    results: dict[str, Result] = {"search": task.scorer.score(first.ranks)}
    if reranked is not None and config.rerank.junk == "drop":
        results["rerank"] = score_without_junk(task.scorer, first.ranks, first.ids, shortlist_reranker(config, task))
    elif reranked is not None:
        results["rerank"] = task.scorer.score(ranks_after_reranking(task, task.scorer, first.ranks, reranked))
    return results


def shortlist_reranker(config: EvalConfig, task: Task) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return a function that reranks shortlists with the reranker that `config.rerank` selects.

    The function takes two arrays: the indices (n,) of some queries, and the shortlists (n, m) of database ids of these
    queries. It returns the reordered shortlists (n, m).
    """

    def reorder(queries: np.ndarray, ids: np.ndarray) -> np.ndarray:
        parameters = rerank_parameters(config.rerank)
        Q = task.queries[queries]
        return apply_reranker(config.rerank.kind, parameters, Q, task.database, ids, device=task.device).ids

    return reorder


def ranks_after_reranking(task: Task, scorer: Scorer, ranks: list[np.ndarray], reranked: Reranked) -> list[np.ndarray]:
    """Return, for each query, the ranks of its labeled images (`Scorer.targets`) after reranking.

    If the reranker reordered a shortlist, only the ranks of the images in the shortlist change. If the reranker
    computed new descriptors and searched again, all ranks are computed from the new descriptors.

    Args:
        task: descriptors and ground truth.
        scorer: scorer of the ground truth.
        ranks: for each query, the ranks before reranking.
        reranked: results of the reranker.
    """
    if reranked.shortlist is not None:
        return scorer.reranked(ranks, reranked.shortlist)
    return exact_ranks(reranked.queries, reranked.database, scorer.targets, device=task.device, exclude=task.exclude)


def write_report(
    config: EvalConfig,
    task: Task,
    search: dict[str, Any],
    results: dict[str, Result],
    stages: dict[str, tuple[np.ndarray, np.ndarray]],
    seconds: dict[str, float],
    folder: Path,
) -> EvaluationRecord:
    """Write the result files of an evaluation, print its table, and return the record for the loggers.

    Args:
        config: settings of the evaluation.
        task: descriptors and ground truth.
        search: entries for results.json that describe the search, from `FirstStage.about`.
        results: metrics by stage; empty without labels.
        stages: scores (Q, k) and ids (Q, k) by stage.
        seconds: duration of each stage.
        folder: folder to write to.
    """
    inputs, dataset, X = task.inputs, task.inputs.dataset, task.database
    if dataset is None:
        images: Any = []
        queries, database = range(len(inputs.queries)), range(len(X))
        names = result_files.Names([f"query {i}" for i in queries], [str(i) for i in database], None)
    else:
        images = chain_sequences(dataset.database, inputs.distractors)
        query_names, image_names = (file_names(items, dataset.root) for items in (dataset.queries, images))
        names = result_files.Names(query_names, image_names, dataset.clusters)
    of_dataset = (
        {} if dataset is None else {**dataset.about, "notes": notes_of(dataset), "unreadable": len(dataset.unreadable)}
    )
    about = {**inputs.about, **of_dataset, "skipped": len(X.skipped), **search}
    summary = result_files.summarize(asdict(config), about, names, results, seconds)
    if task.truth is not None:
        write_atomically(folder / "submission.csv", submission(task.truth, *list(stages.values())[-1]))
    if dataset is not None:
        result_files.write_unreadable(folder, dataset.unreadable)
    result_files.write_result(folder, summary, results, stages, names)
    if not results and dataset is not None:
        result_files.print_answers(names, stages)
    result_files.print_result(summary, folder)
    # With descriptors from files, the images may not be on this machine.
    if dataset is not None and config.figures.queries and config.descriptors.query is None:
        draw_sheet(folder / "sheet.png", dataset, images, stages, config.figures.queries, config.figures.ranks)
    return EvaluationRecord(summary, results, stages, names, task.queries, X, dataset, images)


def score_set(
    dataset: EvaluationSet,
    Q: np.ndarray,
    X: Rows,
    shortlist: np.ndarray | None,
    exclude: np.ndarray | None,
    device: str,
    seed: int,
) -> RetrievalResult:
    """Compute the mAP of a search, or of reranked shortlists, under the protocols of a data set.

    Args:
        dataset: evaluation set with ground truth.
        Q: (Q, D) query descriptors.
        X: (N, D) database descriptors.
        shortlist: (Q, M) reranked ids that replace the first results of the search; None to score the search.
        exclude: (Q,) database id to exclude from the results of each query; None to exclude none.
        device: device to compute on.
        seed: seed of the confidence intervals.
    """
    gnd, protocols = ground_truth(dataset, exclude)
    return score_descriptors(
        Q, X, gnd, protocols, shortlist, clusters=dataset.clusters, exclude=exclude, device=device, seed=seed
    )
