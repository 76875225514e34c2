"""Figures of finished results for every kind of dataset, and errors about missing or changed files."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image
from sets import write_distractors, write_folders, write_revisited

from superglobal import cli
from superglobal.cli.visualize import KINDS
from superglobal.config import register
from superglobal.errors import InputError
from superglobal.evaluation.pipeline import evaluate
from superglobal.evaluation.ranking_sheets import FigureOptions, compare_runs, order_queries
from superglobal.evaluation.saved_run import FinishedRun, precision
from superglobal.evaluation.visualize import DRAWN, landmarks_of, visualize

ROOT = Path(__file__).parents[1]
FIGURE_NAMES = ("sheets", "activation", "precision", "similarities.png")
FEW = FigureOptions(queries=1, ranks=2)


def evaluated(folder: Path, root: Path, *overrides: str) -> Path:
    """Evaluate data in `root` and return the result folder."""
    register()
    base = ["backbone=resnet18", "weights=random", "scales=1", "logger=csv", "figures.queries=0"]
    base += ["trainer.accelerator=cpu", "trainer.num_workers=0", "trainer.progress=false", f"paths.data={root}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("eval", overrides=[*base, f"paths.outputs={root / 'out'}", *overrides])
    folder.mkdir(parents=True)
    evaluate(cfg, folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Write a `paths.data` with the set "mini", the distractors "noise", and `photos`."""
    folder = tmp_path_factory.mktemp("visualize")
    write_revisited(folder)
    write_distractors(folder)
    write_folders(folder / "photos")
    return folder


MINI = ("dataset=revisited", "dataset.name=mini")
FOLDER = ("dataset=folder", "dataset.database={root}/photos")


@pytest.fixture(scope="module")
def mini(root) -> Path:
    """Evaluate the set "mini" with distractors."""
    return evaluated(root / "mini_result", root, *MINI, "distractors=list", "distractors.name=noise", "pooling=gem")


@pytest.fixture
def copied(mini, root, tmp_path):
    """Copy the result of `mini`, its dataset and its stores, for tests that damage them."""
    shutil.copytree(root / "mini", tmp_path / "mini")
    shutil.copytree(root / "noise", tmp_path / "noise")
    shutil.copytree(root / "out", tmp_path / "out")
    shutil.copytree(mini, tmp_path / "result")
    for name in ("results.json", "rankings.csv"):
        path = tmp_path / "result" / name
        path.write_text(path.read_text().replace(str(root), str(tmp_path)))
    return tmp_path


def assert_figures_not_empty(paths):
    """Assert that figures are large and not empty."""
    for path in paths:
        image = np.asarray(Image.open(path).convert("RGB"))
        assert min(image.shape[:2]) > 150, path
        assert image.std() > 10, path


def recorded_ap(run: FinishedRun, stage: str, protocol: str) -> np.ndarray:
    """Return the recorded AP of all queries."""
    return np.array([float(v or "nan") for v in run.per_query[f"{stage} {protocol} AP"]])


@pytest.mark.parametrize(
    "overrides",
    [
        (*MINI, "distractors=list", "distractors.name=noise"),
        (*MINI, "rerank.junk=drop", "rerank.M=9"),
        (*MINI, "rerank=aqe"),
        (*MINI, "rerank=adba", "whitening=center"),
        (*MINI, "rerank=none", "store.dtype=float16"),
        (*MINI, "index=hnsw", "k=20", "rerank.M=12"),
        (*FOLDER, "dataset.labels=true"),
    ],
    ids=str,
)
def test_the_area_under_the_curve_of_every_query_is_its_recorded_ap(root, tmp_path, overrides):
    if "index=hnsw" in overrides:
        pytest.importorskip("faiss")
    run = FinishedRun(evaluated(tmp_path / "r", root, *(o.format(root=root) for o in overrides), "pooling=gem"))
    curves = precision(run)
    assert set(curves) == set(run.summary["metrics"])
    for stage, by_protocol in curves.items():
        assert set(by_protocol) == set(run.summary["metrics"][stage]["map"])
        for protocol, rows in by_protocol.items():
            np.testing.assert_allclose(rows.mean(axis=1), recorded_ap(run, stage, protocol), atol=1e-9)
    assert_figures_not_empty(visualize(run.folder, ["curves"], FEW)[0])


