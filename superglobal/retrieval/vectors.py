"""Descriptors as rows, wherever they live, and the exact score that every order in this package rests on."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from tokenize import TokenError
from typing import Any

import numpy as np
import torch

from superglobal.errors import InputError

# How far a float32 inner product of unit vectors may lie from the float64 one. Anything decided by less
# than this is decided again in float64.
TOLERANCE = 1e-6
NPY_FAULTS = (OSError, ValueError, EOFError, TypeError, SyntaxError, TokenError)
"""What NumPy raises for a damaged `.npy`."""
_UNIT_TOLERANCE = 1e-3
_PAIR_ELEMENTS = 1 << 17  # elements of one chunk of pair scores: 1 MB of float64, which stays in the cache
_FEW_PAIRS = 2048  # that are scored without looking for equal rows
_SCORE_ELEMENTS = 1 << 24  # elements of one block of scores: 64 MB of float32
_BLOCK_ELEMENTS = 1 << 24  # elements of one block of rows: 64 MB of float32


class Rows:
    """Descriptors (N, D) read by block or by row as float32, over one source or several laid end to end.

    Nothing is copied until it is read. A source is a numpy array or memmap, a torch tensor, or any object
    with `shape`, `block(start, stop)` and `take(ids)`, such as a DescriptorStore. Optional are `skipped` (ids that
    are never ranked), `validated` (its rows need no check), `fingerprint()` (of its rows) and `converts` with
    `read_into(start, stop, out)` (its rows are not float32 and are converted into a buffer).
    """

    def __init__(self, parts: Sequence[Any], name: str = "descriptors") -> None:
        """`parts`: objects with `shape`, `block` and `take`. Raises InputError if their D differ."""
        # Rows among the parts are taken apart, so that each source is read in its own way.
        parts = [source for part in parts for source in (part._parts if isinstance(part, Rows) else [part])]
        self._parts: list[Any] = parts
        self._starts = np.cumsum([0] + [int(part.shape[0]) for part in parts])
        dims = [int(part.shape[1]) for part in parts]
        if len(set(dims)) != 1:
            raise InputError(
                f"{name}: sources of different dimension cannot be joined, got D = {dims}; extract all of them "
                "with the same network"
            )
        self.shape: tuple[int, int] = (int(self._starts[-1]), dims[0])
        self.name = name
        skipped = [low + getattr(part, "skipped", []) for part, low in zip(parts, self._starts[:-1], strict=True)]
        self.skipped: np.ndarray = np.concatenate([np.asarray(ids, np.int64) for ids in skipped])
        """(n,) ids that search, ranks and reranking leave out, ascending."""

    @property
    def dim(self) -> int:
        return self.shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def block(self, start: int, stop: int, buffer: np.ndarray | None = None) -> np.ndarray:
        """Rows start..stop-1, cut off at N: (n, D) float32, a view of the source where it can be, or of `buffer`."""
        stop = min(stop, len(self))
        pieces = list(self._pieces(start, stop))
        if len(pieces) == 1 and not getattr(pieces[0][0], "converts", False):
            part, low, high = pieces[0]
            return np.asarray(part.block(low, high), dtype=np.float32)
        out = np.empty((max(0, stop - start), self.dim), np.float32) if buffer is None else buffer[: stop - start]
        at = 0
        for part, low, high in pieces:
            here = out[at : at + high - low]
            if getattr(part, "converts", False):
                part.read_into(low, high, here)
            else:
                here[:] = part.block(low, high)
            at += high - low
        return out

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[Any, int, int]]:
        """The sources that rows start..stop-1 lie in, with the rows of each."""
        for part, low, high in zip(self._parts, self._starts[:-1], self._starts[1:], strict=True):
            if max(start, low) < min(stop, high):
                yield part, max(start, low) - low, min(stop, high) - low

    def fingerprint(self) -> str:
        """SHA-256 of what the rows are: the sources' own fingerprints, or else all values."""
        whole = hashlib.sha256()
        for part in self._parts:
            if hasattr(part, "fingerprint"):
                whole.update(part.fingerprint().encode())
                continue
            for _, block in Rows([part], self.name).blocks(max(1, _BLOCK_ELEMENTS // self.dim), check=False):
                whole.update(np.ascontiguousarray(block).data)
        return whole.hexdigest()

    def take(self, ids: np.ndarray) -> np.ndarray:
        """The rows with these ids, any shape S of integers in 0..N-1: (*S, D) float32."""
        flat = np.asarray(ids, dtype=np.int64).ravel()
        if len(self._parts) == 1:
            rows = np.asarray(self._parts[0].take(flat), dtype=np.float32)
        else:
            rows = np.empty((flat.size, self.dim), np.float32)
            owner = np.searchsorted(self._starts, flat, side="right") - 1
            for number in np.unique(owner):
                mine = owner == number
                rows[mine] = self._parts[number].take(flat[mine] - self._starts[number])
        return rows.reshape(*np.shape(ids), self.dim)

    def blocks(self, rows: int, check: bool = True) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, block) from the first row to the last, each block valid until the next is asked for.

        With `check` rows are validated unless their source vouches for them.
        """
        needs_buffer = len(self._parts) > 1 or any(getattr(part, "converts", False) for part in self._parts)
        buffer = np.empty((min(rows, len(self)), self.dim), np.float32) if needs_buffer else None
        for start in range(0, len(self), rows):
            block = self.block(start, start + rows, buffer)
            at = 0
            for part, low, high in self._pieces(start, start + len(block)) if check else ():
                if not getattr(part, "validated", False):
                    validate_block(block[at : at + high - low], start + at, self.name, unit=True)
                at += high - low
            yield start, block


class _Array:
    """A numpy array or torch tensor (N, D) as a source of Rows."""

    def __init__(self, array: Any, name: str) -> None:
        self._array = array
        self.shape: tuple[int, ...] = tuple(array.shape)
        kind = str(array.dtype).removeprefix("torch.")
        if kind not in ("float16", "float32", "float64"):
            raise InputError(f"{name}: expected float16, float32 or float64 descriptors, got {kind}; convert them")
        if len(self.shape) != 2 or not self.shape[1]:
            raise InputError(f"{name}: expected a 2-D array (N, D), got shape {self.shape}")
        self.converts = kind == "float16" and isinstance(array, np.ndarray)

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        to_float32(self._array[start:stop], out)

    def block(self, start: int, stop: int) -> np.ndarray:
        return self._numpy(self._array[start:stop])

    def take(self, ids: np.ndarray) -> np.ndarray:
        if isinstance(self._array, torch.Tensor):
            return self._numpy(self._array[torch.from_numpy(ids).to(self._array.device)])
        return self._numpy(self._array[ids])

    @staticmethod
    def _numpy(rows: Any) -> np.ndarray:
        if isinstance(rows, torch.Tensor):
            rows = rows.detach().cpu().numpy()
        return np.ascontiguousarray(rows, dtype=np.float32)


def as_rows(x: Any, name: str = "descriptors") -> Rows:
    """Anything that holds descriptors (N, D), as Rows; Rows are returned as they are.

    Raises InputError for a dtype other than float16/32/64, or anything that is not 2-D.
    """
    if isinstance(x, Rows):
        return x
    if all(hasattr(x, attribute) for attribute in ("shape", "block", "take")):
        return Rows([x], name)
    if not isinstance(x, np.ndarray | torch.Tensor):
        raise InputError(
            f"{name}: expected a numpy array, a torch tensor or an object with shape, block and take, "
            f"got {type(x).__name__}"
        )
    return Rows([_Array(x, name)], name)


def concat(*sources: Any, name: str = "descriptors") -> Rows:
    """Database, then distractors, as one Rows without copying: row i of source s is len(all before s) + i."""
    if not sources:
        raise InputError(f"{name}: nothing to join")
    return Rows([as_rows(source, name) for source in sources], name)


def validate_block(block: np.ndarray, first_row: int, name: str, unit: bool = False) -> None:
    """Raise InputError for the first bad row of a (n, D) float32 block, by its number in `name`.

    Bad is NaN or infinite, zero (norm < 1e-6), and with `unit` a norm more than 1e-3 away from 1.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sqrt(np.einsum("nd,nd->n", block, block))
        good = is_unit(norms) if unit else (norms >= 1e-6) & np.isfinite(norms)
    if good.all():
        return
    row = int(np.argmin(good))
    raise InputError(f"{name}: row {first_row + row} {fault(float(norms[row]))}")


def is_unit(norms: np.ndarray) -> np.ndarray:
    """Which norms are 1 to within 1e-3 (float16 storage stays well inside); NaN is not."""
    return np.abs(norms - 1) <= _UNIT_TOLERANCE


def fault(norm: float) -> str:
    """What is wrong with a descriptor of this norm, and the mend."""
    if not np.isfinite(norm):
        return "has NaN or infinite values; extract it again"
    if norm < 1e-6:
        return "is a zero vector, which has no direction; extract it again or leave it out"
    return f"has norm {norm:.6g}, expected 1; normalise first: x / np.linalg.norm(x, axis=1, keepdims=True)"


def as_queries(Q: Any, dim: int) -> np.ndarray:
    """Query descriptors as a validated (Q, D) float32 array. Raises InputError if D is not `dim`."""
    rows = as_rows(Q, "queries")
    if rows.dim != dim or not len(rows):
        raise InputError(
            f"queries: expected shape (Q, {dim}) with at least one query, as the database has D = {dim}, "
            f"got {rows.shape}; extract both with the same network"
        )
    block = np.ascontiguousarray(rows.block(0, len(rows)))
    validate_block(block, 0, "queries", unit=True)
    return block


def flat_array(values: Any, name: str) -> np.ndarray:
    """A list of ids as one array. Raises InputError for lists of several lengths in it."""
    try:
        return np.asarray(values).ravel()
    except ValueError as error:
        raise InputError(f"{name}: expected a flat list of integer ids ({error})") from error


def as_exclude(exclude: Any, n_queries: int) -> np.ndarray | None:
    """One database id per query that must not be returned, (Q,) int64; None stays None."""
    if exclude is None:
        return None
    ids = np.asarray(exclude)
    if ids.shape != (n_queries,) or ids.dtype.kind not in "iu":
        raise InputError(f"exclude: expected {n_queries} integer ids, one per query, got {ids.dtype} {ids.shape}")
    return ids.astype(np.int64)


def block_size(block_rows: int, n_queries: int, dim: int) -> int:
    """Rows per block such that it stays near 64 MB of float32, and its scores for all queries near 64 MB."""
    if block_rows < 1:
        raise InputError(f"block_rows: expected at least 1, got {block_rows}")
    return min(block_rows, max(1024, min(_SCORE_ELEMENTS // n_queries, _BLOCK_ELEMENTS // dim)))


def pair_scores(Q: np.ndarray, X: Any, query_of: np.ndarray, row_of: np.ndarray) -> np.ndarray:
    """Inner products of P pairs in float64: (P,) for queries `query_of` (P,) and rows `row_of` (P,) of X.

    X is anything with `take`: Rows, or a (n, D) array. float32 products are exact in float64, and each pair is
    summed on its own, so equal vectors get equal scores wherever they stand. That makes (-score, id) a total
    order which every backend shares.
    """
    rows = X if isinstance(X, Rows) else as_rows(X)
    scores = np.empty(len(query_of), np.float64)
    step = max(1, _PAIR_ELEMENTS // rows.dim)
    for start in range(0, len(scores), step):
        part = slice(start, start + step)
        products = rows.take(row_of[part]).astype(np.float64)  # converted apart: NumPy multiplies mixed types slowly
        products *= Q[query_of[part]].astype(np.float64)
        scores[part] = products.sum(axis=-1)
    return scores


def block_pair_scores(Q: np.ndarray, block: np.ndarray, query_of: np.ndarray, row_of: np.ndarray) -> np.ndarray:
    """`pair_scores` for a block in memory, scoring bitwise equal rows once: collections repeat images."""
    if len(row_of) <= _FEW_PAIRS:
        return pair_scores(Q, block, query_of, row_of)
    used, row_of = np.unique(row_of, return_inverse=True)
    digests = [hashlib.blake2b(block[row].data, digest_size=16).digest() for row in used]
    first = {digest: number for number, digest in reversed(list(enumerate(digests)))}
    twin = np.array([first[digest] for digest in digests], dtype=np.int64)
    pairs, back = np.unique(query_of * len(used) + twin[row_of], return_inverse=True)
    return pair_scores(Q, block, pairs // len(used), used[pairs % len(used)])[back]


def where(mask: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns where a 2-D mask is true; on the CPU NumPy finds them faster than torch."""
    on_cpu = mask.device.type == "cpu"
    flat = np.flatnonzero(mask.numpy()) if on_cpu else mask.ravel().nonzero()[:, 0].cpu().numpy()
    rows, columns = np.divmod(flat, mask.shape[1])
    return rows, columns


def to_tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A numpy array as a tensor on `device`, sharing memory on the CPU. It must not be written to."""
    with warnings.catch_warnings():
        # A memory-mapped file is read-only; nothing here writes.
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(array).to(device)


def to_float32(array: np.ndarray, out: np.ndarray) -> None:
    """Convert into `out`, by torch: NumPy takes several times as long for float16."""
    torch.from_numpy(out).copy_(to_tensor(array, torch.device("cpu")))
