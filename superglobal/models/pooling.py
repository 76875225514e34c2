"""SuperGlobal's pooling modules: GeM and GeM+, Regional-GeM, Scale-GeM, ReLUP.

Sources: "Global Features are All You Need for Image Retrieval and Reranking" (ICCV 2023, arXiv 2308.06954),
section 3, and its reference code (modules/coarse_retrieval/{gemp,rgem,sgem,relup}.py). Every power runs in
float32 whatever autocast says: x^4.6 overflows float16 beyond x = 11 and 1e-8 underflows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superglobal.errors import InputError

RELUP_MODES = ("on", "off", "reference_off", "auto")
# Below this a mean of powers counts as zero: its root keeps a finite slope, and the map a difference < 1e-14.
_TINY = 1e-36


@dataclass
class PoolingConfig:
    """Every switch and constant between the feature map and the descriptor.

    Args:
        gem_plus: pool with GeM+ (`gem_plus_p`, fixed); off: with GeM (`p`, from the weights file if it has one).
        regional: mix the map with its windowed GeM before pooling.
        scale: combine the scales by Scale-GeM; off: by their mean (see `unit_scales`).
        relup: "on", "off" (everywhere), "reference_off" (what the reference computes with its flag off: the
            inner activations of stage 1 stay clamped), or "auto" (on for backbones that have a place for it, and
            named as what it became); booleans are accepted.
        p, eps, learn_p: GeM's exponent, lower clamp, and whether training may move p.
        gem_plus_p, gem_plus_eps: the same for GeM+.
        regional_p, regional_window, regional_weight: exponent, odd window (cells), share of the windowed map.
        scale_p: exponent of Scale-GeM; infinity is the maximum over unit vectors.
        relup_alpha: floor of ReLUP.
        l2_before_whitening: unit-normalise the pooled vector before the whitening layer (SuperGlobal yes, CVNet no).
        unit_scales: with `scale` off, average unit vectors (CVNet) instead of raw ones (SuperGlobal).
        opencv_resize: make the scales by OpenCV on uint8 (CVNet: area below 1, linear above) instead of
            bilinearly on the normalised tensor.
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
        for name in ("p", "gem_plus_p", "regional_p", "scale_p", "eps", "gem_plus_eps"):
            if not getattr(self, name) > 0:
                raise InputError(f"pooling.{name} must be positive, not {getattr(self, name)}")
        if self.regional_window < 1 or self.regional_window % 2 == 0:
            raise InputError(f"pooling.regional_window must be odd, not {self.regional_window}")
        if not 0 <= self.regional_weight <= 1:
            raise InputError(f"pooling.regional_weight must be in 0..1, not {self.regional_weight}")


