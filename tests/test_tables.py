"""Tables of many runs: baselines, gains with intervals over the same queries, and all file formats."""

from __future__ import annotations

import csv
import functools
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from superglobal.errors import InputError
from superglobal.metrics.revisited import cluster_interval
from superglobal.reporting.results import FORMAT
from superglobal.reporting.table_rows import _name_and_variant
from superglobal.reporting.tables import write_tables

ROOT = Path(__file__).parents[1]

LANDMARKS = [f"place{i // 3}" for i in range(12)]


def write(folder, weights, label, ap):
    """Write the files of a run that the table reads."""
    folder.mkdir(parents=True)
    score = float(np.mean(ap))
    stage = {
        "map": {"easy": 0.1, "medium": score, "hard": None},
        "interval": {"easy": [0.0, 0.2], "medium": [score - 0.1, score + 0.1], "hard": [None, None]},
        "mp": {name: {"1": 0.5, "5": 0.5, "10": 0.25} for name in ("easy", "medium", "hard")},
    }
    row = {"format": FORMAT, "ablation": label, "dataset": "d", "weights": weights, "status": "ok"}
    row |= {"metrics": {"search": stage}, "config": {"seed": 0, "ablation": label, "weights": weights}}
    (folder / "results.json").write_text(json.dumps(row))
    lines = ["query,landmark,search medium AP"]
    lines += [f"q{i},{landmark},{value!r}" for i, (landmark, value) in enumerate(zip(LANDMARKS, ap, strict=True))]
    (folder / "per_query.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def runs(tmp_path):
    """Write four runs; return their folder and their scores."""
    rng = np.random.default_rng(0)
    scores = {}
    # The order of jobs differs from that of ablations and networks, and job 10 comes after job 9.
    for number, (weights, label) in enumerate([("a", "relup"), ("b", "gem"), ("a", "gem"), ("b", "relup")], 8):
        scores[weights, label] = rng.uniform(0.2, 0.8, 12).tolist()
        write(tmp_path / f"{number}_job", weights, label, scores[weights, label])
    return tmp_path, scores


def test_every_network_has_its_own_ablations_and_baseline(runs):
    folder, scores = runs
    write_tables(folder)
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["weights"], row["run"]) for row in rows] == [
        ("a", "gem"),
        ("a", "relup"),
        ("b", "gem"),
        ("b", "relup"),
    ]
    for row in rows:
        ap, base = (np.array(scores[row["weights"], label]) for label in (row["run"], "gem"))
        assert float(row["medium"]) == pytest.approx(100 * ap.mean(), abs=0.006)
        assert float(row["gain"]) == pytest.approx(100 * (ap - base).mean(), abs=0.006)
        if row["run"] == "relup":
            low, high = cluster_interval(ap - base, np.array(LANDMARKS))
            assert row["95 % gain"] == f"{100 * low:+.1f} to {100 * high:+.1f}"
        assert row["hard"] == "-"


def test_trainings_are_shown_by_name_if_it_is_unique(tmp_path):
    for number, name in enumerate(("one", "two")):
        write(tmp_path / str(number), f"outputs/train/{name}/best.safetensors", "gem", [0.5] * 12)
    write_tables(tmp_path)
    assert [line.split(",")[1] for line in (tmp_path / "table.csv").read_text().splitlines()[1:]] == ["one", "two"]
    write(tmp_path / "2", "elsewhere/train/two/best.safetensors", "gem", [0.5] * 12)
    write_tables(tmp_path)
    assert "elsewhere/train/two/best.safetensors" in (tmp_path / "table.csv").read_text()


def test_a_run_without_scores_per_query_is_named(runs):
    folder, _ = runs
    (folder / "9_job" / "per_query.csv").unlink()
    with pytest.raises(InputError, match=r"9_job/per_query\.csv: missing"):
        write_tables(folder)


