"""Whitening: equal to NumPy on the whole matrix, fitted in blocks, stored, and bit-identical for every block size."""

from __future__ import annotations

import numpy as np
import pytest

from superglobal.errors import InputError
from superglobal.retrieval import whitening as module
from superglobal.retrieval.ranks import exact_ranks
from superglobal.retrieval.rows import concat
from superglobal.retrieval.search import search
from superglobal.retrieval.whitening import Whitening, stored_whitening


def unit(x: np.ndarray) -> np.ndarray:
    """Normalize vectors to unit length."""
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture
def X():
    """Return 700 unit vectors with a mean and unequal variances."""
    rng = np.random.default_rng(0)
    return unit(rng.standard_normal((700, 24)) * np.linspace(1, 3, 24) + 2)


def test_centering_subtracts_the_mean_and_normalizes(X):
    whitening = Whitening("center").fit(X)
    wide = X.astype(np.float64)
    expected = unit(wide - wide.mean(axis=0))
    rows = whitening.transform_rows(X)
    assert rows.shape == (700, 24)
    np.testing.assert_allclose(rows.block(0, 700), expected, atol=1e-6)
    ids = np.array([[3, 699], [3, 0]])
    np.testing.assert_array_equal(rows.take(ids), rows.block(0, 700)[ids])


@pytest.mark.parametrize("dims", [None, 5])
def test_whitened_rows_have_equal_variance_along_every_axis(X, dims):
    whitening = Whitening("pca", dims).fit(X)
    wide = X.astype(np.float64)
    centered = wide - wide.mean(axis=0)
    projected = centered @ whitening.components_.T
    assert projected.shape == (700, dims or 24)
    np.testing.assert_allclose(projected.T @ projected / 700, np.eye(dims or 24), atol=1e-8)
    np.testing.assert_allclose(whitening.transform(X), unit(projected), atol=1e-6)
    np.testing.assert_array_equal(whitening.transform_rows(X).block(0, 700), whitening.transform(X))
    values, vectors = np.linalg.eigh(np.cov(wide.T, bias=True))
    kept = vectors[:, ::-1][:, : dims or 24]
    np.testing.assert_allclose(
        np.abs(np.einsum("dk,kd->k", kept, whitening.components_)) ** -2, values[::-1][: dims or 24]
    )


def test_blocks_half_precision_and_concatenated_sources_give_the_same_fit(X, monkeypatch):
    whole = Whitening("pca").fit(X)
    monkeypatch.setattr(module, "_BLOCK_ROWS", 64)
    parts = Whitening("pca").fit(concat(X[:100], X[100:]))
    np.testing.assert_allclose(parts.mean_, whole.mean_, atol=1e-12)
    np.testing.assert_allclose(np.abs(parts.components_), np.abs(whole.components_), rtol=1e-6)
    half = Whitening("center").fit(X.astype(np.float16))
    np.testing.assert_allclose(half.mean_, X.astype(np.float16).astype(np.float64).mean(axis=0), atol=1e-12)


@pytest.mark.parametrize("kind", ["center", "pca"])
def test_a_row_is_bit_identical_in_every_block(X, kind, monkeypatch):
    """Exact ranks compare a row read alone with the same row read in a block, so both must be identical."""
    monkeypatch.setattr(module, "_PRODUCT_ROWS", 32)
    whitening = Whitening(kind).fit(X)
    rows = whitening.transform_rows(np.concatenate([X, X[:50]]))
    whole = rows.block(0, 750)
    np.testing.assert_array_equal(whole[700:], whole[:50])
    for start in (0, 1, 31, 33, 700):
        np.testing.assert_array_equal(rows.block(start, start + 40), whole[start : start + 40])
    ids = np.random.default_rng(1).permutation(750)
    np.testing.assert_array_equal(rows.take(ids), whole[ids])
    queries = whitening.transform_rows(X[::70]).block(0, 10)
    order = search(queries, rows, 750)[1]
    for row, ranks in zip(order, exact_ranks(queries, rows, list(order)), strict=True):
        np.testing.assert_array_equal(ranks, np.arange(len(row)))


def test_whitening_is_stored_once_and_read_back(X, tmp_path, monkeypatch):
    first, name = stored_whitening(X, "pca", 7, tmp_path, ["a", "b"])
    monkeypatch.setattr(Whitening, "fit", None)
    again, same = stored_whitening(X, "pca", 7, tmp_path, ["a", "b"])
    assert name == same
    assert (again.n_samples_, again.components_.shape) == (700, (7, 24))
    np.testing.assert_array_equal(again.mean_, first.mean_)
    np.testing.assert_array_equal(again.components_, first.components_)
    monkeypatch.undo()
    others = [("pca", 6, ["a", "b"]), ("pca", 7, ["b", "a"]), ("center", None, ["a", "b"]), ("center", None, ["a"])]
    names = {stored_whitening(X, kind, dims, tmp_path, stores)[1] for kind, dims, stores in others}
    assert len(names | {name}) == 5


def test_a_damaged_whitening_file_is_an_error(X, tmp_path):
    stored_whitening(X, "center", None, tmp_path, ["a"])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match=f"{path.name}: damaged .* remove the file"):
        stored_whitening(X, "center", None, tmp_path, ["a"])


def test_invalid_arguments_raise_input_errors(X):
    with pytest.raises(InputError, match=r"47 different .* too few for 24 axes, expected at least 48"):
        Whitening("pca").fit(X[:47])
    with pytest.raises(InputError, match=r"20 different .* use whitening\.dims=10 or less"):
        Whitening("pca", 19).fit(np.concatenate([X[:20]] * 5))  # all distances would be equal
    with pytest.raises(InputError, match=r"dims=25: expected an integer in 1\.\.24"):
        Whitening("pca", 25).fit(X)
    with pytest.raises(InputError, match="expected one of center, pca"):
        Whitening("median")
    flat = np.zeros((60, 24), np.float32)
    flat[:, :3] = unit(np.random.default_rng(2).standard_normal((60, 3)))
    with pytest.raises(InputError, match=r"only 3 of 24 principal axes have nonzero variance; use whitening\.dims=3"):
        Whitening("pca").fit(flat)
    with pytest.raises(InputError, match="row 0 is a zero vector"):
        search(X[:1], Whitening("center").fit(X[:1]).transform_rows(X[:1]), 1)
    with pytest.raises(InputError, match="D = 5, but the whitening has D = 24"):
        Whitening("center").fit(X).transform_rows(X[:, :5])
    for dims in (2.0, 0):
        with pytest.raises(InputError, match=rf"dims={dims}: expected an integer in 1\.\.24"):
            Whitening("pca", dims).fit(X)
    with pytest.raises(InputError, match="call fit first"):
        Whitening("center").transform(X)
    with pytest.raises(InputError, match="expected at least one row"):
        Whitening("center").fit(X[:0])
    with pytest.raises(InputError, match="row 3 has norm"):
        Whitening("center").fit(np.concatenate([X[:3], 2 * X[3:9]]))
