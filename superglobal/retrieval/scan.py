"""One pass over the database: each block is read, multiplied with the queries once, and shown to whoever counts."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from superglobal.precision import full_precision
from superglobal.retrieval.vectors import Rows, block_size, to_tensor, validate_block


class Block:
    """Consecutive rows of the database, valid until the next block, and their approximate scores.

    `start`: number of the first. `rows`: (n, D) float32. What must not count: `excluded` (Q,) row of the block for
    each query, -1 for none, and `skipped` (s,) rows for all queries.
    """

    def __init__(
        self, start: int, rows: np.ndarray, queries: torch.Tensor, excluded: np.ndarray, skipped: np.ndarray, name: str
    ) -> None:
        self.start = start
        self.rows = rows
        self.excluded = np.where((excluded >= start) & (excluded < start + len(rows)), excluded - start, -1)
        self.skipped = skipped[(skipped >= start) & (skipped < start + len(rows))] - start
        self._queries = queries
        self._name = name
        self._scores: torch.Tensor | None = None

    @property
    def scores(self) -> torch.Tensor:
        """(Q, n) float32 inner products on the queries' device, -inf for pairs that must not count.

        Raises InputError for a row that is not finite, also in a source that vouches for its rows.
        """
        if self._scores is None:
            with full_precision():
                scores = self._queries @ to_tensor(self.rows, self._queries.device).T
            if not bool(torch.isfinite(scores.sum())):
                validate_block(self.rows, self.start, self._name, unit=True)
            some = np.flatnonzero(self.excluded >= 0)
            scores[some, self.excluded[some]] = -torch.inf
            scores[:, self.skipped] = -torch.inf
            self._scores = scores
        return self._scores


class Consumer(Protocol):
    """What `scan` shows the blocks to."""

    def add(self, block: Block) -> None:
        """Take from a block what is needed; nothing of it may be kept."""


def scan(
    queries: np.ndarray,
    rows: Rows,
    consumers: Sequence[Consumer],
    excluded: np.ndarray | None,
    device: str | torch.device | None,
    block_rows: int,
    check: bool = False,
) -> None:
    """Show all blocks of the database to all consumers.

    queries: (Q, D) float32, validated. excluded: (Q,) ids, one per query, that must not count; nor do those that the
    rows skip. check: look for rows that are not finite also where no consumer asks for the scores.
    """
    on_device = to_tensor(queries, torch.device(device or "cpu"))
    own = np.full(len(queries), -1) if excluded is None else excluded
    for start, block in rows.blocks(block_size(block_rows, len(queries), rows.dim)):
        if check and not np.isfinite(block.sum()):
            validate_block(block, start, rows.name, unit=True)
        seen = Block(start, block, on_device, own, rows.skipped, rows.name)
        for consumer in consumers:
            consumer.add(seen)
