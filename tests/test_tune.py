"""Tuning: scores of stored feature maps, the search of settings, and the rejection or marking of test sets."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file
from sets import break_scan, texture, write_folders

import superglobal
from superglobal.config import register
from superglobal.config.common import validate_config
from superglobal.config.evaluation import EvalConfig
from superglobal.config.tuning import SpaceConfig, TuneConfig
from superglobal.data.evaluation_set import EvaluationSet, require_images
from superglobal.data.folder import folder_set
from superglobal.data.image_checks import CheckReport
from superglobal.data.images import ImageItem
from superglobal.errors import InputError
from superglobal.evaluation.module import ExtractionList
from superglobal.evaluation.pipeline import evaluate, score_set
from superglobal.models.weights import read_weights, save_weights
from superglobal.reporting.tables import write_tables
from superglobal.retrieval.rows import as_rows
from superglobal.training.train import train
from superglobal.tuning.feature_maps import MapStore, require_space
from superglobal.tuning.search_space import Settings, Trial, choices, compare, search, usage, write_outcome
from superglobal.tuning.tune import Scorer, draw_half, held_out_set, limit_images, tune

ROOT = Path(__file__).parents[1]
QUIET = ["trainer.accelerator=cpu", "trainer.num_workers=0", "trainer.progress=false"]
SMALL = ["space.scales=[1]", "space.windows=[3]", "space.relup_alphas=[0.0]"]


def config(script: str, *overrides: str):
    """Compose a configuration."""
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(script, overrides=list(overrides))


def run(*words: str, status: int = 0) -> str:
    """Run `python WORDS`, which must exit with `status`, and return its output."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"COLUMNS": "200"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Write six labels of four images; one is enlarged because it is small, and one is shrunk."""
    folder = write_folders(tmp_path_factory.mktemp("own") / "photos", landmarks=6, views=4)
    texture(0, 1, (60, 50)).save(folder / "label0/1.jpg")
    texture(1, 2, (1100, 300)).save(folder / "label1/2.jpg")
    return folder


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """Save random weights with a whitening layer and GeM as the trained pooling."""
    network = superglobal.load_model("random", backbone="test_resnet", pooling="gem", dim=32, seed=5)
    path = tmp_path_factory.mktemp("weights") / "best.safetensors"
    save_weights(network, path, {})
    return path


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(2.2, 1, 2.5, False, 1, 0.0, 5, 3, 0.4),
        Settings(7.0, 3, 4.0, True, 3, 0.05, 8, 12, 0.0),
        Settings(1.0, 7, 1.0, False, 3, 0.014, 400, 1, 0.6),
    ],
)
def test_stored_feature_maps_give_the_scores_of_eval(photos, export, tmp_path, settings):
    dataset = folder_set(photos, labels=True)
    checked = require_images([("database", dataset.database, "")])["database"]
    images = ExtractionList("database", "folder", dataset.database, checked, 1024)
    values = settings.pooling()
    relup = {key: value for key, value in values.items() if key.startswith("relup")}
    network = superglobal.load_model(export, pooling=relup)
    store = MapStore(tmp_path / "maps", network, 1024)
    store.fill(images, store.missing(images, [settings]), [settings], "cpu", 0)
    assert store.missing(images, [settings]) == []
    scorer = Scorer(dataset, [images], {settings.relup_alpha: store}, network, rerank=True)
    got = scorer.average_precision(settings)

    model = superglobal.load_model(export, pooling=values, scales=settings.scales)
    X = superglobal.extract(model, dataset.database, max_side=1024)
    assert np.abs(store.descriptors(settings, images, network) - X).max() < 1e-6
    overrides = [f"pooling.{key}={value}" for key, value in values.items()] + [f"scales={settings.scales}"]
    overrides += [f"rerank.M={settings.M}", f"rerank.K={settings.K}", f"rerank.beta={settings.beta}"]
    base = ["dataset=folder", f"dataset.database={photos}", "dataset.labels=true", f"weights={export}"]
    rest = ["logger=csv", "figures.queries=0", f"paths.outputs={tmp_path}", *QUIET]
    result = tmp_path / "result"
    result.mkdir()
    score = evaluate(config("eval", *base, *overrides, *rest), result)
    with (result / "per_query.csv").open() as file:
        expected = [float(row["rerank all AP"]) for row in csv.DictReader(file)]
    assert got == pytest.approx(expected, abs=1e-6)
    assert got.mean() == pytest.approx(score, abs=1e-6)


