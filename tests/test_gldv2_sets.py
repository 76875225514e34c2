"""GLDv2 evaluation sets: their lists, and eval.py compared to the definitions of the metrics in plain NumPy."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

import superglobal
from superglobal.config import register
from superglobal.config.common import validate_config
from superglobal.config.evaluation import EvalConfig
from superglobal.config.tuning import TuneConfig
from superglobal.data.gldv2 import read_train, recognition_set, retrieval_set, split_landmarks, validation_set
from superglobal.data.image_checks import check_images
from superglobal.data.images import ImageItem
from superglobal.data.lazy_sequence import LazySequence, chain_sequences, tree_items
from superglobal.errors import InputError
from superglobal.evaluation.pipeline import evaluate
from superglobal.metrics.gldv2 import score_submission

ROOT = Path(__file__).parents[1]
FAST = ["backbone=test_resnet", "weights=random", "scales=1", "logger=csv"]
FAST += ["trainer.num_workers=0", "trainer.accelerator=cpu", "trainer.progress=false"]


@pytest.fixture
def root(toy_data, tmp_path) -> Path:
    """Copy the lists of the toy set, without its images, for tests that change them."""
    for path in (toy_data / "toy/gldv2").glob("*.csv"):
        shutil.copy(path, tmp_path)
    return tmp_path


def rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file."""
    with path.open() as file:
        return list(csv.DictReader(file))


def run(outputs: Path, *overrides: str) -> tuple[str, Path]:
    """Run eval.py and return its output and its result folder."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"COLUMNS": "200"}
    command = [sys.executable, str(ROOT / "eval.py"), *overrides, *FAST, f"paths.outputs={outputs}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr, next(outputs.rglob("results.json")).parent


def extract_descriptors(root: Path, split: str, ids: list[str]) -> np.ndarray:
    """Extract the descriptors of images."""
    model = superglobal.load_model("random", backbone="test_resnet", scales=1)
    paths = [root / split / i[0] / i[1] / i[2] / f"{i}.jpg" for i in ids]
    return superglobal.extract(model, paths, max_side=1024)


def average_precision(ranked_ids: list[str], relevant: set[str]) -> float:
    """Compute the AP of the first 100 ids."""
    hits = [image in relevant for image in ranked_ids[:100]]
    return sum(sum(hits[:i]) / i for i, hit in enumerate(hits, 1) if hit) / min(len(relevant), 100)


def ranked(Q: np.ndarray, X: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return (scores, ids) of both stages: search by a full sort, reranking by the public function."""
    scores = Q.astype(np.float64) @ X.T.astype(np.float64)
    ids = np.argsort(-scores, axis=1, kind="stable")
    return {"search": (np.take_along_axis(scores, ids, 1), ids), "rerank": superglobal.rerank(Q, X, ids)}


def test_retrieval_metrics_equal_their_definition(toy_data, tmp_path):
    root = toy_data / "toy/gldv2"
    text, folder = run(tmp_path, "dataset=gldv2_test", f"dataset.root={root}")
    solution = [row for row in rows(root / "retrieval_solution_v2.1.csv") if row["Usage"] != "Ignored"]
    index = [row["id"] for row in rows(root / "index.csv")]
    Q, X = extract_descriptors(root, "test", [row["id"] for row in solution]), extract_descriptors(root, "index", index)
    result = json.loads((folder / "results.json").read_text())
    lists: dict[str, list[str]] = {}
    relevant = [set(row["images"].split()) for row in solution]
    for stage, (_, ids) in ranked(Q, X).items():
        ranked_lists = [[index[i] for i in row] for row in ids]
        ap = [average_precision(*pair) for pair in zip(ranked_lists, relevant, strict=True)]
        got = result["metrics"][stage]
        for part in ("public", "private"):
            selected = [value for value, row in zip(ap, solution, strict=True) if row["Usage"].lower() == part]
            assert got["mAP@100"][part] == pytest.approx(np.mean(selected), abs=1e-12)
            assert got["queries"][part] == len(selected)
        assert got["mAP@100"]["all"] == pytest.approx(np.mean(ap), abs=1e-12)
        column = [float(row[f"{stage} all AP"]) for row in rows(folder / "per_query.csv")]
        assert column == pytest.approx(ap, abs=1e-12)
        lists = {row["id"]: ranking for row, ranking in zip(solution, ranked_lists, strict=True)}
    submission = {row["id"]: row["images"].split(" ") for row in rows(folder / "submission.csv")}
    assert submission == lists
    again = score_submission(root / "retrieval_solution_v2.1.csv", folder / "submission.csv").to_dict()
    assert again == result["metrics"]["rerank"]
    assert result["protocol"]["max_side"] == 1024
    assert "longer side of 1024 px; enlarged to a shorter side of 65 px" in text
    assert "mAP@100" in text
    assert result["about"]["solution"]["file"] == "retrieval_solution_v2.1.csv"


