"""Large databases: float16 stores, skipped rows, search and ranks in one pass, and merged lists equal brute force."""

from __future__ import annotations

import importlib.util
import json
import shutil

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from vectors import ABOUT, brute_force, names, store_of, unit, with_duplicates, without

from superglobal.data.revisited import load_ground_truth
from superglobal.errors import InputError
from superglobal.metrics.evaluate import evaluate
from superglobal.reranking.registry import rerank
from superglobal.retrieval.ranks import exact_ranks, search_and_rank
from superglobal.retrieval.rows import concat, load_npy
from superglobal.retrieval.search import merge_shortlists, search
from superglobal.retrieval.store import DescriptorStore
from superglobal.retrieval.store_files import fingerprint
from superglobal.retrieval.store_tools import reuse_rows


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_written_rows_are_read_back_normalized_and_rounded(tmp_path, dtype):
    X = unit(np.random.default_rng(0), 100, 16) * np.float32(1.0005)
    store = store_of(tmp_path / "s", X, dtype)
    expected = X if dtype == "float32" else (X / np.linalg.norm(X.astype(np.float64), axis=1)[:, None]).astype(dtype)
    again = DescriptorStore.open(tmp_path / "s")
    for opened in (store, again):
        assert opened.block(0, 100).dtype == np.float32
        np.testing.assert_array_equal(opened.block(0, 100), expected.astype(np.float32))
        np.testing.assert_array_equal(opened.block(35, 85), expected[35:85].astype(np.float32))
        ids = np.array([[99, 0], [40, 39]])
        np.testing.assert_array_equal(opened.take(ids), expected[ids].astype(np.float32))
    assert np.load(tmp_path / "s" / "shard-00000.npy").dtype == dtype
    assert again.manifest["dtype"] == dtype


def test_stores_of_different_dtypes_are_separate(tmp_path):
    X = unit(np.random.default_rng(0), 30, 8)
    assert fingerprint(ABOUT, names(30)) == fingerprint(ABOUT, names(30), "float32")
    assert fingerprint(ABOUT, names(30)) != fingerprint(ABOUT, names(30), "float16")
    # This value predates float16 stores, so older stores are still recognized.
    assert fingerprint({"a": 1}, ["x"])[:16] == "dd27e89697673df6"
    store_of(tmp_path / "fine", X)
    with pytest.raises(InputError, match="dtype float32, expected float16"):
        DescriptorStore.open_or_create(tmp_path / "fine", ABOUT, names(30), 8, dtype="float16")
    rounded = DescriptorStore.open_or_create(tmp_path / "rounded", ABOUT, names(30), 8, dtype="float16")
    assert reuse_rows(tmp_path, rounded) == 30  # rows are rounded as they would be by writing them
    np.testing.assert_array_equal(rounded.block(0, 30), store_of(tmp_path / "direct", X, "float16").block(0, 30))
    shutil.rmtree(tmp_path / "fine")
    empty = DescriptorStore.open_or_create(tmp_path / "empty", ABOUT, names(30), 8)
    assert reuse_rows(tmp_path, empty) == 0
    assert len(empty.missing) == 30


def test_an_invalid_row_of_a_batch_is_named_and_nothing_is_written(tmp_path):
    store = DescriptorStore.open_or_create(tmp_path / "s", ABOUT, names(9), 8)
    X = unit(np.random.default_rng(0), 3, 8)
    for row, value, message in ((1, np.nan, "row 5: .* has NaN"), (2, 0.0, "row 6: .* has norm 0, expected 1")):
        bad = X.copy()
        bad[row] *= value
        with pytest.raises(InputError, match=message):
            store.write_rows(np.array([4, 5, 6]), bad)
    with pytest.raises(InputError, match=r"row 9 is outside 0\.\.8"):
        store.write_rows(np.array([7, 8, 9]), X)
    with pytest.raises(InputError, match=r"first rows: 4, 5"):
        store.write_rows(np.array([4, 5]), X)
    store.flush()
    assert len(store.missing) == 9


def test_a_manifest_with_wrong_dtype_or_rows_is_an_error(tmp_path):
    store_of(tmp_path / "s", unit(np.random.default_rng(0), 9, 8))
    path = tmp_path / "s" / "manifest.json"
    whole = json.loads(path.read_text())
    for key, value, message in (
        ("dtype", "int8", "damaged"),
        ("dtype", "float16", "expected"),
        ("rows", -1, "damaged"),
    ):
        path.write_text(json.dumps({**whole, key: value}))
        with pytest.raises(InputError, match=message):
            DescriptorStore.open(tmp_path / "s")


