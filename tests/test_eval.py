"""eval.py run as a user runs it, in its own processes and with real files."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from evaluations import FAST, ROOT, revisited, run_program, start_program
from PIL import Image, ImageColor
from sets import break_scan, write_distractors, write_folders, write_revisited

import superglobal
from superglobal.data.revisited import revisited_set
from superglobal.reporting.ranking_figures import COLORS
from superglobal.retrieval.store import DescriptorStore


def results(outputs: Path) -> dict:
    """Read the only results.json of the output folder."""
    (path,) = (outputs / "eval").rglob("results.json")
    return json.loads(path.read_text())


def test_scores_equal_those_of_the_public_functions(data, tmp_path):
    text = run_program(tmp_path, *revisited(data, "rerank.M=12", "distractors=list", "distractors.name=noise"))
    got = results(tmp_path)
    folder = next((tmp_path / "eval").rglob("results.json")).parent

    truth = revisited_set(data, "mini")
    model = superglobal.load_model("random", backbone="resnet18", scales=1)
    X = superglobal.extract(model, [*truth.database, *sorted((data / "noise/jpg").iterdir())])
    Q = superglobal.extract(model, truth.queries)
    _, ids = superglobal.search(Q, X, k=len(X))
    expected = {"search": superglobal.revisited_map(Q, X, truth)}
    _, ids = superglobal.rerank(Q, X, ids, M=12)
    expected["rerank"] = superglobal.revisited_map(Q, X, truth, ids)
    for stage, result in expected.items():
        assert got["metrics"][stage]["map"] == pytest.approx(result.map, abs=1e-12)
    with np.load(folder / "rankings.npz") as rankings:
        assert np.array_equal(rankings["rerank_ids"], ids)
    with open(folder / "per_query.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["rerank medium AP"]) for r in rows] == expected["rerank"].ap["medium"].tolist()
    assert f"{100 * expected['rerank'].map['hard']:.2f}" in text
    assert "weights random" in text
    assert "pooling: gem_plus, regional, scale, relup on; rerank superglobal M=12 K=9 beta=0.15" in text
    assert got["counts"] == {"queries": 6, "database": 28}
    assert got["dataset"] == "mini+noise"
    assert (folder / "csv/metrics.csv").exists()


def test_the_figure_shows_relevance_by_color(data, tmp_path):
    run_program(tmp_path, *revisited(data, "figures.queries=2", "figures.ranks=4"))
    folder = next((tmp_path / "eval").rglob("results.json")).parent
    sheet = np.asarray(Image.open(folder / "sheet.png").convert("RGB"))
    with np.load(folder / "rankings.npz") as rankings:
        first = rankings["search_ids"][0, 0]
    truth = revisited_set(data, "mini").gnd[0]
    expected = next((COLORS[n] for n in ("easy", "hard", "junk") if first in truth[n]), COLORS["negative"])
    assert tuple(sheet[40, 6 + 164 + 2]) == ImageColor.getrgb(expected)
    assert (0xFF, 0xE6, 0x00) in {tuple(p) for p in sheet[28:190, 6:170].reshape(-1, 3)}  # the query's box


def test_a_second_run_extracts_only_what_changed_settings_require(data, tmp_path):
    def extracted(name, *overrides):
        run_program(tmp_path / name, *revisited(data, f"paths.stores={tmp_path / 'stores'}", *overrides))
        return results(tmp_path / name)["about"]["extracted"]

    assert extracted("a") == {"database": 24, "queries": 6}
    assert extracted("b", "rerank.K=3") == {"database": 0, "queries": 0}
    assert extracted("c", "dataset.crop_query=false") == {"database": 0, "queries": 6}
    assert extracted("d", "pooling.regional=off") == {"database": 24, "queries": 6}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_and_keeps_the_extracted_rows(tmp_path, number, status):
    write_revisited(tmp_path, landmarks=40, views=12)
    process = start_program(tmp_path / "o", *revisited(tmp_path, "scales=5"))
    deadline = time.monotonic() + 120
    rows = 0
    while process.poll() is None and rows == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
        rows = sum(np.load(p).sum() for p in (tmp_path / "o" / "stores").glob("mini-database-*/done.npy"))
    process.send_signal(number)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == status, text
    assert ("run the same command to resume with the missing images" in text) == (number == signal.SIGINT)
    (store,) = (tmp_path / "o" / "stores").glob("mini-database-*")
    assert rows <= len(DescriptorStore.open(store)) - len(DescriptorStore.open(store).missing) < 440


KILL_AFTER_80_ROWS = """
import os, runpy, signal, sys
from superglobal.retrieval.store import DescriptorStore
write, count = DescriptorStore.write_rows, 0
def killed(self, rows, descriptors):
    global count
    count += len(rows)
    if count >= 80:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, rows, descriptors)
