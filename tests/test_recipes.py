"""Every recipe composes, has the intended settings, and trains two steps."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir
from runs import ROOT, curves_without_times, load_last_checkpoint

from superglobal import load_model
from superglobal.config import register
from superglobal.config.common import validate_config
from superglobal.config.training import TrainConfig
from superglobal.training.train import image_size_in_epoch
from superglobal.training.train import train as fit

# test_docs.py runs finetune_photos, which needs a folder of images.
OTHERS = {"full_factorial", "photos", "finetune_photos"}
RECIPES = sorted({path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")} - OTHERS)
BACKBONES = {recipe: "resnet50" for recipe in RECIPES} | {"r101_gldv2_clean": "resnet101", "quickstart": "test_resnet"}
BACKBONES["demo"] = "efficientnet_lite0"
TINY = [
    "data.root=${paths.data}/toy/gldv2",
    "data.table=train_clean.csv",
    "data.classes_of=null",
    "data.image_size=65",
    "data.stages=[]",
    "validation.fraction=0.25",
    "validation.max_images=2",
    "validation.sets=[]",
    "optim.batch_size=30",
    "optim.epochs=1",
    "weights=random",
    "logger=csv",
    "trainer.accelerator=cpu",
    "trainer.num_workers=0",
    "trainer.progress=false",
    "trainer.log_every=1",
]


def compose_train_config(*overrides: str):
    """Compose the configuration of a training."""
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_two_steps(toy_data, tmp_path, recipe):
    paths = [f"paths.data={toy_data}", f"paths.outputs={tmp_path}"]
    # A single recipe runs with its large network, to save time; the settings of the others do not depend on it.
    small = [] if recipe == "r50_256_sanity" else ["backbone=test_resnet"]
    cfg = compose_train_config(f"experiment={recipe}", *TINY, *paths, *small)
    folder = tmp_path / "run"
    score = fit(cfg, folder)
    assert 0 < score <= 1
    state = load_last_checkpoint(folder)
    assert state["global_step"] == 2
    assert [row["step"] for row in curves_without_times(folder) if row["train/loss"]] == ["1", "2"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_valid_and_names_its_run(recipe):
    config = validate_config(compose_train_config(f"experiment={recipe}"), TrainConfig)
    assert config.name == recipe
    assert config.backbone.name == BACKBONES[recipe]


def test_stages_set_the_image_size_of_an_epoch():
    config = validate_config(compose_train_config("experiment=subcenter_dynamic"), TrainConfig)
    sides = [
        image_size_in_epoch(config.data.image_size, config.data.stages, epoch) for epoch in range(config.optim.epochs)
    ]
    assert sides == [256] * 7 + [512] * 3
    assert [image_size_in_epoch(3, [[2, 1], [1, 2]], epoch) for epoch in range(5)] == [1, 1, 2, 3, 3]


def test_a_frozen_backbone_does_not_change(toy_data, tmp_path):
    paths = [f"paths.data={toy_data}", f"paths.outputs={tmp_path}"]
    cfg = compose_train_config("experiment=finetune_whitening", *TINY, *paths, "backbone=test_resnet", "optim.ema=0.5")
    fit(cfg, tmp_path / "run")
    before = load_model("random", backbone="test_resnet", dim=2048, seed=0).state_dict()
    after = load_last_checkpoint(tmp_path / "run")["state_dict"]
    for key, tensor in before.items():
        same = torch.equal(tensor, after[f"network.{key}"])
        assert same == (not key.startswith("whitening.")), key
        if key == "whitening.weight":
            assert not torch.equal(after[f"average.module.{key}"], after[f"network.{key}"])


def test_the_slurm_launcher_composes(toy_data):
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides=["launcher=slurm", "trainer.num_nodes=2"], return_hydra_config=True)
    assert cfg.hydra.launcher._target_.endswith("SlurmLauncher")
    assert cfg.hydra.launcher.nodes == 2
