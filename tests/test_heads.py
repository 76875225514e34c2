"""Margin heads: values and gradients compared to plain float64 formulas, and numerical edge cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from superglobal.errors import InputError
from superglobal.models.heads import (
    ArcFace,
    CosFace,
    CurricularFace,
    SubCenterArcFace,
    add_angular_margin,
    dynamic_margins,
    log_weights,
    make_head,
)

KINDS = ["arcface", "easy", "cosface", "curricularface"]


def build(kind, dim=5, classes=7, scale=12.0, margin=0.4, **settings):
    """Return a head of this kind."""
    if kind == "easy":
        return ArcFace(dim, classes, scale, margin, easy_margin=True, **settings)
    return {"arcface": ArcFace, "cosface": CosFace, "curricularface": CurricularFace}[kind](
        dim, classes, scale, margin, **settings
    )


def batch(head, size=20, seed=0, dtype=torch.float64):
    """Return random descriptors and labels; the last descriptor is opposite to the centers of its class."""
    generator = torch.Generator().manual_seed(seed)
    classes, _, dim = head.weight.shape
    x = torch.randn(size, dim, generator=generator, dtype=dtype)
    labels = torch.randint(classes, (size,), generator=generator)
    x[-1] = -head.weight[labels[-1]].detach().mean(dim=0) + 1e-3
    return x, labels


def target_by_arccos(kind, cosine, margin):
    """Compute the target from the cosine with the true class."""
    if kind == "cosface":
        return cosine - margin
    theta = math.acos(max(-1.0, min(1.0, cosine)))
    if kind == "easy":
        return math.cos(theta + margin) if theta < math.pi / 2 else cosine
    return math.cos(theta + margin) if theta + margin < math.pi else cosine - margin * math.sin(margin)


def reference(kind, x, labels, weight, scale, margins, class_weights, t=0.0):
    """Compute (loss, cosines with the true class, correct, t) by loops in float64."""
    best = np.zeros((len(x), len(weight)))
    for i, row in enumerate(x):
        for j, centers in enumerate(weight):
            best[i, j] = max(float(row @ w / np.linalg.norm(row) / np.linalg.norm(w)) for w in centers)
    true = [best[i, label] for i, label in enumerate(labels)]
    t = 0.99 * t + 0.01 * float(np.mean(true))
    losses = []
    for i, label in enumerate(labels):
        logits = best[i].copy()
        logits[label] = target_by_arccos(kind, true[i], margins[label])
        if kind == "curricularface":
            for j in range(len(weight)):
                if j != label and best[i, j] > logits[label]:
                    logits[j] = best[i, j] * (t + best[i, j])
        p = np.exp(scale * logits)
        losses.append(-class_weights[label] * math.log(p[label] / p.sum()))
    return np.mean(losses), true, best.argmax(axis=1) == labels, t


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centers", [1, 3])
@pytest.mark.parametrize("per_class", [False, True])
def test_a_head_computes_its_formula(kind, centers, per_class):
    torch.manual_seed(0)
    margins = torch.linspace(0.05, 0.5, 7) if per_class else torch.full((7,), 0.4, dtype=torch.float64)
    weights = torch.linspace(0.5, 2, 7) if per_class else None
    head = build(kind, margin=margins if per_class else 0.4, centers=centers, class_weights=weights).double()
    x, labels = batch(head, 40)
    given = torch.ones(7) if weights is None else weights
    t = 0.0
    for _ in range(2):
        output = head(x, labels)
        loss, true, correct, t = reference(
            kind, *(v.detach().numpy() for v in (x, labels, head.weight)), 12.0, margins.tolist(), given.tolist(), t
        )
        assert output.loss.item() == pytest.approx(loss, abs=1e-9)
        np.testing.assert_allclose(output.cosine.numpy(), true, atol=1e-12)
        np.testing.assert_array_equal(output.correct.numpy(), correct)
    assert not output.cosine.requires_grad
    if kind == "curricularface":
        assert head.t.item() == pytest.approx(t, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centers", [1, 3])
def test_gradients_equal_finite_differences(kind, centers):
    torch.manual_seed(1)
    head = build(kind, 4, 5, scale=4.0, centers=centers, class_weights=torch.linspace(0.5, 2, 5)).double().eval()
    if kind == "curricularface":
        head.t.fill_(0.3)
    x, labels = batch(head, 12)

    def loss(x, weight):
        return functional_call(head, {"weight": weight}, (x, labels)).loss

    inputs = (x.requires_grad_(), head.weight.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-7, atol=1e-6)


def test_gradients_equal_those_of_autograd_through_arccos():
    torch.manual_seed(1)
    head = ArcFace(6, 9, scale=8.0, margin=0.3).double()
    x = torch.randn(15, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(9, (15,))
    gradients = torch.autograd.grad(head(x, labels).loss, [x, head.weight])
    cosine = F.normalize(x) @ F.normalize(head.weight[:, 0]).T
    moved = torch.cos(torch.acos(cosine) + 0.3 * F.one_hot(labels, 9).double())
    assert float((torch.acos(cosine.detach()).gather(1, labels[:, None]) + 0.3).max()) < math.pi
    arccos_gradients = torch.autograd.grad(F.cross_entropy(8.0 * moved, labels), [x, head.weight])
    for actual, expected in zip(gradients, arccos_gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centers", [1, 3])
@pytest.mark.parametrize("factor", [1.0, -1.0, 1e-20, 0.0])
def test_values_and_gradients_are_finite_for_extreme_angles_and_zeros(kind, centers, factor):
    head = build(kind, 4, 3, scale=30.0, centers=centers)
    with torch.no_grad():
        head.weight[:, 1:] = head.weight[:, :1]
    x = (factor * head.weight[:, 0].detach()).requires_grad_()
    output = head(x, torch.arange(3))
    output.loss.backward()
    for values in (output.loss, output.cosine, x.grad, head.weight.grad):
        assert torch.isfinite(values).all()
        assert values.abs().max() < 1e3
    if abs(factor) < 1:
        assert not x.grad.any()


def test_a_center_of_zeros_has_no_gradient():
    head = ArcFace(4, 3, scale=30.0, margin=0.3)
    with torch.no_grad():
        head.weight[1] = 0
    head(torch.randn(6, 4), torch.arange(6) % 3).loss.backward()
    assert torch.isfinite(head.weight.grad).all()
    assert not head.weight.grad[1].any()


def test_the_target_decreases_with_the_angle():
    cosine = torch.cos(torch.linspace(0, math.pi, 10_001, dtype=torch.float64))
    margin = torch.full_like(cosine, 0.5)
    assert (add_angular_margin(cosine, margin).diff() < 1e-9).all()
    easy = add_angular_margin(cosine, margin, easy=True)
    assert (easy[cosine > 0] < cosine[cosine > 0]).all()
    assert torch.equal(easy[cosine <= 0], cosine[cosine <= 0])


@pytest.mark.parametrize("kind", KINDS)
def test_heads_compute_in_float32_under_autocast(kind):
    torch.manual_seed(2)
    head = build(kind, 8, 5).eval()
    x, labels = torch.randn(4, 8).bfloat16(), torch.tensor([0, 1, 2, 3])
    wide = x.float().requires_grad_()
    plain = head(wide, labels).loss
    plain_gradients = torch.autograd.grad(plain, [wide, head.weight])
    narrow = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head(narrow, labels).loss
        gradients = torch.autograd.grad(inside, [narrow, head.weight])
    assert inside.dtype == head.weight.dtype == gradients[1].dtype == torch.float32
    torch.testing.assert_close(inside, plain, atol=0, rtol=0)
    torch.testing.assert_close(gradients[1], plain_gradients[1], atol=0, rtol=0)
    torch.testing.assert_close(gradients[0], plain_gradients[0].bfloat16(), atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["arcface", "cosface"])
def test_several_equal_centers_act_like_one_center(kind):
    single, triple = build(kind), build(kind, centers=3)
    with torch.no_grad():
        triple.weight.copy_(single.weight.expand(-1, 3, -1))
    x, labels = batch(single, dtype=torch.float32)
    torch.testing.assert_close(triple(x, labels), single(x, labels))


def test_the_loss_is_the_mean_over_equal_parts_of_the_batch():
    torch.manual_seed(3)
    head = ArcFace(5, 7, 12.0, 0.4, class_weights=torch.linspace(0.1, 3, 7)).double()
    x, labels = batch(head, 24)
    parts = [head(*part).loss for part in zip(x.split(8), labels.split(8), strict=True)]
    torch.testing.assert_close(torch.stack(parts).mean(), head(x, labels).loss)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centers", [1, 2])
def test_a_sampled_step_equals_a_head_of_the_sampled_classes(kind, centers):
    torch.manual_seed(4)
    classes, weights = 50, torch.linspace(0.5, 2, 50)
    settings = {"margin": torch.linspace(0.1, 0.5, classes), "class_weights": weights, "centers": centers}
    head = build(kind, 5, classes, **settings, negatives=0.3).double()
    x, labels = batch(head, 9)
    torch.manual_seed(7)
    chosen, positions = head.sample_classes(labels)
    assert torch.equal(chosen[positions], labels)
    small = {"margin": settings["margin"][chosen], "class_weights": weights[chosen], "centers": centers}
    restricted = build(kind, 5, len(chosen), **small).double()
    with torch.no_grad():
        restricted.weight.copy_(head.weight[chosen])
    torch.manual_seed(7)
    output, expected = head(x, labels), restricted(x, positions)
    torch.testing.assert_close(output, expected)
    output.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(head.weight.grad[chosen], restricted.weight.grad)
    not_sampled = torch.ones(classes, dtype=torch.bool)
    not_sampled[chosen] = False
    assert not head.weight.grad[not_sampled].any()
    # All classes are used in evaluation mode.
    full = build(kind, 5, classes, **settings).double().eval()
    full.load_state_dict(head.state_dict())
    torch.testing.assert_close(head.eval()(x, labels), full(x, labels))


@pytest.mark.parametrize(
    ("negatives", "size", "expected"), [(0.1, 4, 20), (0.1001, 4, 21), (0.01, 30, 30), (1.0, 4, 200), (0.5, 400, 200)]
)
def test_a_step_samples_a_fixed_number_of_classes_including_the_batch(negatives, size, expected):
    head = ArcFace(3, 200, 8.0, 0.1, negatives=negatives)
    for _ in range(20):
        labels = torch.randint(200, (size,))
        chosen, positions = head.sample_classes(labels)
        assert len(chosen) == len(chosen.unique()) == expected
        assert torch.equal(chosen[positions], labels)


def test_other_classes_are_sampled_uniformly():
    torch.manual_seed(5)
    head = ArcFace(3, 40, 8.0, 0.1, negatives=0.25)
    labels = torch.tensor([3, 17, 17])
    drawn = torch.zeros(40)
    for _ in range(4000):
        drawn[head.sample_classes(labels)[0]] += 1
    assert (drawn[[3, 17]] == 4000).all()
    others = drawn[[i for i in range(40) if i not in (3, 17)]]
    expected = 4000 * 8 / 38
    assert ((others - expected).abs() < 5 * math.sqrt(expected)).all()


def test_the_seed_determines_the_sampled_classes():
    head = ArcFace(3, 1000, 8.0, 0.1, negatives=0.1)
    drawn = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        drawn.append(head.sample_classes(torch.tensor([5, 6]))[0])
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_t_is_updated_in_training_only_and_saved():
    torch.manual_seed(6)
    head = CurricularFace(5, 7, 12.0, 0.4)
    x, labels = batch(head, dtype=torch.float32)
    before = head.eval()(x, labels)
    assert head.t.item() == 0
    mean = head.train()(x, labels).cosine.mean()
    assert head.t.item() == pytest.approx(0.01 * mean.item(), rel=1e-5)
    restored = CurricularFace(5, 7, 12.0, 0.4)
    restored.load_state_dict(head.state_dict())
    assert torch.equal(restored.t, head.t)
    after = restored.eval()(x, labels)
    torch.testing.assert_close(after, head.eval()(x, labels), atol=0, rtol=0)
    assert not torch.equal(after.loss, before.loss)


def _train_process(rank, folder, states):
    """Run three steps on one half of each batch and save t and the losses to `folder`."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    head = CurricularFace(5, 7, 12.0, 0.4)
    head.load_state_dict(states)
    losses = []
    for step in range(3):
        x, labels = batch(head, 16, step, torch.float32)
        losses.append(head(x[rank::2], labels[rank::2]).loss.item())
    torch.save((head.t, losses), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_process_with_the_whole_batch(tmp_path):
    torch.manual_seed(8)
    head = CurricularFace(5, 7, 12.0, 0.4)
    states = {name: values.clone() for name, values in head.state_dict().items()}
    torch.multiprocessing.spawn(_train_process, (tmp_path, states), nprocs=2)
    whole = [head(*batch(head, 16, step, torch.float32)).loss.item() for step in range(3)]
    (t, first), (other_t, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(t, other_t)
    torch.testing.assert_close(t, head.t)
    np.testing.assert_allclose(np.mean([first, second], axis=0), whole, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"centers": 3, "negatives": 0.5}])
