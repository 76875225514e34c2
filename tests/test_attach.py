"""`attach` on networks from elsewhere: torchvision and timm ResNets with a GeM head."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import superglobal
from superglobal.errors import InputError
from superglobal.models.pooling import gem, regional_gem


class GeMHead(nn.Module):
    """A pooling layer from another project."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([2.7]))

    def forward(self, x):
        return x.clamp(min=1e-6).pow(self.p).mean((-2, -1)).pow(1 / self.p)


class TorchvisionRetrieval(nn.Module):
    def __init__(self, name):
        super().__init__()
        net = getattr(torchvision.models, name)()
        self.body = net
        net.avgpool = GeMHead()
        net.fc = nn.Linear(net.fc.in_features, 16)

    def forward(self, x):
        return self.body(x)


def randomize_batch_norms(network):
    """Batch-norm gains small enough for many activations to fall below ReLUP's floor."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.05, 0.01)
            nn.init.normal_(module.bias, 0, 0.02)
    return network.eval()


@pytest.fixture
def images():
    return torch.rand(2, 3, 160, 128, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_and_timm_agree_after_attaching(name, images):
    """ReLUP is installed differently (a shared ReLU and hooks, or named modules), with the same result."""
    ours = randomize_batch_norms(getattr(torchvision.models, name)())
    theirs = timm.create_model(name).eval()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        plain = ours(images)
        torch.testing.assert_close(theirs(images), plain)
        superglobal.attach(ours, pooling={"gem_plus": True, "regional": True})
        superglobal.attach(theirs, pooling={"gem_plus": True, "regional": True})
        assert not torch.allclose(ours(images), plain, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(theirs(images), ours(images))


def test_an_attached_network_equals_a_retrieval_network(images):
    """`RetrievalNetwork` is itself tested against the reference."""
    ours = superglobal.load_model("random", backbone="resnet18", scales=1)
    net = randomize_batch_norms(timm.create_model("resnet18", num_classes=0))
    ours.backbone.net.load_state_dict(net.state_dict())
    superglobal.attach(net)
    with torch.no_grad():
        expected = gem(regional_gem(ours.backbone(images)), 4.6, 1e-8)
        torch.testing.assert_close(net(images), expected)


@pytest.mark.parametrize("network", [TorchvisionRetrieval("resnet18"), timm.create_model("resnet18", num_classes=7)])
def test_undo_restores_the_network(network, images):
    network = randomize_batch_norms(network)
    names = [name for name, _ in network.named_modules()]
    with torch.no_grad():
        before = network(images)
        with superglobal.attach(network, pooling="superglobal", scales=3) as attached:
            assert (attached(images) - before).abs().max() > 1e-3
        torch.testing.assert_close(network(images), before, atol=0, rtol=0)
    assert [name for name, _ in network.named_modules()] == names
    assert "forward" not in vars(network)


def test_without_gem_plus_the_networks_own_pooling_stays(images):
    network = randomize_batch_norms(TorchvisionRetrieval("resnet18"))
    maps = []
    network.body.layer4.register_forward_hook(lambda _m, _x, y: maps.append(y))
    superglobal.attach(network, pooling={"gem_plus": False, "regional": True, "relup": "off"})
    with torch.no_grad():
        got = network(images)
        own = network.body.avgpool.original
        expected = network.body.fc(own(regional_gem(maps[0])))
    torch.testing.assert_close(got, expected)


def test_scales_are_combined_by_scale_gem(images):
    network = randomize_batch_norms(TorchvisionRetrieval("resnet18"))
    switches = {"gem_plus": False, "regional": False, "relup": "off"}
    with torch.no_grad():
        half = F.interpolate(images, (80, 64), mode="bilinear")
        parts = [F.normalize(network(x)) for x in (half, images)]
        with superglobal.attach(network, pooling=switches, scales=[0.5, 1.0]):
            torch.testing.assert_close(network(images), torch.maximum(*parts))


def test_an_ambiguous_or_missing_layer_is_an_error_and_changes_nothing(images):
    resnet = randomize_batch_norms(timm.create_model("resnet18", num_classes=7))
    two = nn.Sequential(resnet, nn.Unflatten(1, (7, 1, 1)), GeMHead())
    before = two[0].layer1[0].act1
    with pytest.raises(InputError, match="pool="):
        superglobal.attach(two)
    assert two[0].layer1[0].act1 is before
    with pytest.raises(InputError, match="relup=off"):
        superglobal.attach(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)))
    with pytest.raises(InputError, match="nowhere"):
        superglobal.attach(timm.create_model("resnet18"), pool="nowhere")
