"""What is done with whole descriptor stores: look into, verify, merge, export."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.errors import InputError
from superglobal.files import replacing, write_atomically
from superglobal.retrieval.store import DescriptorStore, fingerprint
from superglobal.retrieval.vectors import validate_block

_BLOCK = 8192  # rows at a time
_CHECKSUMS = "checksums.json"


def describe(store: DescriptorStore) -> dict[str, Any]:
    """What made the store, what it holds and how large it is, as plain types."""
    manifest, skipped = store.manifest, len(store.skipped)
    return {
        "folder": str(store.folder),
        **{key: manifest[key] for key in ("fingerprint", "rows", "dim", "dtype")},
        "written": int(store.done.sum()) - skipped,
        "skipped": skipped,
        "missing": len(store.missing),
        "bytes": sum(path.stat().st_size for path in store.folder.iterdir()),
        "provenance": manifest.get("provenance", {}),
        "identity": manifest["identity"],
    }


def verify(store: DescriptorStore, record: bool = False) -> int:
    """Check that a store is what its manifest says: the list of images, each written row, recorded checksums.

    Shapes and sizes of the shards are checked when a store is opened. record: keep the shards' checksums, which the
    next call compares; only of a complete store.

    Returns:
        How many rows were checked.

    Raises:
        InputError: the first fault, with its place.
    """
    names = store.names
    if fingerprint(store.manifest["identity"], names, store.manifest["dtype"]) != store.manifest["fingerprint"]:
        raise InputError(f"{store.folder}: names.json or the manifest was changed; delete the folder to extract again")
    written = _written(store)
    for start in range(0, len(written), _BLOCK):
        ids = written[start : start + _BLOCK]
        block = store.read_rows(ids)
        try:
            validate_block(block, 0, str(store.folder), unit=True)
        except InputError:
            _name_bad_row(block, ids, store)
    sums = {path.name: _digest(path) for path in sorted(store.folder.glob("shard-*.npy"))}
    path = store.folder / _CHECKSUMS
    if path.exists() and not record:
        recorded = json.loads(path.read_text())
        for name, value in sums.items():
            if recorded.get(name) != value:
                raise InputError(
                    f"{store.folder / name}: other bytes than were recorded; delete the folder, or --record"
                )
    if record:
        if len(store.missing):
            raise InputError(f"{store.folder}: {len(store.missing)} rows are missing; checksums are of complete stores")
        write_atomically(path, json.dumps(sums, indent=1).encode())
    return len(written)


def _name_bad_row(block: np.ndarray, ids: np.ndarray, store: DescriptorStore) -> None:
    for row, values in zip(ids.tolist(), block, strict=True):
        validate_block(values[None], row, f"{store.folder}: damaged", unit=True)


def merge(parts: Sequence[DescriptorStore], folder: Path) -> DescriptorStore:
    """One store out of several of the same list, each of which has some of the rows.

    A row that several parts have must be the same in all, bit for bit, or skipped in all.

    Raises:
        InputError: parts of other images, weights, settings or dtype, a row that differs, or a place that cannot be
            written.
    """
    first = parts[0]
    keys = ("fingerprint", "rows", "dim", "dtype", "identity")
    for part in parts[1:]:
        for key in keys:
            if part.manifest[key] != first.manifest[key]:
                raise InputError(f"{part.folder}: not the same {key} as {first.folder}; they are of different lists")
    m = first.manifest
    store = DescriptorStore.open_or_create(
        folder, m["identity"], first.names, m["dim"], m["shard_rows"], m.get("provenance"), m["dtype"]
    )
    for part in parts:
        _merge_rows(part, store)
    store.flush()
    return store


def _merge_rows(part: DescriptorStore, store: DescriptorStore) -> None:
    written, own, skipped = _written(part), _written(store), store.skipped
    mixed = np.concatenate([np.intersect1d(written, skipped), np.intersect1d(part.skipped, own)])
    if len(mixed):
        raise InputError(
            f"{part.folder}: row {mixed[0]} is skipped in one part and written in another; extract it again"
        )
    for start in range(0, len(written), _BLOCK):
        ids = written[start : start + _BLOCK]
        values, common = part.read_rows(ids), np.isin(ids, own)
        differ = ids[common][(values[common] != store.read_rows(ids[common])).any(axis=1)]
        if len(differ):
            raise InputError(f"{part.folder}: row {differ[0]} differs from another part's; leave one of the parts out")
        store.copy_rows(ids[~common], values[~common])
    store.skip(np.setdiff1d(part.skipped, skipped))
    store.flush()


def export(store: DescriptorStore, path: Path) -> int:
    """Write the descriptors as `.npy`, with the names beside it, or as `.parquet` (name, descriptor).

    Skipped rows are left out. `.npy` has the store's dtype, as has the column of `.parquet`.

    Returns:
        How many rows were written.

    Raises:
        InputError: another suffix, rows that are missing, or a place that cannot be written.
    """
    if path.suffix not in (".npy", ".parquet"):
        raise InputError(f"{path}: expected a name that ends with .npy or .parquet")
    if len(store.missing):
        raise InputError(
            f"{store.folder}: {len(store.missing)} of {len(store)} descriptors are missing; extract them first"
        )
    rows, names = _written(store), store.names
    if path.suffix == ".parquet":
        _export_parquet(store, rows, names, path)
    else:
        with replacing(path) as file:
            header = {"descr": store.dtype.str, "fortran_order": False, "shape": (len(rows), store.shape[1])}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(rows), _BLOCK):
                file.write(store.read_rows(rows[start : start + _BLOCK]).astype(store.dtype).tobytes())
        write_atomically(path.with_suffix(".txt"), "".join(f"{names[row]}\n" for row in rows).encode())
    return len(rows)


def _export_parquet(store: DescriptorStore, rows: np.ndarray, names: list[str], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.list_(pa.from_numpy_dtype(store.dtype), store.shape[1])
    schema = pa.schema({"name": pa.string(), "descriptor": kind})
    schema = schema.with_metadata({"fingerprint": store.manifest["fingerprint"]})
    with replacing(path) as file, pq.ParquetWriter(file, schema) as writer:
        for start in range(0, len(rows), _BLOCK):
            ids = rows[start : start + _BLOCK]
            flat = pa.array(store.read_rows(ids).astype(store.dtype).ravel())
            columns = [pa.array([names[i] for i in ids]), pa.FixedSizeListArray.from_arrays(flat, store.shape[1])]
            writer.write_table(pa.table(columns, schema=schema))


def _written(store: DescriptorStore) -> np.ndarray:
    return np.setdiff1d(np.flatnonzero(store.done), store.skipped, assume_unique=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
