"""The toy set: identical pixels on all machines, official layouts, ground truth from photos.csv, and resuming."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest

from superglobal import cli, toy
from superglobal.data.distractors import load_distractors
from superglobal.data.evaluation_set import require_images
from superglobal.data.images import read_image
from superglobal.data.revisited import load_ground_truth, revisited_set
from superglobal.errors import InputError
from superglobal.toy import make
from superglobal.toy.numerics import RandomStream
from superglobal.toy.photo import frame
from superglobal.toy.plan import SIZES, Shot, Size, plan
from superglobal.toy.trace import cast, landmark_mask

SEED = 3
# A set of a few dozen images, for tests that render it more than once.
MICRO = Size(96, (2, 3), 2, (1, 2), 3, 2, 1, 2, (1, 2), (1, 1))


@pytest.fixture
def micro(monkeypatch):
    """Add the size micro."""
    monkeypatch.setitem(SIZES, "micro", MICRO)


@pytest.fixture
def tiny(toy_data) -> Path:
    """Return the folder of the toy set of size tiny."""
    return toy_data / "toy"


def rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def contents(root: Path) -> dict[str, str]:
    """Return the hash of every file below a folder."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# Fixed hashes of pixels. The renderer gave identical pixels on Python 3.11, 3.12 and 3.13 with NumPy 2.4, 1.26 and
# 2.1, and with the SIMD loops of NumPy disabled.
PIXELS = {
    "train": "3757589f1457993f",
    "test": "cfab62b75f09ce5f",
    "query": "cad3c14d8f71e8e5",
    "distractor": "9095f424b22e1f08",
}


@pytest.mark.parametrize("kind", PIXELS)
def test_pixels_are_the_same_on_every_machine(kind):
    digest = hashlib.sha256()
    for shot in [shot for shot in plan(SIZES["small"], 0) if shot.set == kind][-2:]:
        pixels = frame(0, 160, shot).pixels()
        digest.update(repr(pixels.shape).encode() + pixels.tobytes())
    assert digest.hexdigest()[:16] == PIXELS[kind], "pixels changed: raise toy.VERSION and update these digests"


def test_random_draws_are_in_their_ranges_and_reproducible():
    draws = RandomStream("test", 1)
    reals = [draws.uniform(2, 3) for _ in range(2000)]
    assert min(reals) >= 2
    assert max(reals) < 3
    assert abs(math.fsum(reals) / 2000 - 2.5) < 0.03
    assert {draws.integer(1, 3) for _ in range(200)} == {1, 2, 3}
    assert max(abs(draws.bell(5)) for _ in range(500)) < 5
    assert draws.bytes(3, 5).shape == (3, 5)
    assert RandomStream("test", 1).uniform() == RandomStream("test", 1).uniform() != RandomStream("test", 2).uniform()


def test_workers_interruptions_and_lost_images_do_not_change_the_set(tmp_path, micro, monkeypatch):
    alone, pooled, broken = tmp_path / "alone", tmp_path / "pooled", tmp_path / "broken"
    summary = toy.make_toy(alone, "micro", SEED, workers=1)
    assert toy.make_toy(pooled, "micro", SEED, workers=2) == summary
    reference = contents(alone)
    assert contents(pooled) == reference

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.make_toy(broken, "micro", SEED, workers=1, progress=interrupt)
    assert not (broken / "toy.json").exists()
    half = {path: path.stat().st_mtime_ns for path in broken.rglob("*.jpg")}
    assert 0 < len(half) < len(plan(MICRO, SEED))
    (broken / "toy" / "jpg" / ".place000_000000.jpg.killed").touch()
    toy.make_toy(broken, "micro", SEED, workers=1)
    assert contents(broken) == reference
    assert all(path.stat().st_mtime_ns == changed for path, changed in half.items()), (
        "a complete image was rendered again"
    )

    next((broken / "toy" / "jpg").iterdir()).unlink()
    toy.make_toy(broken, "micro", SEED, workers=1)
    assert contents(broken) == reference
    monkeypatch.setattr(make, "take", None)  # a finished set is reused, not rendered
    assert toy.make_toy(broken, "micro", SEED) == summary


def test_different_seeds_give_different_images():
    shot = Shot("x.jpg", "database", "evaluation", 1, 0)
    first, second = (frame(seed, 96, shot) for seed in (1, 2))
    assert first.photo.yaw != second.photo.yaw
    assert first.landmark.width != second.landmark.width
    assert not np.array_equal(first.pixels(), second.pixels())


def test_the_revisited_loader_reads_the_toy_set(tiny):
    data = revisited_set(tiny, "toy")
    distractors = load_distractors(tiny, "toy_distractors")
    require_images([("queries", data.queries, ""), ("database", data.database, ""), ("distractors", distractors, "")])
    summary = json.loads((tiny / "toy.json").read_text())
    assert summary["photos"]["query"] == len(data.queries) == 12
    assert summary["photos"]["database"] == len(data.database) == 56
    assert summary["photos"]["distractor"] == len(distractors) == 24
    assert len(set(data.clusters)) == 8
    sizes = {read_image(item.path).shape[:2] for item in data.database}
    assert all(max(size) == 160 for size in sizes)
    assert any(h > w for h, w in sizes)
    assert any(h < w for h, w in sizes)
    assert all(sum(len(entry[kind]) for kind in ("easy", "hard", "junk")) == 7 for entry in data.gnd)