def test_stored_maps_are_reused_completed_and_never_mixed_up(photos, export, tmp_path):
    dataset = folder_set(photos, labels=True)
    checked = require_images([("database", dataset.database[:5], "")])["database"]
    images = ExtractionList("database", "folder", dataset.database[:5], checked, 1024)
    network = superglobal.load_model(export, pooling={"relup": "off"})
    store = MapStore(tmp_path, network, 1024)
    single_scale, three_scales = [Settings(scales=1)], [Settings(scales=1), Settings(scales=3)]
    estimated = store.size(images, range(5), single_scale)
    store.fill(images, [0, 2], single_scale, "cpu", 0)
    assert store.missing(images, single_scale) == [1, 3, 4]
    store.fill(images, [1, 3, 4], single_scale, "cpu", 0)
    stored = sum(path.stat().st_size for path in store.folder.glob("*.safetensors"))
    assert estimated <= stored <= estimated + 5 * 400  # the estimated size, and the headers of the files
    assert store.missing(images, three_scales) == [0, 1, 2, 3, 4]
    store.path(images.lines()[3]).write_bytes(b"cut")
    assert store.missing(images, single_scale) == [3]
    with pytest.raises(InputError, match="damaged"):
        store.descriptors(single_scale[0], images, network)
    for network_variant in (
        superglobal.load_model(export, pooling={"relup": "on"}),
        superglobal.load_model("random", backbone="test_resnet", pooling={"relup": "off"}),
        superglobal.load_model(export, pooling={"relup": "off"}, antialias=True),
    ):
        assert len(MapStore(tmp_path, network_variant, 1024).missing(images, single_scale)) == 5
    with pytest.raises(InputError, match="free"):
        require_space(tmp_path, 10**18)


def planted_scorer(folder: Path) -> Scorer:
    """Store feature maps whose mean identifies the landmark, with random spikes, so that a smaller p is better."""
    rng = np.random.default_rng(0)
    network = superglobal.load_model("random", backbone="test_resnet", pooling={"relup": "off"}, dim=0)
    store = MapStore(folder, network, None)
    channels, labels = network.backbone.channels, np.repeat(np.arange(8), 4)
    color = rng.uniform(0.5, 1.5, (8, channels))
    items = [ImageItem(Path(f"{i}.jpg")) for i in range(len(labels))]
    checked = CheckReport([str(i) for i in range(len(labels))], [(256, 256)] * len(labels), [], [])
    images = ExtractionList("database", "planted", items, checked, None)
    store.folder.mkdir(parents=True)
    for line, label in zip(images.lines(), labels, strict=True):
        x = color[label][:, None, None] * rng.uniform(0.5, 1.5, (channels, 8, 8))
        x[np.arange(channels), rng.integers(8, size=channels), rng.integers(8, size=channels)] += rng.exponential(
            6, channels
        )
        maps = {scale: torch.tensor(x, dtype=torch.float32) for scale in ("0.7071", "1", "1.4142")}
        save_file(maps, store.path(line), {"height": "256", "width": "256"})
    gnd = [{"positive": np.setdiff1d(np.flatnonzero(labels == label), i)} for i, label in enumerate(labels)]
    dataset = EvaluationSet("planted", items, items, gnd, list(map(str, labels)), "labels", True, folder, "")
    return Scorer(dataset, [images], {0.0: store}, network, rerank=False)


