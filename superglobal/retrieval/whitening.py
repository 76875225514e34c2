"""Statistics of the searched database, without labels: its mean, or its principal axes, taken out of all descriptors.

center: x <- x - m, normalised                                 m, C: mean and covariance of the database's rows
pca:    x <- L^-1/2 U^T (x - m), normalised                    C = U L U^T, its `dims` largest eigenvalues
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.errors import InputError
from superglobal.retrieval.rows import Rows, as_rows
from superglobal.utils.io import atomic_file

FORMAT = "superglobal-statistics-1"
KINDS = ("none", "center", "pca")
_BLOCK_ROWS = 8192
# A product of always the same shape gives a row the same bits wherever it stands; exact ranks rest on that.
_PRODUCT_ROWS = 256


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and, to whiten, axes (D, d), each over the root of its eigenvalue, float64; of `rows` rows."""

    mean: np.ndarray
    axes: np.ndarray | None
    rows: int

    def apply(self, x: Any, name: str = "descriptors") -> Rows:
        """Descriptors (N, D) as Rows (N, D or d) of unit norm, transformed when they are read."""
        return Rows([_Transformed(as_rows(x, name), self)], name)


def database_statistics(X: Any, kind: str = "center", dims: int | None = None) -> Statistics:
    """Statistics of X (N, D), anything `as_rows` takes, in one pass by blocks, in float64; skipped rows do not count.

    kind: "center" or "pca". dims: axes kept when whitening, D by default; there must be more rows than axes, since
    with as many of each any rows become orthogonal, and equally far from one another.
    Raises InputError for bad rows, and dims that are out of range or more than the rows can give.
    """
    rows = as_rows(X, "database")
    wanted = _checked(kind, dims, rows)
    total = np.zeros(rows.dim)
    products = np.zeros((rows.dim, rows.dim)) if wanted else None
    for start, block in rows.blocks(_BLOCK_ROWS):
        wide = np.delete(block, rows.skipped[(rows.skipped >= start) & (rows.skipped < start + len(block))] - start, 0)
        wide = wide.astype(np.float64)
        total += wide.sum(axis=0)
        if products is not None:
            products += wide.T @ wide
    count = len(rows) - len(rows.skipped)
    mean = total / count
    if products is None:
        return Statistics(mean, None, count)
    values, vectors = np.linalg.eigh(products / count - np.outer(mean, mean))
    values, vectors = values[::-1][:wanted], vectors[:, ::-1][:, :wanted]
    if values[-1] <= 1e-12 * max(values[0], 1e-12):
        flat = int((values > 1e-12 * max(values[0], 1e-12)).sum())
        raise InputError(f"{rows.name}: only {flat} of {wanted} axes have any variance; whitening.dims={max(flat, 1)}")
    return Statistics(mean, vectors / np.sqrt(values), count)


def _checked(kind: str, dims: int | None, rows: Rows) -> int:
    """How many axes are wanted; 0 for the mean alone."""
    if kind not in KINDS[1:]:
        raise InputError(f"whitening.kind={kind}: expected one of {', '.join(KINDS[1:])}")
    if kind == "center":
        return 0
    wanted = rows.dim if dims is None else dims
    if not 1 <= wanted <= rows.dim:
        raise InputError(f"whitening.dims={dims}: expected 1..{rows.dim}, the descriptors' dimension")
    if wanted >= len(rows) - len(rows.skipped):
        raise InputError(
            f"whitening.kind=pca: {len(rows)} database images are too few for {wanted} axes; give "
            f"whitening.dims=, well below {len(rows)}, or whitening=center"
        )
    return wanted


def stored_statistics(
    X: Any, kind: str, dims: int | None, folder: Path, fingerprints: list[str]
) -> tuple[Statistics, str]:
    """`database_statistics` from `folder`, computed and written there if they are not there yet.

    fingerprints: of the stores that X is read from, in order; with kind and dims they identify the statistics.
    Returns them and their own fingerprint. Raises InputError as `database_statistics`, and for a damaged file.
    """
    identity = json.dumps({"format": FORMAT, "kind": kind, "dims": dims, "stores": fingerprints}, sort_keys=True)
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    path = folder / f"statistics-{fingerprint[:16]}.npz"
    if path.is_file():
        return _read(path, identity), fingerprint
    found = database_statistics(X, kind, dims)
    arrays: dict[str, Any] = {"identity": np.array(identity), "rows": np.array(found.rows), "mean": found.mean}
    if found.axes is not None:
        arrays["axes"] = found.axes
    with atomic_file(path) as file:
        np.savez(file, **arrays)
    return found, fingerprint


def _read(path: Path, identity: str) -> Statistics:
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["identity"]) != identity:
                raise InputError(f"{path}: statistics of another database; remove the file to compute them again")
            return Statistics(file["mean"], file.get("axes"), int(file["rows"]))
    except InputError:
        raise
    except Exception as error:  # a damaged zip raises whatever its damage leads to
        raise InputError(f"{path}: damaged ({error!r}); remove the file to compute them again") from error


class _Transformed:
    """Rows under statistics, as a source of Rows."""

    def __init__(self, rows: Rows, statistics: Statistics) -> None:
        if statistics.mean.shape != (rows.dim,):
            raise InputError(f"{rows.name}: D = {rows.dim}, but the statistics have D = {len(statistics.mean)}")
        self._rows, self._statistics = rows, statistics
        self.skipped = rows.skipped
        axes = statistics.axes
        self.shape = (len(rows), rows.dim if axes is None else axes.shape[1])

    def block(self, start: int, stop: int) -> np.ndarray:
        return self._apply(self._rows.block(start, stop))

    def take(self, ids: np.ndarray) -> np.ndarray:
        return self._apply(self._rows.take(ids))

    def _apply(self, rows: np.ndarray) -> np.ndarray:
        """(n, d) float32. A row that is the mean has no direction left, and stays zero to be told as such."""
        out = np.empty((len(rows), self.shape[1]), np.float32)
        for start in range(0, len(rows), _PRODUCT_ROWS):
            centred = rows[start : start + _PRODUCT_ROWS] - self._statistics.mean
            if self._statistics.axes is not None:
                padded = np.zeros((_PRODUCT_ROWS, rows.shape[1]))
                padded[: len(centred)] = centred
                centred = (padded @ self._statistics.axes)[: len(centred)]
            norms = np.sqrt(np.square(centred).sum(axis=1, keepdims=True))
            out[start : start + _PRODUCT_ROWS] = centred / np.where(norms < 1e-9, 1, norms)
        return out
