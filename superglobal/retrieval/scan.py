"""Read a database in one pass, in which each block of rows is multiplied with the queries only once.

Each block is passed to one or more consumers, objects that process it, such as a search and a computation of exact
ranks. On an accelerator, the next block is read and copied while the device processes the current block.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Protocol, TypeVar

import numpy as np
import torch

from superglobal.retrieval.rows import Rows, block_size, is_host, to_tensor, validate_block
from superglobal.retrieval.scores import TOLERANCE, block_pair_scores, pair_scores_on
from superglobal.utils.precision import full_precision

log = logging.getLogger(__name__)

# Number of dimensions per matrix product on an accelerator. A matrix product adds its terms in sequence, so a product
# over 2048 dimensions can have an error above the tolerance that exact results require. The dimensions are therefore
# split into groups of 64, and the products over the groups are added, which keeps the error below the tolerance.
_SUMMED_DIMS = 64
_MARGIN = 2  # minimum ratio of the tolerance to the largest observed error; unobserved errors may be larger
_WIDENED = 16  # if an error was too large for the tolerance, the new tolerance is this many times the error
_MAX_TOLERANCE = 4.0  # more than the difference of any two scores of unit vectors
# Size of one staging buffer in bytes. Pinning a larger buffer takes more time than it saves. With smaller buffers, the
# many kernel launches and synchronizations take longer than the copies.
STAGED_BYTES = 1 << 26
_BUFFERS = 2  # number of staging buffers: one is filled while the other is copied to the device
# Size limits for blocks of rows that are already on the device and need not be copied. A block takes up to 512 MB of
# float32, its scores for all queries up to 256 MB, and the intermediate results of exact ranks about five times as much
# as the scores.
_BLOCK_ELEMENTS = 1 << 27
_SCORE_ELEMENTS = 1 << 26
_NORM_TOLERANCE = 0.9e-3  # stricter than in `validate_block`, which checks rows beyond this tolerance again, on the CPU


class Block:
    """Consecutive rows of the database and their approximate scores, valid until the next block is read.

    Attributes:
        start: id of the first row.
        vectors: (n, D) float32 rows.
        queries: (Q, D) float32 queries, on the device of `vectors`.
        excluded: (Q,) position in the block of each query's excluded row; -1 if this row is not in the block.
        skipped: (s,) positions in the block of the rows that were skipped during extraction.
        error: largest observed difference between the float32 and the float64 score of a pair.
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
        """Create a block.

        Args:
            start: id of the first row.
            vectors: (n, D) float32 rows, on the device of the queries.
            queries: (Q, D) float32.
            excluded: (Q,) ids, one per query, of excluded rows of the database; -1 for none.
            skipped: ids of all skipped rows of the database.
            name: name of the database, for messages.
        """
        self.start = start
        self.vectors = vectors
        self.queries = queries
        stop = start + len(vectors)
        self.excluded = np.where((excluded >= start) & (excluded < stop), excluded - start, -1)
        self.skipped = skipped[(skipped >= start) & (skipped < stop)] - start
        self._name = name
        self._scores: torch.Tensor | None = None
        self.error = 0.0

    @property
    def scores(self) -> torch.Tensor:
        """Inner products (Q, n) float32 on the device of the queries, -inf for excluded and skipped rows.

        Raises:
            InputError: a row is not finite. This is checked even if the source of the row is `validated`.
        """
        if self._scores is None:
            with full_precision():
                scores = inner_products(self.queries, self.vectors)
            if not bool(torch.isfinite(scores.sum())):
                validate_block(self.vectors.cpu().numpy(), self.start, self._name, unit=True)
            affected = np.flatnonzero(self.excluded >= 0)
            if affected.size:
                pairs = (torch.from_numpy(ids).to(scores.device) for ids in (affected, self.excluded[affected]))
                scores[tuple(pairs)] = -torch.inf
            if self.skipped.size:
                scores[:, torch.from_numpy(self.skipped).to(scores.device)] = -torch.inf
            self._scores = scores
        return self._scores

    def pair_scores(
        self, query_of: np.ndarray, row_of: np.ndarray, approximate: np.ndarray | None = None
    ) -> np.ndarray:
        """Compute the float64 scores of pairs of a query and a row of the block, and update `error`.

        Args:
            query_of: (P,) query index of each pair.
            row_of: (P,) position of the row in the block.
            approximate: (P,) float32 scores of the pairs, whose errors update `error`; taken from `scores` by default.

        Returns:
            Scores (P,) float64.
        """
        if is_host(self.queries.device):
            exact = block_pair_scores(self.queries.numpy(), self.vectors.numpy(), query_of, row_of)
        else:
            exact = pair_scores_on(self.queries, self.vectors, query_of, row_of)
        if approximate is None:
            pairs = (torch.from_numpy(ids).to(self.scores.device) for ids in (query_of, row_of))
            approximate = self.scores[tuple(pairs)].cpu().numpy()
        self.error = max(self.error, float(np.abs(exact - approximate).max(initial=0)))
        return exact

    def probe(self) -> None:
        """Update `error` with the error of each query's best score in the block, if `scores` were computed."""
        if self._scores is not None:
            best, row_of = (tensor.cpu().numpy() for tensor in self._scores.max(dim=1))
            query_of = np.flatnonzero(np.isfinite(best))
            self.pair_scores(query_of, row_of[query_of], best[query_of])


