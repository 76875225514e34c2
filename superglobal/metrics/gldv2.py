"""GLDv2 metrics: mAP@100 for retrieval, and GAP (micro average precision) and top-1 accuracy for recognition.

Definitions: Weyand et al., CVPR 2020, and the organizers' code (tensorflow/models, delf, google_landmarks_dataset/
metrics.py). Average precision is rectangular here, but trapezoidal for the Revisited sets (revisited.py).

All metrics are fractions in 0..1, except the ranks in `RankedResult.position`. Tables show these fractions in percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from superglobal.data.evaluation_set import RecognitionTruth, RetrievalTruth
from superglobal.data.gldv2 import query_landmarks
from superglobal.data.gldv2_solutions import (
    read_recognition_submission,
    read_retrieval_submission,
    read_solution,
    recognition_submission,
    retrieval_submission,
)
from superglobal.errors import InputError
from superglobal.metrics.revisited import cluster_interval, plain

DEPTH = 100
"""Number of predictions per query that are scored."""
Parts = Mapping[str, np.ndarray]
"""Parts of the query set: a dict from part name ("public", "private", "all") to a (Q,) bool mask of its queries."""


@dataclass(frozen=True)
class RankedResult:
    """Scores of ranked lists.

    The keys of the dicts are the names of parts of the query set, such as "all". The scores of a part without queries
    are NaN.
    """

    definition: ClassVar[dict[str, str]] = {
        "average_precision": "rectangular, over the first 100 ranks, divided by min(relevant images, 100)",
        "mean": "over the queries of the solution; a query without a prediction counts as 0",
    }

    map: dict[str, float]
    """mAP@100."""
    precision: dict[str, dict[int, float]]
    """Mean fraction of relevant images among the first k predictions, by part and k."""
    position: dict[str, dict[str, float]]
    """"mean" and "median" rank, from 1, of the first relevant image; 101 if none of the first 100 is relevant."""
    interval: dict[str, tuple[float, float]]
    """95 % bootstrap interval of mAP@100."""
    queries: dict[str, int]
    """Number of queries."""
    ap: dict[str, np.ndarray]
    """Average precision of each query: (Q,) float64 under the key "all"."""

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as a dict of JSON types, with None for NaN."""
        return {
            f"mAP@{DEPTH}": {name: plain(value) for name, value in self.map.items()},
            "interval": {name: [plain(value) for value in values] for name, values in self.interval.items()},
            "precision": {
                name: {str(k): plain(v) for k, v in values.items()} for name, values in self.precision.items()
            },
            "position": {name: {k: plain(v) for k, v in values.items()} for name, values in self.position.items()},
            "queries": dict(self.queries),
        }

    def per_query(self) -> dict[str, list[Any]]:
        """Return the scores of each query: a dict from column name to one value per query."""
        return {"all AP": self.ap["all"].tolist()}


