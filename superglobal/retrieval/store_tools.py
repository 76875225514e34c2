"""Inspect, verify, merge and export descriptor stores, and reuse rows of other stores."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.errors import InputError
from superglobal.retrieval.store import DescriptorStore, row_ranges
from superglobal.retrieval.store_files import (
    NO_REASON,
    PATHS,
    SKIPPED,
    read_manifest,
    read_paths,
    read_skipped,
    record_paths,
    write_skipped,
)
from superglobal.utils.io import atomic_file, write_atomically

log = logging.getLogger(__name__)
_BLOCK = 8192  # number of rows that are read at a time


def open_validated(folder: Path) -> DescriptorStore:
    """Open a store and validate its lists: image names, image paths and skipped rows.

    Raises:
        InputError: there is no store, or one of its files is missing or damaged.
    """
    store = DescriptorStore.open(folder)
    len(store.names)
    if (folder / PATHS).exists():
        read_paths(folder, len(store))
    listed = read_skipped(folder, len(store))
    unlisted = np.setdiff1d(store.skipped, list(listed) if (folder / SKIPPED).exists() else store.skipped)
    if len(unlisted):
        raise InputError(
            f"{folder / SKIPPED}: expected a line for each of {len(store.skipped)} skipped rows, but row {unlisted[0]} "
            "has none; remove the file (the rows stay skipped)"
        )
    return store


def store_info(store: DescriptorStore) -> dict[str, Any]:
    """Return a dict of plain types with the settings, the counts of rows and the size in bytes of a store."""
    manifest = store.manifest
    return {
        "folder": str(store.folder),
        **{key: manifest[key] for key in ("fingerprint", "rows", "dim", "dtype")},
        "written": len(store.written),
        "skipped": len(store.skipped),
        "missing": len(store.missing),
        "bytes": sum(path.stat().st_size for path in store.folder.iterdir()),
        "provenance": manifest.get("provenance", {}),
        "identity": manifest["identity"],
    }


def verify(store: DescriptorStore, repair: bool = False) -> np.ndarray:
    """Verify the image list and all rows of a store with their checksums.

    Args:
        store: store to verify.
        repair: mark damaged rows as missing, so that the next evaluation extracts them again, instead of raising an
            error.

    Returns:
        Numbers of the rows that were damaged: (n,) int64.

    Raises:
        InputError: the store is damaged; the message names the first damaged file and its rows.
    """
    len(store.names)
    damaged = store.damaged(again=True)
    if repair and len(damaged):
        store.discard(damaged)
    elif len(damaged):
        store.read_rows(damaged[:1])  # raises the error that names the first damaged shard
    return damaged


def merge(stores: Sequence[DescriptorStore], folder: Path) -> DescriptorStore:
    """Merge stores that each contain some rows of the same image list into one store in `folder`.

    A row that is written in several stores must be bitwise equal in all of them. A row that is skipped in some stores
    and written in another is written in the merged store. A row that is skipped and nowhere written stays skipped, with
    the first recorded reason.

    Args:
        stores: stores to merge, at least one.
        folder: folder of the merged store.

    Returns:
        The merged store.

    Raises:
        InputError: the stores differ in images, weights, settings, dtype or the values of a row, or the folder cannot
            be written.
    """
    first = stores[0]
    for store in stores[1:]:
        for key in ("fingerprint", "rows", "dim", "dtype", "identity"):
            if store.manifest[key] != first.manifest[key]:
                raise InputError(
                    f"{store.folder}: {key} differs from that of {first.folder}; merge stores of the same image list "
                    "and settings"
                )
    manifest = first.manifest
    merged = DescriptorStore.open_or_create(
        folder,
        manifest["identity"],
        first.names,
        manifest["dim"],
        manifest["shard_rows"],
        manifest.get("provenance"),
        manifest["dtype"],
    )
    for store in stores:
        _merge_rows(store, merged)
    notes = read_skipped(folder, len(merged))
    write_skipped(folder, {row: notes.get(row, NO_REASON) for row in merged.skipped.tolist()})
    for store in stores:
        rows = np.setdiff1d(store.skipped, np.flatnonzero(merged.done)).tolist()
        notes = read_skipped(store.folder, len(store))
        merged.skip(np.array(rows, np.int64), [notes.get(row, NO_REASON) for row in rows])
        merged.flush()
    with_paths = next((store for store in stores if (store.folder / PATHS).exists()), None)
    if with_paths is not None and not (folder / PATHS).exists():
        record_paths(folder, read_paths(with_paths.folder, len(with_paths)))
    return merged


def _merge_rows(store: DescriptorStore, merged: DescriptorStore) -> None:
    """Copy the written rows of a store to `merged`, or raise InputError if a row already has other values there."""
    written, present = store.written, merged.written
    for start in range(0, len(written), _BLOCK):
        ids = written[start : start + _BLOCK]
        values, common = store.read_rows(ids), np.isin(ids, present)
        differ = ids[common][(values[common] != merged.read_rows(ids[common])).any(axis=1)]
        if len(differ):
            raise InputError(
                f"{store.folder}: row {differ[0]} differs from the same row of another store; omit one of the stores"
            )
        merged.copy_rows(ids[~common], values[~common])
    merged.flush()


def export(store: DescriptorStore, path: Path) -> int:
    """Export the descriptors and the image names of a store to `.npy` and `.txt` files, or to a `.parquet` file.

    The names are the image paths in `paths.json`. The `.txt` file, with one name per line, is written next to the
    `.npy` file. The columns of the Parquet file are `name` and `descriptor`. Skipped rows are omitted. Descriptors keep
    the dtype of the store.

    Args:
        store: complete store.
        path: file to write; its suffix determines the format.

    Returns:
        Number of exported rows.

    Raises:
        InputError: the suffix is unknown, rows or paths are missing, or the file cannot be written.
    """
    if path.suffix not in (".npy", ".parquet"):
        raise InputError(f"{path}: expected a name that ends with .npy or .parquet")
    if len(store.missing):
        raise InputError(
            f"{store.folder}: {len(store.missing)} of {len(store)} descriptors are missing; extract them first"
        )
    rows, names = store.written, read_paths(store.folder, len(store))
    if path.suffix == ".parquet":
        _export_parquet(store, rows, names, path)
        return len(rows)
    lines = [names[row] for row in rows]
    broken = [line for line in lines if len(line.splitlines()) != 1]
    if broken:
        raise InputError(f"{path}: the name {broken[0]!r} has a line break; export to .parquet")
    with atomic_file(path) as file:
        header = {"descr": store.dtype.str, "fortran_order": False, "shape": (len(rows), store.shape[1])}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(rows), _BLOCK):
            file.write(store.read_rows(rows[start : start + _BLOCK], store.dtype).tobytes())
    write_atomically(path.with_suffix(".txt"), "".join(f"{line}\n" for line in lines).encode())
    return len(rows)


def _export_parquet(store: DescriptorStore, rows: np.ndarray, names: list[str], path: Path) -> None:
    """Write the descriptors of the given rows (n,) and the n `names` of their images to a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.list_(pa.from_numpy_dtype(store.dtype), store.shape[1])
    schema = pa.schema({"name": pa.string(), "descriptor": kind})
    schema = schema.with_metadata({"fingerprint": store.manifest["fingerprint"]})
    with atomic_file(path) as file, pq.ParquetWriter(file, schema) as writer:
        for start in range(0, len(rows), _BLOCK):
            ids = rows[start : start + _BLOCK]
            flat = pa.array(store.read_rows(ids, store.dtype).ravel())
            columns = [pa.array([names[i] for i in ids]), pa.FixedSizeListArray.from_arrays(flat, store.shape[1])]
            writer.write_table(pa.table(columns, schema=schema))


