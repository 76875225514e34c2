"""From descriptors or ranked lists and a ground truth to scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from superglobal.data.evaluation_set import landmarks
from superglobal.errors import InputError
from superglobal.metrics.revisited import REVISITED, Protocol, RetrievalResult, Sets, concatenated, score_ranks
from superglobal.retrieval.ranks import exact_ranks
from superglobal.retrieval.rows import as_exclude, as_queries, as_rows, as_shortlists, flat_array
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

    Q: (Q, D), X: (N, D) or anything `as_rows` takes, unit L2 norm. ground_truth: per query a dict of id lists
    per set, or the official dict or object holding it as `gnd`. Distractors are rows of X in no set.
    ids: (Q, M) a reranked shortlist. An image in it has its place there, any other its first-stage rank, which
    is right because the shortlist is a reordering of the first stage's top M: that is checked.
    clusters: by default `landmarks`. exclude: (Q,) ids
    taken out of each query's ranking (leave-one-out).
    Raises InputError naming the query whose sets or shortlist are wrong.
    """
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    scorer = make_scorer(ground_truth, len(queries), len(rows), protocols, ks, clusters, seed=seed, samples=samples)
    options = {"device": device, "block_rows": block_rows, "exclude": as_exclude(exclude, len(queries))}
    if ids is None:
        return scorer.score(exact_ranks(queries, rows, scorer.targets, **options))
    shortlist = as_shortlists(ids, len(queries), len(rows))
    worst = _worst(queries, rows, shortlist)
    targets = [np.append(one, last) for one, last in zip(scorer.targets, worst, strict=True)]
    found = exact_ranks(queries, rows, targets, **options)
    for query, one in enumerate(found):
        _check_is_top(int(one[-1]), shortlist.shape[1], query)
    return scorer.score(scorer.reranked([one[:-1] for one in found], shortlist))


@dataclass(frozen=True)
class Scorer:
    """A ground truth made ready: whose ranks are wanted, and what follows from them (from `make_scorer`)."""

    sets: list[Sets]
    protocols: Mapping[str, Protocol]
    ks: Sequence[int]
    clusters: Sequence[Any]
    seed: int
    samples: int

    @property
    def targets(self) -> list[np.ndarray]:
        """Per query the ids of all its sets, (n,) int64."""
        return [concatenated(one.values()) for one in self.sets]

    def of(self, queries: np.ndarray) -> Scorer:
        """That of some of the queries."""
        return replace(self, sets=[self.sets[i] for i in queries], clusters=[self.clusters[i] for i in queries])

    def score(self, found: Sequence[np.ndarray]) -> RetrievalResult:
        """found: per query the 0-based ranks of `targets`, -1 for those that a truncated list lacks."""
        ranks = split_by_set(found, self.sets)
        return score_ranks(ranks, self.protocols, self.ks, self.clusters, self.seed, self.samples)

    def reranked(self, found: Sequence[np.ndarray], shortlist: np.ndarray) -> list[np.ndarray]:
        """Ranks when the first of each list are reordered. shortlist: (Q, M) ids, the first stage's top M."""
        places = self.listed(shortlist)
        return [np.where(place >= 0, place, ranks) for place, ranks in zip(places, found, strict=True)]

    def listed(self, rankings: np.ndarray) -> list[np.ndarray]:
        """Ranks in lists (Q, n) of ids, -1 for targets that are not there; -1 pads a short list's end."""
        return [positions(row, targets) for row, targets in zip(rankings, self.targets, strict=True)]


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
    """Check a ground truth (see `evaluate`) against the numbers of queries and of database rows.

    Raises InputError naming the query whose sets are wrong.
    """
    sets = parse_ground_truth(ground_truth, protocols)
    if len(sets) != n_queries:
        raise InputError(f"ground truth has {len(sets)} queries, but there are {n_queries} query descriptors")
    for query, one in enumerate(sets):
        _joined(one, query, n_rows)
    own = landmarks([positives(one, protocols) for one in sets]) if clusters is None else clusters
    return Scorer(sets, protocols, ks, own, seed, samples)