@dataclass(frozen=True)
class RecognitionResult:
    """Scores of one predicted landmark per query image.

    The keys of the dicts are the names of parts of the query set, such as "all". The scores of a part in which no image
    shows a landmark are NaN.
    """

    definition: ClassVar[dict[str, str]] = {
        "average_precision": "GAP: all predictions in one list by score, divided by the images that show a landmark",
        "non_landmarks": "a prediction for an image without a landmark is wrong; GAP_landmarks_only excludes them",
    }

    gap: dict[str, float]
    """Global average precision."""
    gap_landmarks_only: dict[str, float]
    """Global average precision without the predictions for images that show no landmark."""
    top1: dict[str, float]
    """Fraction of the queries with a landmark whose prediction is correct."""
    queries: dict[str, int]
    """Number of queries."""
    with_landmark: dict[str, int]
    """Number of queries that show a landmark."""
    classes: np.ndarray
    """(Q,) int64, predicted landmark ids."""
    scores: np.ndarray
    """(Q,) float64, confidence of each prediction, NaN for images without a prediction."""
    correct: np.ndarray
    """(Q,) bool, true if the prediction is correct."""

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as a dict of JSON types, with None for NaN."""
        return {
            "GAP": {name: plain(value) for name, value in self.gap.items()},
            "GAP_landmarks_only": {name: plain(value) for name, value in self.gap_landmarks_only.items()},
            "top1": {name: plain(value) for name, value in self.top1.items()},
            "queries": dict(self.queries),
            "with_landmark": dict(self.with_landmark),
        }

    def per_query(self) -> dict[str, list[Any]]:
        """Return the scores of each query: a dict from column name to one value per query."""
        predicted = ~np.isnan(self.scores)
        classes = [int(label) if valid else "" for label, valid in zip(self.classes, predicted, strict=True)]
        return {"class": classes, "score": self.scores.tolist(), "correct": self.correct.astype(int).tolist()}


def first_hits(predicted: np.ndarray, relevant: np.ndarray, depth: int = DEPTH) -> np.ndarray:
    """Mark the relevant ids among the first `depth` predictions of a query.

    Args:
        predicted: (m,) ids, best first. Only the first occurrence of an id can be a hit, but a repeated id still
            occupies a rank.
        relevant: relevant ids of the query.
        depth: number of predictions that are scored.

    Returns:
        Mask (min(m, depth),) bool.
    """
    head = np.asarray(predicted)[:depth]
    first = np.zeros(len(head), bool)
    first[np.unique(head, return_index=True)[1]] = True
    return first & np.isin(head, relevant)


def average_precision_at(hits: np.ndarray, n_relevant: int, depth: int = DEPTH) -> float:
    """Compute average precision: the sum of the precisions at the hits, divided by min(n_relevant, depth).

    Args:
        hits: (n,) bool, true for each relevant prediction, best first.
        n_relevant: number of relevant images; if it is 0, the result is NaN.
        depth: number of predictions that are scored.
    """
    ranks = np.flatnonzero(hits[:depth]) + 1
    return float((np.arange(1, len(ranks) + 1) / ranks).sum() / min(n_relevant, depth)) if n_relevant else float("nan")


def score_rankings(
    predicted: Sequence[np.ndarray],
    relevant: Sequence[np.ndarray],
    parts: Parts | None = None,
    clusters: Sequence[Any] | None = None,
    depth: int = DEPTH,
    ks: Sequence[int] = (1, 5, 10, 100),
    seed: int = 0,
    samples: int = 2000,
) -> RankedResult:
    """Score one ranked list of predictions per query.

    Args:
        predicted: for each query of the solution, its predicted ids, best first. A query with an empty list has an
            average precision of 0.
        relevant: for each query, its distinct relevant ids, at least one.
        parts: dict from the name of a part of the query set to a (Q,) bool mask of its queries; by default, one part
            "all" with all queries.
        clusters: (Q,) cluster labels, such as landmarks, for the bootstrap, which draws whole clusters; by default,
            each query is a cluster.
        depth: number of predictions per query that are scored.
        ks: depths k of the precisions; values above `depth` are omitted.
        seed: seed of the bootstrap.
        samples: number of bootstrap samples.

    Returns:
        Scores by part.

    Raises:
        InputError: a query has no relevant image, or the numbers of lists and queries differ.
    """
    if len(predicted) != len(relevant):
        raise InputError(
            f"predictions: expected one list per query of the solution, {len(relevant)}, got {len(predicted)}"
        )
    empty = [query for query, ids in enumerate(relevant) if not len(ids)]
    if empty:
        raise InputError(f"solution: query {empty[0]} has no relevant image; remove it")
    hits = np.zeros((len(relevant), depth), bool)
    for query, (ids, truth) in enumerate(zip(predicted, relevant, strict=True)):
        query_hits = first_hits(ids, truth, depth)
        hits[query, : len(query_hits)] = query_hits
    ap = np.array([average_precision_at(row, len(truth), depth) for row, truth in zip(hits, relevant, strict=True)])
    position = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, depth + 1)
    labels = np.arange(len(ap)) if clusters is None else np.asarray(clusters)
    result = RankedResult({}, {}, {}, {}, {}, {"all": ap})
    for name, part in (parts or {"all": np.ones(len(ap), bool)}).items():
        count = int(part.sum())
        result.queries[name] = count
        result.map[name] = float(ap[part].mean()) if count else float("nan")
        means = hits[part].mean(axis=0) if count else np.full(depth, np.nan)
        result.precision[name] = {k: float(means[:k].mean()) for k in ks if k <= depth}
        ranks = position[part] if count else np.array([np.nan])
        result.position[name] = {"mean": float(ranks.mean()), "median": float(np.median(ranks))}
        result.interval[name] = cluster_interval(ap[part], labels[part], seed, samples)
    return result


def score_recognition(
    classes: np.ndarray, scores: np.ndarray, truth: Sequence[np.ndarray], keys: np.ndarray, parts: Parts | None = None
) -> RecognitionResult:
    """Score one predicted landmark per image.

    Args:
        classes: (Q,) predicted landmark ids.
        scores: (Q,) confidences, NaN for images without a prediction.
        truth: for each image, its landmark ids; empty for an image that shows no landmark.
        keys: (Q,) image ids; predictions with equal scores are sorted by them.
        parts: dict from the name of a part of the query set to a (Q,) bool mask of its images; by default, one part
            "all" with all images.

    Returns:
        Scores by part.
    """
    correct = np.array([bool((labels == label).any()) for labels, label in zip(truth, classes, strict=True)], bool)
    predicted = ~np.isnan(scores)
    correct &= predicted
    landmark = np.array([len(labels) > 0 for labels in truth], bool)
    result = RecognitionResult({}, {}, {}, {}, {}, classes, scores, correct)
    for name, part in (parts or {"all": np.ones(len(truth), bool)}).items():
        shown = part & landmark
        result.queries[name], result.with_landmark[name] = int(part.sum()), int(shown.sum())
        for gaps, counted in ((result.gap, part), (result.gap_landmarks_only, shown)):
            rows = np.flatnonzero(counted & predicted)
            right = correct[rows[np.lexsort((keys[rows], -scores[rows]))]]
            gaps[name] = _global_average_precision(right, int(shown.sum()))
        result.top1[name] = float(correct[shown].mean()) if shown.any() else float("nan")
    return result


def _global_average_precision(right: np.ndarray, n_positives: int) -> float:
    """Compute GAP: the sum of the precisions at the correct predictions, divided by `n_positives`.

    Args:
        right: (n,) bool, true for each correct prediction, by descending score.
        n_positives: number of images that show a landmark; if it is 0, the result is NaN.
    """
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    return float(precision[right].sum() / n_positives) if n_positives else float("nan")


VOTES = ("similarity", "distance", "nearest")
"""Valid values of the argument `votes` of `vote`."""
_MAX_PAIRS = 1 << 24  # maximum number of pairs of neighbors whose classes are compared at a time


def required_depth(truth: RetrievalTruth | RecognitionTruth) -> int:
    """Return the number of search results per query that `score_truth` needs.

    A database with fewer rows than this number gives fewer results, which are also accepted.
    """
    return DEPTH if isinstance(truth, RetrievalTruth) else truth.neighbors


def subset(truth: RetrievalTruth | RecognitionTruth, queries: np.ndarray) -> RetrievalTruth | None:
    """Return the ground truth of some of the queries; `queries` (n,) int64 contains their indices.

    For recognition, return None, because a sample of the queries does not give meaningful scores: GAP sorts the
    predictions for all queries into one list, and only a few queries in a sample would show a landmark.
    """
    if isinstance(truth, RecognitionTruth):
        return None
    return RetrievalTruth(
        truth.queries[queries],
        truth.database,
        [truth.relevant[i] for i in queries],
        {name: part[queries] for name, part in truth.parts.items()},
        [truth.clusters[i] for i in queries],
    )


def score_truth(
    truth: RetrievalTruth | RecognitionTruth, scores: np.ndarray, ids: np.ndarray, seed: int = 0
) -> RankedResult | RecognitionResult:
    """Score search results against the ground truth of either task.

    Args:
        truth: ground truth.
        scores: (Q, k) scores of the results, best first.
        ids: (Q, k) database rows of the results.
        seed: seed of the bootstrap.

    Returns:
        A `RankedResult` for retrieval, a `RecognitionResult` for recognition.
    """
    if isinstance(truth, RetrievalTruth):
        return score_rankings(list(ids), truth.relevant, truth.parts, truth.clusters, seed=seed)
    return score_recognition(*predictions(truth, scores, ids), truth.truth, truth.queries, truth.parts)


def submission(truth: RetrievalTruth | RecognitionTruth, scores: np.ndarray, ids: np.ndarray) -> bytes:
    """Return the contents of a submission file for search results.

    For retrieval, the file lists the 100 best images of each query. For recognition, it lists the predicted landmark of
    each query and its score.

    Args:
        truth: ground truth.
        scores: (Q, k) scores of the results, best first.
        ids: (Q, k) database rows of the results.
    """
    if isinstance(truth, RetrievalTruth):
        return retrieval_submission(truth.queries, (truth.database[row] for row in ids[:, :DEPTH]))
    return recognition_submission(truth.queries, *predictions(truth, scores, ids))


def predictions(truth: RecognitionTruth, scores: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predict the landmark of each query by the votes of its nearest neighbors.

    Args:
        truth: ground truth, with the number of neighbors and the kind of vote.
        scores: (Q, k) scores of the search results, best first.
        ids: (Q, k) database rows of the search results.

    Returns:
        Landmark ids (Q,) int64 and their scores (Q,) float64.
    """
    return vote(truth.labels[ids[:, : truth.neighbors]], scores[:, : truth.neighbors], truth.votes)


