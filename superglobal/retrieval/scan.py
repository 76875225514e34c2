"""One pass over the database: each block is read, multiplied with the queries once, and shown to whoever counts."""

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Protocol, TypeVar

import numpy as np
import torch

from superglobal.retrieval.rows import TOLERANCE, Rows, block_size, is_host, to_tensor, validate_block
from superglobal.retrieval.scores import block_pair_scores, pair_scores_on
from superglobal.retrieval.staging import device_blocks
from superglobal.utils.precision import full_precision

log = logging.getLogger(__name__)

# Dimensions that a matrix product on an accelerator sums at once. It adds products one after the other, so that a sum
# of 2048 can be off by more than the tolerance that exactness rests on; sums of 64, added up, stay below it.
_SUMMED_DIMS = 64
_MARGIN = 2  # of the tolerance over the errors that were seen: those of other pairs may be larger
_WIDENED = 16  # times an error that was too large
_ALL = 4.0  # a tolerance over which no two scores of unit vectors differ


class Block:
    """Consecutive rows of the database, valid until the next block, and their approximate scores.

    `start`: number of the first. `rows`: (n, D) float32, on the CPU only. What must not count: `excluded` (Q,) row of
    the block for each query, -1 for none, and `skipped` (s,) rows for all queries.
    """

    def __init__(
        self,
        start: int,
        vectors: torch.Tensor,
        queries: torch.Tensor,
        excluded: np.ndarray,
        skipped: np.ndarray,
        name: str,
    ) -> None:
        """`vectors`: the rows (n, D) float32 on the device of the queries (Q, D)."""
        self.start = start
        self._vectors = vectors
        stop = start + len(vectors)
        self.excluded = np.where((excluded >= start) & (excluded < stop), excluded - start, -1)
        self.skipped = skipped[(skipped >= start) & (skipped < stop)] - start
        self._queries = queries
        self._name = name
        self._scores: torch.Tensor | None = None
        self.error = 0.0
        """Largest difference seen between an approximate and a float64 score."""

    @property
    def rows(self) -> np.ndarray:
        return self._vectors.numpy()

    @property
    def scores(self) -> torch.Tensor:
        """(Q, n) float32 inner products on the queries' device, -inf for pairs that must not count.

        Raises InputError for a row that is not finite, also in a source that vouches for its rows.
        """
        if self._scores is None:
            with full_precision():
                scores = inner_products(self._queries, self._vectors)
            if not bool(torch.isfinite(scores.sum())):
                validate_block(self._vectors.cpu().numpy(), self.start, self._name, unit=True)
            some = np.flatnonzero(self.excluded >= 0)
            if some.size:
                query_of, row_of = (torch.from_numpy(ids).to(scores.device) for ids in (some, self.excluded[some]))
                scores[query_of, row_of] = -torch.inf
            if self.skipped.size:
                scores[:, torch.from_numpy(self.skipped).to(scores.device)] = -torch.inf
            self._scores = scores
        return self._scores

    def pair_scores(self, query_of: np.ndarray, row_of: np.ndarray, rough: np.ndarray | None = None) -> np.ndarray:
        """Compute the float64 scores (P,) of queries `query_of` (P,) and rows `row_of` (P,) of the block.

        How far `rough` (P,), by default `scores`, lies from them at most is kept in `error`.
        """
        if is_host(self._queries.device):
            exact = block_pair_scores(self._queries.numpy(), self._vectors.numpy(), query_of, row_of)
        else:
            exact = pair_scores_on(self._queries, self._vectors, query_of, row_of)
        if rough is None:
            places = (torch.from_numpy(ids).to(self.scores.device) for ids in (query_of, row_of))
            rough = self.scores[tuple(places)].cpu().numpy()
        self.error = max(self.error, float(np.abs(exact - rough).max(initial=0)))
        return exact

    def probe(self) -> None:
        """Score the best row of each query in float64, if `scores` were asked for, to learn how far they are off."""
        if self._scores is not None:
            best, row_of = (one.cpu().numpy() for one in self._scores.max(dim=1))
            query_of = np.flatnonzero(np.isfinite(best))
            self.pair_scores(query_of, row_of[query_of], best[query_of])