def test_opening_does_not_read_the_names(tmp_path):
    store_of(tmp_path / "s", unit(np.random.default_rng(0), 9, 8))
    (tmp_path / "s" / "names.json").unlink()
    assert DescriptorStore.open(tmp_path / "s").block(0, 9).shape == (9, 8)
    assert len(DescriptorStore.open_or_create(tmp_path / "s", ABOUT, names(9), 8, 40).missing) == 0


@settings(max_examples=20, deadline=None, phases=(Phase.generate,))
@given(data=st.data())
def test_search_and_ranks_in_one_pass_equal_brute_force_without_skipped_rows(tmp_path_factory, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    n = data.draw(st.integers(8, 120), label="N")
    X = with_duplicates(rng, n, 6, data.draw(st.integers(1, n), label="distinct"))
    dtype = data.draw(st.sampled_from(["float32", "float16"]))
    skipped = np.sort(rng.permutation(n)[: data.draw(st.integers(0, 4), label="skipped")])
    folder = tmp_path_factory.mktemp("s") / "s"
    store = store_of(folder, X, dtype, skipped)
    X = store.block(0, n)
    Q = np.concatenate([unit(rng, 3, 6), X[np.setdiff1d(np.arange(n), skipped)[:1]]])
    exclude = rng.integers(n, size=4) if data.draw(st.booleans(), label="exclude") else None
    k = data.draw(st.integers(1, n - len(skipped) - (exclude is not None)), label="k")
    remaining = [np.setdiff1d(np.arange(n), [*skipped, *([] if exclude is None else [exclude[q]])]) for q in range(4)]
    targets = [rng.permutation(rows)[: data.draw(st.integers(0, len(rows)))] for rows in remaining]
    rows = data.draw(st.sampled_from([1, 7, 50, 1000]), label="block_rows")
    options = {"block_rows": rows, "exclude": exclude}
    (scores, ids), ranks = search_and_rank(Q, store, k, targets, **options)
    whole = [without(X, skipped, Q[q : q + 1], n, None if exclude is None else exclude[q : q + 1])[0] for q in range(4)]
    np.testing.assert_array_equal(ids, [order[:k] for order in whole])
    for target_ranks, target_ids, order in zip(ranks, targets, whole, strict=True):
        np.testing.assert_array_equal(target_ranks, [np.flatnonzero(order == i)[0] for i in target_ids])
    alone = search(Q, store, k, **options)
    assert np.array_equal(alone[0], scores)
    assert np.array_equal(alone[1], ids)
    for actual, expected in zip(exact_ranks(Q, store, targets, **options), ranks, strict=True):
        assert np.array_equal(actual, expected)
    if importlib.util.find_spec("faiss"):
        assert np.array_equal(search(Q, store, k, backend="faiss", **options)[1], ids)


def test_rows_sorted_by_increasing_score_are_searched_exactly(monkeypatch):
    """Rows sorted by increasing score are the worst order, as every block replaces all results before it."""
    rng = np.random.default_rng(3)
    X = unit(rng, 20000, 16)
    Q = unit(rng, 2, 16)
    X = X[np.argsort(X @ Q[0])]
    X[-6000:-3000] = X[-1]
    np.testing.assert_array_equal(search(Q, X, 50, backend="torch", block_rows=512)[1], brute_force(Q, X, 50))


def test_requesting_skipped_rows_is_an_error(tmp_path):
    rng = np.random.default_rng(1)
    X, Q = unit(rng, 60, 8), unit(rng, 2, 8)
    rows = concat(X[:10], store_of(tmp_path / "s", X[10:], skipped=[3, 7]))
    assert rows.skipped.tolist() == [13, 17]
    with pytest.raises(InputError, match="image 13 was skipped"):
        exact_ranks(Q, rows, [[0], [13]])
    with pytest.raises(InputError, match=r"k=59: expected 1\.\.58"):
        search(Q, rows, 59)
    ids = search(Q, rows, 58)[1]
    np.testing.assert_array_equal(ids, without(X, [13, 17], Q, 58))
    assert not np.isin(rerank(Q, rows, ids, 20)[1], [13, 17]).any()
    with pytest.raises(InputError, match="row 17 was skipped"):
        rerank(Q, rows, [[1, 17], [2, 3]])


def test_damaged_rows_are_detected_during_search(tmp_path):
    X = unit(np.random.default_rng(2), 90, 8)
    store_of(tmp_path / "s", X)
    shard = np.load(tmp_path / "s" / "shard-00001.npy", mmap_mode="r+")
    shard[5, 2] = np.nan
    shard.flush()
    with pytest.raises(InputError, match="row 45 is damaged"):
        search(X[:2], DescriptorStore.open(tmp_path / "s"), 5)


@settings(max_examples=20, deadline=None, phases=(Phase.generate,))
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_merged_results_of_parts_equal_the_whole(seed, count):
    rng = np.random.default_rng(seed)
    X = with_duplicates(rng, 90, 5, 25)
    Q = unit(rng, 4, 5)
    starts = [0, *np.sort(rng.choice(np.arange(1, 90), count, replace=False))]
    pieces = np.split(X, starts[1:])
    parts = [search(Q, piece, min(12, len(piece)), dtype=np.float64) for piece in pieces]
    scores, ids = merge_shortlists(parts, 12, starts)
    expected = search(Q, X, 12, dtype=np.float64)
    np.testing.assert_array_equal(ids, expected[1])
    np.testing.assert_array_equal(scores, expected[0])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,)])