def test_gldv2_folders_match_their_lists(tiny):
    base = tiny / "gldv2"
    lists = {split: [row["id"] for row in rows(base / f"{split}.csv")] for split in ("train", "index", "test")}
    for split, ids in lists.items():
        files = {path.relative_to(base / split).as_posix() for path in (base / split).rglob("*.jpg")}
        assert files == {f"{i[0]}/{i[1]}/{i[2]}/{i}.jpg" for i in ids}
        assert all(len(i) == 16 and int(i, 16) >= 0 for i in ids)
    train = {row["id"]: row["landmark_id"] for row in rows(base / "train.csv")}
    clean = {row["landmark_id"]: row["images"].split() for row in rows(base / "train_clean.csv")}
    assert list(rows(base / "train.csv")[0]) == ["id", "url", "landmark_id"]
    assert len(set(train.values())) == 12
    assert all(train[image] == landmark for landmark, images in clean.items() for image in images)
    index = {row["id"]: row["landmark_id"] for row in rows(base / "index_image_to_landmark.csv")}
    assert list(index) == lists["index"]
    assert not set(index.values()) & set(train.values())


def test_gldv2_solutions_match_the_landmarks(tiny):
    base = tiny / "gldv2"
    index = {row["id"]: row["landmark_id"] for row in rows(base / "index_image_to_landmark.csv")}
    retrieval = {row["id"]: row for row in rows(base / "retrieval_solution_v2.1.csv")}
    recognition = {row["id"]: row for row in rows(base / "recognition_solution_v2.1.csv")}
    assert list(retrieval) == list(recognition) == [row["id"] for row in rows(base / "test.csv")]
    ignored = [row for row in retrieval.values() if row["Usage"] == "Ignored"]
    assert all(row["images"] == "None" for row in ignored)
    scored = [row for row in retrieval.values() if row["Usage"] != "Ignored"]
    assert {row["Usage"] for row in scored} == {"Public", "Private"}
    assert all(len({index[image] for image in row["images"].split()}) == 1 for row in scored)
    places = {Path(photo["file"]).stem: photo["place"] for photo in rows(tiny / "photos.csv")}
    assert {row["id"] for row in scored} <= {image for image, place in places.items() if place == "evaluation"}
    train = {row["landmark_id"] for row in rows(base / "train.csv")}
    labeled = {image for image, row in recognition.items() if row["landmarks"]}
    assert all(recognition[image]["landmarks"] in train for image in labeled)
    assert labeled == {image for image in recognition if places[image] == "train"}
    assert sum(places[image] == "streets" for image in recognition) == 6


def test_training_and_evaluation_landmarks_are_disjoint(tiny):
    photos = rows(tiny / "photos.csv")
    places = {kind: {(p["place"], p["landmark"]) for p in photos if p["set"] == kind} for kind in ("train", "index")}
    places |= {
        kind: {(p["place"], p["landmark"]) for p in photos if p["set"] == kind} for kind in ("query", "database")
    }
    assert places["query"] == places["database"] == places["index"]
    assert not places["train"] & places["query"]
    assert not {(p["place"], p["landmark"]) for p in photos if p["set"] == "distractor"} & places["query"]
    # Several evaluation landmarks and distractors have the same style, so that they look alike.
    styles = [{p["style"] for p in photos if p["set"] == kind} for kind in ("query", "distractor")]
    assert len(styles[0]) < len(places["query"])
    assert styles[0] & styles[1]
    assert len({hashlib.sha256((tiny / p["file"]).read_bytes()).digest() for p in photos}) == len(photos)


def test_easy_hard_and_junk_follow_from_photos_csv(tiny):
    photos = rows(tiny / "photos.csv")
    database = [p for p in photos if p["set"] == "database"]
    truth = load_ground_truth(tiny / "toy" / "gnd_toy.pkl")
    queries = [p for p in photos if p["set"] == "query"]
    assert [Path(q["file"]).stem for q in queries] == truth.qimlist
    assert [Path(p["file"]).stem for p in database] == truth.imlist
    seen = set()
    for query, entry in zip(queries, truth.gnd, strict=True):
        expected = {"easy": [], "hard": [], "junk": []}
        for i, photo in enumerate(database):
            if photo["landmark"] != query["landmark"]:
                continue
            ratio = (float(photo["focal"]) / float(photo["distance"])) / (
                float(query["focal"]) / float(query["distance"])
            )
            share, turn = float(photo["share"]), abs(float(photo["yaw"]) - float(query["yaw"]))
            night = {photo["light"] == "night", query["light"] == "night"}
            easy = share >= 0.6 and turn <= 30 and 0.5 <= ratio <= 2 and len(night) == 1
            expected["junk" if share < 0.15 else "easy" if easy else "hard"].append(i)
        assert {kind: entry[kind].tolist() for kind in expected} == expected
        seen |= {kind for kind, ids in expected.items() if ids}
    assert seen == {"easy", "hard", "junk"}


