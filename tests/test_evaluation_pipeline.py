"""Evaluations in this process: every setting takes effect, and stores depend on what changes descriptors."""

from __future__ import annotations

import csv
import math
import pickle

import numpy as np
import pytest
import torch
from evaluations import BASE, QUIET, ROOT, fingerprints, mini, run
from hydra import compose, initialize_config_dir
from PIL import Image
from sets import break_scan, write_folders, write_revisited

import superglobal
from superglobal.config import register
from superglobal.errors import InputError
from superglobal.evaluation.inputs import leave_out_unreadable
from superglobal.evaluation.module import UnreadableImagesError
from superglobal.evaluation.pipeline import evaluate
from superglobal.evaluation.saved_run import FinishedRun
from superglobal.metrics.revisited import REVISITED, average_precision
from superglobal.models.weights import save_weights
from superglobal.retrieval.store import DescriptorStore
from superglobal.retrieval.store_tools import verify
from superglobal.utils.precision import full_precision


@pytest.mark.parametrize(
    "override",
    [
        "scales=[1.0,0.8]",
        "antialias=true",
        "seed=1",
        "pooling.gem_plus=off",
        "pooling.regional=off",
        "pooling.scale=off",
        "pooling.relup=off",
        "pooling.gem_plus_p=4.0",
        "dataset.max_side=100",
    ],
)
def test_settings_that_change_descriptors_also_change_the_fingerprint(data, tmp_path, override):
    # Two scales, so that Scale-GeM and antialiasing have an effect.
    before = run(tmp_path, *mini(data), "scales=[1.0,0.9]")
    after = run(tmp_path, *mini(data), *(["scales=[1.0,0.9]"] if "scales" not in override else []), override)
    assert fingerprints(before)["database"] != fingerprints(after)["database"]
    scores = [np.load(r["folder"] / "rankings.npz")["search_scores"] for r in (before, after)]
    assert np.abs(scores[0] - scores[1]).max() > 1e-6


@pytest.mark.parametrize("override", ["rerank.K=3", "rerank.beta=0.9", "rerank.M=4"])
def test_reranking_settings_only_change_the_reranked_results(data, tmp_path, override):
    before, after = run(tmp_path, *mini(data)), run(tmp_path, *mini(data), override)
    assert fingerprints(before) == fingerprints(after)
    assert after["about"]["extracted"] == {"database": 0, "queries": 0}
    loaded = [dict(np.load(r["folder"] / "rankings.npz")) for r in (before, after)]
    assert np.array_equal(loaded[0]["search_ids"], loaded[1]["search_ids"])
    assert not np.array_equal(loaded[0]["rerank_scores"], loaded[1]["rerank_scores"])


def test_damaged_rows_end_an_evaluation_and_only_they_are_extracted_again(data, tmp_path):
    settings = [*mini(data), "k=5", "rerank=none"]
    first = run(tmp_path, *settings)
    (folder,) = (tmp_path / "stores").glob("mini-database-*")
    shard = np.load(folder / "shard-00000.npy", mmap_mode="r+")
    shard[20:22] = 0
    shard.flush()
    for setting in ("whitening=none", "whitening=center", "index=flat_fp16"):
        with pytest.raises(InputError, match=r"shard-00000\.npy: rows 20-21 are damaged"):
            run(tmp_path, *settings, setting)
    assert not [*(tmp_path / "stores").glob("whitening-*"), *(tmp_path / "stores").glob("*.faiss")]
    assert verify(DescriptorStore.open(folder), repair=True).tolist() == [20, 21]
    again = run(tmp_path, *settings)
    assert again["about"]["extracted"] == {"database": 2, "queries": 0}
    assert again["metrics"] == first["metrics"]


def test_every_exact_index_gives_the_same_result(data, tmp_path):
    results = [run(tmp_path, *mini(data), f"index={name}") for name in ("flat", "faiss", "torch")]
    assert results[0]["metrics"] == results[1]["metrics"] == results[2]["metrics"]


