"""search: the same exact ids from every backend, with ties, duplicates, blocks and concatenated sources."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import brute_force, unit, with_duplicates

from superglobal.errors import InputError
from superglobal.retrieval import search as module
from superglobal.retrieval.rows import as_rows, concat, validate_block
from superglobal.retrieval.search import FAISS_MAX_ROWS, resolve_backend, search
from superglobal.utils.precision import full_precision

BACKENDS = ["torch", pytest.param("faiss", marks=pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None, reason="FAISS is not installed"
))]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_results_equal_brute_force(backend: str, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    n = data.draw(st.integers(2, 150), label="N")
    dim = data.draw(st.integers(1, 9), label="D")
    X = with_duplicates(rng, n, dim, data.draw(st.integers(1, n), label="distinct"))
    Q = np.concatenate([unit(rng, 3, dim), X[:1]])
    exclude = rng.integers(n, size=4) if data.draw(st.booleans(), label="exclude") else None
    k = data.draw(st.integers(1, n - (exclude is not None)), label="k")
    rows = data.draw(st.sampled_from([1, 7, 64, 1000]), label="block_rows")
    scores, ids = search(Q, X, k, backend=backend, block_rows=rows, exclude=exclude)
    np.testing.assert_array_equal(ids, brute_force(Q, X, k, exclude))
    assert scores.dtype == np.float32
    assert ids.dtype == np.int64
    expected = np.take_along_axis(Q.astype(np.float64) @ X.T.astype(np.float64), ids, axis=1)
    np.testing.assert_allclose(scores, expected, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_thousands_of_duplicates_at_rank_k_are_ordered_by_id(backend: str) -> None:
    rng = np.random.default_rng(3)
    X = unit(rng, 6000, 64)
    X[rng.permutation(6000)[:4000]] = X[0]  # 4,000 copies of an image, far more than k and the extra candidates
    Q = np.concatenate([X[:1], unit(rng, 4, 64)])
    for rows in (500, 65536):
        ids = search(Q, X, 100, backend=backend, block_rows=rows)[1]
        np.testing.assert_array_equal(ids, brute_force(Q, X, 100))
    exclude = np.flatnonzero(X @ X[0] > 0.999)[:5]
    ids = search(Q, X, 100, backend=backend, exclude=exclude, block_rows=500)[1]
    np.testing.assert_array_equal(ids, brute_force(Q, X, 100, exclude))


@pytest.mark.parametrize("backend", BACKENDS)
def test_near_ties_at_rank_k_are_decided_in_float64(backend: str) -> None:
    """The scores of 300 rows differ by about 1e-9, far below the resolution of a float32 product."""
    rng = np.random.default_rng(4)
    X = unit(rng, 500, 256)
    X[:300] = X[0]
    X[np.arange(300), rng.integers(256, size=300)] *= np.float32(1 + 2e-7)
    Q = np.concatenate([unit(rng, 3, 256), X[:1]])
    np.testing.assert_array_equal(search(Q, X, 50, backend=backend)[1], brute_force(Q, X, 50))


def test_permuting_the_database_permutes_the_ids() -> None:
    rng = np.random.default_rng(5)
    X, Q = unit(rng, 700, 16), unit(rng, 5, 16)
    order = rng.permutation(700)
    np.testing.assert_array_equal(order[search(Q, X[order], 60)[1]], search(Q, X, 60)[1])


def test_all_types_of_sources_give_the_same_ids(tmp_path) -> None:
    rng = np.random.default_rng(6)
    X, Q = unit(rng, 300, 16).astype(np.float16), unit(rng, 5, 16)
    np.save(tmp_path / "x.npy", X[100:])
    stored = np.load(tmp_path / "x.npy", mmap_mode="r")

    class Store:
        shape = (100, 16)

        def block(self, start: int, stop: int) -> np.ndarray:
            return X[:100][start:stop]

        def take(self, ids: np.ndarray) -> np.ndarray:
            return X[:100][ids]

    expected = brute_force(Q, X.astype(np.float32), 40)
    for source in (X, torch.from_numpy(X), X.astype(np.float64), concat(Store(), stored)):
        np.testing.assert_array_equal(search(Q, source, 40, block_rows=64)[1], expected)
    joined = concat(Store(), stored)
    ids = rng.integers(300, size=(4, 50))
    np.testing.assert_array_equal(joined.take(ids), X[ids].astype(np.float32))
    np.testing.assert_array_equal(joined.block(90, 130), X[90:130].astype(np.float32))
    assert joined.shape == (300, 16)
    assert len(joined) == 300
    assert joined.block(295, 400).shape == (5, 16)


def test_sources_are_read_in_blocks() -> None:
    """No block larger than `block_rows` is read."""

    class Watched:
        shape = (1000, 8)
        max_rows = 0

        def __init__(self) -> None:
            self.x = unit(np.random.default_rng(0), 1000, 8)

        def block(self, start: int, stop: int) -> np.ndarray:
            self.max_rows = max(self.max_rows, stop - start)
            return self.x[start:stop]

        def take(self, ids: np.ndarray) -> np.ndarray:
            return self.x[ids]

    source = Watched()
    search(source.x[:3], source, 10, block_rows=128)
    assert source.max_rows == 128


@pytest.mark.parametrize("backend", BACKENDS)
def test_invalid_arguments_raise_errors_that_name_them(backend: str) -> None:
    rng = np.random.default_rng(7)
    X, Q = unit(rng, 50, 8), unit(rng, 3, 8)

    def bad(array: np.ndarray, row: int, value: float) -> np.ndarray:
        array = array.copy()
        array[row] = array[row] * value
        return array

    cases = [
        ((Q, X, 51), r"k=51: expected 1\.\.50 "),
        ((Q, X, 0), r"k=0: expected"),
        ((Q, bad(X, 41, np.nan), 5), "database: row 41 has NaN"),
        ((bad(Q, 2, np.inf), X, 5), "queries: row 2 has NaN or infinite"),
        ((Q, bad(X, 0, 0), 5), "database: row 0 is a zero vector"),
        ((Q, bad(X, 17, 2), 5), "row 17 has norm 2, expected 1; normalize"),
        ((Q[:, :7], X, 5), "D = 8"),
        ((Q, X.astype(np.int32), 5), "int32"),
        ((Q, X[0], 5), r"2-D"),
        ((Q, X.tolist(), 5), "list"),
        ((Q[:0], X, 5), "at least one query"),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            search(*arguments, backend=backend, block_rows=16)
    with pytest.raises(InputError, match=r"k=50: expected 1\.\.49"):
        search(Q, X, 50, backend=backend, exclude=np.arange(3))
    with pytest.raises(InputError, match="exclude"):
        search(Q, X, 5, backend=backend, exclude=np.arange(2))
    with pytest.raises(InputError, match="block_rows"):
        search(Q, X, 5, backend=backend, block_rows=0)
    with pytest.raises(InputError, match="backend"):
        search(Q, X, 5, backend="annoy")
    with pytest.raises(InputError, match=r"D = \[8, 7\]"):
        concat(X, X[:, :7])


def test_search_without_faiss_uses_torch_and_errors_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    X, Q = unit(rng, 50, 8), unit(rng, 3, 8)
    monkeypatch.setitem(sys.modules, "faiss", None)  # importing it raises ImportError
    np.testing.assert_array_equal(search(Q, X, 9)[1], brute_force(Q, X, 9))
    with pytest.raises(InputError, match=r"pip install faiss-cpu \(or faiss-gpu\)"):
        search(Q, X, 9, backend="faiss")


def test_faiss_is_used_only_if_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    assert resolve_backend("auto", FAISS_MAX_ROWS, 400, "cpu") == "faiss"
    assert resolve_backend("auto", FAISS_MAX_ROWS + 1, 400, "cpu") == "torch"
    assert resolve_backend("faiss", FAISS_MAX_ROWS + 1, 4000, "cpu") == "faiss"
    monkeypatch.setattr(module, "faiss_on_gpu", lambda: True)
    assert resolve_backend("auto", 5000, 400, "cuda") == "faiss"
    assert resolve_backend("auto", 5000, 2048, "cuda") == "torch"  # FAISS has no room for the extra candidates
    with pytest.raises(InputError, match="k=2048: expected at most 2016 for backend=faiss on a GPU"):
        resolve_backend("faiss", 5000, 2048, "cuda")
    monkeypatch.setattr(module, "faiss_on_gpu", lambda: False)
    assert resolve_backend("auto", 5000, 400, "cuda") == "torch"
    with pytest.raises(InputError, match="backend=faiss: expected the CPU, or a GPU and faiss-gpu, got cuda"):
        resolve_backend("faiss", 5000, 400, "cuda")


def test_full_precision_restores_the_previous_settings() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_validate_block_accepts_any_norm_unless_unit_is_set() -> None:
    block = np.full((3, 4), 7, np.float32)
    validate_block(block, 0, "x")
    with pytest.raises(InputError, match="x: row 100 has norm 14"):
        validate_block(block, 100, "x", unit=True)
    assert as_rows(block).block(1, 3).base is not None  # a view, not a copy