def reuse_rows(folder: Path, store: DescriptorStore) -> int:
    """Fill missing rows of a store with descriptors of the same images from other stores.

    Only stores with the same network and settings are used. A damaged store is ignored with a warning.

    Args:
        folder: folder that contains the other stores.
        store: store to fill.

    Returns:
        Number of copied rows.

    Raises:
        InputError: `store` cannot be written.
    """
    copied = 0
    for path in sorted(folder.glob("*/manifest.json")):
        if path.parent == store.folder or path.parent.name.startswith(".") or not len(store.missing):
            continue
        try:
            if read_manifest(path.parent)["identity"] != store.manifest["identity"]:
                continue
            source = DescriptorStore.open(path.parent)
            rows, source_rows = _common_rows(source, store)
        except InputError as error:
            log.warning("cannot reuse descriptors of %s, extracting them again: %s", path.parent, error)
            continue
        for start in range(0, len(rows), _BLOCK):
            batch = slice(start, start + _BLOCK)
            _copy(source, source_rows[batch], store, rows[batch])
        copied += len(rows)
        store.flush()
    return copied


def _common_rows(source: DescriptorStore, store: DescriptorStore) -> tuple[np.ndarray, np.ndarray]:
    """Find the missing rows of `store` whose images have a descriptor in `source`.

    If `source` is stored in float16 and `store` in float32, no rows are found, because the values in `source` are
    rounded.

    Returns:
        Row numbers in `store` and row numbers in `source`, (n,) int64 each. Equal positions belong to the same image.
    """
    if source.dtype.itemsize < store.dtype.itemsize:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    row_of = {name: row for row, name in enumerate(source.names)}
    source_rows = np.array([row_of.get(name, -1) for name in store.names], np.int64)
    damaged = source.damaged()
    if len(damaged):
        log.warning("%s: %s damaged; extracting them again", source.folder, row_ranges(damaged))
    rows = np.flatnonzero(~store.done & np.isin(source_rows, np.setdiff1d(source.written, damaged)))
    return rows, source_rows[rows]


def _copy(source: DescriptorStore, source_rows: np.ndarray, store: DescriptorStore, rows: np.ndarray) -> None:
    """Copy rows of `source` to `store`, unchanged if both have the same dtype; otherwise they are normalized first.

    Args:
        source: store to read.
        source_rows: (n,) row numbers in `source`.
        store: store to write.
        rows: (n,) row numbers in `store`.
    """
    values = source.read_rows(source_rows)
    if source.dtype != store.dtype:
        values = values / np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
    store.copy_rows(rows, values)
