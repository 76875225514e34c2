"""Read a database onto an accelerator in blocks, the next block while the device works on the last one."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import torch

from superglobal.retrieval.rows import Rows, block_size, validate_block

# Bytes of one staging buffer. A larger one takes longer to pin than it saves; a smaller one costs more launches and
# synchronizations per row than the copy takes.
STAGED_BYTES = 1 << 26
_BUFFERS = 2  # one is filled while the other is copied
# Blocks of rows that are on the device already cost nothing to read. Their float32 values take 512 MB; their scores for
# all queries take 256 MB, and what exact ranks compute from the scores about five times as much.
_BLOCK_ELEMENTS = 1 << 27
_SCORE_ELEMENTS = 1 << 26
_NORM_TOLERANCE = 0.9e-3  # stricter than `validate_block`, which makes the decision


def device_blocks(
    rows: Rows, block_rows: int, n_queries: int, device: torch.device
) -> Generator[tuple[int, torch.Tensor]]:
    """Yield (first row, block) from the first row to the last, each block valid until the next is asked for.

    Blocks are (n, D) float32 on `device`. Rows are copied there in the dtype that they are stored in. Close the
    generator to stop the reading thread before the end.

    Raises:
        InputError: a row is not a unit vector in a source that does not vouch for its rows.
    """
    if rows.is_on(device):
        size = block_size(block_rows, n_queries, rows.dim, _BLOCK_ELEMENTS, _SCORE_ELEMENTS)
        blocks = _resident_blocks(rows, size, device)
    else:
        elements = STAGED_BYTES // rows.stored_dtype.itemsize
        size = block_size(block_rows, n_queries, rows.dim, elements, _SCORE_ELEMENTS)
        blocks = _staged_blocks(rows, size, device)
    with closing(blocks):
        for start, block in blocks:
            _validate(rows, start, block)
            yield start, block


def _validate(rows: Rows, start: int, block: torch.Tensor) -> None:
    for low, high in rows.unvalidated(start, start + len(block)):
        norms = torch.linalg.vector_norm(block[low - start : high - start], dim=1)
        if not bool(((norms - 1).abs() <= _NORM_TOLERANCE).all()):
            validate_block(rows.block(low, high), low, rows.name, unit=True)


def _resident_blocks(rows: Rows, size: int, device: torch.device) -> Generator[tuple[int, torch.Tensor]]:
    for start in range(0, len(rows), size):
        yield start, rows.block_on(start, start + size, device)


def _staged_blocks(rows: Rows, size: int, device: torch.device) -> Generator[tuple[int, torch.Tensor]]:
    """Copy blocks through pinned buffers. A thread reads ahead if the source allows several threads."""
    size = min(size, len(rows))
    starts = range(0, len(rows), max(1, size))
    block = torch.empty((size, rows.dim), dtype=torch.float32, device=device)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    buffers = [_Buffer(rows, size, device, stream) for _ in starts[:_BUFFERS]]
    if stream is not None:
        # The buffers' memory may still be in use by work that was queued before they were allocated.
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
            # The memory of the buffers is freed for other streams.
            stream.synchronize()


class _Buffer:
    """Rows as they are stored, on the host and on the device. On CUDA the copy runs in a stream of its own."""

    def __init__(self, rows: Rows, size: int, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._rows = rows
        self._host = rows.host_buffer(size, device)
        self._device = torch.empty(self._host.shape, dtype=self._host.dtype, device=device)
        self._stream = stream
        if stream is not None:
            self._copied, self._converted = torch.cuda.Event(), torch.cuda.Event()

    @torch.inference_mode()  # it holds for one thread, and the tensors may have been made under it in another
    def fill(self, start: int) -> None:
        """Read rows from `start` on and begin to copy them to the device."""
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
        """Convert the first rows to float32 (n, D), in the current stream."""
        if self._stream is None:
            out.copy_(self._device[: len(out)])
            return
        current = torch.cuda.current_stream(out.device)
        current.wait_event(self._copied)
        out.copy_(self._device[: len(out)])
        self._converted.record(current)