def test_a_head_learns_to_separate_classes(kind, settings):
    torch.manual_seed(9)
    labels = torch.arange(120) % 12
    images = torch.randn(12, 16)[labels] + 0.3 * torch.randn(120, 16)
    network, head = torch.nn.Linear(16, 8), build(kind, 8, 12, scale=16.0, margin=0.2, **settings)
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=0.02)
    before = head(network(images), labels)
    for _ in range(150):
        optimizer.zero_grad()
        head(network(images), labels).loss.backward()
        optimizer.step()
    after = head.eval()(network(images), labels)
    assert before.correct.float().mean() < 0.5
    assert after.correct.all()
    assert after.cosine.mean() > max(0.8, before.cosine.mean())


def test_dynamic_margins_decrease_with_the_size_of_a_class():
    counts = np.array([16, 1, 256, 81])
    expected = [0.05 + 0.45 * (n**-0.25 - 0.25) / (1 - 0.25) for n in counts]
    np.testing.assert_allclose(dynamic_margins(counts), expected, rtol=1e-6)
    assert dynamic_margins(np.full(3, 9)).tolist() == pytest.approx([0.05] * 3)


def test_log_weights_average_one_over_the_images():
    counts = np.array([2, 10, 1000])
    weights = log_weights(counts).numpy()
    assert np.average(weights, weights=counts) == pytest.approx(1)
    np.testing.assert_allclose(weights * np.log1p(counts), weights[0] * np.log(3), rtol=1e-6)


