"""What is done with whole descriptor stores: look into, verify, merge, export."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.errors import InputError
from superglobal.retrieval.rows import is_unit, validate_block
from superglobal.retrieval.store import DescriptorStore
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
from superglobal.utils.io import atomic_file, digest, write_atomically

_BLOCK = 8192  # rows at a time
_CHECKSUMS = "checksums.json"


def open_sound(folder: Path) -> DescriptorStore:
    """Open a store and read every list in it.

    Raises:
        InputError: no store, or a file in it that is missing or damaged.
    """
    store = DescriptorStore.open(folder)
    len(store.names)
    if (folder / PATHS).exists():
        read_paths(folder, len(store))
    told = read_skipped(folder, len(store))
    if (folder / SKIPPED).exists():
        untold = np.setdiff1d(store.skipped, list(told))
        if len(untold):
            raise InputError(
                f"{folder / SKIPPED}: expected a line for each of {len(store.skipped)} skipped rows, row {untold[0]} "
                "has none; remove the file: the rows stay skipped"
            )
    recorded_checksums(store)
    return store


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
    len(store.names)
    written = _written(store)
    for start in range(0, len(written), _BLOCK):
        ids = written[start : start + _BLOCK]
        block = store.read_rows(ids)
        try:
            validate_block(block, 0, str(store.folder), unit=True)
        except InputError:
            _name_bad_row(block, ids, store)
    sums = {path.name: digest(path) for path in sorted(store.folder.glob("shard-*.npy"))}
    recorded = None if record else recorded_checksums(store)
    other = [] if recorded is None else [name for name, value in sums.items() if recorded.get(name) != value]
    if other:
        raise InputError(f"{store.folder / other[0]}: other bytes than were recorded; delete the folder, or --record")
    if record:
        if len(store.missing):
            raise InputError(f"{store.folder}: {len(store.missing)} rows are missing; checksums are of complete stores")
        write_atomically(store.folder / _CHECKSUMS, json.dumps(sums, indent=1).encode())
    return len(written)


def recorded_checksums(store: DescriptorStore) -> dict[str, str] | None:
    """The shards' checksums as they were recorded; None if they were not."""
    path = store.folder / _CHECKSUMS
    if not path.exists():
        return None
    mend = "remove the file, and record them again: superglobal store verify --record"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); expected the checksum of each shard; {mend}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: expected the checksum of each shard; {mend}")
    return found


def _name_bad_row(block: np.ndarray, ids: np.ndarray, store: DescriptorStore) -> None:
    for row, values in zip(ids.tolist(), block, strict=True):
        validate_block(values[None], row, f"{store.folder}: damaged", unit=True)


