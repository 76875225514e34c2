"""Compute exact ranks of given database rows, the targets, in one pass over the database and without sorting it.

A row is ahead of a target of the same query if it has a higher score, or the same score and a lower id. The rank of a
target is the number of rows ahead of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from superglobal.errors import InputError
from superglobal.retrieval.rows import Rows, as_exclude, as_queries, as_rows, flat_array, is_host
from superglobal.retrieval.scan import Block, scan
from superglobal.retrieval.scores import pair_scores, scored_where
from superglobal.retrieval.search import Shortlist, resolve_backend

_CELLS = 8192  # number of cells (intervals of scores) per query in the table of `Counter`
_MAX_CELLS = 1 << 24  # maximum number of cells of all queries together
_SPREAD = 20.0  # offset between the sort keys of two consecutive queries
_MAX_PENDING = 1 << 16  # number of float64 scores that are collected before they are compared with the targets
# Upper bound, as a fraction of a cell, of the rounding error when the position of a score in the table is computed in
# float32. The error of the score itself is accounted for separately, by the tolerance.
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
    """Compute the 0-based rank of each target among all database rows.

    Rows are ranked by descending score, the inner product in float64, and rows with equal scores by ascending id.

    Args:
        Q: (Q, D) queries, unit L2 norm.
        X: (N, D) database, or anything that `as_rows` accepts, unit L2 norm.
        targets: for each query, the database ids to rank, in any order.
        device: device to compute on; the CPU by default.
        block_rows: maximum number of database rows that are processed at a time.
        exclude: (Q,) ids, one per query, removed from the ranking.

    Returns:
        For each query, an int64 array of ranks in the order of its targets.

    Raises:
        InputError: an id is outside 0..N-1, a target is excluded or was skipped during extraction, or a descriptor is
            not a unit vector or has the wrong dimension.
    """
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    excluded = as_exclude(exclude, len(queries))
    make = _counter_factory(queries, rows, targets, excluded, device)
    (counter,) = scan(queries, rows, lambda tolerance: [make(tolerance)], excluded, device, block_rows)
    return _check_distinct(counter.ranks(), targets)


def search_and_rank(
    Q: Any,
    X: Any,
    k: int,
    targets: Sequence[Any],
    *,
    backend: str = "auto",
    device: str | torch.device | None = None,
    block_rows: int = 65536,
    exclude: Any = None,
) -> tuple[tuple[np.ndarray, np.ndarray], list[np.ndarray]]:
    """Compute the results of `search` and of `exact_ranks` in one pass over the database.

    Args:
        Q: (Q, D) queries, unit L2 norm.
        X: (N, D) database, or anything that `as_rows` accepts, unit L2 norm.
        k: number of results per query, 1..N.
        targets: for each query, the database ids to rank, in any order.
        backend: "torch", "faiss" or "auto".
        device: device to compute on; the CPU by default.
        block_rows: maximum number of database rows that are processed at a time.
        exclude: (Q,) ids, one per query, removed from the results and from the ranking.

    Returns:
        The result of `search`: scores (Q, k) float32 and ids (Q, k) int64. The result of `exact_ranks`: for each query,
        an int64 array of ranks in the order of its targets.
    """
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    excluded = as_exclude(exclude, len(queries))
    faiss = resolve_backend(backend, len(rows), k, device or "cpu") == "faiss"
    make = _counter_factory(queries, rows, targets, excluded, device)

    def both(tolerance: float) -> tuple[Shortlist, Counter]:
        return Shortlist(queries, rows, k, excluded, faiss, tolerance), make(tolerance)

    shortlist, counter = scan(queries, rows, both, excluded, device, block_rows)
    scores, ids = shortlist.result()
    return (scores.astype(np.float32), ids), _check_distinct(counter.ranks(), targets)


def _check_distinct(ranks: list[np.ndarray], targets: Sequence[Any]) -> list[np.ndarray]:
    """Return the ranks unchanged, after checking that different targets of a query have different ranks.

    Equal ranks can only result from an error in the computation. They could give an average precision above 1.

    Raises:
        RuntimeError: two different targets of a query have the same rank.
    """
    for query, (query_ranks, ids) in enumerate(zip(ranks, targets, strict=True)):
        if len(np.unique(query_ranks)) != len(np.unique(np.asarray(ids))):
            raise RuntimeError(
                f"two targets of query {query} have the same rank: the errors of the float32 scores of these "
                "descriptors are larger than estimated; please report this"
            )
    return ranks


def _counter_factory(
    queries: np.ndarray,
    rows: Rows,
    targets: Sequence[Any],
    excluded: np.ndarray | None,
    device: str | torch.device | None,
) -> Callable[[float], Counter]:
    """Validate the targets, compute their scores, and return a function that creates a `Counter` for them.

    The returned function has one argument, the tolerance: the assumed largest error of a float32 score.

    Args:
        queries: (Q, D) float32.
        rows: rows of the database.
        targets: for each query, the database ids to rank.
        excluded: (Q,) ids, one per query, that are not ranked; None for none.
        device: device to compute on.

    Raises:
        InputError: a target is not a row of the database, is excluded, or was skipped during extraction.
    """
    ids = _check_targets(targets, len(queries), rows, excluded)
    counts = np.array([len(query_ids) for query_ids in ids])
    flat = np.concatenate(ids)
    scores = pair_scores(queries, rows, np.repeat(np.arange(len(queries)), counts), flat)
    return lambda tolerance: Counter(queries, scores, flat, counts, device, tolerance)


class Counter:
    """Consumer of `scan` that counts the rows ahead of each target.

    A row beats a target if the row is ahead of the target in the ranking. For each query, the range of scores of the
    targets is divided into small intervals, the cells. A table contains, for each cell, the number of targets that a
    row with a score in this cell beats. A row whose cell is too close to the score of a target is compared with all
    targets of the query. If the scores of the row and of a target differ by less than the tolerance, the score of the
    row is computed again in float64.
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
        """Prepare the counters and the table for the targets.

        Args:
            queries: (Q, D) float32.
            scores: (T,) float64 scores of the targets of all queries, concatenated query by query, from `pair_scores`.
            flat: (T,) int64 ids of these targets, in the same order.
            counts: (Q,) number of targets of each query.
            device: device on which the scores of the rows are computed.
            tolerance: assumed largest error of a float32 score.
            start: id of the first row that is scanned; not 0 for a shard of a database.
        """
        n_queries = len(queries)
        self._counts, self._tolerance = counts, tolerance
        query_of = np.repeat(np.arange(n_queries), counts)
        self._queries = queries
        self._start = start
        self._targets = (query_of, scores, flat)
        # The targets of a query are sorted worst first. The position at which a row would be inserted is then the
        # number of targets that the row beats.
        self._order = np.lexsort((-flat, scores, query_of))
        # The keys are ordered by query, then by score: the keys of consecutive queries are offset by 20, and a score
        # plus or minus twice the tolerance is always within -10..10.
        keys = _SPREAD * query_of + scores[self._order]
        self._above, self._below = keys + tolerance, np.append(keys - tolerance, np.inf)
        self._first = np.cumsum(self._counts) - self._counts
        # `_beaten` contains several counters (slots) for each query. Slot 0 counts the rows that must be compared with
        # the targets. Slot 1 + n counts the rows that beat exactly n targets of the query.
        self._width = 2 + (int(self._counts.max()) if n_queries else 0)
        self._beaten = torch.zeros(n_queries * self._width, dtype=torch.int64, device=torch.device(device or "cpu"))
        # The buffers are reused for all blocks, because allocating them takes longer than the computation.
        self._buffers: tuple[torch.Tensor, ...] | None = None
        self._keys: tuple[torch.Tensor, ...] | None = None
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._cells = max(64, min(_CELLS, _MAX_CELLS // max(1, n_queries)))
        self._make_table(torch.device(device or "cpu"))

    def _make_table(self, device: torch.device) -> None:
        """Create the table (Q, cells), which contains a slot number for each cell of each query.

        Slot 0 means that a row with a score in this cell must be compared with the targets. Slot 1 + n means that such
        a row beats n targets. The first and the last cell contain the scores outside the range of the targets.
        """
        n_queries, scores = len(self._queries), self._targets[1][self._order]
        low, high = np.zeros(n_queries), np.ones(n_queries)
        with_targets = np.flatnonzero(self._counts)
        first = self._first[with_targets]
        low[with_targets] = scores[first] - 3 * self._tolerance
        high[with_targets] = scores[first + self._counts[with_targets] - 1] + 3 * self._tolerance
        scale = (self._cells - 4) / np.maximum(high - low, 1e-4)
        low -= 2 / scale
        self._low, self._scale = (
            torch.from_numpy(values.astype(np.float32)).to(device)[:, None] for values in (low, scale)
        )
        query_of = self._targets[0]
        cell = (scores - low[query_of]) * scale[query_of]
        margin = 2 * self._tolerance * scale[query_of] + _GUARD
        lowest, highest = (
            np.clip(np.floor(bound), 0, self._cells - 1).astype(np.int64) for bound in (cell - margin, cell + margin)
        )
        beaten, near = np.zeros((n_queries, self._cells), np.int64), np.zeros((n_queries, self._cells + 1), np.int64)
        np.add.at(beaten, (query_of, highest), 1)
        np.add.at(near, (query_of, lowest), 1)
        np.add.at(near, (query_of, highest + 1), -1)
        slots = 1 + np.cumsum(beaten, axis=1)
        slots[np.cumsum(near, axis=1)[:, :-1] > 0] = 0
        small = self._width <= np.iinfo(np.int16).max
        self._table = torch.from_numpy(slots.astype(np.int16 if small else np.int32)).to(device).ravel()
        numbers = torch.arange(n_queries, dtype=torch.int32, device=device)[:, None]
        self._offset, self._slot = numbers * self._cells, numbers * self._width

    def add(self, block: Block) -> None:
        """Find, for each query, how many targets each row of the block beats, and update the counters."""
        scores = block.scores
        if self._buffers is None or self._buffers[0].shape != scores.shape:
            self._buffers = tuple(
                torch.empty(scores.shape, dtype=dtype, device=scores.device)
                for dtype in (torch.float32, torch.int32, self._table.dtype)
            )
        position, cells, query_slots = self._buffers
        torch.sub(scores, self._low, out=position).mul_(self._scale).clamp_(0, self._cells - 1)
        cells.copy_(position).add_(self._offset)
        torch.index_select(self._table, 0, cells.view(-1), out=query_slots.view(-1))
        slots = torch.add(query_slots, self._slot, out=cells)
        if is_host(scores.device):
            self._beaten += torch.bincount(slots.ravel(), minlength=len(self._beaten))
            query_of, row_of = self._compare_on_host(query_slots == 0, scores)
        else:
            # After transposing, adjacent elements belong to different queries and rarely increment the same counter, so
            # the threads of the accelerator rarely wait for each other.
            self._beaten += torch.bincount(slots.T.reshape(-1), minlength=len(self._beaten))
            query_of, row_of = self._compare_on_device(query_slots == 0, scores)
        exact = block.pair_scores(query_of, row_of)
        self._pending.append((query_of, exact, row_of + block.start + self._start))
        if sum(len(pairs[0]) for pairs in self._pending) > _MAX_PENDING:
            self._count_pending()

    def _compare_on_host(self, mask: torch.Tensor, scores: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Compare rows with targets by float32 scores, on the CPU, and count the rows for which the result is certain.

        Args:
            mask: (Q, n) bool, true for each pair of a query and a row of the block to compare.
            scores: (Q, n) float32 scores of all pairs.

        Returns:
            Query indices (P,) and positions in the block (P,) of the undecided pairs. In an undecided pair, the scores
            of the row and of a target differ by less than the tolerance.
        """
        query_of, row_of, values = scored_where(mask, scores)
        keys = _SPREAD * query_of + values
        # For each pair, the number of targets that the row beats by more than the tolerance, plus the number of all
        # targets of earlier queries.
        beaten = np.searchsorted(self._above, keys)
        near = self._below[beaten] <= keys
        self._count(query_of[~near], np.maximum(beaten - self._first[query_of], 0)[~near])
        return query_of[near], row_of[near]

    def _compare_on_device(self, mask: torch.Tensor, scores: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Compare rows with targets by float32 scores, on an accelerator.

        Rows for which the result is certain are counted.

        Args:
            mask: (Q, n) bool, true for each pair of a query and a row of the block to compare.
            scores: (Q, n) float32 scores of all pairs.

        Returns:
            Query indices (P,) and positions in the block (P,) of the undecided pairs, on the CPU. In an undecided pair,
            the scores of the row and of a target differ by less than the tolerance.
        """
        if self._keys is None:
            self._keys = tuple(
                torch.from_numpy(keys).to(mask.device) for keys in (self._above, self._below, self._first)
            )
        above, below, first = self._keys
        flat = mask.ravel().nonzero()[:, 0]
        query_of = torch.div(flat, mask.shape[1], rounding_mode="floor")
        keys = _SPREAD * query_of.double() + scores.ravel()[flat].double()
        beaten = torch.searchsorted(above, keys)
        near = below[beaten] <= keys
        slots = query_of * self._width
        # Undecided pairs are counted in slot 0, which does not contribute to the ranks.
        slots += torch.where(near, 0, 1 + (beaten - first[query_of]).clamp_(min=0))
        self._beaten += torch.bincount(slots, minlength=len(self._beaten))
        return np.divmod(flat[near].cpu().numpy(), mask.shape[1])

    def _count_pending(self) -> None:
        """Compare the collected rows with the targets by their float64 scores, and update the counters."""
        if self._pending:
            query_of, scores, ids = (np.concatenate(column) for column in zip(*self._pending, strict=True))
            self._count(query_of, _count_beaten(self._targets, query_of, scores, ids))
            self._pending = []

    def _count(self, query_of: np.ndarray, beaten: np.ndarray) -> None:
        """Add P pairs of a query and a row to the counters.

        Args:
            query_of: (P,) query index of each pair.
            beaten: (P,) number of targets of the query that the row beats.
        """
        counts = np.bincount(query_of * self._width + 1 + beaten, minlength=len(self._beaten))
        self._beaten += torch.from_numpy(counts).to(self._beaten.device)

    def finish(self) -> float:
        self._count_pending()
        return 0.0

    def ranks(self) -> list[np.ndarray]:
        """Return, for each query, an int64 array with the ranks of the query's targets. Call this after `finish`."""
        beaten = self._beaten.cpu().numpy().reshape(-1, self._width)[:, 1:]
        # Entry (q, j) is the number of rows that beat target j of query q. The targets are sorted worst first.
        better = np.flip(np.cumsum(np.flip(beaten[:, 1:], axis=1), axis=1), axis=1)
        query_of = self._targets[0]
        ranks = np.empty(len(query_of), np.int64)
        ranks[self._order] = better[query_of, np.arange(len(query_of)) - self._first[query_of]]
        return np.split(ranks, np.cumsum(self._counts)[:-1])


def _check_targets(targets: Sequence[Any], n_queries: int, rows: Rows, excluded: np.ndarray | None) -> list[np.ndarray]:
    """Validate the ids of the targets, and convert them to one int64 array per query.

    Raises:
        InputError: an id is not an integer, is outside the database, is excluded, or was skipped during extraction; or
            the number of lists is not `n_queries`.
    """
    if len(targets) != n_queries:
        raise InputError(f"targets: expected {n_queries} lists of ids, one per query, got {len(targets)}")
    ids = []
    for query, query_targets in enumerate(targets):
        array = flat_array(query_targets, f"targets of query {query}")
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
                f"targets of query {query}: image {skipped[0]} was skipped during extraction, so it has no rank; "
                "repair the image and extract it again"
            )
        ids.append(array)
    return ids


def _count_beaten(
    targets: tuple[np.ndarray, np.ndarray, np.ndarray], query_of: np.ndarray, scores: np.ndarray, ids: np.ndarray
) -> np.ndarray:
    """Count, for each of P pairs of a query and a row, the targets of the query that the row is ahead of.

    Rows are ranked by descending score, and rows with equal scores by ascending id. A row that is itself a target does
    not count as ahead of itself.

    Args:
        targets: query indices, float64 scores and ids of the targets of all queries, (T,) each, sorted by query.
        query_of: (P,) query index of each pair.
        scores: (P,) float64 score of each pair.
        ids: (P,) id of the row of each pair.

    Returns:
        (P,) int64 counts.
    """
    target_query, target_score, target_id = targets
    n_rows = len(query_of)
    is_target = np.repeat([False, True], [n_rows, len(target_query)])
    all_queries = np.concatenate([query_of, target_query])
    keys = (
        is_target,  # sorts a row before the target with the same id, so that the row does not count as ahead of itself
        -np.concatenate([ids, target_id]),
        np.concatenate([scores, target_score]),
        all_queries,
    )
    order = np.lexsort(keys)
    seen = np.empty(len(order), np.int64)
    seen[order] = np.cumsum(is_target[order])
    earlier = np.searchsorted(target_query, query_of)  # number of earlier queries' targets
    return seen[:n_rows] - earlier


def target_scores(Q: Any, X: Any, targets: Sequence[Any]) -> list[np.ndarray]:
    """Compute the exact scores of targets in one shard of a database, as input to `count_better`.

    Args:
        Q: (Q, D) queries, unit L2 norm.
        X: (n, D) rows of the shard, or anything that `as_rows` accepts, unit L2 norm.
        targets: for each query, row numbers within this shard, 0..n-1.

    Returns:
        For each query, a float64 array in the order of its targets.

    Raises:
        InputError: a row is outside the shard, or was skipped during extraction.
    """
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    ids = _check_targets(targets, len(queries), rows, None)
    counts = [len(query_ids) for query_ids in ids]
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
    """Count the rows of one shard of a database that are ahead of each target in the ranking of the whole database.

    The sum of these counts over all shards is the rank of the target. As in `exact_ranks`, rows are ranked by
    descending score, ties by ascending id.

    Args:
        Q: (Q, D) queries, the same for all shards, unit L2 norm.
        X: (n, D) rows start..start+n-1 of the database, or anything that `as_rows` accepts, unit L2 norm.
        scores: for each query, the scores of targets in any shard, from `target_scores`.
        ids: for each query, the ids of these targets in the whole database.
        start: id of the shard's first row in the whole database.
        device: device to compute on; the CPU by default.
        block_rows: maximum number of database rows that are processed at a time.
        exclude: (Q,) ids in the whole database, one per query, removed from the ranking.

    Returns:
        For each query, an int64 array of counts in the order of its targets.

    Raises:
        InputError: the scores are not float64 or not those of unit vectors, a target is excluded or a skipped row of
            this shard, or a descriptor is not a unit vector or has the wrong dimension.
    """
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    if start < 0:
        raise InputError(f"start={start}: expected the id of the shard's first row in the whole database, >= 0")
    excluded = as_exclude(exclude, len(queries))
    flat_scores, flat_ids, counts = _flat_targets(scores, ids, len(queries), excluded)
    skipped = np.isin(flat_ids, rows.skipped + start)
    if skipped.any():
        raise InputError(f"targets: image {flat_ids[skipped][0]} was skipped during extraction, so it has no rank")
    local = None if excluded is None else np.maximum(excluded - start, -1)

    def make(tolerance: float) -> list[Counter]:
        return [Counter(queries, flat_scores, flat_ids, counts, device, tolerance, start)]

    (counter,) = scan(queries, rows, make, local, device, block_rows)
    return counter.ranks()


def _flat_targets(
    scores: Sequence[Any], ids: Sequence[Any], n_queries: int, excluded: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Validate the targets of `count_better`, and concatenate them over all queries.

    Args:
        scores: for each query, the scores of its targets.
        ids: for each query, the ids of its targets in the whole database.
        n_queries: number of queries Q.
        excluded: (Q,) ids, one per query, that are not ranked; None for none.

    Returns:
        Scores (T,) float64, ids (T,) int64, and the number of targets of each query (Q,).
    """
    if len(scores) != n_queries or len(ids) != n_queries:
        raise InputError(f"targets: expected scores and ids of {n_queries} queries, got {len(scores)} and {len(ids)}")
    flat_scores, flat_ids = [], []
    for query, (query_scores, query_ids) in enumerate(zip(scores, ids, strict=True)):
        values, numbers = np.asarray(query_scores), np.asarray(query_ids)
        if values.shape != numbers.shape or values.ndim != 1:
            raise InputError(
                f"targets of query {query}: expected one score per id, got scores of shape {values.shape} and ids of "
                f"shape {numbers.shape}"
            )
        if values.size and (values.dtype != np.float64 or numbers.dtype.kind not in "iu" or numbers.min() < 0):
            raise InputError(
                f"targets of query {query}: expected float64 scores from target_scores and integer ids >= 0, got "
                f"{values.dtype} scores and {numbers.dtype} ids"
            )
        if not (np.abs(values) < 1.01).all():
            raise InputError(f"targets of query {query}: expected scores of unit vectors, between -1 and 1")
        if excluded is not None and (numbers == excluded[query]).any():
            raise InputError(f"targets of query {query}: id {excluded[query]} is excluded, so it has no rank")
        flat_scores.append(values.astype(np.float64))
        flat_ids.append(numbers.astype(np.int64))
    return np.concatenate(flat_scores), np.concatenate(flat_ids), np.array([len(values) for values in flat_scores])