DescriptorStore.write_rows = killed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_killed_run_resumes_with_the_missing_rows(tmp_path):
    write_revisited(tmp_path, landmarks=20, views=6)
    overrides = revisited(tmp_path)
    words = [str(ROOT / "eval.py"), *overrides, f"paths.outputs={tmp_path / 'killed'}"]
    assert (
        subprocess.run([sys.executable, "-c", KILL_AFTER_80_ROWS, *words], cwd=ROOT, capture_output=True).returncode
        == -signal.SIGKILL
    )
    (store,) = (tmp_path / "killed" / "stores").glob("mini-database-*")
    missing = len(DescriptorStore.open(store).missing)
    assert 20 < missing <= 36  # rows are flushed after 64 rows or 5 seconds

    run_program(tmp_path / "killed", *overrides)
    run_program(tmp_path / "whole", *overrides)
    resumed, whole = results(tmp_path / "killed"), results(tmp_path / "whole")
    assert resumed["about"]["extracted"] == {"database": missing, "queries": 20}
    assert resumed["metrics"] == whole["metrics"]
    (whole_store,) = (tmp_path / "whole" / "stores").glob("mini-database-*")
    assert whole_store.name == store.name
    assert np.array_equal(DescriptorStore.open(store).block(0, 100), DescriptorStore.open(whole_store).block(0, 100))
    loaded = [dict(np.load(next((tmp_path / n / "eval").rglob("rankings.npz")))) for n in ("killed", "whole")]
    assert all(np.array_equal(loaded[0][k], loaded[1][k]) for k in loaded[1])


def test_two_shards_one_of_them_killed_give_the_store_of_a_single_run(tmp_path):
    """Rows are equal bit for bit where batches contain the same images, and within 1e-6 elsewhere."""
    write_revisited(tmp_path, landmarks=32, views=6)
    # Shards take blocks of 20 of the 160 images and blocks of 4 of the 32 queries. With batches of 5, the batches of
    # the database are therefore the same as without shards.
    overrides = revisited(tmp_path, "extraction.batch_size=5")
    together = tmp_path / "together"
    second_shard = start_program(together, *overrides, "extraction.shard=2/2")
    words = [str(ROOT / "eval.py"), *overrides, "extraction.shard=1/2", f"paths.outputs={together}"]
    first_shard = subprocess.run([sys.executable, "-c", KILL_AFTER_80_ROWS, *words], cwd=ROOT, capture_output=True)
    assert first_shard.returncode == -signal.SIGKILL
    assert second_shard.wait(timeout=240) == 0
    (store,) = (DescriptorStore.open(folder) for folder in (together / "stores").glob("mini-database-*"))
    missing = len(store.missing)
    assert 0 < missing < 80
    run_program(together, *overrides, "extraction.shard=1/2")
    run_program(tmp_path / "whole", *overrides)
    assert results(together)["metrics"] == results(tmp_path / "whole")["metrics"]
    assert results(together)["about"]["extracted"]["database"] == missing
    for title, count, tolerance in (("database", 160, 0), ("queries", 32, 1e-6)):
        stores = [
            DescriptorStore.open(next((folder / "stores").glob(f"mini-{title}-*"))).block(0, count)
            for folder in (together, tmp_path / "whole")
        ]
        assert np.abs(stores[0] - stores[1]).max() <= tolerance


def test_two_processes_give_the_descriptors_of_one_process(data, tmp_path):
    run_program(tmp_path / "one", *revisited(data))
    text = run_program(tmp_path / "two", *revisited(data, "trainer.devices=2", "trainer.strategy=ddp"))
    assert "MEMBER: 2/2" in text
    single, double = results(tmp_path / "one"), results(tmp_path / "two")
    assert single["metrics"] == double["metrics"]
    assert single["about"]["stores"]["database"]["fingerprint"] == double["about"]["stores"]["database"]["fingerprint"]