def merge(parts: Sequence[DescriptorStore], folder: Path) -> DescriptorStore:
    """One store out of several of the same list, each of which has some of the rows.

    A row that several parts have must be the same in all, bit for bit. A row that some skipped and others have is not
    skipped: where its image could be read once, there is nothing wrong with it. The others stay skipped, with their
    reasons.

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
    _merge_skipped(parts, store)
    named = next((part for part in parts if (part.folder / PATHS).exists()), None)
    if named is not None and not (folder / PATHS).exists():
        record_paths(folder, read_paths(named.folder, len(named)))
    return store


def _merge_rows(part: DescriptorStore, store: DescriptorStore) -> None:
    written, own = _written(part), _written(store)
    for start in range(0, len(written), _BLOCK):
        ids = written[start : start + _BLOCK]
        values, common = part.read_rows(ids), np.isin(ids, own)
        differ = ids[common][(values[common] != store.read_rows(ids[common])).any(axis=1)]
        if len(differ):
            raise InputError(f"{part.folder}: row {differ[0]} differs from another part's; leave one of the parts out")
        store.copy_rows(ids[~common], values[~common])
    store.flush()


def _merge_skipped(parts: Sequence[DescriptorStore], store: DescriptorStore) -> None:
    """Skip what some part skipped and none has, under the first reason that is told."""
    told = read_skipped(store.folder, len(store))
    write_skipped(store.folder, {row: told.get(row, NO_REASON) for row in store.skipped.tolist()})
    for part in parts:
        rows = np.setdiff1d(part.skipped, np.flatnonzero(store.done)).tolist()
        told = read_skipped(part.folder, len(part))
        store.skip(np.array(rows, np.int64), [told.get(row, NO_REASON) for row in rows])
        store.flush()


def export(store: DescriptorStore, path: Path) -> int:
    """Write the descriptors as `.npy`, with the names beside it in `.txt`, or as `.parquet` (name, descriptor).

    A name is the path in `paths.json`: no two rows have the same. Skipped rows are left out. `.npy` has the store's
    dtype, as has the column of `.parquet`.

    Returns:
        How many rows were written.

    Raises:
        InputError: another suffix, rows or paths that are missing, or a place that cannot be written.
    """
    if path.suffix not in (".npy", ".parquet"):
        raise InputError(f"{path}: expected a name that ends with .npy or .parquet")
    if len(store.missing):
        raise InputError(
            f"{store.folder}: {len(store.missing)} of {len(store)} descriptors are missing; extract them first"
        )
    rows, names = _written(store), read_paths(store.folder, len(store))
    if path.suffix == ".parquet":
        _export_parquet(store, rows, names, path)
    else:
        lines = [names[row] for row in rows]
        broken = [line for line in lines if len(line.splitlines()) != 1]
        if broken:
            raise InputError(f"{path}: the name {broken[0]!r} is no single line of a .txt; export to .parquet")
        with atomic_file(path) as file:
            header = {"descr": store.dtype.str, "fortran_order": False, "shape": (len(rows), store.shape[1])}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(rows), _BLOCK):
                file.write(store.read_rows(rows[start : start + _BLOCK]).astype(store.dtype).tobytes())
        write_atomically(path.with_suffix(".txt"), "".join(f"{line}\n" for line in lines).encode())
    return len(rows)


def _export_parquet(store: DescriptorStore, rows: np.ndarray, names: list[str], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.list_(pa.from_numpy_dtype(store.dtype), store.shape[1])
    schema = pa.schema({"name": pa.string(), "descriptor": kind})
    schema = schema.with_metadata({"fingerprint": store.manifest["fingerprint"]})
    with atomic_file(path) as file, pq.ParquetWriter(file, schema) as writer:
        for start in range(0, len(rows), _BLOCK):
            ids = rows[start : start + _BLOCK]
            flat = pa.array(store.read_rows(ids).astype(store.dtype).ravel())
            columns = [pa.array([names[i] for i in ids]), pa.FixedSizeListArray.from_arrays(flat, store.shape[1])]
            writer.write_table(pa.table(columns, schema=schema))


def _written(store: DescriptorStore) -> np.ndarray:
    return np.setdiff1d(np.flatnonzero(store.done), store.skipped, assume_unique=True)


log = logging.getLogger(__name__)
_COPY_BLOCK = 8192  # rows at a time


def adopt_from(folder: Path, store: DescriptorStore) -> int:
    """Copy what the stores under `folder` have of this one's images, of the same network and settings.

    A store that is damaged is passed over, with a warning that names it: it is nobody's business here.

    Returns:
        How many rows were copied.

    Raises:
        InputError: this store cannot be written.
    """
    copied = 0
    for path in sorted(folder.glob("*/manifest.json")):
        place = path.parent
        if place == store.folder or place.name.startswith(".") or not len(store.missing):
            continue
        try:
            if read_manifest(place)["identity"] != store.manifest["identity"]:
                continue
            other = DescriptorStore.open(place)
            rows, sources = _common_rows(other, store)
        except InputError as error:
            log.warning("rows of another store are not looked for in %s: %s", place, error)
            continue
        copied += _copy(other, sources, store, rows)
    return copied


def _common_rows(other: DescriptorStore, store: DescriptorStore) -> tuple[np.ndarray, np.ndarray]:
    """(n,) missing rows, and the (n,) written rows of the other store with the same images."""
    if other.dtype.itemsize < store.dtype.itemsize:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    row_of = {name: row for row, name in enumerate(other.names)}
    found = np.array([row_of.get(name, -1) for name in store.names], np.int64)
    there = other.done
    there[other.skipped] = False
    wanted = ~store.done & (found >= 0)
    wanted[wanted] = there[found[wanted]]
    return np.flatnonzero(wanted), found[wanted]


def _copy(other: DescriptorStore, sources: np.ndarray, store: DescriptorStore, rows: np.ndarray) -> int:
    """By blocks. Rows of the same dtype are copied bit for bit; damaged ones are left to be described."""
    copied = 0
    for start in range(0, len(rows), _COPY_BLOCK):
        values = other.read_rows(sources[start : start + _COPY_BLOCK])
        norms = np.linalg.norm(values.astype(np.float64), axis=1)
        sound = is_unit(norms)
        if not sound.all():
            bad = sources[start : start + _COPY_BLOCK][~sound][0]
            log.warning("%s: row %d is damaged and not taken from there (norm %g)", other.folder, bad, norms[~sound][0])
        values, norms = values[sound], norms[sound]
        same = other.dtype == store.dtype
        store.copy_rows(rows[start : start + _COPY_BLOCK][sound], values if same else values / norms[:, None])
        copied += len(values)
    store.flush()
    return copied