def test_a_planted_optimum_is_found_and_improves_the_other_half(tmp_path):
    scorer = planted_scorer(tmp_path / "maps")
    space = choices(SpaceConfig(windows=[1, 3], scales=[3], rerank=False), has_relup=False, reachable=31)
    half = draw_half(scorer.dataset.clusters, np.ones(32, bool), seed=0)
    first = Settings(relup_alpha=0.0)

    def score(settings):
        return float(scorer.average_precision(settings)[half].mean())

    trials = search(space, first, score, 30, 0, tmp_path / "journal")
    assert trials[0].settings == first
    winner = max(trials, key=lambda trial: trial.score)
    assert winner.settings.gem_plus_p < 3
    assert winner.score > trials[0].score + 0.1
    ap = [scorer.average_precision(candidate) for candidate in (winner.settings, first)]
    outcome = compare(trials, ap, half, scorer.dataset.clusters, "planted (validation set)", False, 0)
    assert outcome.search_half == (winner.score, trials[0].score)
    assert outcome.gain > 0.05
    assert outcome.interval[0] > 0
    assert (outcome.queries, outcome.landmarks) == (16, 4)


def test_written_files_state_that_there_is_no_gain(tmp_path):
    trials = [Trial(Settings(), 0.5), Trial(Settings(gem_plus_p=2.0, regional_window=1), 0.6)]
    half = np.array([True] * 4 + [False] * 4)
    ap = [np.array([0.6] * 4 + [0.4] * 4), np.full(8, 0.5)]
    outcome = compare(trials, ap, half, [*"aabbccdd"], "mine (validation set)", True, 0)
    write_outcome(tmp_path, "mine_tuned", outcome, trials)
    for group in ("pooling", "rerank"):
        text = (tmp_path / "conf" / group / "mine_tuned.yaml").read_text()
        assert "# NO GAIN: -10.00 mAP" in text
        assert "best of 2 trials" in text
        assert 'tuned_on: "mine (validation set)"' in text
    assert json.loads((tmp_path / "result.json").read_text())["gain"] == pytest.approx(-0.1)


def test_printed_overrides_equal_the_written_files(tmp_path):
    winner = Settings(gem_plus_p=2.2, regional_window=1, scale=False, scales=1, relup_alpha=0.0, K=3)
    trials = [Trial(Settings(), 0.5), Trial(winner, 0.6)]
    half, ap = np.array([True] * 4 + [False] * 4), [np.full(8, 0.6), np.full(8, 0.5)]
    outcome = compare(trials, ap, half, [*"aabbccdd"], "my own (validation set)", True, 0)
    write_outcome(tmp_path, "mine_tuned", outcome, trials)
    line = usage(tmp_path, "mine_tuned", outcome, "a b.safetensors").splitlines()[1]
    arguments = [part for part in shlex.split(line.partition("eval.py ")[2]) if part != "dataset=..."]
    got = validate_config(config("eval", *arguments), EvalConfig)
    written = OmegaConf.load(tmp_path / "conf/pooling/mine_tuned.yaml")
    assert {key: getattr(got.pooling, key) for key in written.pooling} == dict(written.pooling)
    written = OmegaConf.load(tmp_path / "conf/rerank/mine_tuned.yaml")
    assert {"M", "K", "beta"} < {*written}
    assert {key: getattr(got.rerank, key) for key in written} == dict(written)
    assert (got.scales, got.weights) == (winner.scales, "a b.safetensors")


def bowl(settings: Settings) -> float:
    """Score settings by their distance to an optimum."""
    return 1 - abs(settings.gem_plus_p - 2.4) / 10 - abs(settings.K - 4) / 40 - abs(settings.beta - 0.5)


def test_a_seed_gives_the_same_search_with_and_without_interruption(tmp_path):
    space = choices(SpaceConfig(), has_relup=True, reachable=300)
    whole = search(space, Settings(), bowl, 18, 3, tmp_path / "whole")
    calls = 0

    def interrupted(settings):
        nonlocal calls
        calls += 1
        if calls == 14:
            raise KeyboardInterrupt
        return bowl(settings)

    with pytest.raises(KeyboardInterrupt):
        search(space, Settings(), interrupted, 18, 3, tmp_path / "again")
    assert search(space, Settings(), bowl, 18, 3, tmp_path / "again") == whole
    assert search(space, Settings(), interrupted, 18, 3, tmp_path / "again") == whole
    assert calls == 14  # a finished search runs no trials
    assert search(space, Settings(), bowl, 18, 4, tmp_path / "other") != whole
    assert len({trial.settings for trial in whole}) > 12