def test_a_corrupt_image_ends_all_processes_and_is_named(tmp_path):
    folder = write_revisited(tmp_path)
    corrupt = folder / "jpg/l2_000002.jpg"
    break_scan(corrupt)  # passes the check, not the decoder
    overrides = revisited(tmp_path, "trainer.devices=2", "trainer.strategy=ddp")
    text = run_program(tmp_path / "o", *overrides, status=2)
    assert str(corrupt) in text
    assert "Traceback" not in text


def test_corrupt_distractors_are_skipped_if_configured(tmp_path):
    write_revisited(tmp_path)
    write_distractors(tmp_path, count=6)
    write_distractors(tmp_path, "less", count=6)
    (tmp_path / "less/less.txt").write_text("d0.jpg\nd2.jpg\nd3.jpg\nd5.jpg\n")
    (tmp_path / "noise/jpg/d1.jpg").unlink()
    break_scan(tmp_path / "noise/jpg/d4.jpg")  # passes the check, not the decoder
    extra = revisited(tmp_path, "distractors=list", "distractors.name=noise", "rerank.M=12")
    skip = ["distractors.unreadable=skip", "distractors.max_corrupt_fraction=0.5"]
    assert "1 of 6 images missing" in run_program(tmp_path / "a", *extra, status=2)
    assert "max_corrupt_fraction=0.001 allows" in run_program(
        tmp_path / "a", *extra, "distractors.unreadable=skip", status=2
    )
    text = run_program(tmp_path / "b", *extra, *skip)
    assert "2 distractors are missing or corrupt and were not ranked" in text
    (listed,) = (tmp_path / "b" / "stores").glob("noise-*/skipped.txt")
    assert sorted(Path(line.split("\t")[0]).name for line in listed.read_text().splitlines()) == ["d1.jpg", "d4.jpg"]
    got = results(tmp_path / "b")
    assert (got["dataset"], got["counts"]["database"]) == ("mini+noise (2 skipped)", 28)
    run_program(tmp_path / "c", *revisited(tmp_path, "distractors=list", "distractors.name=less", "rerank.M=12"))
    assert got["metrics"] == results(tmp_path / "c")["metrics"]
    assert "0 to extract" in run_program(tmp_path / "d", *extra, *skip, f"paths.stores={tmp_path}/b/stores")
    assert len(listed.read_text().splitlines()) == 2


def test_a_run_that_must_not_skip_rejects_a_store_with_skipped_images(tmp_path):
    write_revisited(tmp_path)
    write_distractors(tmp_path)
    break_scan(tmp_path / "noise/jpg/d2.jpg")
    extra = revisited(tmp_path, "distractors=list", "distractors.name=noise")
    run_program(tmp_path / "a", *extra, "distractors.unreadable=skip", "distractors.max_corrupt_fraction=0.5")
    text = run_program(tmp_path / "a", *extra, status=2)
    assert "1 images were skipped by a run with distractors.unreadable=skip" in text


def test_all_missing_files_are_reported_in_one_message_at_the_start(tmp_path):
    folder = write_revisited(tmp_path)
    (folder / "jpg/l0_000001.jpg").unlink()
    cut = folder / "jpg/l1_000002.jpg"
    cut.write_bytes(cut.read_bytes()[:-200])
    overrides = [o for o in revisited(tmp_path) if not o.startswith(("weights", "backbone"))]
    text = run_program(tmp_path / "o", *overrides, "weights=nowhere.pyth", status=2)
    assert "Traceback" not in text
    for part in ("images missing, 1 corrupt", "l0_000001.jpg", str(cut), "nowhere.pyth", "gnd_mini.pkl"):
        assert part in text
    assert not [*(tmp_path / "o" / "stores").glob("*/")]


