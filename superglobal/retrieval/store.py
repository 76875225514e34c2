"""Descriptor stores on disk, which several processes can fill in any order, and which an interrupted run can resume."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.errors import InputError
from superglobal.retrieval.rows import copy_into
from superglobal.retrieval.store_files import (
    DONE,
    NAMES,
    NO_REASON,
    SHARD_ROWS,
    VERIFIED,
    add_skipped,
    array_files,
    create_store,
    fingerprint,
    map_array,
    read_manifest,
    read_names,
)
from superglobal.utils.io import file_stamp, is_settled, write_error
from superglobal.utils.norms import network_norms

_WRITTEN, _SKIPPED = 1, 2  # values in done.npy; 0 means missing
# Rows are marked as done only after their values are flushed to disk. A flush is due when this many rows are waiting,
# or this many seconds after the last flush.
_FLUSH_ROWS = 64
_FLUSH_SECONDS = 5.0


class DescriptorStore:
    """Folder with N descriptors of dimension D and unit norm; row i is the descriptor of image i of the image list.

    The folder contains `manifest.json`, `names.json`, `done.npy` (one byte per row), `checksums.npy` (the CRC-32 of
    each row) and the shards `shard-00000.npy`, ... with the descriptors. Several processes may fill different rows at
    the same time. A row is complete when its byte in `done.npy` is set. This happens only after its values are on disk,
    so an interrupted run leaves no partial row. Rows are stored as float32, or as float16 after normalization; reading
    returns float32 in both cases. A row may be `skipped`: it is complete, but has no descriptor, and search, ranks and
    reranking ignore it.

    A shard is verified with the checksums when it is read for the first time, and again when its size or its times of
    change differ from those recorded in `verified.npy`, or if they are less than two seconds old. Reading a damaged row
    raises InputError. Damage that changes neither size nor times, such as that by a failing disk after the
    verification, is found only by `superglobal store verify`.

    Create a store with `open_or_create`, or open one with `open`. Search, reranking and whitening accept a store as a
    database.

    Attributes:
        folder: folder of the store.
        manifest: contents of `manifest.json`.
        shape: (N, D).
        dtype: dtype of the stored values, float32 or float16.
    """

    validated = True
    """True, because `write_rows` validates every row, and reading verifies that it has not changed since."""

    concurrent = True
    """True, because several threads may read at the same time."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.shape: tuple[int, int] = (manifest["rows"], manifest["dim"])
        self.dtype = np.dtype(manifest["dtype"])
        self._rows_per_shard: int = manifest["shard_rows"]
        files = array_files(*self.shape, self._rows_per_shard, manifest["dtype"])
        self._verified = _open_stamps(folder / VERIFIED, *files.pop(VERIFIED))
        self._done, self._checksums, *self._shards = (map_array(folder / name, *file) for name, file in files.items())
        self._shard_paths = [folder / name for name in files][2:]
        if self._done.max(initial=0) > _SKIPPED:
            raise InputError(f"{folder / DONE} is damaged (expected values 0 to {_SKIPPED}); delete {folder}")
        self._unflushed: dict[int, int] = {}  # row -> new value of the row's byte in done.npy
        self._last_flush = time.monotonic()
        self._complete = False
        # Results for shards that are not recorded in `verified.npy`, because rows are missing or damaged: what was
        # verified, and the damaged rows.
        self._results: dict[int, tuple[tuple[Any, bytes, bytes], np.ndarray]] = {}
        self._locks = [threading.Lock() for _ in self._shards]

    @classmethod
    def open_or_create(
        cls,
        folder: str | Path,
        identity: Mapping[str, Any],
        images: Sequence[str],
        dim: int,
        shard_rows: int = SHARD_ROWS,
        provenance: Mapping[str, Any] | None = None,
        dtype: str = "float32",
    ) -> DescriptorStore:
        """Open the store in `folder`, or create an empty one there.

        An existing store must have been created for the same descriptors.

        Args:
            folder: folder of this store only. Its name should contain the fingerprint, so that stores of different
                descriptors have different folders.
            identity: everything that affects a descriptor, as plain types, such as `RetrievalNetwork.identity()`.
            images: N lines, one per row, with the name and the content signature of the image.
            dim: dimension D of the descriptors.
            shard_rows: number of rows per file of a new store.
            provenance: versions and device, which are recorded in a new store.
            dtype: dtype of the stored values, "float32", or "float16" for half the size.

        Returns:
            The store. Its `missing` rows must still be written.

        Raises:
            InputError: the folder contains other descriptors or a damaged store, or cannot be written.
        """
        folder = Path(folder)
        if not (folder / "manifest.json").exists():
            create_store(folder, identity, images, dim, shard_rows, provenance or {}, dtype)
        manifest = read_manifest(folder)
        expected = {
            "dtype": dtype,
            "rows": len(images),
            "dim": dim,
            "fingerprint": fingerprint(identity, images, dtype),
        }
        for key, value in expected.items():
            if manifest[key] != value:
                raise InputError(
                    f"{folder}: contains descriptors of other weights, settings or images ({key} {manifest[key]}, "
                    f"expected {value}); delete the folder or choose another"
                )
        store = cls(folder, manifest)
        if len(store.missing) and not os.access(folder / DONE, os.W_OK):
            raise InputError(
                f"{folder}: the store is incomplete and not writable; set paths.stores to a folder that you can write"
            )
        return store

    @classmethod
    def open(cls, folder: str | Path) -> DescriptorStore:
        """Open an existing store, complete or not.

        Raises:
            InputError: the folder contains no store or a damaged one.
        """
        return cls(Path(folder), read_manifest(Path(folder)))

    @property
    def done(self) -> np.ndarray:
        """Mask (N,) bool of the complete rows, written or skipped."""
        return np.asarray(self._done) != 0

    @property
    def written(self) -> np.ndarray:
        """Indices (n,) int64 of the rows that have a descriptor."""
        return np.flatnonzero(np.asarray(self._done) == _WRITTEN)

    @property
    def skipped(self) -> np.ndarray:
        """Indices (n,) int64 of the rows that are complete without a descriptor, and are never ranked."""
        return np.flatnonzero(np.asarray(self._done) == _SKIPPED)

    @property
    def missing(self) -> np.ndarray:
        """Indices (n,) int64 of the rows that are not complete."""
        return np.flatnonzero(~self.done)

    def fingerprint(self) -> str:
        """Return the fingerprint in the manifest, followed by a digest of the checksums of all rows.

        Files that are computed from the rows, such as a whitening, are therefore not used for other values.
        """
        return self.manifest["fingerprint"] + hashlib.sha256(self._checksums.tobytes()).hexdigest()

    @property
    def names(self) -> list[str]:
        """Image list that the store was created with: one line per row with the name and content signature of an image.

        Raises:
            InputError: the list is missing or does not match the fingerprint.
        """
        names = read_names(self.folder, len(self))
        if fingerprint(self.manifest["identity"], names, self.manifest["dtype"]) != self.manifest["fingerprint"]:
            raise InputError(
                f"{self.folder / NAMES} or the manifest was changed; delete {self.folder} to extract again"
            )
        return names

    def write_rows(self, rows: np.ndarray, descriptors: np.ndarray) -> None:
        """Validate descriptors and store them. A float16 store normalizes them before it rounds them.

        Args:
            rows: (n,) row numbers in 0..N-1.
            descriptors: (n, D), with L2 norms that differ from 1 by less than 1e-3.

        Raises:
            InputError: a shape is wrong, a row is out of range, or values are not finite or not of unit norm. Nothing
                is written in these cases.
        """
        rows, descriptors = np.asarray(rows), np.asarray(descriptors)
        if not np.issubdtype(rows.dtype, np.integer) and len(rows):
            raise InputError(f"{self.folder}: expected integer row numbers, got {rows.dtype}")
        rows = rows.astype(np.int64)
        if descriptors.shape != (len(rows), self.shape[1]):
            raise InputError(
                f"{self.folder}: got an array of shape {descriptors.shape} for {len(rows)} rows (first rows: "
                f"{', '.join(map(str, rows[:3]))}), expected ({len(rows)}, {self.shape[1]})"
            )
        self._require_inside(rows)
        norms = network_norms(descriptors, lambda i: f"{self.folder}: row {rows[i]}")
        self.copy_rows(rows, descriptors if self.dtype == np.float32 else descriptors / norms[:, None])

    def copy_rows(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Store values without validating or normalizing them.

        Args:
            rows: (n,) row numbers in 0..N-1.
            values: (n, D) valid descriptors, which are converted to the dtype of the store.
        """
        if not len(rows):  # A complete store may be read-only.
            return
        values = np.ascontiguousarray(values, self.dtype)
        self._checksums[rows] = _row_checksums(values)
        shards, within = np.divmod(rows, self._rows_per_shard)
        for shard in np.unique(shards):
            selected = shards == shard
            self._shards[shard][within[selected]] = values[selected]
        self._mark(rows, _WRITTEN)

    def skip(self, rows: np.ndarray, notes: Sequence[str] | None = None) -> None:
        """Mark rows as complete without a descriptor, because their images cannot be read.

        Args:
            rows: (n,) row numbers in 0..N-1.
            notes: for each row, a line for `skipped.txt` with the image, a tab and the reason.

        Raises:
            InputError: a row is out of range, or `skipped.txt` cannot be written.
        """
        rows = np.atleast_1d(np.asarray(rows, np.int64))
        if not len(rows):
            return
        self._require_inside(rows)
        note_of = dict(zip(rows.tolist(), notes or [NO_REASON] * len(rows), strict=True))
        new = np.setdiff1d(rows, self.skipped).tolist()
        if new:
            add_skipped(self.folder, {row: note_of[row] for row in new})
        self._checksums[rows] = 0
        self._mark(rows, _SKIPPED)

    def _require_inside(self, rows: np.ndarray) -> None:
        """Raise InputError if a row number is out of range."""
        outside = rows[(rows < 0) | (rows >= len(self))]
        if len(outside):
            raise InputError(f"{self.folder}: row {outside[0]} is outside 0..{len(self) - 1}")

    def _mark(self, rows: np.ndarray, state: int) -> None:
        """Register rows as `_WRITTEN` or `_SKIPPED`. The next flush records this in `done.npy`.

        If a flush is due, because of the number of rows or the time since the last flush, flush now.
        """
        self._unflushed.update(dict.fromkeys(rows.tolist(), state))
        if len(self._unflushed) >= _FLUSH_ROWS or time.monotonic() - self._last_flush > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Flush written rows to disk, then mark them as done. Call this after the last `write_rows`.

        Raises:
            InputError: the disk is full or not available. Rows that were already marked as done stay valid.
        """
        if self._unflushed:
            rows = np.array(list(self._unflushed))
            try:
                for shard in np.unique(rows // self._rows_per_shard):
                    self._shards[shard].flush()
                self._checksums.flush()  # type: ignore[attr-defined]
                self._done[rows] = list(self._unflushed.values())
                self._done.flush()  # type: ignore[attr-defined]
            except OSError as error:
                raise write_error(self.folder, error, "set paths.stores to another folder") from error
            self._unflushed.clear()
        self._last_flush = time.monotonic()

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def converts(self) -> bool:
        """True if rows are converted to float32 when they are read."""
        return self.dtype != np.float32

    def block(self, start: int, stop: int) -> np.ndarray:
        """Return rows start..stop-1 as (n, D) float32: a view of the shard if possible, else a copy.

        Raises:
            InputError: the store is not complete.
        """
        self._require_complete()
        pieces = list(self._pieces(start, stop))
        self._require_complete()  # Another process may have discarded damaged rows.
        if len(pieces) == 1 and not self.converts:
            return pieces[0]
        out = np.empty((stop - start, self.shape[1]), np.float32)
        self.read_into(start, stop, out)
        return out

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """Copy rows start..stop-1 into `out` (n, D), whose dtype is float32 or the dtype of the store."""
        self._require_complete()
        offset = 0
        for piece in self._pieces(start, stop):
            copy_into(piece, out[offset : offset + len(piece)])
            offset += len(piece)
        self._require_complete()

    def _pieces(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yield views (n, D) of rows start..stop-1 in the dtype of the store, one view per shard."""
        if not 0 <= start <= stop <= len(self):
            raise InputError(f"{self.folder}: rows {start}..{stop} are outside 0..{len(self)}")
        while start < stop:
            shard, within = divmod(start, self._rows_per_shard)
            last = min(stop, start - within + self._rows_per_shard)
            self._require_sound(shard, range(start, last))
            piece = self._shards[shard][within : within + last - start]
            yield piece
            start += len(piece)

    def _require_sound(self, shard: int, rows: np.ndarray | range) -> None:
        """Raise InputError if rows of a shard are damaged."""
        damaged = self._damaged(shard)
        if len(damaged) and len(damaged := np.intersect1d(damaged, rows)):
            raise InputError(
                f"{self._shard_paths[shard]}: {row_ranges(damaged)} damaged (the checksum differs); run superglobal "
                f"store verify --repair {self.folder}, then run the evaluation again, which extracts only these rows"
            )

    def _damaged(self, shard: int, again: bool = False) -> np.ndarray:
        """Verify the rows of a shard with their checksums.

        Args:
            shard: index of the shard.
            again: verify the shard even if its file has not changed since it was verified.

        Returns:
            Numbers of the damaged rows: (n,) int64, ascending.

        Raises:
            InputError: the file is missing or truncated.
        """
        path, start = self._shard_paths[shard], shard * self._rows_per_shard
        rows = slice(start, start + len(self._shards[shard]))
        if not again and self._verified[shard].tolist() == file_stamp(path):
            return np.empty(0, np.int64)
        with self._locks[shard]:  # The other threads wait for the result of the first one.
            stamp, state, checksums = file_stamp(path), np.array(self._done[rows]), np.array(self._checksums[rows])
            is_stable = stamp is not None and is_settled(stamp)
            version = stamp, state.tobytes(), checksums.tobytes()
            known, damaged = self._results.get(shard, (None, np.empty(0, np.int64)))
            if not again and (version == known or self._verified[shard].tolist() == stamp):
                return damaged
            # The file is mapped again, because it may have been replaced or truncated.
            self._shards[shard] = values = map_array(path, self._shards[shard].shape, self.dtype)
            differs = checksums != np.where(state == _WRITTEN, _row_checksums(np.asarray(values)), 0)
            damaged = start + np.flatnonzero(differs & (state != 0))
            self._complete = self._complete and bool(state.all())
            self._results.pop(shard, None)
            is_sound = bool(state.all()) and not len(damaged)
            self._verified[shard] = stamp if is_sound and is_stable else 0
            if is_stable and not is_sound:
                self._results[shard] = version, damaged
            return damaged

    def damaged(self, again: bool = False) -> np.ndarray:
        """Verify all complete rows with their checksums, and return the numbers of the damaged rows: (n,) int64.

        Args:
            again: verify shards even if their files have not changed since they were verified.
        """
        return np.concatenate([np.empty(0, np.int64), *(self._damaged(i, again) for i in range(len(self._shards)))])

    def discard(self, rows: np.ndarray) -> None:
        """Mark rows (n,) as missing, so that the next evaluation extracts them again.

        Raises:
            InputError: the store is not writable.
        """
        if not os.access(self.folder / DONE, os.W_OK):
            raise InputError(f"{self.folder}: the store is not writable, so its rows cannot be marked as missing")
        self._complete = False
        self._done[rows] = 0
        self._done.flush()  # type: ignore[attr-defined]

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Return the rows with the given ids, integers in 0..N-1 of any shape S, as an array `(*S, D)` float32.

        Raises:
            InputError: the store is not complete.
        """
        return self._read_complete(ids, np.float32)

    def take_stored(self, ids: np.ndarray) -> np.ndarray:
        """Return the rows with the given ids, of any shape S, as an array `(*S, D)` in the dtype of the store."""
        return self._read_complete(ids, self.dtype)

    def _read_complete(self, ids: np.ndarray, dtype: Any) -> np.ndarray:
        """Return the rows with the given ids as `read_rows`. Raises InputError if the store is not complete."""
        self._require_complete()
        values = self.read_rows(ids, dtype)
        self._require_complete()  # Another process may have discarded damaged rows.
        return values

    def read_rows(self, ids: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
        """Return rows with the given ids, even if the store is not complete.

        Missing and skipped rows have arbitrary values.

        Args:
            ids: row numbers in 0..N-1, of any shape S.
            dtype: dtype of the result.

        Returns:
            Array `(*S, D)` of `dtype`.
        """
        flat = np.asarray(ids).reshape(-1)
        out = np.empty((len(flat), self.shape[1]), dtype)
        shards, within = np.divmod(flat, self._rows_per_shard)
        for shard in np.unique(shards):
            selected = shards == shard
            self._require_sound(shard, flat[selected])
            out[selected] = self._shards[shard][within[selected]]
        return out.reshape(*np.shape(ids), self.shape[1])

    def _require_complete(self) -> None:
        """Raise InputError if rows are missing."""
        if not self._complete:
            missing = len(self.missing)
            if missing:
                raise InputError(
                    f"{self.folder}: {missing} of {len(self)} descriptors are missing; run python eval.py again"
                )
            self._complete = True


def _open_stamps(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Open the record of verified shards. If it is damaged or read-only, return an array that this process fills."""
    try:
        stamps = map_array(path, shape, dtype)
    except InputError:
        return np.zeros(shape, dtype)
    return stamps if stamps.flags.writeable else np.array(stamps)


def _row_checksums(values: np.ndarray) -> np.ndarray:
    """Return the CRC-32 of each row of a C-contiguous array (n, D) as (n,) uint32."""
    return np.fromiter(map(zlib.crc32, values), np.uint32, len(values))


def row_ranges(rows: np.ndarray) -> str:
    """Return ascending row numbers (n,) as a text for messages, such as "rows 3-5, 9 are"; at most five ranges."""
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1)
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    shown = ", ".join(texts[:5]) + (f" and {len(texts) - 5} more ranges" if len(texts) > 5 else "")
    return f"row {shown} is" if len(rows) == 1 else f"rows {shown} are"