def test_the_choices_always_include_the_values_of_the_paper():
    narrow = SpaceConfig(windows=[1], scales=[1], relup_alphas=[0.0])
    for name, distribution in choices(narrow, has_relup=True, reachable=10).items():
        assert distribution._contains(distribution.to_internal_repr(getattr(Settings(), name))), name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset=toy"], "too optimistic"),
        (["dataset=roxford5k"], "too optimistic"),
        (["dataset=folder", "dataset.database=x", "dataset.labels=true", "dataset.role=test"], "too optimistic"),
        (["dataset=toy", "dataset.role=train"], r"dataset\.role=train: settings chosen on the training images of toy"),
        (["dataset=toy", "dataset.role=exam"], "train, validation, test"),
        (["dataset=folder", "dataset.database=x"], r"dataset\.labels=true"),
        (["dataset=descriptors"], "needs images"),
        (["space.windows=[4]"], r"space\.windows=4"),
        (["space.scales=[2]"], r"space\.scales=2"),
        (["trials=0"], "trials=0"),
    ],
)
def test_invalid_tuning_configurations_raise_errors(overrides, message):
    with pytest.raises(InputError, match=message):
        validate_config(config("tune", *overrides), TuneConfig)


def test_datasets_have_their_roles():
    assert validate_config(config("tune", "dataset=toy", "allow_test=true"), TuneConfig).dataset.role == "test"
    assert (
        validate_config(config("tune", "dataset=toy", "dataset.role=validation"), TuneConfig).dataset.role
        == "validation"
    )
    for dataset in ("roxford5k", "rparis6k", "toy", "revisited", "descriptors"):
        assert config("eval", f"dataset={dataset}").dataset.role == "test"
    assert config("eval", "dataset=folder").dataset.role == "validation"
    for data in ("gldv2", "gldv2_clean", "toy"):
        assert config("train", f"data={data}").data.role == "train"


def test_written_settings_reproduce_the_score_and_mark_a_test_set(data, tmp_path, capsys):
    outputs = f"paths.outputs={tmp_path}"
    base = ["dataset=revisited", "dataset.name=mini", f"paths.data={data}", "backbone=test_resnet", "weights=random"]
    tuned = [*base, *SMALL, *QUIET, "name=marked", "trials=3", "allow_test=true", outputs]
    folder = tmp_path / "tune"
    folder.mkdir()
    tune(config("tune", *tuned), folder)
    (usage_line,) = (
        line for line in capsys.readouterr().out.splitlines() if line.startswith("Evaluate with these settings:")
    )
    with pytest.raises(InputError, match=r"contains a tuning run with different settings: network\.weights, seed"):
        tune(config("tune", *tuned, "seed=1"), folder)
    with pytest.raises(InputError, match="max_images"):
        tune(config("tune", *tuned, "max_images=10"), folder)

    script, *printed = shlex.split(usage_line.partition("python ")[2])
    printed = [part for part in printed if part != "dataset=..."]
    text = run(script, *printed, *base, "logger=csv", "figures.queries=0", outputs, *QUIET)
    assert "tuned on mini (test set)" in text
    (result,) = (tmp_path / "eval").rglob("results.json")
    got, tuned_result = json.loads(result.read_text()), json.loads((folder / "result.json").read_text())
    # There are six landmarks of one query each, so both halves have the same weight.
    halves = (tuned_result["search_half"][0] + tuned_result["check_half"][0]) / 2
    assert got["metrics"]["rerank"]["map"]["medium"] == pytest.approx(halves, abs=1e-6)
    assert (got["tuned_on"], got["role"]) == (["mini (test set)"], "test")
    write_tables(tmp_path / "eval")
    assert "(tuned on mini (test set))" in (tmp_path / "eval/table.csv").read_text()


