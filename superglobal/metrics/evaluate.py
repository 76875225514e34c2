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
    """Compute mAP and mP@k from the exact rank of every image in the ground truth.

    The ranks are counted in one pass over the database, without sorting it. In this module, "first stage" means the
    search for the queries in the database, before any reranking.

    Args:
        Q: (Q, D) queries, unit L2 norm.
        X: (N, D) database, or anything that `as_rows` accepts, unit L2 norm. Rows that the ground truth does not list
            are distractors.
        ground_truth: list with one dict per query, from set name, such as "easy" or "junk", to database ids; or a dict
            or object that contains this list as `gnd`, such as the official ground truth.
        protocols: for each protocol, the sets that count as positive and the sets that are ignored.
        ids: (Q, M) reranked shortlists, each of which must be a reordering of the first stage's top M. The rank of an
            image in a shortlist is its position there. Any other image keeps its first-stage rank. If None, the
            ranking of the first stage is scored.
        ks: depths k of mP@k.
        clusters: (Q,) cluster labels for the bootstrap, which draws whole clusters; by default, queries with common
            positives form a cluster.
        exclude: (Q,) one database id per query, which is removed from the query's ranking (leave-one-out).
        device: device to compute on; the CPU by default.
        block_rows: maximum number of database rows that are processed at a time.
        seed: seed of the bootstrap.
        samples: number of bootstrap samples.

    Returns:
        Scores by protocol, as fractions in 0..1.

    Raises:
        InputError: descriptors are invalid, or a query has an invalid set or shortlist.
    """
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    scorer = make_scorer(ground_truth, len(queries), len(rows), protocols, ks, clusters, seed=seed, samples=samples)
    options = {"device": device, "block_rows": block_rows, "exclude": as_exclude(exclude, len(queries))}
    if ids is None:
        return scorer.score(exact_ranks(queries, rows, scorer.targets, **options))
    shortlist = as_shortlists(ids, len(queries), len(rows))
    last = _last_of_first_stage(queries, rows, shortlist)
    targets = [np.append(query_ids, last_id) for query_ids, last_id in zip(scorer.targets, last, strict=True)]
    ranks = exact_ranks(queries, rows, targets, **options)
    _require_top([int(query_ranks[-1]) for query_ranks in ranks], shortlist.shape[1])
    return scorer.score(scorer.reranked([query_ranks[:-1] for query_ranks in ranks], shortlist))


def _require_top(last_ranks: Sequence[int], depth: int) -> None:
    """Raise InputError for a shortlist that is not the top `depth` of the first stage.

    A shortlist of `depth` distinct ids is the top `depth` if and only if its worst first-stage rank is depth - 1.

    Args:
        last_ranks: for each query, the 0-based first-stage rank of the worst image in its shortlist.
        depth: length of the shortlists.
    """
    for query, rank in enumerate(last_ranks):
        if rank != depth - 1:
            raise InputError(
                f"ids: query {query}'s shortlist is not the top {depth} of the first stage (one of its images has rank "
                f"{rank}); expected the result of search with the same exclude, reordered but not cut or filtered"
            )


