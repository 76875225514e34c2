"""Choice of a reranker on labeled queries."""

from __future__ import annotations

import numpy as np
import pytest
from vectors import clustered

from superglobal import InputError, search, tune_reranker
from superglobal.cli import main
from superglobal.tuning.reranker import _groups, positives_of_labels

FEW = ["--M", "50", "--sample", "30"]


def unit(x):
    """Normalize vectors to unit length."""
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def chains(n_groups, length=12, dim=64, seed=0):
    """Return vectors that drift from one end of their group to the other, and the group of each: graphs help here."""
    rng = np.random.default_rng(seed)
    ends = rng.standard_normal((2, n_groups, 1, dim))
    steps = np.linspace(0, 1, length)[:, None]
    X = (1 - steps) * ends[0] + steps * ends[1] + 0.7 * rng.standard_normal((n_groups, length, dim))
    return unit(X.reshape(-1, dim)), np.repeat(np.arange(n_groups), length)


def test_a_reranker_that_gains_on_new_queries_is_chosen():
    X, labels = chains(15)
    own, positives = positives_of_labels(labels, 60)
    choice = tune_reranker(X[own], X, positives, exclude=own, M=60)
    assert choice.best.method != "none"
    assert choice.best.settings.startswith(f"rerank={choice.best.method} ")
    assert "rerank.M=60" in choice.best.settings
    assert choice.interval[0] > 0
    assert choice.gain <= choice.candidates[1].map - choice.candidates[0].map + 1e-9
    assert choice.candidates[0].settings == "rerank=none"
    maps = [candidate.map for candidate in choice.candidates[1:]]
    assert maps == sorted(maps, reverse=True)
    assert choice.best.map == max(candidate.map for candidate in choice.candidates)


def test_no_reranking_is_chosen_if_labels_are_random():
    X, labels = chains(15)
    labels = np.random.default_rng(1).permutation(labels)
    own, positives = positives_of_labels(labels, 60)
    choice = tune_reranker(X[own], X, positives, exclude=own, M=60)
    assert choice.best is choice.candidates[0]
    assert choice.best.settings == "rerank=none"


def test_average_precisions_equal_those_of_a_full_sort():
    rng = np.random.default_rng(3)
    X, Q = clustered(rng, 50), clustered(rng, 10)
    positives = list(rng.permutation(50).reshape(10, 5))
    choice = tune_reranker(Q, X, positives, settings=[("none", {})], folds=2, M=10)
    plain = next(c for c in choice.candidates if not c.center)
    order = search(Q, X, 50)[1]
    for ap, ranking, rows in zip(plain.ap, order, positives, strict=True):
        ranks = np.flatnonzero(np.isin(ranking, rows))
        j = np.arange(5)
        before = np.where(ranks > 0, j / np.maximum(ranks, 1), 1)
        assert ap == pytest.approx(np.mean((before + (j + 1) / (ranks + 1)) / 2))


def test_the_command_reads_labels_or_pairs(tmp_path, capsys):
    X, labels = chains(20)
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "labels.txt").write_text("".join(f"place {label}\n" for label in labels))
    assert main(["tune-reranker", str(tmp_path / "x.npy"), "--labels", str(tmp_path / "labels.txt"), *FEW]) == 0
    assert "choice: rerank=" in capsys.readouterr().out
    np.save(tmp_path / "q.npy", X[::12])
    pairs = [f"{query},{row}" for query in range(20) for row in range(12 * query + 1, 12 * query + 12)]
    (tmp_path / "pairs.csv").write_text("\n".join(["query,database", *pairs]))
    words = ["--queries", str(tmp_path / "q.npy"), "--positives", str(tmp_path / "pairs.csv")]
    assert main(["tune-reranker", str(tmp_path / "x.npy"), *words, *FEW]) == 0
    assert "20 queries, 240 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("labels.txt", "a\nb\n", "2 labels for 24 images; write one label per line"),
        ("labels.txt", "\n".join(map(str, range(24))), "expected a label with two images"),
        ("labels.txt", "a\n" * 23 + "\n", "line 24: the label is empty"),
        ("pairs.csv", "query,image\n0,1\n", "expected the columns query and database"),
        ("pairs.csv", "query,database\n0,1.5\n", "line 2: expected two integers"),
        ("pairs.csv", "query,database\n0,1\n0,24\n", "line 3: query=0 database=24: expected query in 0..1 and"),
        ("pairs.csv", "query,database\n0,1\n", "the queries form 1 groups without common positives, and at least 10"),
    ],
)
def test_invalid_files_are_named(tmp_path, capsys, file, text, message):
    X, _ = chains(2)
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "q.npy", X[:2])
    (tmp_path / file).write_text(text)
    words = ["--labels", str(tmp_path / file)]
    if file == "pairs.csv":
        words = ["--queries", str(tmp_path / "q.npy"), "--positives", str(tmp_path / file)]
    assert main(["tune-reranker", str(tmp_path / "x.npy"), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": [("none", {}), ("aqe", {})]}, "aqe searches again"),
        ({"settings": [("none", {}), ("gnn", {"k1": 0})]}, "k1=0: expected an integer >= 1"),
        ({"settings": [("gnn", {})]}, r'expected \("none", {}\) among them'),
        ({"folds": 11}, "folds=11: expected an integer in 2..10"),
        ({"seed": -1}, "seed=-1: expected an integer >= 0"),
    ],
)
def test_invalid_options_raise_errors(options, message):
    X, labels = chains(10)
    own, positives = positives_of_labels(labels, 40)
    with pytest.raises(InputError, match=message):
        tune_reranker(X[own], X, positives, exclude=own, **options)


def test_queries_of_one_object_are_in_one_group():
    """Two images with one label are positives of each other, and have no positive in common."""
    own, positives = positives_of_labels(np.repeat(np.arange(12), 2), 24)
    groups = _groups([[*rows, i] for rows, i in zip(positives, own, strict=True)])
    np.testing.assert_array_equal(groups, np.repeat(np.arange(12), 2))
    chain = _groups([[0, 1], [1, 2], [3, 4], [2, 9], [5]])
    assert len(set(chain[[0, 1, 3]])) == 1
    assert len(set(chain)) == 3
