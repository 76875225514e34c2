"""Pooling modules: the reference's values, and what must hold beyond them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from superglobal.errors import InputError
from superglobal.models.pooling import (
    MapPooling,
    PoolingConfig,
    ReLUP,
    gem,
    make_pooling,
    regional_gem,
    relup_mode,
    scale_gem,
)


def test_values_of_the_reference_modules():
    grid = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])[None, None]
    expected = [0.37239, 0.412465, 0.45436, 0.487479, 0.527425, 0.569434, 0.620697, 0.661148, 0.703719]
    torch.testing.assert_close(regional_gem(grid).flatten(), torch.tensor(expected), atol=1e-6, rtol=0)
    assert gem(torch.tensor([1.0, 2, 3]).view(1, 1, 1, 3), 4.6, 1e-8).item() == pytest.approx(2.4407001, abs=1e-6)
    scales = torch.tensor([[[3.0, 4, 0]], [[0, 0, 2.0]]])
    torch.testing.assert_close(scale_gem(scales), torch.tensor([[0.6, 0.8, 1.0]]))
    clamped = ReLUP()(torch.tensor([-1.0, 0, 0.01, 0.5]))
    torch.testing.assert_close(clamped, torch.tensor([0.014, 0.014, 0.014, 0.5]))


def test_regional_gem_is_a_windowed_gem():
    x = torch.rand(2, 3, 6, 7, dtype=torch.float32)
    padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
    windows = padded.unfold(2, 5, 1).unfold(3, 5, 1).flatten(4)
    expected = 0.3 * windows.pow(2.5).mean(-1).pow(1 / 2.5) + 0.7 * x
    torch.testing.assert_close(regional_gem(x, weight=0.3), expected)


@pytest.mark.parametrize("config", [PoolingConfig(), PoolingConfig(gem_plus=False), PoolingConfig(regional=False)])
def test_signed_and_empty_maps_give_finite_values_and_gradients(config):
    pooling = MapPooling(config)
    signed = torch.randn(2, 8, 7, 7)
    mostly_zero = torch.zeros(2, 8, 7, 7)
    mostly_zero[:, :, 0, 0] = 1.0
    tiny = torch.full((2, 8, 7, 7), 1e-15)
    for x in (signed, mostly_zero, torch.zeros(2, 8, 7, 7), tiny):
        x = x.clone().requires_grad_()
        out = pooling(x)
        out.sum().backward()
        assert out.isfinite().all()
        assert x.grad.isfinite().all()


def test_powers_run_in_float32_under_autocast():
    x = torch.full((1, 2, 5, 5), 50.0)  # 50^4.6 overflows float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = MapPooling(PoolingConfig())(x.to(torch.float16))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, torch.full((1, 2), 50.0))


def test_learnt_p_gets_a_gradient_only_where_it_is_used():
    x = torch.rand(1, 4, 5, 5)
    learnt = MapPooling(PoolingConfig(gem_plus=False))
    learnt(x).sum().backward()
    assert learnt.p.grad.abs().item() > 0
    assert not MapPooling(PoolingConfig(gem_plus=True)).p.requires_grad
    assert not MapPooling(PoolingConfig(gem_plus=False, learn_p=False)).p.requires_grad


def test_finite_scale_gem_is_the_reference_formula_and_independent_of_the_batch():
    vectors = torch.randn(3, 2, 16)
    alone = scale_gem(vectors[:, :1], p=10)
    gamma = vectors[:, :1].min()
    expected = (vectors[:, :1] - gamma).pow(10).mean(0).pow(0.1) + gamma
    torch.testing.assert_close(alone, expected)
    torch.testing.assert_close(scale_gem(vectors, p=10)[:1], alone)


def test_scale_gem_takes_the_maximum_of_unit_vectors():
    vectors = torch.randn(3, 2, 16)
    expected = (vectors / vectors.norm(dim=-1, keepdim=True)).max(0).values
    torch.testing.assert_close(scale_gem(vectors, p=math.inf), expected)


def test_a_map_too_small_for_the_window_is_refused():
    with pytest.raises(InputError, match="at least 3 cells"):
        regional_gem(torch.rand(1, 1, 2, 9))


@pytest.mark.parametrize(
    ("value", "mode"),
    [(True, "on"), (False, "off"), ("ON", "on"), ("false", "off"), ("reference_off", "reference_off")],
)
def test_relup_switch_values(value, mode):
    assert relup_mode(value) == mode


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ({"gemplus": True}, "gem_plus"),
        ("superglobl", "superglobal, gem, cvnet_global"),
        ({"relup": "maybe"}, "on, off, reference_off"),
        ({"regional_window": 4}, "odd"),
        ({"p": 0}, "positive"),
    ],
)
def test_a_wrong_setting_lists_the_choices(pooling, message):
    with pytest.raises(InputError, match=message):
        make_pooling(pooling)


def test_the_deterministic_padding_is_the_same():
    """torch's own has no deterministic gradient on a GPU."""
    results = []
    for deterministic in (False, True):
        x = torch.rand(2, 3, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(deterministic)
        try:
            y = regional_gem(x, window=5)
            y.square().sum().backward()
        finally:
            torch.use_deterministic_algorithms(before)
        results.append((y.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1], atol=1e-12)