def test_all_figures_of_a_revisited_set_are_drawn_and_shown_on_a_page(mini):
    before = json.loads((mini / "results.json").read_text())
    paths, left_out = visualize(mini, [], FEW)
    assert left_out == []
    names = {path.name for path in paths}
    assert {"precision-recall.png", "similarities.png", "map-pca.png", "sheets-worst-01.png"} <= names
    assert sum(name.startswith("activation-") for name in names) == 1
    assert_figures_not_empty(paths)
    page = (mini / "figures" / "index.html").read_text()
    assert all(f'src="./{name}"' in page for name in names)
    assert "://" not in page
    assert json.loads((mini / "results.json").read_text()) == before


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file system that allows any byte in a name")
def test_any_file_name_is_escaped_in_every_output(tmp_path, capsys):
    photos = write_folders(tmp_path / "photos", 2, 4)
    for old, new in ((b"0", b"caf\xe9"), (b"1", b"<b>|[x](javascript:y)*"), (b"2", b"a\nb\x1b[1m\t")):
        os.rename(os.fsencode(photos) + b"/label0/" + old + b".jpg", os.fsencode(photos) + b"/label0/" + new + b".jpg")
    (photos / "label0").rename(photos / "=1+1")
    overrides = ("dataset=folder", f"dataset.database={photos}", "dataset.labels=true", "rerank.M=4")
    result, other = (evaluated(tmp_path / name, tmp_path, *overrides) for name in ("result", "other"))
    names = sorted(name for name in FinishedRun(result).per_query["query"] if name.startswith("'=1+1/"))
    shown = ("3", "<b>|[x](javascript:y)*", r"a\nb\x1b[1m\t", r"caf\xe9")
    assert names == [f"'=1+1/{name}.jpg" for name in shown]
    assert all(row["landmark"] in ("'=1+1", "label1") for row in csv.DictReader((result / "per_query.csv").open()))
    assert r"caf\xe9.jpg" in (result / "rankings.csv").read_text()
    assert r"caf\\xe9.jpg" in (result / "rankings.json").read_text()
    compare_runs(result, other)
    (queries,) = result.glob("comparison/*/queries.md")
    assert r"=1+1/&lt;b&gt;\|\[x](javascript:y)\*.jpg |" in queries.read_text()
    folder = result / "figures"
    visualize(result, ["sheets"], FEW)
    for name in (b"javascript:alert(1).png", b"#?%.png", b"<i>'\".png", b"caf\xe9.png"):
        shutil.copy(folder / "sheets-worst-01.png", os.fsencode(folder) + b"/" + name)
    visualize(result, ["sheets"], FEW)
    page = (folder / "index.html").read_text()
    links = re.findall(r'<a href="([^"#]+)"', page)
    assert "<i>" not in page
    assert sorted(os.fsencode(unquote(link, errors="surrogateescape")) for link in links) == sorted(
        b"./" + os.fsencode(path.name) for path in folder.glob("*.png")
    )
    assert "\x1b[1m" not in capsys.readouterr().out


def test_many_queries_are_split_into_pages_and_old_pages_are_removed(mini):
    first, _ = visualize(mini, ["sheets"], FigureOptions(order="given", numbers=(0, 1, 2, 3, 4, 5, 0, 1, 2), ranks=1))
    assert [path.name for path in first] == ["sheets-chosen-01.png", "sheets-chosen-02.png"]
    second, _ = visualize(mini, ["sheets"], FigureOptions(numbers=(4,), ranks=6))
    assert [path.name for path in second] == ["sheets-chosen-01.png"]
    assert not first[1].exists()


def test_queries_are_ordered_by_their_scores():
    scores = {"search": np.array([0.5, 0.1, np.nan, 0.9]), "rerank": np.array([0.7, 0.1, np.nan, 0.2])}
    assert order_queries(scores, "worst", 4).tolist() == [1, 3, 0, 2]
    assert order_queries(scores, "improved", 4).tolist() == [0]
    assert order_queries(scores, "worsened", 4).tolist() == [3]
    assert order_queries(scores, "given", 4).tolist() == [0, 1, 2, 3]
    with pytest.raises(InputError, match="no reranking"):
        order_queries({"search": scores["search"]}, "improved", 4)
    with pytest.raises(InputError, match="no labels"):
        order_queries({}, "worst", 4)


