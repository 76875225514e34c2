"""Rerankers of shortlists compared to loops in float64, and edge cases."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import clustered

from superglobal.errors import InputError
from superglobal.reranking.auto import effective_dims
from superglobal.reranking.registry import (
    RERANKERS,
    get_reranker,
    rerank,
    rerank_candidates,
    rerank_label,
)
from superglobal.retrieval.rows import concat
from superglobal.retrieval.search import search

ROOT = Path(__file__).parents[1]
rerank_mutual = partial(rerank, method="mutual")
kreciprocal = partial(rerank, method="kreciprocal")
diffuse = partial(rerank, method="diffusion")
gnn = partial(rerank, method="gnn")
auto = partial(rerank, method="auto")
SHORTLIST = (rerank, rerank_mutual, kreciprocal, diffuse, gnn, auto)


def unit(x: np.ndarray) -> np.ndarray:
    """Normalize vectors to unit length."""
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def ranked(similarity: np.ndarray, i: int, k: int) -> list[int]:
    """Return image i and its k nearest images; i comes first, and ties are sorted by id."""
    neighbors = sorted((j for j in range(len(similarity)) if j != i), key=lambda j: (-similarity[i, j], j))
    return [i, *neighbors[:k]]


def slow_superglobal(q, T, K, beta, second, include_query):
    """Score candidates T for the query q as SuperGlobal, by loops."""
    S = T @ T.T
    R = []
    for i in range(len(T)):
        near = ranked(S, i, K)
        weights = [1.0, *(beta * S[i, j] for j in near[1:])]
        R.append(sum(w * T[j] for w, j in zip(weights, near, strict=True)) / sum(weights))
    R = np.array(R)
    s1 = R @ q
    members = [R[i] for i in np.argsort(-s1, kind="stable")[: K + 1]] + ([q] if include_query else [])
    e = np.max(members, axis=0)
    return (s1 + (R if second == "refined" else T) @ e) / 2


def slow_mutual(q, T, K, beta, k_query):
    """Score candidates T for the query q with mutual neighbors, by loops."""
    S = T @ T.T
    near = [ranked(S, i, K) for i in range(len(T))]
    R = []
    for i in range(len(T)):
        weights = {i: 1.0} | {j: beta * S[i, j] for j in near[i][1:] if i in near[j]}
        R.append(sum(w * T[j] for j, w in weights.items()) / sum(weights.values()))
    R = np.array(R)
    s1 = R @ q
    members = []
    for i in np.argsort(-s1, kind="stable")[: K + 1]:
        nearer = [j for j in range(len(T)) if j != i and S[i, j] > T[i] @ q]
        if len(nearer) < k_query:
            members.append(R[i])
    if not members:
        return s1
    return (s1 + R @ np.mean([q, *members], axis=0)) / 2


def slow_kreciprocal(q, T, k1, k2, lambda_):
    """Score candidates T for the query q by k-reciprocal encoding, by loops."""
    images = np.vstack([q, T])
    size = len(images)
    S = images @ images.T
    D = np.maximum(2 - 2 * S, 0)
    np.fill_diagonal(D, 0)
    D = D / np.maximum(D.max(axis=1, keepdims=True), 1e-12)

    def mutual(i: int, k: int) -> set[int]:
        return {j for j in ranked(S, i, k) if i in ranked(S, j, k)}

    V = np.zeros((size, size))
    for i in range(size):
        wide = mutual(i, k1)
        members = set(wide)
        for j in wide:
            narrow = mutual(j, round(k1 / 2))
            if len(narrow & wide) > 2 / 3 * len(narrow) + 1e-9:
                members |= narrow
        for j in members:
            V[i, j] = np.exp(-D[i, j])
        V[i] /= V[i].sum()
    if k2 > 1:
        V = np.array([np.mean([V[j] for j in ranked(S, i, k2 - 1)], axis=0) for i in range(size)])
    jaccard = [1 - np.minimum(V[0], V[i]).sum() / np.maximum(V[0], V[i]).sum() for i in range(1, size)]
    return -((1 - lambda_) * np.array(jaccard) + lambda_ * D[0, 1:])


def slow_diffusion(q, T, kq, kd, alpha, gamma):
    """Score candidates T for the query q by diffusion, by loops."""
    M = len(T)
    S = T @ T.T
    near = [ranked(S, i, kd) for i in range(M)]
    A = np.zeros((M, M))
    for i in range(M):
        for j in range(M):
            if i != j and j in near[i] and i in near[j]:
                A[i, j] = max(S[i, j], 0) ** gamma
    degree = A.sum(axis=1)
    for i in range(M):
        for j in range(M):
            if A[i, j]:
                A[i, j] /= np.sqrt(degree[i] * degree[j])
    y = np.array([max(T[i] @ q, 0) ** gamma if i < kq else 0 for i in range(M)])
    return np.linalg.inv(np.eye(M) - alpha * A) @ y


def slow_gnn(q, T, k1, k2):
    """Score candidates T for the query q by propagation on their neighbor graph, by loops."""
    images = np.vstack([q, T])
    size = len(images)
    S = np.maximum(images @ images.T, 0)
    near = [ranked(images @ images.T, i, size) for i in range(size)]
    A = np.zeros((size, size))
    for i in range(size):
        for rank, j in enumerate(near[i][:k1]):
            A[i, j] = 1 - rank / k1
    W = np.eye(size)
    for i in range(size):
        for j in near[i][1 : k2 + 1]:
            W[i, j] = S[i, j] ** 2 * A[j, i]
    for _ in range(2):
        A = W @ (A + A.T) / 2
    A /= np.linalg.norm(A, axis=1, keepdims=True)
    return A[1:] @ A[0]


def assert_reranked(result, expected, Q, X, ids, M, tolerance=2e-6):
    """Assert that the scores equal the expected ones, are sorted, and that ids after the shortlist are unchanged."""
    scores, out = result
    depth = min(M, ids.shape[1])
    for query, head in enumerate(ids[:, :depth]):
        expected_scores = expected(Q[query].astype(np.float64), X[head].astype(np.float64))
        by_id = dict(zip(head.tolist(), expected_scores.tolist(), strict=True))
        assert sorted(out[query, :depth]) == sorted(head)
        np.testing.assert_allclose(scores[query, :depth], [by_id[i] for i in out[query, :depth]], atol=tolerance)
        assert (np.diff(scores[query, :depth]) <= 0).all()
    np.testing.assert_array_equal(out[:, depth:], ids[:, depth:])
    assert (scores[:, depth:] == -np.inf).all()


CASES = {
    "paper": (rerank, slow_superglobal, [{"K": 3, "beta": 0.15, "second": "original", "include_query": False}]),
    "query": (rerank, slow_superglobal, [{"K": 2, "beta": 0.3, "second": "refined", "include_query": True}]),
    "mutual": (
        rerank_mutual,
        slow_mutual,
        [{"K": k, "beta": b, "k_query": n} for k, b, n in ((1, 0.15, 3), (4, 0.15, 0), (4, 0.4, 3), (9, 0.15, 9))],
    ),
    "kreciprocal": (
        kreciprocal,
        slow_kreciprocal,
        [{"k1": a, "k2": b, "lambda_": c} for a, b, c in ((4, 3, 0.3), (5, 1, 0.0), (1, 2, 0.5), (20, 6, 0.3))],
    ),
    "gnn": (
        gnn,
        slow_gnn,
        [{"k1": a, "k2": b} for a, b in ((16, 3), (8, 3), (1, 1), (4, 0), (2, 9), (40, 10))],
    ),
    "diffusion": (
        diffuse,
        slow_diffusion,
        [{"kq": a, "kd": b, "alpha": c, "gamma": 3.0} for a, b, c in ((3, 4, 0.9), (1, 2, 0.99), (30, 50, 0.5))],
    ),
}


@pytest.mark.parametrize("name", list(CASES))
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_rerankers_equal_their_loops(name, data):
    """Random databases include some with fewer images than any k."""
    function, slow, options = CASES[name]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    n = data.draw(st.sampled_from([1, 2, 3, 8, 25]), label="N")
    X, Q = clustered(rng, n), clustered(rng, 3)
    ids = search(Q, X, n)[1]
    M = data.draw(st.sampled_from([1, 6, 20, 400]), label="M")
    for values in options:
        result = function(Q, X, ids, M, **values, batch_size=data.draw(st.sampled_from([1, 2, 16])))
        assert_reranked(result, lambda q, T, v=values: slow(q, T, **v), Q, X, ids, M, tolerance=1e-5)


@pytest.mark.parametrize("function", SHORTLIST)
def test_sources_and_device_do_not_change_the_result(function):
    rng = np.random.default_rng(1)
    X, Q = clustered(rng, 60), clustered(rng, 4)
    ids = search(Q, X, 30)[1]
    scores, order = function(Q, X, ids, 20)
    parts = concat(X[:17], torch.from_numpy(X[17:]))
    got = function(torch.from_numpy(Q), parts, torch.from_numpy(ids), 20, device="cpu", batch_size=3)
    np.testing.assert_array_equal(got[1], order)
    np.testing.assert_allclose(got[0], scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", SHORTLIST)
def test_rankings_with_identical_images_are_reproducible(function):
    """Every image occurs twice, so all lists of neighbors have ties; results must be reproducible."""
    rng = np.random.default_rng(2)
    X, Q = np.repeat(clustered(rng, 12), 2, axis=0), clustered(rng, 2)
    ids = search(Q, X, 24)[1]
    scores, order = function(Q, X, ids)
    assert [sorted(row) for row in order] == [list(range(24))] * 2
    assert np.isfinite(scores).all()
    if (
        function is not rerank
    ):  # rounding may decide which of two equal images is the tenth neighbor, and change the scores
        np.testing.assert_allclose(function(Q, X, ids, batch_size=1)[0], scores, rtol=1e-5, atol=1e-6)


def test_equal_images_have_equal_scores():
    X = np.repeat(unit(np.ones((1, 8))), 9, axis=0)
    ids = np.array([[5, 3, 7, 0]])
    for function, order in ((rerank_mutual, [0, 3, 5, 7]), (kreciprocal, ids[0]), (diffuse, ids[0])):
        scores, out = function(X[:1], X, ids)
        np.testing.assert_array_equal(out[0], order)
        np.testing.assert_allclose(scores, scores[0, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("function", "values"),
    [(kreciprocal, {"lambda_": 1.0}), (diffuse, {"alpha": 0.0}), (diffuse, {"alpha": 0.0, "kq": 99})],
)
def test_neutral_parameters_keep_the_order_of_the_search(function, values):
    rng = np.random.default_rng(3)
    X, Q = clustered(rng, 80), clustered(rng, 6)
    ids = search(Q, X, 40)[1]
    np.testing.assert_array_equal(function(Q, X, ids, 30, **values)[1], ids)


def test_mutual_without_neighbors_or_expansion_keeps_the_order_of_the_search():
    rng = np.random.default_rng(4)
    X, Q = clustered(rng, 50), clustered(rng, 4)
    ids = search(Q, X, 50)[1]
    np.testing.assert_array_equal(rerank_mutual(Q, X, ids, beta=0.0, k_query=0)[1], ids)


def test_rerank_candidates_accepts_the_same_options():
    rng = np.random.default_rng(5)
    X, Q = clustered(rng, 60), clustered(rng, 4)
    ids = search(Q, X, 30)[1]
    options = {"second": "original", "include_query": True}
    order = rerank_candidates(Q, X[ids], **options)[1]
    np.testing.assert_array_equal(np.take_along_axis(ids, order, axis=1), rerank(Q, X, ids, **options)[1])


@pytest.mark.parametrize(
    ("function", "values", "message"),
    [
        (rerank, {"second": "third"}, "second=third: expected one of refined, original"),
        (rerank, {"include_query": 2}, "include_query=2: expected true or false"),
        (rerank, {"M": 0}, "M=0: expected an integer >= 1"),
        (rerank, {"batch_size": 0}, "batch_size=0: expected an integer >= 1"),
        (rerank_mutual, {"k_query": -1}, "k_query=-1"),
        (rerank_mutual, {"beta": np.inf}, "beta=inf"),
        (kreciprocal, {"k1": 0}, "k1=0: expected an integer >= 1"),
        (kreciprocal, {"lambda_": 1.5}, r"lambda_=1.5: expected a finite number in 0\.\.1"),
        (kreciprocal, {"lambda_": np.nan}, "lambda_=nan"),
        (kreciprocal, {"lambda_": None}, "lambda_=None: expected a finite number"),
        (diffuse, {"alpha": 1.0}, "alpha=1.0"),
        (diffuse, {"gamma": 0.0}, "gamma=0.0"),
        (diffuse, {"kd": 2.5}, "kd=2.5"),
        (diffuse, {"alpha": "0.9"}, "alpha=0.9: expected a finite number"),
        (gnn, {"k1": 0}, "k1=0: expected an integer >= 1"),
        (gnn, {"k2": -1}, "k2=-1: expected an integer >= 0"),
        (diffuse, {"K": 9}, "K=9: diffusion has no parameter K; choose from M, kq, kd, alpha, gamma"),
        (partial(rerank, method="magic"), {}, "method=magic: expected one of superglobal, auto, diffusion, gnn"),
        (partial(rerank, method="aqe"), {}, r"method=aqe: .* call expand_queries"),
        (partial(rerank, method="adba"), {}, r"method=adba: .* call augment_database"),
    ],
)
def test_invalid_parameters_raise_errors(function, values, message):
    X = clustered(np.random.default_rng(6), 10)
    with pytest.raises(InputError, match=message):
        function(X[:2], X, search(X[:2], X, 5)[1], **values)


@pytest.mark.parametrize("function", SHORTLIST)
def test_a_row_that_is_not_a_unit_vector_is_named(function):
    X = clustered(np.random.default_rng(7), 10)
    ids = search(X[:2], X, 5)[1]
    X = X.copy()
    X[ids[1, 3]] *= 2
    with pytest.raises(InputError, match=f"database row {ids[1, 3]} has norm 2"):
        function(clustered(np.random.default_rng(8), 2), X, ids)


def test_every_reranker_declares_its_parameters():
    defaults = {"M": 400, "K": 9, "beta": 0.15, "second": "refined", "include_query": False}
    assert get_reranker("superglobal").complete({}) == defaults
    for kind, reranker in RERANKERS.items():
        values = reranker.complete({})
        assert None not in values.values()
        assert all(parameter.help for parameter in reranker.parameters.values())
        assert rerank_label({"enabled": True, "kind": kind, **values}).startswith(f"{kind} ")
    assert rerank_label({"enabled": False, "kind": "aqe"}) == "none"
    assert rerank_label({"enabled": True, "M": 12, "K": 9, "beta": 0.15}) == "superglobal M=12 K=9 beta=0.15"
    assert "second=original" in rerank_label({"enabled": True, **defaults, "second": "original"})
    with pytest.raises(InputError, match=r"rerank.K=3: aqe has no parameter K; choose from n, alpha"):
        get_reranker("aqe").complete({"K": 3}, "rerank.")
    with pytest.raises(InputError, match=r"rerank.kind=magic: expected one of superglobal, "):
        get_reranker("magic")


def test_auto_reranks_only_shortlists_that_vary_in_enough_directions():
    rng = np.random.default_rng(9)
    rich, poor = unit(rng.standard_normal((60, 64))), unit(rng.standard_normal((60, 3)) @ rng.standard_normal((3, 64)))
    for X, method in ((rich, "gnn"), (poor, None)):
        ids = search(X[:2], X, 60)[1]
        expected = ids if method is None else rerank(X[:2], X, ids, method=method)[1]
        np.testing.assert_array_equal(auto(X[:2], X, ids)[1], expected)
        np.testing.assert_array_equal(auto(X[:2], X, ids, min_dims=100.0)[1], ids)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(2, 30), dim=st.integers(1, 8))
def test_effective_dims_equal_the_ratio_of_the_sums_of_eigenvalues(seed, n, dim):
    X = unit(np.random.default_rng(seed).standard_normal((n, dim))).astype(np.float64)
    values = np.clip(np.linalg.eigvalsh(np.cov(X.T, bias=True).reshape(dim, dim)), 0, None)
    expected = values.sum() ** 2 / (values**2).sum() if values.sum() > 1e-6 else 0
    got = effective_dims(torch.from_numpy(X @ X.T)[None])
    assert float(got[0]) == pytest.approx(expected, rel=1e-4)
