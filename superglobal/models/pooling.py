"""SuperGlobal's pooling: GeM and GeM+, Regional-GeM, Scale-GeM and ReLUP, as functions and as modules.

Sources: "Global Features are All You Need for Image Retrieval and Reranking" (ICCV 2023, arXiv 2308.06954), section 3,
and its reference code (modules/coarse_retrieval/{gemp,rgem,sgem,relup}.py). All powers are computed in float32, even
under autocast, because in float16, x^4.6 overflows for x > 11, and 1e-8 underflows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superglobal.errors import InputError, one_of

RELUP_MODES = ("on", "off", "reference_off", "auto")
EXPONENTS = 0.01, 10.0
"""Exponents for which powers of activations up to 6000 are finite in float32, and for which the root is accurate."""
# Lower bound of a mean of powers before its root is taken. It keeps the gradient finite, and it changes the result by
# less than 1e-14.
_TINY = 1e-36
_SMALLEST = torch.finfo(torch.float32).tiny  # the same for GeM, because the mean of an inactive channel is eps^p


@dataclass
class PoolingConfig:
    """Settings of the steps from the feature map to the descriptor.

    Args:
        gem_plus: pool with GeM+ (fixed exponent `gem_plus_p`) instead of GeM (exponent `p`, which the weights file may
            contain).
        regional: mix the feature map with its windowed GeM (Regional-GeM) before pooling.
        scale: combine the scales with Scale-GeM instead of averaging them (see `unit_scales`).
        relup: "on"; "off" (no ReLUP); "reference_off" (the behavior of the reference with its flag off: ReLUP only for
            the inner activations of stage 1); or "auto" ("on" for backbones that support it, else "off"). Booleans are
            accepted.
        p, eps, learn_p: exponent of GeM, lower clamp of GeM, and a flag that lets training update the exponent.
        gem_plus_p, gem_plus_eps: exponent and lower clamp of GeM+.
        regional_p, regional_window, regional_weight: exponent, odd window size in cells, and weight of the windowed
            map.
        scale_p: exponent of Scale-GeM; infinity takes the maximum over unit vectors. All exponents are 0.01 to 10.
        relup_alpha: lower bound of ReLUP, 0 to 1.
        l2_before_whitening: L2-normalize the pooled vector before the whitening layer, as SuperGlobal does but CVNet
            does not.
        unit_scales: if `scale` is off, average unit vectors (CVNet) instead of unnormalized vectors (SuperGlobal).
        opencv_resize: resize uint8 images to the scales with OpenCV, as in CVNet (area interpolation below scale 1,
            bilinear above), instead of resizing standardized tensors bilinearly.

    Raises:
        InputError: a value has the wrong type or is out of range.
    """

    gem_plus: bool = True
    regional: bool = True
    scale: bool = True
    relup: Any = "auto"
    p: float = 3.0
    eps: float = 1e-6
    learn_p: bool = True
    gem_plus_p: float = 4.6
    gem_plus_eps: float = 1e-8
    regional_p: float = 2.5
    regional_window: int = 5
    regional_weight: float = 0.5
    scale_p: float = math.inf
    relup_alpha: float = 0.014
    l2_before_whitening: bool = True
    unit_scales: bool = False
    opencv_resize: bool = False

    def __post_init__(self) -> None:
        self.relup = relup_mode(self.relup)
        for name, field in self.__dataclass_fields__.items():
            value, kind = getattr(self, name), type(field.default)
            if name != "relup" and (
                isinstance(value, bool) is not (kind is bool) or not isinstance(value, int | float)
            ):
                raise InputError(
                    f"pooling.{name}={value!r}: expected {'true or false' if kind is bool else 'a number'}"
                )
        for name in ("p", "gem_plus_p", "regional_p"):
            _require_exponent(f"pooling.{name}", getattr(self, name))
        _require_scale_exponent("pooling.scale_p", self.scale_p)
        for name in ("eps", "gem_plus_eps"):
            _require_eps(f"pooling.{name}", getattr(self, name))
        _require_fraction("pooling.relup_alpha", self.relup_alpha)
        _require_window("pooling.regional_window", self.regional_window)
        _require_fraction("pooling.regional_weight", self.regional_weight)


def _require_eps(name: str, value: float) -> None:
    """Raise InputError unless the value of the setting `name`, a lower clamp of activations, is valid."""
    if not 0 < value <= 1:
        raise InputError(f"{name}={value}: expected a positive number <= 1")


def _require_exponent(name: str, value: float) -> None:
    """Raise InputError unless float32 can compute generalized means with the value of the setting `name`."""
    if not is_exponent(value):
        raise InputError(f"{name}={value}: expected a number from {EXPONENTS[0]:g} to {EXPONENTS[1]:g}")


def is_exponent(value: float) -> bool:
    """Return True if an exponent is in `EXPONENTS`, up to the rounding of float32."""
    low, high = EXPONENTS
    return low * (1 - 1e-6) <= value <= high * (1 + 1e-6)


def _require_scale_exponent(name: str, value: float) -> None:
    """Raise InputError unless the value of the setting `name`, an exponent of Scale-GeM, is valid."""
    if value != math.inf:
        _require_exponent(name, value)


def _require_window(name: str, value: int) -> None:
    """Raise InputError unless the value of the setting `name`, a window size, is odd and positive."""
    if value < 1 or value % 2 != 1:
        raise InputError(f"{name}={value}: expected an odd number >= 1")


def _require_fraction(name: str, value: float) -> None:
    """Raise InputError unless the value of the setting `name` is in 0..1."""
    if not 0 <= value <= 1:
        raise InputError(f"{name}={value}: expected a number in 0..1")


PRESETS: dict[str, dict[str, Any]] = {
    "superglobal": {"gem_plus": True, "regional": True, "scale": True, "relup": "auto"},
    "gem": {"gem_plus": False, "regional": False, "scale": False, "relup": "off"},
    "cvnet_global": {
        "gem_plus": False,
        "regional": False,
        "scale": False,
        "relup": "off",
        "l2_before_whitening": False,
        "unit_scales": True,
        "opencv_resize": True,
    },
}


def relup_mode(value: Any) -> str:
    """Convert the value of the setting `relup`, a boolean or a mode, to one of `RELUP_MODES`.

    Raises:
        InputError: the value is neither a boolean nor one of the modes.
    """
    if isinstance(value, bool):
        return "on" if value else "off"
    mode = {"true": "on", "false": "off"}.get(str(value).lower(), str(value).lower())
    if mode not in RELUP_MODES:
        raise InputError(f"pooling.relup={value}: expected one of {', '.join(RELUP_MODES)} (or true, false)")
    return mode


def make_pooling(
    pooling: str | dict[str, Any] | PoolingConfig | None, stored: dict[str, Any] | None = None
) -> PoolingConfig:
    """Build a `PoolingConfig`.

    Args:
        pooling: name of a preset; a dict of settings that override `stored`; None for `stored` unchanged; or a
            `PoolingConfig`, which is returned unchanged.
        stored: settings stored with the weights; None for those of the preset "superglobal".

    Raises:
        InputError: the preset or a setting is unknown; the message lists the choices.
    """
    if isinstance(pooling, PoolingConfig):
        return pooling
    if isinstance(pooling, str):
        if pooling not in PRESETS:
            raise InputError(f"pooling={pooling}: expected a dict of settings or {one_of(pooling, PRESETS)}")
        return PoolingConfig(**PRESETS[pooling])
    pooling = {**(stored or PRESETS["superglobal"]), **(pooling or {})}
    unknown = sorted(set(pooling) - set(PoolingConfig.__dataclass_fields__))
    if unknown:
        known = ", ".join(PoolingConfig.__dataclass_fields__)
        raise InputError(f"pooling has no setting {', '.join(unknown)}; choose from {known}")
    return PoolingConfig(**pooling)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert a tensor in half precision to float32; return a float32 or float64 tensor unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gem(x: Tensor, p: float | Tensor = 3.0, eps: float = 1e-6) -> Tensor:
    """Compute the generalized mean over all positions of a feature map: (mean of max(x, eps)^p)^(1/p).

    GeM+ is the same function with p = 4.6 and eps = 1e-8 (paper, section 3; reference file gemp.py).

    Args:
        x: (B, C, H, W), any float dtype; values below eps count as eps.
        p: exponent.
        eps: lower clamp.

    Returns:
        (B, C) float32 (float64 for float64 maps).
    """
    with torch.autocast(x.device.type, enabled=False):
        mean = at_least_float32(x).clamp(min=eps).pow(p).mean(dim=(-2, -1))
        return mean.clamp(min=_SMALLEST).pow(1.0 / p)


def regional_gem(x: Tensor, p: float = 2.5, window: int = 5, weight: float = 0.5) -> Tensor:
    """Mix a feature map with its windowed generalized mean: weight * GeM_window(x) + (1 - weight) * x.

    The window has stride 1 and reflect padding, so the map keeps its size (paper, section 3; reference file rgem.py).
    Inside the window, negative values count as 0, because their fractional powers are not real numbers.

    Args:
        x: (B, C, H, W), any float dtype, with H, W > window // 2.
        p: exponent.
        window: side of the window in cells, odd.
        weight: weight of the windowed mean, in 0..1.

    Returns:
        (B, C, H, W) float32 (float64 for float64 maps).

    Raises:
        InputError: the map is too small for the reflect padding.
    """
    pad = window // 2
    if min(x.shape[-2:]) <= pad:
        raise InputError(
            f"Regional-GeM with window {window}: feature map of {x.shape[-2]} x {x.shape[-1]} cells, expected at least "
            f"{pad + 1} cells per side; enlarge the image or turn Regional-GeM off (pooling.regional=false)"
        )
    with torch.autocast(x.device.type, enabled=False):
        x = at_least_float32(x)
        powers = _reflection_pad(x.clamp(min=0).pow(p), pad)
        windowed = F.avg_pool2d(powers, window, stride=1).clamp(min=_TINY).pow(1.0 / p)
        return weight * windowed + (1.0 - weight) * x


def _reflection_pad(x: Tensor, pad: int) -> Tensor:
    """Pad the last two dimensions of a tensor by `pad` elements on each side, by reflection.

    If `torch.use_deterministic_algorithms` is on, `F.pad` is not used, because the gradient of `F.pad` is not
    deterministic on CUDA.
    """
    if not (x.requires_grad and torch.are_deterministic_algorithms_enabled()):
        return F.pad(x, (pad, pad, pad, pad), mode="reflect")
    for dim in (-2, -1):
        index = torch.arange(x.shape[dim], device=x.device)
        index = torch.cat([index[1 : pad + 1].flip(0), index, index[-pad - 1 : -1].flip(0)])
        x = x.index_select(dim, index)
    return x


def scale_gem(descriptors: Tensor | Sequence[Tensor], p: float = math.inf) -> Tensor:
    """Combine the descriptors of an image at several scales (paper, section 3; reference file sgem.py).

    With p = infinity, the result is the elementwise maximum of the unit vectors. With a finite p, it is gamma + (mean
    of (x - gamma)^p)^(1/p) over the unnormalized vectors x, where gamma is the smallest component of all vectors of the
    image. (The reference computes gamma over the whole batch, which is the same for a batch of one image.)

    Args:
        descriptors: S tensors of shape (B, D), or one tensor of shape (S, B, D), any float dtype.
        p: exponent.

    Returns:
        (B, D) float32 (float64 for float64 descriptors), not normalized.
    """
    stack = descriptors if isinstance(descriptors, Tensor) else torch.stack(list(descriptors))
    with torch.autocast(stack.device.type, enabled=False):
        stack = at_least_float32(stack)
        if math.isinf(p):
            return F.normalize(stack, dim=-1).amax(dim=0)
        gamma = stack.amin(dim=(0, 2), keepdim=True)
        shifted = stack - gamma
        largest = shifted.detach().amax(dim=0).clamp(min=_TINY)  # powers of ratios to it neither overflow nor vanish
        return largest * (shifted / largest).pow(p).mean(dim=0).clamp(min=_TINY).pow(1.0 / p) + gamma[0]


class GeM(nn.Module):
    """Generalized-mean pooling over all positions of a feature map: (mean of max(x, eps)^p)^(1/p).

    `GeM(4.6, eps=1e-8)` is the paper's GeM+ (section 3; reference file gemp.py).

    Args:
        p: exponent, 0.01 to 10; 1 gives the mean, and large values approach the maximum.
        eps: lower clamp, > 0 and <= 1; values below eps count as eps.
        learnable: make p a parameter of shape (1,), which is in the state dict as "p".
    """

    def __init__(self, p: float = 3.0, eps: float = 1e-6, learnable: bool = False) -> None:
        super().__init__()
        _require_exponent("p", p)
        _require_eps("eps", eps)
        self.p: float | nn.Parameter = nn.Parameter(torch.tensor([float(p)])) if learnable else p
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Pool a map (B, C, H, W) of any float dtype to (B, C) float32, or float64 for a float64 map."""
        return gem(x, self.p, self.eps)

    def extra_repr(self) -> str:
        if isinstance(self.p, nn.Parameter):
            return f"p={self.p.item():g}, eps={self.eps:g}, learnable=True"
        return f"p={self.p:g}, eps={self.eps:g}"