def test_metrics_of_different_datasets_have_separate_columns(runs):
    folder, _ = runs
    scores = {"all": 0.5, "public": None}
    ranked = {
        "mAP@100": scores,
        "interval": {"all": [0.4, 0.6], "public": [None] * 2},
        "precision": {"all": {"10": 0.3}},
    }
    recognition = {
        "GAP": {"all": 0.25},
        "GAP_landmarks_only": {"all": 0.4},
        "top1": {"all": 0.75},
        "queries": {"all": 9},
    }
    for number, (name, stage) in enumerate((("index", ranked), ("landmarks", recognition))):
        run = folder / f"{20 + number}_job"
        write(run, "a", "", [0.5] * 12)
        row = json.loads((run / "results.json").read_text()) | {"dataset": name, "metrics": {"search": stage}}
        (run / "results.json").write_text(json.dumps(row))
        text = (run / "per_query.csv").read_text()
        (run / "per_query.csv").write_text(text.replace("search medium AP", "search all AP"))
    write_tables(folder)
    with (folder / "table.csv").open() as file:
        by_dataset = {row["data set"]: row for row in csv.DictReader(file)}
    assert by_dataset["index"]["mAP@100 all"] == "50.00"
    assert by_dataset["index"]["95 % mAP@100 all"] == "40.0-60.0"
    assert (by_dataset["index"]["P@10 all"], by_dataset["index"]["mAP@100 public"]) == ("30.0", "-")
    assert (by_dataset["landmarks"]["GAP all"], by_dataset["landmarks"]["top-1 all"]) == ("25.00", "75.00")
    assert (
        by_dataset["index"]["medium"] == by_dataset["index"]["GAP all"] == by_dataset["landmarks"]["mAP@100 all"] == ""
    )
    assert by_dataset["d"]["mAP@100 all"] == ""
    assert (by_dataset["landmarks"]["gain"], by_dataset["landmarks"]["95 % gain"]) == ("+0.00", "")
    assert "all" not in by_dataset["index"]


PROTOCOLS = ("easy", "medium", "hard")
SWITCHED = ("gem_plus", "regional", "scale", "relup")


def job(folder, aps, *, dataset="d", distractors=None, label="", status="ok", milliseconds=2.0, about=None, **settings):
    """Write the files of a run: AP by protocol (None without metrics) and settings, with __ for dots in names."""
    folder.mkdir(parents=True)
    config = {"seed": 0, "ablation": label, "weights": "w", "pooling": {}, "rerank": {"enabled": False}}
    config |= {"dataset": {"name": dataset}, "distractors": {"name": distractors}}
    for key, value in settings.items():
        group, _, name = key.rpartition("__")
        (config.setdefault(group, {}) if group else config)[name] = value
    row = {"format": FORMAT, "ablation": label, "weights": "w", "status": status, "config": config, "metrics": {}}
    row["dataset"] = dataset + (f"+{distractors}" if distractors else "")
    row |= {"counts": {"queries": len(LANDMARKS)}, "about": about or {}}
    if aps is not None:
        stage = {
            "map": {name: float(np.mean(ap)) for name, ap in zip(PROTOCOLS, aps, strict=True)},
            "interval": {name: [0.0, 1.0] for name in PROTOCOLS},
        }
        row |= {"metrics": {"search": stage}, "seconds": {"search": milliseconds * len(LANDMARKS) / 1000, "score": 9.0}}
        lines = ["query,landmark," + ",".join(f"search {name} AP" for name in PROTOCOLS)]
        lines += [f"q{i},{LANDMARKS[i]},{','.join(str(float(ap[i])) for ap in aps)}" for i in range(len(LANDMARKS))]
        (folder / "per_query.csv").write_text("\n".join(lines) + "\n")
    (folder / "results.json").write_text(json.dumps(row))


def rows_of(path):
    """Read the rows of a CSV file."""
    with path.open() as file:
        return list(csv.DictReader(file))


def latex_cells(path, tabular=0):
    """Return the cells of a LaTeX table row by row, without its rules."""
    text = path.read_text().split(r"\begin{tabular}")[tabular + 1].split(r"\end{tabular}")[0]
    text = re.sub(r"\\(toprule|midrule|bottomrule|cmidrule\(lr\)\{[\d-]+\})", "", text.split("\n", 1)[1])
    rows = [row.strip() for row in re.split(r"\\\\(?=\n)", text)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)&", row)] for row in rows if row]


