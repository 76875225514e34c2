"""Descriptors on a plane: principal axes or t-SNE of a sample, and which of its images to show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from superglobal.errors import InputError

METHODS = ("pca", "tsne")
_FEWEST = 5


def sample(groups: Sequence[str | None], count: int, skipped: np.ndarray, seed: int) -> np.ndarray:
    """(n,) ascending ids of at most `count` images, at most half of them without a group if others are enough.

    groups: of each image, None for one that shows no known landmark. skipped: ids without a descriptor.
    """
    rng = np.random.default_rng(seed)
    known = np.array([group is not None for group in groups])
    there = np.ones(len(groups), bool)
    there[skipped] = False
    named, unnamed = (rng.permutation(np.flatnonzero(there & one)) for one in (known, ~known))
    of_named = min(len(named), max(count - len(unnamed), (count + 1) // 2))
    return np.sort(np.concatenate([named[:of_named], unnamed[: count - of_named]]))


def principal_plane(X: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two axes of most variance, by SVD of the centred rows; signs such that each axis's largest entry is positive.

    X: (n, D); others: (m, D), put on the same axes. Returns (n, 2), (m, 2), and each axis's share of X's variance.
    """
    mean = X.mean(axis=0, dtype=np.float64)
    _, lengths, axes = np.linalg.svd(X.astype(np.float64) - mean, full_matrices=False)
    axes = axes[:2] * np.sign(axes[np.arange(2), np.abs(axes[:2]).argmax(axis=1)])[:, None]
    return (X - mean) @ axes.T, (others - mean) @ axes.T, lengths[:2] ** 2 / max((lengths**2).sum(), 1e-300)


def tsne(X: np.ndarray, others: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """t-SNE (van der Maaten and Hinton, 2008) of both together, by scikit-learn: (n, 2) and (m, 2)."""
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise InputError("t-SNE needs scikit-learn: pip install scikit-learn, or use --map pca") from error
    both = np.concatenate([X, others])
    perplexity = min(30.0, (len(both) - 1) / 3)
    points = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(both)
    return points[: len(X)], points[len(X) :]


def place(X: np.ndarray, others: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """`principal_plane` or `tsne`, and what the two axes are called.

    Raises InputError for fewer than five images, or scikit-learn missing.
    """
    if len(X) < _FEWEST:
        raise InputError(f"a map of {len(X)} images says nothing; at least {_FEWEST} are needed")
    if method == "tsne":
        return *tsne(X, others, seed), ["t-SNE 1", "t-SNE 2"]
    points, more, shares = principal_plane(X, others)
    return points, more, [f"axis {i + 1} ({100 * share:.1f} % of the variance)" for i, share in enumerate(shares)]


def spread(points: np.ndarray, columns: int, rows: int) -> dict[tuple[int, int], int]:
    """Cell (column, row from below) of a grid over all points -> the point nearest to its middle; no empty cells.

    points: (n, 2).
    """
    low, size = points.min(axis=0), np.maximum(np.ptp(points, axis=0), 1e-12)
    where = (points - low) / size * [columns, rows]
    cell = np.minimum(where.astype(np.int64), [columns - 1, rows - 1])
    off = np.abs(where - cell - 0.5).max(axis=1)
    found: dict[tuple[int, int], int] = {}
    for point in np.argsort(off, kind="stable"):
        found.setdefault((int(cell[point, 0]), int(cell[point, 1])), int(point))
    return found