def revisited_map(
    Q: Any,
    X: Any,
    ground_truth: Any,
    ids: Any = None,
    ks: Sequence[int] = (1, 5, 10),
    clusters: Sequence[Any] | None = None,
) -> RetrievalResult:
    """`evaluate` under the Easy, Medium and Hard protocols of ROxford5k and RParis6k."""
    return evaluate(Q, X, ground_truth, REVISITED, ids, ks, clusters)


def ranks_from_rankings(rankings: Any, ground_truth: Any, protocols: Mapping[str, Protocol] = REVISITED) -> list[Sets]:
    """Ranks for `score_ranks` from ranked lists (Q, n) of ids, full or truncated; -1 pads a short list's end.

    Raises InputError for an id listed twice, padding before an id, or a wrong number of queries.
    """
    lists = np.asarray(rankings)
    sets = parse_ground_truth(ground_truth, protocols)
    if lists.ndim != 2 or lists.dtype.kind not in "iu" or len(lists) != len(sets):
        raise InputError(f"rankings: expected integers ({len(sets)}, n), got {lists.dtype} {lists.shape}")
    found = []
    for query, (row, one) in enumerate(zip(lists.astype(np.int64), sets, strict=True)):
        targets = _joined(one, query, None)
        if (np.diff((row >= 0).astype(int)) > 0).any() or len(np.unique(row[row >= 0])) < (row >= 0).sum():
            raise InputError(f"rankings: query {query} lists an id twice, or has padding (-1) before an id")
        found.append(positions(row, targets))
    return split_by_set(found, sets)


def positives(sets: Sets, protocols: Mapping[str, Protocol]) -> np.ndarray:
    """All ids that any protocol counts as positive."""
    names = {name for protocol in protocols.values() for name in protocol.positive}
    return concatenated(sets[name] for name in sorted(names & sets.keys()))


def parse_ground_truth(ground_truth: Any, protocols: Mapping[str, Protocol]) -> list[Sets]:
    """Per query the id arrays of the sets that the protocols name."""
    wrapped = isinstance(ground_truth, Mapping)
    gnd = ground_truth.get("gnd") if wrapped else getattr(ground_truth, "gnd", ground_truth)
    if not isinstance(gnd, Sequence) or not gnd or not all(isinstance(one, Mapping) for one in gnd):
        raise InputError(
            "ground truth: expected a list with one dict of id lists per query, or the official dict or object "
            f"holding it as gnd, got {type(ground_truth).__name__}"
        )
    wanted = {name for protocol in protocols.values() for name in (*protocol.positive, *protocol.ignored)}
    return [{name: _ids(one[name], query, name) for name in wanted & one.keys()} for query, one in enumerate(gnd)]


def _ids(values: Any, query: int, name: str) -> np.ndarray:
    array = flat_array(values, f"ground truth of query {query}: {name}")
    if array.size and array.dtype.kind not in "iu":
        raise InputError(f"ground truth of query {query}: {name} holds {array.dtype}, expected integer ids")
    return array.astype(np.int64)


def split_by_set(found: Sequence[np.ndarray], sets: Sequence[Sets]) -> list[Sets]:
    """Ranks of a query's joined ids, back by set."""
    result = []
    for ranks, one in zip(found, sets, strict=True):
        ends = np.cumsum([len(ids) for ids in one.values()])
        result.append(dict(zip(one, np.split(ranks, ends)[: len(one)], strict=True)))
    return result


