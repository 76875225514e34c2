"""Unit vectors, stores of them, and search and ranks by brute force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from superglobal.retrieval import ranks, rows, scan, search
from superglobal.retrieval.store import DescriptorStore

ABOUT = {"weights": "w"}


def unit(rng: np.random.Generator, n: int, dim: int) -> np.ndarray:
    """Return n random unit vectors of `dim` dimensions, float32."""
    x = rng.standard_normal((n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def with_duplicates(rng: np.random.Generator, n: int, dim: int, distinct: int) -> np.ndarray:
    """Return n unit vectors drawn from `distinct` ones."""
    return unit(rng, distinct, dim)[rng.integers(distinct, size=n)]


def brute_force(Q: np.ndarray, X: np.ndarray, k: int, exclude: np.ndarray | None = None) -> np.ndarray:
    """Return the first k ids by (-score, id), with each score summed separately in float64."""
    lists = []
    for number, q in enumerate(Q.astype(np.float64)):
        scores = [float(np.sum(q * x)) for x in X.astype(np.float64)]
        order = sorted(range(len(X)), key=lambda i, s=scores: (-s[i], i))
        lists.append([i for i in order if exclude is None or i != exclude[number]][:k])
    return np.array(lists)


def sorted_ranks(Q: np.ndarray, X: np.ndarray, exclude: np.ndarray | None = None) -> np.ndarray:
    """Return the (Q, N) ranks of all rows by a full sort; excluded rows have rank -1 and do not count."""
    ranks = np.full((len(Q), len(X)), -1)
    for number, q in enumerate(Q.astype(np.float64)):
        scores = [float(np.sum(q * x)) for x in X.astype(np.float64)]
        order = sorted(range(len(X)), key=lambda i, s=scores: (-s[i], i))
        order = [i for i in order if exclude is None or i != exclude[number]]
        ranks[number, order] = np.arange(len(order))
    return ranks


def names(count: int) -> list[str]:
    """Return image names."""
    return [f"image{i}" for i in range(count)]


def store_of(folder: Path, X: np.ndarray, dtype: str = "float32", skipped=(), shard_rows: int = 40) -> DescriptorStore:
    """Write the rows of X, except for the skipped ones, to a store."""
    store = DescriptorStore.open_or_create(folder, ABOUT, names(len(X)), X.shape[1], shard_rows, dtype=dtype)
    kept = np.setdiff1d(np.arange(len(X)), skipped)
    store.write_rows(kept, X[kept])
    store.skip(np.asarray(skipped, np.int64))
    store.flush()
    return store


def without(X: np.ndarray, skipped: np.ndarray, Q: np.ndarray, k: int, exclude=None) -> np.ndarray:
    """Return `brute_force` over the rows that were not skipped."""
    kept = np.setdiff1d(np.arange(len(X)), skipped)
    lists = brute_force(Q, X[kept], len(kept))
    rows = [[i for i in kept[ids] if exclude is None or i != exclude[q]][:k] for q, ids in enumerate(lists)]
    return np.array(rows)


def clustered(rng: np.random.Generator, n: int, dim: int = 10, spread: float = 0.25) -> np.ndarray:
    """Return unit vectors around six random centers; similarities may be negative."""
    centers = unit(np.random.default_rng(99), 6, dim)
    x = centers[rng.integers(6, size=n)] + spread * rng.standard_normal((n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def treat_as_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as an accelerator without FAISS, in everything but pinned memory and streams."""
    for module in (rows, scan, ranks):
        monkeypatch.setattr(module, "is_host", lambda device: False)
    monkeypatch.setattr(search, "FAISS_MAX_ROWS", 0)
