"""Errors before a training starts: missing or corrupt images and wrong settings."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import ROOT, command, compose_config, run_command, train
from sets import break_scan

import superglobal
from superglobal.data.gldv2 import read_train, split_landmarks
from superglobal.errors import InputError
from superglobal.models.weights import save_weights
from superglobal.training.callbacks import NonFiniteGuard
from superglobal.training.train import train as fit


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Save the weights of an untrained test_resnet with 32 outputs."""
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_weights(superglobal.load_model("random", backbone="test_resnet", dim=32), path, {})
    return path


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("train.py", ["gldv2/train_clean.csv", "superglobal download gldv2-train --data"]),
        (
            "eval.py",
            ["roxford5k/gnd_roxford5k.pkl", "superglobal download roxford5k", "train/superglobal/best.safetensors"],
        ),
    ],
)
def test_missing_data_is_reported_in_one_message(tmp_path, script, words):
    text = run_command(
        [sys.executable, str(ROOT / script), f"paths.data={tmp_path}", f"paths.outputs={tmp_path / 'out'}"], 2
    )
    for word in [*words, "superglobal toy-data", "train.py experiment=demo"]:
        assert word in text
    assert "Traceback" not in text


def test_missing_images_are_counted_before_training(toy_data, tmp_path):
    source = toy_data / "toy" / "gldv2"
    root = tmp_path / "gldv2"
    root.mkdir()
    (root / "train_clean.csv").write_bytes((source / "train_clean.csv").read_bytes())
    text = train(toy_data, tmp_path, f"data.root={root}", status=2)
    count = len(read_train(source))
    assert f"{count} of {count} images missing" in text
    assert not (tmp_path / "train" / "quickstart" / "checkpoints").exists()


def test_corrupt_images_are_replaced_and_listed_up_to_the_allowed_fraction(toy_data, tmp_path):
    """The header and the end of the image are valid, so that the check before training accepts it."""
    root = tmp_path / "gldv2"
    shutil.copytree(toy_data / "toy" / "gldv2", root)
    photos, _ = split_landmarks(read_train(root), 0.25, seed=0)
    corrupt, missing = photos.path(5), photos.path(9)
    break_scan(corrupt)
    missing.unlink()
    overrides = [f"data.root={root}", "trainer.num_workers=2"]
    text = train(tmp_path, tmp_path, *overrides, "data.max_corrupt_fraction=0.1")
    assert "replaced a corrupt image" in text
    listed = (tmp_path / "train" / "quickstart" / "corrupt_images.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in listed) == sorted(map(str, (corrupt, missing)))
    text = train(tmp_path, tmp_path, *overrides, "name=strict", "data.max_corrupt_fraction=0.013", status=2)
    assert "2 of 90 images" in text
    assert "more than data.max_corrupt_fraction=0.013 allows" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.name=lion", "expected one of sgd, adamw"),
        ("data.crop=0", "data.crop=0"),
        ("data.crop=1.5", "a number from 0.001 to 1"),
        ("optim.lr=nan", "optim.lr"),
        ("optim.batch_size=5000", "at most the"),
        ("validation.fraction=0.001", "validation.fraction"),
        ("pooling=superglobal data.image_size=64", "at least 65 px"),
        ("validation.fraction=0.08", "expected at least 2 each"),
        ("trainer.log_every=0", "log_every"),
        ("trainer.accumulate=5", "expected a multiple of"),
        ("optim.batch_norm=batch", "expected one of train, frozen, sync"),
        ("optim.batch_norm=sync", "expected GPUs"),
        ("optim.ema=1", "optim.ema"),
        ("data.stages=[[3,96]]", "expected fewer epochs in total than"),
        ("data.stages=[[1,32]] pooling=superglobal data.image_size=96", r"data\.stages=.*at least 65 px"),
        ("data=folder", r"data=folder: the image folder is missing; add data\.root=FOLDER"),
        ("data=folder data.root=. data.leave_out=x.txt", r"data\.leave_out=x\.txt: only for images in GLDv2's layout"),
        ("resume=yes", "expected one of auto, restart"),
        ("trainer.precision=bf16-true", "expected one of auto, 32-true"),
        ("trainer.accelerator=gpu", "Lightning rejects"),
        ("dim=64 weights=FILE backbone=test_resnet", "dim=64 contradicts"),
        ("backbone=resnet50 weights=FILE dim=null", "backbone=resnet50 contradicts .* test_resnet"),
    ],
)
def test_invalid_settings_raise_errors_that_name_them(toy_data, weights, tmp_path, override, message):
    override = override.replace("FILE", str(weights))
    with pytest.raises(InputError, match=message):
        fit(compose_config(toy_data, tmp_path, *override.split()), tmp_path / "run")
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("p", [0.0, 10.5])
def test_an_exponent_that_training_moves_out_of_its_range_ends_the_run(tmp_path, p):
    module = torch.nn.Module()
    module.network = superglobal.load_model("random", backbone="test_resnet", pooling={"gem_plus": False})
    trainer, guard = SimpleNamespace(global_step=5, current_epoch=0), NonFiniteGuard(5, tmp_path, str)
    for bound in (0.01, 10.0):
        module.network.pooling.p.data.fill_(bound)
        guard.check(trainer, module)
    module.network.pooling.p.data.fill_(p)
    with pytest.raises(InputError, match=r"^epoch 1, step 5: the p of GeM is \S+, expected 0\.01 to 10"):
        guard.check(trainer, module)


def test_a_sweep_continues_after_a_failed_job_and_returns_its_status(toy_data, tmp_path):
    python, script, *words = command(toy_data, tmp_path, "optim.name=adam,adamw", "optim.epochs=1")
    text = run_command([python, script, "-m", *words], 2)
    assert "expected one of sgd, adamw" in text
    (export,) = (tmp_path / "train" / "sweep").rglob("best.safetensors")
    assert re.search(
        rf"validation mAP 0\.\d+ .*optim\.name=adamw.*: {export.parent}\nfailed .*optim\.name=adam: ", text
    )