def test_a_sweep_writes_one_table_even_if_jobs_fail(data, tmp_path):
    """ReLUP does not apply to ConvNeXt, and rerank.K=0 is invalid; the tables show both."""
    overrides = [o for o in revisited(data) if o != "backbone=resnet18"]
    convnext = ["backbone=timm", "backbone.name=convnext_atto", "ablation=gem,relup,no_relup,rerank"]
    text = run_program(tmp_path, "-m", *overrides, *convnext)
    table = next(tmp_path.rglob("table.csv"))
    with open(table) as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["gem", "relup", "rerank", "no_relup"]
    assert rows["relup"]["medium"] == rows["no_relup"]["medium"] == "n/a"
    assert rows["gem"]["gain"] == "+0.00"
    gain = float(rows["rerank"]["medium"]) - float(rows["gem"]["medium"])
    assert float(rows["rerank"]["gain"]) == pytest.approx(gain, abs=0.011)
    assert rows["rerank"]["hard"] in text
    low, high = map(float, rows["rerank"]["95 % gain"].split(" to "))
    assert low <= float(rows["rerank"]["gain"]) <= high
    assert rows["gem"]["95 % gain"] == ""
    assert rows["gem"]["95 % medium"].count("-") == 1
    assert table.with_suffix(".md").read_text().count("\n") == 6
    again = [sys.executable, "-m", "superglobal", "report", str(table.parent)]
    before = table.read_text()
    assert subprocess.run(again, capture_output=True).returncode == 0
    assert table.read_text() == before

    text = run_program(tmp_path / "k", "-m", *revisited(data, "rerank.K=3,0,5"), status=2)
    assert "Traceback" not in text
    with open(next((tmp_path / "k").rglob("table.csv"))) as file:
        by_k = {row["rerank.K"]: row["medium"] for row in csv.DictReader(file)}
    expected = {"0": "failed"}
    for path in (tmp_path / "k").rglob("results.json"):
        job = json.loads(path.read_text())
        if job["status"] == "ok":
            medium = job["metrics"]["rerank"]["map"]["medium"]
            expected[str(job["config"]["rerank"]["K"])] = f"{100 * medium:.2f}"
    assert len(expected) == 3
    assert by_k == expected


def test_the_first_job_of_a_sweep_extracts_for_all_jobs_with_the_same_images(data, tmp_path):
    """Sweep eight poolings, with and without ReLUP, over two lists of scales, which cannot share feature maps."""
    switches = [f"pooling.{name}=true,false" for name in ("gem_plus", "regional", "relup")]
    text = run_program(tmp_path, "-m", *revisited(data, "rerank=none", *switches), "scales=1,[0.8]")
    assert text.count("extracting descriptors of 8 networks of the sweep in one pass") == 2
    jobs = sorted((tmp_path / "eval").rglob("results.json"), key=lambda path: int(path.parent.name.split("_")[0]))
    results_of_jobs = [json.loads(path.read_text()) for path in jobs]
    counts = [job["about"]["extracted"]["database"] for job in results_of_jobs]
    assert sorted(counts) == [0] * 14 + [24] * 2
    assert counts[0] == 24
    alone = ["pooling.gem_plus=true", "pooling.regional=false", "pooling.relup=false", "scales=[0.8]"]
    run_program(tmp_path / "alone", *revisited(data, "rerank=none", *alone))
    single = results(tmp_path / "alone")
    (same,) = [job for job in results_of_jobs if job["about"]["network"] == single["about"]["network"]]
    assert same["metrics"] == single["metrics"]
    name = f"mini-database-{single['about']['stores']['database']['fingerprint'][:16]}"
    stores = [DescriptorStore.open(folder / "stores" / name) for folder in (tmp_path, tmp_path / "alone")]
    assert np.abs(stores[0].block(0, 24) - stores[1].block(0, 24)).max() < 1e-6


def test_shards_can_be_extracted_by_independent_jobs(data, tmp_path):
    stores = f"paths.stores={tmp_path / 'stores'}"
    text = run_program(tmp_path / "a", *revisited(data, stores, "extraction.shard=2/3"))
    assert "Extracted shard 2/3; " in text
    assert not list((tmp_path / "a").rglob("results.json"))
    run_program(tmp_path / "b", *revisited(data, stores, "extraction.shard=1/3"))
    run_program(tmp_path / "c", *revisited(data, stores, "extraction.shard=3/3"))
    run_program(tmp_path / "whole", *revisited(data))
    assert results(tmp_path / "c")["metrics"] == results(tmp_path / "whole")["metrics"]
    assert results(tmp_path / "c")["about"]["extracted"]["database"] in range(5, 12)
    assert "expected k/n with 1 <= k <= n" in run_program(
        tmp_path / "d", *revisited(data, "extraction.shard=4/3"), status=2
    )