def positions(row: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The position in `row` of each wanted id, -1 where it does not occur."""
    order = np.argsort(row)
    place = np.minimum(np.searchsorted(row, wanted, sorter=order), len(row) - 1)
    return np.where(row[order[place]] == wanted, order[place], -1)


def _worst(queries: np.ndarray, rows: Any, shortlist: np.ndarray) -> np.ndarray:
    """(Q,) the id in each shortlist that the first stage ranks last."""
    query_of = np.repeat(np.arange(len(queries)), shortlist.shape[1])
    scores = pair_scores(queries, rows, query_of, shortlist.ravel()).reshape(shortlist.shape)
    last = np.lexsort((shortlist, -scores), axis=1)[:, -1:]
    return np.take_along_axis(shortlist, last, axis=1)[:, 0]


def _check_is_top(worst_rank: int, depth: int, query: int) -> None:
    """M distinct ids of which the worst has rank M - 1 are the top M, and nothing else is."""
    if worst_rank != depth - 1:
        raise InputError(
            f"ids: query {query}'s shortlist is not the top {depth} of the first stage (one of it ranks "
            f"{worst_rank}); give the list of search, with the same exclude, reranked but not cut or filtered"
        )


def most_ignored(scorer: Scorer) -> int:
    """Images that a protocol ignores of a query, at most: so many more must be searched for than are reranked."""
    counts = [
        sum(len(sets.get(name, ())) for name in protocol.ignored)
        for protocol in scorer.protocols.values()
        for sets in scorer.sets
    ]
    return max(counts, default=0)


def score_without_junk(
    scorer: Scorer,
    found: Sequence[np.ndarray],
    ids: np.ndarray,
    reorder: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> RetrievalResult:
    """Scores per protocol, each from a shortlist of its own.

    Args:
        scorer: of the ground truth.
        found: per query the first stage's ranks of `scorer.targets`, -1 where they are not known.
        ids: (Q, k) the first stage's lists.
        reorder: numbers of queries (n,) and their shortlists (n, m) of ids -> these reranked.

    Raises:
        InputError: a list has nothing but ignored images.
    """
    merged = RetrievalResult({}, {}, {}, {}, {})
    for name, ranks in ranks_without_junk(scorer, found, ids, reorder).items():
        alone = {name: Protocol(("positive",))}
        part = score_ranks(ranks, alone, scorer.ks, scorer.clusters, scorer.seed, scorer.samples)
        for field in ("map", "mp", "ap", "interval", "queries"):
            getattr(merged, field).update(getattr(part, field))
    return merged


def ranks_without_junk(
    scorer: Scorer,
    found: Sequence[np.ndarray],
    ids: np.ndarray,
    reorder: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> dict[str, list[Sets]]:
    """What `score_without_junk` scores: per protocol the ranks of each query's positives, under "positive"."""
    first = split_by_set(found, scorer.sets)
    result = {}
    for name, protocol in scorer.protocols.items():
        order = _reordered(ids, [concatenated(s.get(n, ()) for n in protocol.ignored) for s in scorer.sets], reorder)
        ranks = []
        for sets, of_sets, row in zip(scorer.sets, first, order, strict=True):
            above = concatenated(of_sets.get(n, ()) for n in protocol.ignored)
            rank = concatenated(of_sets[n] for n in protocol.positive)
            rank = rank - np.searchsorted(np.sort(above[above >= 0]), rank)
            place = positions(row, concatenated(sets[n] for n in protocol.positive))
            ranks.append({"positive": np.where(place >= 0, place, rank)})
        result[name] = ranks
    return result


def _reordered(
    ids: np.ndarray, ignored: Sequence[np.ndarray], reorder: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> list[np.ndarray]:
    """The lists without the ignored ids, reranked: those of one length together, so that none depends on another."""
    kept = [row[~np.isin(row, one)] for row, one in zip(ids, ignored, strict=True)]
    lengths = np.array([len(row) for row in kept])
    if not lengths.min():
        raise InputError("rerank.junk=drop: a query finds nothing but images that a protocol ignores; raise k")
    for length in np.unique(lengths):
        queries = np.flatnonzero(lengths == length)
        for query, row in zip(queries, reorder(queries, np.stack([kept[i] for i in queries])), strict=True):
            kept[query] = row
    return kept


def _joined(sets: Sets, query: int, n_rows: int | None) -> np.ndarray:
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
