"""train.py as a user runs it, and what eval.py makes of its export: real processes on the toy set."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from sets import break_scan

import superglobal
from superglobal.callbacks import RetrievalValidation
from superglobal.checkpoint import read_weights
from superglobal.config import register
from superglobal.data.datamodules import TrainingPhotos
from superglobal.data.gldv2 import TrainList, read_train, split_landmarks
from superglobal.engine import train as fit
from superglobal.errors import InputError
from superglobal.models.network import weights_digest
from superglobal.training import parameter_groups

ROOT = Path(__file__).parents[1]
SHORT = [
    "experiment=quickstart",
    "data.image_size=64",
    "data.val_fraction=0.25",
    "optim.epochs=3",
    "optim.batch_size=12",
    "optim.warmup=0.3",
    "dim=32",
    "trainer.accelerator=cpu",
    "trainer.num_workers=0",
    "trainer.progress=false",
]


def run(script: str, *overrides: str, status: int = 0) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"COLUMNS": "200"}
    command = [sys.executable, str(ROOT / script), *overrides]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def train(data: Path, outputs: Path, *overrides: str, status: int = 0) -> str:
    return run("train.py", *SHORT, f"paths.data={data}", f"paths.outputs={outputs}", *overrides, status=status)


def configured(data: Path, outputs: Path, *overrides: str):
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", overrides=[*SHORT, f"paths.data={data}", f"paths.outputs={outputs}", *overrides])


def curves(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def values(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in curves(folder) if row.get(name)]


@pytest.fixture(scope="module")
def trained(toy_data, tmp_path_factory) -> Path:
    """Outputs of one short training, W&B included."""
    outputs = tmp_path_factory.mktemp("outputs")
    train(toy_data, outputs, "trainer.log_every=1")
    return outputs


def test_a_training_leaves_curves_checkpoints_and_the_best_network(toy_data, trained):
    folder = trained / "train" / "quickstart"
    assert {"best.safetensors", "checkpoints", "csv", "training.json"} <= {path.name for path in folder.iterdir()}
    assert list((folder / "wandb").glob("offline-run-*"))
    losses, scores = values(folder, "train/loss"), values(folder, "val/map")
    assert len(scores) == 3
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    rates = values(folder, "lr-AdamW/pg1")
    assert rates[0] < max(rates)
    assert rates[-1] < 0.1 * max(rates)

    # The exported network, scored by plain NumPy on the held-out landmarks, has the best score of the curve.
    _, held = split_landmarks(read_train(toy_data / "toy" / "gldv2"), 0.25, seed=0)
    X = superglobal.extract(
        superglobal.load_model(folder / "best.safetensors", scales=1), [held.path(i) for i in range(len(held))]
    )
    precisions = []
    for i, scores_of_i in enumerate(X @ X.T):
        order = np.argsort(-scores_of_i, kind="stable")
        hits = held.labels[order[order != i]] == held.labels[i]
        found = np.arange(1, hits.sum() + 1)
        places = np.flatnonzero(hits)
        before = np.divide(found - 1, places, out=np.ones(len(places)), where=places > 0)
        precisions.append(np.mean((before + found / (places + 1)) / 2))
    assert np.mean(precisions) == pytest.approx(max(scores), abs=1e-6)
    about = read_weights(folder / "best.safetensors")
    assert about.backbone == "test_resnet"
    assert about.dim == 32
    assert about.provenance["origin"]["val_map"] == max(scores)
    assert about.pooling["gem_plus"] is False


def test_checkpoints_hold_plain_types(trained):
    state = torch.load(trained / "train" / "quickstart" / "checkpoints" / "best.ckpt", weights_only=True)
    assert state["state_dict"]


def test_eval_takes_the_export_and_its_score_is_that_of_a_plain_script(toy_data, trained, tmp_path):
    run("eval.py", "dataset=toy", "logger=csv", f"paths.data={toy_data}", f"paths.outputs={trained}")
    (path,) = (trained / "eval" / "toy").rglob("results.json")
    got = json.loads(path.read_text())
    assert got["weights"] == str(trained / "train" / "quickstart" / "best.safetensors")

    folder = toy_data / "toy" / "toy"
    truth = pickle.loads((folder / "gnd_toy.pkl").read_bytes())
    model = superglobal.load_model(trained / "train" / "quickstart" / "best.safetensors")
    X = superglobal.extract(model, [folder / "jpg" / f"{name}.jpg" for name in truth["imlist"]])
    items = [
        superglobal.ImageItem(folder / "jpg" / f"{name}.jpg", tuple(entry["bbx"]))
        for name, entry in zip(truth["qimlist"], truth["gnd"], strict=True)
    ]
    Q = superglobal.extract(model, items)
    first = np.argsort(-(Q @ X.T), axis=1, kind="stable")
    _, again = superglobal.rerank(Q, X, first[:, :400])
    for stage, orders in (("search", first), ("rerank", again)):
        for protocol, (good, ignored) in {
            "easy": (["easy"], ["junk", "hard"]),
            "medium": (["easy", "hard"], ["junk"]),
            "hard": (["hard"], ["junk", "easy"]),
        }.items():
            precisions = []
            for order, entry in zip(orders, truth["gnd"], strict=True):
                wanted = {i for key in good for i in entry[key]}
                if not wanted:
                    continue
                skipped = {i for key in ignored for i in entry[key]}
                kept = [i for i in order if i not in skipped]
                area, seen = 0.0, 0
                for place, image in enumerate(kept):
                    if image in wanted:
                        area += (seen / place if place else 1.0) / 2 + (seen + 1) / (place + 1) / 2
                        seen += 1
                precisions.append(area / len(wanted))
            assert got["metrics"][stage]["map"][protocol] == pytest.approx(np.mean(precisions), abs=1e-9)


def test_a_finished_training_is_kept_and_another_one_refused(toy_data, trained):
    folder = trained / "train" / "quickstart"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"}
    assert "trained already" in train(toy_data, trained, "trainer.log_every=5", "pooling.relup=false")
    text = train(toy_data, trained, "optim.lr=0.004", status=2)
    assert str(folder) in text
    assert "different are settings.optim.lr. Give a new name=" in text
    assert "Traceback" not in text
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert set(before) == {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".log"}


def test_other_photos_or_an_unfinished_run_of_other_settings_are_another_training(toy_data, trained, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(toy_data / "toy" / "gldv2", data / "toy" / "gldv2")
    run_folder = tmp_path / "train" / "quickstart"
    shutil.copytree(trained / "train" / "quickstart", run_folder)
    photo = read_train(data / "toy" / "gldv2").path(0)
    original = photo.read_bytes()
    other = next(path for path in (data / "toy" / "gldv2" / "index").rglob("*.jpg"))
    photo.write_bytes(other.read_bytes())
    with pytest.raises(InputError, match="another training"):
        fit(configured(data, tmp_path), run_folder)
    photo.write_bytes(original)
    assert fit(configured(data, tmp_path), run_folder) == max(values(run_folder, "val/map"))
    (run_folder / "best.safetensors").unlink()
    with pytest.raises(InputError, match="another training"):
        fit(configured(data, tmp_path, "optim.lr=0.004"), run_folder)


def test_the_same_seed_gives_the_same_weights_whatever_the_workers(toy_data, trained, tmp_path):
    train(toy_data, tmp_path, "logger=csv", "trainer.num_workers=2")
    first, second = (read_weights(root / "train" / "quickstart" / "best.safetensors") for root in (trained, tmp_path))
    assert weights_digest(first.state) == weights_digest(second.state)


def test_superglobal_pooling_trains_and_is_what_eval_then_uses(toy_data, tmp_path):
    train(
        toy_data, tmp_path, "logger=csv", "pooling=superglobal", "name=inside", "data.image_size=96", "optim.epochs=1"
    )
    common = [
        "dataset=toy",
        "name=inside",
        "logger=csv",
        "scales=1",
        f"paths.data={toy_data}",
        f"paths.outputs={tmp_path}",
    ]
    run("eval.py", *common)
    (path,) = (tmp_path / "eval" / "toy").rglob("results.json")
    about = json.loads(path.read_text())["about"]
    assert about["network"]["pooling"]["regional"] is True
    assert about["network"]["pooling"]["relup"] == "on"
    assert about["trained_pooling"]["gem_plus"] is True


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("train.py", ["gldv2/train_clean.csv", "images_{000..499}.tar"]),
        ("eval.py", ["roxford5k/gnd_roxford5k.pkl", "oxbuild_images", "train/superglobal/best.safetensors"]),
    ],
)
def test_without_data_one_message_says_all(tmp_path, script, words):
    text = run(script, f"paths.data={tmp_path}", f"paths.outputs={tmp_path / 'out'}", "logger=csv", status=2)
    for word in [*words, "scripts/make_toy_data.py", "train.py experiment=quickstart"]:
        assert word in text
    assert "Traceback" not in text


def test_missing_photos_are_counted_before_anything_is_trained(toy_data, tmp_path):
    source = toy_data / "toy" / "gldv2"
    root = tmp_path / "gldv2"
    root.mkdir()
    (root / "train_clean.csv").write_bytes((source / "train_clean.csv").read_bytes())
    text = train(toy_data, tmp_path, f"data.root={root}", "logger=csv", status=2)
    count = len(read_train(source))
    assert f"of {count} images {count} missing" in text
    assert not (tmp_path / "train" / "quickstart" / "checkpoints").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_photo_that_breaks_off_inside_ends_the_run_with_its_path(toy_data, tmp_path, workers):
    """Its header and its end are sound, so that the check beforehand passes it."""
    root = tmp_path / "gldv2"
    shutil.copytree(toy_data / "toy" / "gldv2", root)
    photos, _ = split_landmarks(read_train(root), 0.25, seed=0)
    bad = photos.path(5)
    break_scan(bad)
    text = train(tmp_path, tmp_path, f"data.root={root}", "logger=csv", f"trainer.num_workers={workers}", status=2)
    assert f"error: image cannot be read: {bad}" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.name=lion", "expected one of sgd, adamw"),
        ("data.crop=0", "data.crop=0"),
        ("data.crop=1.5", "at most 1"),
        ("optim.lr=nan", "optim.lr"),
        ("optim.batch_size=5000", "only"),
        ("data.val_fraction=0.001", "data.val_fraction"),
        ("pooling=superglobal data.image_size=64", "at least 65 px"),
        ("data.val_fraction=0.08", "both need at least two"),
        ("trainer.log_every=0", "log_every"),
        ("trainer.devices=2", "one device"),
        ("dim=64 weights=FILE backbone=test_resnet", "dim=64 contradicts"),
        ("backbone=resnet50 weights=FILE dim=null", "holds test_resnet"),
    ],
)
def test_a_wrong_setting_is_refused_and_named(toy_data, trained, tmp_path, override, message):
    override = override.replace("FILE", str(trained / "train" / "quickstart" / "best.safetensors"))
    with pytest.raises(InputError, match=message):
        fit(configured(toy_data, tmp_path, *override.split()), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_loss_that_is_no_number_ends_the_run_at_once(toy_data, tmp_path):
    with pytest.raises(InputError, match=r"epoch 0, step \d+: the loss is .*lower optim.lr"):
        fit(configured(toy_data, tmp_path, "optim.lr=1e6", "logger=csv", "trainer.log_every=1"), tmp_path / "run")
    assert not (tmp_path / "run" / "best.safetensors").exists()


def test_ctrl_c_says_what_became_of_the_run(toy_data, tmp_path):
    command = [sys.executable, "train.py", *SHORT, "optim.epochs=500", "logger=csv"]
    command += [f"paths.data={toy_data}", f"paths.outputs={tmp_path}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("best.ckpt")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 130, text
    assert "nothing was exported" in text
    assert "epoch 1: loss" in text
    assert "Traceback" not in text
    command[command.index("optim.epochs=500")] = "optim.epochs=501"
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert "optim.epochs" in refused.stderr


def test_a_sweep_goes_on_after_a_job_that_failed_and_ends_with_its_status(toy_data, tmp_path):
    places = [f"paths.data={toy_data}", f"paths.outputs={tmp_path}", "logger=csv"]
    text = run("train.py", "-m", *SHORT, "optim.name=adam,adamw", "optim.epochs=1", *places, status=2)
    assert "expected one of sgd, adamw" in text
    (export,) = (tmp_path / "train" / "sweep").rglob("best.safetensors")
    assert re.search(rf"validation mAP 0\.\d+ .*optim\.name=adamw.*: {export.parent}\nfailed .*optim\.name=adam ", text)


@pytest.mark.parametrize(("images", "landmarks"), [(7, 2), (12, 4), (1, 2), (100, 5)])
def test_validation_takes_whole_landmarks(images, landmarks):
    photos = TrainList(
        Path("x"), np.array([f"{i:016x}".encode() for i in range(15)]), np.repeat(range(5), 3), np.arange(5)
    )
    chosen = RetrievalValidation(photos, images, None, seed=0)
    assert len(chosen.paths) == 3 * landmarks
    assert all(len(entry["positive"]) == 2 and i not in entry["positive"] for i, entry in enumerate(chosen.gnd))


def test_the_order_of_photos_changes_with_the_epoch(toy_data, tmp_path, monkeypatch):
    """Lightning has to call `set_epoch`; if it stopped, every epoch would see the same crops."""
    seen: list[int] = []
    original = TrainingPhotos.__getitem__
    monkeypatch.setattr(
        TrainingPhotos, "__getitem__", lambda self, place: (seen.append(place[0]), original(self, place))[1]
    )
    fit(configured(toy_data, tmp_path, "logger=csv"), tmp_path / "run")
    assert sorted(set(seen)) == [0, 1, 2]


def test_weights_decay_and_biases_norms_and_the_exponent_do_not():
    network = superglobal.load_model("random", backbone="test_resnet", pooling="gem", dim=8, trainable=True)
    decayed, plain = parameter_groups(network, 0.1, 0.05)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"], decayed["lr"], plain["lr"]) == (0.05, 0.0, 0.1, 0.1)
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert {"pooling.p", "whitening.bias"} <= {names[id(parameter)] for parameter in plain["params"]}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
