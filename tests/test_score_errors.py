"""Exact orders for vectors whose float32 scores have much larger errors than those of usual descriptors."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from vectors import treat_as_accelerator

from superglobal.reporting.figures import bin_of, similarity_counts
from superglobal.retrieval.ranks import count_better, exact_ranks, search_and_rank, target_scores
from superglobal.retrieval.scores import pair_scores
from superglobal.retrieval.search import search

ROWS, QUERIES, K = 600, 12, 40


def dominant(rng, dim):
    """Return vectors with one dominant component."""
    X = np.full((ROWS, dim), 1e-4) + 1e-6 * rng.standard_normal((ROWS, dim))
    X[:, 0] = 1
    return X


def softmax(rng, dim):
    """Return softmax outputs."""
    X = np.exp(3 * rng.standard_normal((ROWS, dim)))
    return X / X.sum(axis=1, keepdims=True)


SPACES = {
    "one dominant component": dominant,
    "softmax": softmax,
    "nearly constant": lambda rng, dim: 1 + 1e-5 * rng.standard_normal((ROWS, dim)),
    "no negative values": lambda rng, dim: np.maximum(rng.standard_normal((ROWS, dim)), 0) + 0.01,
    "usual": lambda rng, dim: rng.standard_normal((ROWS, dim)),
}


def space(name: str, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return queries and rows as float32 unit vectors; some are copies of other rows."""
    rng = np.random.default_rng(dim)
    X = SPACES[name](rng, dim)
    X[-50:] = X[:50]
    X = (X / np.linalg.norm(X, axis=1, keepdims=True)).astype(np.float32)
    return np.concatenate([X[: QUERIES // 2], X[100 : 100 + QUERIES // 2] + np.float32(0)]), X


def order(Q: np.ndarray, X: np.ndarray) -> np.ndarray:
    """Return the (Q, N) ids by (-score, id)."""
    query_of, row_of = (grid.ravel() for grid in np.indices((len(Q), len(X))))
    scores = pair_scores(Q, X, query_of, row_of).reshape(len(Q), len(X))
    return np.lexsort((np.broadcast_to(np.arange(len(X)), scores.shape), -scores), axis=1)


@pytest.fixture(params=["cpu", "accelerator"])
def device(request, monkeypatch) -> None:
    """Use the code for the CPU, or the code for accelerators run on the CPU."""
    if request.param == "accelerator":
        treat_as_accelerator(monkeypatch)


@pytest.mark.parametrize("dim", [512, 2048, 8192])
@pytest.mark.parametrize("name", SPACES)
def test_ids_and_ranks_are_exact(name, dim, device):
    Q, X = space(name, dim)
    expected = order(Q, X)
    rank_of = np.argsort(expected, axis=1)
    targets = [np.random.default_rng(1).choice(ROWS, 100, replace=False) for _ in Q]
    expected_ranks = [rank_of[query, ids_of].tolist() for query, ids_of in enumerate(targets)]
    (_, ids), ranks = search_and_rank(Q, X, K, targets, block_rows=150)
    np.testing.assert_array_equal(ids, expected[:, :K])
    assert [ids_of.tolist() for ids_of in ranks] == expected_ranks
    assert [ids_of.tolist() for ids_of in exact_ranks(Q, X, targets)] == expected_ranks
    np.testing.assert_array_equal(search(Q, X, K, backend="torch", block_rows=200)[1], expected[:, :K])


@pytest.mark.parametrize("name", SPACES)
def test_faiss_is_exact(name):
    pytest.importorskip("faiss")
    Q, X = space(name, 2048)
    expected = order(Q, X)
    np.testing.assert_array_equal(search(Q, X, K, backend="faiss", block_rows=150)[1], expected[:, :K])
    targets = [np.arange(0, ROWS, 11) for _ in Q]
    (_, ids), ranks = search_and_rank(Q, X, K, targets, backend="faiss", block_rows=150)
    np.testing.assert_array_equal(ids, expected[:, :K])
    rank_of = np.argsort(expected, axis=1)
    assert [ids_of.tolist() for ids_of in ranks] == [rank_of[q, ids_of].tolist() for q, ids_of in enumerate(targets)]


@pytest.mark.parametrize("name", SPACES)
def test_ranks_over_parts_and_similarity_bins_are_exact(name):
    Q, X = space(name, 2048)
    rank_of = np.argsort(order(Q, X), axis=1)
    targets = [np.arange(0, 300, 7) for _ in Q]
    scores = target_scores(Q, X[:300], targets)
    parts = [count_better(Q, X[low : low + 300], scores, targets, low) for low in (0, 300)]
    for query, ids_of in enumerate(targets):
        np.testing.assert_array_equal(sum(part[query] for part in parts), rank_of[query, ids_of])
    query_of, row_of = (grid.ravel() for grid in np.indices((len(Q), len(X))))
    counts = np.bincount(bin_of(pair_scores(Q, X, query_of, row_of)))
    negative_counts = similarity_counts(Q, X, [{} for _ in Q])["negative"]
    np.testing.assert_array_equal(negative_counts[: len(counts)], counts)


def test_usual_descriptors_need_only_one_pass(caplog):
    Q, X = space("usual", 2048)
    with caplog.at_level(logging.INFO):
        search(Q, X, K)
    assert not [record for record in caplog.records if record.name.startswith("superglobal")]
    Q, X = space("one dominant component", 2048)
    with caplog.at_level(logging.INFO):
        search(torch.from_numpy(Q), torch.from_numpy(X), K)
    assert "repeating the pass" in caplog.text