def test_recognition_metrics_equal_their_definition(toy_data, tmp_path):
    root = toy_data / "toy/gldv2"
    overrides = ["dataset=gldv2_recognition", f"dataset.root={root}", "dataset.neighbors=4", "dataset.votes=distance"]
    text, folder = run(tmp_path, *overrides)
    solution = rows(root / "recognition_solution_v2.1.csv")
    photos = [(i, r["landmark_id"]) for r in rows(root / "train_clean.csv") for i in sorted(r["images"].split())]
    Q, X = (
        extract_descriptors(root, "test", [r["id"] for r in solution]),
        extract_descriptors(root, "train", [i for i, _ in photos]),
    )
    result = json.loads((folder / "results.json").read_text())
    predicted: dict[str, tuple[str, float]] = {}
    for stage, (scores, ids) in ranked(Q, X).items():
        for row, row_scores, row_ids in zip(solution, scores, ids, strict=True):
            totals: dict[str, float] = {}
            for score, i in zip(row_scores[:4].tolist(), row_ids[:4], strict=True):
                totals[photos[i][1]] = totals.get(photos[i][1], 0) + 2 * score - 1
            predicted[row["id"]] = max(totals.items(), key=lambda item: item[1])
        truth = {row["id"]: row["landmarks"].split() for row in solution}
        order = sorted(predicted, key=lambda image: (-predicted[image][1], image))
        hits = [predicted[image][0] in truth[image] for image in order]
        shown = sum(bool(landmarks) for landmarks in truth.values())
        gap = sum(sum(hits[:i]) / i for i, hit in enumerate(hits, 1) if hit) / shown
        assert result["metrics"][stage]["GAP"]["all"] == pytest.approx(gap, abs=1e-12)
        assert result["metrics"][stage]["top1"]["all"] == pytest.approx(sum(hits) / shown)
        assert (result["metrics"][stage]["queries"]["all"], shown) == (len(solution), 6)
    submission = {row["id"]: row["landmarks"].split(" ") for row in rows(folder / "submission.csv")}
    assert {i: parts[0] for i, parts in submission.items()} == {i: landmark for i, (landmark, _) in predicted.items()}
    again = score_submission(root / "recognition_solution_v2.1.csv", folder / "submission.csv").to_dict()
    assert again == result["metrics"]["rerank"]
    assert "GAP, landmarks only" in text
    with_landmark = [row for row in rows(folder / "per_query.csv") if row["landmark"]]
    assert len(with_landmark) == 6


def test_validation_metrics_equal_their_definition_and_appear_in_tables(toy_data, tmp_path):
    root = tmp_path / "gldv2"
    shutil.copytree(toy_data / "toy/gldv2", root)
    _, folder = run(tmp_path, "dataset=gldv2_val", f"dataset.root={root}", "dataset.landmarks=4", "rerank=none")
    split = rows(root / "gldv2_val_4_seed0.csv")
    queries, index = ([row for row in split if row["split"] == name] for name in ("query", "index"))
    Q, X = (extract_descriptors(root, "train", [row["id"] for row in part]) for part in (queries, index))
    ranked_lists = [[index[i]["id"] for i in row] for row in ranked(Q, X)["search"][1]]
    same = [{row["id"] for row in index if row["landmark_id"] == q["landmark_id"]} for q in queries]
    expected = np.mean([average_precision(*pair) for pair in zip(ranked_lists, same, strict=True)])
    result = json.loads((folder / "results.json").read_text())
    assert result["metrics"]["search"]["mAP@100"] == {"all": pytest.approx(expected, abs=1e-12)}
    assert (result["role"], len(queries)) == ("validation", 4)
    again = "dataset.landmarks=4", "ablation=gem,gem_plus"
    assert "mAP@100 all" in run(tmp_path / "o", "-m", "dataset=gldv2_val", f"dataset.root={root}", *again)[0]
    first, second = rows(next((tmp_path / "o").rglob("table.csv")))
    assert "all" not in first
    assert float(second["gain"]) == pytest.approx(float(second["mAP@100 all"]) - float(first["mAP@100 all"]), abs=0.011)
    assert " to " in second["95 % gain"]