def test_visible_share_and_box_equal_those_of_a_rendered_mask():
    checked = 0
    for shot in [shot for shot in plan(SIZES["tiny"], SEED) if shot.set in ("query", "database")][::6]:
        rendered = frame(SEED, 160, shot)
        photo, camera = rendered.photo, rendered.view.camera
        mask = landmark_mask(rendered.trace, rendered.landmark)
        height, width = camera.height, camera.width
        # Render only the landmark, in a frame nine times as wide and high, with one ray per pixel.
        xs = np.arange(-4 * width, 5 * width, dtype=np.float32) + np.float32(0.5)
        ys = np.arange(-4 * height, 5 * height, dtype=np.float32) + np.float32(0.5)
        whole = np.count_nonzero(cast(camera, xs, ys, rendered.landmark.solids).surface > 0)
        assert photo.share == pytest.approx(mask.mean() * width * height / whole, abs=0.05)
        if photo.share:
            fine = mask[2 * photo.y1 : 2 * photo.y2, 2 * photo.x1 : 2 * photo.x2]
            assert fine.sum() == mask.sum()
            assert 0 <= photo.x1 < photo.x2 <= photo.width
            assert 0 <= photo.y1 < photo.y2 <= photo.height
            assert all(line.any() for line in (fine[:2], fine[-2:], fine[:, :2], fine[:, -2:]))
            checked += 1
    assert checked > 5


def test_boxes_of_queries_are_inside_their_images(tiny):
    data = revisited_set(tiny, "toy")
    for item in data.queries:
        height, width = read_image(item.path).shape[:2]
        x1, y1, x2, y2 = item.box
        assert 0 <= x1 < x2 <= width
        assert 0 <= y1 < y2 <= height
        assert read_image(item.path, item.box).shape[:2] == (y2 - y1, x2 - x1)
    photos = [p for p in rows(tiny / "photos.csv") if p["set"] == "query"]
    assert all(float(photo["share"]) >= 0.55 for photo in photos)


def test_an_image_depends_only_on_its_own_key():
    shot = Shot("x.jpg", "database", "evaluation", 5, 2)
    later = frame(SEED, 96, shot).pixels()
    frame(SEED, 96, Shot("y.jpg", "database", "evaluation", 4, 0)).pixels()
    assert np.array_equal(later, frame(SEED, 96, shot).pixels())


def test_errors_name_the_folder_and_a_fix(tmp_path, micro):
    toy.make_toy(tmp_path / "set", "micro", SEED, workers=1)
    with pytest.raises(InputError, match=r"seed 3\): expected .*seed 4; remove the folder, or choose another"):
        toy.make_toy(tmp_path / "set", "micro", 4)
    with pytest.raises(InputError, match=r"size micro, seed 3\): expected version 2, size tiny"):
        toy.make_toy(tmp_path / "set", "tiny", SEED)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "toy.unfinished.json").write_text('{"version": 2, "size": "large", "seed": 0}')
    with pytest.raises(InputError, match="contains a different toy data set"):
        toy.make_toy(tmp_path / "begun", "micro", 0)
    (tmp_path / "begun" / "toy.unfinished.json").write_text("[]")
    with pytest.raises(InputError, match="contains a different toy data set"):
        toy.make_toy(tmp_path / "begun", "micro", 0)
    (tmp_path / "begun" / "toy.unfinished.json").write_text("{")
    with pytest.raises(InputError, match="cannot read"):
        toy.make_toy(tmp_path / "begun", "micro", 0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.jpg").touch()
    with pytest.raises(InputError, match=r"contains other files, such as holiday\.jpg: expected"):
        toy.make_toy(tmp_path / "mine", "micro", 0)
    with pytest.raises(InputError, match="is a file: expected a folder"):
        toy.make_toy(tmp_path / "mine" / "holiday.jpg", "micro", 0)
    for invalid in ({"size": "huge"}, {"seed": -1}, {"workers": 0}):
        with pytest.raises(InputError, match="toy data set: "):
            toy.make_toy(tmp_path / "new", **({"size": "micro"} | invalid))
    assert not (tmp_path / "new").exists()


def test_the_command_reuses_the_set_and_writes_the_overview_image(tiny, tmp_path, capsys):
    def run(*arguments: str) -> int:
        return cli.main(["toy-data", "--size", "tiny", "--out", str(tiny), *arguments])

    sheet = tmp_path / "docs" / "sheet.jpg"
    assert run("--seed", str(SEED), "--sheet", str(sheet)) == 0
    output = capsys.readouterr()
    assert "12 query" in output.out
    assert "rendered" not in output.err
    assert read_image(sheet).shape[1] > 900
    assert run("--seed", "99") == 2
    assert capsys.readouterr().err.startswith("error: toy data set: ")
