"""Whiten descriptors with the mean m and the covariance C of the searched database, without labels.

center: x <- x - m, normalized
pca:    x <- L^-1/2 U^T (x - m), normalized

L is the diagonal matrix of the `dims` largest eigenvalues of C, and U contains the corresponding eigenvectors.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.errors import InputError, one_of
from superglobal.retrieval.rows import Rows, as_rows
from superglobal.utils.io import atomic_file, require_regular

FORMAT = "superglobal-whitening-1"
KINDS = ("none", "center", "pca")
_BLOCK_ROWS = 8192
# Exact ranks require that equal rows have bitwise equal results at every position, so all matrix products have the same
# shape, with this number of rows.
_PRODUCT_ROWS = 256


class Whitening:
    """Center or whiten descriptors with the statistics of a database, with the interface of scikit-learn.

    "center" subtracts the mean. "pca" also projects the difference onto the principal axes, and divides each component
    by the square root of its eigenvalue. Both normalize the result to unit L2 norm.

    Args:
        kind: "pca" or "center".
        dims: for "pca", the number of principal axes that are kept, 1..D; D by default.

    Raises:
        InputError: the kind is unknown.
    """

    mean_: np.ndarray
    """Mean (D,) float64 of the rows given to `fit`."""
    n_samples_: int
    """Number of rows given to `fit`, without skipped ones."""

    def __init__(self, kind: str = "pca", dims: int | None = None) -> None:
        if kind not in KINDS[1:]:
            raise InputError(f"whitening.kind={kind}: expected {one_of(kind, KINDS[1:])}")
        self.kind, self.dims = kind, dims
        self._axes: np.ndarray | None = None  # (D, dims) float64

    @property
    def components_(self) -> np.ndarray | None:
        """Principal axes (dims, D) float64, each divided by the square root of its eigenvalue; None for "center"."""
        return None if self._axes is None else self._axes.T

    def fit(self, X: Any) -> Whitening:
        """Compute the mean and the principal axes in float64, in one pass over the rows.

        Skipped rows of a store are ignored. "pca" needs at least two different rows per axis. With fewer rows,
        whitening makes the distances of all rows nearly equal, even those of similar images.

        Args:
            X: (N, D) database: an array, a memory map, a tensor or a `DescriptorStore`.

        Returns:
            The object itself.

        Raises:
            InputError: a row is invalid, or `dims` is out of range or too large for the number of different rows.
        """
        rows = as_rows(X, "database")
        count = len(rows) - len(rows.skipped)
        if not count:
            raise InputError(f"{rows.name}: expected at least one row to fit the whitening on")
        dims = self._resolved_dims(rows.dim, count)
        total = np.zeros(rows.dim)
        products = np.zeros((rows.dim, rows.dim)) if dims else None
        different: set[int] = set()
        for start, block in rows.blocks(_BLOCK_ROWS):
            skipped = rows.skipped[(rows.skipped >= start) & (rows.skipped < start + len(block))] - start
            kept = np.delete(block, skipped, 0)
            wide = kept.astype(np.float64)
            total += wide.sum(axis=0)
            if products is not None:
                products += wide.T @ wide
                if len(different) < 2 * dims:
                    different.update(map(zlib.crc32, kept))
        self.mean_, self.n_samples_ = total / count, count
        if products is not None:
            _require_rows(len(different), dims)
            values, vectors = np.linalg.eigh(products / count - np.outer(self.mean_, self.mean_))
            values, vectors = values[::-1][:dims], vectors[:, ::-1][:, :dims]
            varying = int((values > 1e-12 * max(values[0], 1e-12)).sum())
            if varying < dims:
                raise InputError(
                    f"{rows.name}: only {varying} of {dims} principal axes have nonzero variance; "
                    f"use whitening.dims={varying or 1}"
                )
            self._axes = vectors / np.sqrt(values)
        return self

    def _resolved_dims(self, dim: int, count: int) -> int:
        """Return the number of principal axes for `count` rows of dimension `dim`; 0 for "center".

        Raises:
            InputError: `dims` is not in 1..`dim`, or is not less than `count`.
        """
        if self.kind == "center":
            return 0
        dims = dim if self.dims is None else self.dims
        if not isinstance(dims, int | np.integer) or not 1 <= dims <= dim:
            raise InputError(f"whitening.dims={dims}: expected an integer in 1..{dim}, the descriptors' dimension")
        _require_rows(count, dims)
        return dims

    def transform(self, X: Any) -> np.ndarray:
        """Transform descriptors to unit vectors in memory.

        Args:
            X: (N, D) descriptors, or anything that `as_rows` accepts.

        Returns:
            (N, D) float32 for "center", (N, dims) float32 for "pca". A row that equals the mean becomes zero.

        Raises:
            InputError: `fit` was not called, or D differs from that of `fit`.
        """
        rows = self.transform_rows(X)
        return rows.block(0, len(rows))

    def transform_rows(self, X: Any, name: str = "descriptors") -> Rows:
        """Return descriptors as `Rows` that are transformed whenever they are read, block by block.

        Args:
            X: (N, D) descriptors, or anything that `as_rows` accepts.
            name: name of the descriptors, for messages.

        Raises:
            InputError: `fit` was not called, or D differs from that of `fit`.
        """
        if not hasattr(self, "mean_"):
            raise InputError("whitening: not fitted yet; call fit first")
        return Rows([_Transformed(as_rows(X, name), self)], name)

    def _transform_block(self, rows: np.ndarray) -> np.ndarray:
        """Transform descriptors (n, D) to unit vectors (n, D) or (n, dims) float32."""
        width = rows.shape[1] if self._axes is None else self._axes.shape[1]
        out = np.empty((len(rows), width), np.float32)
        for start in range(0, len(rows), _PRODUCT_ROWS):
            centered = rows[start : start + _PRODUCT_ROWS] - self.mean_
            if self._axes is not None:
                padded = np.zeros((_PRODUCT_ROWS, rows.shape[1]))
                padded[: len(centered)] = centered
                centered = (padded @ self._axes)[: len(centered)]
            norms = np.sqrt(np.square(centered).sum(axis=1, keepdims=True))
            # A row that equals the mean has no direction. It becomes zero, which validation reports as an error.
            out[start : start + _PRODUCT_ROWS] = centered / np.where(norms < 1e-9, 1, norms)
        return out

    def save(self, path: Path, identity: str) -> None:
        """Write the results of `fit` to an .npz file, with a text `identity` that must be given again to `load` it."""
        arrays: dict[str, Any] = {"identity": np.array(identity), "rows": np.array(self.n_samples_), "mean": self.mean_}
        if self._axes is not None:
            arrays["axes"] = self._axes
        with atomic_file(path) as file:
            np.savez(file, **arrays)

    def load(self, path: Path, identity: str) -> Whitening:
        """Read the results of `fit` from a file that `save` wrote, and return the object itself.

        Raises:
            InputError: the file is damaged or has another identity.
        """
        try:
            require_regular(path)
            with np.load(path, allow_pickle=False) as file:
                if str(file["identity"]) != identity:
                    raise InputError(
                        f"{path}: this whitening belongs to another database; remove the file to compute it again"
                    )
                self.mean_, self._axes, self.n_samples_ = file["mean"], file.get("axes"), int(file["rows"])
        except InputError:
            raise
        except Exception as error:  # a damaged zip raises exceptions of many types
            raise InputError(f"{path}: damaged ({error!r}); remove the file to compute it again") from error
        return self


def _require_rows(count: int, dims: int) -> None:
    """Raise InputError unless `count` different rows are enough for whitening with `dims` principal axes."""
    if 2 * dims > count:
        raise InputError(
            f"whitening.kind=pca: {count} different database images are too few for {dims} axes, expected at least "
            f"{2 * dims}; use whitening.dims={max(1, count // 2)} or less, or whitening=center"
        )


def stored_whitening(
    X: Any, kind: str, dims: int | None, folder: Path, fingerprints: list[str]
) -> tuple[Whitening, str]:
    """Load the whitening of a database from `folder`, or fit it and store it there.

    Args:
        X: (N, D) database, or anything that `as_rows` accepts.
        kind: "pca" or "center".
        dims: for "pca", the number of principal axes that are kept, 1..D; None for D.
        folder: folder of the stored whitening.
        fingerprints: fingerprints of the stores that X is read from, in order. Together with `kind` and `dims`, they
            identify the whitening.

    Returns:
        The fitted whitening and its fingerprint.

    Raises:
        InputError: a row is invalid, `dims` is out of range or too large for the number of rows, the file is damaged,
            or the folder cannot be written.
    """
    identity = json.dumps({"format": FORMAT, "kind": kind, "dims": dims, "stores": fingerprints}, sort_keys=True)
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    path = folder / f"whitening-{fingerprint[:16]}.npz"
    whitening = Whitening(kind, dims)
    if path.is_file():
        return whitening.load(path, identity), fingerprint
    whitening.fit(X).save(path, identity)
    return whitening, fingerprint


class _Transformed:
    """Source of `Rows` that reads the rows of another `Rows` object and whitens them."""

    def __init__(self, rows: Rows, whitening: Whitening) -> None:
        if whitening.mean_.shape != (rows.dim,):
            raise InputError(
                f"{rows.name}: D = {rows.dim}, but the whitening has D = {len(whitening.mean_)}; extract with the same "
                "network"
            )
        self._rows, self._whitening = rows, whitening
        self.skipped = rows.skipped
        components = whitening.components_
        self.shape = (len(rows), rows.dim if components is None else len(components))

    def block(self, start: int, stop: int) -> np.ndarray:
        return self._whitening._transform_block(self._rows.block(start, stop))

    def take(self, ids: np.ndarray) -> np.ndarray:
        return self._whitening._transform_block(self._rows.take(ids))