def write_vectors(folder: Path, queries: int, images: int) -> dict[str, np.ndarray]:
    """Return random unit vectors and save them as `q.npy` and `x.npy`."""
    rng = np.random.default_rng(0)
    vectors = {"q": rng.standard_normal((queries, 8)), "x": rng.standard_normal((images, 8))}
    for name, x in vectors.items():
        vectors[name] = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        np.save(folder / f"{name}.npy", vectors[name])
    return vectors


def evaluate_vectors(folder: Path, *overrides: str) -> tuple[float, dict]:
    """Evaluate the vectors of `write_vectors` and return the score and the result."""
    descriptors = [f"descriptors.query={folder / 'q.npy'}", f"descriptors.database={folder / 'x.npy'}"]
    descriptors += ["rerank=none", "logger=csv", f"paths.outputs={folder}"]
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("eval", overrides=[*descriptors, *overrides])
    result = folder / "result"
    result.mkdir(exist_ok=True)
    return evaluate(config, result), json.loads((result / "results.json").read_text())


def extend_index(root: Path) -> list[str]:
    """Add 200 images to the index and return its ids."""
    extra = "".join(f"{i:016x}\n" for i in range(200))
    (root / "index.csv").write_text((root / "index.csv").read_text() + extra)
    return [row["id"] for row in rows(root / "index.csv")]


def test_an_approximate_index_is_compared_to_exact_search_by_map_at_100(root, tmp_path, capsys):
    pytest.importorskip("faiss")
    write_vectors(tmp_path, 8, len(extend_index(root)))
    where = ["dataset=gldv2_test", f"dataset.root={root}", "k=100"]
    _, exact = evaluate_vectors(tmp_path, *where)
    ivf = ["index=ivf_flat", "index.nlist=5", "index.nprobe=1"]
    _, approximate = evaluate_vectors(tmp_path, *where, *ivf)
    compared = approximate["about"]["index"]["compared_to_exact"]
    assert compared["recall"] < 1
    assert compared["mAP@100_difference"].keys() == {"public", "private", "all"}
    for part, difference in compared["mAP@100_difference"].items():
        approximate_map, exact_map = (result["metrics"]["search"]["mAP@100"][part] for result in (approximate, exact))
        assert approximate_map != exact_map
        assert difference == pytest.approx(approximate_map - exact_map, abs=1e-12)
    output = " ".join(capsys.readouterr().out.split())
    assert f"all mAP@100 {100 * compared['mAP@100_difference']['all']:+.2f}" in output
    sample = np.sort(np.random.default_rng(0).permutation(8)[:3])
    _, few = evaluate_vectors(tmp_path, *where, *ivf, "index.compare=3")
    got = few["about"]["index"]["compared_to_exact"]
    ap = [[float(r["search all AP"]) for r in rows(tmp_path / "result" / "per_query.csv")]]
    evaluate_vectors(tmp_path, *where)
    ap.append([float(r["search all AP"]) for r in rows(tmp_path / "result" / "per_query.csv")])
    assert got["mAP@100_difference"]["all"] == pytest.approx(np.subtract(*ap)[sample].mean(), abs=1e-12)


def test_recognition_with_an_index_is_compared_to_exact_search_by_recall(root, tmp_path, capsys):
    pytest.importorskip("faiss")
    write_vectors(tmp_path, 20, 90)
    where = ["dataset=gldv2_recognition", f"dataset.root={root}", "k=10"]
    _, result = evaluate_vectors(tmp_path, *where, "index=ivf_flat", "index.nlist=2", "index.nprobe=1")
    assert result["about"]["index"]["compared_to_exact"].keys() == {"queries", "k", "recall", "min_recall"}
    assert "; metrics were not compared" in " ".join(capsys.readouterr().out.split())