def vote(labels: np.ndarray, scores: np.ndarray, votes: str = "similarity") -> tuple[np.ndarray, np.ndarray]:
    """Predict the class of each query by the votes of its k nearest neighbors.

    The class with the largest sum of votes wins. If two classes have equal sums, the class with the nearer neighbor
    wins.

    Args:
        labels: (Q, k) classes of the neighbors, nearest first.
        scores: (Q, k) similarities s of the neighbors: cosines or reranking scores.
        votes: "similarity": each neighbor votes with s. "distance": it votes with 2 s - 1, which is 1 minus the squared
            distance if s is a cosine. "nearest": only the nearest neighbor votes, with s.

    Returns:
        Predicted classes (Q,), and the sums of their votes (Q,) float64.

    Raises:
        InputError: k is 0.
    """
    weights = np.asarray(scores, np.float64)
    if not labels.shape[1]:
        raise InputError(f"labels: expected (Q, k) classes with k >= 1, got shape {labels.shape}")
    if votes == "nearest":
        return labels[:, 0], weights[:, 0]
    if votes == "distance":
        weights = 2 * weights - 1
    classes, sums = np.empty(len(labels), labels.dtype), np.empty(len(labels))
    step = max(1, _MAX_PAIRS // labels.shape[1] ** 2)
    for start in range(0, len(labels), step):
        label, weight = labels[start : start + step], weights[start : start + step]
        totals = np.where(label[:, :, None] == label[:, None, :], weight[:, None, :], 0).sum(axis=2)
        best, row = totals.argmax(axis=1), np.arange(len(label))
        classes[start : start + step], sums[start : start + step] = label[row, best], totals[row, best]
    return classes, sums


def score_submission(solution: str | Path, submission: str | Path, seed: int = 0) -> RankedResult | RecognitionResult:
    """Score a submission file.

    Args:
        solution: path of retrieval_solution_v2.1.csv or recognition_solution_v2.1.csv; the file determines the task.
        submission: path of a CSV file with the columns id and images (retrieval), or id and landmarks (recognition).
        seed: seed of the bootstrap.

    Returns:
        A `RankedResult` for retrieval, a `RecognitionResult` for recognition.

    Raises:
        InputError: a file is missing, cannot be read or is inconsistent.
    """
    truth = read_solution(solution)
    if truth.task == "retrieval":
        predicted = read_retrieval_submission(submission, truth)
        return score_rankings(predicted, truth.truth, truth.parts, query_landmarks(truth.truth), seed=seed)
    return score_recognition(*read_recognition_submission(submission, truth), truth.truth, truth.ids, truth.parts)