def test_figures_of_folders_with_and_without_labels(root, tmp_path):
    labeled = evaluated(tmp_path / "a", root, *(o.format(root=root) for o in FOLDER), "dataset.labels=true")
    assert_figures_not_empty(visualize(labeled, ["sheets", "similarities"], FEW)[0])
    run = FinishedRun(labeled)
    assert landmarks_of(run.dataset, 9) == [f"label{i // 3}" for i in range(9)]
    query = f"dataset.query={root / 'photos' / 'label1'}"
    plain = evaluated(tmp_path / "b", root, *(o.format(root=root) for o in FOLDER), query)
    paths, left_out = visualize(plain, [], FEW)
    assert {path.name.split("-")[0] for path in paths} == {"sheets", "activation", "map"}
    assert [reason.split(":")[0] for reason in left_out] == ["curves", "similarities"]
    assert paths[0].name == "sheets-given-01.png"
    with pytest.raises(InputError, match="precision needs labels"):
        visualize(plain, ["curves"], FEW)


@pytest.mark.parametrize("dataset", ["gldv2_test", "gldv2_recognition"])
def test_figures_of_gldv2_sets_are_drawn(toy_data, tmp_path, dataset):
    dataset_root = f"dataset.root={toy_data / 'toy' / 'gldv2'}"
    out = [f"paths.outputs={tmp_path}", "rerank.M=20", "pooling=gem"]
    folder = evaluated(tmp_path / "r", toy_data, f"dataset={dataset}", dataset_root, *out)
    kinds = ["sheets", "curves"] if dataset == "gldv2_recognition" else []
    paths, left_out = visualize(folder, kinds, FEW)
    assert not left_out
    assert {path.name.split("-")[0] for path in paths} >= ({"sheets", "precision"} if kinds else {*FIGURE_NAMES, "map"})
    assert_figures_not_empty(paths)
    run = FinishedRun(folder)
    if not kinds:
        rows = precision(run)["rerank"]["all"]
        np.testing.assert_allclose(rows.mean(axis=1), recorded_ap(run, "rerank", "all"), atol=1e-9)
        assert {"public", "private"} <= set(precision(run)["search"])


def test_user_provided_descriptors_have_all_figures_except_activation(root, tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 8))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    np.save(tmp_path / "q.npy", x[:6].astype(np.float32))
    np.save(tmp_path / "x.npy", x[6:].astype(np.float32))
    files = [f"descriptors.query={tmp_path / 'q.npy'}", f"descriptors.database={tmp_path / 'x.npy'}"]
    alone = evaluated(tmp_path / "alone", root, "dataset=descriptors", *files)
    paths, left_out = visualize(alone, [], FEW)
    assert [path.name for path in paths] == ["map-pca.png"]
    assert len(left_out) == 4
    with pytest.raises(InputError, match="without images; only the figure map can be drawn"):
        visualize(alone, ["sheets"], FEW)
    known = evaluated(tmp_path / "known", root, *MINI, *files)
    paths, left_out = visualize(known, [], FEW)
    assert [reason.split(":")[0] for reason in left_out] == ["activation"]
    assert len(paths) >= 4
    np.save(tmp_path / "x.npy", x[::-1][:24].astype(np.float32))
    with pytest.raises(InputError, match="the descriptors have changed"):
        visualize(known, ["curves"], FEW)


