"""The Revisited metric: average precision and precision at k from exact ranks.

Source: Radenovic et al., CVPR 2018, and revisitop's evaluate.py.

All metrics are fractions in 0..1. Tables multiply them by 100.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from superglobal.errors import InputError

Sets = dict[str, np.ndarray]
"""Ids or ranks of a query by the name of the set, such as "easy"."""


def concatenated(arrays: Iterable[Any]) -> np.ndarray:
    """Return the concatenation of any number of integer arrays, (n,) int64."""
    return np.concatenate([np.empty(0, np.int64), *(np.asarray(array, np.int64) for array in arrays)])


class Result(typing.Protocol):
    """Scores of one ranking of all queries of a data set."""

    definition: ClassVar[dict[str, str]]
    """Definitions of the metrics, in words."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON, NaN as None; the main metric by protocol or part comes first."""

    def per_query(self) -> dict[str, list[Any]]:
        """Return a dict from column name to one value per query, NaN for queries that do not count."""


@dataclass(frozen=True)
class Protocol:
    """Sets that count as positive, and sets that are removed from the ranking before the ranks count (`ignored`)."""

    positive: tuple[str, ...]
    ignored: tuple[str, ...] = ()


REVISITED: Mapping[str, Protocol] = {
    "easy": Protocol(("easy",), ("junk", "hard")),
    "medium": Protocol(("easy", "hard"), ("junk",)),
    "hard": Protocol(("hard",), ("junk", "easy")),
}
LABELS: Mapping[str, Protocol] = {"all": Protocol(("positive",), ("junk",))}


@dataclass(frozen=True)
class RetrievalResult:
    """Scores per protocol, all fractions in 0..1. A protocol that counts no query has NaN and queries = 0."""

    definition: ClassVar[dict[str, str]] = {
        "average_precision": "trapezoidal, as in Revisited Oxford and Paris",
        "junk": "included in the reranked list, removed before ranks are counted",
    }

    map: dict[str, float]
    """Mean AP."""
    mp: dict[str, dict[int, float]]
    """Mean precision at each k."""
    ap: dict[str, np.ndarray]
    """(Q,) float64, NaN for a query without a positive."""
    interval: dict[str, tuple[float, float]]
    """95 % bootstrap interval of mAP; NaN for fewer than two clusters."""
    queries: dict[str, int]
    """Number of queries that count."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain types for JSON, NaN as None and the k of `mp` as strings."""
        return {
            "map": {name: plain(value) for name, value in self.map.items()},
            "mp": {name: {str(k): plain(v) for k, v in values.items()} for name, values in self.mp.items()},
            "ap": {name: [plain(value) for value in values] for name, values in self.ap.items()},
            "interval": {name: [plain(value) for value in values] for name, values in self.interval.items()},
            "queries": dict(self.queries),
        }

    def per_query(self) -> dict[str, list[Any]]:
        """Return a dict from column name to one value per query."""
        return {f"{protocol} AP": ap.tolist() for protocol, ap in self.ap.items()}


def plain(value: float) -> float | None:
    """Convert a number for JSON: NaN becomes None."""
    return None if np.isnan(value) else float(value)


def average_precision(ranks: Any, n_positives: int | None = None) -> float:
    """Compute trapezoidal average precision from the 0-based ranks of positives, ignored images already removed.

    AP = sum_j (1/n) (j/r_j + (j+1)/(r_j+1)) / 2, with j/r_j = 1 where r_j = 0 (revisitop's compute_ap).

    Args:
        ranks: (P,) distinct integers >= 0, in any order.
        n_positives: number n of positives, if some were not retrieved; these add nothing. P by default.

    Returns:
        AP in 0..1; NaN if n is 0.

    Raises:
        InputError: a rank is negative, repeated or not an integer, or n is less than P.
    """
    r = np.sort(np.asarray(ranks))
    n = len(r) if n_positives is None else n_positives
    if len(r) and (not np.issubdtype(r.dtype, np.integer) or r[0] < 0 or (r[1:] == r[:-1]).any()):
        raise InputError(f"average_precision: expected distinct integer ranks >= 0, got {r}")
    if n < len(r):
        raise InputError(f"average_precision: n_positives={n}: expected at least the number of ranks, {len(r)}")
    if n == 0:
        return float("nan")
    j = np.arange(len(r))
    before = np.where(r == 0, 1.0, j / np.maximum(r, 1))
    return float(((before + (j + 1) / (r + 1)) / 2).sum() / n)


def precision_at(ranks: np.ndarray, k: int) -> float:
    """Compute precision among the first k' = min(k, 1-based rank of the last retrieved positive); 0 if there is none.

    Args:
        ranks: (P,) 0-based ranks of the retrieved positives after the removal of ignored images.
        k: depth.
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
    """Score ranks under protocols.

    A positive that is missing from a truncated list adds nothing to AP but counts in n, and it counts as not retrieved
    for mP@k. Queries without a positive are excluded from all means.

    Args:
        ranks: for each query, a dict from set name to 0-based ranks, -1 for an image missing from a truncated list.
        protocols: protocols by name.
        ks: depths of the precisions.
        clusters: (Q,) labels such as landmarks, the units of the bootstrap; by default, each query is one unit.
        seed: seed of the bootstrap.
        samples: number of bootstrap samples.

    Raises:
        InputError: a query does not have a set that a protocol counts as positive.
    """
    labels = np.arange(len(ranks)) if clusters is None else np.asarray(clusters)
    if labels.shape != (len(ranks),):
        raise InputError(f"clusters: expected one label per query, {len(ranks)}, got shape {labels.shape}")
    if any(k < 1 for k in ks):
        raise InputError(f"ks: expected depths of at least 1, got {list(ks)}")
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
    """Return the sorted ranks of the retrieved positives, without ignored images, and the number of all positives."""
    missing = [name for name in protocol.positive if name not in sets]
    if missing:
        raise InputError(f"query {query}: expected a set {missing[0]!r}, which the protocol counts; got {sorted(sets)}")
    positive = concatenated(sets[name] for name in protocol.positive)
    ignored = concatenated(sets.get(name, ()) for name in protocol.ignored)
    retrieved = np.sort(positive[positive >= 0])
    above = np.searchsorted(np.sort(ignored[ignored >= 0]), retrieved)
    return retrieved - above, len(positive)


def cluster_interval(values: np.ndarray, labels: np.ndarray, seed: int = 0, samples: int = 2000) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of `values`, by a bootstrap that draws whole clusters.

    Queries of one landmark share their positives, so queries are not independent, but clusters are. With differences of
    AP as values, the result is the interval of a gain.

    Args:
        values: (Q,) without NaN.
        labels: (Q,) cluster of each query.
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