def inner_products(queries: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Compute the inner products (Q, n) float32 of queries (Q, D) and vectors (n, D), on their device."""
    if is_host(queries.device):
        return queries @ vectors.T
    scores = queries[:, :_SUMMED_DIMS] @ vectors[:, :_SUMMED_DIMS].T
    for start in range(_SUMMED_DIMS, queries.shape[1], _SUMMED_DIMS):
        dims = slice(start, start + _SUMMED_DIMS)
        scores.addmm_(queries[:, dims], vectors[:, dims].T)
    return scores


class Consumer(Protocol):
    """Interface of the objects that process the blocks of `scan`."""

    def add(self, block: Block) -> None:
        """Process a block. The block is reused afterwards, so do not keep a reference to it."""

    def finish(self) -> float:
        """Complete the result after the last block. Return the largest error found in float32 scores, or 0 if none."""


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
    """Pass all blocks of the database to consumers, and return the consumers.

    The error of float32 scores depends on the descriptors and on the matrix library. To observe it, some scores of
    every block are also computed in float64. If the error is too large for the tolerance, the pass is repeated with new
    consumers and a larger tolerance, which makes them compute more scores in float64.

    Args:
        queries: (Q, D) float32, validated.
        rows: rows of the database.
        make: function that creates the consumers for a tolerance, the assumed largest error of a float32 score.
        excluded: (Q,) ids, one per query, that are excluded; skipped rows are always excluded.
        device: device to compute on; the CPU by default.
        block_rows: maximum number of rows in a block.
        check: True to validate that all rows are finite. This is needed only if no consumer uses `Block.scores`, which
            validates the rows as well.
    """
    on_device = to_tensor(queries, torch.device(device or "cpu"))
    excluded_ids = np.full(len(queries), -1) if excluded is None else excluded
    tolerance = TOLERANCE
    while True:
        consumers = make(tolerance)
        error = _pass(on_device, rows, consumers, excluded_ids, block_rows, check, tolerance)
        if error <= tolerance / _MARGIN or tolerance >= _MAX_TOLERANCE:
            return consumers
        tolerance = min(_MAX_TOLERANCE, _WIDENED * error)
        text = "float32 scores of the %s have errors of up to %.1e: repeating the pass with a tolerance of %.1e"
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
    """Pass all blocks of the database to the consumers once, and return the largest observed error of a float32 score.

    The pass ends early if the error is too large for the tolerance of the consumers.

    Args:
        queries: (Q, D) float32, on the device to compute on.
        rows: rows of the database.
        consumers: objects that process the blocks.
        excluded: (Q,) ids, one per query, of excluded rows; -1 for none.
        block_rows: maximum number of rows in a block.
        check: True to validate that all rows are finite.
        tolerance: largest error of a float32 score that the consumers allow for.
    """
    error = 0.0
    # If a consumer raises an exception, close the generator at once, which stops its reading thread. Otherwise the
    # traceback would keep the generator and the thread alive.
    with closing(_blocks(rows, block_rows, len(queries), queries.device, check)) as blocks:
        for start, vectors in blocks:
            block = Block(start, vectors, queries, excluded, rows.skipped, rows.name)
            for consumer in consumers:
                consumer.add(block)
            block.probe()
            error = max(error, block.error)
            if error > tolerance / _MARGIN and tolerance < _MAX_TOLERANCE:
                return error
    return max([error, *(consumer.finish() for consumer in consumers)])


def _blocks(
    rows: Rows, block_rows: int, n_queries: int, device: torch.device, check: bool
) -> Generator[tuple[int, torch.Tensor], None, None]:
    """Read all rows in blocks on any device.

    Args:
        rows: rows of the database.
        block_rows: maximum number of rows in a block.
        n_queries: number of queries. With more queries, the scores of a row take more memory, so blocks have fewer
            rows.
        device: device of the blocks.
        check: True to validate that all values are finite.

    Yields:
        Pairs of the id of the first row of a block, and the block (n, D) float32 on `device`.
    """
    if is_host(device):
        for start, block in rows.blocks(block_size(block_rows, n_queries, rows.dim)):
            if check and not np.isfinite(block.sum()):
                validate_block(block, start, rows.name, unit=True)
            yield start, to_tensor(block, device)
        return
    with closing(device_blocks(rows, block_rows, n_queries, device)) as blocks:
        for start, on_device in blocks:
            if check and not torch.isfinite(on_device.sum()):
                validate_block(on_device.cpu().numpy(), start, rows.name, unit=True)
            yield start, on_device


def device_blocks(
    rows: Rows, block_rows: int, n_queries: int, device: torch.device
) -> Generator[tuple[int, torch.Tensor]]:
    """Read all rows in blocks on an accelerator.

    Rows are copied in their stored dtype and converted on the device. If you do not iterate to the end, close the
    generator to stop the reading thread.

    Args:
        rows: rows of the database.
        block_rows: maximum number of rows in a block.
        n_queries: number of queries. With more queries, the scores of a row take more memory, so blocks have fewer
            rows.
        device: accelerator.

    Yields:
        Pairs of the id of the first row of a block, and the block (n, D) float32 on `device`. A block is valid until
        the next one is requested.

    Raises:
        InputError: a row is not a unit vector. Rows of sources that are marked as `validated` are not checked.
    """
    if rows.is_on(device):
        size = block_size(block_rows, n_queries, rows.dim, _BLOCK_ELEMENTS, _SCORE_ELEMENTS)
        blocks = ((start, rows.block_on(start, start + size, device)) for start in range(0, len(rows), size))
    else:
        elements = STAGED_BYTES // rows.stored_dtype.itemsize
        size = block_size(block_rows, n_queries, rows.dim, elements, _SCORE_ELEMENTS)
        blocks = _staged_blocks(rows, size, device)
    with closing(blocks):
        for start, block in blocks:
            _validate_on_device(rows, start, block)
            yield start, block


def _validate_on_device(rows: Rows, start: int, block: torch.Tensor) -> None:
    """Check that the rows of a block are unit vectors, except rows of sources that are marked as `validated`.

    Args:
        rows: rows of the database.
        start: id of the first row of the block.
        block: (n, D) float32 rows on an accelerator.

    Raises:
        InputError: a row is not a unit vector.
    """
    for low, high in rows.unvalidated(start, start + len(block)):
        norms = torch.linalg.vector_norm(block[low - start : high - start], dim=1)
        if not bool(((norms - 1).abs() <= _NORM_TOLERANCE).all()):
            validate_block(rows.block(low, high), low, rows.name, unit=True)


def _staged_blocks(rows: Rows, size: int, device: torch.device) -> Generator[tuple[int, torch.Tensor]]:
    """Read all rows in blocks, and copy the blocks to an accelerator through pinned buffers on the host.

    If the sources support several threads (`Rows.concurrent`), a thread reads blocks before they are requested.

    Args:
        rows: rows of the database.
        size: number of rows per block.
        device: accelerator.
    """
    size = min(size, len(rows))
    starts = range(0, len(rows), max(1, size))
    block = torch.empty((size, rows.dim), dtype=torch.float32, device=device)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    buffers = [_Buffer(rows, size, device, stream) for _ in starts[:_BUFFERS]]
    if stream is not None:
        # PyTorch may have given the buffers memory of freed tensors that kernels in the current stream still use. The
        # copies must wait for these kernels.
        stream.wait_stream(torch.cuda.current_stream(device))
    reader = ThreadPoolExecutor(1, "descriptor-reader")
    reads: deque[Future[None]] = deque()
    try:
        if rows.concurrent:
            reads.extend(reader.submit(buffer.fill, start) for buffer, start in zip(buffers, starts, strict=False))
        for number, start in enumerate(starts):
            buffer = buffers[number % _BUFFERS]
            if reads:
                reads.popleft().result()
            else:
                buffer.fill(start)
            current = block[: min(size, len(rows) - start)]
            buffer.convert_into(current)
            if rows.concurrent and number + _BUFFERS < len(starts):
                reads.append(reader.submit(buffer.fill, starts[number + _BUFFERS]))
            yield start, current
    finally:
        reader.shutdown(cancel_futures=True)
        if stream is not None:
            # The copies must finish before the buffers are freed, because other streams may then reuse their memory.
            stream.synchronize()


class _Buffer:
    """Pair of buffers for a block of rows in their stored dtype, one on the host and one on the device.

    On CUDA, rows are copied from host to device in a separate stream.
    """

    def __init__(self, rows: Rows, size: int, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._rows = rows
        self._host = rows.host_buffer(size, device)
        self._device = torch.empty(self._host.shape, dtype=self._host.dtype, device=device)
        self._stream = stream
        if stream is not None:
            self._copied, self._converted = torch.cuda.Event(), torch.cuda.Event()

    # Inference mode applies per thread. This method runs in the reading thread, and it writes to tensors that another
    # thread may have created in inference mode.
    @torch.inference_mode()
    def fill(self, start: int) -> None:
        """Read a block of rows starting at row `start`, and start copying it to the device."""
        count = min(len(self._host), len(self._rows) - start)
        if self._stream is None:
            self._rows.read_into(start, start + count, self._host.numpy()[:count])
            self._device[:count].copy_(self._host[:count])
            return
        self._copied.synchronize()
        self._rows.read_into(start, start + count, self._host.numpy()[:count])
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._converted)
            self._device[:count].copy_(self._host[:count], non_blocking=True)
            self._copied.record(self._stream)

    def convert_into(self, out: torch.Tensor) -> None:
        """Convert the first n rows of the device buffer into `out` (n, D) float32, in the current stream."""
        if self._stream is None:
            out.copy_(self._device[: len(out)])
            return
        current = torch.cuda.current_stream(out.device)
        current.wait_event(self._copied)
        out.copy_(self._device[: len(out)])
        self._converted.record(current)
