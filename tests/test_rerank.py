"""rerank compared to outputs of the reference and to the formula in plain float64, and edge cases."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from superglobal.errors import InputError
from superglobal.reranking import registry as shortlists
from superglobal.reranking.registry import rerank, rerank_candidates
from superglobal.retrieval.rows import concat
from superglobal.retrieval.search import search

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "rerank.json").read_text())
SETTINGS = {name: {"M": case["M"], "K": case["K"], "beta": case["beta"]} for name, case in CASES.items()}


def unit(rng: np.random.Generator, n: int, dim: int) -> np.ndarray:
    """Return n random unit vectors."""
    x = rng.standard_normal((n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def clustered(rng: np.random.Generator, n: int, dim: int, centers: int = 8) -> np.ndarray:
    """Return n unit vectors around random centers."""
    x = unit(rng, centers, dim)[rng.integers(centers, size=n)] + 0.15 * rng.standard_normal((n, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def slow_scores(q: np.ndarray, T: np.ndarray, K: int, beta: float) -> dict[str, np.ndarray]:
    """Compute the formula of the paper for a query, row by row in float64."""
    q, T = q.astype(np.float64), T.astype(np.float64)
    R, totals = np.zeros_like(T), []
    for i in range(len(T)):
        similarity = [float(T[i] @ T[j]) for j in range(len(T))]
        others = sorted((j for j in range(len(T)) if j != i), key=lambda j, s=similarity: -s[j])[:K]
        weight = {i: 1.0, **{j: beta * similarity[j] for j in others}}
        totals.append(sum(weight.values()))
        R[i] = sum(w * T[j] for j, w in weight.items()) / totals[i]
    s1 = R @ q
    e = R[np.argsort(-s1)[: K + 1]].max(axis=0)
    s2 = R @ e
    return {"s1": s1, "e": e, "s2": s2, "final": (s1 + s2) / 2, "total": np.array(totals)}


def assert_same_order(order: np.ndarray, expected: np.ndarray, score: dict[int, float]) -> None:
    """Assert the same order, up to swaps of images whose float64 scores differ by less than 1e-6."""
    assert sorted(order) == sorted(expected)
    for a, b in zip(order, expected, strict=True):
        assert a == b or abs(score[a] - score[b]) < 1e-6


def test_a_worked_example_gives_the_expected_scores() -> None:
    X = np.array([[1, 0, 0], [0.9, 0.1, 0], [0.8, 0.3, 0.1], [0.1, 1, 0], [0, 0.9, 0.2], [0, 0.1, 1]], np.float32)
    Q = np.array([[0.7, 0.5, 0.1]], np.float32)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    Q /= np.linalg.norm(Q, axis=1, keepdims=True)
    first, ids = search(Q, X, 6)
    np.testing.assert_array_equal(ids, [[2, 1, 0, 3, 4, 5]])
    np.testing.assert_allclose(first, [[0.966465, 0.867104, 0.80829, 0.654913, 0.588651, 0.172345]], atol=1e-5)
    scores, reranked = rerank(Q, X, ids, M=5, K=2, beta=0.15)
    np.testing.assert_array_equal(reranked, [[2, 1, 0, 3, 4, 5]])
    np.testing.assert_allclose(scores[0, :5], [0.981964, 0.943587, 0.915602, 0.535232, 0.477347], atol=1e-5)
    assert scores[0, 5] == -np.inf
    slow = slow_scores(Q[0], X[ids[0, :5]], K=2, beta=0.15)
    np.testing.assert_allclose(slow["s1"], [0.938103, 0.871419, 0.832218, 0.663898, 0.613953], atol=1e-5)
    np.testing.assert_allclose(slow["e"], [0.991712, 0.284046, 0.090541], atol=1e-5)
    np.testing.assert_allclose(slow["s2"], [1.025826, 1.015756, 0.998986, 0.406567, 0.340741], atol=1e-5)


@pytest.mark.parametrize("name", list(CASES))
def test_reranking_equals_the_reference(name: str) -> None:
    arrays = np.load(DATA / "rerank.npz")
    X, Q, ranks = arrays[f"{name}_X"], arrays[f"{name}_Q"], arrays[f"{name}_ranks"]
    M, K, beta = SETTINGS[name].values()
    np.testing.assert_array_equal(search(Q, X, M)[1], ranks[:, :M])
    scores, ids = rerank(Q, X, ranks, **SETTINGS[name])
    for query, expected in enumerate(arrays[f"{name}_reranked"]):
        head = ranks[query, :M]
        final = slow_scores(Q[query], X[head], K, beta)["final"]
        assert_same_order(ids[query, :M], expected[:M], dict(zip(head.tolist(), final.tolist(), strict=True)))
        np.testing.assert_array_equal(ids[query, M:], expected[M:])
        np.testing.assert_allclose(scores[query, :M], -np.sort(-final), atol=1e-6)
    assert (scores[:, M:] == -np.inf).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_reranking_equals_the_formula(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    n = data.draw(st.integers(1, 40), label="N")
    X, Q = clustered(rng, n, 12), clustered(rng, 3, 12)
    k = data.draw(st.integers(1, n), label="k")
    M, K = data.draw(st.integers(1, 45), label="M"), data.draw(st.integers(1, 12), label="K")
    beta = data.draw(st.sampled_from([0.0, 0.05, 0.15, 0.4]), label="beta")
    ids = search(Q, X, k)[1]
    scores, out = rerank(Q, X, ids, M, K, beta, batch_size=data.draw(st.sampled_from([1, 2, 16])))
    depth = min(M, k)
    for query in range(3):
        slow = slow_scores(Q[query], X[ids[query, :depth]], K, beta)
        by_id = dict(zip(ids[query].tolist(), slow["final"].tolist(), strict=False))
        # Negative similarities can nearly cancel the weights; dividing by a small total magnifies rounding.
        smallest = min(1.0, float(np.abs(slow["total"]).min()))
        assume(smallest > 0.1)
        expected = [by_id[i] for i in out[query, :depth]]
        np.testing.assert_allclose(scores[query, :depth], expected, rtol=0, atol=2e-6 / smallest**3)
        np.testing.assert_array_equal(out[query, depth:], ids[query, depth:])
    assert (np.diff(scores[:, :depth], axis=1) <= 0).all()


def test_batch_size_and_source_do_not_change_the_result() -> None:
    rng = np.random.default_rng(1)
    X, Q = clustered(rng, 300, 32), clustered(rng, 7, 32)
    ids = search(Q, X, 60)[1]
    expected, order = rerank(Q, X, ids, M=50)
    for size in (1, 3, 100):
        scores, out = rerank(Q, X, ids, M=50, batch_size=size)
        np.testing.assert_allclose(scores, expected, atol=1e-6)
        np.testing.assert_array_equal(out, order)
    for source in (torch.from_numpy(X), concat(X[:120], torch.from_numpy(X[120:]))):
        np.testing.assert_array_equal(rerank(torch.from_numpy(Q), source, torch.from_numpy(ids), M=50)[1], order)


def test_inputs_are_not_modified() -> None:
    rng = np.random.default_rng(2)
    X, Q = clustered(rng, 100, 16), clustered(rng, 3, 16)
    ids = search(Q, X, 30)[1]
    before = X.copy(), Q.copy(), ids.copy()
    rerank(Q, X, ids)
    for now, then in zip((X, Q, ids), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_permuting_the_database_permutes_the_ids() -> None:
    rng = np.random.default_rng(3)
    X, Q = clustered(rng, 400, 24), clustered(rng, 5, 24)
    order = rng.permutation(400)
    expected = rerank(Q, X, search(Q, X, 80)[1])[1]
    np.testing.assert_array_equal(order[rerank(Q, X[order], search(Q, X[order], 80)[1])[1]], expected)


def test_candidate_vectors_give_the_same_result_as_ids() -> None:
    rng = np.random.default_rng(4)
    X, Q = clustered(rng, 200, 16), clustered(rng, 5, 16)
    ids = search(Q, X, 40)[1]
    scores, out = rerank(Q, X, ids)
    by_vector, order = rerank_candidates(Q, X[ids], batch_size=2)
    np.testing.assert_array_equal(np.take_along_axis(ids, order, axis=1), out)
    np.testing.assert_allclose(by_vector, scores, atol=1e-6)
    single_scores, single_order = rerank_candidates(Q[0], torch.from_numpy(X[ids[0]]))
    assert single_scores.shape == single_order.shape == (40,)
    np.testing.assert_array_equal(single_order, order[0])
    assert rerank_candidates(Q, X[ids].astype(np.float16))[1].shape == (5, 40)
    np.testing.assert_array_equal(rerank_candidates(Q.tolist(), X[ids].tolist())[1], order)
    with pytest.raises(InputError, match="M=2: all candidates are reranked"):
        rerank_candidates(Q, X[ids], M=2)
    with pytest.raises(InputError, match="candidates: expected vectors of one length"):
        rerank_candidates(Q[:2], [X[:2].tolist(), X[:3].tolist()])


def test_equal_scores_are_ordered_by_id() -> None:
    X = np.repeat(unit(np.random.default_rng(5), 1, 8), 12, axis=0)
    scores, out = rerank(X[:1], X, np.array([[5, 3, 9, 0, 11]]), K=20)
    np.testing.assert_array_equal(out, [[0, 3, 5, 9, 11]])
    np.testing.assert_allclose(scores, 1, atol=1e-6)


def test_a_row_is_its_own_first_neighbor_despite_a_longer_copy() -> None:
    """The copy has a norm within the tolerance and scores 1.0005 with the row, more than the row with itself."""
    rng = np.random.default_rng(8)
    X, Q = clustered(rng, 20, 8), clustered(rng, 1, 8)
    X[10:] = X[:10] * np.float32(1.0005)
    ids = rng.permutation(20)[None]
    scores, out = rerank(Q, X, ids, K=1)
    final = slow_scores(Q[0], X[ids[0]], K=1, beta=0.15)["final"]
    np.testing.assert_allclose(scores[0], final[np.argsort(ids[0])[out[0]]], atol=2e-6)


def test_neighbors_of_negative_similarity_have_negative_weights() -> None:
    """With M = 2, a neighbor of negative similarity has a negative weight, as in the reference."""
    X = np.array([[1, 0], [-0.6, 0.8]], np.float32)
    scores, _ = rerank(X[:1], X, np.array([[0, 1]]), K=1, beta=0.5)
    w = 0.5 * -0.6
    R = np.array([X[0] + w * X[1], X[1] + w * X[0]]) / (1 + w)
    e = R.max(axis=0)
    np.testing.assert_allclose(scores, [(R @ X[0] + R @ e) / 2], atol=1e-6)


def test_memory_is_limited_by_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most `batch_size` shortlists are in memory, and never their (M, K+1, D) neighbors."""
    rng = np.random.default_rng(6)
    X, Q = clustered(rng, 300, 16), clustered(rng, 10, 16)
    ids = search(Q, X, 100)[1]
    shapes = []
    run = shortlists.score_batch
    monkeypatch.setattr(shortlists, "score_batch", lambda *args: shapes.append(args[3].shape) or run(*args))
    rerank(Q, X, ids, batch_size=4)
    assert shapes == [(4, 100, 16), (4, 100, 16), (2, 100, 16)]