PRESETS: dict[str, dict[str, Any]] = {
    "superglobal": {},
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
    """Return the canonical ReLUP mode of a switch value.

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
        pooling: a preset's name; a dict of switches over what is stored; or None for what is stored.
        stored: switches that came with the weights; None for the SuperGlobal preset.

    Raises:
        InputError: unknown preset or key; the message lists the choices.
    """
    if isinstance(pooling, PoolingConfig):
        return pooling
    if isinstance(pooling, str):
        if pooling not in PRESETS:
            raise InputError(f"pooling={pooling}: expected one of {', '.join(PRESETS)} or a dict of switches")
        return PoolingConfig(**PRESETS[pooling])
    pooling = {**(stored or PRESETS["superglobal"]), **(pooling or {})}
    unknown = sorted(set(pooling) - set(PoolingConfig.__dataclass_fields__))
    if unknown:
        known = ", ".join(PoolingConfig.__dataclass_fields__)
        raise InputError(f"pooling has no setting {', '.join(unknown)}; choose from {known}")
    return PoolingConfig(**pooling)


def wide(x: Tensor) -> Tensor:
    """At least float32: half precision is widened, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gem(x: Tensor, p: float | Tensor = 3.0, eps: float = 1e-6) -> Tensor:
    """Generalised mean over all positions of a map, (mean of max(x, eps)^p)^(1/p).

    GeM+ is the same with p = 4.6 and eps = 1e-8 (paper, section 3.1; gemp.py).

    Args:
        x: (B, C, h, w), any float dtype; negative values count as eps.

    Returns:
        (B, C) float32 (float64 for float64 maps).
    """
    with torch.autocast(x.device.type, enabled=False):
        return wide(x).clamp(min=eps).pow(p).mean(dim=(-2, -1)).pow(1.0 / p)


def regional_gem(x: Tensor, p: float = 2.5, window: int = 5, weight: float = 0.5) -> Tensor:
    """Mix a map with its windowed generalised mean: weight * GeM_window(x) + (1 - weight) * x (rgem.py).

    The window has stride 1 and reflect padding, so the size stays. Negative values count as 0 inside the window:
    a fractional power of them is not a number.

    Args:
        x: (B, C, h, w) with h, w > window // 2.

    Returns:
        (B, C, h, w) float32.

    Raises:
        InputError: the map is too small for the reflect padding.
    """
    pad = window // 2
    if min(x.shape[-2:]) <= pad:
        raise InputError(
            f"RegionalGeM with window {window} needs a feature map of at least {pad + 1} cells a side, "
            f"got {x.shape[-2]} x {x.shape[-1]}: enlarge the image or switch pooling.regional off"
        )
    with torch.autocast(x.device.type, enabled=False):
        x = wide(x)
        powers = _reflected(x.clamp(min=0).pow(p), pad)
        regional = F.avg_pool2d(powers, window, stride=1).clamp(min=_TINY).pow(1.0 / p)
        return weight * regional + (1.0 - weight) * x


def _reflected(x: Tensor, pad: int) -> Tensor:
    """Reflect padding on all four sides; with a deterministic gradient where that is asked for."""
    if not (x.requires_grad and torch.are_deterministic_algorithms_enabled()):
        return F.pad(x, (pad, pad, pad, pad), mode="reflect")
    for dim in (-2, -1):
        places = torch.arange(x.shape[dim], device=x.device)
        places = torch.cat([places[1 : pad + 1].flip(0), places, places[-pad - 1 : -1].flip(0)])
        x = x.index_select(dim, places)
    return x


def scale_gem(descriptors: Tensor | Sequence[Tensor], p: float = math.inf) -> Tensor:
    """Combine the descriptors of one image at several scales (sgem.py).

    With p = infinity: the elementwise maximum of the unit vectors. With a finite p: gamma + (mean of
    (x - gamma)^p)^(1/p) of the vectors as they are, gamma being their smallest component. The reference takes
    gamma over the whole batch; here it is each image's own, which is the same for one image at a time.

    Args:
        descriptors: S tensors of shape (B, D), or one (S, B, D).

    Returns:
        (B, D) float32, not normalised.
    """
    stack = descriptors if isinstance(descriptors, Tensor) else torch.stack(list(descriptors))
    with torch.autocast(stack.device.type, enabled=False):
        stack = wide(stack)
        if math.isinf(p):
            return F.normalize(stack, dim=-1).amax(dim=0)
        gamma = stack.amin(dim=(0, 2), keepdim=True)
        mean = (stack - gamma).pow(p).mean(dim=0).clamp(min=_TINY)
        return mean.pow(1.0 / p) + gamma[0]


class ReLUP(nn.Module):
    """max(x, alpha): activations below alpha become alpha, not 0 (relup.py; alpha = 0.014)."""

    def __init__(self, alpha: float = 0.014, inplace: bool = False) -> None:
        super().__init__()
        self.alpha = alpha
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_(min=self.alpha) if self.inplace else x.clamp(min=self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"


class MapPooling(nn.Module):
    """Feature map (B, C, h, w) to vector (B, C): Regional-GeM if on, then GeM+ or GeM."""

    def __init__(self, config: PoolingConfig) -> None:
        super().__init__()
        self.config = config
        # Kept beside GeM+ too, so that one weights file serves every switch; without a gradient there, because
        # DistributedDataParallel rejects parameters that take no part in the loss.
        self.p = nn.Parameter(torch.tensor([config.p]), requires_grad=config.learn_p and not config.gem_plus)

    @property
    def min_cells(self) -> int:
        """Shorter side, in cells, of the smallest map that can be pooled."""
        return self.config.regional_window // 2 + 1 if self.config.regional else 1

    def key(self) -> tuple[Any, ...]:
        """The same for all that pool alike."""
        c = self.config
        region = (c.regional_p, c.regional_window, c.regional_weight) if c.regional else None
        return region, c.gem_plus, (c.gem_plus_p, c.gem_plus_eps) if c.gem_plus else (c.p, c.eps)

    def regional(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape: Regional-GeM if it is on."""
        c = self.config
        return regional_gem(x, c.regional_p, c.regional_window, c.regional_weight) if c.regional else x

    def forward(self, x: Tensor) -> Tensor:
        c = self.config
        if x.is_cuda:
            # Convolutions leave the channels last; windows and means read whole planes faster.
            x = x.to(torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format)
        x = self.regional(x)
        return gem(x, c.gem_plus_p, c.gem_plus_eps) if c.gem_plus else gem(x, self.p, c.eps)
