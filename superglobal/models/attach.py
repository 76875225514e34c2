"""SuperGlobal's modules on a network that somebody else trained."""

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
from superglobal.models.network import make_scales, resized
from superglobal.models.pooling import MapPooling, PoolingConfig, ReLUP, make_pooling, scale_gem


class AttachedPooling(nn.Module):
    """SuperGlobal's pooling in the place of another, giving the shape that one gave.

    With `gem_plus` off the network's own pooling follows Regional-GeM, with whatever it has learnt.
    """

    def __init__(self, original: nn.Module, config: PoolingConfig) -> None:
        super().__init__()
        self.original = original
        self.pooling = MapPooling(config)
        self._ndim: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        config = self.pooling.config
        if not config.gem_plus:
            return self.original(self.pooling.regional(x))
        if self._ndim is None:
            with torch.no_grad():
                self._ndim = self.original(x[:1]).ndim
        pooled = self.pooling(x)
        return pooled[:, :, None, None] if self._ndim == 4 else pooled


class Attachment:
    """What `attach` changed; `undo()` restores the network, as does leaving a `with` block."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._undo: list[Callable[[], Any]] = []

    def undo(self) -> nn.Module:
        """Put everything back, newest change first, and return the network."""
        while self._undo:
            self._undo.pop()()
        return self.network

    def __enter__(self) -> nn.Module:
        return self.network

    def __exit__(self, *_: object) -> None:
        self.undo()

    def replace(self, name: str, new: nn.Module) -> None:
        old = replace_module(self.network, name, new)
        self._undo.append(lambda: replace_module(self.network, name, old))

    def on_undo(self, action: Callable[[], Any]) -> None:
        self._undo.append(action)


def attach(
    network: nn.Module,
    pooling: str | dict[str, Any] | PoolingConfig | None = None,
    *,
    scales: int | Sequence[float] = 1,
    antialias: bool = False,
    pool: str | None = None,
) -> Attachment:
    """Swap pooling and ReLUs of a trained network for SuperGlobal's, without touching its weights.

    The network maps (B, 3, H, W) to (B, D) and holds one pooling layer and one torchvision or timm ResNet, itself
    or as a submodule, when ReLUP is wanted. GeM+ and Regional-GeM go into the pooling layer's place, ReLUP into the
    ResNet's activations; with several scales its `forward` resizes the batch, describes every size and combines
    the vectors (Scale-GeM, or their mean with `scale` off). Nothing else changes: normalisation, whitening and
    classifier layers stay as they are.

    Args:
        network: any `nn.Module`, changed in place.
        pooling: as for `load_model`; `relup` is "on" unless switched off.
        scales: 1, 3, 5 or a list of factors.
        antialias: filter when a scale shrinks the batch.
        pool: dotted name of the pooling layer; None finds it.

    Returns:
        An `Attachment`: its `network`, and `undo()`.

    Raises:
        InputError: the pooling layer or the ResNet cannot be told; the network is then unchanged.
    """
    config = make_pooling(pooling)
    factors = make_scales(scales)
    if config.relup == "reference_off":
        raise InputError("attach: relup=reference_off is a quirk of the reference's own network; use on or off")
    attachment = Attachment(network)
    try:
        if config.relup in ("on", "auto"):
            _attach_relup(attachment, config.relup_alpha)
        if config.gem_plus or config.regional:
            name = pool or _find_pool(network)
            attachment.replace(name, AttachedPooling(network.get_submodule(name), config).to(_device(network)))
    except (InputError, AttributeError) as error:
        attachment.undo()
        raise InputError(f"attach: {error}") from error
    if len(factors) > 1:
        _attach_scales(attachment, config, factors, antialias)
    return attachment


def _attach_scales(attachment: Attachment, config: PoolingConfig, scales: Sequence[float], antialias: bool) -> None:
    network = attachment.network
    one_scale = network.forward

    def forward(images: Tensor) -> Tensor:
        vectors = [one_scale(resized(images, s, antialias)) for s in scales]
        return scale_gem(vectors, config.scale_p) if config.scale else torch.stack(vectors).mean(0)

    before = vars(network).get("forward")
    network.forward = forward
    attachment.on_undo(lambda: setattr(network, "forward", before) if before else delattr(network, "forward"))


def _attach_relup(attachment: Attachment, alpha: float) -> None:
    prefix, resnet = _find_resnet(attachment.network)
    if isinstance(resnet, TimmResNet):
        for name in relup_positions(resnet, "on"):
            attachment.replace(prefix + name, ReLUP(alpha, inplace=bool(resnet.get_submodule(name).inplace)))
        return
    # torchvision's blocks share one ReLU among all their activations, the output's included.
    for stage in (1, 2, 3):
        for i, block in enumerate(getattr(resnet, f"layer{stage}")):
            if not isinstance(block.relu, nn.ReLU):
                raise InputError(f"ReLUP needs plain ReLUs; layer{stage}.{i}.relu is {type(block.relu).__name__}")
            if stage == 1:
                attachment.replace(f"{prefix}layer1.{i}.relu", ReLUP(alpha, inplace=block.relu.inplace))
            else:
                # max(max(x, 0), alpha) = max(x, alpha): clamping the block's output is ReLUP at its last ReLU.
                hook = block.register_forward_hook(lambda _block, _inputs, output: output.clamp(min=alpha))
                attachment.on_undo(hook.remove)


def _find_resnet(network: nn.Module) -> tuple[str, nn.Module]:
    found = [(n, m) for n, m in network.named_modules() if isinstance(m, TimmResNet | TorchvisionResNet)]
    if len(found) != 1:
        raise InputError(f"ReLUP needs one timm or torchvision ResNet, found {len(found)}; set relup=off without one")
    name, resnet = found[0]
    return (f"{name}." if name else ""), resnet


def _find_pool(network: nn.Module) -> str:
    """Dotted name of the one layer that pools a map to a vector: known classes, or a name that contains "gem"."""
    found = [
        name
        for name, module in network.named_modules()
        if (isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)))
        or (isinstance(module, SelectAdaptivePool2d) and not module.is_identity())
        or "gem" in type(module).__name__.lower()
    ]
    # A pooling layer's own parts are not further candidates.
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outer) != 1:
        raise InputError(f"cannot tell the pooling layer (candidates: {outer or 'none'}); give pool='its.name'")
    return outer[0]


def _device(network: nn.Module) -> torch.device:
    return next((p.device for p in network.parameters()), torch.device("cpu"))