def test_missing_images_and_stores_raise_errors_with_a_fix(copied):
    result = copied / "result"
    run = FinishedRun(result)
    worst = run.dataset.queries[
        int(order_queries({"rerank": recorded_ap(run, "rerank", "medium")}, "worst", 6)[0])
    ].path
    worst.rename(copied / "away.jpg")
    with pytest.raises(InputError, match=rf"image not found: {worst}; .*paths.data=FOLDER.*need no images"):
        visualize(result, ["sheets"], FEW)
    assert_figures_not_empty(visualize(result, ["curves", "similarities", "map"], FEW)[0])
    (copied / "away.jpg").rename(worst)
    (result / ".hydra").mkdir()
    (result / ".hydra" / "overrides.yaml").write_text("- dataset=revisited\n- 'scales=[1.0, 2.0]'\n")
    shutil.rmtree(next((copied / "out" / "stores").glob("mini-database-*")))
    stores = (
        r"stored descriptors are missing; give .*paths\.stores=FOLDER, or .* python eval\.py dataset=revisited 'scales="
    )
    for kind in ("curves", "similarities", "map"):
        with pytest.raises(InputError, match=stores):
            visualize(result, [kind], FEW)
    paths, left_out = visualize(result, [], FEW)
    assert [reason.split(":")[0] for reason in left_out] == ["curves", "similarities", "map"]
    assert paths


def test_moved_results_images_and_stores_are_found(tmp_path, monkeypatch):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    write_folders(project / "photos", 2, 3)
    write_folders(project / "queries", 2, 2)
    elsewhere.mkdir()
    monkeypatch.chdir(project)
    options = ("dataset=folder", "dataset.database=photos", "dataset.query=queries", "dataset.labels=true")
    relative = evaluated(Path("outputs/eval/r"), project, *options, "rerank.M=3", "paths.outputs=outputs")
    kinds = ["sheets", "similarities"]
    monkeypatch.chdir(elsewhere)
    visualize(project / relative, kinds, FEW)
    moved = project.rename(tmp_path / "moved")
    result = moved / relative
    visualize(result, kinds, FEW)
    (moved / "photos").rename(elsewhere / "p")
    (moved / "queries").rename(elsewhere / "q")
    (moved / "outputs" / "stores").rename(elsewhere / "s")
    with pytest.raises(InputError, match=r"dataset\.database"):
        visualize(result, ["sheets"], FEW)
    images = ["dataset.database=p", "dataset.query=q"]
    with pytest.raises(InputError, match=r"paths\.stores=FOLDER"):
        visualize(result, ["similarities"], FEW, images)
    assert cli.main(["visualize", str(result), *kinds, "--queries", "1", *images, "paths.stores=s"]) == 0
    copy = shutil.copytree(result, tmp_path / "0_rerank.K=3")
    assert cli.main(["report", str(copy), "--baseline", str(result), *images, "paths.stores=s"]) == 0
    assert (copy / "comparison" / "eval-r" / "queries.csv").is_file()
    with pytest.raises(InputError, match=r"^rerank\.M=9: expected a path of moved files"):
        visualize(result, kinds, FEW, ["rerank.M=9"])


def test_manipulated_rankings_and_scores_raise_errors(copied):
    folder = copied / "result"
    stages = dict(np.load(folder / "rankings.npz"))
    changes = {"search_ids": (np.full((6, 3), 10**6), np.full((6, 3), -7), np.zeros((6, 3)), np.zeros((6, 0), int))}
    changes["rerank_scores"] = (np.zeros(4), np.zeros((6, 3), complex))
    for name, values in changes.items():
        for value in values:
            np.savez(folder / "rankings.npz", **{**stages, name: value})
            with pytest.raises(InputError, match=r"rankings\.npz: missing or damaged"):
                visualize(folder, ["sheets"], FEW)
    (folder / "rankings.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"rankings\.npz: missing or damaged"):
        visualize(folder, ["sheets"], FEW)
    np.savez(folder / "rankings.npz", **stages)
    table = folder / "per_query.csv"
    table.write_text(table.read_text().replace(",", f",{'x' * 200_000},", 1))
    with pytest.raises(InputError, match=r"per_query\.csv: missing or damaged"):
        visualize(folder, ["sheets"], FEW)


def test_a_changed_folder_of_images_is_an_error(root, tmp_path):
    shutil.copytree(root / "photos", tmp_path / "photos")
    database = f"dataset.database={tmp_path / 'photos'}"
    folder = evaluated(tmp_path / "r", root, "dataset=folder", database, "dataset.labels=true")
    shutil.copy(tmp_path / "photos" / "label0" / "0.jpg", tmp_path / "photos" / "label0" / "00.jpg")
    with pytest.raises(InputError, match="9 queries and 9 images before, 10 and 10 now"):
        visualize(folder, ["sheets"], FEW)
    (tmp_path / "photos" / "label0" / "0.jpg").unlink()
    with pytest.raises(InputError, match=r"was label0/0\.jpg, now it is label0/00\.jpg"):
        visualize(folder, ["sheets"], FEW)


def test_changed_weights_or_scores_are_an_error(copied):
    path = copied / "result" / "results.json"
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"config": row["config"] | {"seed": 5}}))
    with pytest.raises(InputError, match="changed since the evaluation"):
        visualize(copied / "result", ["activation"], FEW)
    row["metrics"]["rerank"]["map"]["medium"] += 0.01
    path.write_text(json.dumps(row))
    with pytest.raises(InputError, match=r"rerank, medium: the area under the curve is .* files have changed"):
        visualize(copied / "result", ["curves"], FEW)