def test_tuning_leaves_out_images_that_cannot_be_decoded_and_lists_them(tmp_path, capsys):
    folder = write_folders(tmp_path / "photos", landmarks=4, views=3)
    break_scan(folder / "label0/0.jpg")  # found only when it is decoded
    words = ["dataset=folder", f"dataset.database={folder}", "dataset.labels=true", "backbone=test_resnet"]
    words += ["weights=random", "name=own", "trials=1", f"paths.outputs={tmp_path}", *SMALL, *QUIET]
    result = tmp_path / "tune"
    result.mkdir()
    tune(config("tune", *words), result)
    assert f"left out 1 images that cannot be read; {result / 'unreadable.txt'} lists them" in capsys.readouterr().out
    assert (result / "unreadable.txt").read_text().startswith(f"{folder / 'label0/0.jpg'}\t")
    assert len(json.loads((result / "tuning.json").read_text())["images"]) == 11


@pytest.fixture(scope="module")
def trained(toy_data, tmp_path_factory) -> Path:
    """Run a short training on the toy set and return its outputs."""
    outputs = tmp_path_factory.mktemp("outputs")
    settings = ["data.image_size=64", "validation.fraction=0.4", "optim.epochs=1", "optim.batch_size=8", "dim=32"]
    paths = [f"paths.data={toy_data}", f"paths.outputs={outputs}", "logger=csv"]
    train(config("train", "experiment=quickstart", *settings, *paths, *QUIET), outputs / "train/quickstart")
    return outputs


def test_tuning_uses_the_held_out_landmarks_of_the_training(trained):
    run_folder = trained / "train/quickstart"
    dataset, max_side = held_out_set(run_folder, None)
    weights = read_weights(run_folder / "best.safetensors")
    model = superglobal.load_model(run_folder / "best.safetensors", scales=1)
    X = superglobal.extract(model, dataset.database, max_side=max_side)
    got = score_set(dataset, X, as_rows(X, "database"), None, np.arange(len(X)), "cpu", 0).map["all"]
    assert got == pytest.approx(weights.provenance["origin"]["val_map"], abs=1e-6)
    fewer = limit_images(dataset, 8, seed=0)
    assert len(set(fewer.clusters)) == 4
    assert len(fewer.database) < len(dataset.database)
    for i, entry in enumerate(fewer.gnd):
        same = [j for j, label in enumerate(fewer.clusters) if label == fewer.clusters[i] and j != i]
        assert entry["positive"].tolist() == same
    with pytest.raises(InputError, match="data_root"):
        held_out_set(run_folder, "/nowhere")
    with pytest.raises(InputError, match="contains no training run"):
        held_out_set(trained, None)


def test_a_changed_training_set_is_not_tuned_on(trained, toy_data, tmp_path):
    shutil.copytree(toy_data / "toy" / "gldv2", tmp_path / "gldv2", symlinks=True)
    table = tmp_path / "gldv2" / "train_clean.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match=r"train_clean\.csv: the images have changed since the training"):
        held_out_set(trained / "train/quickstart", str(tmp_path / "gldv2"))


def test_the_command_tunes_on_held_out_landmarks(trained, toy_data, caplog):
    paths = [f"paths.data={toy_data}", f"paths.outputs={trained}"]
    command = ["name=quickstart", "trials=4", *SMALL, *paths, *QUIET]
    text = run("-m", "superglobal", "tune", *command)
    folder = trained / "tune/quickstart"
    before = (folder / "trials.csv").read_bytes()
    rows = list(csv.DictReader(before.decode().splitlines()))
    assert len(rows) == 4
    assert (rows[0]["gem_plus_p"], rows[0]["regional_window"], rows[0]["scales"], rows[0]["M"]) == (
        "4.6",
        "5",
        "3",
        "400",
    )
    assert "feature map files (about 0.00 GB" in text
    assert json.loads((folder / "result.json").read_text())["verdict"] in text
    assert (
        "held-out landmarks of toy (training quickstart)" in (folder / "conf/pooling/quickstart_tuned.yaml").read_text()
    )

    caplog.set_level("INFO")
    tune(config("tune", *command), folder)
    assert "Computing 0 of " in caplog.text
    assert (folder / "trials.csv").read_bytes() == before
    assert "too optimistic" in run("-m", "superglobal", "tune", "dataset=toy", *paths, status=2)
