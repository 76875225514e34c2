"""Ranks over parts of a database: their sum is the exact rank in the whole database, including ties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import sorted_ranks, unit, with_duplicates

from superglobal.errors import InputError
from superglobal.retrieval.ranks import count_better, exact_ranks, target_scores
from superglobal.retrieval.store import DescriptorStore


def ranks_over(Q, parts, targets, **options):
    """Compute the ranks of targets from separate parts, as machines with one part each would."""
    starts = np.cumsum([0] + [len(part) for part in parts[:-1]])
    scores = [np.full(len(ids), np.nan) for ids in targets]
    for part, start in zip(parts, starts, strict=True):
        masks = [(ids >= start) & (ids < start + len(part)) for ids in targets]
        part_scores = target_scores(Q, part, [ids[mask] - start for ids, mask in zip(targets, masks, strict=True)])
        for values, mask, new_values in zip(scores, masks, part_scores, strict=True):
            values[mask] = new_values
    pairs = zip(parts, starts.tolist(), strict=True)
    counts = [count_better(Q, part, scores, targets, start, **options) for part, start in pairs]
    return [np.sum(query_counts, axis=0) for query_counts in zip(*counts, strict=True)]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_ranks_summed_over_parts_equal_the_ranks_in_the_whole(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    n = data.draw(st.integers(2, 120), label="N")
    X = with_duplicates(rng, n, 5, data.draw(st.integers(1, n), label="distinct"))
    Q = np.concatenate([unit(rng, 3, 5), X[:1]])
    cuts = np.sort(rng.choice(np.arange(1, n), min(n - 1, data.draw(st.integers(0, 4), label="cuts")), replace=False))
    exclude = rng.integers(n, size=4) if data.draw(st.booleans(), label="exclude") else None
    targets = [rng.permutation(n)[: data.draw(st.integers(0, n))] for _ in range(4)]
    if exclude is not None:
        targets = [ids[ids != skip] for ids, skip in zip(targets, exclude, strict=True)]
    rows = data.draw(st.sampled_from([1, 13, 1000]), label="block_rows")
    rank_lists = ranks_over(Q, np.split(X, cuts), targets, block_rows=rows, exclude=exclude)
    expected = sorted_ranks(Q, X, exclude)
    for number, (ranks, whole) in enumerate(zip(rank_lists, exact_ranks(Q, X, targets, exclude=exclude), strict=True)):
        np.testing.assert_array_equal(ranks, expected[number, targets[number]])
        np.testing.assert_array_equal(ranks, whole)


def test_near_ties_across_parts_are_ranked_correctly():
    rng = np.random.default_rng(1)
    X = unit(rng, 300, 64)
    X[:200] = X[0]
    X[np.arange(200), rng.integers(64, size=200)] *= np.float32(1 + 2e-7)
    X = X[rng.permutation(300)]
    Q = np.concatenate([unit(rng, 3, 64), X[:1]])
    expected = sorted_ranks(Q, X)
    for number, ranks in enumerate(ranks_over(Q, np.split(X, [90, 91, 200]), [np.arange(300)] * 4, block_rows=50)):
        np.testing.assert_array_equal(ranks, expected[number])


def test_skipped_rows_of_a_part_are_not_counted_and_have_no_rank(tmp_path):
    rng = np.random.default_rng(2)
    X, Q = unit(rng, 60, 8), unit(rng, 3, 8)
    skipped = np.array([31, 44])
    store = DescriptorStore.open_or_create(tmp_path / "s", {}, [str(i) for i in range(40)], 8, 16)
    store.write_rows(np.arange(40), X[20:])
    store.skip(skipped - 20)
    store.flush()
    kept = np.setdiff1d(np.arange(60), skipped)
    whole = sorted_ranks(Q, X[kept])
    for query, ranks in enumerate(ranks_over(Q, [X[:20], store], [kept] * 3)):
        np.testing.assert_array_equal(ranks, whole[query])
    with pytest.raises(InputError, match="image 11 was skipped"):
        target_scores(Q, store, [[11], [], []])
    with pytest.raises(InputError, match="image 31 was skipped"):
        count_better(Q, store, [[0.5], [], []], [[31], [], []], 20)


def test_invalid_targets_raise_errors_that_name_the_query():
    rng = np.random.default_rng(3)
    X, Q = unit(rng, 20, 8), unit(rng, 2, 8)
    none = np.empty(0)
    for scores, ids, message in (
        ([[0.5]], [[1]], "scores and ids of 2 queries, got 1 and 1"),
        (
            [[0.5, 0.1], none],
            [[1], []],
            r"query 0: expected one score per id, got scores of shape \(2,\) and ids of shape \(1,\)",
        ),
        ([none, np.float32([0.5])], [[], [1]], "query 1: expected float64 scores"),
        ([none, [0.5]], [[], [-1]], "integer ids >= 0"),
        ([none, [0.5]], [[], [1.0]], "integer ids >= 0, got float64 scores and float64"),
        ([none, [np.nan]], [[], [1]], "query 1: expected scores of unit vectors"),
        ([none, [3.0]], [[], [1]], "query 1: expected scores of unit vectors"),
        ([none, [0.5]], [[], [7]], "query 1: id 7 is excluded"),
    ):
        with pytest.raises(InputError, match=message):
            count_better(Q, X, scores, ids, exclude=[0, 7])
    with pytest.raises(InputError, match="start=-1: expected the id"):
        count_better(Q, X, [none, none], [[], []], -1)
    with pytest.raises(InputError, match=r"query 0: id 20 is outside the database, 0\.\.19"):
        target_scores(Q, X, [[20], []])