def inner_products(queries: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return the inner products (Q, n) float32 of queries (Q, D) and vectors (n, D)."""
    if is_host(queries.device):
        return queries @ vectors.T
    scores = queries[:, :_SUMMED_DIMS] @ vectors[:, :_SUMMED_DIMS].T
    for start in range(_SUMMED_DIMS, queries.shape[1], _SUMMED_DIMS):
        part = slice(start, start + _SUMMED_DIMS)
        scores.addmm_(queries[:, part], vectors[:, part].T)
    return scores


class Consumer(Protocol):
    """What `scan` shows the blocks to."""

    def add(self, block: Block) -> None:
        """Take from a block what is needed; nothing of it may be kept."""

    def finish(self) -> float:
        """Do what is left after the last block; return the error of approximate scores that this showed, or 0."""


C = TypeVar("C", bound=Sequence[Consumer])


def scan(
    queries: np.ndarray,
    rows: Rows,
    make: Callable[[float], C],
    excluded: np.ndarray | None,
    device: str | torch.device | None,
    block_rows: int,
    check: bool = False,
) -> C:
    """Show all blocks of the database to consumers, and return these.

    How far float32 scores may be off depends on the descriptors and on the library that multiplies them. Some scores of
    every block are computed in float64. If they show a larger error than the tolerance allows, the pass is repeated
    with a wider tolerance, under which more scores are computed in float64.

    queries: (Q, D) float32, validated. make: a tolerance -> new consumers. excluded: (Q,) ids, one per query, that must
    not count; nor do those that the rows skip. check: look for rows that are not finite also where no consumer asks for
    the scores.
    """
    on_device = to_tensor(queries, torch.device(device or "cpu"))
    own = np.full(len(queries), -1) if excluded is None else excluded
    tolerance = TOLERANCE
    while True:
        consumers = make(tolerance)
        error = _pass(on_device, rows, consumers, own, block_rows, check, tolerance)
        if error <= tolerance / _MARGIN or tolerance >= _ALL:
            return consumers
        tolerance = min(_ALL, _WIDENED * error)
        text = "float32 scores of the %s are off by up to %.1e: the pass is repeated with a tolerance of %.1e"
        log.info(text, rows.name, error, tolerance)


def _pass(
    queries: torch.Tensor,
    rows: Rows,
    consumers: Sequence[Consumer],
    excluded: np.ndarray,
    block_rows: int,
    check: bool,
    tolerance: float,
) -> float:
    """Show the blocks, until the error of approximate scores is too large for the tolerance; return the error."""
    error = 0.0
    # Closed at once when a consumer raises: the traceback would keep the reading thread alive.
    with closing(_blocks(rows, block_rows, len(queries), queries.device, check)) as blocks:
        for start, vectors in blocks:
            block = Block(start, vectors, queries, excluded, rows.skipped, rows.name)
            for consumer in consumers:
                consumer.add(block)
            block.probe()
            error = max(error, block.error)
            if error > tolerance / _MARGIN and tolerance < _ALL:
                return error
    return max([error, *(consumer.finish() for consumer in consumers)])


def _blocks(
    rows: Rows, block_rows: int, n_queries: int, device: torch.device, check: bool
) -> Generator[tuple[int, torch.Tensor], None, None]:
    """Yield the first row and the vectors of each `Block`."""
    if is_host(device):
        for start, block in rows.blocks(block_size(block_rows, n_queries, rows.dim)):
            if check and not np.isfinite(block.sum()):
                validate_block(block, start, rows.name, unit=True)
            yield start, to_tensor(block, device)
        return
    with closing(device_blocks(rows, block_rows, n_queries, device)) as blocks:
        yield from blocks
