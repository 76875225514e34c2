"""Networks optimized for inference compute the same descriptors."""

from __future__ import annotations

import copy
import itertools
import logging
import subprocess
import sys
import sysconfig
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import superglobal
import superglobal.models.backbone
from superglobal.errors import InputError
from superglobal.evaluation import module as evaluation
from superglobal.evaluation.extraction import run_extraction
from superglobal.evaluation.module import ExtractionModule
from superglobal.models import inference as fast_module
from superglobal.models.inference import fold_batch_norms, optimize_for_inference
from superglobal.models.network import forward_variants
from superglobal.models.pooling import PoolingConfig
from superglobal.utils import precision
from superglobal.utils.precision import resolve_precision


def network(name: str, **options):
    """Return a network of random weights, with batch norms like those of a trained network."""
    model = superglobal.load_model("random", backbone=name, **options)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor, low, high in ((module.running_var, 0.5, 2), (module.running_mean, -0.3, 0.3)):
                tensor.uniform_(low, high, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5, generator=generator)
                module.bias.data.uniform_(-0.2, 0.2, generator=generator)
    return model


def images(count: int = 2, height: int = 97, width: int = 130) -> torch.Tensor:
    """Return random smooth images, uint8."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.randint(0, 256, (count, 3, 12, 16), generator=generator).float()
    return nn.functional.interpolate(coarse, (height, width), mode="bilinear").to(torch.uint8)


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "efficientnet_lite0", "mobilenetv3_small_050", "regnety_002", "convnext_atto"]
)
def test_folding_changes_neither_descriptors_nor_the_original(name):
    plain = network(name, scales=3, dim=32)
    before = copy.deepcopy(plain.state_dict())
    (fast,) = optimize_for_inference([plain])
    with torch.inference_mode():
        assert (fast(images()) - plain(images())).abs().max() < 1e-6
    assert all(torch.equal(tensor, before[key]) for key, tensor in plain.state_dict().items())
    assert not any(isinstance(module, _BatchNorm) for module in fast.modules())


def test_a_network_that_reuses_the_output_of_a_convolution_keeps_its_batch_norm():
    plain = network("resnet18")

    class Both(nn.Module):
        def __init__(self, bn: nn.Module) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), bn

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + y

    plain.backbone.net.conv1 = nn.Sequential(Both(nn.BatchNorm2d(3).eval()), plain.backbone.net.conv1)
    plain.backbone.net.conv1[0].bn.running_var.fill_(2.0)
    plain.eval()
    kept = fold_batch_norms(plain.backbone)
    assert any(isinstance(module, _BatchNorm) for module in kept.modules())
    x = torch.rand(1, 3, 97, 97)
    with torch.inference_mode():
        assert torch.equal(kept(x), plain.backbone(x))


@pytest.mark.parametrize(("precision", "min_cosine"), [("bfloat16", 0.99), ("float16", 0.9999)])
def test_half_precision_is_close_and_returns_float32(precision, min_cosine):
    plain = network("resnet18", scales=3)
    expected = plain(images())
    plain.precision = precision
    (fast,) = optimize_for_inference([plain])
    descriptors = fast(images())
    assert descriptors.dtype == torch.float32
    assert (descriptors * expected).sum(1).min() > min_cosine
    assert (descriptors - expected).abs().max() > 1e-6
    assert plain.identity()["precision"] == precision


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("stride", "bias"), [(1, True), (2, True), (1, False), (2, False)])
def test_pointwise_convolutions_equal_matrix_products(stride, bias, layout):
    plain = nn.Sequential(
        nn.Conv2d(5, 7, 1, stride, bias=bias), nn.Conv2d(7, 7, 1, groups=7), nn.Conv2d(7, 3, 1, padding=1)
    )
    fast = copy.deepcopy(plain)
    fast_module._use_matrix_products(fast)
    assert [type(module).__name__ for module in fast] == ["PointwiseConv2d", "Conv2d", "Conv2d"]
    x = torch.randn(2, 5, 9, 12).to(memory_format=layout)
    with torch.inference_mode():
        expected = plain[0](x)
        for output in (fast[0].product(x), fast[0](x)):
            assert output.shape == expected.shape
            assert (output - expected).abs().max() < 1e-6
        assert fast[0].product(x).is_contiguous(memory_format=torch.channels_last)


def test_auto_precision_depends_on_the_accelerator(monkeypatch):
    monkeypatch.setattr(precision, "AUTO_ON_CUDA", "bfloat16")
    for available, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert {resolve_precision("auto", accelerator) for accelerator in ("auto", "gpu", "cuda")} == {expected}
        assert resolve_precision("auto", "cpu") == "float32"
        assert resolve_precision("float16", "gpu") == "float16"


@pytest.mark.parametrize("side", [64, 97])  # 64 px is enlarged where RegionalGeM is on
def test_variants_computed_together_equal_each_network_alone(side):
    first = network("resnet18", dim=16, pooling="gem")
    switches = [
        dict(zip(("gem_plus", "regional", "scale"), s, strict=True)) for s in itertools.product((False, True), repeat=3)
    ]
    configs = [PoolingConfig(relup="off", **switch) for switch in switches]
    configs += [PoolingConfig(relup="off", regional_window=3), PoolingConfig(relup="off", gem_plus_p=2.0)]
    together = optimize_for_inference([first.variant(c) for c in configs])
    assert len({id(switch.backbone) for switch in together}) == 1
    with torch.inference_mode():
        outputs = forward_variants(together, images(2, side, 120))
        for config, descriptors in zip(configs, outputs, strict=True):
            alone = superglobal.load_model("random", backbone="resnet18", dim=16, pooling=config)
            alone.load_state_dict(first.state_dict())
            assert (descriptors - alone(images(2, side, 120))).abs().max() < 1e-6


def test_a_variant_cannot_have_another_relup():
    first = network("resnet18", pooling="gem")
    assert not first.shares_feature_maps(PoolingConfig(relup="on"))
    assert not first.shares_feature_maps(PoolingConfig(relup="auto"))
    with pytest.raises(InputError, match="load_model"):
        first.variant(PoolingConfig(relup="on"))


def test_batches_are_halved_when_memory_runs_out():
    batch_sizes = []

    class Small(superglobal.models.backbone.Backbone):
        def forward(self, x):
            batch_sizes.append(len(x))
            if len(x) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    plain = superglobal.load_model("random", backbone="test_resnet", scales=1)
    expected = plain(images(8))
    plain.backbone.__class__ = Small
    module = ExtractionModule([[plain]], [], [], [])
    (descriptors,) = module._extract([plain], images(8))
    assert (descriptors - expected).abs().max() < 1e-6
    assert batch_sizes == [8, 4, 2, 2, 2, 2]
    module._extract([plain], images(4))
    assert batch_sizes[6:] == [2, 2]  # the smaller size is kept


def test_progress_is_reported_after_the_first_readable_image(monkeypatch, caplog):
    """The first images of a list may all be skipped, which can take long."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(evaluation, "_REPORT_INTERVAL", -1.0)
    plain = superglobal.load_model("random", backbone="test_resnet", scales=1)
    module = ExtractionModule([[plain]], [], [], [])
    module._report_progress(0, 0)
    assert "images/s" not in caplog.text
    module._report_progress(2, 600)
    assert "extracted 2 images" in caplog.text


