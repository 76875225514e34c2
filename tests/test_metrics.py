"""Metrics compared to the reference to 1e-9 and to a brute-force walk along the ranked list."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superglobal.data.evaluation_set import group_by_landmark
from superglobal.errors import InputError
from superglobal.metrics.evaluate import evaluate, ranks_from_rankings, revisited_map
from superglobal.metrics.revisited import (
    LABELS,
    REVISITED,
    RetrievalResult,
    average_precision,
    cluster_interval,
    precision_at,
    score_ranks,
)
from superglobal.reranking.registry import rerank
from superglobal.retrieval.rows import concat
from superglobal.retrieval.search import search

DATA = Path(__file__).parent / "data"
GND = Path(__file__).parents[2] / "shared" / "data" / "gnd"
CASES = json.loads((DATA / "rerank.json").read_text())
NAMES = {"E": "easy", "M": "medium", "H": "hard"}
KS = (1, 5, 10)


def unit(rng: np.random.Generator, n: int, dim: int) -> np.ndarray:
    """Return n random unit vectors."""
    x = rng.standard_normal((n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def walk(ranking: list[int], positive: set[int], ignored: set[int], ks=KS) -> tuple[float, list[float]]:
    """Compute AP (the area under the precision-recall curve) and precisions by walking along the list."""
    area, hits, seen, old = 0.0, 0, 0, 1.0
    positions = []
    for image in ranking:
        if image in ignored:
            continue
        seen += 1
        if image in positive:
            hits += 1
            area += (old + hits / seen) / 2 / len(positive)
            positions.append(seen)
        old = hits / seen
    precisions = []
    for k in ks:
        depth = min(k, positions[-1]) if positions else k
        precisions.append(sum(position <= depth for position in positions) / depth)
    return area, precisions


def assert_equals_walk(
    result: RetrievalResult, rankings: list[list[int]], gnd: list[dict], protocols=REVISITED
) -> None:
    """Assert that a result equals the walk along every ranking."""
    for name, protocol in protocols.items():
        aps, precisions = [], []
        for query, labels in enumerate(gnd):
            positive = {int(i) for part in protocol.positive for i in labels[part]}
            ignored = {int(i) for part in protocol.ignored for i in labels.get(part, ())}
            if not positive:
                assert np.isnan(result.ap[name][query])
                continue
            ap, precision = walk(rankings[query], positive, ignored)
            assert result.ap[name][query] == pytest.approx(ap, abs=1e-12)
            aps.append(ap)
            precisions.append(precision)
        assert result.queries[name] == len(aps)
        if aps:
            assert result.map[name] == pytest.approx(np.mean(aps), abs=1e-12)
            assert list(result.mp[name].values()) == pytest.approx(np.mean(precisions, axis=0), abs=1e-12)
        else:
            assert np.isnan([result.map[name], *result.mp[name].values(), *result.interval[name]]).all()


def random_gnd(rng: np.random.Generator, n: int, queries: int) -> list[dict[str, list[int]]]:
    """Return random ground truth."""
    gnd = []
    for _ in range(queries):
        order = rng.permutation(n)
        ends = np.sort(rng.integers(n + 1, size=3))
        easy, hard, junk = order[: ends[0]], order[ends[0] : ends[1]], order[ends[1] : ends[2]]
        gnd.append({"easy": easy.tolist(), "hard": hard.tolist(), "junk": junk.tolist(), "bbx": [0, 0, 1, 1]})
    return gnd


def brute_rankings(Q: np.ndarray, X: np.ndarray) -> list[list[int]]:
    """Return the ids of all rows by (-score, id), with scores in float64."""
    scores = [[float(np.sum(q * x)) for x in X.astype(np.float64)] for q in Q.astype(np.float64)]
    return [sorted(range(len(X)), key=lambda i, s=row: (-s[i], i)) for row in scores]


def test_average_precision_equals_values_computed_by_hand() -> None:
    assert average_precision([0]) == 1
    assert average_precision([0, 1, 2]) == 1
    assert average_precision([1]) == pytest.approx((0 + 1 / 2) / 2)
    assert average_precision([3, 0]) == pytest.approx((1 + (1 / 3 + 2 / 4) / 2) / 2)
    assert average_precision([0], n_positives=4) == 1 / 4
    assert average_precision([], n_positives=4) == 0
    assert average_precision(np.array([255], np.uint8)) == average_precision([255]) == pytest.approx(1 / 512)
    assert np.isnan(average_precision([]))
    with pytest.raises(InputError, match="n_positives=1: expected at least the number of ranks, 2"):
        average_precision([0, 1], 1)
    for ranks in ([-1], [0, 0, 0], [0.5, 1.7]):
        with pytest.raises(InputError, match="expected distinct integer ranks >= 0"):
            average_precision(ranks)


def test_precision_stops_at_the_last_positive() -> None:
    assert precision_at(np.array([0, 2]), 10) == 2 / 3  # the last positive is third, so k' = 3
    assert precision_at(np.array([0, 2]), 2) == 1 / 2
    assert precision_at(np.array([], int), 5) == 0


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("case", list(CASES))
def test_metrics_equal_those_of_the_reference(case: str, stage: str) -> None:
    arrays, golden = np.load(DATA / "rerank.npz"), CASES[case]
    X, Q, ranks = (arrays[f"{case}_{part}"] for part in ("X", "Q", "ranks"))
    options = {"M": golden["M"], "K": golden["K"], "beta": golden["beta"]}
    shortlist = rerank(Q, X, search(Q, X, golden["M"])[1], **options)[1] if stage == "after" else None
    full = arrays[f"{case}_{'reranked' if stage == 'after' else 'ranks'}"]
    results = [
        evaluate(Q, X, golden["gnd"], ids=shortlist, ks=KS),  # ranks are counted block by block
        revisited_map(Q, concat(X[:100], X[100:]), golden["gnd"], ids=shortlist),
        score_ranks(ranks_from_rankings(full, golden["gnd"]), ks=KS),
        score_ranks(
            ranks_from_rankings(rerank(Q, X, ranks, **options)[1] if stage == "after" else ranks, golden["gnd"])
        ),
    ]
    for result in results:
        for letter, name in NAMES.items():
            expected = golden[stage][letter]
            assert result.map[name] == pytest.approx(expected["map"], abs=1e-9)
            assert list(result.mp[name].values()) == pytest.approx(expected["mp@k"], abs=1e-9)
            for ap, expected_ap in zip(result.ap[name], expected["ap"], strict=True):
                assert np.isnan(ap) if expected_ap is None else ap == pytest.approx(expected_ap, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(3, 60), queries=st.integers(1, 4), distinct=st.integers(1, 60))
def test_evaluate_equals_the_walk(seed: int, n: int, queries: int, distinct: int) -> None:
    rng = np.random.default_rng(seed)
    X = unit(rng, min(distinct, n), 6)[rng.integers(min(distinct, n), size=n)]  # ties
    Q, gnd = unit(rng, queries, 6), random_gnd(rng, n, queries)
    rankings = brute_rankings(Q, X)
    assert_equals_walk(evaluate(Q, X, gnd, block_rows=17), rankings, gnd)
    order = rng.permutation(n)  # the same images in another order, without ties
    if distinct >= n and len(np.unique(X, axis=0)) == n:
        new_ids = np.argsort(order)
        moved = [{key: new_ids[np.array(labels[key], int)] for key in ("easy", "hard", "junk")} for labels in gnd]
        assert_equals_walk(evaluate(Q, X[order], moved), rankings, gnd)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(5, 60), data=st.data())
def test_reranked_shortlists_and_truncated_lists_equal_the_walk(seed: int, n: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    X, Q, gnd = unit(rng, n, 6), unit(rng, 3, 6), random_gnd(rng, n, 3)
    M = data.draw(st.integers(1, n), label="M")
    shuffled = rng.permuted(search(Q, X, M)[1], axis=1)
    rankings = [
        [*short, *(i for i in full if i not in set(short))]
        for short, full in zip(shuffled.tolist(), brute_rankings(Q, X), strict=True)
    ]
    assert_equals_walk(evaluate(Q, X, gnd, ids=shuffled), rankings, gnd)
    assert_equals_walk(score_ranks(ranks_from_rankings(shuffled, gnd)), shuffled.tolist(), gnd)
    padded = np.concatenate([shuffled, np.full((3, 4), -1)], axis=1)
    assert_equals_walk(score_ranks(ranks_from_rankings(padded, gnd)), shuffled.tolist(), gnd)


def test_leave_one_out_with_labels_equals_the_walk() -> None:
    rng = np.random.default_rng(1)
    X, labels = unit(rng, 60, 5), rng.integers(6, size=60)
    gnd = [{"positive": np.flatnonzero((labels == label) & (np.arange(60) != i))} for i, label in enumerate(labels)]
    result = evaluate(X, X, gnd, LABELS, exclude=np.arange(60))
    rankings = [[i for i in row if i != query] for query, row in enumerate(brute_rankings(X, X))]
    assert_equals_walk(result, rankings, gnd, LABELS)
    ids = search(X, X, 20, exclude=np.arange(60))[1]
    assert_equals_walk(evaluate(X, X, gnd, LABELS, ids=ids, exclude=np.arange(60)), rankings, gnd, LABELS)


def test_queries_without_positives_are_not_counted() -> None:
    X, Q = unit(np.random.default_rng(2), 10, 4), unit(np.random.default_rng(3), 2, 4)
    junk = {"easy": [], "hard": [], "junk": list(range(10))}
    result = evaluate(Q, X, [junk, {"easy": list(range(10)), "hard": [], "junk": []}])
    assert result.queries == {"easy": 1, "medium": 1, "hard": 0}
    assert result.map["easy"] == result.mp["easy"][10] == pytest.approx(1)
    assert np.isnan(result.map["hard"])
    assert result.to_dict()["map"]["hard"] is None
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["ap"]["easy"] == [None, pytest.approx(1)]
    empty = evaluate(Q, X, [{"easy": [], "hard": [], "junk": []}] * 2)
    assert empty.queries == {"easy": 0, "medium": 0, "hard": 0}


def test_the_interval_resamples_whole_landmarks() -> None:
    """With ten landmarks of five equal queries each, the interval is that of ten values, not of fifty."""
    rng = np.random.default_rng(4)
    aps = rng.uniform(size=10)
    landmarks = np.repeat(np.arange(10), 5)
    ranks = [{"positive": np.array([int(100 * aps[landmark])])} for landmark in landmarks]
    wide = score_ranks(ranks, LABELS, clusters=landmarks)
    narrow = score_ranks(ranks, LABELS)
    low, high = wide.interval["all"]
    assert low < wide.map["all"] < high
    assert high - low > 1.5 * (narrow.interval["all"][1] - narrow.interval["all"][0])
    assert score_ranks(ranks, LABELS, clusters=landmarks).interval == wide.interval
    one_cluster = score_ranks(ranks, LABELS, clusters=np.zeros(50))
    assert np.isnan(one_cluster.interval["all"]).all()


def test_queries_with_common_positives_are_grouped_by_landmark() -> None:
    """An image may be easy for one query and hard for another, so the union of both is compared."""
    rng = np.random.default_rng(5)
    X, Q = unit(rng, 40, 6), unit(rng, 4, 6)
    sets = [((0, 1, 2), (3,)), ((3, 1), (0, 2, 9)), ((10, 11), (12,)), ((12,), (10, 30))]
    gnd = [{"easy": list(easy), "hard": list(hard), "junk": [20]} for easy, hard in sets]
    official = {"imlist": [], "qimlist": ["a_1", "b_1", "a_2", "b_2"], "gnd": gnd}
    expected = evaluate(Q, X, gnd, clusters=["a", "a", "k", "k"])
    assert group_by_landmark([(0, 1), (5,), (1, 0, 2), ()]) == [0, 1, 0, 3]
    for ground_truth in (official, SimpleNamespace(**official)):
        result = revisited_map(Q, X, ground_truth)
        assert result.map == expected.map
        assert result.interval == expected.interval


@pytest.mark.parametrize("name", ["roxford5k", "rparis6k"])
def test_scores_with_official_ground_truth_equal_the_walk(name: str) -> None:
    if not GND.is_dir():
        pytest.skip(f"the official ground truth does not exist ({GND})")
    from superglobal.data.revisited import load_ground_truth

    truth = load_ground_truth(GND / f"gnd_{name}.pkl")
    rng = np.random.default_rng(6)
    X, Q = unit(rng, len(truth.imlist), 16), unit(rng, len(truth.qimlist), 16)
    scores = Q.astype(np.float64) @ X.T.astype(np.float64)  # no ties among random vectors
    rankings = np.argsort(-scores, axis=1)
    result = revisited_map(Q, X, truth)
    assert_equals_walk(result, rankings.tolist(), truth.gnd)
    assert result.queries == {"easy": 68 if name == "roxford5k" else 70, "medium": 70, "hard": 70}
    ids = search(Q, X, 400)[1]
    reranked = rerank(Q, X, ids)[1]
    rankings[:, :400] = reranked
    assert_equals_walk(revisited_map(Q, X, truth, ids=reranked), rankings.tolist(), truth.gnd)


def test_errors_name_the_query() -> None:
    rng = np.random.default_rng(7)
    X, Q = unit(rng, 30, 6), unit(rng, 2, 6)
    good = {"easy": [1], "hard": [2], "junk": [3]}
    ids = search(Q, X, 5)[1]
    beyond = search(Q, X, 6)[1]
    not_top = np.concatenate([ids[:, :4], beyond[:, 5:]], axis=1)
    cases = [
        ([good], {}, "ground truth has 1 queries, but there are 2"),
        ([good, {**good, "junk": [2]}], {}, "query 1: image 2 is listed more than once"),
        ([good, {**good, "hard": [30]}], {}, "query 1: image 30 is outside the database of 30"),
        ([{**good, "hard": [-1]}, good], {}, "query 0: image -1 is outside"),
        ([good, {"hard": [2]}], {}, "query 1: expected a set 'easy'"),
        ("gnd.pkl", {}, "ground truth: expected"),
        ({"imlist": []}, {}, "ground truth: expected"),
        ([good, good], {"ids": not_top}, "query 0's shortlist is not the top 5"),
        ([good, good], {"ids": ids + 30}, "outside the database"),
        ([good, good], {"ids": ids[:, [0, 0]]}, "lists an id twice"),
        ([good, good], {"clusters": [1]}, "clusters: expected 2 labels, one per query"),
        ([good, good], {"ks": (0,)}, "ks"),
        ([good, good], {"exclude": [3, 9]}, "query 0: id 3 is excluded"),
    ]
    for ground_truth, options, message in cases:
        with pytest.raises(InputError, match=message):
            evaluate(Q, X, ground_truth, **options)
    for rankings, message in [
        (np.array([[1, 2], [1, 1]]), "query 1 lists an id twice"),
        (np.array([[1, 2], [-1, 1]]), "query 1 .* padding"),
        (np.array([[1, 2]]), r"integer array \(2, n\)"),
    ]:
        with pytest.raises(InputError, match=message):
            ranks_from_rankings(rankings, [good, good])


def test_the_interval_of_a_gain_resamples_whole_landmarks():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(6), [1, 2, 3, 4, 5, 6])
    gain = rng.normal(size=6)[labels] + 0.01 * rng.normal(size=len(labels))
    low, high = cluster_interval(gain, labels, seed=3, samples=4000)
    drawn = []
    for _ in range(4000):
        chosen = rng.integers(6, size=6)
        drawn.append(np.concatenate([gain[labels == landmark] for landmark in chosen]).mean())
    assert (low, high) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.06)
    # Queries of one landmark are not independent: resampling single queries would give a narrower interval.
    narrow = cluster_interval(gain, np.arange(len(gain)), seed=3)
    assert high - low > 1.2 * (narrow[1] - narrow[0])


def test_rankings_without_ids_contain_no_target():
    (ranks,) = ranks_from_rankings(np.zeros((1, 0), np.int64), [{"easy": [1], "hard": [], "junk": [2]}])
    assert ranks["easy"].tolist() == ranks["junk"].tolist() == [-1]
