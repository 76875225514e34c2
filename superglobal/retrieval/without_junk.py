"""Reranking with a list for each protocol, from which junk is gone first, as CVNet evaluates (its test/test_model.py).

SuperGlobal's code reranks one list with junk in it and removes it before ranks are counted; there junk takes part as a
neighbour and takes places of the shortlist.
"""

from collections.abc import Callable, Sequence

import numpy as np

from superglobal.errors import InputError
from superglobal.retrieval.metrics import Protocol, RetrievalResult, Sets, concatenated, score_ranks
from superglobal.retrieval.scoring import Scorer, positions, split_by_set


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
