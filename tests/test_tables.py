"""The merged table: grouped by network, each with its own baseline, gains with intervals over the same queries."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from superglobal.errors import InputError
from superglobal.retrieval.metrics import cluster_interval
from superglobal.retrieval.report import FORMAT
from superglobal.retrieval.tables import merge

LANDMARKS = [f"place{i // 3}" for i in range(12)]


def write(folder, weights, label, ap):
    """A run's files, as far as the table reads them."""
    folder.mkdir(parents=True)
    score = float(np.mean(ap))
    stage = {
        "map": {"easy": 0.1, "medium": score, "hard": None},
        "interval": {"easy": [0.0, 0.2], "medium": [score - 0.1, score + 0.1], "hard": [None, None]},
        "mp": {name: {"1": 0.5, "5": 0.5, "10": 0.25} for name in ("easy", "medium", "hard")},
    }
    row = {"format": FORMAT, "label": label, "dataset": "d", "weights": weights, "status": "ok"}
    row |= {"metrics": {"search": stage}, "config": {"seed": 0, "ablation": label, "weights": weights}}
    (folder / "results.json").write_text(json.dumps(row))
    lines = ["query,landmark,search medium AP"]
    lines += [f"q{i},{place},{value!r}" for i, (place, value) in enumerate(zip(LANDMARKS, ap, strict=True))]
    (folder / "per_query.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def runs(tmp_path):
    rng = np.random.default_rng(0)
    scores = {}
    # Jobs in an order that is neither the ladder's nor the networks', and 10 after 9.
    for number, (weights, label) in enumerate([("a", "relup"), ("b", "gem"), ("a", "gem"), ("b", "relup")], 8):
        scores[weights, label] = rng.uniform(0.2, 0.8, 12).tolist()
        write(tmp_path / f"{number}_job", weights, label, scores[weights, label])
    return tmp_path, scores


def test_every_network_has_its_own_ladder_and_baseline(runs):
    folder, scores = runs
    merge(folder)
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


def test_a_training_is_called_by_its_name_where_that_tells_it(tmp_path):
    for number, name in enumerate(("one", "two")):
        write(tmp_path / str(number), f"outputs/train/{name}/best.safetensors", "gem", [0.5] * 12)
    merge(tmp_path)
    assert [line.split(",")[1] for line in (tmp_path / "table.csv").read_text().splitlines()[1:]] == ["one", "two"]
    write(tmp_path / "2", "elsewhere/train/two/best.safetensors", "gem", [0.5] * 12)
    merge(tmp_path)
    assert "elsewhere/train/two/best.safetensors" in (tmp_path / "table.csv").read_text()


def test_a_run_without_its_queries_is_named(runs):
    folder, _ = runs
    (folder / "9_job" / "per_query.csv").unlink()
    with pytest.raises(InputError, match=r"9_job/per_query\.csv: missing"):
        merge(folder)


def test_metrics_of_other_sets_go_by_their_names_and_are_not_mixed(runs):
    folder, _ = runs
    scores = {"all": 0.5, "public": None}
    ranked = {
        "mAP@100": scores,
        "interval": {"all": [0.4, 0.6], "public": [None] * 2},
        "precision": {"all": {"10": 0.3}},
    }
    recognised = {
        "GAP": {"all": 0.25},
        "GAP_landmarks_only": {"all": 0.4},
        "top1": {"all": 0.75},
        "queries": {"all": 9},
    }
    for number, (name, stage) in enumerate((("index", ranked), ("landmarks", recognised))):
        place = folder / f"{20 + number}_job"
        write(place, "a", "", [0.5] * 12)
        row = json.loads((place / "results.json").read_text()) | {"dataset": name, "metrics": {"search": stage}}
        (place / "results.json").write_text(json.dumps(row))
        text = (place / "per_query.csv").read_text()
        (place / "per_query.csv").write_text(text.replace("search medium AP", "search all AP"))
    merge(folder)
    with (folder / "table.csv").open() as file:
        found = {row["data set"]: row for row in csv.DictReader(file)}
    assert found["index"]["mAP@100 all"] == "50.00"
    assert found["index"]["95 % mAP@100 all"] == "40.0-60.0"
    assert (found["index"]["P@10 all"], found["index"]["mAP@100 public"]) == ("30.0", "-")
    assert (found["landmarks"]["GAP all"], found["landmarks"]["top-1 all"]) == ("25.00", "75.00")
    assert found["index"]["medium"] == found["index"]["GAP all"] == found["landmarks"]["mAP@100 all"] == ""
    assert found["d"]["mAP@100 all"] == ""
    assert (found["landmarks"]["gain"], found["landmarks"]["95 % gain"]) == ("+0.00", "")
    assert "all" not in found["index"]
