"""GLDv2 metrics compared to the organizers' numeric cases (delf, metrics_test.py) and to loops by definition."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superglobal.errors import InputError
from superglobal.metrics.gldv2 import average_precision_at, first_hits, score_rankings, score_recognition, vote

# Last two digits of the index images fedcba98765432xx of the organizers' cases; the first query has no prediction.
RELEVANT = [[10, 20], [10], [30, 40, 50], [30]]
PREDICTED = [[], [0, 10], [40], [30, 40]]


def arrays(lists):
    """Return every list as an integer array."""
    return [np.array(values, np.int64) for values in lists]


def test_retrieval_metrics_equal_the_organizers_cases():
    whole = score_rankings(arrays(PREDICTED), arrays(RELEVANT))
    assert whole.map["all"] == pytest.approx(0.458333, abs=1e-6)
    assert whole.position["all"] == {"mean": 26.25, "median": 1.5}
    first = score_rankings(arrays(PREDICTED), arrays(RELEVANT), depth=1)
    assert first.map["all"] == pytest.approx(0.5)
    assert first.position["all"] == {"mean": 1.5, "median": 1.5}
    two = score_rankings(arrays(PREDICTED), arrays(RELEVANT), depth=2, ks=(1, 2))
    assert two.precision["all"] == {1: pytest.approx(0.5), 2: pytest.approx(0.375)}


def test_recognition_metrics_equal_the_organizers_cases():
    keys = np.array([f"0{i}23456789abcdef".encode() for i in range(1, 6)])
    truth = arrays([[0, 12], [100, 200, 300], [1], [], []])
    classes, scores = np.array([-1, 0, 1, 150, -1]), np.array([np.nan, 0.01, 10.0, 15.0, np.nan])
    result = score_recognition(classes, scores, truth, keys)
    assert result.gap["all"] == pytest.approx(0.166667, abs=1e-6)
    assert result.gap_landmarks_only["all"] == pytest.approx(0.333333, abs=1e-6)
    assert result.top1["all"] == pytest.approx(0.333333, abs=1e-6)
    assert (result.queries, result.with_landmark) == ({"all": 5}, {"all": 3})
    assert result.correct.tolist() == [False, False, True, False, False]


def mean_ap(predicted, relevant, depth):
    """Compute the mAP by its definition, image by image."""
    total = 0.0
    for ranking, truth in zip(predicted, relevant, strict=True):
        seen, correct, ap = set(), 0, 0.0
        for rank, image in enumerate(ranking[:depth], 1):
            if image in truth and image not in seen:
                correct += 1
                ap += correct / rank
            seen.add(image)
        total += ap / min(len(truth), depth)
    return total / len(relevant)


rankings = st.lists(st.tuples(st.lists(st.integers(0, 30), max_size=40), st.sets(st.integers(0, 30), min_size=1)))


@given(rankings.filter(len), st.integers(1, 25))
@settings(deadline=None)
def test_scores_of_ranked_lists_equal_those_of_loops(cases, depth):
    predicted, relevant = [ranking for ranking, _ in cases], [sorted(truth) for _, truth in cases]
    result = score_rankings(arrays(predicted), arrays(relevant), depth=depth, ks=range(1, depth + 1), samples=1)
    assert result.map["all"] == pytest.approx(mean_ap(predicted, relevant, depth), abs=1e-12)
    assert result.ap["all"].mean() == pytest.approx(result.map["all"])
    for k in range(1, depth + 1):
        precisions = [len({*ranking[:k]} & {*truth}) / k for ranking, truth in zip(predicted, relevant, strict=True)]
        assert result.precision["all"][k] == pytest.approx(np.mean(precisions), abs=1e-12)
    first = [
        next((rank for rank, image in enumerate(ranking[:depth], 1) if image in truth), depth + 1)
        for ranking, truth in zip(predicted, relevant, strict=True)
    ]
    assert result.position["all"] == {"mean": pytest.approx(np.mean(first)), "median": np.median(first)}


def test_average_precision_counts_at_most_100_relevant_images():
    relevant = np.arange(300)
    assert average_precision_at(first_hits(relevant, relevant), 300) == pytest.approx(1)
    assert average_precision_at(first_hits(relevant[:50], relevant), 300) == pytest.approx(0.5)
    late = np.concatenate([np.arange(1000, 1100), relevant])
    assert average_precision_at(first_hits(late, relevant), 300) == 0


def test_duplicates_take_a_rank_but_are_not_hits():
    assert first_hits(np.array([7, 7, 5, 7, 5]), np.array([5, 7])).tolist() == [True, False, True, False, False]
    assert average_precision_at(np.array([True, False, True]), 2) == pytest.approx((1 + 2 / 3) / 2)


def test_parts_are_scored_over_their_queries_with_intervals_over_landmarks():
    rng = np.random.default_rng(0)
    predicted, relevant = [rng.permutation(60)[:30] for _ in range(24)], [rng.permutation(60)[:4] for _ in range(24)]
    public = np.arange(24) < 9
    parts = {"public": public, "private": ~public, "all": np.ones(24, bool), "none": np.zeros(24, bool)}
    landmarks = [f"place{i // 3}" for i in range(24)]
    result = score_rankings(predicted, relevant, parts, landmarks)
    assert result.queries == {"public": 9, "private": 15, "all": 24, "none": 0}
    for name in ("public", "private", "all"):
        chosen = np.flatnonzero(parts[name])
        alone = score_rankings([predicted[i] for i in chosen], [relevant[i] for i in chosen])
        assert result.map[name] == pytest.approx(alone.map["all"])
        assert result.position[name] == alone.position["all"]
        low, high = result.interval[name]
        assert low < result.map[name] < high
    assert result.interval["all"] != score_rankings(predicted, relevant).interval["all"]
    empty = result.to_dict()
    assert empty["mAP@100"]["none"] is empty["position"]["none"]["mean"] is empty["interval"]["none"][0] is None


def test_rankings_without_a_solution_raise_errors():
    with pytest.raises(InputError, match="query 1 has no relevant image"):
        score_rankings(arrays([[1], [1]]), arrays([[1], []]))
    with pytest.raises(InputError, match="one list per query of the solution, 1, got 2"):
        score_rankings(arrays([[1], [1]]), arrays([[1]]))


def global_ap(predictions, truth, ignore):
    """Compute the global AP by its definition, over predictions sorted by score, then key."""
    gap, total, correct = 0.0, 0, 0
    for key, (label, score) in sorted(predictions.items(), key=lambda item: (-item[1][1], item[0])):
        del score
        if ignore and not truth[key]:
            continue
        total += 1
        if label in truth[key]:
            correct += 1
            gap += correct / total
    return gap / sum(bool(landmarks) for landmarks in truth.values())


@given(st.integers(0, 10**6), st.integers(1, 40))
@settings(deadline=None)
def test_recognition_scores_equal_those_of_loops(seed, count):
    rng = random.Random(seed)
    keys = [f"{rng.getrandbits(64):016x}" for _ in range(count)]
    truth = {key: [*{rng.randrange(3) for _ in range(rng.randrange(3))}] for key in keys}
    truth[keys[0]] = truth[keys[0]] or [1]
    # There are few distinct scores, so many are equal.
    predictions = {key: (rng.randrange(3), rng.randrange(4) / 3) for key in keys if rng.random() < 0.7}
    classes = np.array([predictions.get(key, (-1,))[0] for key in keys])
    scores = np.array([predictions.get(key, (-1, np.nan))[1] for key in keys])
    images = np.array([key.encode() for key in keys])
    result = score_recognition(classes, scores, arrays([truth[key] for key in keys]), images)
    assert result.gap["all"] == pytest.approx(global_ap(predictions, truth, False), abs=1e-12)
    assert result.gap_landmarks_only["all"] == pytest.approx(global_ap(predictions, truth, True), abs=1e-12)
    with_landmark = [key for key in keys if truth[key]]
    correct = sum(key in predictions and predictions[key][0] in truth[key] for key in with_landmark)
    assert result.top1["all"] == pytest.approx(correct / len(with_landmark))


def test_a_part_without_landmarks_has_no_score():
    parts = {"public": np.array([False, True])}
    keys, scores = np.array([b"a", b"b"]), np.array([1.0, 2.0])
    result = score_recognition(np.array([1, 1]), scores, arrays([[1], []]), keys, parts)
    assert result.to_dict()["GAP"] == result.to_dict()["top1"] == {"public": None}


@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from(["similarity", "distance"]))
@settings(deadline=None)
def test_the_class_with_the_highest_sum_wins(seed, k, votes):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, (7, k))
    scores = -np.sort(-rng.integers(-8, 9, (7, k)) / 8, axis=1)
    classes, sums = vote(labels, scores, votes)
    for query in range(7):
        totals: dict[int, float] = {}
        for label, score in zip(labels[query].tolist(), scores[query].tolist(), strict=True):
            totals[label] = totals.get(label, 0) + (score if votes == "similarity" else 2 * score - 1)
        best = max(totals.values())
        # Of equal sums, the class that occurs first wins; its image is nearer.
        assert classes[query] == next(label for label, total in totals.items() if total == best)
        assert sums[query] == pytest.approx(best)


def test_votes_nearest_uses_only_the_nearest_neighbor():
    classes, sums = vote(np.array([[3, 5, 5]]), np.array([[0.5, 0.4, 0.4]]), "nearest")
    assert (classes.tolist(), sums.tolist()) == ([3], [0.5])
    assert vote(np.array([[3, 5, 5]]), np.array([[0.5, 0.4, 0.4]]))[0].tolist() == [5]


def test_a_vote_without_neighbors_is_an_error():
    with pytest.raises(InputError, match="with k >= 1"):
        vote(np.zeros((2, 0), int), np.zeros((2, 0)))
