"""Rows of the same images out of other stores: one photo more in a folder costs one description."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from superglobal.errors import InputError
from superglobal.retrieval.store import DescriptorStore
from superglobal.retrieval.store_files import read_manifest
from superglobal.retrieval.vectors import is_unit

log = logging.getLogger(__name__)

_BLOCK = 8192  # rows at a time


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
    for start in range(0, len(rows), _BLOCK):
        values = other.read_rows(sources[start : start + _BLOCK])
        norms = np.linalg.norm(values.astype(np.float64), axis=1)
        sound = is_unit(norms)
        if not sound.all():
            bad = sources[start : start + _BLOCK][~sound][0]
            log.warning("%s: row %d is damaged and not taken from there (norm %g)", other.folder, bad, norms[~sound][0])
        values, norms = values[sound], norms[sound]
        same = other.dtype == store.dtype
        store.copy_rows(rows[start : start + _BLOCK][sound], values if same else values / norms[:, None])
        copied += len(values)
    store.flush()
    return copied