def test_folders_without_results_or_metrics_raise_errors(mini, tmp_path):
    with pytest.raises(InputError, match=r"contains no results\.json"):
        visualize(tmp_path, [], FEW)
    shutil.copytree(mini, tmp_path / "a")
    row = json.loads((tmp_path / "a" / "results.json").read_text())
    short = row | {"status": "n/a", "reason": "no ReLUs", "metrics": {}}
    (tmp_path / "a" / "results.json").write_text(json.dumps(short))
    with pytest.raises(InputError, match="its status is n/a: no ReLUs"):
        visualize(tmp_path, [], FEW)
    shutil.copytree(mini, tmp_path / "b")
    with pytest.raises(InputError, match=r"contains 2 results; give the folder of one, such as .*/a"):
        visualize(tmp_path, [], FEW)
    with pytest.raises(InputError, match="query 6: expected a number from 0 to 5"):
        visualize(mini, [], FigureOptions(numbers=(6,)))


def test_two_results_are_compared_with_and_without_images(mini, root, tmp_path, caplog):
    baseline = evaluated(tmp_path / "other", root, *MINI, "rerank=none", "pooling=gem")
    paths = compare_runs(mini, baseline, ranks=4)
    output = mini / "comparison" / f"{tmp_path.name}-other"
    assert_figures_not_empty(paths)
    table = (output / "queries.csv").read_text().splitlines()
    assert len(table) == 7
    aps, runs = [], (FinishedRun(mini), FinishedRun(baseline))
    for run, stage in zip(runs, ("rerank", "search"), strict=True):
        aps.append(recorded_ap(run, stage, "medium"))
    gain = aps[0] - aps[1]
    assert table[1].split(",")[0] == str(int(np.argmax(gain)))
    sheets = {"won-01.png": (gain > 1e-9).any(), "lost-01.png": (gain < -1e-9).any()}
    assert any(sheets.values())
    assert set(paths) == {output / name for name, drawn in sheets.items() if drawn}
    with pytest.raises(InputError, match="the baseline is the same result"):
        compare_runs(mini, mini)
    changed = json.loads((baseline / "results.json").read_text())
    changed["config"]["dataset"]["root"] = str(tmp_path / "nowhere")
    (baseline / "results.json").write_text(json.dumps(changed))
    assert compare_runs(mini, baseline) == []
    assert "drew no figures" in caplog.text


def test_the_command_prints_the_written_files(mini):
    words = [sys.executable, "-m", "superglobal", "visualize", str(mini), "map", "--images", "10"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[0]).name == "map-pca.png"
    assert done.stdout.strip().endswith("index.html")


def test_invalid_arguments_of_the_commands_print_messages(mini, tmp_path, capsys):
    assert tuple(DRAWN) == KINDS
    for words in (("visualize", tmp_path, "map"), ("report", mini, "--baseline", tmp_path)):
        assert cli.main([str(word) for word in words]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith(f"error: {tmp_path}: contains no results.json")
    with pytest.raises(SystemExit) as stop:
        cli.main(["visualize", str(mini), "mpa"])
    assert stop.value.code == 2
    assert "'mpa': expected one of sheets" in capsys.readouterr().err
