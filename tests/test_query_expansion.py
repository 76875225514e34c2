"""Query expansion and database augmentation compared to loops in float64, and the search after them."""

from __future__ import annotations

import numpy as np
import pytest
from vectors import clustered

from superglobal.errors import InputError
from superglobal.reranking import registry as rerankers
from superglobal.reranking.query_expansion import augment_database, expand_queries
from superglobal.reranking.registry import apply_reranker, rerank
from superglobal.retrieval.rows import as_rows, concat
from superglobal.retrieval.search import search
from superglobal.retrieval.store import DescriptorStore


def unit(x: np.ndarray) -> np.ndarray:
    """Normalize vectors to unit length."""
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def slow_average(v, X, n, alpha, excluded=None):
    """Compute the weighted average of a vector and its n nearest rows, except for the excluded row."""
    similarity = X @ v
    neighbors = sorted((j for j in range(len(X)) if j != excluded), key=lambda j: (-similarity[j], j))[:n]
    total = v + sum((max(similarity[j], 0) ** alpha * X[j] if similarity[j] > 0 else 0 * X[j]) for j in neighbors)
    return total / np.linalg.norm(total)


@pytest.mark.parametrize(("n", "alpha"), [(1, 3.0), (5, 0.0), (7, 1.5), (100, 3.0)])
def test_expanded_queries_and_augmented_rows_equal_loops(n, alpha):
    rng = np.random.default_rng(9)
    X, Q = clustered(rng, 40), clustered(rng, 5)
    wide = X.astype(np.float64)
    assert (Q @ X.T).min() < -0.1
    expected = [slow_average(q, wide, n, alpha) for q in Q.astype(np.float64)]
    np.testing.assert_allclose(expand_queries(Q, X, n, alpha), expected, atol=1e-6)
    excluded = rng.integers(40, size=5)
    expected = [slow_average(q, wide, n, alpha, row) for q, row in zip(Q.astype(np.float64), excluded, strict=True)]
    np.testing.assert_allclose(expand_queries(Q, X, n, alpha, exclude=excluded), expected, atol=1e-6)
    expected = [slow_average(x, wide, n, alpha, row) for row, x in enumerate(wide)]
    for block_rows in (1, 7, 4096):
        got = augment_database(X, n, alpha, block_rows=block_rows)
        np.testing.assert_allclose(got.block(0, 40), expected, atol=1e-6)


def test_an_image_is_not_its_own_neighbor():
    """Without `exclude`, each query of a leave-one-out search would find itself first and not change."""
    X = clustered(np.random.default_rng(10), 30)
    rows = np.arange(30)
    assert np.abs(expand_queries(X, X, 1, 0.0) - X).max() < 1e-6
    nearest = X[search(X, X, 1, exclude=rows)[1][:, 0]]
    np.testing.assert_allclose(expand_queries(X, X, 1, 0.0, exclude=rows), unit(X + nearest), atol=1e-6)
    np.testing.assert_allclose(augment_database(X, 1, 0.0).block(0, 30), unit(X + nearest), atol=1e-6)


def test_skipped_rows_are_not_used_and_cannot_be_augmented(tmp_path):
    """A query is expanded by the rows that were not skipped, at most by all of them."""
    rng = np.random.default_rng(17)
    X, Q = clustered(rng, 30), clustered(rng, 4)
    skipped = np.unique(
        search(Q, X, 1)[1][:3]
    )  # the nearest rows of three queries, so that using them would change the result
    store = DescriptorStore.open_or_create(tmp_path / "s", {}, [str(i) for i in range(30)], X.shape[1])
    kept = np.setdiff1d(np.arange(30), skipped)
    store.write_rows(kept, X[kept])
    store.skip(skipped)
    store.flush()
    for n in (2, len(kept) + 1, 100):
        np.testing.assert_allclose(expand_queries(Q, store, n), expand_queries(Q, X[kept], n), atol=1e-6)
        rows = kept[:4]
        expected = expand_queries(Q, X[kept], n, exclude=np.arange(4))
        np.testing.assert_allclose(expand_queries(Q, store, n, exclude=rows), expected, atol=1e-6)
    with pytest.raises(InputError, match=f"{len(skipped)} rows were skipped .* cannot be averaged"):
        augment_database(store, 5)
    again = apply_reranker("aqe", {"n": 5, "alpha": 3.0}, Q, as_rows(store), search(Q, store, 20)[1])
    assert not np.isin(again.ids, skipped).any()