def test_only_changed_images_are_extracted_again(tmp_path):
    photos = write_folders(tmp_path / "photos")
    pixels = np.zeros((160, 200, 3), np.uint8)
    Image.fromarray(pixels).save(photos / "plain.bmp")
    folder = ["dataset=folder", f"dataset.database={photos}", f"dataset.query={photos / 'label0' / '0.jpg'}"]
    assert run(tmp_path, *folder)["about"]["extracted"] == {"database": 10, "queries": 1}
    pixels[20:30] = 255  # same size, same start, same end
    Image.fromarray(pixels).save(photos / "plain.bmp")
    assert run(tmp_path, *folder)["about"]["extracted"] == {"database": 1, "queries": 0}
    Image.fromarray(pixels[::-1]).save(photos / "new.png")
    changed = run(tmp_path, *folder)
    assert changed["about"]["extracted"] == {"database": 1, "queries": 0}
    assert changed["dataset"] == "photos"  # the folder's name, so that results of different folders are not mixed
    fresh = run(tmp_path / "other", *folder)
    assert fresh["about"]["extracted"] == {"database": 11, "queries": 1}
    assert fingerprints(changed) == fingerprints(fresh)
    loaded = [dict(np.load(r["folder"] / "rankings.npz")) for r in (changed, fresh)]
    for key, values in loaded[0].items():  # extracted alone and in a batch: equal up to rounding
        assert np.allclose(values, loaded[1][key], atol=1e-6, rtol=0), key


def test_a_download_that_is_completed_in_the_middle_is_extracted_again(tmp_path):
    photos = write_folders(tmp_path / "photos")
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8)
    Image.fromarray(noise).save(photos / "noise.jpg", quality=95)
    whole = (photos / "noise.jpg").read_bytes()
    assert len(whole) > 100_000
    holed = bytearray(whole)
    holed[90_000:90_500] = bytes(500)
    (photos / "noise.jpg").write_bytes(holed)
    folder = ["dataset=folder", f"dataset.database={photos}", f"dataset.query={photos / 'noise.jpg'}", "rerank=none"]
    assert run(tmp_path, *folder)["about"]["extracted"] == {"database": 10, "queries": 1}
    (photos / "noise.jpg").write_bytes(whole)
    assert run(tmp_path, *folder)["about"]["extracted"] == {"database": 1, "queries": 1}


def test_unreadable_images_of_a_folder_are_left_out_and_counted(tmp_path, capsys):
    photos = write_folders(tmp_path / "photos")
    folder = ["dataset=folder", f"dataset.database={photos}", "dataset.labels=true", "rerank=none"]
    (tmp_path / "good").mkdir()
    for name in ("label0/0.jpg", "label2/2.jpg"):
        (photos / name).rename(tmp_path / "good" / name.replace("/", "-"))
    expected = run(tmp_path / "expected", *folder)
    (photos / "label0/0.jpg").write_bytes(b"")
    (tmp_path / "good" / "label2-2.jpg").rename(photos / "label2/2.jpg")
    break_scan(photos / "label2/2.jpg")  # found only when it is decoded
    capsys.readouterr()
    for _ in range(2):
        result = run(tmp_path, *folder, "k=300")
        assert result["metrics"] == expected["metrics"]
        assert (result["counts"], result["about"]["unreadable"]) == ({"queries": 7, "database": 7}, 2)
        assert "photos (2 unreadable): 7 queries, 7 images" in capsys.readouterr().out
        listed = (result["folder"] / "unreadable.txt").read_text().splitlines()
        assert [line.split("\t")[0] for line in listed] == [str(photos / "label0/0.jpg"), str(photos / "label2/2.jpg")]
        assert FinishedRun(result["folder"]).dataset.unreadable
    with pytest.raises(InputError, match=r"label2/2.jpg: damaged inside"):
        run(tmp_path, *folder, "dataset.unreadable=error")


def test_only_a_single_process_loads_again_without_unreadable_images(tmp_path):
    def load():
        calls.append(0)
        raise UnreadableImagesError("damaged", [])

    for shard, expected in ((None, 2), ("0/2", 1)):
        calls = []
        with pytest.raises(UnreadableImagesError):
            leave_out_unreadable(load, str(tmp_path), shard)
        assert len(calls) == expected


def test_a_benchmark_is_not_evaluated_without_some_of_its_images(data, tmp_path):
    with pytest.raises(InputError, match="mini is a benchmark, whose results require all images"):
        run(tmp_path, *mini(data), "dataset.unreadable=skip")


def test_queries_without_a_score_and_large_k_are_reported(tmp_path, capsys, caplog):
    photos = write_folders(tmp_path / "photos")
    for name in ("1.jpg", "2.jpg"):
        (photos / "label2" / name).unlink()
    result = run(tmp_path, "dataset=folder", f"dataset.database={photos}", "dataset.labels=true", "rerank=none", "k=50")
    out = capsys.readouterr().out
    assert "photos: 7 queries (6 scored), 7 images" in out
    assert "queries without a score, because no other image has their label: 1, such as label2/0.jpg" in out
    assert result["about"]["notes"][0].startswith("queries without a score")
    assert "k=50: 6 results per query, because the database has no more images" in caplog.messages


