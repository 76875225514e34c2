"""From rankings, or from a submission file, to GLDv2's scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from superglobal.data.landmark_lists import hex_values
from superglobal.data.landmark_solutions import (
    ranked_submission,
    read_ranked,
    read_recognised,
    read_solution,
    recognised_submission,
)
from superglobal.retrieval.landmark_metrics import (
    DEPTH,
    Parts,
    RankedResult,
    RecognitionResult,
    score_rankings,
    score_recognition,
)
from superglobal.retrieval.scoring import landmarks

VOTES = ("similarity", "distance", "nearest")
_PAIRS = 1 << 24  # pairs of neighbours that are compared at a time


@dataclass(frozen=True)
class Ranking:
    """Which images of a database are relevant to which queries: scored by mAP@100.

    Attributes:
        queries, database: (Q,) and (N,) S16 image ids.
        relevant: per query its relevant rows of the database, (n,) int64.
        parts: of the queries.
        clusters: (Q,) the landmark of each query.
    """

    queries: np.ndarray
    database: np.ndarray
    relevant: Sequence[np.ndarray]
    parts: Parts
    clusters: Sequence[str]
    depth: ClassVar[int] = DEPTH
    """Results per query that `score` needs, if the database has so many."""

    def of(self, queries: np.ndarray) -> Ranking:
        """That of some of the queries."""
        return Ranking(
            self.queries[queries],
            self.database,
            [self.relevant[i] for i in queries],
            {name: part[queries] for name, part in self.parts.items()},
            [self.clusters[i] for i in queries],
        )

    def score(self, scores: np.ndarray, ids: np.ndarray, seed: int) -> RankedResult:
        """(Q, k) rows of the database, best first."""
        return score_rankings(list(ids), self.relevant, self.parts, self.clusters, seed=seed)

    def submission(self, scores: np.ndarray, ids: np.ndarray) -> bytes:
        """The 100 best of each query as a file."""
        return ranked_submission(self.queries, (self.database[row] for row in ids[:, :DEPTH]))


@dataclass(frozen=True)
class Recognition:
    """A class for each query by the votes of its nearest neighbours: scored by GAP and top-1 accuracy.

    Attributes:
        queries: (Q,) S16 image ids.
        truth: per query its landmarks, (n,) int64; none if it shows no landmark.
        labels: (N,) int64, the landmark of each row of the database.
        parts: of the queries.
        neighbours: how many vote.
        votes: what a vote weighs, see `vote`.
    """

    queries: np.ndarray
    truth: Sequence[np.ndarray]
    labels: np.ndarray
    parts: Parts
    neighbours: int
    votes: str

    @property
    def depth(self) -> int:
        """Results per query that `score` needs, if the database has so many."""
        return self.neighbours

    def of(self, queries: np.ndarray) -> None:
        """None: GAP puts the predictions for all queries into one list, and few of a sample show a landmark at all."""

    def score(self, scores: np.ndarray, ids: np.ndarray, seed: int) -> RecognitionResult:
        """(Q, k) scores and rows of the database, best first."""
        return score_recognition(*self._predictions(scores, ids), self.truth, self.queries, self.parts)

    def submission(self, scores: np.ndarray, ids: np.ndarray) -> bytes:
        """A landmark and how sure it is for each query as a file."""
        return recognised_submission(self.queries, *self._predictions(scores, ids))

    def _predictions(self, scores: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return vote(self.labels[ids[:, : self.neighbours]], scores[:, : self.neighbours], self.votes)


def vote(labels: np.ndarray, scores: np.ndarray, votes: str = "similarity") -> tuple[np.ndarray, np.ndarray]:
    """The class of each query by its k nearest neighbours; of equal sums that of the nearer neighbour.

    Args:
        labels: (Q, k) classes of the neighbours, nearest first.
        scores: (Q, k) their similarities: cosines, or scores of reranking.
        votes: "similarity" sums s over a class's neighbours, "distance" sums 2 s - 1, which of a cosine is 1 minus the
            squared distance, "nearest" takes the nearest neighbour alone.

    Returns:
        (Q,) classes and (Q,) float64 sums.
    """
    weights = np.asarray(scores, np.float64)
    if votes == "nearest":
        return labels[:, 0], weights[:, 0]
    if votes == "distance":
        weights = 2 * weights - 1
    classes, sums = np.empty(len(labels), labels.dtype), np.empty(len(labels))
    step = max(1, _PAIRS // labels.shape[1] ** 2)
    for start in range(0, len(labels), step):
        mine, weight = labels[start : start + step], weights[start : start + step]
        totals = np.where(mine[:, :, None] == mine[:, None, :], weight[:, None, :], 0).sum(axis=2)
        best, row = totals.argmax(axis=1), np.arange(len(mine))
        classes[start : start + step], sums[start : start + step] = mine[row, best], totals[row, best]
    return classes, sums


def query_landmarks(truth: Sequence[np.ndarray]) -> list[int]:
    """`landmarks` of queries from the S16 ids of their relevant images."""
    numbers = hex_values(np.concatenate(truth))
    assert numbers is not None
    ends = np.cumsum([len(one) for one in truth])
    return landmarks([one.tolist() for one in np.split(numbers, ends)[:-1]])


def score_submission(solution: str | Path, submission: str | Path, seed: int = 0) -> RankedResult | RecognitionResult:
    """Score anybody's submission.

    Args:
        solution: retrieval_solution_v2.1.csv or recognition_solution_v2.1.csv, which says the task.
        submission: CSV with id and images, or id and landmarks.
        seed: of the bootstrap.

    Raises:
        InputError: a file that is not there, cannot be read or contradicts itself or the other.
    """
    truth = read_solution(solution)
    if truth.task == "retrieval":
        found = read_ranked(submission, truth)
        return score_rankings(found, truth.truth, truth.parts, query_landmarks(truth.truth), seed=seed)
    return score_recognition(*read_recognised(submission, truth), truth.truth, truth.ids, truth.parts)
