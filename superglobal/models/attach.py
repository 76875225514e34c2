"""Put SuperGlobal's pooling and ReLUP into a network that was trained elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Replacement of a pooling layer by SuperGlobal's pooling, with an output of the same shape.

    With `gem_plus` off, the network's original pooling layer, with its learned parameters, follows Regional-GeM.
    """

    def __init__(self, original: nn.Module, config: PoolingConfig) -> None:
        super().__init__()
        self.original = original
        self.pooling = MapPooling(config)
        self._ndim: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.pooling.config.gem_plus:
            return self.original(self.pooling.regional(x))
        if self._ndim is None:
            with torch.no_grad():
                self._ndim = self.original(x[:1]).ndim
        pooled = self.pooling(x)
        return pooled[:, :, None, None] if self._ndim == 4 else pooled


class Attachment:
    """Changes that `attach` made to a network; `undo()` or leaving a `with` block restores the network.

    Attributes:
        network: the changed network.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._undo: list[Callable[[], Any]] = []

    def undo(self) -> nn.Module:
        """Revert all changes, newest first, and return the network."""
        while self._undo:
            self._undo.pop()()
        return self.network

    def __enter__(self) -> nn.Module:
        return self.network

    def __exit__(self, *_: object) -> None:
        self.undo()

    def replace(self, name: str, new: nn.Module) -> None:
        """Replace a submodule, given by its dotted name, until `undo`."""
        old = replace_module(self.network, name, new)
        self.on_undo(lambda: replace_module(self.network, name, old))

    def on_undo(self, action: Callable[[], Any]) -> None:
        """Register an action for `undo`."""
        self._undo.append(action)


def attach(
    network: nn.Module,
    pooling: str | dict[str, Any] | PoolingConfig | None = None,
    *,
    scales: int | Sequence[float] = 1,
    antialias: bool = False,
    pool: str | None = None,
) -> Attachment:
    """Replace pooling and ReLUs of a trained network by SuperGlobal's, without changing its weights.

    GeM+ and Regional-GeM replace the pooling layer, ReLUP replaces activations of the ResNet. With several scales,
    `forward` resizes the batch to each of them and combines the vectors by Scale-GeM (by their mean with `scale` off).
    Normalization, whitening and classifier layers stay as they are. The output is not normalized.

    Args:
        network: module from (B, 3, H, W) to (B, D), changed in place. It contains one pooling layer and, for ReLUP, is
            or contains one torchvision or timm ResNet.
        pooling: as for `load_model`; `relup` is "on" unless you switch it off.
        scales: 1, 3, 5 or a list of factors.
        antialias: apply a low-pass filter when a scale shrinks the batch.
        pool: dotted name of the pooling layer; None to find it.

    Returns:
        The changes, with the `network` and `undo()`.

    Raises:
        InputError: the pooling layer or the ResNet is missing or ambiguous; the network is then unchanged.
    """
    config = make_pooling(pooling)
    factors = make_scales(scales)
    if config.relup == "reference_off":
        raise InputError("attach: relup=reference_off applies to the reference's own network only; use on or off")
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
    network = attachment.network
    single_scale = network.forward

    def forward(images: Tensor) -> Tensor:
        vectors = [single_scale(resize(images, s, antialias)) for s in scales]
        return scale_gem(vectors, config.scale_p) if config.scale else torch.stack(vectors).mean(0)

    # Undo restores a `forward` that was set on the instance, or removes the new one so that the class's is used again.
    previous = vars(network).get("forward")
    network.forward = forward
    attachment.on_undo(lambda: setattr(network, "forward", previous) if previous else delattr(network, "forward"))


def _attach_relup(attachment: Attachment, alpha: float) -> None:
    resnets = [(n, m) for n, m in attachment.network.named_modules() if isinstance(m, TimmResNet | TorchvisionResNet)]
    if len(resnets) != 1:
        raise InputError(f"ReLUP needs exactly one timm or torchvision ResNet, found {len(resnets)}; set relup=off")
    name, resnet = resnets[0]
    prefix = f"{name}." if name else ""
    if isinstance(resnet, TimmResNet):
        for name in relup_positions(resnet, "on"):
            attachment.replace(prefix + name, ReLUP(alpha, inplace=bool(resnet.get_submodule(name).inplace)))
        return
    # A torchvision block uses one ReLU module for all its activations, including the output's.
    for stage in (1, 2, 3):
        for i, block in enumerate(getattr(resnet, f"layer{stage}")):
            if not isinstance(block.relu, nn.ReLU):
                raise InputError(
                    f"ReLUP needs plain ReLUs, but layer{stage}.{i}.relu is {type(block.relu).__name__}; set relup=off"
                )
            if stage == 1:
                attachment.replace(f"{prefix}layer1.{i}.relu", ReLUP(alpha, inplace=block.relu.inplace))
            else:
                # max(max(x, 0), alpha) = max(x, alpha): clamping the block's output is ReLUP at its last ReLU.
                hook = block.register_forward_hook(lambda _block, _inputs, output: output.clamp(min=alpha))
                attachment.on_undo(hook.remove)


def _find_pool(network: nn.Module) -> str:
    """Return the dotted name of the only pooling layer: of a known class, or of a class with "gem" in its name."""
    candidates = [
        name
        for name, module in network.named_modules()
        if (isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)))
        or (isinstance(module, SelectAdaptivePool2d) and not module.is_identity())
        or "gem" in type(module).__name__.lower()
    ]
    # Submodules of a pooling layer are not separate candidates.
    outermost = [n for n in candidates if not any(n.startswith(f"{parent}.") for parent in candidates)]
    if len(outermost) != 1:
        raise InputError(f"the pooling layer is ambiguous (candidates: {outermost or 'none'}); give pool='NAME'")
    return outermost[0]
