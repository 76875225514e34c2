"""Metrics of Revisited Oxford and Paris: average precision and precision at k, computed from exact ranks.

Source: Radenovic et al., CVPR 2018, and revisitop's evaluate.py.

All metrics are fractions in 0..1. Tables show them in percent.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from superglobal.errors import InputError

Sets = dict[str, np.ndarray]
"""Ids or ranks of one query: a dict from set name, such as "easy", to an integer array (n,)."""


def concatenated(arrays: Iterable[Any]) -> np.ndarray:
    """Concatenate integer arrays into one array (n,) int64. The result is empty if there are no arrays."""
    return np.concatenate([np.empty(0, np.int64), *(np.asarray(array, np.int64) for array in arrays)])


class Result(typing.Protocol):
    """Interface of the scores of a method on all queries of a data set."""

    definition: ClassVar[dict[str, str]]
    """Definitions of the metrics, in words."""

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as a dict of JSON types, with None for NaN. The first entry is the main metric."""

    def per_query(self) -> dict[str, list[Any]]:
        """Return a dict from column name to one score per query, NaN for queries that are not scored."""


@dataclass(frozen=True)
class Protocol:
    """Evaluation protocol: the sets of the ground truth that count as correct results, and those that are ignored."""

    positive: tuple[str, ...]
    """Names of the sets whose images count as correct results."""
    ignored: tuple[str, ...] = ()
    """Names of the sets whose images are removed from the ranking before it is scored."""


REVISITED: Mapping[str, Protocol] = {
    "easy": Protocol(("easy",), ("junk", "hard")),
    "medium": Protocol(("easy", "hard"), ("junk",)),
    "hard": Protocol(("hard",), ("junk", "easy")),
}
"""Protocols of Revisited Oxford and Paris."""
LABELS: Mapping[str, Protocol] = {"all": Protocol(("positive",), ("junk",))}
"""Protocol of other sets, whose ground truth has only positive and ignored images."""


