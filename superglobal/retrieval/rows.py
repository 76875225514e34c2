"""Provide one interface to the rows of arrays, memory maps, tensors, descriptor stores, and combinations of these."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal

import numpy as np
import torch

from superglobal.errors import InputError, first_line
from superglobal.utils.io import require_regular
from superglobal.utils.norms import is_unit, norm_fault

CHUNK_ELEMENTS = 1 << 17
"""Number of elements that a thread processes at a time: 1 MB of float64, which fits into the cache."""
_CHUNKS_PER_THREAD = 4  # minimum number of chunks per thread; for fewer chunks, another thread does not save time
_SCORE_ELEMENTS = 1 << 24  # maximum number of scores of a block of rows with all queries: 64 MB of float32
_BLOCK_ELEMENTS = 1 << 24  # maximum number of elements of a block of rows: 64 MB of float32


def map_npy(path: str | Path, mode: Literal["r", "r+"] = "r") -> np.ndarray:
    """Memory-map a `.npy` file without objects.

    Args:
        path: the file.
        mode: "r" to read only, or "r+" to write too.

    Raises:
        OSError: the file cannot be opened, or it is not a regular file.
        ValueError: the file is damaged.
    """
    require_regular(path)
    try:
        with np.errstate(over="ignore"):  # NumPy would warn of a damaged shape before it raises an error.
            return np.lib.format.open_memmap(path, mode)
    except (EOFError, OverflowError, RecursionError, SyntaxError, TokenError, TypeError, ValueError) as error:
        raise ValueError(first_line(error)) from error


class Rows:
    """Descriptors (N, D) of one source or of several concatenated sources, read by block or by row as float32.

    Rows are copied only when they are read. A source is a NumPy array or memory map, a torch tensor, or any object with
    `shape`, `block(start, stop)` and `take(ids)`, such as a `DescriptorStore`. A source may have further attributes and
    methods:

    - `skipped`: ids of rows that are never ranked.
    - `validated`: true if the rows need no validation.
    - `fingerprint()`: return a digest of the rows.
    - `converts`: true if the stored rows are not float32. The source then has `read_into(start, stop, out)`, which
      converts rows to float32 while reading.
    - `dtype`: NumPy dtype of the stored rows. `read_into` then also accepts an array `out` of this dtype, and the
      source has `take_stored(ids)`, which returns rows in this dtype.
    - `concurrent`: true if several threads may call the methods of the source at the same time.
    """

    def __init__(self, sources: Sequence[Any], name: str = "descriptors") -> None:
        """Concatenate sources.

        Args:
            sources: sources of rows.
            name: name of the descriptors, for messages.

        Raises:
            InputError: the sources have different dimensions.
        """
        # A source that is a Rows object is replaced by its own sources, so that each source is read directly.
        sources = [source for rows in sources for source in (rows._sources if isinstance(rows, Rows) else [rows])]
        self._sources: list[Any] = sources
        self._starts = np.cumsum([0] + [int(source.shape[0]) for source in sources])
        dims = [int(source.shape[1]) for source in sources]
        if len(set(dims)) != 1:
            raise InputError(
                f"{name}: cannot join sources of different dimensions, D = {dims}; extract all of them with the same "
                "network"
            )
        self.shape: tuple[int, int] = (int(self._starts[-1]), dims[0])
        self.name = name
        self.concurrent = all(getattr(source, "concurrent", False) for source in sources)
        """True if several threads may read at the same time."""
        half = [getattr(source, "dtype", None) == np.float16 and hasattr(source, "take_stored") for source in sources]
        self.stored_dtype = np.dtype(np.float16 if sources and all(half) else np.float32)
        """Dtype for copying rows: float16 if all sources are stored in float16, else float32."""
        skipped = [low + getattr(source, "skipped", []) for source, low in zip(sources, self._starts, strict=False)]
        self.skipped: np.ndarray = np.concatenate([np.asarray(ids, np.int64) for ids in skipped])
        """(n,) ids that search, ranks and reranking ignore, ascending."""

    @property
    def dim(self) -> int:
        """Dimension D of the descriptors."""
        return self.shape[1]

    @property
    def tensor(self) -> torch.Tensor | None:
        """Tensor with all rows, if they are a single tensor on an accelerator; else None."""
        return _tensor_of(self._sources[0]) if len(self._sources) == 1 else None

    def __len__(self) -> int:
        return self.shape[0]

    def block(self, start: int, stop: int, buffer: np.ndarray | None = None) -> np.ndarray:
        """Return consecutive rows as (n, D) float32: a view of the source if possible, else a copy.

        Args:
            start: first row.
            stop: end of the range, exclusive; a value above N is replaced with N.
            buffer: array (m, D) float32 with m >= n, into which a copy is written; None for a new array.
        """
        stop = min(stop, len(self))
        pieces = list(self._pieces(start, stop))
        if len(pieces) == 1 and not getattr(pieces[0][0], "converts", False):
            source, low, high = pieces[0]
            return np.asarray(source.block(low, high), dtype=np.float32)
        out = np.empty((max(0, stop - start), self.dim), np.float32) if buffer is None else buffer[: stop - start]
        self.read_into(start, stop, out)
        return out

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """Copy rows start..stop-1 into `out` (n, D), whose dtype is float32 or `stored_dtype`."""
        offset = 0
        for source, low, high in self._pieces(start, stop):
            piece = out[offset : offset + high - low]
            if getattr(source, "converts", False):
                source.read_into(low, high, piece)
            else:
                copy_into(np.ascontiguousarray(source.block(low, high), np.float32), piece)
            offset += high - low

    def is_on(self, device: torch.device) -> bool:
        """Return True if `device` is an accelerator and all sources are tensors on it."""
        tensors = [_tensor_of(source) for source in self._sources]
        return all(tensor is not None and tensor.device == device for tensor in tensors)

    def block_on(self, start: int, stop: int, device: torch.device) -> torch.Tensor:
        """Return rows start..min(stop, N)-1 as a tensor (n, D) float32 on `device`.

        The rows are copied in their stored dtype and converted to float32 on the device.
        """
        if is_host(device):
            return to_tensor(self.block(start, stop), device)
        stop = min(stop, len(self))
        if self.is_on(device):
            pieces = [_tensor_of(source)[low:high].float() for source, low, high in self._pieces(start, stop)]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        staged = self.host_buffer(max(0, stop - start), device)
        self.read_into(start, stop, staged.numpy())
        return staged.to(device, non_blocking=True).float()

    def take_on(self, ids: np.ndarray, device: torch.device) -> torch.Tensor:
        """Return the rows with the given ids on `device`, where they are converted to float32.

        Args:
            ids: integers in 0..N-1, of any shape S.
            device: device of the result.

        Returns:
            Tensor `(*S, D)` float32.
        """
        if is_host(device):
            return to_tensor(self.take(ids), device)
        tensor = self.tensor
        if tensor is not None and tensor.device == device:
            return tensor[torch.from_numpy(np.asarray(ids, np.int64)).to(device)].float()
        flat = np.asarray(ids, np.int64).ravel()
        staged = self.host_buffer(flat.size, device)
        values = staged.numpy()
        # Rows are read in ascending order, so that each chunk reads from only a few files (shards) of a store.
        order = np.argsort(flat, kind="stable")

        def read(chunks: Iterable[slice]) -> None:
            for chunk in chunks:
                values[order[chunk]] = self._take(flat[order[chunk]], self.stored_dtype)

        run_in_threads(read, flat.size, max(1, CHUNK_ELEMENTS // self.dim), self.concurrent)
        return staged.to(device, non_blocking=True).float().view(*np.shape(ids), self.dim)

    def host_buffer(self, rows: int, device: torch.device) -> torch.Tensor:
        """Return an uninitialized host tensor (rows, D) of `stored_dtype`, pinned for fast copies to a CUDA device."""
        dtype = torch.float16 if self.stored_dtype == np.float16 else torch.float32
        return torch.empty((rows, self.dim), dtype=dtype, pin_memory=device.type == "cuda")

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[Any, int, int]]:
        """Split rows start..stop-1 into one piece per source.

        Yields:
            Triples (source, low, high): the piece consists of the rows low..high-1 of this source.
        """
        for source, low, high in zip(self._sources, self._starts[:-1], self._starts[1:], strict=True):
            if max(start, low) < min(stop, high):
                yield source, max(start, low) - low, min(stop, high) - low

    def fingerprint(self) -> str:
        """Return a SHA-256 digest of all sources.

        The digest is computed from the fingerprint of each source, or from its values if it has no fingerprint.
        """
        digest = hashlib.sha256()
        for source in self._sources:
            if hasattr(source, "fingerprint"):
                digest.update(source.fingerprint().encode())
                continue
            for _, block in Rows([source], self.name).blocks(max(1, _BLOCK_ELEMENTS // self.dim), check=False):
                digest.update(np.ascontiguousarray(block).data)
        return digest.hexdigest()

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Return the rows with the given ids, integers in 0..N-1 of any shape S, as `(*S, D)` float32."""
        flat = np.asarray(ids, dtype=np.int64).ravel()
        return self._take(flat, np.dtype(np.float32)).reshape(*np.shape(ids), self.dim)

    def _take(self, flat: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Return the rows with the ids `flat` (n,) as an array (n, D) of `dtype`, float32 or `stored_dtype`."""
        method = "take" if dtype == np.float32 else "take_stored"
        if len(self._sources) == 1:
            return np.asarray(getattr(self._sources[0], method)(flat), dtype=dtype)
        rows = np.empty((flat.size, self.dim), dtype)
        source_of = np.searchsorted(self._starts, flat, side="right") - 1
        for number in np.unique(source_of):
            selected = source_of == number
            rows[selected] = getattr(self._sources[number], method)(flat[selected] - self._starts[number])
        return rows

    def blocks(self, rows: int, check: bool = True) -> Iterator[tuple[int, np.ndarray]]:
        """Read all rows in blocks.

        Args:
            rows: number of rows per block.
            check: True to validate the rows, except those of sources that are marked as `validated`.

        Yields:
            Pairs of the id of the first row of a block, and the block (n, D) float32. A block is valid until the next
            one is requested.
        """
        needs_buffer = len(self._sources) > 1 or any(getattr(source, "converts", False) for source in self._sources)
        buffer = np.empty((min(rows, len(self)), self.dim), np.float32) if needs_buffer else None
        for start in range(0, len(self), rows):
            block = self.block(start, start + rows, buffer)
            for low, high in self.unvalidated(start, start + len(block)) if check else ():
                validate_block(block[low - start : high - start], low, self.name, unit=True)
            yield start, block

    def unvalidated(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield ranges (low, high), high exclusive, of the rows in start..stop-1 whose source is not `validated`."""
        low = start
        for source, first, last in self._pieces(start, stop):
            high = low + last - first
            if not getattr(source, "validated", False):
                yield low, high
            low = high


class _Array:
    """NumPy array or torch tensor (N, D) as a source of `Rows`."""

    def __init__(self, array: Any, name: str) -> None:
        self.shape: tuple[int, ...] = tuple(array.shape)
        dtype = str(array.dtype).removeprefix("torch.")
        if dtype not in ("float16", "float32", "float64"):
            raise InputError(f"{name}: expected float16, float32 or float64 descriptors, got {dtype}; convert them")
        if len(self.shape) != 2 or not self.shape[1]:
            raise InputError(f"{name}: expected a 2-D array (N, D), got shape {self.shape}")
        if isinstance(array, torch.Tensor):
            array = array.detach().numpy() if is_host(array.device) else array.detach()
        self._array = array
        self.concurrent = isinstance(array, np.ndarray)
        self.tensor: torch.Tensor | None = None if self.concurrent else array
        """The rows if they are on an accelerator, else None."""
        self.converts = dtype == "float16" and isinstance(array, np.ndarray)
        self.dtype = np.dtype(dtype)

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        copy_into(self._array[start:stop], out)

    def take_stored(self, ids: np.ndarray) -> np.ndarray:
        return self._array[ids]

    def block(self, start: int, stop: int) -> np.ndarray:
        return self._numpy(self._array[start:stop])

    def take(self, ids: np.ndarray) -> np.ndarray:
        if isinstance(self._array, torch.Tensor):
            return self._numpy(self._array[torch.from_numpy(ids).to(self._array.device)])
        return self._numpy(self._array[ids])

    @staticmethod
    def _numpy(rows: Any) -> np.ndarray:
        if isinstance(rows, torch.Tensor):
            rows = rows.cpu().numpy()
        return np.ascontiguousarray(rows, dtype=np.float32)


def _tensor_of(source: Any) -> Any:
    """Return the tensor of a source if it is on an accelerator, else None."""
    return source.tensor if isinstance(source, _Array) else None


def as_rows(x: Any, name: str = "descriptors") -> Rows:
    """Wrap descriptors of any kind in `Rows`.

    Args:
        x: (N, D) NumPy array, memory map or torch tensor; an object with `shape`, `block` and `take`, such as a
            `DescriptorStore`; or `Rows`, which are returned unchanged.
        name: name of the descriptors, for messages.

    Raises:
        InputError: the type is not supported, the dtype is not float16, float32 or float64, or the array is not 2-D.
    """
    if isinstance(x, Rows):
        return x
    if all(hasattr(x, attribute) for attribute in ("shape", "block", "take")):
        return Rows([x], name)
    if not isinstance(x, np.ndarray | torch.Tensor):
        raise InputError(
            f"{name}: expected a NumPy array, a torch tensor or an object with shape, block and take, "
            f"got {type(x).__name__}"
        )
    return Rows([_Array(x, name)], name)


def concat(*sources: Any, name: str = "descriptors") -> Rows:
    """Concatenate sources, such as a database and its distractors, without copying them.

    The ids of the second source continue after those of the first, and so on.

    Args:
        sources: descriptors of the same dimension, of any kind that `as_rows` accepts.
        name: name of the result, for messages.
    """
    if not sources:
        raise InputError(f"{name}: expected at least one source, got none")
    return Rows([as_rows(source, name) for source in sources], name)


def validate_block(block: np.ndarray, first_row: int, name: str, unit: bool = False) -> None:
    """Raise InputError for the first invalid row of a block.

    A row is invalid if it has NaN or infinite values, if it is zero (norm < 1e-6) or, with `unit`, if its norm differs
    from 1 by more than 1e-3.

    Args:
        block: (n, D) float32.
        first_row: id of the first row of the block, for the message.
        name: name of the descriptors, for the message.
        unit: True to require unit norm.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sqrt(np.einsum("nd,nd->n", block, block))
        valid = is_unit(norms) if unit else (norms >= 1e-6) & np.isfinite(norms)
    if valid.all():
        return
    row = int(np.argmin(valid))
    raise InputError(f"{name}: row {first_row + row} {norm_fault(float(norms[row]))}")


def as_queries(Q: Any, dim: int) -> np.ndarray:
    """Validate query descriptors and return them as a (Q, D) float32 array.

    Args:
        Q: (Q, D) descriptors of any kind that `as_rows` accepts.
        dim: dimension D of the database.

    Raises:
        InputError: there are no queries, their dimension is not `dim`, or one is not a unit vector.
    """
    rows = as_rows(Q, "queries")
    if rows.dim != dim or not len(rows):
        raise InputError(
            f"queries: expected shape (Q, {dim}) with at least one query, because the database has D = {dim}, "
            f"got {rows.shape}; extract both with the same network"
        )
    block = np.ascontiguousarray(rows.block(0, len(rows)))
    validate_block(block, 0, "queries", unit=True)
    return block


def flat_array(values: Any, name: str) -> np.ndarray:
    """Convert ids to a 1-D array, or raise InputError for nested lists of different lengths.

    Args:
        values: list or array of ids.
        name: name of the ids, for the message.
    """
    try:
        return np.asarray(values).ravel()
    except ValueError as error:
        raise InputError(f"{name}: expected a flat list of integer ids ({error})") from error


def load_npy(path: str | Path) -> Rows:
    """Open a .npy file of descriptors (N, D) as a memory map. Raises InputError if it is unreadable or has no rows."""
    try:
        array = map_npy(path)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: not a readable .npy file of descriptors ({error}); write it with numpy.save"
        ) from error
    if not array.size:
        raise InputError(f"{path}: expected descriptors (N, D) with at least one row, got shape {array.shape}")
    return as_rows(array, str(path))


def as_exclude(exclude: Any, n_queries: int) -> np.ndarray | None:
    """Validate the ids to exclude, one per query, and return them as (Q,) int64. None is returned unchanged."""
    if exclude is None:
        return None
    ids = np.asarray(exclude)
    if ids.shape != (n_queries,) or ids.dtype.kind not in "iu":
        raise InputError(f"exclude: expected {n_queries} integer ids, one per query, got {ids.dtype} {ids.shape}")
    return ids.astype(np.int64)


def as_shortlists(ids: Any, n_queries: int, n_rows: int) -> np.ndarray:
    """Validate shortlists and return them as (Q, k) int64.

    Args:
        ids: (Q, k) integers, database rows as `search` returns them.
        n_queries: number of queries Q.
        n_rows: number of database rows.

    Raises:
        InputError: the shape or the dtype is wrong, or an id is out of range or repeated within a shortlist.
    """
    array = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else np.asarray(ids)
    if array.ndim != 2 or len(array) != n_queries or not array.shape[1] or array.dtype.kind not in "iu":
        raise InputError(
            f"ids: expected integers ({n_queries}, k), one list per query as returned by search, "
            f"got {array.dtype} {array.shape}"
        )
    array = array.astype(np.int64)
    outside = (array < 0) | (array >= n_rows)
    if outside.any():
        query, column = np.argwhere(outside)[0]
        raise InputError(
            f"ids: query {query} lists row {array[query, column]}, which is outside the database, 0..{n_rows - 1}; "
            "give the results of a search in this database"
        )
    ordered = np.sort(array, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    if repeated.any():
        raise InputError(f"ids: query {int(repeated.argmax())} lists an id twice; remove the duplicate")
    return array


def block_size(
    block_rows: int,
    n_queries: int,
    dim: int,
    max_elements: int = _BLOCK_ELEMENTS,
    max_scores: int = _SCORE_ELEMENTS,
) -> int:
    """Return a number of rows per block for which the block and its scores need little memory.

    With the default limits, a block and its scores for all queries take up to about 64 MB of float32 each.

    Args:
        block_rows: maximum number of rows. It is never exceeded, even if it is less than 1024.
        n_queries: number of queries.
        dim: dimension of the descriptors.
        max_elements: maximum number of elements of a block. It is exceeded if it would allow fewer than 1024 rows.
        max_scores: maximum number of scores of a block for all queries. It is exceeded if it would allow fewer than
            1024 rows.
    """
    if block_rows < 1:
        raise InputError(f"block_rows={block_rows}: expected an integer >= 1")
    return min(block_rows, max(1024, min(max_scores // n_queries, max_elements // dim)))


def run_in_threads(work: Callable[[Iterable[slice]], None], count: int, step: int, concurrent: bool) -> None:
    """Process a range of items in chunks, in several threads if there are enough chunks.

    Args:
        work: function that processes an iterable of chunks, given as slices of the items. It is called once per thread.
        count: number of items.
        step: number of items per chunk.
        concurrent: True to allow several threads.
    """
    chunks = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    threads = min(torch.get_num_threads(), len(chunks) // _CHUNKS_PER_THREAD) if concurrent else 1
    if threads < 2:
        work(chunks)
        return
    per_thread = -(-len(chunks) // threads)
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, [chunks[start : start + per_thread] for start in range(0, len(chunks), per_thread)]):
            pass


def is_host(device: torch.device) -> bool:
    """Return True if tensors on `device` share memory with NumPy (the CPU). Every other device is an accelerator."""
    return device.type == "cpu"


def to_tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Convert a NumPy array to a tensor on `device`. On the CPU they share memory, so do not write to the tensor."""
    return torch.from_numpy(array).to(device)


def copy_into(array: np.ndarray, out: np.ndarray) -> None:
    """Copy an array into the array `out`, converting it to the dtype of `out`."""
    # torch converts float16 several times faster than NumPy.
    torch.from_numpy(out).copy_(torch.from_numpy(array))


# torch warns once per process when it wraps a read-only array, such as a memory map, although nothing here writes to
# it. The warning is triggered and suppressed at import, because `warnings.catch_warnings` is not safe in the threads
# that read arrays later.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*not writable.*")
    torch.from_numpy(np.frombuffer(bytes(4), np.float32))
