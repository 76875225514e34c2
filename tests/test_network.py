"""The network: image sizes, backbones, inputs and identity (descriptor values: test_goldens.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import superglobal
from superglobal.errors import InputError
from superglobal.models.backbone import Backbone
from superglobal.models.network import make_scales


@pytest.fixture(scope="module")
def model():
    """Return a random network."""
    return superglobal.load_model("random", backbone="resnet18")


def noise(height, width, seed=0):
    """Return a random image."""
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("scales", "side"), [(1, 65), (3, 92), (5, 130)])
def test_min_side_is_the_smallest_side_that_is_not_enlarged(scales, side):
    network = superglobal.load_model("random", backbone="resnet18", scales=scales)
    assert network.min_side() == side
    exact = network.normalize(torch.from_numpy(noise(side, side).transpose(2, 0, 1).copy())[None])
    assert network._enlarge(exact) is exact
    cells = network.backbone(network._at_scale(exact, min(network.scales))).shape[-2:]
    assert tuple(cells) == (3, 3)


@pytest.mark.parametrize("shape", [(8, 8), (1, 1), (1, 300), (3000, 2), (91, 500)])
def test_small_images_are_enlarged_to_three_cells(model, shape):
    descriptor = superglobal.extract(model, noise(*shape))
    assert np.isfinite(descriptor).all()
    assert np.linalg.norm(descriptor) == pytest.approx(1, abs=1e-5)
    x = model._enlarge(torch.from_numpy(noise(*shape).transpose(2, 0, 1).copy())[None])
    assert min(x.shape[-2:]) == 92
    assert max(x.shape[-2:]) <= 4096


def test_without_regional_gem_small_images_are_not_enlarged():
    network = superglobal.load_model("random", backbone="resnet18", pooling="gem")
    x = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert network._enlarge(x) is x
    assert np.isfinite(superglobal.extract(network, noise(8, 8))).all()
    assert np.isfinite(superglobal.extract(network, noise(1, 1))).all()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_signed_maps_give_finite_unit_descriptors_at_any_size(name):
    network = superglobal.load_model("random", backbone=name)
    assert network.config.relup == "off"
    for shape in ((70, 113), (20, 200)):
        descriptor = superglobal.extract(network, noise(*shape))
        assert np.linalg.norm(descriptor) == pytest.approx(1, abs=1e-5)
    with pytest.raises(InputError, match="relup=off"):
        superglobal.load_model("random", backbone=name, pooling={"relup": True})


def test_all_types_of_input_give_the_same_descriptor(model, tmp_path):
    array = noise(96, 120)
    Image.fromarray(array).save(tmp_path / "x.png")
    tensor = torch.from_numpy(array.transpose(2, 0, 1).copy())
    kinds = [tmp_path / "x.png", str(tmp_path / "x.png"), Image.fromarray(array), array, tensor, tensor.float() / 255]
    rows = superglobal.extract(model, kinds)
    assert rows.dtype == np.float32
    assert np.abs(rows - rows[0]).max() < 1e-6
    assert superglobal.extract(model, []).shape == (0, 512)
    assert superglobal.extract(model, array).shape == (1, 512)
    assert superglobal.extract(model, np.stack([array, array])).shape == (2, 512)


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), torch.randn(3, 8, 8), torch.zeros(1, 8, 8)]
)
def test_an_ambiguous_input_is_an_error(model, bad):
    with pytest.raises(InputError, match="image 0"):
        superglobal.extract(model, [bad])


def test_max_side_shrinks_large_images(model):
    large = noise(300, 200)
    limited = superglobal.extract(model, large, max_side=150)
    resized = np.asarray(Image.fromarray(large).resize((100, 150), Image.Resampling.BICUBIC))
    assert np.allclose(limited, superglobal.extract(model, resized), atol=1e-6)
    assert not np.allclose(limited, superglobal.extract(model, large), atol=1e-3)


def test_every_setting_that_changes_descriptors_changes_the_identity():
    def identity(**settings):
        return superglobal.load_model("random", **({"backbone": "resnet18"} | settings)).identity()

    variants = [
        {},
        {"seed": 1},
        {"backbone": "resnet34"},
        {"scales": 1},
        {"antialias": True},
        {"pooling": {"regional": False}},
        {"pooling": {"relup": "off"}},
        {"pooling": {"relup": "reference_off"}},
        {"pooling": {"gem_plus_p": 4.0}},
    ]
    seen = [str(sorted(identity(**v).items(), key=str)) for v in variants]
    assert len(set(seen)) == len(variants)
    assert identity() == identity()


def test_loading_a_model_keeps_the_state_of_torchs_generator():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    superglobal.load_model("random", backbone="resnet18")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(("scales", "message"), [(2, "1, 3, 5"), ([], "0.1..4"), ([0.0, 1], "0.1..4")])
def test_invalid_scales_raise_errors(scales, message):
    with pytest.raises(InputError, match=message):
        make_scales(scales)


@pytest.mark.parametrize(
    ("name", "multiple", "sides"),
    [
        ("test_resnet", 1, [1, 65]),
        ("pvt_v2_b0", 1, [29, 65]),  # its attention reduces the map by convolutions with large kernels
        ("inception_v3", 1, [75, 139]),  # its convolutions have no padding
        ("hrnet_w18_small", 32, [1, 65]),  # it adds maps of different strides
        ("dla34", 32, [1, 65]),
    ],
)
def test_the_smallest_images_and_the_padding_fit_the_backbone(name, multiple, sides):
    with torch.device("meta"):  # without random weights, which take seconds
        backbone = Backbone(name)
        assert backbone.multiple == multiple
        assert [backbone.min_side(1), backbone.min_side(3)] == sides
        for cells, side in zip((1, 3), sides, strict=True):
            for size in ((side, side + 7), (side + 500, side)):
                assert min(backbone.eval()(torch.zeros(1, 3, *size)).shape[-2:]) >= cells


def test_a_transformer_with_reduced_attention_supports_tiny_images():
    network = superglobal.load_model("random", backbone="pvt_v2_b0", pooling="gem")
    assert superglobal.extract(network, np.zeros((6, 4, 3), np.uint8)).shape == (1, network.dim)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("resnet5O", "no such model; did you mean resnet50 "),
        ("vit_tinny", "no such model; did you mean vit_tiny_patch16_224 "),
        ("mixer_s16_224", "images of any size"),
        ("mvitv2_tiny", r"images of any size.*; it needs images of 224 x 224 px"),  # its table of positions is fixed
    ],
)
def test_unsupported_backbones_raise_errors(backbone, message):
    with pytest.raises(InputError, match=message):
        superglobal.load_model("random", backbone=backbone)
