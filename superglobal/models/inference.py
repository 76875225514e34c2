"""The same network, faster: for describing many images, never for training."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from superglobal.models.backbone import Backbone, replace_module
from superglobal.models.network import RetrievalNetwork
from superglobal.utils.precision import PRECISIONS

# What folding may change in a map, as a share of its largest value, in float64.
_FOLDING_TOLERANCE = 1e-9


def fast_copies(networks: Sequence[RetrievalNetwork]) -> list[RetrievalNetwork]:
    """Networks that give the same descriptors sooner, in evaluation mode; those that share a backbone share it again.

    Batch norms are folded into convolutions, the memory layout is the one that convolutions like, and the backbone
    runs in the network's `precision`; pooling and whitening stay in float32.

    Args:
        networks: on the CPU; they stay as they are.
    """
    made: dict[int, Backbone] = {}
    copies = []
    for network in networks:
        key = id(network.backbone)
        if key not in made:
            dtype = PRECISIONS[network.precision]
            fast = folded(network.backbone)
            _use_matrix_products(fast.net)
            fast = fast.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
            fast.dtype = dtype
            made[key] = fast
        copies.append(network.sharing(made[key], network.config).eval())
    return copies


class PointwiseConv2d(nn.Conv2d):
    """A 1 x 1 convolution that is a matrix product on CUDA, where cuDNN adds the bias in a pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return self.product(x) if x.is_cuda else super().forward(x)

    def product(self, x: Tensor) -> Tensor:
        """Compute `forward` as a matrix product; the result has its channels last."""
        cells = x[..., :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)
        out = F.linear(cells.reshape(-1, self.in_channels), self.weight.flatten(1), self.bias)
        return out.view(*cells.shape[:3], self.out_channels).permute(0, 3, 1, 2)


def _use_matrix_products(net: nn.Module) -> None:
    """Replace the 1 x 1 convolutions of a network."""
    for name, module in list(net.named_modules()):
        plain = type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.groups == 1
        if plain and module.padding == (0, 0):
            with torch.device("meta"):
                new = PointwiseConv2d(module.in_channels, module.out_channels, 1, module.stride, bias=False)
            new.weight, new.bias = module.weight, module.bias
            replace_module(net, name, new)


def folded(backbone: Backbone) -> Backbone:
    """A copy in evaluation mode whose batch norms are part of the convolutions before them.

    Which convolution a batch norm follows is seen by running a small image through the network, and that the copy
    computes the same is checked by it; a network in which it does not hold keeps its batch norms.
    """
    fast = copy.deepcopy(backbone).eval()
    if not any(isinstance(module, _BatchNorm) for module in fast.modules()):
        return fast
    side = fast.min_side(3)
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        fast.double()
        before = fast(image)
        for convolution, norm in _pairs(fast, image).items():
            _fold(fast.net, convolution, norm)
        change = (fast(image) - before).abs().max()
    if not change <= _FOLDING_TOLERANCE * before.abs().max():
        return copy.deepcopy(backbone).eval()
    return fast.float()


def _pairs(backbone: Backbone, image: Tensor) -> dict[str, str]:
    """Name of each convolution whose output goes, as it is, into a batch norm -> name of that batch norm."""
    made: dict[int, str] = {}
    outputs: list[Tensor] = []  # kept, so that no two have one id
    calls: dict[str, int] = {}
    pairs: dict[str, str] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            made[id(output)] = name
            outputs.append(output)

        return hook

    def meet(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            calls[name] = calls.get(name, 0) + 1
            if id(inputs[0]) in made:
                pairs[made[id(inputs[0])]] = name

        return hook

    handles = []
    for name, module in backbone.net.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(note(name)))
        elif isinstance(module, _BatchNorm) and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(meet(name)))
    backbone(image)
    for handle in handles:
        handle.remove()
    return {conv: norm for conv, norm in pairs.items() if calls[conv] == calls[norm] == 1}


def _fold(net: nn.Module, convolution: str, norm: str) -> None:
    old: Any = net.get_submodule(norm)
    before: Any = net.get_submodule(convolution)
    replace_module(net, convolution, fuse_conv_bn_eval(before, old))
    # timm's batch norms bring their activation along.
    rest = [layer for layer in (getattr(old, "drop", None), getattr(old, "act", None)) if layer is not None]
    replace_module(net, norm, nn.Sequential(*rest) if rest else nn.Identity())
