"""The first stage of an evaluation: exact, or by an index and then told how far that is from exact."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.config.evaluation import EvalConfig
from superglobal.data.evaluation_set import RecognitionTruth, RetrievalTruth
from superglobal.metrics.evaluate import Scorer
from superglobal.metrics.gldv2 import score_truth, subset
from superglobal.metrics.revisited import Result
from superglobal.reporting.results import main_scores, metric_key
from superglobal.retrieval.ann_index import ApproximateIndex, open_index, recall
from superglobal.retrieval.ranks import exact_ranks, search_and_rank
from superglobal.retrieval.rows import Rows
from superglobal.retrieval.search import search

log = logging.getLogger(__name__)


@dataclass
class FirstStage:
    """Shortlists (Q, k), and per query the ranks of the scorer's targets: -1 where an index did not list them."""

    scores: np.ndarray
    ids: np.ndarray
    ranks: list[np.ndarray]
    about: dict[str, Any] = field(default_factory=dict)
    """Of an index that is not exact: its settings, and on a sample of queries recall and the difference in the set's
    main metric."""


def first_stage(
    config: EvalConfig,
    Q: np.ndarray,
    X: Rows,
    k: int,
    scorer: Scorer | None,
    truth: RetrievalTruth | RecognitionTruth | None,
    exclude: np.ndarray | None,
    device: str,
) -> FirstStage:
    """Search as `config.index` says. `scorer` or `truth` knows what is right, if anything does.

    Raises:
        InputError: bad descriptors, or an index that cannot be built.
    """
    if config.index.kind != "flat":
        return _approximate(config, Q, X, k, scorer, truth, exclude, device)
    if scorer is None:
        return FirstStage(*search(Q, X, k, backend=config.index.backend, device=device, exclude=exclude), [])
    targets = scorer.targets
    if config.index.backend == "faiss":
        scores, ids = search(Q, X, k, backend="faiss", exclude=exclude)
        return FirstStage(scores, ids, exact_ranks(Q, X, targets, device=device, exclude=exclude))
    (scores, ids), ranks = search_and_rank(Q, X, k, targets, device=device, exclude=exclude)
    return FirstStage(scores, ids, ranks)


def configured_index(config: EvalConfig, X: Rows, device: str) -> ApproximateIndex:
    """The index of `config.index` over X, built or found in `paths.stores`."""
    return open_index(X, config.index, Path(config.paths.stores), device=device)


def _approximate(
    config: EvalConfig,
    Q: np.ndarray,
    X: Rows,
    k: int,
    scorer: Scorer | None,
    truth: RetrievalTruth | RecognitionTruth | None,
    exclude: np.ndarray | None,
    device: str,
) -> FirstStage:
    index = configured_index(config, X, device)
    scores, ids = index.search(Q, k, exclude=exclude)
    ranks = [] if scorer is None else scorer.listed(ids)
    about: dict[str, Any] = {"settings": index.config.index_settings(), "exact": False}
    if config.index.compare:
        count = config.index.compare
        about["compared_to_exact"] = _compared(Q, X, (scores, ids), scorer, truth, exclude, device, count, config.seed)
    return FirstStage(scores, ids, ranks, about)


def _compared(
    Q: np.ndarray,
    X: Rows,
    lists: tuple[np.ndarray, np.ndarray],
    scorer: Scorer | None,
    truth: RetrievalTruth | RecognitionTruth | None,
    exclude: np.ndarray | None,
    device: str,
    count: int,
    seed: int,
) -> dict[str, Any]:
    """Recall of the exact lists, and the main metric less that of exact search, over `count` queries drawn from all."""
    scores, ids = lists
    drawn = np.sort(np.random.default_rng(seed).permutation(len(Q))[:count])
    part = None if scorer is None else scorer.of(drawn)
    targets = [np.empty(0, np.int64)] * len(drawn) if part is None else part.targets
    skip = None if exclude is None else exclude[drawn]
    (best_scores, best_ids), ranks = search_and_rank(Q[drawn], X, ids.shape[1], targets, device=device, exclude=skip)
    found = recall(ids[drawn], best_ids)
    about: dict[str, Any] = {"queries": len(drawn), "k": ids.shape[1]}
    about |= {"recall": float(found.mean()), "min_recall": float(found.min())}
    sample = None if truth is None else subset(truth, drawn)
    if part is not None:
        about |= _difference(part.score(part.listed(ids[drawn])), part.score(ranks))
    elif sample is not None:
        approximate = score_truth(sample, scores[drawn], ids[drawn], seed)
        about |= _difference(approximate, score_truth(sample, best_scores, best_ids, seed))
    return about


def _difference(ours: Result, exact: Result) -> dict[str, dict[str, float | None]]:
    """The main metric by protocol or part, less that of exact search; None for a part that has no query here."""
    one, other = ours.to_dict(), exact.to_dict()
    values, best = main_scores(one), main_scores(other)
    pairs = {name: (value, best[name]) for name, value in values.items()}
    return {
        f"{metric_key(one)}_difference": {
            name: None if a is None or b is None else a - b for name, (a, b) in pairs.items()
        }
    }
