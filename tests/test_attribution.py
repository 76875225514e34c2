"""Contributions of cells to a similarity: their sum for every pooling, and their values for GeM."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from superglobal.errors import InputError
from superglobal.models.attribution import contributions
from superglobal.models.factory import load_model

GEM = {"gem_plus": False, "regional": False, "scale": False, "relup": "off"}
IMAGE = torch.randint(0, 256, (3, 120, 150), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def network(scales=1, dim=24, backbone="test_resnet", **pooling):
    """Return a random network with the given scales, dimension and pooling."""
    model = load_model("random", backbone=backbone, pooling={**GEM, **pooling}, scales=scales, dim=dim)
    if model.whitening is not None:
        torch.nn.init.normal_(model.whitening.bias, std=0.02, generator=torch.Generator().manual_seed(1))
    return model


def unit_vector(dim, seed=2):
    """Return a random unit vector."""
    vector = np.random.default_rng(seed).normal(size=dim)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


@pytest.mark.parametrize(
    ("scales", "dim", "pooling"),
    [
        (1, 24, {}),
        (1, 0, {}),
        (1, 24, {"p": 2.2}),
        (1, 24, {"gem_plus": True}),
        (1, 24, {"regional": True}),
        (1, 24, {"l2_before_whitening": False}),
        (3, 24, {}),
        (3, 24, {"unit_scales": True, "l2_before_whitening": False}),
        (3, 24, {"scale": True, "gem_plus": True, "regional": True, "relup": "on"}),
        (3, 24, {"scale": True, "scale_p": 3.0}),
    ],
    ids=str,
)
def test_contributions_sum_to_the_similarity(scales, dim, pooling):
    model = network(scales, dim, **pooling)
    with torch.inference_mode():
        descriptor = model(IMAGE[None])[0].numpy()
    for vector in (None, unit_vector(model.dim)):
        result = contributions(model, IMAGE, vector)
        truth = 1.0 if vector is None else float(descriptor @ vector)
        assert result.similarity == pytest.approx(truth, abs=1e-5)
        assert sum(cells.sum() for cells in result.maps) + result.bias == pytest.approx(truth, abs=1e-4)
        assert abs(result.remainder) < 1e-4
        assert len(result.maps) == len(model.scales)
        if dim == 0:
            assert result.bias == 0
        # No single cell has nearly everything.
        assert np.abs(np.concatenate([cells.ravel() for cells in result.maps])).max() < 0.9


def test_gem_distributes_each_channel_by_the_powers_of_the_activations():
    model = network(p=2.7)
    with torch.inference_mode():
        (x,) = model.feature_maps(IMAGE[None])
        x = x[0].double().numpy()
    vector = unit_vector(model.dim).astype(np.float64)
    powers = np.maximum(x, 1e-6) ** 2.7
    pooled = powers.mean(axis=(1, 2)) ** (1 / 2.7)
    weight, bias = (t.double().numpy() for t in (model.whitening.weight, model.whitening.bias))
    whitened = weight @ (pooled / np.linalg.norm(pooled)) + bias
    u = weight.T @ vector / np.linalg.norm(pooled) / np.linalg.norm(whitened)
    expected = np.einsum("c,c,chw->hw", u, pooled / powers.sum(axis=(1, 2)), powers)
    result = contributions(model, IMAGE, vector)
    np.testing.assert_allclose(result.maps[0], expected, atol=1e-6)
    assert result.bias == pytest.approx(float(bias @ vector / np.linalg.norm(whitened)), abs=1e-6)


def test_cells_without_activations_contribute_nothing():
    model = network(dim=0)
    x = torch.rand(1, 96, 4, 6)
    x[..., 3:] = 0
    model.feature_maps = lambda images: iter([x])
    result = contributions(model, IMAGE)
    assert np.abs(result.maps[0][:, 3:]).max() < 1e-6
    assert result.maps[0][:, :3].sum() == pytest.approx(1, abs=1e-4)


def test_the_remainder_equals_the_effect_of_clamping():
    model = network(dim=0, eps=0.5)
    x = torch.full((1, 96, 2, 2), 0.1)
    x[:, 0] = 1.0
    model.feature_maps = lambda images: iter([x])
    result = contributions(model, IMAGE)
    share = 1 / (1 + 95 * 0.25)
    assert result.maps[0].sum() == pytest.approx(share, abs=1e-5)
    assert result.remainder == pytest.approx(1 - share, abs=1e-5)


def test_a_heatmap_keeps_position_and_sum():
    model = network(3)
    result = contributions(model, IMAGE)
    heatmap = result.heatmap(120, 150)
    total = sum(cells.sum() for cells in result.maps)
    assert heatmap.shape == (120, 150)
    assert heatmap.sum() == pytest.approx(total, rel=0.1)
    corner = type(result)([np.pad(np.ones((1, 1)), ((0, 3), (0, 3)))], 0.0, 0.0, 1.0).heatmap(40, 40)
    assert np.unravel_index(corner.argmax(), corner.shape) < (10, 10)
    assert corner.sum() == pytest.approx(1, rel=0.2)
    assert math.isclose(corner[30:, 30:].sum(), 0, abs_tol=1e-12)


def test_a_vector_of_a_different_dimension_is_an_error():
    with pytest.raises(InputError, match=r"shape \(7,\), expected \(24,\)"):
        contributions(network(), IMAGE, unit_vector(7))