def test_a_folder_without_labels_gives_ranked_lists(tmp_path):
    database = write_folders(tmp_path / "photos")
    query = tmp_path / "query.png"
    Image.open(database / "label1/0.jpg").resize((8, 8)).save(query)  # tiny, and in a different format
    Image.new("RGB", (5200, 3900), "navy").save(database / "large.jpg")  # 20 megapixels
    folder = ["dataset=folder", "logger=wandb", f"dataset.database={database}", f"dataset.query={query}", *FAST]
    text = run_program(tmp_path / "o", *folder)
    out = next((tmp_path / "o/eval").rglob("results.json")).parent
    latest = tmp_path / "o" / "eval" / "latest"
    assert latest.is_symlink()
    assert not latest.readlink().is_absolute()
    assert latest.resolve() == out
    with open(out / "rankings.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert {row["image"] for row in rows} >= {"large.jpg", "label1/0.jpg"}
    assert [row["rank"] for row in rows] == [str(i) for i in range(1, 11)]
    for row in rows[:5]:
        assert re.search(rf"{row['rank']}  +0\.\d\d\d  {row['image']}", text)
    (listed,) = json.loads((out / "rankings.json").read_text())
    assert [entry["image"] for entry in listed["results"]] == [row["image"] for row in rows]
    assert (out / "sheet.png").stat().st_size > 1000
    # W&B needs no key, asks no questions, and writes a run that can be uploaded.
    assert list((out / "wandb").glob("offline-run-*/*.wandb"))
    assert "wandb sync" in text


def test_a_labeled_folder_is_scored_without_the_query_itself(tmp_path):
    database = write_folders(tmp_path / "photos", landmarks=4, views=4)
    run_program(
        tmp_path / "o", "dataset=folder", f"dataset.database={database}", "dataset.labels=true", "logger=csv", *FAST
    )
    got = results(tmp_path / "o")
    assert got["metrics"]["search"]["queries"] == {"all": 16}
    out = next((tmp_path / "o/eval").rglob("rankings.npz"))
    with np.load(out) as rankings:
        for stage in ("search", "rerank"):
            assert rankings[f"{stage}_ids"].shape == (16, 15)
            assert not (rankings[f"{stage}_ids"] == np.arange(16)[:, None]).any()


def test_user_provided_descriptors_replace_extraction(data, tmp_path):
    rng = np.random.default_rng(0)
    rows = {"q": 6, "x": 24, "short": 23}
    for name, count in rows.items():
        x = rng.standard_normal((count, 16)).astype(np.float32)
        np.save(tmp_path / f"{name}.npy", x / np.linalg.norm(x, axis=1, keepdims=True))
    np.save(tmp_path / "raw.npy", rng.standard_normal((24, 16)).astype(np.float32))

    def own(database):
        return [
            f"descriptors.query={tmp_path / 'q.npy'}",
            f"descriptors.database={tmp_path / database}.npy",
            "logger=csv",
        ]

    run_program(tmp_path / "o", "dataset=revisited", "dataset.name=mini", f"paths.data={data}", *own("x"))
    truth = revisited_set(data, "mini")
    expected = superglobal.revisited_map(np.load(tmp_path / "q.npy"), np.load(tmp_path / "x.npy"), truth)
    assert results(tmp_path / "o")["metrics"]["search"]["map"] == pytest.approx(expected.map, abs=1e-12)
    run_program(tmp_path / "o2", "dataset=descriptors", *own("x"))
    assert next((tmp_path / "o2").rglob("rankings.csv"))
    for wrong, message in (("short", "23 rows"), ("raw", "normalize"), ("nowhere", "nowhere.npy")):
        common = ["dataset=revisited", "dataset.name=mini", f"paths.data={data}"]
        assert message in run_program(tmp_path / wrong, *common, *own(wrong), status=2)
