"""Exact ranks of chosen database rows, counted in one pass over the database and never by sorting it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from superglobal.errors import InputError
from superglobal.retrieval.rows import Rows, as_exclude, as_queries, as_rows, flat_array, is_host
from superglobal.retrieval.scan import Block, scan
from superglobal.retrieval.scores import pair_scores, scored_where
from superglobal.retrieval.search import Shortlist

_CELLS = 8192  # of the table that tells from a score, without searching, how many targets it beats
_ALL_CELLS = 1 << 24
_SPREAD = 20.0  # between the scores of two queries on one line of numbers
_WAITING = 1 << 16  # pairs that were scored again and wait for their place among the targets
# The float32 place of a score in the table is off by less than a tolerance, for its offset, and this share of a cell.
_GUARD = 0.01


def exact_ranks(
    Q: Any,
    X: Any,
    targets: Sequence[Any],
    *,
    device: str | torch.device | None = None,
    block_rows: int = 65536,
    exclude: Any = None,
) -> list[np.ndarray]:
    """The 0-based rank of each target under the order (-score, id), score = float64 inner product.

    Q: (Q, D), X: (N, D) or anything `as_rows` takes, unit L2 norm. `targets`: per query the database ids whose
    ranks are wanted, in any order. `exclude`: (Q,) ids, one per query, taken out of the ranking.
    A rank is the number of rows that are better.

    Returns per query an int64 array, in the order of its targets.
    Raises InputError for an id outside 0..N-1, an excluded or skipped target, or descriptors that `search` refuses.
    """
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    excluded = as_exclude(exclude, len(queries))
    make = _counters(queries, rows, targets, excluded, device)
    (counter,) = scan(queries, rows, lambda tolerance: [make(tolerance)], excluded, device, block_rows)
    return _distinct(counter.ranks(), targets)


def search_and_rank(
    Q: Any,
    X: Any,
    k: int,
    targets: Sequence[Any],
    *,
    device: str | torch.device | None = None,
    block_rows: int = 65536,
    exclude: Any = None,
) -> tuple[tuple[np.ndarray, np.ndarray], list[np.ndarray]]:
    """What `search` gives and what `exact_ranks` gives, in one pass over X."""
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    excluded = as_exclude(exclude, len(queries))
    make = _counters(queries, rows, targets, excluded, device)

    def both(tolerance: float) -> tuple[Shortlist, Counter]:
        return Shortlist(queries, rows, k, excluded, False, tolerance), make(tolerance)

    shortlist, counter = scan(queries, rows, both, excluded, device, block_rows)
    scores, ids = shortlist.result()
    return (scores.astype(np.float32), ids), _distinct(counter.ranks(), targets)


def _distinct(ranks: list[np.ndarray], targets: Sequence[Any]) -> list[np.ndarray]:
    """Return the ranks. Raises RuntimeError if two targets of a query share one: an average precision could pass 1."""
    for query, (one, ids) in enumerate(zip(ranks, targets, strict=True)):
        if len(np.unique(one)) != len(np.unique(np.asarray(ids))):
            raise RuntimeError(
                f"two targets of query {query} have the same rank: the float32 scores of these descriptors are off by "
                "more than was seen; please report it"
            )
    return ranks


def _counters(
    queries: np.ndarray,
    rows: Rows,
    targets: Sequence[Any],
    excluded: np.ndarray | None,
    device: str | torch.device | None,
) -> Callable[[float], Counter]:
    """Return what makes a counter of the targets for a tolerance. Raises InputError for targets that have no rank."""
    ids = check_targets(targets, len(queries), rows, excluded)
    counts = np.array([len(one) for one in ids])
    flat = np.concatenate(ids)
    scores = pair_scores(queries, rows, np.repeat(np.arange(len(queries)), counts), flat)
    return lambda tolerance: Counter(queries, scores, flat, counts, device, tolerance)


class Counter:
    """Ranks of the targets, from blocks shown one after the other (a consumer of `scan`).

    A query's targets are sorted by score. How many of them a row beats is looked up in a table over their range of
    scores; only pairs in a cell near a target are compared, and only those nearer than the tolerance are scored
    again in float64.
    """

    def __init__(
        self,
        queries: np.ndarray,
        scores: np.ndarray,
        flat: np.ndarray,
        counts: np.ndarray,
        device: str | torch.device | None,
        tolerance: float,
        start: int = 0,
    ) -> None:
        """
        Args:
            queries: (Q, D) float32.
            scores, flat: (T,) float64 and int64, `pair_scores` and ids of the targets, query by query.
            counts: (Q,) how many each has.
            device: of the scores of blocks.
            tolerance: of the approximate scores of blocks.
            start: id of the database's first row.
        """
        n_queries = len(queries)
        self._counts, self._tolerance = counts, tolerance
        query_of = np.repeat(np.arange(n_queries), counts)
        self._queries = queries
        self._start = start
        self._targets = (query_of, scores, flat)
        # Targets worst first, so that a row's place among them is the number of targets that it beats.
        self._order = np.lexsort((-flat, scores, query_of))
        # Numbers that sort by query, then score: inner products and twice a tolerance lie within -10..10.
        keys = _SPREAD * query_of + scores[self._order]
        self._above, self._below = keys + tolerance, np.append(keys - tolerance, np.inf)
        self._first = np.cumsum(self._counts) - self._counts
        # Per query: rows not placed yet, then rows that beat 0, 1, 2 ... of its targets.
        self._width = 2 + (int(self._counts.max()) if n_queries else 0)
        self._beaten = torch.zeros(n_queries * self._width, dtype=torch.int64, device=torch.device(device or "cpu"))
        # Kept from block to block: fresh memory costs more than what is done in it.
        self._buffers: tuple[torch.Tensor, ...] | None = None
        self._keys: tuple[torch.Tensor, ...] | None = None
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        # Of many queries each has fewer: the table stays at 2^24 cells.
        self._cells = max(64, min(_CELLS, _ALL_CELLS // max(1, n_queries)))
        self._make_table(torch.device(device or "cpu"))

    def _make_table(self, device: torch.device) -> None:
        """(Q, cells) place in its query's part of `beaten` by score; 0 where a row has to be compared.

        The first and the last cell hold what lies beyond the targets. The smaller the table, the better it caches.
        """
        n_queries, scores = len(self._queries), self._targets[1][self._order]
        low, high = np.zeros(n_queries), np.ones(n_queries)
        some = np.flatnonzero(self._counts)
        low[some] = scores[self._first[some]] - 3 * self._tolerance
        high[some] = scores[self._first[some] + self._counts[some] - 1] + 3 * self._tolerance
        scale = (self._cells - 4) / np.maximum(high - low, 1e-4)
        low -= 2 / scale
        self._low, self._scale = (
            torch.from_numpy(values.astype(np.float32)).to(device)[:, None] for values in (low, scale)
        )
        query_of = self._targets[0]
        place = (scores - low[query_of]) * scale[query_of]
        margin = 2 * self._tolerance * scale[query_of] + _GUARD
        first, last = (
            np.clip(np.floor(one), 0, self._cells - 1).astype(np.int64) for one in (place - margin, place + margin)
        )
        surely, near = np.zeros((n_queries, self._cells), np.int64), np.zeros((n_queries, self._cells + 1), np.int64)
        np.add.at(surely, (query_of, last), 1)
        np.add.at(near, (query_of, first), 1)
        np.add.at(near, (query_of, last + 1), -1)
        places = 1 + np.cumsum(surely, axis=1)
        places[np.cumsum(near, axis=1)[:, :-1] > 0] = 0
        small = self._width <= np.iinfo(np.int16).max
        self._table = torch.from_numpy(places.astype(np.int16 if small else np.int32)).to(device).ravel()
        numbers = torch.arange(n_queries, dtype=torch.int32, device=device)[:, None]
        self._offset, self._slot = numbers * self._cells, numbers * self._width

    def add(self, block: Block) -> None:
        """Count which targets the rows of a block beat."""
        scores = block.scores
        if self._buffers is None or self._buffers[0].shape != scores.shape:
            self._buffers = tuple(
                torch.empty(scores.shape, dtype=dtype, device=scores.device)
                for dtype in (torch.float32, torch.int32, self._table.dtype)
            )
        place, cells, places = self._buffers
        torch.sub(scores, self._low, out=place).mul_(self._scale).clamp_(0, self._cells - 1)
        cells.copy_(place).add_(self._offset)
        torch.index_select(self._table, 0, cells.view(-1), out=places.view(-1))
        slots = torch.add(places, self._slot, out=cells)
        if is_host(scores.device):
            self._beaten += torch.bincount(slots.ravel(), minlength=len(self._beaten))
            query_of, row_of = self._compare_on_host(places == 0, scores)
        else:
            # Neighbors in memory then belong to different queries, so that they seldom add to the same counter.
            self._beaten += torch.bincount(slots.T.reshape(-1), minlength=len(self._beaten))
            query_of, row_of = self._compare_on_device(places == 0, scores)
        exact = block.pair_scores(query_of, row_of)
        self._waiting.append((query_of, exact, row_of + block.start + self._start))
        if sum(len(one[0]) for one in self._waiting) > _WAITING:
            self._place_waiting()

    def _compare_on_host(self, mask: torch.Tensor, scores: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Count which targets the pairs of a mask (Q, n) beat; return query and row of those that float64 decides."""
        query_of, row_of, values = scored_where(mask, scores)
        rough = _SPREAD * query_of + values
        surely = np.searchsorted(self._above, rough)  # targets beaten beyond doubt, those of earlier queries with them
        near = self._below[surely] <= rough
        self._count(query_of[~near], np.maximum(surely - self._first[query_of], 0)[~near])
        return query_of[near], row_of[near]

    def _compare_on_device(self, mask: torch.Tensor, scores: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Compare as `_compare_on_host` does, on the device; only the pairs that float64 decides come down."""
        if self._keys is None:
            self._keys = tuple(
                torch.from_numpy(keys).to(mask.device) for keys in (self._above, self._below, self._first)
            )
        above, below, first = self._keys
        flat = mask.ravel().nonzero()[:, 0]
        query_of = torch.div(flat, mask.shape[1], rounding_mode="floor")
        rough = _SPREAD * query_of.double() + scores.ravel()[flat].double()
        surely = torch.searchsorted(above, rough)
        near = below[surely] <= rough
        slots = query_of * self._width
        # Slot 0 of a query is for pairs without a place.
        slots += torch.where(near, 0, 1 + (surely - first[query_of]).clamp_(min=0))
        self._beaten += torch.bincount(slots, minlength=len(self._beaten))
        return np.divmod(flat[near].cpu().numpy(), mask.shape[1])

    def _place_waiting(self) -> None:
        if self._waiting:
            query_of, scores, ids = (np.concatenate(one) for one in zip(*self._waiting, strict=True))
            self._count(query_of, _place_among(self._targets, query_of, scores, ids))
            self._waiting = []

    def _count(self, query_of: np.ndarray, targets: np.ndarray) -> None:
        """Rows and how many targets of their queries they beat."""
        counts = np.bincount(query_of * self._width + 1 + targets, minlength=len(self._beaten))
        self._beaten += torch.from_numpy(counts).to(self._beaten.device)

    def finish(self) -> float:
        self._place_waiting()
        return 0.0

    def ranks(self) -> list[np.ndarray]:
        """Per query the ranks, in the order of its targets, after `finish`."""
        beaten = self._beaten.cpu().numpy().reshape(-1, self._width)[:, 1:]
        better = np.flip(np.cumsum(np.flip(beaten[:, 1:], axis=1), axis=1), axis=1)  # rows that beat target j
        query_of = self._targets[0]
        ranks = np.empty(len(query_of), np.int64)
        ranks[self._order] = better[query_of, np.arange(len(query_of)) - self._first[query_of]]
        return np.split(ranks, np.cumsum(self._counts)[:-1])


def check_targets(targets: Sequence[Any], n_queries: int, rows: Rows, excluded: np.ndarray | None) -> list[np.ndarray]:
    """The targets as int64 arrays, all of them valid ids."""
    if len(targets) != n_queries:
        raise InputError(f"targets: expected one list of ids per query, {n_queries}, got {len(targets)}")
    ids = []
    for query, one in enumerate(targets):
        array = flat_array(one, f"targets of query {query}")
        if array.size and array.dtype.kind not in "iu":
            raise InputError(f"targets of query {query}: expected integer ids, got {array.dtype}")
        array = array.astype(np.int64)
        outside = array[(array < 0) | (array >= len(rows))]
        if outside.size:
            raise InputError(f"targets of query {query}: id {outside[0]} is outside the database, 0..{len(rows) - 1}")
        if excluded is not None and (array == excluded[query]).any():
            raise InputError(f"targets of query {query}: id {excluded[query]} is excluded, so it has no rank")
        skipped = array[np.isin(array, rows.skipped)]
        if skipped.size:
            raise InputError(
                f"targets of query {query}: image {skipped[0]} was skipped when descriptors were made, so it has no "
                "rank; mend the image and extract it again"
            )
        ids.append(array)
    return ids


def _place_among(
    targets: tuple[np.ndarray, np.ndarray, np.ndarray], query_of: np.ndarray, scores: np.ndarray, ids: np.ndarray
) -> np.ndarray:
    """(P,) number of its query's targets that each row beats, by (-score, id); a row does not beat itself.

    `targets`: query numbers, float64 scores and ids of all targets; the others describe P rows alike.
    """
    target_query, target_score, target_id = targets
    n_rows = len(query_of)
    is_target = np.repeat([False, True], [n_rows, len(target_query)])
    all_queries = np.concatenate([query_of, target_query])
    keys = (
        is_target,  # at equal id a row comes before itself as a target, so it does not count it
        -np.concatenate([ids, target_id]),
        np.concatenate([scores, target_score]),
        all_queries,
    )
    order = np.lexsort(keys)
    seen = np.empty(len(order), np.int64)
    seen[order] = np.cumsum(is_target[order])
    earlier = np.searchsorted(target_query, query_of)  # targets of the queries before; target_query is sorted
    return seen[:n_rows] - earlier


def target_scores(Q: Any, X: Any, targets: Sequence[Any]) -> list[np.ndarray]:
    """The float64 scores by which rows of this part are ordered.

    Q: (Q, D), X: (n, D) or anything `as_rows` takes, unit L2 norm. targets: per query ids of rows of this part, counted
    from its own first.

    Returns per query a float64 array, in the order of its targets.
    Raises InputError for an id outside the part, or of a skipped row.
    """
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    ids = check_targets(targets, len(queries), rows, None)
    counts = [len(one) for one in ids]
    scores = pair_scores(queries, rows, np.repeat(np.arange(len(queries)), counts), np.concatenate(ids))
    return np.split(scores, np.cumsum(counts)[:-1])


def count_better(
    Q: Any,
    X: Any,
    scores: Sequence[Any],
    ids: Sequence[Any],
    start: int = 0,
    *,
    device: str | torch.device | None = None,
    block_rows: int = 65536,
    exclude: Any = None,
) -> list[np.ndarray]:
    """How many rows of this part come before each target in the order (-score, id) of the whole database.

    Q: (Q, D), the same for all parts, X: (n, D) or anything `as_rows` takes, unit L2 norm; rows start..start+n-1 of the
    whole. scores, ids: per query the targets' `target_scores` and their ids in the whole, wherever they lie. exclude:
    (Q,) ids in the whole, one per query, taken out of the ranking. Machines whose float64 sums differ in the last bit
    may order rows that are no nearer than that otherwise.

    Returns per query an int64 array, in the order of its targets.
    Raises InputError for scores that no inner product of unit vectors has or that are not float64, for an excluded
    target, a skipped row of this part, or descriptors that `search` refuses.
    """
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    if start < 0:
        raise InputError(f"start: expected the number of the part's first row in the whole database, got {start}")
    excluded = as_exclude(exclude, len(queries))
    flat, places, counts = _flat_targets(scores, ids, len(queries), excluded)
    skipped = np.isin(places, rows.skipped + start)
    if skipped.any():
        raise InputError(f"targets: image {places[skipped][0]} was skipped when descriptors were made: it has no rank")
    local = None if excluded is None else np.maximum(excluded - start, -1)

    def make(tolerance: float) -> list[Counter]:
        return [Counter(queries, flat, places, counts, device, tolerance, start)]

    (counter,) = scan(queries, rows, make, local, device, block_rows)
    return counter.ranks()


def _flat_targets(
    scores: Sequence[Any], ids: Sequence[Any], n_queries: int, excluded: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(T,) float64 scores, (T,) int64 ids, and how many each query has."""
    if len(scores) != n_queries or len(ids) != n_queries:
        raise InputError(f"targets: expected scores and ids of {n_queries} queries, got {len(scores)} and {len(ids)}")
    flat, places = [], []
    for query, (one, own) in enumerate(zip(scores, ids, strict=True)):
        values, numbers = np.asarray(one), np.asarray(own)
        if values.shape != numbers.shape or values.ndim != 1:
            raise InputError(
                f"targets of query {query}: expected a score for each id, got {values.shape} and {numbers.shape}"
            )
        if values.size and (values.dtype != np.float64 or numbers.dtype.kind not in "iu" or numbers.min() < 0):
            raise InputError(
                f"targets of query {query}: expected float64 scores, as of target_scores, and ids from 0, got "
                f"{values.dtype} and {numbers.dtype}"
            )
        if not (np.abs(values) < 1.01).all():
            raise InputError(f"targets of query {query}: expected scores of unit vectors, between -1 and 1")
        if excluded is not None and (numbers == excluded[query]).any():
            raise InputError(f"targets of query {query}: id {excluded[query]} is excluded, so it has no rank")
        flat.append(values.astype(np.float64))
        places.append(numbers.astype(np.int64))
    return np.concatenate(flat), np.concatenate(places), np.array([len(one) for one in flat])