def test_leave_one_out_scores_equal_brute_force(tmp_path):
    photos = write_folders(tmp_path / "photos", landmarks=4, views=4)
    result = run(tmp_path, "dataset=folder", f"dataset.database={photos}", "dataset.labels=true", "rerank.M=6")
    model = superglobal.load_model("random", backbone="resnet18", scales=1)
    X = superglobal.extract(model, sorted(photos.rglob("*.jpg"))).astype(np.float64)
    labels = np.repeat(np.arange(4), 4)
    order = np.argsort(-(X @ X.T), axis=1, kind="stable")
    reranked = np.load(result["folder"] / "rankings.npz")["rerank_ids"]
    for stage, lists in (("search", order), ("rerank", reranked)):
        aps = []
        for query, row in enumerate(lists):
            others = row[row != query]
            hits = np.flatnonzero(labels[others] == labels[query])
            steps = [((j / r if r else 1.0) + (j + 1) / (r + 1)) / 2 for j, r in enumerate(hits)]
            aps.append(sum(steps) / 3)
        assert result["metrics"][stage]["map"]["all"] == pytest.approx(np.mean(aps), abs=1e-12)


def test_links_to_the_query_are_ignored_in_its_ranking(tmp_path):
    photos = write_folders(tmp_path / "photos", 2, 3)
    options = ("dataset=folder", f"dataset.database={photos}", "dataset.labels=true", "rerank.M=4")
    plain = run(tmp_path / "outputs", *options)
    for name in ("label0/a.jpg", "label0/z.jpg", "label1/z.jpg"):
        (photos / name).symlink_to(photos / "label0" / "1.jpg")
    result = run(tmp_path / "outputs", *options)
    assert result["counts"]["queries"] == 9
    rows = {row["query"]: row for row in csv.DictReader((result["folder"] / "per_query.csv").open())}
    before = {row["query"]: row for row in csv.DictReader((plain["folder"] / "per_query.csv").open())}
    same = [rows[name]["search all AP"] for name in ("label0/a.jpg", "label0/1.jpg", "label0/z.jpg")]
    assert same == [before["label0/1.jpg"]["search all AP"]] * 3


def test_pooling_comes_from_the_weights_file_unless_it_is_overridden(data, tmp_path):
    model = superglobal.load_model("random", backbone="resnet18", pooling={"gem_plus": False, "p": 2.0}, scales=1)
    path = tmp_path / "trained.safetensors"
    save_weights(model, path, {})
    base = [o for o in BASE if not o.startswith(("weights", "backbone"))]

    def pooling(*overrides):
        result = run(tmp_path, *mini(data), f"weights={path}", *overrides, base=base)
        assert result["about"]["trained_pooling"]["gem_plus"] is False
        return result["about"]["network"]["pooling"], result["metrics"]["search"]["map"]

    stored, as_trained = pooling()
    assert (stored["gem_plus"], stored["p"], stored["regional"]) == (False, 2.0, True)
    assert pooling("pooling.regional=off")[0] == {**stored, "regional": False}
    assert pooling("pooling=superglobal")[0]["gem_plus"] is True
    sharper, overridden = pooling("pooling.p=6")  # an explicit exponent overrides the one in the file
    assert sharper["p"] == 6.0
    assert overridden != as_trained