@dataclass(frozen=True)
class RetrievalResult:
    """Scores by protocol, as fractions in 0..1. If no query has a positive, the scores are NaN and `queries` is 0."""

    definition: ClassVar[dict[str, str]] = {
        "average_precision": "trapezoidal, as in Revisited Oxford and Paris",
        "junk": "included in the reranked list, removed before ranks are counted",
    }

    map: dict[str, float]
    """Mean AP."""
    mp: dict[str, dict[int, float]]
    """Mean precision at each k."""
    ap: dict[str, np.ndarray]
    """AP of each query: (Q,) float64, NaN for a query without a positive."""
    interval: dict[str, tuple[float, float]]
    """95 % bootstrap interval of mAP; NaN for fewer than two clusters."""
    queries: dict[str, int]
    """Number of queries with a positive, over which the means are computed."""

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as a dict of JSON types. NaN becomes None, and the keys k of `mp` become strings."""
        return {
            "map": {name: plain(value) for name, value in self.map.items()},
            "mp": {name: {str(k): plain(v) for k, v in values.items()} for name, values in self.mp.items()},
            "ap": {name: [plain(value) for value in values] for name, values in self.ap.items()},
            "interval": {name: [plain(value) for value in values] for name, values in self.interval.items()},
            "queries": dict(self.queries),
        }

    def per_query(self) -> dict[str, list[Any]]:
        """Return the scores of each query: a dict from column name to one value per query."""
        return {f"{protocol} AP": ap.tolist() for protocol, ap in self.ap.items()}


def plain(value: float) -> float | None:
    """Return None for NaN, which JSON does not support, and any other number unchanged."""
    return None if np.isnan(value) else float(value)


def average_precision(ranks: Any, n_positives: int | None = None) -> float:
    """Compute trapezoidal average precision from the ranks of the positives.

    AP = sum_j (1/n) (j/r_j + (j+1)/(r_j+1)) / 2 for the ascending ranks r_j, j = 0, 1, ..., with j/r_j = 1 where
    r_j = 0 (revisitop's compute_ap).

    Args:
        ranks: (P,) distinct 0-based ranks of the retrieved positives after ignored images are removed, in any order.
        n_positives: number n of all positives, including those that were not retrieved; P by default.

    Returns:
        AP in 0..1; NaN if n is 0.

    Raises:
        InputError: a rank is negative, repeated or not an integer, or n is less than P.
    """
    r = np.sort(np.asarray(ranks))
    n = len(r) if n_positives is None else n_positives
    if len(r) and (not np.issubdtype(r.dtype, np.integer) or r[0] < 0 or (r[1:] == r[:-1]).any()):
        raise InputError(f"average_precision: expected distinct integer ranks >= 0, got {r}")
    r = r.astype(np.int64)  # r + 1 below could overflow in a smaller integer type
    if n < len(r):
        raise InputError(f"average_precision: n_positives={n}: expected at least the number of ranks, {len(r)}")
    if n == 0:
        return float("nan")
    j = np.arange(len(r))
    before = np.where(r == 0, 1.0, j / np.maximum(r, 1))
    return float(((before + (j + 1) / (r + 1)) / 2).sum() / n)


def precision_at(ranks: np.ndarray, k: int) -> float:
    """Compute the precision at depth k.

    If the 1-based rank of the last retrieved positive is less than k, the precision at this rank is returned instead.

    Args:
        ranks: (P,) 0-based ranks of the retrieved positives after ignored images are removed.
        k: depth.

    Returns:
        Precision in 0..1; 0 if no positive was retrieved.
    """
    if not len(ranks):
        return 0.0
    depth = min(k, int(ranks.max()) + 1)
    return float((ranks < depth).sum() / depth)


def score_ranks(
    ranks: Sequence[Mapping[str, Any]],
    protocols: Mapping[str, Protocol] = REVISITED,
    ks: Sequence[int] = (1, 5, 10),
    clusters: Sequence[Any] | None = None,
    seed: int = 0,
    samples: int = 2000,
) -> RetrievalResult:
    """Compute mAP and mP@k from the ranks of the images in the ground truth.

    A positive that was not retrieved lowers AP, because AP is divided by the number of all positives. Queries without a
    positive are excluded from all means.

    Args:
        ranks: for each query, a dict from set name to 0-based ranks, -1 for an image that was not retrieved.
        protocols: protocols by name.
        ks: depths k of mP@k, >= 1.
        clusters: (Q,) cluster labels, such as landmarks, for the bootstrap, which draws whole clusters; by default,
            each query is a cluster.
        seed: seed of the bootstrap.
        samples: number of bootstrap samples.

    Returns:
        Scores by protocol.

    Raises:
        InputError: a query does not have a set that a protocol counts as positive, or `clusters` or `ks` is invalid.
    """
    labels = np.arange(len(ranks)) if clusters is None else np.asarray(clusters)
    if labels.shape != (len(ranks),):
        raise InputError(f"clusters: expected {len(ranks)} labels, one per query; got an array of shape {labels.shape}")
    if any(k < 1 for k in ks):
        raise InputError(f"ks: expected depths >= 1, got {list(ks)}")
    result = RetrievalResult({}, {}, {}, {}, {})
    for name, protocol in protocols.items():
        ap = np.full(len(ranks), np.nan)
        precisions = np.full((len(ranks), len(ks)), np.nan)
        for query, sets in enumerate(ranks):
            kept, total = kept_ranks(sets, protocol, query)
            if total:
                ap[query] = average_precision(kept, total)
                precisions[query] = [precision_at(kept, k) for k in ks]
        counted = ~np.isnan(ap)
        result.ap[name] = ap
        result.queries[name] = int(counted.sum())
        result.map[name] = float(ap[counted].mean()) if counted.any() else float("nan")
        means = precisions[counted].mean(axis=0) if counted.any() else np.full(len(ks), np.nan)
        result.mp[name] = {int(k): float(value) for k, value in zip(ks, means, strict=True)}
        result.interval[name] = cluster_interval(ap[counted], labels[counted], seed, samples)
    return result


def kept_ranks(sets: Mapping[str, Any], protocol: Protocol, query: int) -> tuple[np.ndarray, int]:
    """Return the ranks of a query's positives in the ranking without ignored images.

    Args:
        sets: 0-based ranks of the query's images by set name, -1 for images that were not retrieved.
        protocol: protocol that defines the positive and the ignored sets.
        query: index of the query, for messages.

    Returns:
        Ascending 0-based ranks of the retrieved positives, and the number of all positives.

    Raises:
        InputError: a positive set is missing.
    """
    missing = [name for name in protocol.positive if name not in sets]
    if missing:
        raise InputError(
            f"query {query}: expected a set {missing[0]!r}, which the protocol counts as positive; got {sorted(sets)}"
        )
    positive = concatenated(sets[name] for name in protocol.positive)
    ignored = concatenated(sets.get(name, ()) for name in protocol.ignored)
    retrieved = np.sort(positive[positive >= 0])
    above = np.searchsorted(np.sort(ignored[ignored >= 0]), retrieved)
    return retrieved - above, len(positive)


def cluster_interval(values: np.ndarray, labels: np.ndarray, seed: int = 0, samples: int = 2000) -> tuple[float, float]:
    """Compute the 95 % percentile interval of the mean of `values` by a bootstrap that draws whole clusters.

    Queries for one landmark have common positives, so their values are not independent. The clusters are independent of
    each other. If the values are differences in AP between two methods, the result is the interval of the gain in mAP.

    Args:
        values: (Q,) one value per query, without NaN.
        labels: (Q,) cluster label of each query.
        seed: seed of the bootstrap.
        samples: number of bootstrap samples.

    Returns:
        Lower and upper limit; NaN for fewer than two clusters.
    """
    _, cluster = np.unique(labels, return_inverse=True)
    sums, sizes = np.bincount(cluster, weights=values), np.bincount(cluster)
    if len(sums) < 2:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(seed).integers(len(sums), size=(samples, len(sums)))
    low, high = np.percentile(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), [2.5, 97.5])
    return float(low), float(high)
