"""Reranking with a list for each protocol, from which junk is gone first, as CVNet evaluates (its test/test_model.py).

SuperGlobal's code reranks one list with junk in it and removes it before ranks are counted; there junk takes part as a
neighbour and takes places of the shortlist.
"""

from collections.abc import Callable, Sequence

import numpy as np

from superglobal.errors import InputError
from superglobal.retrieval.metrics import Protocol, RetrievalResult, concatenated, score_ranks
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
    scorer: Scorer, found: Sequence[np.ndarray], ids: np.ndarray, reorder: Callable[[np.ndarray], np.ndarray]
) -> RetrievalResult:
    """Scores per protocol, each from a shortlist of its own.

    Args:
        scorer: of the ground truth.
        found: per query the first stage's ranks of `scorer.targets`, -1 where they are not known.
        ids: (Q, k) the first stage's lists.
        reorder: (Q, n) shortlists of ids -> the same reranked.

    Raises:
        InputError: a list has nothing but ignored images.
    """
    first = split_by_set(found, scorer.sets)
    merged = RetrievalResult({}, {}, {}, {}, {})
    for name, protocol in scorer.protocols.items():
        order = reorder(_without(ids, [concatenated(s.get(n, ()) for n in protocol.ignored) for s in scorer.sets]))
        ranks = []
        for sets, of_sets, row in zip(scorer.sets, first, order, strict=True):
            above = concatenated(of_sets.get(n, ()) for n in protocol.ignored)
            rank = concatenated(of_sets[n] for n in protocol.positive)
            rank = rank - np.searchsorted(np.sort(above[above >= 0]), rank)
            place = positions(row, concatenated(sets[n] for n in protocol.positive))
            ranks.append({"positive": np.where(place >= 0, place, rank)})
        alone = {name: Protocol(("positive",))}
        part = score_ranks(ranks, alone, scorer.ks, scorer.clusters, scorer.seed, scorer.samples)
        for field in ("map", "mp", "ap", "interval", "queries"):
            getattr(merged, field).update(getattr(part, field))
    return merged


def _without(ids: np.ndarray, ignored: Sequence[np.ndarray]) -> np.ndarray:
    """(Q, n) the lists without the ignored ids, as long as the shortest of them."""
    kept = [row[~np.isin(row, one)] for row, one in zip(ids, ignored, strict=True)]
    count = min(map(len, kept))
    if not count:
        raise InputError("rerank.junk=drop: a query finds nothing but images that a protocol ignores; raise k")
    return np.stack([row[:count] for row in kept])
