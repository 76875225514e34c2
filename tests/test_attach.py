"""`attach` on networks of other libraries: torchvision and timm ResNets with a GeM head."""

from __future__ import annotations

import copy
import pickle

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
    """GeM pooling as another project may implement it."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([2.7]))

    def forward(self, x):
        return x.clamp(min=1e-6).pow(self.p).mean((-2, -1)).pow(1 / self.p)


class TorchvisionRetrieval(nn.Module):
    """Retrieval network of a torchvision ResNet, GeM and a linear layer."""

    def __init__(self, name):
        super().__init__()
        net = getattr(torchvision.models, name)()
        self.body = net
        net.avgpool = GeMHead()
        net.fc = nn.Linear(net.fc.in_features, 16)

    def forward(self, x):
        return self.body(x)


def randomize_batch_norms(network):
    """Draw batch-norm gains small enough for many activations to fall below the floor of ReLUP."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.05, 0.01)
            nn.init.normal_(module.bias, 0, 0.02)
    return network.eval()


@pytest.fixture
def images():
    """Return two random images."""
    return torch.rand(2, 3, 160, 128, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_and_timm_agree_after_attaching(name, images):
    """ReLUP is installed differently (a shared ReLU and hooks, or named modules), with the same result."""
    torchvision_net = randomize_batch_norms(getattr(torchvision.models, name)())
    timm_net = timm.create_model(name).eval()
    timm_net.load_state_dict(torchvision_net.state_dict())
    with torch.no_grad():
        plain = torchvision_net(images)
        torch.testing.assert_close(timm_net(images), plain)
        superglobal.attach(torchvision_net, pooling={"gem_plus": True, "regional": True})
        superglobal.attach(timm_net, pooling={"gem_plus": True, "regional": True})
        assert not torch.allclose(torchvision_net(images), plain, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(timm_net(images), torchvision_net(images))


def test_an_attached_network_equals_a_retrieval_network(images):
    """Other tests compare `RetrievalNetwork` to the reference."""
    retrieval_net = superglobal.load_model("random", backbone="resnet18", scales=1)
    net = randomize_batch_norms(timm.create_model("resnet18", num_classes=0))
    retrieval_net.backbone.net.load_state_dict(net.state_dict())
    superglobal.attach(net)
    with torch.no_grad():
        expected = gem(regional_gem(retrieval_net.backbone(images)), 4.6, 1e-8)
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


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_a_copy_of_an_attached_network_computes_with_its_own_weights(duplicate, images):
    network = randomize_batch_norms(TorchvisionRetrieval("resnet18"))
    superglobal.attach(network, scales=3)
    with torch.no_grad():
        before = network(images)
        copied = duplicate(network)
        torch.testing.assert_close(copied(images), before, atol=0, rtol=0)
        for parameter in copied.parameters():
            parameter.zero_()
        assert not copied(images).any()
        torch.testing.assert_close(network(images), before, atol=0, rtol=0)


def test_without_gem_plus_the_pooling_of_the_network_is_kept(images):
    network = randomize_batch_norms(TorchvisionRetrieval("resnet18"))
    maps = []
    network.body.layer4.register_forward_hook(lambda _m, _x, y: maps.append(y))
    superglobal.attach(network, pooling={"gem_plus": False, "regional": True, "relup": "off"})
    with torch.no_grad():
        got = network(images)
        head = network.body.avgpool.original
        expected = network.body.fc(head(regional_gem(maps[0])))
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
    ambiguous = nn.Sequential(resnet, nn.Unflatten(1, (7, 1, 1)), GeMHead())
    before = ambiguous[0].layer1[0].act1
    with pytest.raises(InputError, match="pool="):
        superglobal.attach(ambiguous)
    assert ambiguous[0].layer1[0].act1 is before
    with pytest.raises(InputError, match="relup=off"):
        superglobal.attach(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)))
    with pytest.raises(InputError, match="nowhere"):
        superglobal.attach(timm.create_model("resnet18"), pool="nowhere")
