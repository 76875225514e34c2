"""train.py as a user runs it, and the evaluation of its export: real processes on the toy set."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from runs import ROOT, command, compose_config, curves, load_last_checkpoint, run_command, train, values
from trackers import events, read_offline_run, references

import superglobal
from superglobal.config.common import validate_config
from superglobal.config.training import TrainConfig
from superglobal.data.datamodules import HeldOutDataset
from superglobal.data.evaluation_set import leave_one_out_truth
from superglobal.data.gldv2 import TrainList, read_train, split_landmarks
from superglobal.errors import InputError
from superglobal.models.network import weights_digest
from superglobal.models.weights import read_weights
from superglobal.training import train as training
from superglobal.training.checkpointing import CheckpointCallback
from superglobal.training.module import parameter_groups
from superglobal.training.train import _data
from superglobal.training.train import train as fit
from superglobal.tuning.tune import held_out_set


def run(script: str, *overrides: str, status: int = 0) -> str:
    """Run a script, which must exit with `status`, and return its output."""
    return run_command([sys.executable, str(ROOT / script), *overrides], status)


@pytest.fixture(scope="module")
def trained(toy_data, tmp_path_factory) -> Path:
    """Run a short training with every tracker and return its outputs."""
    outputs = tmp_path_factory.mktemp("outputs")
    words = [word for word in command(toy_data, outputs) if word != "logger=csv"]
    run_command([*words, "logger.tensorboard=true", "logger.tags=[short]"])
    return outputs


def test_a_training_writes_curves_checkpoints_and_the_best_network(toy_data, trained):
    folder = trained / "train" / "quickstart"
    assert {"best.safetensors", "checkpoints", "curves.csv", "training.json"} <= {
        path.name for path in folder.iterdir()
    }
    losses, scores = values(folder, "train/loss"), values(folder, "val/map")
    assert len(scores) == 4  # the first one is before training
    scores = scores[1:]
    assert values(folder, "step")[-1] == 15
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    rates = values(folder, "lr/head")
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
        hit_counts = np.arange(1, hits.sum() + 1)
        positions = np.flatnonzero(hits)
        before = np.divide(hit_counts - 1, positions, out=np.ones(len(positions)), where=positions > 0)
        precisions.append(np.mean((before + hit_counts / (positions + 1)) / 2))
    assert np.mean(precisions) == pytest.approx(max(scores), abs=1e-6)
    about = read_weights(folder / "best.safetensors")
    assert about.backbone == "test_resnet"
    assert about.dim == 32
    assert about.provenance["origin"]["val_map"] == max(scores)
    assert about.pooling["gem_plus"] is False


def test_trackers_record_the_same_curves_and_the_path_of_the_network(trained):
    folder = trained / "train" / "quickstart"
    run, written_events = read_offline_run(folder), events(folder / "tensorboard")
    assert run.exit_code == 0
    assert (run.run.job_type, run.run.run_id) == ("train", (folder / "wandb_id").read_text())
    assert "short" in run.run.tags
    assert run.config["optim"]["epochs"] == 3
    for name in ("train/loss", "val/map", "lr/head"):
        written = [(int(row["step"]), float(row[name])) for row in curves(folder) if row.get(name)]
        points = [(point["trainer/global_step"], point[name]) for point in run.history if name in point]
        assert [step for step, _ in points] == [step for step, _ in written]
        assert [value for _, value in points] == pytest.approx([value for _, value in written])
        assert [(event.step, event.value) for event in written_events.Scalars(name)] == [
            (step, pytest.approx(value, rel=1e-5)) for step, value in written
        ]
    assert run.summary["val/map"]["max"] == pytest.approx(max(values(folder, "val/map")))
    assert references(run, "model") == [f"file://{folder / 'best.safetensors'}"]


def test_checkpoints_contain_plain_types_and_the_landmarks_of_classes(toy_data, trained):
    state = torch.load(trained / "train" / "quickstart" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["state_dict"]
    photos, _ = split_landmarks(read_train(toy_data / "toy" / "gldv2"), 0.25, seed=0)
    assert state["landmarks"].tolist() == photos.landmarks.tolist()


def test_a_folder_with_one_sub_folder_per_class_is_a_training_set(toy_data, tmp_path, caplog):
    caplog.set_level("INFO")
    photos, root = read_train(toy_data / "toy" / "gldv2"), tmp_path / "photos"
    for index, label in enumerate(photos.labels.tolist()):
        path = root / f"place {label}" / f"{index} é.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos.path(index), path)
    (root / "alone").mkdir()
    shutil.copy(photos.path(0), root / "alone" / "1.jpg")
    (root / "place 0" / "0 é.jpg").write_bytes(b"")
    words = ["data=folder", f"data.root={root}", "validation.fraction=null", "optim.epochs=1"]
    config = compose_config(toy_data, tmp_path, *words)
    folder = tmp_path / "train" / "quickstart"
    score = fit(config, folder)
    n_held_out = round(len(photos.landmarks) / 5)
    assert f"images of {n_held_out} landmarks" in caplog.text
    assert "left out 1 of" in caplog.text
    assert (folder / "corrupt_images.txt").read_text().startswith(f"{root / 'place 0' / '0 é.jpg'}\tempty")
    dataset, _ = held_out_set(folder, None)
    pairs = {(item.path.parent, name) for item, name in zip(dataset.database, dataset.clusters, strict=True)}
    assert len(pairs) == len(set(dataset.clusters)) == n_held_out
    root.rename(tmp_path / "moved")
    assert fit(compose_config(toy_data, tmp_path, *words, f"data.root={tmp_path / 'moved'}"), folder) == score
    (tmp_path / "moved" / "place 1" / "8 é.jpg").unlink()
    with pytest.raises(InputError, match="contains a run with different settings: images"):
        fit(compose_config(toy_data, tmp_path, *words, f"data.root={tmp_path / 'moved'}"), folder)


def test_eval_scores_the_export_like_a_plain_script(toy_data, trained, tmp_path):
    run("eval.py", "dataset=toy", "name=quickstart", f"paths.data={toy_data}", f"paths.outputs={trained}")
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
    _, reranked = superglobal.rerank(Q, X, first[:, :400])
    for stage, orders in (("search", first), ("rerank", reranked)):
        for protocol, (good, ignored) in {
            "easy": (["easy"], ["junk", "hard"]),
            "medium": (["easy", "hard"], ["junk"]),
            "hard": (["hard"], ["junk", "easy"]),
        }.items():
            precisions = []
            for order, entry in zip(orders, truth["gnd"], strict=True):
                relevant = {i for key in good for i in entry[key]}
                if not relevant:
                    continue
                skipped = {i for key in ignored for i in entry[key]}
                kept = [i for i in order if i not in skipped]
                area, seen = 0.0, 0
                for position, image in enumerate(kept):
                    if image in relevant:
                        area += (seen / position if position else 1.0) / 2 + (seen + 1) / (position + 1) / 2
                        seen += 1
                precisions.append(area / len(relevant))
            assert got["metrics"][stage]["map"][protocol] == pytest.approx(np.mean(precisions), abs=1e-9)


def test_a_finished_training_is_kept_and_different_settings_are_an_error(toy_data, trained):
    folder = trained / "train" / "quickstart"
    before = {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".log", "")  # except for the log and the lock
    }
    assert "already trained" in train(toy_data, trained, "trainer.log_every=5", "pooling.relup=false")
    text = train(toy_data, trained, "optim.lr=0.004", status=2)
    assert str(folder) in text
    assert "different settings: settings.optim.lr (0.002 in that run). Give a new name=" in text
    assert "Traceback" not in text
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert set(before) == {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".log", "")}


def test_a_missing_export_of_a_finished_training_is_an_error(toy_data, trained, tmp_path):
    folder = tmp_path / "train" / "quickstart"
    shutil.copytree(trained / "train" / "quickstart", folder)
    (folder / "best.safetensors").unlink()
    with pytest.raises(InputError, match=r"best\.safetensors: not found; .* resume=restart"):
        fit(compose_config(toy_data, tmp_path), folder)
    checkpoint = folder / "checkpoints" / "last.ckpt"
    with pytest.raises(InputError, match=r"can only resume a training run; give .*best\.safetensors"):
        superglobal.load_model(checkpoint)
    assert 0 < fit(compose_config(toy_data, tmp_path, "resume=restart"), folder) <= 1
    assert (folder / "best.safetensors").is_file()


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", ".", "''"])
def test_run_names_with_paths_are_an_error(toy_data, tmp_path, name):
    with pytest.raises(InputError, match="name="):
        fit(compose_config(toy_data, tmp_path, f"name={name}"), tmp_path / "run")


def test_a_run_that_saved_no_step_can_be_started_with_other_settings(toy_data, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(InputError, match="loss is not finite"):
        fit(compose_config(toy_data, tmp_path, "optim.lr=1e8", "pooling.learn_p=off"), folder)
    assert 0 < fit(compose_config(toy_data, tmp_path, "optim.epochs=1"), folder) <= 1


def test_different_images_or_settings_of_a_run_are_an_error(toy_data, trained, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(toy_data / "toy" / "gldv2", data / "toy" / "gldv2")
    run_folder = tmp_path / "train" / "quickstart"
    shutil.copytree(trained / "train" / "quickstart", run_folder)
    image = read_train(data / "toy" / "gldv2").path(0)
    original = image.read_bytes()
    different = next(path for path in (data / "toy" / "gldv2" / "index").rglob("*.jpg"))
    image.write_bytes(different.read_bytes())
    with pytest.raises(InputError, match="different images"):
        fit(compose_config(data, tmp_path), run_folder)
    image.write_bytes(original)
    assert fit(compose_config(data, tmp_path), run_folder) == max(values(run_folder, "val/map")[1:])
    (run_folder / "best.safetensors").unlink()
    with pytest.raises(InputError, match="different settings"):
        fit(compose_config(data, tmp_path, "optim.lr=0.004"), run_folder)


def test_the_same_seed_gives_the_same_weights_with_any_workers(toy_data, trained, tmp_path):
    train(toy_data, tmp_path, "trainer.num_workers=2")
    first, second = (read_weights(root / "train" / "quickstart" / "best.safetensors") for root in (trained, tmp_path))
    assert weights_digest(first.state) == weights_digest(second.state)


def test_superglobal_pooling_can_be_trained_and_is_used_by_eval(toy_data, tmp_path):
    train(toy_data, tmp_path, "pooling=superglobal", "name=inside", "data.image_size=96", "optim.epochs=1")
    common = [
        "dataset=toy",
        "name=inside",
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


@pytest.mark.parametrize(("images", "landmarks"), [(7, 2), (12, 4), (1, 2), (100, 5)])
def test_limited_validation_uses_complete_landmarks(images, landmarks):
    photos = TrainList(
        Path("x"), np.array([f"{i:016x}".encode() for i in range(15)]), np.repeat(range(5), 3), np.arange(5)
    )
    chosen = HeldOutDataset(photos, images, None, seed=0)
    assert len(chosen) == 3 * landmarks
    truth = leave_one_out_truth(chosen.labels)
    assert all(len(entry["positive"]) == 2 and i not in entry["positive"] for i, entry in enumerate(truth))
    without = HeldOutDataset(photos, images, None, seed=0, exclude=[int(chosen.indices[0])])
    assert np.array_equal(without.indices, chosen.indices[1:])


def test_validation_every_n_steps_scores_sets_and_stops_without_progress(toy_data, tmp_path):
    """Without changes of the weights, all scores are equal, so training stops after the second validation."""
    frozen = ["optim.lr=0", "optim.batch_norm=frozen", "pooling.learn_p=off", "optim.name=sgd"]
    validation = ["validation.sets=[toy/toy,elsewhere]", "validation.every_steps=2", "validation.patience=1"]
    folder = tmp_path / "run"
    fit(compose_config(toy_data, tmp_path, *frozen, *validation), folder)
    assert load_last_checkpoint(folder)["global_step"] == 4
    scores = values(folder, "val/map")
    assert len(scores) == 3
    assert len(set(scores)) == 1
    data = superglobal.revisited_set(toy_data / "toy", "toy")
    model = superglobal.load_model(folder / "best.safetensors", scales=1)
    X, Q = (superglobal.extract(model, items) for items in (data.database, data.queries))
    expected = superglobal.revisited_map(Q, X, data).map
    for protocol in ("easy", "medium", "hard"):
        assert values(folder, f"toy/map/{protocol}") == pytest.approx([expected[protocol]] * 3, abs=1e-9)
    assert read_weights(folder / "best.safetensors").provenance["origin"]["step"] == 2


def test_the_moving_average_is_validated_and_exported(toy_data, tmp_path):
    """Compare to the average over the weights of every step."""
    decay, weights_of_steps = 0.5, []

    class Keep(CheckpointCallback):
        def on_step(self, trainer, module, epoch_ends):
            weights_of_steps.append({name: p.detach().clone() for name, p in module.network.named_parameters()})
            super().on_step(trainer, module, epoch_ends)

    folder = tmp_path / "run"
    original, training.CheckpointCallback = training.CheckpointCallback, Keep
    try:
        fit(compose_config(toy_data, tmp_path, f"optim.ema={decay}", "optim.epochs=1"), folder)
    finally:
        training.CheckpointCallback = original
    average = weights_of_steps[0]
    for weights in weights_of_steps[1:]:
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
    exported = read_weights(folder / "best.safetensors").state
    for name, tensor in average.items():
        assert torch.allclose(exported[name], tensor, atol=1e-6), name
    assert not torch.equal(exported["whitening.weight"], weights_of_steps[-1]["whitening.weight"])


def test_weight_decay_excludes_biases_norms_and_the_gem_exponent():
    network = superglobal.load_model("random", backbone="test_resnet", pooling="gem", dim=8, trainable=True)
    decayed, plain = parameter_groups("network", network, 0.1, 0.05)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"], decayed["lr"], plain["lr"]) == (0.05, 0.0, 0.1, 0.1)
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert {"pooling.p", "whitening.bias"} <= {names[id(parameter)] for parameter in plain["params"]}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_a_sweep_requires_one_device_per_job(toy_data, tmp_path):
    python, script, *words = command(toy_data, tmp_path, "trainer.devices=2", "seed=0,1")
    text = run_command([python, script, "-m", *words], 2)
    assert text.count("trainer.devices=2 on 1 machines: expected one device per job of a sweep") == 2
    python, script, *words = command(toy_data, tmp_path, "trainer.num_nodes=2", "seed=0,1")
    assert "on 2 machines: expected one device per job of a sweep" in run_command([python, script, "-m", *words], 2)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_optimizer_settings_take_effect(toy_data, trained, tmp_path):
    fit(
        compose_config(toy_data, tmp_path, "optim.head_lr=7", "optim.epochs=1", "trainer.precision=bf16-mixed"),
        tmp_path / "a",
    )
    ratio = np.array(values(tmp_path / "a", "lr/head")) / values(tmp_path / "a", "lr/network")
    assert ratio == pytest.approx([7] * 5)
    whole, half = (values(folder, "train/loss") for folder in (trained / "train" / "quickstart", tmp_path / "a"))
    assert half[0] != whole[0]
    assert half[0] == pytest.approx(whole[0], rel=0.05)
    exported = read_weights(tmp_path / "a" / "best.safetensors").state
    assert {tensor.dtype for tensor in exported.values() if tensor.is_floating_point()} == {torch.float32}

    plain_sgd = [
        "optim.name=sgd",
        "optim.weight_decay=0",
        "optim.momentum=0",
        "optim.batch_norm=frozen",
        "optim.epochs=1",
    ]
    fit(compose_config(toy_data, tmp_path, *plain_sgd, "optim.clip=1e-5"), tmp_path / "b")
    start = superglobal.load_model("random", backbone="test_resnet", pooling="gem", dim=32).state_dict()
    moved = load_last_checkpoint(tmp_path / "b")["state_dict"]
    length = sum((moved[f"network.{key}"] - tensor).double().square().sum() for key, tensor in start.items()) ** 0.5
    assert 0 < length <= 5 * 0.002 * 1e-5  # number of steps, learning rate, largest gradient


def test_the_image_size_follows_the_stages(toy_data, tmp_path):
    config = validate_config(compose_config(toy_data, tmp_path, "data.stages=[[1,32]]"), TrainConfig)
    images = _data(config, read_train(toy_data / "toy" / "gldv2")).dataset
    assert [images[epoch, 3].image.shape[-1] for epoch in range(3)] == [32, 64, 64]


def test_the_model_card_of_an_export_describes_its_training(toy_data, trained, tmp_path):
    folder = trained / "train" / "quickstart"
    model = superglobal.load_model(folder / "best.safetensors")
    superglobal.save_pretrained(model, tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == ["toy"]
    best = max(values(folder, "val/map")[1:])
    assert f"held-out landmarks of the same list: {best:.4f}" in card.text
    for words in (
        "on toy (`train_clean.csv`) at 64 px",
        "| optim.epochs | 3 |",
        "| head.kind | arcface |",
        "Pooling during training: GeM.",
    ):
        assert words in card.text, words
    # Shared files do not contain paths of this machine.
    for name in ("README.md", "config.json"):
        assert str(toy_data) not in (tmp_path / name).read_text()
    again = superglobal.load_model(tmp_path)
    assert superglobal.model_card(again).text == card.text