def test_mean_and_std_stored_with_the_weights_are_used(tmp_path):
    model = superglobal.load_model("random", backbone="resnet18", pooling="gem", scales=1)
    image = np.random.default_rng(0).integers(0, 255, (70, 80, 3), dtype=np.uint8)
    model.backbone.mean, model.backbone.std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    save_weights(model, tmp_path / "x.safetensors", {})
    loaded = superglobal.load_model(tmp_path / "x.safetensors", scales=1)
    x = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
    expected = (x / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(loaded.normalize(x), expected)
    assert not np.allclose(superglobal.extract(loaded, image), superglobal.extract(model, image), atol=1e-4)


def test_results_and_stores_record_the_resolved_precision(data, tmp_path):
    first = run(tmp_path, *mini(data))
    assert first["config"]["extraction"]["precision"] == first["about"]["network"]["precision"] == "float32"
    again = run(tmp_path, *mini(data), "extraction.precision=float32")
    assert again["about"]["extracted"] == {"database": 0, "queries": 0}
    assert fingerprints(again) == fingerprints(first)


def test_full_precision_uses_strict_float32_and_restores_the_settings():
    library = torch.backends
    before = (library.cuda.matmul.fp32_precision, library.cudnn.conv.fp32_precision)
    with full_precision():
        assert library.cuda.matmul.fp32_precision == library.cudnn.conv.fp32_precision == "ieee"
        assert library.mkldnn.matmul.fp32_precision == library.mkldnn.conv.fp32_precision == "ieee"
    assert (library.cuda.matmul.fp32_precision, library.cudnn.conv.fp32_precision) == before


def test_user_provided_descriptors_need_ground_truth_but_no_images(tmp_path):
    folder = write_revisited(tmp_path)
    for path in (folder / "jpg").iterdir():
        path.unlink()
    rng = np.random.default_rng(0)
    for name, count in (("q", 6), ("x", 24)):
        x = rng.standard_normal((count, 16)).astype(np.float32)
        np.save(tmp_path / f"{name}.npy", x / np.linalg.norm(x, axis=1, keepdims=True))
    descriptors = [f"descriptors.query={tmp_path / 'q.npy'}", f"descriptors.database={tmp_path / 'x.npy'}"]
    result = run(tmp_path, *mini(tmp_path), *descriptors, "figures.queries=3")
    assert result["protocol"]["crop_query"] is None
    assert result["metrics"]["search"]["queries"] == {"easy": 6, "medium": 6, "hard": 6}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4), (",
        b"{'descr': '<f4', b'fortran_order': False, 'shape': (4, 4)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-4, -4)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000000000000, 4)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000000, 4)}",
    ],
)
def test_damaged_descriptor_files_raise_input_errors(tmp_path, header):
    """NumPy raises EOFError, TokenError (of tokenize) and TypeError for these headers."""
    path = tmp_path / "x.npy"
    path.write_bytes(header and b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(118) + bytes(64))
    descriptors = [f"descriptors.query={path}", f"descriptors.database={path}", "dataset=descriptors"]
    with pytest.raises(InputError, match=r"x\.npy: not a readable \.npy file of descriptors"):
        run(tmp_path, *descriptors)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scales=foo", "1, 3, 5"),
        ("scales=true", "1, 3, 5"),
        ("scales=2", "1, 3, 5"),
        ("trainer.devices=0", "trainer"),
        ("trainer.devices=foo", "trainer"),
        ("trainer.accelerator=foo", "trainer"),
        ("trainer.strategy=foo", "trainer"),
        ("trainer.num_workers=-1", "num_workers"),
        ("figures.ranks=-3", "ranks"),
        ("seed=-1", "seed"),
        ("rerank.K=0", r"rerank\.K"),
        ("rerank.beta=nan", "beta"),
        ("k=0", "k=0"),
        ("ablation=gem pooling.regional=on", "ablation=gem requires regional off"),
        ("ablation=rerank rerank=none", "ablation=rerank requires rerank on"),
        ("distractors=list distractors.name=nowhere", "nowhere.txt"),
    ],
)
def test_invalid_settings_raise_input_errors_before_any_computation(data, tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, *mini(data), *override.split())
    assert not [*(tmp_path / "stores").glob("*/")]


def test_a_single_image_without_a_query_is_an_error(tmp_path):
    photos = write_folders(tmp_path / "photos", landmarks=1, views=1)
    with pytest.raises(InputError, match="no query has another image of its label"):
        run(tmp_path, "dataset=folder", f"dataset.database={photos}", "dataset.labels=true")


def test_a_failing_tracker_causes_a_warning_that_names_it(tmp_path, monkeypatch, caplog):
    photos = write_folders(tmp_path / "photos", landmarks=1, views=1)
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    query = f"dataset.query={photos / 'label0/0.jpg'}"
    result = run(tmp_path, "dataset=folder", f"dataset.database={photos}", query, "logger=wandb")
    assert result["status"] == "ok"
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "W&B failed" in warning.getMessage()
    assert "nonsense" in warning.getMessage()
    (folder,) = (path.parent for path in tmp_path.rglob("results.json"))
    assert str(folder) in warning.getMessage()
    assert (folder / "csv" / "metrics.csv").is_file()  # the other trackers logged


def test_an_ablation_that_does_not_apply_returns_nan(data, tmp_path):
    register()
    base = [o for o in BASE if not o.startswith("backbone")]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = ["backbone=timm", "backbone.name=convnext_atto", "ablation=relup", f"paths.outputs={tmp_path}"]
        cfg = compose("eval", overrides=[*base, *QUIET, *mini(data), *overrides])
    assert math.isnan(evaluate(cfg, tmp_path))


