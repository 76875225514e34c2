"""Pooling functions and modules: values of the reference, gradients, dtypes, and use in other networks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from superglobal.errors import InputError
from superglobal.models.pooling import (
    GeM,
    MapPooling,
    PoolingConfig,
    RegionalGeM,
    ReLUP,
    ScaleGeM,
    gem,
    make_pooling,
    regional_gem,
    relup_mode,
    scale_gem,
)


def test_functions_have_the_values_of_the_reference_modules():
    grid = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])[None, None]
    expected = [0.37239, 0.412465, 0.45436, 0.487479, 0.527425, 0.569434, 0.620697, 0.661148, 0.703719]
    torch.testing.assert_close(regional_gem(grid).flatten(), torch.tensor(expected), atol=1e-6, rtol=0)
    assert gem(torch.tensor([1.0, 2, 3]).view(1, 1, 1, 3), 4.6, 1e-8).item() == pytest.approx(2.4407001, abs=1e-6)
    scales = torch.tensor([[[3.0, 4, 0]], [[0, 0, 2.0]]])
    torch.testing.assert_close(scale_gem(scales), torch.tensor([[0.6, 0.8, 1.0]]))
    clamped = ReLUP()(torch.tensor([-1.0, 0, 0.01, 0.5]))
    torch.testing.assert_close(clamped, torch.tensor([0.014, 0.014, 0.014, 0.5]))


def test_regional_gem_averages_a_windowed_gem_and_the_input():
    x = torch.rand(2, 3, 6, 7, dtype=torch.float32)
    padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
    windows = padded.unfold(2, 5, 1).unfold(3, 5, 1).flatten(4)
    expected = 0.3 * windows.pow(2.5).mean(-1).pow(1 / 2.5) + 0.7 * x
    torch.testing.assert_close(regional_gem(x, weight=0.3), expected)


@pytest.mark.parametrize("config", [PoolingConfig(), PoolingConfig(gem_plus=False), PoolingConfig(regional=False)])
def test_signed_and_zero_maps_give_finite_values_and_gradients(config):
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


def test_learned_p_has_a_gradient_only_if_it_is_used():
    x = torch.rand(1, 4, 5, 5)
    learned = MapPooling(PoolingConfig(gem_plus=False))
    learned(x).sum().backward()
    assert learned.p.grad.abs().item() > 0
    assert not MapPooling(PoolingConfig(gem_plus=True)).p.requires_grad
    assert not MapPooling(PoolingConfig(gem_plus=False, learn_p=False)).p.requires_grad


def test_finite_scale_gem_equals_the_reference_for_any_batch():
    vectors = torch.randn(3, 2, 16)
    alone = scale_gem(vectors[:, :1], p=10)
    gamma = vectors[:, :1].min()
    expected = (vectors[:, :1] - gamma).pow(10).mean(0).pow(0.1) + gamma
    torch.testing.assert_close(alone, expected)
    torch.testing.assert_close(scale_gem(vectors, p=10)[:1], alone)


@pytest.mark.parametrize("p", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("size", [1e-2, 1.0, 5e3])
def test_powers_are_accurate_in_float32_for_all_exponents(p, size):
    x = size * torch.rand(3, 2, 7, 7, generator=torch.Generator().manual_seed(0))
    exact = x.double().pow(p).mean((2, 3)).pow(1 / p)
    torch.testing.assert_close(gem(x, p, 1e-12).double(), exact, rtol=1e-4, atol=0)
    windowed = regional_gem(x, p, weight=1.0)[:, :, 3, 3].double()
    torch.testing.assert_close(windowed, x[:, :, 1:6, 1:6].double().pow(p).mean((2, 3)).pow(1 / p), rtol=1e-4, atol=0)
    vectors = x.flatten(2)[:, :1] * 1e-4  # unnormalized vectors may be short
    shifted = vectors.double() - vectors.min()
    expected = shifted.pow(p).mean(0).pow(1 / p) + vectors.min()
    torch.testing.assert_close(scale_gem(vectors, p).double(), expected, rtol=1e-3, atol=0)


def test_the_gradient_of_an_inactive_channel_is_finite():
    x = torch.zeros(1, 1, 3, 3, requires_grad=True)
    gem(x, 10.0, 1e-6).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_scale_gem_takes_the_maximum_of_unit_vectors():
    vectors = torch.randn(3, 2, 16)
    expected = (vectors / vectors.norm(dim=-1, keepdim=True)).max(0).values
    torch.testing.assert_close(scale_gem(vectors, p=math.inf), expected)


def test_a_map_too_small_for_the_window_is_an_error():
    with pytest.raises(InputError, match="at least 3 cells"):
        regional_gem(torch.rand(1, 1, 2, 9))


@pytest.mark.parametrize(
    ("value", "mode"),
    [(True, "on"), (False, "off"), ("ON", "on"), ("false", "off"), ("reference_off", "reference_off")],
)
def test_relup_values_become_modes(value, mode):
    assert relup_mode(value) == mode


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ({"gemplus": True}, "gem_plus"),
        ("superglobl", "superglobal, gem, cvnet_global"),
        ({"relup": "maybe"}, "on, off, reference_off"),
        ({"regional_window": 4}, "odd"),
        ({"p": 0}, "from 0.01 to 10"),
        ({"regional_weight": 1.5}, r"0\.\.1"),
        ({"regional": 1}, "true or false"),
        ({"eps": "small"}, "a number"),
    ],
)
def test_invalid_settings_list_the_choices(pooling, message):
    with pytest.raises(InputError, match=message):
        make_pooling(pooling)


def test_deterministic_padding_has_the_same_values_and_gradients():
    """The padding of torch has no deterministic gradient on a GPU."""
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


GRID = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])[None, None]
MODULES = [
    (GeM(), lambda x: gem(x, 3.0, 1e-6)),
    (GeM(4.6, eps=1e-8), lambda x: gem(x, 4.6, 1e-8)),
    (GeM(2.5, learnable=True), lambda x: gem(x, torch.tensor([2.5]), 1e-6)),
    (RegionalGeM(), regional_gem),
    (RegionalGeM(3.0, window=3, weight=0.2), lambda x: regional_gem(x, 3.0, 3, 0.2)),
    (ScaleGeM(), scale_gem),
    (ScaleGeM(10.0), lambda x: scale_gem(x, 10.0)),
    (ReLUP(0.1), lambda x: x.clamp(min=0.1)),
]


def example(module):
    """Return a random input of a module."""
    shape = (3, 2, 16) if isinstance(module, ScaleGeM) else (2, 3, 6, 7)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_the_modules_have_the_values_of_the_reference():
    expected = [0.37239, 0.412465, 0.45436, 0.487479, 0.527425, 0.569434, 0.620697, 0.661148, 0.703719]
    torch.testing.assert_close(RegionalGeM()(GRID).flatten(), torch.tensor(expected), atol=1e-6, rtol=0)
    assert GeM(4.6, eps=1e-8)(torch.tensor([1.0, 2, 3]).view(1, 1, 1, 3)).item() == pytest.approx(2.4407001, abs=1e-6)
    vectors = [torch.tensor([[3.0, 4, 0]]), torch.tensor([[0, 0, 2.0]])]
    torch.testing.assert_close(ScaleGeM()(vectors), torch.tensor([[0.6, 0.8, 1.0]]))


@pytest.mark.parametrize(
    ("create", "problem"),
    [
        (lambda: GeM(0), r"p=0: expected a number from 0\.01 to 10"),
        (lambda: GeM(10.5), r"p=10\.5: expected a number from 0\.01 to 10"),
        (lambda: GeM(eps=0), "eps=0: expected a positive number"),
        (lambda: PoolingConfig(scale_p=50), r"pooling\.scale_p=50: expected a number from 0\.01 to 10"),
        (lambda: PoolingConfig(gem_plus_p=10**400), r"pooling\.gem_plus_p=10*: expected a number"),
        (lambda: PoolingConfig(relup_alpha=2.0), r"pooling\.relup_alpha=2\.0: expected a number in 0\.\.1"),
        (lambda: ScaleGeM(-1), "p=-1: expected a number"),
        (lambda: RegionalGeM(window=4), "window=4: expected an odd number"),
        (lambda: RegionalGeM(weight=7), r"weight=7: expected a number in 0\.\.1"),
    ],
)
def test_invalid_module_arguments_raise_errors(create, problem):
    with pytest.raises(InputError, match=problem):
        create()


@pytest.mark.parametrize(("module", "function"), MODULES, ids=[repr(module) for module, _ in MODULES])
def test_modules_compute_their_functions(module, function):
    x = example(module)
    assert torch.equal(module(x), function(x))
    if isinstance(module, ScaleGeM):
        assert torch.equal(module(list(x)), module(x))


@pytest.mark.parametrize("module", [module for module, _ in MODULES], ids=repr)
def test_gradients_of_modules_equal_finite_differences(module):
    x = example(module).double().abs().add(0.2).requires_grad_()
    assert torch.autograd.gradcheck(module, (x,))


@pytest.mark.parametrize("module", [module for module, _ in MODULES if not isinstance(module, ReLUP)], ids=repr)
def test_a_module_computes_in_float32_under_autocast(module):
    x = example(module).abs().half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = module(x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, module(x.float()))


@pytest.mark.parametrize("p", [0.01, 10.0])
def test_the_bounds_of_the_exponent_are_valid_in_float32(p):
    assert PoolingConfig(p=torch.tensor(p).item()).p == pytest.approx(p)


def test_a_learnable_exponent_is_trained_and_saved():
    pool = torch.nn.Sequential(RegionalGeM(), GeM(learnable=True))
    assert set(pool.state_dict()) == {"1.p"}
    optimizer = torch.optim.SGD(pool.parameters(), lr=0.1)
    pool(example(pool).abs()).sum().backward()
    optimizer.step()
    assert pool[1].p.item() != 3.0
    restored = torch.nn.Sequential(RegionalGeM(), GeM(learnable=True))
    restored.load_state_dict(pool.state_dict())
    x = example(pool)
    assert torch.equal(restored(x), pool(x))
    assert not list(torch.nn.Sequential(RegionalGeM(), GeM(), ScaleGeM(), ReLUP()).parameters())


def test_modules_show_their_settings():
    assert repr(GeM(4.6, eps=1e-8)) == "GeM(p=4.6, eps=1e-08)"
    assert repr(GeM(learnable=True)) == "GeM(p=3, eps=1e-06, learnable=True)"
    assert repr(RegionalGeM()) == "RegionalGeM(p=2.5, window=5, weight=0.5)"
    assert repr(ScaleGeM()) == "ScaleGeM(p=inf)"
    assert repr(ReLUP()) == "ReLUP(alpha=0.014)"


@pytest.mark.parametrize("gem_plus", [True, False])
def test_modules_compute_the_pooling_of_the_network(gem_plus):
    x = example(RegionalGeM())
    pool = GeM(4.6, eps=1e-8) if gem_plus else GeM(3.0, learnable=True)
    assert torch.equal(MapPooling(PoolingConfig(gem_plus=gem_plus))(x), pool(RegionalGeM()(x)))