class RegionalGeM(nn.Module):
    """Regional-GeM, a feature map mixed with its windowed generalized mean: weight * GeM_window(x) + (1 - weight) * x.

    The window has stride 1 and reflect padding, so the map keeps its size (paper, section 3; reference file rgem.py).
    Inside the window, negative values count as 0.

    Args:
        p: exponent of the mean inside the window, 0.01 to 10.
        window: side of the window in cells, odd.
        weight: weight of the windowed mean, in 0..1.
    """

    def __init__(self, p: float = 2.5, window: int = 5, weight: float = 0.5) -> None:
        super().__init__()
        _require_exponent("p", p)
        _require_window("window", window)
        _require_fraction("weight", weight)
        self.p, self.window, self.weight = p, window, weight

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, C, H, W) with its generalized mean over local windows.

        The result has the same shape. It is float32, or float64 for a float64 map.

        Raises:
            InputError: a side of the map has `window // 2` cells or fewer.
        """
        return regional_gem(x, self.p, self.window, self.weight)

    def extra_repr(self) -> str:
        return f"p={self.p:g}, window={self.window}, weight={self.weight:g}"


class ScaleGeM(nn.Module):
    """Scale-GeM, the combination of an image's descriptors at several scales.

    For p = infinity, it is the elementwise maximum of the unit vectors. For a finite p, it is a generalized mean of the
    unnormalized vectors, shifted so that their smallest component is 0; see `scale_gem` (paper, section 3; reference
    file sgem.py).

    Args:
        p: exponent, 0.01 to 10 or infinity.
    """

    def __init__(self, p: float = math.inf) -> None:
        super().__init__()
        _require_scale_exponent("p", p)
        self.p = p

    def forward(self, descriptors: Tensor | Sequence[Tensor]) -> Tensor:
        """Combine S descriptors (B, D), or one tensor (S, B, D), into (B, D) float32 or float64, not normalized."""
        return scale_gem(descriptors, self.p)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


class ReLUP(nn.Module):
    """ReLU with a positive lower bound: max(x, alpha) (paper, section 3; reference file relup.py).

    Args:
        alpha: lower bound; smaller activations become alpha instead of 0.
        inplace: overwrite the input.
    """

    def __init__(self, alpha: float = 0.014, inplace: bool = False) -> None:
        super().__init__()
        self.alpha = alpha
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        """Return max(x, alpha) for each element of a tensor of any shape and floating-point dtype."""
        return x.clamp_(min=self.alpha) if self.inplace else x.clamp(min=self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}" + (", inplace=True" if self.inplace else "")


class MapPooling(nn.Module):
    """Pooling of a feature map (B, C, H, W) to a vector (B, C): Regional-GeM, if it is on, then GeM+ or GeM."""

    def __init__(self, config: PoolingConfig) -> None:
        super().__init__()
        self.config = config
        # p exists even with GeM+, so that the same weights file fits all settings. With GeM+, p has no gradient,
        # because DistributedDataParallel rejects parameters that do not contribute to the loss.
        self.p = nn.Parameter(torch.tensor([config.p]), requires_grad=config.learn_p and not config.gem_plus)

    @property
    def min_cells(self) -> int:
        """Smallest side, in cells, of a feature map that can be pooled."""
        return self.config.regional_window // 2 + 1 if self.config.regional else 1

    def key(self) -> tuple[Any, ...]:
        """Return a hashable key of the settings that affect pooling. Equal keys give equal results for a map."""
        c = self.config
        region = (c.regional_p, c.regional_window, c.regional_weight) if c.regional else None
        return region, c.gem_plus, (c.gem_plus_p, c.gem_plus_eps) if c.gem_plus else (c.p, c.eps)

    def regional(self, x: Tensor) -> Tensor:
        """Apply Regional-GeM to a map (B, C, H, W) if it is on; the shape does not change."""
        c = self.config
        return regional_gem(x, c.regional_p, c.regional_window, c.regional_weight) if c.regional else x

    def forward(self, x: Tensor) -> Tensor:
        """Pool a feature map (B, C, H, W) of any float dtype to (B, C) float32, or float64 for a float64 map."""
        c = self.config
        if x.is_cuda:
            # Convolutions return channels-last maps, but windowed and global means are faster in contiguous layout.
            x = x.to(torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format)
        x = self.regional(x)
        return gem(x, c.gem_plus_p, c.gem_plus_eps) if c.gem_plus else gem(x, self.p, c.eps)