def _last_of_first_stage(queries: np.ndarray, rows: Rows, shortlist: np.ndarray) -> np.ndarray:
    """Find the image with the worst first-stage rank in each shortlist.

    Args:
        queries: (Q, D) queries.
        rows: (N, D) database descriptors.
        shortlist: (Q, M) database ids.

    Returns:
        Ids (Q,) int64.
    """
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

    The ranks of all positives are exact, even beyond the shortlist, because they are counted in one pass over the whole
    database. Average precision is trapezoidal, and junk images are removed from the ranking before the ranks of the
    positives are determined (Radenovic et al., CVPR 2018; revisitop's evaluate.py).

    Args:
        Q: (Q, D) queries, unit L2 norm.
        X: (N, D) database, unit L2 norm: an array, a memory map, a tensor or a `DescriptorStore`. Distractors are rows
            that the ground truth does not list.
        ground_truth: an evaluation set from `revisited_set`, a ground truth from `load_ground_truth`, the official dict
            with `gnd`, or for each query a dict with the ids of `easy`, `hard` and `junk`.
        ids: (Q, M) reranked shortlists, each of which must be a reordering of the top M search results. The rank of an
            image in a shortlist is its position there. Any other image keeps its rank in the search. If None, the
            search results are scored.
        ks: depths k of mP@k.
        clusters: (Q,) landmark labels for the bootstrap, which draws whole landmarks; by default, queries with common
            positives are assumed to show the same landmark.

    Returns:
        A result with the dicts `map`, `mp`, `ap`, `interval` (95 %) and `queries`. Their keys are the protocols "easy",
        "medium" and "hard". All scores are fractions in 0..1.

    Raises:
        InputError: descriptors are invalid, or a query has an invalid set or shortlist.
    """
    return evaluate(Q, X, ground_truth, REVISITED, ids, ks, clusters)


@dataclass(frozen=True)
class Scorer:
    """Validated ground truth, which lists the images whose ranks are needed, and computes the scores from these ranks.

    Use `make_scorer` to create one.
    """

    sets: list[Sets]
    protocols: Mapping[str, Protocol]
    ks: Sequence[int]
    clusters: Sequence[Any]
    seed: int
    samples: int

    @property
    def targets(self) -> list[np.ndarray]:
        """For each query, the ids (n,) int64 of all images in its ground truth. `score` takes the ranks of these."""
        return [concatenated(query_sets.values()) for query_sets in self.sets]

    @property
    def max_ignored(self) -> int:
        """Largest number of images that one protocol ignores for one query."""
        counts = [
            sum(len(sets.get(name, ())) for name in protocol.ignored)
            for protocol in self.protocols.values()
            for sets in self.sets
        ]
        return max(counts, default=0)

    def subset(self, queries: np.ndarray) -> Scorer:
        """Return a scorer for some of the queries; `queries` (n,) contains their indices."""
        return replace(self, sets=[self.sets[i] for i in queries], clusters=[self.clusters[i] for i in queries])

    def score(self, ranks: Sequence[np.ndarray]) -> RetrievalResult:
        """Compute the scores from the ranks of the targets.

        Args:
            ranks: for each query, the 0-based ranks of its `targets`, in the same order; -1 for a target that was not
                retrieved.
        """
        by_set = split_by_set(ranks, self.sets)
        return score_ranks(by_set, self.protocols, self.ks, self.clusters, self.seed, self.samples)

    def reranked(self, ranks: Sequence[np.ndarray], shortlist: np.ndarray) -> list[np.ndarray]:
        """Compute the ranks of the targets after reranking.

        A target that is not in the shortlist keeps its first-stage rank.

        Args:
            ranks: for each query, the first-stage ranks of its `targets`.
            shortlist: (Q, M) ids, a reordering of the first stage's top M.

        Returns:
            For each query, the new 0-based ranks of its `targets`.
        """
        positions = self.ranks_in_lists(shortlist)
        return [
            np.where(position >= 0, position, query_ranks)
            for position, query_ranks in zip(positions, ranks, strict=True)
        ]

    def ranks_in_lists(self, rankings: np.ndarray) -> list[np.ndarray]:
        """Return, for each query, the positions of its `targets` in its ranked list; -1 for targets not in the list.

        Args:
            rankings: (Q, n) ids, best first; shorter lists are padded with -1.
        """
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
    """Validate a ground truth and return a scorer for it.

    Args:
        ground_truth: list with one dict per query, from set name to database ids, or an object that contains it as
            `gnd`.
        n_queries: number of query descriptors, which must be the number of queries in the ground truth.
        n_rows: number of database rows; all ids must be less than this number.
        protocols: for each protocol, the sets that count as positive and the sets that are ignored.
        ks: depths k of mP@k.
        clusters: (Q,) cluster labels for the bootstrap, which draws whole clusters; by default, queries with common
            positives form a cluster.
        seed, samples: seed of the bootstrap, and number of bootstrap samples.

    Raises:
        InputError: a set is invalid; the message names the query.
    """
    sets = _parse_ground_truth(ground_truth, protocols)
    if len(sets) != n_queries:
        raise InputError(f"ground truth has {len(sets)} queries, but there are {n_queries} query descriptors")
    for query, query_sets in enumerate(sets):
        _validated_ids(query_sets, query, n_rows)
    if clusters is None:
        names = sorted({name for protocol in protocols.values() for name in protocol.positive})
        clusters = group_by_landmark(
            [concatenated(query_sets[name] for name in names if name in query_sets) for query_sets in sets]
        )
    return Scorer(sets, protocols, ks, clusters, seed, samples)


def ranks_from_rankings(rankings: Any, ground_truth: Any, protocols: Mapping[str, Protocol] = REVISITED) -> list[Sets]:
    """Look up the ranks of the ground-truth images in ranked lists, for `score_ranks`.

    Args:
        rankings: (Q, n) integer ids, best first, full or truncated; shorter lists are padded with -1.
        ground_truth: list with one dict per query, from set name to database ids, or an object that contains it as
            `gnd`.
        protocols: for each protocol, the sets that count as positive and the sets that are ignored.

    Returns:
        For each query, a dict from set name to the 0-based ranks of its ids, -1 for ids that are not in the list.

    Raises:
        InputError: a list contains an id twice or padding before an id, or the number of queries is wrong.
    """
    lists = np.asarray(rankings)
    sets = _parse_ground_truth(ground_truth, protocols)
    if lists.ndim != 2 or lists.dtype.kind not in "iu" or len(lists) != len(sets):
        raise InputError(f"rankings: expected an integer array ({len(sets)}, n), got {lists.dtype} {lists.shape}")
    ranks = []
    for query, (row, query_sets) in enumerate(zip(lists.astype(np.int64), sets, strict=True)):
        targets = _validated_ids(query_sets, query, None)
        if (np.diff((row >= 0).astype(int)) > 0).any() or len(np.unique(row[row >= 0])) < (row >= 0).sum():
            raise InputError(f"rankings: query {query} lists an id twice, or has padding (-1) before an id")
        ranks.append(_positions(row, targets))
    return split_by_set(ranks, sets)


def _parse_ground_truth(ground_truth: Any, protocols: Mapping[str, Protocol]) -> list[Sets]:
    """Convert a ground truth in any supported format to one dict per query.

    Args:
        ground_truth: list with one dict per query, from set name to ids, or an object that contains it as `gnd`.
        protocols: protocols by name. Only sets that count as positive or are ignored in a protocol are read.

    Returns:
        For each query, a dict from set name to ids (n,) int64.
    """
    wrapped = isinstance(ground_truth, Mapping)
    gnd = ground_truth.get("gnd") if wrapped else getattr(ground_truth, "gnd", ground_truth)
    if not isinstance(gnd, Sequence) or not gnd or not all(isinstance(entry, Mapping) for entry in gnd):
        raise InputError(
            "ground truth: expected a list with one dict of id lists per query, or the official dict or object "
            f"with this list as gnd, got {type(ground_truth).__name__}"
        )
    names = {name for protocol in protocols.values() for name in (*protocol.positive, *protocol.ignored)}
    return [
        {name: _as_ids(entry[name], query, name) for name in names & entry.keys()} for query, entry in enumerate(gnd)
    ]


def _as_ids(values: Any, query: int, name: str) -> np.ndarray:
    """Convert the ids of one set of a query to an array (n,) int64.

    Args:
        values: list or array of ids.
        query: index of the query, for the error message.
        name: name of the set, for the error message.

    Raises:
        InputError: the ids are not integers.
    """
    array = flat_array(values, f"ground truth of query {query}: {name}")
    if array.size and array.dtype.kind not in "iu":
        raise InputError(f"ground truth of query {query}: {name} contains {array.dtype}, expected integer ids")
    return array.astype(np.int64)


def _validated_ids(sets: Sets, query: int, n_rows: int | None) -> np.ndarray:
    """Return the ids of all sets of a query, concatenated. Raises InputError if an id is repeated or out of range.

    Args:
        sets: dict from set name to ids.
        query: index of the query, for messages.
        n_rows: number of database rows; None if it is unknown.
    """
    ids = concatenated(sets.values())
    unique, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise InputError(f"ground truth of query {query}: image {unique[counts > 1][0]} is listed more than once")
    if len(unique) and (unique[0] < 0 or (n_rows is not None and unique[-1] >= n_rows)):
        bad = unique[0] if unique[0] < 0 else unique[-1]
        raise InputError(
            f"ground truth of query {query}: image {bad} is outside the database of {n_rows} descriptors; "
            "give the ground truth of this database"
        )
    return ids


def split_by_set(ranks: Sequence[np.ndarray], sets: Sequence[Sets]) -> list[Sets]:
    """Split the ranks of each query's images into one array per set of the ground truth.

    Args:
        ranks: for each query, the ranks (n,) of the images of all its sets, concatenated in the order of the sets.
        sets: for each query, a dict from set name to the ids of its images.

    Returns:
        For each query, a dict from set name to the ranks of its images.
    """
    result = []
    for query_ranks, query_sets in zip(ranks, sets, strict=True):
        ends = np.cumsum([len(ids) for ids in query_sets.values()])
        result.append(dict(zip(query_sets, np.split(query_ranks, ends)[: len(query_sets)], strict=True)))
    return result


def _positions(row: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the positions (n,) int64 of `ids` (n,) in the list `row` (m,); -1 for an id that is not in the list."""
    if not len(row):
        return np.full(len(ids), -1)
    order = np.argsort(row)
    index = np.minimum(np.searchsorted(row, ids, sorter=order), len(row) - 1)
    return np.where(row[order[index]] == ids, order[index], -1)


Reorder = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Function that reranks the shortlists of some queries. It takes the indices (n,) of the queries and the ids (n, m) in
their shortlists, and returns the ids (n, m) in the new order."""


def score_without_junk(
    scorer: Scorer, ranks: Sequence[np.ndarray], ids: np.ndarray, reorder: Reorder
) -> RetrievalResult:
    """Rerank and score separately for each protocol, without the images that the protocol ignores.

    These images are removed from the shortlists before reranking, so that they do not affect the reranking scores.

    Args:
        scorer: scorer of the ground truth.
        ranks: for each query, the first-stage ranks of `scorer.targets`, -1 if unknown.
        ids: (Q, k) first-stage results.
        reorder: function that reranks shortlists.

    Returns:
        Scores by protocol.

    Raises:
        InputError: a shortlist contains only ignored images.
    """
    merged = RetrievalResult({}, {}, {}, {}, {})
    for name, protocol_ranks in ranks_without_junk(scorer, ranks, ids, reorder).items():
        protocols = {name: Protocol(("positive",))}
        result = score_ranks(protocol_ranks, protocols, scorer.ks, scorer.clusters, scorer.seed, scorer.samples)
        for field in ("map", "mp", "ap", "interval", "queries"):
            getattr(merged, field).update(getattr(result, field))
    return merged


def ranks_without_junk(
    scorer: Scorer, ranks: Sequence[np.ndarray], ids: np.ndarray, reorder: Reorder
) -> dict[str, list[Sets]]:
    """Compute the ranks of the positives for `score_without_junk`, separately for each protocol.

    Args:
        scorer: scorer of the ground truth.
        ranks: for each query, the first-stage ranks of `scorer.targets`, -1 if unknown.
        ids: (Q, k) first-stage results.
        reorder: function that reranks shortlists.

    Returns:
        Dict from protocol name to a list with one dict per query. Each dict has the single key "positive", with the
        ranks of the query's positives.
    """
    first = split_by_set(ranks, scorer.sets)
    result = {}
    for name, protocol in scorer.protocols.items():
        ignored = [concatenated(sets.get(n, ()) for n in protocol.ignored) for sets in scorer.sets]
        lists = _rerank_without(ids, ignored, reorder)
        protocol_ranks = []
        for sets, set_ranks, row in zip(scorer.sets, first, lists, strict=True):
            ignored_ranks = concatenated(set_ranks.get(n, ()) for n in protocol.ignored)
            rank = concatenated(set_ranks[n] for n in protocol.positive)
            rank = rank - np.searchsorted(np.sort(ignored_ranks[ignored_ranks >= 0]), rank)
            position = _positions(row, concatenated(sets[n] for n in protocol.positive))
            protocol_ranks.append({"positive": np.where(position >= 0, position, rank)})
        result[name] = protocol_ranks
    return result


def _rerank_without(ids: np.ndarray, ignored: Sequence[np.ndarray], reorder: Reorder) -> list[np.ndarray]:
    """Remove the ignored ids of each query from its shortlist, and rerank the rest.

    Shortlists that have the same length after the removal are reranked in one call of `reorder`.

    Args:
        ids: (Q, k) first-stage results.
        ignored: for each query, the ids to remove.
        reorder: function that reranks shortlists.

    Returns:
        For each query, its reranked ids (at most k).
    """
    kept = [row[~np.isin(row, query_ignored)] for row, query_ignored in zip(ids, ignored, strict=True)]
    lengths = np.array([len(row) for row in kept])
    if not lengths.min():
        raise InputError("rerank.junk=drop: all results of a query are images that a protocol ignores; raise k")
    for length in np.unique(lengths):
        queries = np.flatnonzero(lengths == length)
        for query, row in zip(queries, reorder(queries, np.stack([kept[i] for i in queries])), strict=True):
            kept[query] = row
    return kept