def test_user_provided_descriptors_are_scored_over_100_ranks_for_any_k(root, tmp_path):
    solution = [row for row in rows(root / "retrieval_solution_v2.1.csv") if row["Usage"] != "Ignored"]
    index = extend_index(root)
    vectors = write_vectors(tmp_path, len(solution), len(index))
    score, _ = evaluate_vectors(tmp_path, "dataset=gldv2_test", f"dataset.root={root}", "k=1")
    ranked_lists = [[index[i] for i in row] for row in ranked(vectors["q"], vectors["x"])["search"][1]]
    truth = [set(row["images"].split()) for row in solution]
    assert score == pytest.approx(np.mean([average_precision(*p) for p in zip(ranked_lists, truth, strict=True)]))
    assert all(len(row["images"].split(" ")) == 100 for row in rows(tmp_path / "result/submission.csv"))


def test_validation_landmarks_are_held_out_from_training(root):
    dataset = validation_set(root, landmarks=4, seed=5)
    listed = read_train(root)
    chosen = set(map(int, dataset.clusters))
    assert len(chosen) == len(dataset.queries) == 4
    for fraction in (4 / 12, 0.4, 0.5):
        train, held = split_landmarks(listed, fraction, seed=5)
        assert chosen <= set(held.landmarks.tolist())
        assert not chosen & set(train.landmarks.tolist())
    names = [item.path.stem for item in (*dataset.queries, *dataset.database)]
    assert len(set(names)) == len(names) == sum(listed.landmarks[label] in chosen for label in listed.labels)
    assert chosen != set(map(int, validation_set(root, landmarks=4, seed=6).clusters))


def test_the_validation_split_is_written_once_and_then_checked(root, caplog):
    before = validation_set(root, landmarks=3)
    path = root / "gldv2_val_3_seed0.csv"
    text = path.read_text()
    path.write_bytes(text.replace("\n", "\r\n").encode())
    again = validation_set(root, landmarks=3)
    assert list(again.queries) == list(before.queries)
    path.write_text(text.replace(",query", ",index"))
    with pytest.raises(InputError, match=r"gldv2_val_3_seed0.csv: expected the split of .*train_clean.csv, but"):
        validation_set(root, landmarks=3)
    path.write_text(text)
    listed = (root / "train_clean.csv").read_text().splitlines()
    (root / "train_clean.csv").write_text("\n".join(listed[:-1]) + "\n")
    with pytest.raises(InputError, match="expected the split"):
        validation_set(root, landmarks=3)
    with pytest.raises(InputError, match=r"dataset.landmarks=11: expected fewer than the 11 landmarks"):
        validation_set(root, landmarks=11)
    (root / "gldv2_val_2_seed0.csv").mkdir()
    validation_set(root, landmarks=2)
    assert "cannot write the file of the validation split" in caplog.text


def test_queries_of_one_landmark_are_one_cluster(root):
    dataset = retrieval_set(root)
    solution = {row["id"]: row["images"] for row in rows(root / "retrieval_solution_v2.1.csv")}
    first: dict[str, str] = {}
    for item, cluster in zip(dataset.queries, dataset.clusters, strict=True):
        assert cluster == first.setdefault(solution[item.path.stem], item.path.stem)
    names = [item.path.stem for item in dataset.database]
    for item, entry in zip(dataset.queries, dataset.gnd, strict=True):
        assert [names[row] for row in entry["positive"]] == solution[item.path.stem].split()


def test_solutions_are_selected_by_version_or_path(root):
    shutil.copy(root / "retrieval_solution_v2.1.csv", root / "retrieval_solution_v2.0.csv")
    assert retrieval_set(root, solution="v2.0").about["solution"]["file"] == "retrieval_solution_v2.0.csv"
    moved = root / "other.csv"
    shutil.move(root / "retrieval_solution_v2.1.csv", moved)
    assert len(retrieval_set(root, solution=str(moved)).queries) == 8
    with pytest.raises(InputError) as caught:
        retrieval_set(root)
    for word in (str(root / "retrieval_solution_v2.1.csv"), "https://", "superglobal toy-data", "a/b/c/<id>.jpg"):
        assert word in str(caught.value)