def test_float16_stores_are_separate_and_change_scores_only_slightly(toy_data, tmp_path):
    toy = ["dataset=toy", f"paths.data={toy_data}"]
    fine, rounded = run(tmp_path, *toy), run(tmp_path, *toy, "store.dtype=float16")
    assert rounded["about"]["stores"]["database"]["dtype"] == "float16"
    assert fingerprints(fine)["database"] != fingerprints(rounded)["database"]
    # The rows are rounded from the float32 stores, as they are when a float16 store is written.
    assert rounded["about"]["extracted"] == {"database": 0, "queries": 0}
    fresh = run(tmp_path / "other", *toy, "store.dtype=float16")
    assert fresh["about"]["extracted"] == fine["about"]["extracted"]
    assert fresh["metrics"] == rounded["metrics"]
    scores = [np.load(r["folder"] / "rankings.npz")["search_scores"] for r in (fine, rounded)]
    assert 0 < np.abs(scores[0] - scores[1]).max() < 1e-3
    for name, value in fine["metrics"]["search"]["map"].items():
        assert rounded["metrics"]["search"]["map"][name] == pytest.approx(value, abs=0.02)


def test_junk_can_be_dropped_before_reranking_for_each_protocol(data, tmp_path):
    settings = [*mini(data), "rerank.M=5", "rerank.K=2"]
    got = run(tmp_path, *settings, "rerank.junk=drop", "k=8")
    kept = run(tmp_path, *settings)
    truth = superglobal.revisited_set(data, "mini")
    model = superglobal.load_model("random", backbone="resnet18", scales=1)
    X, Q = (superglobal.extract(model, items) for items in (truth.database, truth.queries))
    for protocol, definition in REVISITED.items():
        aps = []
        for q, gnd in zip(Q, truth.gnd, strict=True):
            ignored = {int(i) for name in definition.ignored for i in gnd[name]}
            order = [i for i in np.argsort(-(X @ q), kind="stable") if i not in ignored]
            _, best = superglobal.rerank(q[None], X, np.array([order[:5]]), M=5, K=2)
            order[:5] = best[0]
            ranks = [order.index(i) for name in definition.positive for i in gnd[name]]
            aps.append(average_precision(ranks))
        assert got["metrics"]["rerank"]["map"][protocol] == pytest.approx(np.mean(aps), abs=1e-9)
    assert got["metrics"]["rerank"]["map"] != kept["metrics"]["rerank"]["map"]
    assert got["metrics"]["search"] == kept["metrics"]["search"]


def test_lists_without_junk_are_reranked_completely_at_any_length(tmp_path):
    """The queries have different numbers of junk images, so the lists have different lengths."""
    gnd_file = write_revisited(tmp_path, landmarks=5, views=6) / "gnd_mini.pkl"
    truth = pickle.loads(gnd_file.read_bytes())
    for number, labels in enumerate(truth["gnd"]):
        ids = [*labels["easy"], *labels["hard"], *labels["junk"]]
        easy, rest = 1 + number % 2, 5 - number % 3
        labels["easy"], labels["hard"], labels["junk"] = ids[:easy], ids[easy:rest], ids[rest:]
    gnd_file.write_bytes(pickle.dumps(truth))
    assert sorted(len(labels["junk"]) for labels in truth["gnd"]) == [0, 0, 1, 1, 2]
    got = run(tmp_path, *mini(tmp_path), "rerank.junk=drop", "rerank.K=3", "rerank.beta=0.8")
    data = superglobal.revisited_set(tmp_path, "mini")
    model = superglobal.load_model("random", backbone="resnet18", scales=1)
    X, Q = (superglobal.extract(model, items) for items in (data.database, data.queries))
    for protocol, definition in REVISITED.items():
        aps, lengths = [], set()
        for q, gnd in zip(Q, data.gnd, strict=True):
            ignored = {int(i) for name in definition.ignored for i in gnd[name]}
            order = np.array([i for i in np.argsort(-(X @ q), kind="stable") if i not in ignored])
            lengths.add(len(order))
            best = superglobal.rerank(q[None], X, order[None], K=3, beta=0.8)[1][0].tolist()
            aps.append(average_precision([best.index(i) for name in definition.positive for i in gnd[name]]))
        assert len(lengths) > 1
        assert got["metrics"]["rerank"]["map"][protocol] == pytest.approx(np.mean(aps), abs=1e-9)


@pytest.mark.parametrize("kind", ["aqe", "adba"])
def test_dropping_junk_requires_a_shortlist_reranker(data, tmp_path, kind):
    with pytest.raises(InputError, match=r"rerank\.junk=drop"):
        run(tmp_path, *mini(data), f"rerank={kind}", "rerank.junk=drop")