def test_a_dataset_and_its_distractors_share_one_table(tmp_path, capsys):
    rng = np.random.default_rng(1)
    scores = {}
    for number, (k, distractors) in enumerate([(3, None), (3, "big_set"), (5, None), (5, "big_set"), (7, None)]):
        aps = scores[k, distractors] = rng.uniform(0.2, 0.8, (3, 12))
        job(tmp_path / f"{number}_job", aps, distractors=distractors, milliseconds=k, rerank__K=k)
    job(tmp_path / "5_job", None, distractors="big_set", status="failed", rerank__K=7)
    job(tmp_path / "6_job", rng.uniform(0, 1, (3, 12)), dataset="other", rerank__K=3)
    write_tables(tmp_path)
    assert {path.name for path in tmp_path.glob("table-*")} == {
        f"table-{name}.{kind}" for name in ("d", "other") for kind in ("csv", "md", "tex")
    }
    rows = rows_of(tmp_path / "table-d.csv")
    assert [row["rerank.K"] for row in rows] == ["3", "5", "7"]
    for row, k in zip(rows, (3, 5, 7), strict=True):
        for variant, distractors in (("", None), (" +big_set", "big_set")):
            if (k, distractors) not in scores:
                assert row[f"hard{variant}"] == "failed"
                continue
            for i, name in enumerate(PROTOCOLS):
                ap, base = scores[k, distractors][i], scores[3, distractors][i]
                assert float(row[f"{name}{variant}"]) == pytest.approx(100 * ap.mean(), abs=0.006)
                gain = row[f"gain {name}{variant}"]
                assert gain == "" if k == 3 else float(gain) == pytest.approx(100 * (ap - base).mean(), abs=0.006)
            assert float(row[f"ms per query{variant}"]) == pytest.approx(k)
            if k != 3:
                low, high = cluster_interval(scores[k, distractors][1] - scores[3, distractors][1], np.array(LANDMARKS))
                assert row[f"95 % gain medium{variant}"] == f"{100 * low:+.1f} to {100 * high:+.1f}"
    text = (tmp_path / "table-d.md").read_text()
    assert f"{rows[1]['hard +big_set']} ({rows[1]['gain hard +big_set']})" in text
    cells = latex_cells(tmp_path / "table-d.tex")
    assert cells[0] == ["", r"\multicolumn{5}{c}{d}", r"\multicolumn{5}{c}{+big\_set}"]
    assert len({len(row) for row in cells[1:]}) == 1
    assert cells[3][3].startswith(r"\textbf{") == (rows[1]["hard"] == max(row["hard"] for row in rows))
    output = capsys.readouterr().out
    assert all(value in output for row in rows for name in PROTOCOLS if (value := row[f"{name} +big_set"]))


def test_unreadable_images_make_another_data_set_and_skipped_distractors_a_variant():
    def split(dataset, distractors):
        return _name_and_variant({"dataset": dataset, "config": {"distractors": {"name": distractors}}})

    assert split("d+more (2 unreadable) (3 skipped)", "more") == ("d (2 unreadable)", "+more (3 skipped)")
    assert split("d (2 unreadable)", None) == ("d (2 unreadable)", "")


def test_names_are_escaped_in_latex_and_markdown(tmp_path):
    name = r"50% of_a & b|c #1 {x} ~^\ --"
    for number, k in enumerate((3, 5)):
        job(tmp_path / f"{number}_job", np.full((3, 12), 0.5), dataset=name, rerank__K=k, rerank__kind=f"{name}{k}")
    write_tables(tmp_path)
    (path,) = tmp_path.glob("table-*.tex")
    assert re.fullmatch(r"table-[\w.-]+\.tex", path.name)
    cell_text = next(cell for cell in latex_cells(path)[-1] if "x\\}" in cell)
    assert (
        cell_text == r"50\% of\_a \& b\textbar{}c \#1 \{x\} \textasciitilde{}\textasciicircum{}\textbackslash{} -{}-5"
    )
    plain = path.with_suffix(".md").read_text().splitlines()
    assert len({len(re.split(r"(?<!\\)\|", line)) for line in plain if line.startswith("|")}) == 1