def test_a_file_without_descriptors_is_an_error(tmp_path, shape):
    np.save(tmp_path / "x.npy", np.zeros(shape, np.float32))
    with pytest.raises(InputError, match=r"x\.npy: expected descriptors \(N, D\) with at least one row, got shape"):
        load_npy(tmp_path / "x.npy")


def test_lists_that_cannot_be_merged_raise_errors():
    Q = X = unit(np.random.default_rng(0), 20, 5)
    part = search(Q, X, 4, dtype=np.float64)
    with pytest.raises(InputError, match="expected float64 scores, got float32"):
        merge_shortlists([search(Q, X, 4)])
    with pytest.raises(InputError, match="two shards contain id"):
        merge_shortlists([part, part])
    for starts in (np.array([0.0, 20.0]), np.array([[0], [20]]), [0, "20"], [0], 0):
        with pytest.raises(InputError, match="expected 2 integers, one row id per shard"):
            merge_shortlists([part, part], starts=starts)
    with pytest.raises(InputError, match="integer ids"):
        merge_shortlists([(part[0], part[1].astype(float))])
    assert merge_shortlists([part, part], starts=np.array([0, 20]))[1].max() >= 20
    scores, ids = merge_shortlists([part, (part[0], np.full_like(part[1], -1))], 6)
    assert (ids[:, 4:] == -1).all()
    assert np.isneginf(scores[:, 4:]).all()
    np.testing.assert_array_equal(ids[:, :4], part[1])


def test_50000_float16_rows_with_real_ground_truth_are_scored_exactly(tmp_path, shared_data):
    """Ranks of all positives, also outside the shortlist, are compared to a full sort of float64 scores."""
    rng = np.random.default_rng(7)
    gnd = load_ground_truth(shared_data / "gnd" / "gnd_roxford5k.pkl")
    X = unit(rng, 50_000, 64)
    Q = unit(rng, len(gnd.gnd), 64)
    for q, labels in zip(Q, gnd.gnd, strict=True):
        near = np.concatenate([labels["easy"], labels["hard"]])
        X[near] += q * rng.uniform(0, 1, (len(near), 1)).astype(np.float32)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    store = store_of(tmp_path / "s", X, "float16", shard_rows=16384)
    result = evaluate(Q, store, gnd.gnd)
    X = store.block(0, len(X)).astype(np.float64)
    for query in range(0, len(Q), 7):
        order = np.argsort(-(X @ Q[query].astype(np.float64)), kind="stable")
        labels = gnd.gnd[query]
        for name, positive, ignored in (
            ("easy", labels["easy"], np.concatenate([labels["junk"], labels["hard"]])),
            ("medium", np.concatenate([labels["easy"], labels["hard"]]), labels["junk"]),
            ("hard", labels["hard"], np.concatenate([labels["junk"], labels["easy"]])),
        ):
            hits = np.flatnonzero(np.isin(order[~np.isin(order, ignored)], positive))
            steps = [((j / r if r else 1.0) + (j + 1) / (r + 1)) / 2 for j, r in enumerate(hits)]
            expected = np.mean(steps) if steps else np.nan
            assert result.ap[name][query] == pytest.approx(expected, abs=1e-12, nan_ok=True)
