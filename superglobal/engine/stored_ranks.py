"""Precision over recall of a finished evaluation, from ranks counted again over its stored descriptors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from superglobal.config import rerank_parameters
from superglobal.engine.evaluating import ground_truth, search_device
from superglobal.engine.reopening import FinishedRun
from superglobal.errors import InputError
from superglobal.reporting.precision_recall import curves, rectangular_steps, trapezoidal_steps
from superglobal.reporting.report import main_scores
from superglobal.retrieval.landmark_scoring import Ranking, Recognition
from superglobal.retrieval.metrics import Protocol, Sets, kept_ranks
from superglobal.retrieval.ranks import exact_ranks
from superglobal.retrieval.rerankers import SEARCH_AGAIN, apply_reranker
from superglobal.retrieval.scoring import Scorer, make_scorer, split_by_set
from superglobal.retrieval.without_junk import ranks_without_junk

_SAME_MEAN = 1e-4  # what a mean of precisions may differ by from machine to machine


def mean_precision(run: FinishedRun) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, int]]:
    """Precision over recall by stage and protocol or part, and how many queries each is the mean of.

    Returns:
        stage -> protocol -> (bins,), whose mean is the metric in `results.json`; protocol -> queries.

    Raises:
        InputError: no labels, the store is gone, or the curve's area is not the recorded metric.
    """
    every = precision(run)
    found: dict[str, dict[str, np.ndarray]] = {}
    for stage, by_protocol in every.items():
        recorded = main_scores(run.summary["metrics"][stage])
        found[stage] = {}
        for protocol, rows in by_protocol.items():
            counted = rows[~np.isnan(rows[:, 0])]
            found[stage][protocol] = counted.mean(axis=0) if len(counted) else np.full(rows.shape[1], np.nan)
            area, wanted = float(found[stage][protocol].mean()), recorded[protocol]
            if wanted is not None and not abs(area - wanted) < _SAME_MEAN:
                raise InputError(
                    f"{run.folder}: {stage}, {protocol}: the curve's area is {area:.5f}, but results.json has "
                    f"{wanted:.5f}; something has changed since. Make it again: {run.command()}"
                )
    return found, dict(run.summary["metrics"]["search"]["queries"])


def precision(run: FinishedRun) -> dict[str, dict[str, np.ndarray]]:
    """Stage -> protocol or part -> (Q, bins) precision over recall of each query; NaN for those that do not count."""
    dataset = run.dataset
    if dataset is None or dataset.gnd is None:
        raise InputError("curves: precision needs to know what is right, and this result has no labels")
    if isinstance(dataset.task, Ranking):
        return {stage: _ranked(dataset.task, ids) for stage, (_, ids) in run.stages.items()}
    if isinstance(dataset.task, Recognition):
        return {stage: _recognised(dataset.task, run, stage) for stage in run.stages}
    gnd, protocols = ground_truth(dataset, run.inputs.exclude())
    scorer = make_scorer(gnd, len(run.inputs.queries), len(run.inputs.database), protocols, clusters=dataset.clusters)
    return {
        stage: {
            name: curves([trapezoidal_steps(*kept_ranks(sets, protocols[name], q)) for q, sets in enumerate(ranks)])
            if not dropped
            else curves([_found(sets["positive"]) for sets in ranks])
            for name, ranks in by_protocol.items()
        }
        for stage, (by_protocol, dropped) in _ranks(run, scorer, protocols).items()
    }


def _ranked(task: Ranking, ids: np.ndarray) -> dict[str, np.ndarray]:
    rows = curves([rectangular_steps(row, wanted) for row, wanted in zip(ids, task.relevant, strict=True)])
    return {name: np.where(part[:, None], rows, np.nan) for name, part in task.parts.items()}


def _recognised(task: Recognition, run: FinishedRun, stage: str) -> dict[str, np.ndarray]:
    """Part -> (1, bins): all predictions in one list, the surest first, of which GAP is the area."""
    scores, correct = (
        np.array([float(v or "nan") for v in run.per_query[f"{stage} {w}"]]) for w in ("score", "correct")
    )
    found = {}
    for name, part in task.parts.items():
        rows = np.flatnonzero(part & ~np.isnan(scores))
        right = correct[rows[np.lexsort((task.queries[rows], -scores[rows]))]] > 0
        precision = np.cumsum(right)[right] / (np.flatnonzero(right) + 1)
        steps = np.zeros((sum(len(t) > 0 for t, there in zip(task.truth, part, strict=True) if there), 2))
        steps[: len(precision)] = precision[:, None]
        found[name] = curves([steps])
    return found


def _found(ranks: np.ndarray) -> np.ndarray:
    return trapezoidal_steps(ranks[ranks >= 0], len(ranks))


def _ranks(
    run: FinishedRun, scorer: Scorer, protocols: Mapping[str, Protocol]
) -> dict[str, tuple[dict[str, list[Sets]], bool]]:
    """Per stage the ranks of every listed image by protocol, and whether what is ignored is gone already."""
    config, inputs, device = run.config, run.inputs, search_device(run.config)
    Q, X, exclude = inputs.query_block(), inputs.database, inputs.exclude()
    ids = run.stages["search"][1]
    # An index that is not exact knows no rank but those that it lists.
    exact = config.index.kind == "flat"
    first = exact_ranks(Q, X, scorer.targets, device=device, exclude=exclude) if exact else scorer.listed(ids)

    def of(found: list[np.ndarray]) -> tuple[dict[str, list[Sets]], bool]:
        return dict.fromkeys(protocols, split_by_set(found, scorer.sets)), False

    stages = {"search": of(first)}
    kind, values = config.rerank.kind, rerank_parameters(config.rerank)
    if not config.rerank.enabled:
        return stages
    if config.rerank.junk == "drop":

        def reorder(queries: np.ndarray, some: np.ndarray) -> np.ndarray:
            return apply_reranker(kind, values, Q[queries], X, some, device=device).ids

        stages["rerank"] = ranks_without_junk(scorer, first, ids, reorder), True
    elif kind in SEARCH_AGAIN:
        backend = config.index.backend
        second = apply_reranker(
            kind, values, Q, X, ids, exclude=exclude, backend=backend, device=device, folder=run.folder
        )
        found = exact_ranks(second.queries, second.database, scorer.targets, device=device, exclude=exclude)
        stages["rerank"] = of(found)
    else:
        stages["rerank"] = of(scorer.reranked(first, run.stages["rerank"][1]))
    return stages