def factorial(folder, jobs, **more):
    """Write runs of a factorial and return their scores by state."""
    rng, scores = np.random.default_rng(2), {}
    for number, state in enumerate(jobs):
        scores[state] = rng.uniform(0.2, 0.8, (3, 12))
        settings = {f"pooling__{name}": value for name, value in zip(SWITCHED, state[:4], strict=True)}
        job(folder / f"{number}_job", scores[state], **settings, rerank__enabled=state[4], **more)
    return scores


def test_a_full_factorial_shows_the_main_effect_of_each_module(tmp_path):
    states = list(itertools.product((False, True), repeat=5))
    scores = factorial(tmp_path, states)
    write_tables(tmp_path)
    rows = rows_of(tmp_path / "table-d.csv")
    assert len(rows) == 32 + 5
    assert [tuple(row[name] == "on" for name in (*SWITCHED, "rerank")) for row in rows[:32]] == states
    for row, module in zip(rows[32:], (*SWITCHED, "rerank"), strict=True):
        assert row["effect of"] == module
        position = (*SWITCHED, "rerank").index(module)
        pairs = [(state, (*state[:position], False, *state[position + 1 :])) for state in states if state[position]]
        difference = np.mean([scores[on] - scores[off] for on, off in pairs], axis=0)
        for i, name in enumerate(PROTOCOLS):
            assert float(row[f"gain {name}"]) == pytest.approx(100 * difference[i].mean(), abs=0.006)
        low, high = cluster_interval(difference[1], np.array(LANDMARKS))
        assert row["95 % gain medium"] == f"{100 * low:+.1f} to {100 * high:+.1f}"
    assert [row[0] for row in latex_cells(tmp_path / "table-d.tex", 1)] == [
        "module", "gem\\_plus", "regional", "scale", "relup", "rerank",
    ]  # fmt: skip
    assert "mean of 16 pairs" in (tmp_path / "table-d.md").read_text()
    chart = Image.open(tmp_path / "chart.png")
    assert min(chart.size) > 600
    assert np.asarray(chart).std() > 20
    assert (tmp_path / "chart.png").stat().st_size < 200_000


def test_additional_runs_do_not_change_the_effects_of_a_full_factorial(tmp_path):
    states = [(*state, False, False, False) for state in itertools.product((False, True), repeat=2)]
    factorial(tmp_path / "whole", states)
    factorial(tmp_path / "more", [*states, (True, True, False, "reference_off", False)])
    write_tables(tmp_path / "whole")
    write_tables(tmp_path / "more")
    whole, more = (rows_of(tmp_path / name / "table-d.csv") for name in ("whole", "more"))
    assert len(whole) == 4 + 2
    assert [row for row in more if row["effect of"]] == whole[4:]


def test_metrics_without_queries_are_shown_as_a_dash(tmp_path):
    for number, label in enumerate(("gem", "relup")):
        write(tmp_path / f"{number}_job", "a", label, [0.5] * 12)
        result, scores = (tmp_path / f"{number}_job" / name for name in ("results.json", "per_query.csv"))
        row = json.loads(result.read_text())
        row["metrics"]["search"]["map"]["medium"] = None
        row["metrics"]["search"]["interval"]["medium"] = [None, None]
        result.write_text(json.dumps(row))
        scores.write_text(scores.read_text().replace(",0.5\n", ",\n"))
    write_tables(tmp_path)
    for row in rows_of(tmp_path / "table.csv"):
        assert [row[name] for name in ("medium", "95 % medium", "gain", "95 % gain")] == ["-", "-", "-", ""]
    assert "nan" not in (tmp_path / "table-d.md").read_text()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"[]", "missing, damaged, or not a result of eval.py"),
        (b"\xff", "missing, damaged, or not a result of eval.py"),
        (b"[" * 100_000, "missing, damaged, or not a result of eval.py"),
        (b'{"format": "other"}', "format 'other', expected"),
        (b'{"format": "%s", "ablation": ""}' % FORMAT.encode(), "damaged, the keys dataset, weights"),
    ],
)
def test_a_damaged_result_is_named(runs, text, reason):
    folder, _ = runs
    (folder / "9_job" / "results.json").write_bytes(text)
    with pytest.raises(InputError, match=re.escape(f"9_job/results.json: {reason}")):
        write_tables(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"metrics": [1]},
        {"metrics": {"search": {"map": {"medium": "high"}}}},
        {"metrics": {"search": {"map": {"medium": 61.1}}}},
        {"metrics": {"search": {"speed": {}}}},
        {"config": {"rerank": "all"}},
        {"config": functools.reduce(lambda inner, _: {"a": inner}, range(900), {})},
        {"counts": 3},
        {"dataset": ["a"]},
    ],
)
def test_a_manipulated_result_is_named(runs, change):
    folder, _ = runs
    path = folder / "9_job" / "results.json"
    valid = next(other for other in folder.glob("*/results.json") if other != path)
    path.write_text(json.dumps({**json.loads(valid.read_text()), **change}))
    with pytest.raises(InputError, match=r"9_job/results\.json: missing, damaged, or not a result"):
        write_tables(folder)