@pytest.mark.parametrize("step", ["predict", "barrier"])
def test_losing_another_process_raises_an_input_error(step):
    """The other process may fail after its last image, for example with a full disk, before the barrier."""

    def lost(*_, **__):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234")

    flushed = []
    trainer = SimpleNamespace(predict=Mock(), strategy=SimpleNamespace(barrier=Mock()), world_size=2)
    setattr(trainer if step == "predict" else trainer.strategy, step, lost)
    store = SimpleNamespace(flush=lambda: flushed.append(True))
    with pytest.raises(InputError, match="another process of this evaluation has ended"):
        run_extraction(trainer, ExtractionModule([], [], [], []), None, [store])
    assert flushed == [True]


@pytest.mark.skipif("gnu" not in sysconfig.get_config_var("HOST_GNU_TYPE"), reason="needs glibc")
def test_freed_memory_is_reused_after_keep_freed_memory():
    """Memory that was returned to the system causes a page fault on its next use."""
    code = """
import resource, numpy as np
from superglobal.utils.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(2_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
usual = faults()
keep_freed_memory()
faults()
print(usual, faults())
"""
    usual, kept = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.split())
    assert kept < usual / 10


def test_lists_are_extracted_with_folded_batch_norms_and_the_modules_of_the_user(capsys):
    plain = network("resnet18", scales=1)
    plain.pooling.register_forward_hook(lambda module, inputs, output: output * torch.linspace(1, 2, output.shape[1]))
    norm = next(module for module in plain.modules() if isinstance(module, _BatchNorm))
    calls: list[int] = []
    norm.register_forward_hook(lambda *_: calls.append(1))
    photos = list(images(8))
    single = torch.cat([torch.from_numpy(superglobal.extract(plain, photo)) for photo in photos])
    assert len(calls) == 8
    together = superglobal.extract(plain, photos, progress=True)
    assert len(calls) < 16  # Folding itself computes two feature maps.
    torch.testing.assert_close(torch.from_numpy(together), single, rtol=0, atol=1e-6)
    assert "extracted 8/8 images" in capsys.readouterr().err
    calls.clear()
    superglobal.extract(plain.double(), photos)
    assert len(calls) == 8
