"""Scores of every reranker and whitening through eval.py and `superglobal compare-rerankers`."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evaluations import BASE, QUIET, ROOT, mini, run
from hydra import compose, initialize_config_dir
from runs import environment
from sets import write_folders

import superglobal
from superglobal.config import register
from superglobal.data.revisited import revisited_set
from superglobal.errors import InputError
from superglobal.evaluation import compare_rerankers
from superglobal.reporting.tables import write_tables
from superglobal.reranking.query_expansion import augment_database, expand_queries
from superglobal.retrieval.store import DescriptorStore
from superglobal.retrieval.whitening import Whitening

SHORT = ("mutual", "kreciprocal", "diffusion")


def load_store(result: dict, title: str) -> DescriptorStore:
    """Open the store of descriptors that a result was computed from."""
    fingerprint = result["about"]["stores"][title]["fingerprint"]
    folders = (result["folder"].parent / "stores").glob(f"*-{title}-*")
    return next(s for s in map(DescriptorStore.open, folders) if s.fingerprint() == fingerprint)


def slow_leave_one_out(Q: np.ndarray, X: np.ndarray, labels: np.ndarray) -> float:
    """Compute the mAP with each image as a query among all others, by sorting."""
    aps = []
    for query, scores in enumerate(Q.astype(np.float64) @ X.astype(np.float64).T):
        order = [i for i in np.argsort(-scores, kind="stable") if i != query]
        hits = np.flatnonzero(labels[order] == labels[query])
        aps.append(np.mean([((j / r if r else 1.0) + (j + 1) / (r + 1)) / 2 for j, r in enumerate(hits)]))
    return float(np.mean(aps))


@pytest.mark.parametrize("kind", SHORT)
def test_shortlist_rerankers_score_like_the_public_functions(data, tmp_path, kind):
    got = run(tmp_path, *mini(data), f"rerank={kind}", "rerank.M=9")
    Q, X = load_store(got, "queries"), load_store(got, "database")
    ids = superglobal.search(Q, X, len(X))[1]
    ids = superglobal.rerank(Q, X, ids, 9, method=kind)[1]
    expected = superglobal.revisited_map(Q, X, revisited_set(data, "mini"), ids)
    assert got["metrics"]["rerank"]["map"] == pytest.approx(expected.map)
    assert got["config"]["rerank"]["kind"] == kind
    assert got["config"]["rerank"]["K"] == (5 if kind == "mutual" else None)
    np.testing.assert_array_equal(np.load(got["folder"] / "rankings.npz")["rerank_ids"], ids)


@pytest.mark.parametrize("kind", ["aqe", "adba"])
def test_rerankers_that_search_again_are_scored_over_the_whole_database(data, tmp_path, kind):
    """With k = 3, most images that change their rank are outside of the stored list."""
    got = run(tmp_path, *mini(data), f"rerank={kind}", "rerank.n=4", "k=3")
    Q, X = load_store(got, "queries"), load_store(got, "database")
    if kind == "aqe":
        Q = expand_queries(Q, X, 4, 3.0)
    else:
        X = augment_database(X, 4, 3.0)
    expected = superglobal.revisited_map(Q, X, revisited_set(data, "mini"))
    assert got["metrics"]["rerank"]["map"] == pytest.approx(expected.map)
    assert got["metrics"]["rerank"]["map"] != got["metrics"]["search"]["map"]
    saved = np.load(got["folder"] / "rankings.npz")
    assert saved["rerank_ids"].shape == (len(Q), 3)
    np.testing.assert_array_equal(saved["rerank_ids"], superglobal.search(Q, X, 3)[1])


@pytest.mark.parametrize("kind", ["aqe", "adba"])
def test_leave_one_out_with_rerankers_that_search_again_equals_brute_force(tmp_path, kind):
    photos = write_folders(tmp_path / "photos", landmarks=4, views=4)
    folder = ["dataset=folder", f"dataset.database={photos}", "dataset.labels=true"]
    got = run(tmp_path, *folder, f"rerank={kind}", "rerank.n=2")
    X = load_store(got, "database").block(0, 16)
    wide, near = X.astype(np.float64), X.astype(np.float64) @ X.astype(np.float64).T
    changed = np.empty_like(wide)
    for i in range(16):
        others = sorted((j for j in range(16) if j != i), key=lambda j, i=i: -near[i, j])[:2]
        total = wide[i] + sum(max(near[i, j], 0) ** 3 * wide[j] for j in others)
        changed[i] = total / np.linalg.norm(total)
    labels = np.repeat(np.arange(4), 4)
    expected = slow_leave_one_out(*((changed, wide) if kind == "aqe" else (wide, changed)), labels)
    assert got["metrics"]["rerank"]["map"]["all"] == pytest.approx(expected, abs=1e-9)


def test_zero_neighbors_keep_the_results_of_the_search(data, tmp_path):
    for kind in ("aqe", "adba"):
        got = run(tmp_path, *mini(data), f"rerank={kind}", "rerank.n=0")
        assert got["metrics"]["rerank"]["map"] == got["metrics"]["search"]["map"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rerank=aqe rerank.K=3", r"rerank\.K=3: aqe has no parameter K; choose from n, alpha"),
        ("rerank.k1=3", "superglobal has no parameter k1"),
        ("rerank.kind=magic", "expected one of superglobal, "),
        ("rerank=kreciprocal rerank.lambda_=1.1", r"rerank\.lambda_=1.1: expected a finite number in 0\.\.1"),
        ("rerank=diffusion rerank.alpha=1.0", "rerank.alpha=1.0: expected a finite number in 0..0.9999"),
        ("rerank=adba rerank.n=-1", r"rerank\.n=-1: expected an integer >= 0"),
        ("rerank.second=third", "rerank.second=third: expected one of refined, original"),
        ("whitening.kind=median", "expected one of none, center, pca"),
        ("whitening=center whitening.dims=3", "only PCA whitening has axes"),
        ("whitening=pca whitening.dims=0", "an integer >= 1"),
    ],
)
def test_invalid_settings_raise_errors_before_any_computation(data, tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, *mini(data), *override.split())
    assert not [*(tmp_path / "stores").glob("*/")]


def test_writing_out_a_default_does_not_change_the_configuration(data, tmp_path):
    plain, written = run(tmp_path, *mini(data)), run(tmp_path, *mini(data), "rerank.second=refined", "rerank.K=9")
    assert plain["config"]["rerank"] == written["config"]["rerank"]
    paper = run(tmp_path, *mini(data), "rerank=superglobal_paper")
    loaded = [np.load(r["folder"] / "rankings.npz")["rerank_scores"] for r in (plain, paper)]
    assert not np.array_equal(*loaded)


def test_the_table_shows_each_reranker_in_one_column(data, tmp_path):
    for option in ("none", "superglobal", "aqe"):
        run(tmp_path, *mini(data), f"rerank={option}")
    write_tables(tmp_path)
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["rerank"] for row in rows] == ["none", "superglobal M=400 K=9 beta=0.15", "aqe n=50 alpha=3.0"]
    assert not [column for column in rows[0] if column.startswith("rerank.")]


def test_whitening_is_fitted_on_all_searched_rows(data, tmp_path):
    with_noise = ["distractors=list", "distractors.name=noise"]
    plain = run(tmp_path, *mini(data), *with_noise, "rerank=none")
    got = run(tmp_path, *mini(data), *with_noise, "whitening=center", "rerank.M=9")
    Q = load_store(got, "queries").block(0, plain["counts"]["queries"]).astype(np.float64)
    X = np.concatenate(
        [load_store(got, title).block(0, len(load_store(got, title))) for title in ("database", "distractors")]
    )
    centered = [x - X.astype(np.float64).mean(axis=0) for x in (Q, X)]
    Q, X = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in centered)
    Q, X = Q.astype(np.float32), X.astype(np.float32)
    ids = superglobal.rerank(Q, X, superglobal.search(Q, X, len(X))[1], M=9)[1]
    for stage, order in (("search", None), ("rerank", ids)):
        expected = superglobal.revisited_map(Q, X, revisited_set(data, "mini"), order)
        assert got["metrics"][stage]["map"] == pytest.approx(expected.map)
    about = got["about"]["whitening"]
    assert (about["kind"], about["rows"]) == ("center", len(X))
    assert len(list((tmp_path / "stores").glob("whitening-*.npz"))) == 1
    without = run(tmp_path, *mini(data), "whitening=center")
    assert without["about"]["whitening"]["fingerprint"] != about["fingerprint"]
    assert got["metrics"]["search"]["map"] != plain["metrics"]["search"]["map"]


def test_user_provided_descriptors_are_whitened(tmp_path):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((60, 8)).astype(np.float32) + 1
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    for name, rows in (("q", X[:5]), ("x", X)):
        np.save(tmp_path / f"{name}.npy", rows)
    descriptors = [f"descriptors.query={tmp_path}/q.npy", f"descriptors.database={tmp_path}/x.npy"]
    got = run(tmp_path, "dataset=descriptors", *descriptors, "whitening=pca", "whitening.dims=4", "rerank=none")
    whitening = Whitening("pca", 4).fit(X)
    expected = superglobal.search(whitening.transform(X[:5]), whitening.transform(X), 60)[1]
    np.testing.assert_array_equal(np.load(got["folder"] / "rankings.npz")["search_ids"], expected)
    assert got["about"]["whitening"]["fingerprint"] is None


def compare(outputs: Path, *overrides: str, status: int = 0) -> str:
    """Run `superglobal compare-rerankers`, which must exit with `status`, and return its output."""
    base = [o for o in BASE if not o.startswith(("logger", "figures"))]
    command = [sys.executable, "-m", "superglobal", "compare-rerankers", *overrides]
    words = [*command, *base, *QUIET, f"paths.outputs={outputs}"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_compare_rerankers_evaluates_every_reranker(data, tmp_path):
    text = compare(tmp_path, *mini(data))
    (path,) = tmp_path.rglob("comparison.json")
    summary = json.loads(path.read_text())
    names = ["none", "superglobal", "superglobal_paper", "mutual", "gnn", "kreciprocal", "diffusion", "aqe", "adba"]
    assert [row["name"] for row in summary["rows"]] == names
    table = path.with_name("table.md").read_text().splitlines()
    assert len(table) == 2 + len(names)
    for row, line in zip(summary["rows"], table[2:], strict=True):
        single = run(tmp_path, *mini(data), f"rerank={row['name']}")
        assert single["about"]["extracted"] == {"database": 0, "queries": 0}
        last = list(single["metrics"].values())[-1]
        assert row["map"] == pytest.approx(last["map"])
        assert line.startswith(f"| {row['rerank']} | {100 * row['map']['easy']:.2f} |")
        assert row["rerank"] in text
        assert row["milliseconds"] > 0
        assert row["megabytes"] is None or row["megabytes"] >= 0
    gain = summary["rows"][3]["map"]["medium"] - summary["rows"][0]["map"]["medium"]
    assert summary["rows"][3]["gain"] == pytest.approx(gain)


def test_rerankers_accept_settings_and_options_of_a_config_folder(data, tmp_path):
    (tmp_path / "conf/rerank").mkdir(parents=True)
    (tmp_path / "conf/rerank/mine.yaml").write_text("kind: aqe\nn: 2\n")
    config_dir = ["--config-dir", str(tmp_path / "conf")]
    compare(tmp_path, *config_dir, *mini(data), 'rerankers=[mine,"superglobal K=3 beta=0.2"]')
    (path,) = tmp_path.rglob("comparison.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["rerank"] for row in rows] == ["aqe n=2 alpha=3.0", "superglobal M=400 K=3 beta=0.2"]
    single = run(tmp_path, *mini(data), "rerank.K=3", "rerank.beta=0.2")
    assert rows[1]["map"] == pytest.approx(single["metrics"]["rerank"]["map"])
    text = compare(tmp_path, *mini(data), 'rerankers=["aqe K=3"]', status=2)
    assert text.startswith("error: ")
    assert "aqe has no parameter K" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["index=flat_fp16"], "index=flat_fp16: rerankers are compared on an exact search"),
        (["rerankers=[none,magic]"], "there is no rerank=magic; expected one of adba, aqe, "),
        (['rerankers=["aqe K=3"]'], "aqe has no parameter K"),
        (['rerankers=["aqe n=many"]'], "'aqe n=many' is not a reranker"),
        (["rerankers=[]"], "expected at least one"),
        (["dataset=folder", "dataset.database=x", "dataset.query=y"], "dataset.labels=true"),
    ],
)
def test_invalid_comparisons_raise_input_errors(data, tmp_path, overrides, message):
    register()
    base = [word for word in BASE if not word.startswith(("logger", "figures"))]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("compare", overrides=[*base, *QUIET, *mini(data), *overrides, f"paths.outputs={tmp_path}"])
    with pytest.raises(InputError, match=re.escape(message)):
        compare_rerankers.compare(config, tmp_path, [ROOT / "conf"])
    assert not [*(tmp_path / "stores").glob("*/")]