def test_an_incomplete_factorial_has_no_effects(tmp_path):
    factorial(tmp_path, list(itertools.product((False, True), repeat=5))[:-1])
    write_tables(tmp_path)
    assert len(rows_of(tmp_path / "table-d.csv")) == 31
    assert "main effects" not in (tmp_path / "table-d.md").read_text()


def test_several_folders_are_compared_in_one_table(tmp_path):
    for name in ("one", "two"):
        job(tmp_path / name / "deep" / "run", np.full((3, 12), 0.4 if name == "one" else 0.6), rerank__K=3)
    done = subprocess.run(
        [sys.executable, "-m", "superglobal", "report", str(tmp_path / "one"), str(tmp_path / "two")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "one" / "table-d.csv")
    assert [(row["run"], row["medium"]) for row in rows] == [("one/deep/run", "40.00"), ("two/deep/run", "60.00")]
    assert rows[1]["gain medium"] == "+20.00"
    assert not list((tmp_path / "two").glob("*.csv"))


def test_tables_of_a_dataset_name_its_metric(tmp_path):
    for number, k in enumerate((3, 5)):
        run = tmp_path / f"{number}_job"
        job(run, np.full((3, 12), 0.5), dataset="index", rerank__K=k)
        row = json.loads((run / "results.json").read_text())
        row["metrics"] = {"search": {"GAP": {"all": 0.25 + 0.1 * number}}}
        (run / "results.json").write_text(json.dumps(row))
    write_tables(tmp_path)
    first, second = rows_of(tmp_path / "table-index.csv")
    assert (first["GAP all"], second["GAP all"], second["gain GAP all"]) == ("25.00", "35.00", "+10.00")
    assert second["95 % gain GAP all"] == ""


def test_relup_is_not_marked_for_a_network_without_it(tmp_path):
    rng = np.random.default_rng(5)
    for label, resolved in (("gem", "off"), ("scale", "off"), ("relup", "on"), ("rerank", "off")):
        about = {"network": {"pooling": {"relup": resolved}}}
        job(tmp_path / label, [rng.uniform(0.2, 0.8, 12) for _ in PROTOCOLS], label=label, about=about)
    write_tables(tmp_path)
    rows = {row["run"]: row for row in rows_of(tmp_path / "table-d.csv")}
    marked = {name for name, row in rows.items() if row["relup"] not in ("", "off", "False", "-")}
    assert marked == {"relup"}, rows


def test_a_row_that_does_not_apply_has_the_weights_of_the_others_and_a_reason_below_the_table(tmp_path, capsys):
    rng = np.random.default_rng(1)
    for label in ("gem", "rerank"):
        job(tmp_path / label, rng.uniform(0, 1, (3, 12)), label=label)
    job(tmp_path / "relup", None, label="relup", status="n/a")
    path = tmp_path / "relup" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": None, "reason": "no plain ReLUs"}))
    write_tables(tmp_path)
    assert [row["run"] for row in rows_of(tmp_path / "table-d.csv")] == ["gem", "relup", "rerank"]
    assert {row["weights"] for row in rows_of(tmp_path / "table.csv")} == {"w"}
    for text in ((tmp_path / "table-d.md").read_text(), capsys.readouterr().out):
        assert "relup n/a: no plain ReLUs" in text
