"""Exported files compute the same descriptors as the network, at every size that they accept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from runs import environment

import superglobal
from superglobal.errors import InputError
from superglobal.models.export import _Graph, _input_sizes, export_network, read_metadata

ROOT = Path(__file__).parents[1]


def network(**settings):
    """Return a random network."""
    return superglobal.load_model("random", **{"backbone": "test_resnet", **settings})


def random_images(batch, height, width):
    """Return random images (batch, 3, height, width), float32 in 0..1."""
    return np.random.default_rng(height * width).random((batch, 3, height, width), dtype=np.float32)


def expected(model, images):
    """Return the descriptors of the network."""
    with torch.no_grad():
        return model(torch.from_numpy(images)).numpy()


def test_an_onnx_file_with_dynamic_sizes_equals_the_network_at_all_sizes(tmp_path):
    """Compare at sizes that the command does not test itself, including sides that float32 would round differently."""
    path = tmp_path / "made" / "x.onnx"
    settings = ["--backbone", "test_resnet", "--scales", "0.53,1"]
    words = [sys.executable, "-m", "superglobal", "export", "random", str(path), *settings]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("largest difference") == 4
    assert [p.name for p in path.parent.iterdir()] == ["x.onnx"]
    session, model = onnxruntime.InferenceSession(str(path)), network(scales=[0.53, 1.0])
    assert [result.shape for result in session.get_inputs()] == [["batch", 3, "height", "width"]]
    min_side = model.min_side()
    sides = np.arange(min_side, 4097)
    rounded = (sides.astype(np.float32) * np.float32(0.53)).astype(int) != [int(side * 0.53) for side in sides.tolist()]
    assert rounded.any()
    for shape in ((1, min_side, int(sides[rounded][0])), (4, 131, min_side), (1, 200, 333)):
        images = random_images(*shape)
        (descriptors,) = session.run(None, {"images": images})
        assert np.abs(descriptors - expected(model, images)).max() < 1e-5
    about = read_metadata(path)
    assert about["network"]["weights"] == model.identity()["weights"]
    assert "float32 RGB in 0..1" in about["input"]
    assert about["height, width"].startswith(f"{min_side} to 4096 px")
    assert {p.key for p in onnx.load(path).metadata_props} == {"superglobal", "input", "output"}


def test_a_pt2_file_with_dynamic_sizes_runs_without_this_package(tmp_path):
    model = network(backbone="resnet18", dim=16, scales=1, pooling="gem")
    comparisons = export_network(model, tmp_path / "x.pt2")
    assert max(result.max_difference for result in comparisons) < 1e-5
    assert {result.shape[1:] for result in comparisons} >= {(65, 65), (65, 4096)}
    np.save(tmp_path / "x.npy", random_images(2, 99, 240))
    code = (
        "import sys, numpy, torch; m = torch.export.load('x.pt2').module(); "
        "numpy.save('y.npy', m(torch.from_numpy(numpy.load('x.npy'))).detach().numpy()); "
        "assert not [name for name in sys.modules if name.startswith(('superglobal', 'timm'))]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert np.abs(np.load(tmp_path / "y.npy") - expected(model, random_images(2, 99, 240))).max() < 1e-5
    assert read_metadata(tmp_path / "x.pt2")["batch"] == "any"


@pytest.mark.parametrize(
    ("settings", "suffix", "size", "batch"),
    [
        ({"antialias": True, "pooling": {"scale_p": 10.0}, "scales": [0.7071, 1.0]}, ".onnx", (120, 161), None),
        ({"pooling": {"gem_plus": False, "scale": False, "relup": "off"}, "scales": [0.7, 1.0]}, ".pt2", (100, 93), 2),
        ({"pooling": "cvnet_global", "scales": 1, "dim": 8}, ".pt2", (100, 93), 1),
        ({"backbone": "test_vit", "dim": 8, "scales": [1.0, 0.9]}, ".pt2", (100, 93), 1),
    ],
)
def test_every_switch_exports_at_a_fixed_size(tmp_path, settings, suffix, size, batch):
    comparisons = export_network(network(**settings), tmp_path / f"x{suffix}", size, batch)
    assert {result.shape for result in comparisons} == ({(batch, *size)} if batch else {(1, *size), (3, *size)})
    assert max(result.max_difference for result in comparisons) < 1e-5
    assert min(result.min_cosine for result in comparisons) > 0.999999
    assert read_metadata(tmp_path / f"x{suffix}")["height, width"] == list(size)


def test_a_transformer_exports_with_multiples_of_the_patch_size_at_one_scale(tmp_path):
    model = network(backbone="test_vit", scales=1, pooling={"regional": False})
    step = model.backbone.multiple
    comparisons = export_network(model, tmp_path / "x.pt2")
    assert all(side % step == 0 for result in comparisons for side in result.shape[1:])
    assert f"multiples of {step}" in read_metadata(tmp_path / "x.pt2")["height, width"]
    with pytest.raises(InputError, match=r"--size H W, or --scales 1"):
        export_network(network(backbone="test_vit"), tmp_path / "y.pt2")


@pytest.mark.parametrize("side", [65, 66, 67, 98])
def test_integer_same_padding_equals_that_of_timm(side):
    model = network(backbone="tf_efficientnet_lite0", scales=1)
    images = torch.rand(1, 3, side, 2 * side - 31)
    with torch.no_grad():
        assert torch.equal(_Graph(model, _input_sizes(model, None, None)).eval()(images), model(images))


def test_an_export_with_a_large_difference_is_not_written(tmp_path):
    path = tmp_path / "x.pt2"
    path.write_text("before")
    model = network(scales=1)
    with pytest.raises(InputError, match=r"not written.*more than -1"):
        export_network(model, path, (70, 70), tolerance=-1.0)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("settings", "name", "size", "message"),
    [
        ({}, "x.pth", None, r"\.onnx or \.pt2"),
        ({}, "x.pt2", (91, 200), "at least 92 px"),
        ({"pooling": "cvnet_global"}, "x.pt2", (100, 100), "--scales 1"),
        ({"scales": [0.29, 1.0]}, "x.pt2", None, r"scale 0\.29: .*0\.2901"),
        ({"scales": 1}, "folder.pt2", (100, 100), "cannot be written"),
    ],
)
def test_unsupported_exports_raise_input_errors(tmp_path, settings, name, size, message):
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(InputError, match=message):
        export_network(network(**settings), tmp_path / name, size)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.pt2"]


@pytest.mark.slow
def test_the_offline_package_exports_with_dynamic_sizes(tmp_path):
    comparisons = export_network(superglobal.load_model("package"), tmp_path / "x.onnx")
    assert max(result.max_difference for result in comparisons) < 1e-4