def test_make_head_applies_its_settings():
    counts = torch.tensor([16, 1, 256])
    plain = make_head("cosface", 4, counts, scale=20, margin=0.3)
    assert isinstance(plain, CosFace)
    assert plain.weight.shape == (3, 1, 4)
    assert set(plain.state_dict()) == {"weight"}
    rich = make_head(
        "arcface",
        4,
        counts,
        scale=20,
        margin=0.3,
        dynamic_margin=True,
        easy_margin=True,
        centers=3,
        class_weights=True,
        negatives=0.5,
    )
    assert rich.easy_margin
    assert rich.weight.shape == (3, 3, 4)
    assert torch.equal(rich.margins, dynamic_margins(counts))
    assert torch.equal(rich.class_weights, log_weights(counts))
    assert len(rich.sample_classes(torch.tensor([0]))[0]) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "softmax"}, "arcface, cosface, curricularface"),
        ({"kind": "cosface", "easy_margin": True}, "not supported by cosface"),
        ({"kind": "curricularface", "dynamic_margin": True}, "not supported by curricularface"),
        ({"counts": [3, 0, 2], "class_weights": True}, "class 1 has no images"),
        ({"negatives": 0.0}, "negatives=0"),
        ({"negatives": 1.5}, r"negatives=1\.5"),
        ({"centers": 0}, "centers=0"),
    ],
)
def test_invalid_settings_raise_errors(settings, message):
    with pytest.raises(InputError, match=message):
        make_head(**{"kind": "arcface", "dim": 4, "counts": [3, 1, 2], "scale": 20, "margin": 0.3} | settings)


def test_a_wrong_number_of_margins_is_an_error():
    with pytest.raises(InputError, match=r"margin has shape \(3,\), expected \(4,\)"):
        ArcFace(2, 4, 8.0, torch.zeros(3))


def test_the_sub_center_head_equals_arcface_with_several_centers():
    torch.manual_seed(3)
    head = SubCenterArcFace(5, 7, 12.0, 0.4, centers=2)
    arcface = ArcFace(5, 7, 12.0, 0.4, centers=2)
    arcface.load_state_dict(head.state_dict())
    x, labels = batch(head, dtype=torch.float32)
    torch.testing.assert_close(head(x, labels), arcface(x, labels), atol=0, rtol=0)
    assert SubCenterArcFace(5, 7, 12.0, 0.4).weight.shape == (7, 3, 5)