def test_zero_neighbors_change_nothing():
    rng = np.random.default_rng(11)
    X, Q = clustered(rng, 20), clustered(rng, 3)
    np.testing.assert_array_equal(expand_queries(Q, X, 0), Q)
    np.testing.assert_array_equal(augment_database(X, 0).block(0, 20), X)
    np.testing.assert_array_equal(augment_database(X[:1], 5).block(0, 1), X[:1])


def test_augmented_databases_on_disk_and_in_memory_are_equal(tmp_path):
    X = clustered(np.random.default_rng(12), 50)
    path = tmp_path / "augmented.npy"
    on_disk = augment_database(concat(X[:20], X[20:].astype(np.float32)), 3, path=path, block_rows=8)
    expected = augment_database(X, 3).block(0, 50)
    np.testing.assert_array_equal(on_disk.block(0, 50), expected)
    np.testing.assert_array_equal(np.load(path), expected)
    with pytest.raises(InputError, match="cannot be written"):
        augment_database(X, 3, path=tmp_path / "nowhere" / "x.npy")


def test_the_database_is_augmented_in_blocks():
    """At most `block_rows` rows are searched at once, and their neighbors are read in parts."""

    class Watched:
        def __init__(self, array):
            self.array, self.shape, self.max_rows = array, array.shape, 0

        def block(self, start, stop):
            return self.array[start:stop]

        def take(self, ids):
            self.max_rows = max(self.max_rows, len(ids))
            return self.array[ids]

    source = Watched(clustered(np.random.default_rng(13), 600))
    augment_database(source, 4, block_rows=16)
    assert source.max_rows <= 16 * (4 + 33)


def test_invalid_parameters_raise_errors():
    X = clustered(np.random.default_rng(14), 10)
    for values, message in (({"n": -1}, "n=-1: expected"), ({"alpha": -1.0}, "alpha"), ({"alpha": np.nan}, "alpha")):
        with pytest.raises(InputError, match=message):
            expand_queries(X[:2], X, **values)
        with pytest.raises(InputError, match=message):
            augment_database(X, **values)


def test_query_expansion_and_augmentation_search_the_whole_database():
    rng = np.random.default_rng(15)
    X, Q = as_rows(clustered(rng, 60)), clustered(rng, 4)
    ids = search(Q, X, 20)[1]
    aqe = apply_reranker("aqe", {"n": 5, "alpha": 3.0}, Q, X, ids)
    assert aqe.shortlist is None
    assert aqe.database is X
    np.testing.assert_array_equal(aqe.ids, search(expand_queries(Q, X, 5, 3.0), X, 20)[1])
    adba = apply_reranker("adba", {"n": 5, "alpha": 3.0}, Q, X, ids)
    assert adba.queries is Q
    np.testing.assert_array_equal(adba.ids, search(Q, augment_database(X, 5, 3.0), 20)[1])
    shortlisted = apply_reranker("kreciprocal", {"M": 10}, Q, X, ids)
    np.testing.assert_array_equal(shortlisted.shortlist, rerank(Q, X, ids, 10, method="kreciprocal")[1])


def test_a_database_too_large_for_memory_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(rerankers, "_IN_MEMORY", 0)
    rng = np.random.default_rng(16)
    X, Q = as_rows(clustered(rng, 60)), clustered(rng, 4)
    ids = search(Q, X, 20)[1]
    got = apply_reranker("adba", {"n": 5, "alpha": 3.0}, Q, X, ids, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(got.database.block(0, 60), augment_database(X, 5).block(0, 60))
