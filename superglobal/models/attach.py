"""Add SuperGlobal's pooling and ReLUP to a trained network of another library, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor, nn
from torchvision.models.resnet import ResNet as TorchvisionResNet

from superglobal.errors import InputError
from superglobal.models.backbone import relup_positions, replace_module
from superglobal.models.network import make_scales, resize
from superglobal.models.pooling import MapPooling, PoolingConfig, ReLUP, make_pooling, scale_gem


class AttachedPooling(nn.Module):
    """SuperGlobal's pooling in place of a network's original pooling layer, with an output of the same shape.

    If `gem_plus` is off, the original layer, with its learned parameters, is applied after Regional-GeM.
    """

    def __init__(self, original: nn.Module, config: PoolingConfig) -> None:
        super().__init__()
        self.original = original
        self.pooling = MapPooling(config)
        self._ndim: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Pool a feature map (B, C, H, W) to (B, C) or (B, C, 1, 1), like the original layer."""
        if not self.pooling.config.gem_plus:
            return self.original(self.pooling.regional(x))
        if self._ndim is None:
            with torch.no_grad():
                self._ndim = self.original(x[:1]).ndim
        pooled = self.pooling(x)
        return pooled[:, :, None, None] if self._ndim == 4 else pooled


class Attachment:
    """Changes that `attach` made to a network. Call `undo()`, or use a `with` block, to restore the network.

    Attributes:
        network: the changed network.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._undo: list[Callable[[], Any]] = []

    def undo(self) -> nn.Module:
        """Revert all changes, the latest first, and return the network."""
        while self._undo:
            self._undo.pop()()
        return self.network

    def __enter__(self) -> nn.Module:
        return self.network

    def __exit__(self, *_: object) -> None:
        self.undo()

    def replace(self, name: str, new: nn.Module) -> None:
        """Replace the submodule with the dotted name `name`; `undo` restores the old one."""
        old = replace_module(self.network, name, new)
        self.on_undo(lambda: replace_module(self.network, name, old))

    def on_undo(self, action: Callable[[], Any]) -> None:
        """Register a function without arguments that reverts a change; `undo` calls it."""
        self._undo.append(action)


def attach(
    network: nn.Module,
    pooling: str | dict[str, Any] | PoolingConfig | None = None,
    *,
    scales: int | Sequence[float] = 1,
    antialias: bool = False,
    pool: str | None = None,
) -> Attachment:
    """Replace the pooling layer and ReLUs of a trained network with SuperGlobal's modules, and keep its weights.

    GeM+ and Regional-GeM replace the pooling layer, and ReLUP replaces activations of the ResNet. With several scales,
    `forward` resizes the batch to each scale and combines the resulting vectors with Scale-GeM, or averages them if
    the pooling setting `scale` is off. Normalization, whitening and classifier layers do not change. The combined
    vectors are not normalized.

    Args:
        network: module that maps images (B, 3, H, W) to vectors (B, D); it is changed in place. It must contain exactly
            one pooling layer. For ReLUP, it must be or contain exactly one torchvision or timm ResNet.
        pooling: pooling settings in any form that `load_model` accepts; `relup` is on unless you turn it off.
        scales: number of scales (1, 3 or 5, with the scale factors of the authors' code), or a list of factors.
        antialias: apply a low-pass filter when the batch is resized to a smaller scale.
        pool: dotted name of the pooling layer; None to find it automatically.

    Returns:
        An object with the changed `network` and the method `undo()`. The object is also a context manager, which ends
        with `undo()`.

    Raises:
        InputError: the pooling layer or the ResNet is missing or ambiguous; the network is then unchanged.
    """
    config = make_pooling(pooling)
    factors = make_scales(scales)
    if config.relup == "reference_off":
        raise InputError("attach: relup=reference_off applies only to networks from load_model; use on or off")
    attachment = Attachment(network)
    try:
        if config.relup in ("on", "auto"):
            _attach_relup(attachment, config.relup_alpha)
        if config.gem_plus or config.regional:
            name = pool or _find_pool(network)
            device = next((p.device for p in network.parameters()), torch.device("cpu"))
            attachment.replace(name, AttachedPooling(network.get_submodule(name), config).to(device))
    except (InputError, AttributeError) as error:
        attachment.undo()
        raise InputError(f"attach: {error}") from error
    if len(factors) > 1:
        _attach_scales(attachment, config, factors, antialias)
    return attachment


def _attach_scales(attachment: Attachment, config: PoolingConfig, scales: Sequence[float], antialias: bool) -> None:
    """Replace the network's `forward` with a function that combines the vectors of several scales.

    The function resizes the images to each scale, and passes them to the original `forward`.

    Args:
        attachment: object with the network, which records how to undo the change.
        config: pooling settings, of which `scale` and `scale_p` determine how the vectors are combined.
        scales: scale factors.
        antialias: apply a low-pass filter when the batch is resized to a smaller scale.
    """
    network = attachment.network
    # The new `forward` is an attribute of the instance. To undo the change, restore the old attribute. If there was
    # none, delete the new one, so that the method of the class is used again.
    previous = vars(network).get("forward")
    # Copying or pickling the network copies the bound method in `partial` too, so that a copy uses its own weights.
    network.forward = partial(_forward_scales, network.forward, config, scales, antialias)
    attachment.on_undo(lambda: setattr(network, "forward", previous) if previous else delattr(network, "forward"))


def _forward_scales(
    forward: Callable[[Tensor], Tensor],
    config: PoolingConfig,
    scales: Sequence[float],
    antialias: bool,
    images: Tensor,
) -> Tensor:
    """Combine the vectors (B, D) that `forward` computes from images (B, 3, H, W) at several scales."""
    vectors = [forward(resize(images, s, antialias)) for s in scales]
    return scale_gem(vectors, config.scale_p) if config.scale else torch.stack(vectors).mean(0)


def _clamp_output(alpha: float, block: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Return max(output, alpha), as a forward hook of a block."""
    return output.clamp(min=alpha)


def _attach_relup(attachment: Attachment, alpha: float) -> None:
    """Replace output activations of the blocks in stages 1-3, and inner activations in stage 1, with ReLUP.

    Args:
        attachment: object with the network, which records how to undo the changes.
        alpha: lower bound of ReLUP.

    Raises:
        InputError: the network does not contain exactly one ResNet, or the ResNet has no plain ReLUs.
    """
    resnets = [(n, m) for n, m in attachment.network.named_modules() if isinstance(m, TimmResNet | TorchvisionResNet)]
    if len(resnets) != 1:
        raise InputError(f"ReLUP needs exactly one timm or torchvision ResNet, found {len(resnets)}; set relup=off")
    name, resnet = resnets[0]
    prefix = f"{name}." if name else ""
    if isinstance(resnet, TimmResNet):
        for name in relup_positions(resnet, "on"):
            attachment.replace(prefix + name, ReLUP(alpha, inplace=bool(resnet.get_submodule(name).inplace)))
        return
    # A torchvision block uses one ReLU module for all activations: the inner ones, and the one at the end of the block.
    for stage in (1, 2, 3):
        for i, block in enumerate(getattr(resnet, f"layer{stage}")):
            if not isinstance(block.relu, nn.ReLU):
                raise InputError(
                    f"ReLUP needs plain ReLUs, but layer{stage}.{i}.relu is {type(block.relu).__name__}; set relup=off"
                )
            if stage == 1:
                attachment.replace(f"{prefix}layer1.{i}.relu", ReLUP(alpha, inplace=block.relu.inplace))
            else:
                # max(max(x, 0), alpha) = max(x, alpha), so clamping the output of the block turns its last ReLU into
                # ReLUP.
                hook = block.register_forward_hook(partial(_clamp_output, alpha))
                attachment.on_undo(hook.remove)


def _find_pool(network: nn.Module) -> str:
    """Return the dotted name of the network's pooling layer. Raises InputError unless there is exactly one.

    A pooling layer is a global pooling module of PyTorch or timm, or a module whose class name contains "gem".
    """
    candidates = [
        name
        for name, module in network.named_modules()
        if (isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)))
        or (isinstance(module, SelectAdaptivePool2d) and not module.is_identity())
        or "gem" in type(module).__name__.lower()
    ]
    # A submodule of a pooling layer may match, too, but only the outermost module is replaced.
    outermost = [n for n in candidates if not any(n.startswith(f"{parent}.") for parent in candidates)]
    if len(outermost) != 1:
        raise InputError(f"expected exactly one pooling layer, found {outermost or 'none'}; give pool='NAME'")
    return outermost[0]
