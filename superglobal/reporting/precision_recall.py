"""Precision over recall, such that the area under a query's curve is its average precision exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from superglobal.metrics.gldv2 import DEPTH, first_hits

BINS = 100


def trapezoidal_steps(ranks: Any, n_positives: int) -> np.ndarray:
    """The curve that `metrics.average_precision` is the area of.

    ranks: (P,) 0-based ranks of the positives that were found, ignored images removed. Recall goes up in n_positives
    equal steps; along the j-th precision goes from j / r_j (1 where r_j = 0) to (j + 1) / (r_j + 1).
    Returns (n_positives, 2) precision at both ends of each step, 0 for those that were not found.
    """
    r = np.sort(np.asarray(ranks, dtype=np.int64))
    steps, j = np.zeros((n_positives, 2)), np.arange(len(r))
    steps[: len(r), 0] = np.where(r == 0, 1.0, j / np.maximum(r, 1))
    steps[: len(r), 1] = (j + 1) / (r + 1)
    return steps


def rectangular_steps(predicted: np.ndarray, relevant: np.ndarray, depth: int = DEPTH) -> np.ndarray:
    """The same for `landmark_metrics.average_precision_at`: along a step precision is that at its hit.

    predicted: (m,) ids, best first; relevant: ids. Returns (min(len(relevant), depth), 2).
    """
    ranks = np.flatnonzero(first_hits(predicted, relevant, depth)) + 1
    steps = np.zeros((min(len(relevant), depth), 2))
    steps[: len(ranks)] = (np.arange(1, len(ranks) + 1) / ranks)[:, None]
    return steps


def over_recall(steps: np.ndarray, bins: int = BINS) -> np.ndarray:
    """(bins,) the mean of the curve over each of as many equal parts of recall; their mean is the area.

    steps: (n, 2), n >= 1, precision at both ends of n equal steps, linear between them.
    """
    n = len(steps)
    before = np.concatenate([[0.0], np.cumsum(steps.mean(axis=1))])  # area up to each step, in steps
    at = np.linspace(0, n, bins + 1)
    step = np.minimum(at.astype(np.int64), n - 1)
    inside = at - step
    low, high = steps[step].T
    area = before[step] + low * inside + (high - low) * inside**2 / 2
    return np.diff(area) * bins / n


def curves(steps: Sequence[np.ndarray], bins: int = BINS) -> np.ndarray:
    """(Q, bins) `over_recall` of each query; NaN for one without a positive, whose steps are (0, 2)."""
    rows = [over_recall(one, bins) if len(one) else np.full(bins, np.nan) for one in steps]
    return np.stack(rows)
