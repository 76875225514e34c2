"""Comparison of two results query by query: differences, counts, intervals, order and errors."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest

from superglobal.errors import InputError
from superglobal.metrics.revisited import cluster_interval
from superglobal.reporting.paired_comparison import read_comparison, write_comparison

LANDMARKS = [f"place{i // 2}" for i in range(8)]


def write(folder, medium, hard=None, stage="search", queries=8, kind="map"):
    """Write the files of a run that a comparison reads, and return its result."""
    folder.mkdir(parents=True)
    hard = medium if hard is None else hard
    lines = [f"query,landmark,{stage} medium AP,{stage} hard AP"]
    for i, (m, h) in enumerate(zip(medium, hard, strict=True)):
        lines.append(f"q{i},{LANDMARKS[i]},{'' if math.isnan(m) else repr(m)},{'' if math.isnan(h) else repr(h)}")
    (folder / "per_query.csv").write_text("\n".join(lines[: queries + 1]) + "\n")
    metrics = {kind: {"medium": 0.5, "hard": 0.5} if kind == "map" else {"all": 0.5}}
    return {"dataset": "d", "status": "ok", "metrics": {stage: metrics}, "config": {"seed": 3}}


@pytest.fixture
def pair(tmp_path):
    """Write two results; return the folder, the results and the scores."""
    scores = [0.5, 0.9, 0.2, 0.4, math.nan, 0.7, 0.1, 0.3]
    baseline_scores = [0.5, 0.4, 0.6, 0.3, 0.2, 0.75, 0.1 + 1e-13, 0.3]
    rows = write(tmp_path / "a", scores, stage="rerank"), write(tmp_path / "b", baseline_scores, stage="search")
    return tmp_path, rows, np.array(scores), np.array(baseline_scores)


def test_differences_counts_order_mean_and_interval_are_correct(pair):
    folder, (a, b), scores, baseline_scores = pair
    comparison = read_comparison(folder / "a", a, folder / "b", b)
    difference = scores - baseline_scores
    np.testing.assert_array_equal(comparison.difference(), difference)
    assert comparison.counts() == {"won": 2, "lost": 2, "equal": 3}
    assert comparison.main == "medium"
    order = comparison.order().tolist()
    assert order[:3] == [1, 3, 0]
    assert order[-1] == 4  # a query without a score comes last
    assert comparison.most_won(9) == [1, 3]
    assert comparison.most_lost(9) == [2, 5]
    assert comparison.most_lost(1) == [2]
    counted = ~np.isnan(difference)
    mean, interval = comparison.mean()
    assert mean == pytest.approx(difference[counted].mean())
    assert interval == cluster_interval(difference[counted], np.array(LANDMARKS)[counted], 3)


def test_the_table_lists_every_query_with_the_largest_gain_first(pair, capsys):
    folder, (a, b), *_ = pair
    comparison = read_comparison(folder / "a", a, folder / "b", b)
    write_comparison(folder / "out", comparison, folder / "a", folder / "b")
    with (folder / "out" / "queries.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["number"] for row in rows][:2] == ["1", "3"]
    assert len(rows) == 8
    assert rows[0] == {
        "number": "1",
        "query": "q1",
        "landmark": "place0",
        "baseline medium AP": "40.00",
        "medium AP": "90.00",
        "difference": "+50.00",
        "hard difference": "+50.00",
    }
    assert rows[-1]["difference"] == "-"
    text = (folder / "out" / "queries.md").read_text()
    assert "| medium | 7 | 2 | 2 | 3 |" in text
    assert "| q1 |" in text
    printed = capsys.readouterr().out
    assert printed.index("most won") < printed.index("most lost")
    assert "+50.00" in printed


def test_swapping_the_results_negates_the_differences(pair):
    folder, (a, b), *_ = pair
    comparison, swapped = (
        read_comparison(folder / "a", a, folder / "b", b),
        read_comparison(folder / "b", b, folder / "a", a),
    )
    np.testing.assert_array_equal(comparison.difference(), -swapped.difference())
    assert (comparison.counts()["won"], comparison.counts()["lost"]) == (
        swapped.counts()["lost"],
        swapped.counts()["won"],
    )


def test_recognition_is_compared_by_correct_predictions(tmp_path):
    rows = []
    for name, correct in (("a", "1011"), ("b", "0111")):
        row = write(tmp_path / name, [0.5] * 8, kind="GAP")
        lines = ["query,landmark,search class,search score,search correct"]
        lines += [f"q{i},l{i},7,0.5,{v}" for i, v in enumerate(correct)]
        (tmp_path / name / "per_query.csv").write_text("\n".join(lines) + "\n")
        rows.append(row)
    comparison = read_comparison(tmp_path / "a", rows[0], tmp_path / "b", rows[1])
    assert comparison.measure == "correct"
    assert comparison.counts() == {"won": 1, "lost": 1, "equal": 2}


def test_results_that_cannot_be_compared_raise_errors(pair):
    folder, (a, _), *_ = pair
    short = write(folder / "short", [0.5] * 8, queries=5)
    recognition = write(folder / "gap", [0.5] * 8, kind="GAP")
    with pytest.raises(InputError, match="different queries"):
        read_comparison(folder / "a", a, folder / "short", short)
    with pytest.raises(InputError, match=r"a has the metric mAP, and .*gap has GAP: the results are not comparable"):
        read_comparison(folder / "a", a, folder / "gap", recognition)
    labels = write(folder / "labels", [0.5] * 8)
    labels["metrics"] = {"search": {"map": {"all": 0.5}}}
    path = folder / "labels" / "per_query.csv"
    path.write_text(path.read_text().replace("search medium AP,search hard AP", "search all AP,search some AP"))
    with pytest.raises(
        InputError,
        match=r"a has the protocols medium, hard, and .*labels has all, some: the results are not comparable",
    ):
        read_comparison(folder / "a", a, folder / "labels", labels)
    with pytest.raises(InputError, match="no scores per query"):
        read_comparison(folder / "a", a, folder / "short", short | {"metrics": {}})
    (folder / "short" / "per_query.csv").write_text("nonsense")
    with pytest.raises(InputError, match=r"short/per_query\.csv: missing or damaged"):
        read_comparison(folder / "a", a, folder / "short", short)
