"""Descriptors on disk: a folder with a manifest and memory-mapped shards, written by row, resumable, shared."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from superglobal.errors import InputError
from superglobal.files import umask, write_atomically
from superglobal.retrieval.store_lists import NAMES, add_skipped, read_names
from superglobal.retrieval.vectors import to_float32

FORMAT = "superglobal-store-1"
SHARD_ROWS = 16384
DTYPES = ("float32", "float16")
_WRITTEN, _SKIPPED = 1, 2  # what done.npy holds for a row; 0 is still to be written
# Rows are marked as done only after their bytes are flushed; so many, or so many seconds, share one flush.
_FLUSH_ROWS = 64
_FLUSH_SECONDS = 5.0


def fingerprint(identity: Mapping[str, Any], images: Sequence[str], dtype: str = "float32") -> str:
    """SHA-256 of everything that changes a stored descriptor and of the list of images.

    Args:
        identity: plain types, such as `RetrievalNetwork.identity()` with the image settings beside it.
        images: one line per row: name and content signature.
        dtype: what descriptors are rounded to on disk; "float32" leaves the fingerprint as it was without it.
    """
    rounded = {} if dtype == "float32" else {"dtype": dtype}
    text = json.dumps({"identity": identity, "images": list(images), **rounded}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class DescriptorStore:
    """N descriptors of D dimensions, of unit norm, row i belonging to image i of the list.

    The folder holds `manifest.json`, `names.json`, `done.npy` (one byte a row) and `shard-00000.npy`, ...; several
    processes may fill different rows at once. A row counts once its byte in `done.npy` is set, which happens after
    its values are on disk, so that a killed run leaves no half-written row behind. Rows are float32, or float16
    rounded from normalised ones; reading gives float32 either way. A row may be `skipped`: it is complete, but
    search, ranks and reranking leave it out.

    Use `DescriptorStore.open_or_create`; the class also serves as database vectors for search and reranking
    (`shape`, `block`, `take`).
    """

    validated = True
    """`write` checks every row, so that readers need not."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.shape: tuple[int, int] = (manifest["rows"], manifest["dim"])
        self.dtype = np.dtype(manifest["dtype"])
        self._rows_per_shard: int = manifest["shard_rows"]
        self._done = self._map(folder / "done.npy", (self.shape[0],), np.dtype(np.uint8))
        if self._done.max(initial=0) > _SKIPPED:
            raise InputError(f"{folder / 'done.npy'} is damaged (expected bytes 0 to {_SKIPPED}); delete {folder}")
        self._shards = [
            self._map(self._shard_path(folder, i), (count, self.shape[1]), self.dtype)
            for i, count in enumerate(_shard_sizes(*self.shape[:1], self._rows_per_shard))
        ]
        self._unflushed: dict[int, int] = {}  # row -> its byte in done.npy
        self._last_flush = time.monotonic()

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
        """Open the store of these descriptors in `folder`, or make an empty one.

        Args:
            folder: of this store alone; its name should carry the fingerprint.
            identity, images: see `fingerprint`.
            dim: D.
            provenance: versions and device, kept for the record when the store is made.
            dtype: "float32", or "float16" for half the size.

        Raises:
            InputError: the folder holds other descriptors or a damaged store, or cannot be written.
        """
        folder = Path(folder)
        if not (folder / "manifest.json").exists():
            cls._create(folder, identity, images, dim, shard_rows, provenance or {}, dtype)
        manifest = cls._read_manifest(folder)
        own = fingerprint(identity, images, dtype)
        wanted = {"dtype": dtype, "rows": len(images), "dim": dim, "fingerprint": own}
        for key, value in wanted.items():
            if manifest[key] != value:
                raise InputError(
                    f"{folder}: holds descriptors of other weights, settings or images ({key} {manifest[key]}, "
                    f"wanted {value}); delete the folder or choose another"
                )
        store = cls(folder, manifest)
        if len(store.missing) and not os.access(folder / "done.npy", os.W_OK):
            raise InputError(f"{folder}: not complete and not writable; set paths.stores to a place of your own")
        return store

    @classmethod
    def open(cls, folder: str | Path) -> DescriptorStore:
        """Open an existing store.

        Raises:
            InputError: no store, or a damaged one.
        """
        return cls(Path(folder), cls._read_manifest(Path(folder)))

    @classmethod
    def identity_in(cls, folder: Path) -> dict[str, Any]:
        """What the descriptors in `folder` were made with."""
        return cls._read_manifest(folder)["identity"]

    @classmethod
    def _create(
        cls,
        folder: Path,
        identity: Mapping[str, Any],
        images: Sequence[str],
        dim: int,
        shard_rows: int,
        provenance: Mapping[str, Any],
        dtype: str,
    ) -> None:
        """Build the whole store beside its place and rename it there: of two creators one wins, none mixes."""
        manifest = {
            "format": FORMAT,
            "fingerprint": fingerprint(identity, images, dtype),
            "rows": len(images),
            "dim": dim,
            "dtype": dtype,
            "shard_rows": shard_rows,
            "identity": dict(identity),
            "provenance": dict(provenance),
        }
        temporary = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
            temporary.chmod(0o777 & ~umask())
            np.lib.format.open_memmap(temporary / "done.npy", "w+", np.uint8, (len(images),)).flush()
            for i, count in enumerate(_shard_sizes(len(images), shard_rows)):
                path = cls._shard_path(temporary, i)
                np.lib.format.open_memmap(path, "w+", np.dtype(dtype), (count, dim)).flush()
                _reserve(path)
            write_atomically(temporary / NAMES, json.dumps(list(images)).encode())
            write_atomically(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
            # Renaming onto an existing folder fails: then another process made the same store first.
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                _rename_new(temporary, folder)
        except OSError as error:
            raise InputError(
                f"{folder}: the descriptor store cannot be written ({error.strerror or error}); it needs "
                f"{len(images) * dim * np.dtype(dtype).itemsize / 2**20:.0f} MiB; set paths.stores to a place with room"
            ) from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)

    @staticmethod
    def _read_manifest(folder: Path) -> dict[str, Any]:
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            if manifest["format"] != FORMAT:
                raise InputError(
                    f"{folder}: store format {manifest['format']!r}, expected {FORMAT!r}; delete the folder"
                )
            for key, kind in (
                ("fingerprint", str),
                ("rows", int),
                ("dim", int),
                ("shard_rows", int),
                ("identity", dict),
            ):
                if not isinstance(manifest[key], kind) or (kind is int and manifest[key] < (key != "rows")):
                    raise TypeError(f"{key}: {manifest[key]!r}")
            if manifest["dtype"] not in DTYPES:
                raise TypeError(f"dtype: {manifest['dtype']!r}")
            return manifest
        except FileNotFoundError as error:
            raise InputError(f"{folder}: no descriptor store (manifest.json is missing)") from error
        except InputError:
            raise
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{folder}/manifest.json is damaged ({error!r}); delete the folder to extract again"
            ) from error

    @staticmethod
    def _map(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if shape[0] == 0:
            return np.zeros(shape, dtype)
        try:
            array = np.lib.format.open_memmap(path, "r")
            if os.access(path, os.W_OK):  # only now: NumPy fills up a file that is too short if it may write to it
                array = np.lib.format.open_memmap(path, "r+")
        except (OSError, ValueError, TokenError) as error:  # the last is NumPy's for some damaged headers
            raise InputError(f"{path}: missing or damaged ({error}); delete {path.parent} to extract again") from error
        if array.shape != shape or array.dtype != dtype:
            raise InputError(f"{path}: {array.shape} {array.dtype}, expected {shape} {dtype}; delete {path.parent}")
        return array

    @staticmethod
    def _shard_path(folder: Path, number: int) -> Path:
        return folder / f"shard-{number:05d}.npy"

    @property
    def done(self) -> np.ndarray:
        """(N,) bool: which rows are complete, written or skipped."""
        return np.asarray(self._done) != 0

    @property
    def skipped(self) -> np.ndarray:
        """(n,) int64: complete rows without a descriptor, which are never ranked."""
        return np.flatnonzero(np.asarray(self._done) == _SKIPPED)

    @property
    def missing(self) -> np.ndarray:
        """(n,) int64: rows still to be written."""
        return np.flatnonzero(~self.done)

    def fingerprint(self) -> str:
        """The manifest's, and which rows are skipped."""
        skipped = hashlib.sha256(self.skipped.tobytes()).hexdigest() if len(self.skipped) else ""
        return self.manifest["fingerprint"] + skipped

    @property
    def names(self) -> list[str]:
        """The image list given at creation. Raises InputError if it is missing or damaged."""
        return read_names(self.folder, len(self))

    def write(self, row: int, descriptor: np.ndarray) -> None:
        """`write_rows` of one row."""
        self.write_rows(np.array([row]), np.asarray(descriptor)[None])

    def write_rows(self, rows: np.ndarray, descriptors: np.ndarray) -> None:
        """Store descriptors (n, D) in `rows` (n,). float16 stores keep x / |x|, rounded.

        Raises:
            InputError: a wrong shape, a row out of range, values that are not finite or not of unit norm; nothing is
                written then.
        """
        rows = np.asarray(rows, np.int64)
        if descriptors.shape != (len(rows), self.shape[1]):
            raise InputError(
                f"{self.folder}: row {', '.join(map(str, rows[:3]))} has shape {descriptors.shape[1:]}, expected "
                f"({self.shape[1]},)"
            )
        self._require_inside(rows)
        norms = np.linalg.norm(descriptors.astype(np.float64), axis=1)
        bad = np.flatnonzero(~(abs(norms - 1) < 1e-3))
        if len(bad):
            raise InputError(
                f"{self.folder}: the descriptor of row {rows[bad[0]]} has norm {norms[bad[0]]}, not 1; "
                "are the weights sound?"
            )
        self.copy_rows(rows, descriptors if self.dtype == np.float32 else descriptors / norms[:, None])

    def copy_rows(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Put values that a store holds, or that were checked, into `rows` as they are."""
        shards, within = np.divmod(rows, self._rows_per_shard)
        for shard in np.unique(shards):
            here = shards == shard
            self._shards[shard][within[here]] = values[here]
        self._mark(rows, _WRITTEN)

    def skip(self, rows: np.ndarray, notes: Sequence[str] | None = None) -> None:
        """Mark rows (n,) as complete though they have no descriptor: images that cannot be read.

        notes: per row its image, a tab and the reason, for `skipped.txt`.
        """
        rows = np.atleast_1d(np.asarray(rows, np.int64))
        self._require_inside(rows)
        told = dict(zip(rows.tolist(), notes or ["\tno reason given"] * len(rows), strict=True))
        new = np.setdiff1d(rows, self.skipped).tolist()
        if new:
            add_skipped(self.folder, {row: told[row] for row in new})
        self._mark(rows, _SKIPPED)

    def _require_inside(self, rows: np.ndarray) -> None:
        outside = rows[(rows < 0) | (rows >= len(self))]
        if len(outside):
            raise InputError(f"{self.folder}: row {outside[0]} is outside 0..{len(self) - 1}")

    def _mark(self, rows: np.ndarray, state: int) -> None:
        self._unflushed.update(dict.fromkeys(rows.tolist(), state))
        if len(self._unflushed) >= _FLUSH_ROWS or time.monotonic() - self._last_flush > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Put written rows on disk and mark them as done.

        Raises:
            InputError: the disk is full or gone; rows marked before stay valid.
        """
        if self._unflushed:
            rows = np.array(list(self._unflushed))
            try:
                for shard in np.unique(rows // self._rows_per_shard):
                    self._shards[shard].flush()
                self._done[rows] = list(self._unflushed.values())
                self._done.flush()  # type: ignore[attr-defined]
            except OSError as error:
                raise InputError(
                    f"{self.folder}: cannot be written ({error.strerror}); free space and run again"
                ) from error
            self._unflushed.clear()
        self._last_flush = time.monotonic()

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def converts(self) -> bool:
        """Whether reading makes float32 of something else: then `read_into` spares `block` an array."""
        return self.dtype != np.float32

    def block(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop as (n, D) float32, a view of the shard where it can be."""
        self._require_complete()
        return self._read(start, stop)

    def read_into(self, start: int, stop: int, out: np.ndarray) -> None:
        """Rows start..stop into `out` (n, D) float32."""
        self._require_complete()
        for piece, at in self._pieces(start, stop):
            to_float32(piece, out[at : at + len(piece)])

    def _read(self, start: int, stop: int) -> np.ndarray:
        pieces = [piece for piece, _ in self._pieces(start, stop)]
        if len(pieces) == 1 and not self.converts:
            return pieces[0]
        out = np.empty((stop - start, self.shape[1]), np.float32)
        for piece, at in self._pieces(start, stop):
            to_float32(piece, out[at : at + len(piece)])
        return out

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, int]]:
        """The parts of shards that rows start..stop lie in, as they are stored, and where each begins."""
        at = start
        while at < stop:
            shard, within = divmod(at, self._rows_per_shard)
            piece = self._shards[shard][within : within + stop - at]
            yield piece, at - start
            at += len(piece)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Rows `ids`, of any shape (...,), as (..., D) float32."""
        self._require_complete()
        return self.read_rows(ids)

    def read_rows(self, ids: np.ndarray) -> np.ndarray:
        """`take` of a store that need not be complete: rows that were not written hold anything."""
        flat = np.asarray(ids).reshape(-1)
        out = np.empty((len(flat), self.shape[1]), np.float32)
        shards, within = np.divmod(flat, self._rows_per_shard)
        for shard in np.unique(shards):
            here = shards == shard
            out[here] = self._shards[shard][within[here]]
        return out.reshape(*np.shape(ids), self.shape[1])

    def _require_complete(self) -> None:
        if not getattr(self, "_complete", False):
            missing = len(self.missing)
            if missing:
                raise InputError(f"{self.folder}: {missing} of {len(self)} descriptors are missing; run eval.py again")
            self._complete = True


def _shard_sizes(rows: int, shard_rows: int) -> list[int]:
    return [min(shard_rows, rows - start) for start in range(0, rows, shard_rows)]


def _reserve(path: Path) -> None:
    """Take the blocks of a sparse file now: later a full disk would kill the process through its memory map."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _rename_new(source: Path, target: Path) -> None:
    """Rename a folder to a name that must not exist (POSIX would replace an empty folder)."""
    try:
        os.rename(source, target)
    except OSError as error:
        if (target / "manifest.json").exists():
            raise FileExistsError(str(target)) from error
        raise
