"""Descriptors on disk: a folder with a manifest and memory-mapped shards, written by row, resumable, shared."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.errors import InputError
from superglobal.files import umask, write_atomically

FORMAT = "superglobal-store-1"
SHARD_ROWS = 16384
# Rows are marked as done only after their bytes are flushed; so many, or so many seconds, share one flush.
_FLUSH_ROWS = 64
_FLUSH_SECONDS = 5.0


def fingerprint(identity: Mapping[str, Any], images: Sequence[str]) -> str:
    """SHA-256 of everything that changes a descriptor and of the list of images.

    Args:
        identity: plain types, such as `RetrievalNetwork.identity()` with the image settings beside it.
        images: one line per row: name and content signature.
    """
    text = json.dumps({"identity": identity, "images": list(images)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class DescriptorStore:
    """N descriptors of D dimensions, float32 and unit norm, row i belonging to image i of the list.

    The folder holds `manifest.json`, `names.json`, `done.npy` (one byte a row) and `shard-00000.npy`, ...; several
    processes may fill different rows at once. A row counts once its byte in `done.npy` is set, which happens after
    its values are on disk, so that a killed run leaves no half-written row behind.

    Use `DescriptorStore.open_or_create`; the class also serves as database vectors for search and reranking
    (`shape`, `block`, `take`).
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.shape: tuple[int, int] = (manifest["rows"], manifest["dim"])
        self._rows_per_shard: int = manifest["shard_rows"]
        self._done = self._map(folder / "done.npy", (self.shape[0],), np.dtype(np.uint8))
        self._shards = [
            self._map(self._shard_path(folder, i), (count, self.shape[1]), np.dtype(np.float32))
            for i, count in enumerate(_shard_sizes(*self.shape[:1], self._rows_per_shard))
        ]
        self._unflushed: list[int] = []
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
    ) -> DescriptorStore:
        """Open the store of these descriptors in `folder`, or make an empty one.

        Args:
            folder: of this store alone; its name should carry the fingerprint.
            identity, images: see `fingerprint`.
            dim: D.
            provenance: versions and device, kept for the record when the store is made.

        Raises:
            InputError: the folder holds other descriptors or a damaged store, or cannot be written.
        """
        folder = Path(folder)
        if not (folder / "manifest.json").exists():
            cls._create(folder, identity, images, dim, shard_rows, provenance or {})
        manifest = cls._read_manifest(folder)
        wanted = {"fingerprint": fingerprint(identity, images), "rows": len(images), "dim": dim}
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
    ) -> None:
        """Build the whole store beside its place and rename it there: of two creators one wins, none mixes."""
        manifest = {
            "format": FORMAT,
            "fingerprint": fingerprint(identity, images),
            "rows": len(images),
            "dim": dim,
            "dtype": "float32",
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
                np.lib.format.open_memmap(path, "w+", np.float32, (count, dim)).flush()
                _reserve(path)
            write_atomically(temporary / "names.json", json.dumps(list(images)).encode())
            write_atomically(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
            # Renaming onto an existing folder fails: then another process made the same store first.
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                _rename_new(temporary, folder)
        except OSError as error:
            raise InputError(
                f"{folder}: the descriptor store cannot be written ({error.strerror or error}); it needs "
                f"{len(images) * dim * 4 / 2**20:.0f} MiB; set paths.stores to a place with room"
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
            for key in ("fingerprint", "rows", "dim", "shard_rows", "identity"):
                manifest[key]
            return manifest
        except FileNotFoundError as error:
            raise InputError(f"{folder}: no descriptor store (manifest.json is missing)") from error
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(
                f"{folder}/manifest.json is damaged ({error!r}); delete the folder to extract again"
            ) from error

    @staticmethod
    def _map(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if shape[0] == 0:
            return np.zeros(shape, dtype)
        try:
            array = np.lib.format.open_memmap(path, "r+" if os.access(path, os.W_OK) else "r")
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: missing or damaged ({error}); delete {path.parent} to extract again") from error
        if array.shape != shape or array.dtype != dtype:
            raise InputError(f"{path}: {array.shape} {array.dtype}, expected {shape} {dtype}; delete {path.parent}")
        return array

    @staticmethod
    def _shard_path(folder: Path, number: int) -> Path:
        return folder / f"shard-{number:05d}.npy"

    @property
    def done(self) -> np.ndarray:
        """(N,) bool: which rows are on disk."""
        return np.asarray(self._done) == 1

    @property
    def missing(self) -> np.ndarray:
        """(n,) int64: rows still to be written."""
        return np.flatnonzero(~self.done)

    @property
    def names(self) -> list[str]:
        """The image list given at creation."""
        return json.loads((self.folder / "names.json").read_text())

    def adopt(self, other: DescriptorStore) -> int:
        """Copy finished rows of the same images from a store of the same network and settings.

        Returns:
            How many rows were copied.

        Raises:
            InputError: the other store's descriptors are of other weights or settings.
        """
        if other.manifest["identity"] != self.manifest["identity"]:
            raise InputError(f"{other.folder}: descriptors of other weights or settings than {self.folder}")
        row_of = {name: row for row, name in enumerate(other.names)}
        done = other.done
        pairs = [(row, row_of.get(name, -1)) for row, name in enumerate(self.names)]
        copied = [(row, source) for row, source in pairs if source >= 0 and done[source]]
        for row, source in copied:
            shard, within = divmod(source, other._rows_per_shard)
            self.write(row, other._shards[shard][within])
        self.flush()
        return len(copied)

    def write(self, row: int, descriptor: np.ndarray) -> None:
        """Store one descriptor.

        Raises:
            InputError: not (D,), not finite or not of unit norm; nothing is written then.
        """
        if descriptor.shape != (self.shape[1],):
            raise InputError(f"{self.folder}: row {row} has shape {descriptor.shape}, expected ({self.shape[1]},)")
        norm = float(np.linalg.norm(descriptor.astype(np.float64)))
        if not abs(norm - 1) < 1e-3:
            raise InputError(
                f"{self.folder}: the descriptor of row {row} has norm {norm}, not 1; are the weights sound?"
            )
        shard, within = divmod(row, self._rows_per_shard)
        self._shards[shard][within] = descriptor
        self._unflushed.append(row)
        if len(self._unflushed) >= _FLUSH_ROWS or time.monotonic() - self._last_flush > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Put written rows on disk and mark them as done.

        Raises:
            InputError: the disk is full or gone; rows marked before stay valid.
        """
        if self._unflushed:
            rows = np.array(self._unflushed)
            try:
                for shard in np.unique(rows // self._rows_per_shard):
                    self._shards[shard].flush()
                self._done[rows] = 1
                self._done.flush()  # type: ignore[attr-defined]
            except OSError as error:
                raise InputError(
                    f"{self.folder}: cannot be written ({error.strerror}); free space and run again"
                ) from error
            self._unflushed.clear()
        self._last_flush = time.monotonic()

    def __len__(self) -> int:
        return self.shape[0]

    def block(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop as (n, D) float32."""
        self._require_complete()
        parts = []
        while start < stop:
            shard, within = divmod(start, self._rows_per_shard)
            end = min(within + stop - start, len(self._shards[shard]))
            parts.append(self._shards[shard][within:end])
            start += end - within
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros((0, self.shape[1]), np.float32), *parts])

    def take(self, ids: np.ndarray) -> np.ndarray:
        """Rows `ids`, of any shape (...,), as (..., D) float32."""
        self._require_complete()
        flat = np.asarray(ids).reshape(-1)
        out = np.empty((len(flat), self.shape[1]), np.float32)
        for number, shard in enumerate(self._shards):
            here = flat // self._rows_per_shard == number
            if here.any():
                out[here] = shard[flat[here] - number * self._rows_per_shard]
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
