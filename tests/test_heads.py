"""ArcFace: the formula written straight, its gradients, and the places where a naive one breaks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from superglobal.models.heads import ArcFace, with_margin


def reference(descriptors: np.ndarray, labels: np.ndarray, weight: np.ndarray, scale: float, margin: float):
    """Logits by loops and arccos, in float64."""
    logits = np.zeros((len(descriptors), len(weight)))
    for i, x in enumerate(descriptors):
        for j, w in enumerate(weight):
            cosine = float(x @ w / np.linalg.norm(x) / np.linalg.norm(w))
            theta = math.acos(max(-1.0, min(1.0, cosine)))
            if j == labels[i]:
                beyond = theta + margin >= math.pi
                cosine = cosine - margin * math.sin(margin) if beyond else math.cos(theta + margin)
            logits[i, j] = scale * cosine
    return logits


@pytest.mark.parametrize("margin", [0.0, 0.15, 0.5])
def test_logits_are_the_formula(margin):
    rng = np.random.default_rng(0)
    head = ArcFace(5, 7, scale=12.0, margin=margin).double()
    x = rng.normal(size=(20, 5))
    labels = rng.integers(7, size=20)
    # The last target lies opposite its class: theta + margin is beyond pi.
    x[-1] = -head.weight[labels[-1]].detach().numpy() + 1e-3
    logits = head(torch.from_numpy(x), torch.from_numpy(labels))
    expected = reference(x, labels, head.weight.detach().numpy(), 12.0, margin)
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=1e-9)


def test_gradients_are_those_of_autograd_through_arccos():
    torch.manual_seed(1)
    head = ArcFace(6, 9, scale=8.0, margin=0.3).double()
    x = torch.randn(15, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(9, (15,))
    ours = torch.autograd.grad(F.cross_entropy(head(x, labels), labels), [x, head.weight])
    cosine = F.normalize(x) @ F.normalize(head.weight).T
    moved = torch.cos(torch.acos(cosine) + 0.3 * F.one_hot(labels, 9).double())
    assert float((torch.acos(cosine.detach()).gather(1, labels[:, None]) + 0.3).max()) < math.pi
    straight = torch.autograd.grad(F.cross_entropy(8.0 * moved, labels), [x, head.weight])
    for mine, theirs in zip(ours, straight, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)


def test_gradients_are_finite_where_the_angle_is_zero_or_pi():
    head = ArcFace(4, 3, scale=30.0, margin=0.3)
    for sign in (1.0, -1.0):
        x = (sign * head.weight.detach()).requires_grad_()
        labels = torch.arange(3)
        loss = F.cross_entropy(head(x, labels), labels)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(x.grad).all()
        assert torch.isfinite(head.weight.grad).all()


def test_a_target_logit_always_falls_with_the_angle():
    cosine = torch.cos(torch.linspace(0, math.pi, 10_001, dtype=torch.float64))
    assert (with_margin(cosine, 0.5).diff() < 1e-9).all()


def test_float32_under_autocast():
    head = ArcFace(8, 5, scale=30.0, margin=0.3)
    x, labels = torch.randn(4, 8), torch.tensor([0, 1, 2, 3])
    plain = head(x, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head(x, labels)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, plain, atol=0, rtol=0)
