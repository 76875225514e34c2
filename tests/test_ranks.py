"""exact_ranks: equal to a full sort by (-float64 score, id), also with many ties."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import sorted_ranks, unit

from superglobal.errors import InputError
from superglobal.metrics.evaluate import evaluate
from superglobal.retrieval import scores
from superglobal.retrieval.ranks import exact_ranks
from superglobal.retrieval.search import search


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ranks_equal_a_full_sort(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    n = data.draw(st.integers(1, 150), label="N")
    dim = data.draw(st.integers(1, 9), label="D")
    X = unit(rng, data.draw(st.integers(1, n), label="distinct"), dim)
    X = X[rng.integers(len(X), size=n)]
    Q = np.concatenate([unit(rng, 3, dim), X[:1]])
    exclude = rng.integers(n, size=4) if data.draw(st.booleans(), label="exclude") else None
    targets = [rng.permutation(n)[: data.draw(st.integers(0, n))] for _ in range(4)]
    if exclude is not None:
        targets = [ids[ids != skip] for ids, skip in zip(targets, exclude, strict=True)]
    rows = data.draw(st.sampled_from([1, 13, 1000]), label="block_rows")
    ranks = exact_ranks(Q, X, targets, block_rows=rows, exclude=exclude)
    expected = sorted_ranks(Q, X, exclude)
    assert len(ranks) == 4
    for number, query_ranks in enumerate(ranks):
        assert query_ranks.dtype == np.int64
        np.testing.assert_array_equal(query_ranks, expected[number, targets[number]])


def test_near_ties_below_float32_precision_are_ranked_correctly() -> None:
    rng = np.random.default_rng(1)
    X = unit(rng, 400, 128)
    X[:200] = X[0]
    X[np.arange(200), rng.integers(128, size=200)] *= np.float32(1 + 2e-7)
    Q = np.concatenate([unit(rng, 3, 128), X[:1]])
    expected = sorted_ranks(Q, X)
    for number, ranks in enumerate(exact_ranks(Q, X, [np.arange(400)] * 4, block_rows=90)):
        np.testing.assert_array_equal(ranks, expected[number])


def test_ranks_agree_with_search_over_a_larger_database() -> None:
    rng = np.random.default_rng(2)
    X, Q = unit(rng, 9000, 64), unit(rng, 20, 64)
    X[rng.integers(9000, size=900)] = X[:900]
    ids = search(Q, X, 300)[1]
    for ranks in exact_ranks(Q, X, list(ids), block_rows=2000):
        np.testing.assert_array_equal(ranks, np.arange(300))


def test_a_database_of_identical_images_is_ranked_by_id_and_quickly() -> None:
    X = np.repeat(unit(np.random.default_rng(3), 1, 512), 5000, axis=0)
    Q = unit(np.random.default_rng(4), 30, 512)
    targets = [np.random.default_rng(i).permutation(5000)[:200] for i in range(30)]
    start = time.perf_counter()
    ranks = exact_ranks(Q, X, targets)
    # Every pair of query and row is a near-tie; equal rows are scored once, so this takes a fraction of a second.
    assert time.perf_counter() - start < 8
    for query_ranks, expected in zip(ranks, targets, strict=True):
        np.testing.assert_array_equal(query_ranks, expected)


@pytest.mark.parametrize("share", [0, 0.3])
def test_many_queries_with_few_targets_are_ranked_correctly(share: float) -> None:
    """Recognition has 117,577 queries, some without targets, so every query has only a small table."""
    rng = np.random.default_rng(6)
    X, Q = unit(rng, 60, 8), unit(rng, 3000, 8)
    targets = [rng.permutation(60)[:20] if rng.random() < share else np.empty(0, np.int64) for _ in Q]
    order = sorted_ranks(Q, X)
    for number, ranks in enumerate(exact_ranks(Q, X, targets, block_rows=40)):
        np.testing.assert_array_equal(ranks, order[number, targets[number]])


def test_errors_name_the_query() -> None:
    rng = np.random.default_rng(5)
    X, Q = unit(rng, 20, 8), unit(rng, 2, 8)
    with pytest.raises(InputError, match=r"query 1: id 20 is outside the database, 0\.\.19"):
        exact_ranks(Q, X, [[0], [3, 20]])
    with pytest.raises(InputError, match="query 0: id -1"):
        exact_ranks(Q, X, [[-1], []])
    with pytest.raises(InputError, match="expected 2 lists of ids, one per query, got 1"):
        exact_ranks(Q, X, [[0]])
    with pytest.raises(InputError, match="query 1: id 3 is excluded"):
        exact_ranks(Q, X, [[0], [3]], exclude=[1, 3])
    with pytest.raises(InputError, match=r"integer ids, got float"):
        exact_ranks(Q, X, [[0.5], []])
    with pytest.raises(InputError, match="targets of query 1: expected a flat list"):
        exact_ranks(Q, X, [[0], [[1, 2], [3]]])
    with pytest.raises(InputError, match="ground truth of query 0: easy: expected a flat list"):
        evaluate(Q, X, [{"easy": [[1, 2], [3]], "hard": [], "junk": []}] * 2)
    X[7] = np.nan
    with pytest.raises(InputError, match="row 7 has NaN"):
        exact_ranks(Q, X, [[0], []])


def test_only_rows_that_may_be_equal_are_hashed_before_they_are_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    X, Q = unit(rng, 300, 100), unit(rng, 10, 100)
    X[100:200] = X[rng.permutation(100)]
    X[200:210, 1] += 1e-3  # component 1 is not among those that are compared first
    X[210:220] = X[200:210]
    X[210:220, 1] += 1e-3
    query_of, row_of = np.divmod(np.arange(3000), 300)
    hashed: list[int] = []
    blake2b = scores.hashlib.blake2b
    monkeypatch.setattr(scores.hashlib, "blake2b", lambda *args, **kw: (hashed.append(0), blake2b(*args, **kw))[1])
    result = scores.block_pair_scores(Q, X, query_of, row_of)
    np.testing.assert_array_equal(result, scores.pair_scores(Q, X, query_of, row_of))
    assert len(hashed) == 220
    first = scores._first_equal(X, np.arange(300))
    assert all((X[first[i]] == X[i]).all() for i in range(300))
    assert len(np.unique(first)) == 200