def test_ground_truth_missing_from_the_index_is_reported_with_its_line(root):
    path = root / "retrieval_solution_v2.1.csv"
    lines = path.read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if line.endswith("Private") and " " in line)
    gone = lines[number - 1].split(",")[1].split(" ")[1]
    index = (root / "index.csv").read_text()
    (root / "index.csv").write_text(index.replace(f"{gone}\n", ""))
    with pytest.raises(InputError, match=rf"{path.name}, line {number}: image {gone} is not in .*index\.csv"):
        retrieval_set(root)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image\n0123456789abcdef\n", ["columns ['image']", "expected id"]),
        ("id\n0123456789abcdef\n0123456789abcdeg\n", ["line 3", "expected an image id"]),
        ("id\n0123456789abcdef\n1123456789abcdef\n0123456789abcdef\n", ["0123456789abcdef", "twice"]),
        ("id\n", ["contains no images"]),
    ],
)
def test_invalid_index_lists_raise_errors(root, text, words):
    (root / "index.csv").write_text(text)
    with pytest.raises(InputError) as caught:
        retrieval_set(root)
    for word in ["index.csv", *words]:
        assert word in str(caught.value)


def test_landmarks_missing_from_training_count_and_are_reported(root, caplog):
    dataset = recognition_set(root)
    assert (len(dataset.queries), len(dataset.database)) == (20, 90)
    names = {row["id"]: row["landmarks"] for row in rows(root / "recognition_solution_v2.1.csv")}
    photos = {r["landmark_id"]: set(r["images"].split()) for r in rows(root / "train_clean.csv")}
    for item, entry in zip(dataset.queries, dataset.gnd, strict=True):
        assert {dataset.database[row].path.stem for row in entry["positive"]} == photos.get(
            names[item.path.stem], set()
        )
    listed = (root / "train_clean.csv").read_text().splitlines()
    (root / "train_clean.csv").write_text("\n".join(line for line in listed if not line.startswith("108,")) + "\n")
    assert recognition_set(root).about["landmarks_not_in_database"] == 1
    assert "1 test images show landmarks that train_clean.csv lacks" in caplog.text
    assert len(recognition_set(root, table="train.csv").database) == 96


def test_image_items_are_created_lazily(tmp_path):
    ids = np.array([f"{i:016x}".encode() for i in range(1500)])
    items = tree_items(tmp_path, ids)
    assert items[-1] == ImageItem(tmp_path / "0/0/0/00000000000005db.jpg")
    assert [item.path.stem for item in items[3:5]] == ["0000000000000003", "0000000000000004"]
    with pytest.raises(IndexError):
        items[1500]
    both = chain_sequences(items, [ImageItem(tmp_path / "x.jpg")])
    assert (len(both), both[0], both[1500].path.name) == (1501, items[0], "x.jpg")
    assert list(LazySequence(3, str)) == ["0", "1", "2"]
    assert check_images(both).missing == [item.path for item in both]


@pytest.mark.parametrize(
    ("schema", "overrides", "message"),
    [
        (EvalConfig, ["dataset=gldv2_test", "distractors=revisitop1m"], "distractors=none"),
        (EvalConfig, ["dataset=gldv2_recognition", "dataset.neighbors=500"], r"rerank\.M=400"),
        (EvalConfig, ["dataset=gldv2_recognition", "dataset.votes=all"], "similarity, distance, nearest"),
        (EvalConfig, ["dataset=gldv2_val", "dataset.table=index.csv"], r"train_clean\.csv, train\.csv"),
        (EvalConfig, ["dataset=gldv2_val", "dataset.landmarks=0"], r"dataset\.landmarks=0"),
        (TuneConfig, ["dataset=gldv2_test"], "the role of this set is test"),
        (TuneConfig, ["dataset=gldv2_recognition", "allow_test=true"], "recognition sets do not have"),
    ],
)
def test_contradicting_settings_raise_errors(schema, overrides, message):
    register()
    script = "eval" if schema is EvalConfig else "tune"
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(script, overrides=overrides)
    with pytest.raises(InputError, match=message):
        validate_config(config, schema)
