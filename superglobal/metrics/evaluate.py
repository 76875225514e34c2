"""Score descriptors or ranked lists against a ground truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from superglobal.data.evaluation_set import group_by_landmark
from superglobal.errors import InputError
from superglobal.metrics.revisited import REVISITED, Protocol, RetrievalResult, Sets, concatenated, score_ranks
from superglobal.retrieval.ranks import exact_ranks
from superglobal.retrieval.rows import Rows, as_exclude, as_queries, as_rows, as_shortlists, flat_array
from superglobal.retrieval.scores import pair_scores


def evaluate(
    Q: Any,
    X: Any,
    ground_truth: Any,
    protocols: Mapping[str, Protocol] = REVISITED,
    ids: Any = None,
    ks: Sequence[int] = (1, 5, 10),
    clusters: Sequence[Any] | None = None,
    *,
    exclude: Any = None,
    device: Any = None,
    block_rows: int = 65536,
    seed: int = 0,
    samples: int = 2000,
) -> RetrievalResult:
    """Search the whole database and score it, by exact ranks counted in one pass.

    Args:
        Q: (Q, D) queries, unit L2 norm.
        X: (N, D) database, or anything that `as_rows` accepts, unit L2 norm. Distractors are rows in no set.
        ground_truth: per query a dict of id lists per set, or the official dict or object with it as `gnd`.
        protocols: which sets count as positive, and which are ignored.
        ids: (Q, M) a reranked shortlist, which must be a reordering of the first stage's top M. An image in it has its
            position there as rank, any other image its first-stage rank.
        ks: depths of the precisions.
        clusters: (Q,) units of the bootstrap; by default `landmarks`.
        exclude: (Q,) ids removed from each query's ranking (leave-one-out).
        device, block_rows: see `exact_ranks`.
        seed, samples: of the bootstrap.

    Raises:
        InputError: bad descriptors, or a query with a bad set or shortlist.
    """
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    scorer = make_scorer(ground_truth, len(queries), len(rows), protocols, ks, clusters, seed=seed, samples=samples)
    options = {"device": device, "block_rows": block_rows, "exclude": as_exclude(exclude, len(queries))}
    if ids is None:
        return scorer.score(exact_ranks(queries, rows, scorer.targets, **options))
    shortlist = as_shortlists(ids, len(queries), len(rows))
    last = _last_of_first_stage(queries, rows, shortlist)
    targets = [np.append(of_query, last_id) for of_query, last_id in zip(scorer.targets, last, strict=True)]
    ranks = exact_ranks(queries, rows, targets, **options)
    _require_top([int(of_query[-1]) for of_query in ranks], shortlist.shape[1])
    return scorer.score(scorer.reranked([of_query[:-1] for of_query in ranks], shortlist))


def _require_top(last_ranks: Sequence[int], depth: int) -> None:
    """Raise InputError for a shortlist whose last image of the first stage does not have rank depth - 1.

    Distinct ids of which the last has that rank are the top of the first stage, and no others are.
    """
    for query, rank in enumerate(last_ranks):
        if rank != depth - 1:
            raise InputError(
                f"ids: query {query}'s shortlist is not the top {depth} of the first stage (one of its images has rank "
                f"{rank}); expected the list of search, with the same exclude, reranked but not cut or filtered"
            )


def _last_of_first_stage(queries: np.ndarray, rows: Rows, shortlist: np.ndarray) -> np.ndarray:
    """Return the id in each shortlist that the first stage ranks last (Q,)."""
    query_of = np.repeat(np.arange(len(queries)), shortlist.shape[1])
    scores = pair_scores(queries, rows, query_of, shortlist.ravel()).reshape(shortlist.shape)
    last = np.lexsort((shortlist, -scores), axis=1)[:, -1:]
    return np.take_along_axis(shortlist, last, axis=1)[:, 0]


def revisited_map(
    Q: Any,
    X: Any,
    ground_truth: Any,
    ids: Any = None,
    ks: Sequence[int] = (1, 5, 10),
    clusters: Sequence[Any] | None = None,
) -> RetrievalResult:
    """Compute mAP and mP@k under the Easy, Medium and Hard protocols of ROxford5k and RParis6k.

    The ranks of all positives are exact, also those beyond the shortlist: they are counted in one pass over the
    database. Average precision is trapezoidal, and junk is removed before ranks are counted (Radenovic et al., CVPR
    2018; revisitop's evaluate.py).

    Args:
        Q: (Q, D) queries, unit L2 norm.
        X: (N, D) database, unit L2 norm: an array, a memory map, a tensor or a `DescriptorStore`. Distractors are rows
            that the ground truth does not list.
        ground_truth: an evaluation set from `revisited_set`, a ground truth from `load_ground_truth`, the official dict
            with `gnd`, or for each query a dict with the ids of `easy`, `hard` and `junk`.
        ids: (Q, M) reranked shortlists, which must be a reordering of the top M of the search. An image in a shortlist
            has its position there as its rank, and any other image its rank in the search. None scores the search.
        ks: depths k of mP@k.
        clusters: (Q,) labels of landmarks, the units of the bootstrap; by default queries with common positives are
            one landmark.

    Returns:
        A result with the dicts `map`, `mp`, `ap`, `interval` (95 %) and `queries` by protocol, "easy", "medium" and
        "hard"; all scores are fractions in 0..1.

    Raises:
        InputError: bad descriptors, or a query with a bad set or shortlist.
    """
    return evaluate(Q, X, ground_truth, REVISITED, ids, ks, clusters)


@dataclass(frozen=True)
class Scorer:
    """A validated ground truth, from `make_scorer`: it lists the targets whose ranks are needed, and scores them."""

    sets: list[Sets]
    protocols: Mapping[str, Protocol]
    ks: Sequence[int]
    clusters: Sequence[Any]
    seed: int
    samples: int

    @property
    def targets(self) -> list[np.ndarray]:
        """Per query the ids of all its sets, (n,) int64."""
        return [concatenated(of_query.values()) for of_query in self.sets]

    @property
    def max_ignored(self) -> int:
        """Largest number of images that a protocol ignores for a query."""
        counts = [
            sum(len(sets.get(name, ())) for name in protocol.ignored)
            for protocol in self.protocols.values()
            for sets in self.sets
        ]
        return max(counts, default=0)

    def subset(self, queries: np.ndarray) -> Scorer:
        """Return the scorer of some queries (n,)."""
        return replace(self, sets=[self.sets[i] for i in queries], clusters=[self.clusters[i] for i in queries])

    def score(self, ranks: Sequence[np.ndarray]) -> RetrievalResult:
        """Score the 0-based ranks of `targets` per query, -1 for those that a truncated list lacks."""
        by_set = split_by_set(ranks, self.sets)
        return score_ranks(by_set, self.protocols, self.ks, self.clusters, self.seed, self.samples)

    def reranked(self, ranks: Sequence[np.ndarray], shortlist: np.ndarray) -> list[np.ndarray]:
        """Return ranks after the first stage's top M were reordered as `shortlist` (Q, M)."""
        positions = self.ranks_in_lists(shortlist)
        return [np.where(own >= 0, own, of_query) for own, of_query in zip(positions, ranks, strict=True)]

    def ranks_in_lists(self, rankings: np.ndarray) -> list[np.ndarray]:
        """Return ranks in lists (Q, n) of ids, -1 for targets that are not listed; -1 pads a short list's end."""
        return [_positions(row, targets) for row, targets in zip(rankings, self.targets, strict=True)]


def make_scorer(
    ground_truth: Any,
    n_queries: int,
    n_rows: int,
    protocols: Mapping[str, Protocol] = REVISITED,
    ks: Sequence[int] = (1, 5, 10),
    clusters: Sequence[Any] | None = None,
    *,
    seed: int = 0,
    samples: int = 2000,
) -> Scorer:
    """Validate a ground truth (see `evaluate`) against the numbers of queries and of database rows.

    Raises InputError naming the query with a bad set.
    """
    sets = _parse_ground_truth(ground_truth, protocols)
    if len(sets) != n_queries:
        raise InputError(f"ground truth has {len(sets)} queries, but there are {n_queries} query descriptors")
    for query, of_query in enumerate(sets):
        _validated_ids(of_query, query, n_rows)
    if clusters is None:
        names = sorted({name for protocol in protocols.values() for name in protocol.positive})
        clusters = group_by_landmark(
            [concatenated(of_query[name] for name in names if name in of_query) for of_query in sets]
        )
    return Scorer(sets, protocols, ks, clusters, seed, samples)


def ranks_from_rankings(rankings: Any, ground_truth: Any, protocols: Mapping[str, Protocol] = REVISITED) -> list[Sets]:
    """Return ranks for `score_ranks` from ranked lists (Q, n) of ids, full or truncated; -1 pads a short list's end.

    Raises InputError for an id listed twice, padding before an id, or a wrong number of queries.
    """
    lists = np.asarray(rankings)
    sets = _parse_ground_truth(ground_truth, protocols)
    if lists.ndim != 2 or lists.dtype.kind not in "iu" or len(lists) != len(sets):
        raise InputError(f"rankings: expected integers ({len(sets)}, n), got {lists.dtype} {lists.shape}")
    ranks = []
    for query, (row, of_query) in enumerate(zip(lists.astype(np.int64), sets, strict=True)):
        targets = _validated_ids(of_query, query, None)
        if (np.diff((row >= 0).astype(int)) > 0).any() or len(np.unique(row[row >= 0])) < (row >= 0).sum():
            raise InputError(f"rankings: query {query} lists an id twice, or has padding (-1) before an id")
        ranks.append(_positions(row, targets))
    return split_by_set(ranks, sets)


def _parse_ground_truth(ground_truth: Any, protocols: Mapping[str, Protocol]) -> list[Sets]:
    """Return per query the id arrays of the sets that the protocols use."""
    wrapped = isinstance(ground_truth, Mapping)
    gnd = ground_truth.get("gnd") if wrapped else getattr(ground_truth, "gnd", ground_truth)
    if not isinstance(gnd, Sequence) or not gnd or not all(isinstance(entry, Mapping) for entry in gnd):
        raise InputError(
            "ground truth: expected a list with one dict of id lists per query, or the official dict or object "
            f"with it as gnd, got {type(ground_truth).__name__}"
        )
    names = {name for protocol in protocols.values() for name in (*protocol.positive, *protocol.ignored)}
    return [
        {name: _as_ids(entry[name], query, name) for name in names & entry.keys()} for query, entry in enumerate(gnd)
    ]


def _as_ids(values: Any, query: int, name: str) -> np.ndarray:
    array = flat_array(values, f"ground truth of query {query}: {name}")
    if array.size and array.dtype.kind not in "iu":
        raise InputError(f"ground truth of query {query}: {name} contains {array.dtype}, expected integer ids")
    return array.astype(np.int64)


def _validated_ids(sets: Sets, query: int, n_rows: int | None) -> np.ndarray:
    """Return all ids of the sets of a query, which must be disjoint and inside the database."""
    ids = concatenated(sets.values())
    unique, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise InputError(f"ground truth of query {query}: image {unique[counts > 1][0]} is listed more than once")
    if len(unique) and (unique[0] < 0 or (n_rows is not None and unique[-1] >= n_rows)):
        bad = unique[0] if unique[0] < 0 else unique[-1]
        raise InputError(
            f"ground truth of query {query}: image {bad} is outside the database of {n_rows} descriptors; "
            "do they belong to the same data set?"
        )
    return ids


def split_by_set(ranks: Sequence[np.ndarray], sets: Sequence[Sets]) -> list[Sets]:
    """Split the ranks of each query's concatenated ids by set."""
    result = []
    for of_query, own_sets in zip(ranks, sets, strict=True):
        ends = np.cumsum([len(ids) for ids in own_sets.values()])
        result.append(dict(zip(own_sets, np.split(of_query, ends)[: len(own_sets)], strict=True)))
    return result


def _positions(row: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the position in `row` of each id, -1 where it does not occur."""
    order = np.argsort(row)
    place = np.minimum(np.searchsorted(row, ids, sorter=order), len(row) - 1)
    return np.where(row[order[place]] == ids, order[place], -1)


Reorder = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Numbers of queries (n,) and their shortlists (n, m) of ids -> the reranked shortlists (n, m)."""


def score_without_junk(
    scorer: Scorer, ranks: Sequence[np.ndarray], ids: np.ndarray, reorder: Reorder
) -> RetrievalResult:
    """Score each protocol with a shortlist of its own, from which the images that it ignores are removed.

    Args:
        scorer: of the ground truth.
        ranks: per query the first stage's ranks of `scorer.targets`, -1 where they are not known.
        ids: (Q, k) the first stage's lists.
        reorder: reranks shortlists.

    Raises:
        InputError: a list has only ignored images.
    """
    merged = RetrievalResult({}, {}, {}, {}, {})
    for name, of_protocol in ranks_without_junk(scorer, ranks, ids, reorder).items():
        protocols = {name: Protocol(("positive",))}
        result = score_ranks(of_protocol, protocols, scorer.ks, scorer.clusters, scorer.seed, scorer.samples)
        for field in ("map", "mp", "ap", "interval", "queries"):
            getattr(merged, field).update(getattr(result, field))
    return merged


def ranks_without_junk(
    scorer: Scorer, ranks: Sequence[np.ndarray], ids: np.ndarray, reorder: Reorder
) -> dict[str, list[Sets]]:
    """Return, for `score_without_junk`, per protocol the ranks of each query's positives, as the set "positive"."""
    first = split_by_set(ranks, scorer.sets)
    result = {}
    for name, protocol in scorer.protocols.items():
        ignored = [concatenated(sets.get(n, ()) for n in protocol.ignored) for sets in scorer.sets]
        lists = _rerank_without(ids, ignored, reorder)
        of_protocol = []
        for sets, set_ranks, row in zip(scorer.sets, first, lists, strict=True):
            ignored_ranks = concatenated(set_ranks.get(n, ()) for n in protocol.ignored)
            rank = concatenated(set_ranks[n] for n in protocol.positive)
            rank = rank - np.searchsorted(np.sort(ignored_ranks[ignored_ranks >= 0]), rank)
            position = _positions(row, concatenated(sets[n] for n in protocol.positive))
            of_protocol.append({"positive": np.where(position >= 0, position, rank)})
        result[name] = of_protocol
    return result


def _rerank_without(ids: np.ndarray, ignored: Sequence[np.ndarray], reorder: Reorder) -> list[np.ndarray]:
    """Return the lists (Q, k) without the ignored ids, reranked; lists of equal length are reranked together."""
    kept = [row[~np.isin(row, of_query)] for row, of_query in zip(ids, ignored, strict=True)]
    lengths = np.array([len(row) for row in kept])
    if not lengths.min():
        raise InputError("rerank.junk=drop: all results of a query are images that a protocol ignores; raise k")
    for length in np.unique(lengths):
        queries = np.flatnonzero(lengths == length)
        for query, row in zip(queries, reorder(queries, np.stack([kept[i] for i in queries])), strict=True):
            kept[query] = row
    return kept
