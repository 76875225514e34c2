"""Optimized copies of networks for extraction, with folded batch norms, a faster memory layout and half precision."""

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

# Largest allowed change of a float64 feature map when batch norms are folded, relative to the largest value of the map.
_FOLDING_TOLERANCE = 1e-9


def optimize_for_inference(networks: Sequence[RetrievalNetwork]) -> list[RetrievalNetwork]:
    """Return copies of networks, in evaluation mode, that compute the same descriptors faster.

    Batch norms are folded into convolutions. The backbones use the channels-last memory layout and the `precision` of
    their network. Pooling and whitening stay in float32. If several networks share a backbone, so do their copies.

    Args:
        networks: networks on the CPU; they are not changed.

    Returns:
        One copy per network.
    """
    backbones: dict[int, Backbone] = {}
    copies = []
    for network in networks:
        key = id(network.backbone)
        if key not in backbones:
            dtype = PRECISIONS[network.precision]
            backbone = fold_batch_norms(network.backbone)
            _use_matrix_products(backbone.net)
            backbone = backbone.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
            backbone.dtype = dtype
            backbones[key] = backbone
        copies.append(network.with_backbone(backbones[key], network.config).eval())
    return copies


def fold_network(network: RetrievalNetwork) -> RetrievalNetwork:
    """Return a copy of a network whose backbone has folded batch norms. It computes the same descriptors faster.

    All other modules are shared with the network, including those that the user has replaced.

    Args:
        network: float32 network on the CPU, in evaluation mode; it is not changed.
    """
    backbone = fold_batch_norms(network.backbone).to(memory_format=torch.channels_last)
    folded = copy.copy(network)
    folded._modules = {**network._modules, "backbone": backbone}
    return folded


class PointwiseConv2d(nn.Conv2d):
    """1 x 1 convolution that is computed as a matrix product on CUDA.

    The matrix product is faster, because a convolution of cuDNN adds the bias in a separate pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve a tensor (B, C, H, W) to (B, C', H', W')."""
        return self.product(x) if x.is_cuda else super().forward(x)

    def product(self, x: Tensor) -> Tensor:
        """Compute the convolution as a matrix product. The result has the channels-last memory layout."""
        cells = x[..., :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)
        out = F.linear(cells.reshape(-1, self.in_channels), self.weight.flatten(1), self.bias)
        return out.view(*cells.shape[:3], self.out_channels).permute(0, 3, 1, 2)


def _use_matrix_products(net: nn.Module) -> None:
    """Replace the 1 x 1 convolutions of a network with `PointwiseConv2d`, in place."""
    for name, module in list(net.named_modules()):
        plain = type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.groups == 1
        if plain and module.padding == (0, 0):
            with torch.device("meta"):
                new = PointwiseConv2d(module.in_channels, module.out_channels, 1, module.stride, bias=False)
            new.weight, new.bias = module.weight, module.bias
            replace_module(net, name, new)


def fold_batch_norms(backbone: Backbone) -> Backbone:
    """Return a copy of a backbone, in evaluation mode, with batch norms folded into the preceding convolutions.

    A forward pass with a small image finds the convolution before each batch norm. After folding, the feature maps of
    the copy and of the original are compared. If they differ, a copy without any folding is returned.
    """
    folded = copy.deepcopy(backbone).eval()
    if not any(isinstance(module, _BatchNorm) for module in folded.modules()):
        return folded
    side = folded.min_side(3)
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        folded.double()
        expected = folded(image)
        for convolution, norm in _find_pairs(folded, image).items():
            _fold(folded.net, convolution, norm)
        difference = (folded(image) - expected).abs().max()
    if not difference <= _FOLDING_TOLERANCE * expected.abs().max():
        return copy.deepcopy(backbone).eval()
    return folded.float()


def _find_pairs(backbone: Backbone, image: Tensor) -> dict[str, str]:
    """Find the convolutions whose output is the input of a batch norm, by a forward pass of the backbone.

    A pair is omitted if one of the two layers runs more than once per forward pass.

    Args:
        backbone: backbone in evaluation mode.
        image: (1, 3, H, W) input of the forward pass.

    Returns:
        Dict from the name of a convolution to the name of its batch norm.
    """
    sources: dict[int, str] = {}  # maps the `id` of a convolution's output to the name of the convolution
    outputs: list[Tensor] = []  # keeps all outputs in memory, so that no other tensor gets the same `id`
    calls: dict[str, int] = {}
    pairs: dict[str, str] = {}

    def after_convolution(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            sources[id(output)] = name
            outputs.append(output)

        return hook

    def before_norm(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            calls[name] = calls.get(name, 0) + 1
            if id(inputs[0]) in sources:
                pairs[sources[id(inputs[0])]] = name

        return hook

    handles = []
    for name, module in backbone.net.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(after_convolution(name)))
        elif isinstance(module, _BatchNorm) and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(before_norm(name)))
    backbone(image)
    for handle in handles:
        handle.remove()
    return {conv: norm for conv, norm in pairs.items() if calls[conv] == calls[norm] == 1}


def _fold(net: nn.Module, convolution: str, norm: str) -> None:
    """Fold a batch norm of `net` into a convolution, in place. Both layers are given by their dotted names."""
    conv: Any = net.get_submodule(convolution)
    batch_norm: Any = net.get_submodule(norm)
    replace_module(net, convolution, fuse_conv_bn_eval(conv, batch_norm))
    # timm's batch norms may contain dropout and an activation. These layers are kept.
    layers = [getattr(batch_norm, name) for name in ("drop", "act") if getattr(batch_norm, name, None) is not None]
    replace_module(net, norm, nn.Sequential(*layers) if layers else nn.Identity())