def test_invalid_arguments_raise_errors_that_name_them() -> None:
    rng = np.random.default_rng(7)
    X, Q = unit(rng, 30, 8), unit(rng, 2, 8)
    ids = search(Q, X, 10)[1]
    damaged = X.copy()
    damaged[ids[1, 3]] = np.nan
    long = X.copy()
    long[ids[0, 0]] *= 3
    outside = np.where(ids == ids[1, 0], 30, ids)
    cases = [
        ((Q, damaged, ids), {}, f"database row {ids[1, 3]} has NaN"),
        ((Q, long, ids), {}, f"row {ids[0, 0]} has norm 3, expected 1"),
        ((Q * np.nan, X, ids), {}, "queries: row 0 has NaN"),
        ((Q, X, outside), {}, r"lists row 30, which is outside the database, 0\.\.29"),
        ((Q, X, -1 - ids), {}, "lists row -"),
        ((Q, X, ids[:1]), {}, r"integers \(2, k\)"),
        ((Q, X, ids.astype(float)), {}, "float64"),
        ((Q, X, np.zeros((2, 3), int)), {}, "query 0 lists an id twice"),
        ((Q, X, ids), {"K": 0}, "K=0: expected an integer >= 1"),
        ((Q, X, ids), {"M": 0}, "M=0: expected an integer >= 1"),
        ((Q, X, ids), {"batch_size": 0}, "batch_size"),
        ((Q, X, ids), {"beta": float("nan")}, "beta=nan: expected a finite number"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(InputError, match=message):
            rerank(*arguments, **options)
    with pytest.raises(InputError, match=r"\(Q, M, D\)"):
        rerank_candidates(Q, X)
    with pytest.raises(InputError, match="expected the candidates of 2 queries, got 3"):
        rerank_candidates(Q, X.reshape(3, 10, 8))
    with pytest.raises(InputError, match=r"candidate 2 is a zero vector"):
        rerank_candidates(Q[0], X[:5] * np.array([1, 1, 0, 1, 1], np.float32)[:, None])
    with pytest.raises(InputError, match=r"beta=-?[\d.]+: the weights"):
        rerank(X[:1], np.concatenate([X[:1], -X[:1]]), np.array([[0, 1]]), K=1, beta=1.0)
