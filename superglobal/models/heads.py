"""Margin heads: from descriptors and labels to a loss over landmarks, in float32 whatever autocast says.

A head compares each descriptor with one or several learned centres of every class by the cosine, makes the true class
harder by a margin, and takes the softmax cross entropy of the scaled cosines.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from superglobal.errors import InputError


class MarginOutput(NamedTuple):
    """What a head says of a batch.

    Attributes:
        loss: scalar; the mean over the photos of class weight times cross entropy. It is not divided by the batch's
            weights, so that the mean over equal parts of a batch is the loss of the whole.
        cosine: (B,) detached, plain cosine with the true class (its nearest centre), without margin.
        correct: (B,) bool: the true class has the largest plain cosine among the classes of the step.
    """

    loss: Tensor
    cosine: Tensor
    correct: Tensor


class MarginHead(nn.Module, ABC):
    """Scaled cosines with a margin on the true class; subclasses say which (`target`).

    Args:
        dim: D of the descriptors.
        classes: number of landmarks.
        scale: multiplies every cosine.
        margin: one for all classes, or (classes,) floats.
        centers: K centres a class, of which the nearest counts (Sub-center ArcFace, Deng et al., ECCV 2020).
        negatives: share of the classes, in (0, 1], that a training step compares with; see `sampled`.
        class_weights: (classes,) floats that multiply each photo's cross entropy.

    Raises:
        InputError: an argument has another shape or is out of its range.
    """

    weight: nn.Parameter  # (classes, K, D)
    margins: Tensor | None
    class_weights: Tensor | None

    def __init__(
        self,
        dim: int,
        classes: int,
        scale: float,
        margin: float | Tensor,
        centers: int = 1,
        negatives: float = 1.0,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        for name, values in (("margin", margin), ("class_weights", class_weights)):
            if isinstance(values, Tensor) and values.shape != (classes,):
                raise InputError(f"head: {name} has shape {tuple(values.shape)}; give one value for each of {classes}")
        if centers < 1:
            raise InputError(f"head: centers={centers}: a class needs at least one")
        if not 0 < negatives <= 1:
            raise InputError(f"head: negatives={negatives}: give a share in (0, 1]")
        self.scale = scale
        self.negatives = negatives
        self.margin = None if isinstance(margin, Tensor) else float(margin)
        self.register_buffer("margins", margin if isinstance(margin, Tensor) else None)
        self.register_buffer("class_weights", class_weights)
        weight = torch.empty(classes, centers, dim)
        nn.init.xavier_uniform_(weight.flatten(0, 1))
        self.weight = nn.Parameter(weight)

    @abstractmethod
    def target(self, cosine: Tensor, margin: Tensor) -> Tensor:
        """(B,) cosines with the true classes and their (B,) margins -> (B,) what is scaled to be their logits."""

    def others(self, cosines: Tensor, true: Tensor, target: Tensor) -> Tensor:
        """(B, S) cosines with all classes -> what is scaled to be the logits of the false ones; the true are not used.

        Args:
            cosines: with the classes of the step.
            true: (B,) those of them with the true classes.
            target: (B,) what `target` made of these.
        """
        return cosines

    def forward(self, descriptors: Tensor, labels: Tensor) -> MarginOutput:
        """(B, D) descriptors of any norm, (B,) int64 labels -> loss and what to log, float32 (float64 for float64)."""
        with torch.autocast(descriptors.device.type, enabled=False):
            wide = torch.promote_types(descriptors.dtype, torch.float32)
            weight: Tensor = self.weight
            places = labels
            if self.training and self.negatives < 1:
                classes, places = self.sampled(labels)
                weight = weight.index_select(0, classes)
            cosines = class_cosines(descriptors.to(wide), weight.to(wide))
            column = places[:, None]
            true = cosines.gather(1, column).squeeze(1)
            target = self.target(true, self._margins_of(labels, true))
            logits = self.scale * self.others(cosines, true, target)
            losses = F.cross_entropy(logits.scatter_(1, column, self.scale * target[:, None]), places, reduction="none")
            if self.class_weights is not None:
                losses = losses * self.class_weights[labels].to(wide)
            return MarginOutput(losses.mean(), true.detach(), cosines.detach().argmax(1) == places)

    def sampled(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Classes of a step: those of the batch and, with equal chances, as many others as make up the share.

        Always max(B, ceil(negatives * classes)) classes (or all), so that steps cost the same; drawn from the global
        generator of the weight's device. Their softmax is used as it is (Partial FC, An et al., CVPR 2022).

        Args:
            labels: (B,) int64.

        Returns:
            (S,) int64 different classes, and (B,) int64 the places of the labels among them.
        """
        classes = len(self.weight)
        count = min(classes, max(len(labels), math.ceil(self.negatives * classes)))
        keys = torch.rand(classes, device=self.weight.device)
        keys[labels] = 2.0
        chosen = keys.topk(count).indices
        places = chosen.new_empty(classes)
        places[chosen] = torch.arange(count, device=chosen.device)
        return chosen, places[labels]

    def _margins_of(self, labels: Tensor, like: Tensor) -> Tensor:
        """(B,) margins of the labels, in the type of `like`."""
        if self.margins is not None:
            return self.margins[labels].to(like.dtype)
        assert self.margin is not None
        return like.new_full(labels.shape, self.margin)


class ArcFace(MarginHead):
    """Additive angular margin (Deng et al., CVPR 2019, eq. 3): cos(theta_y + margin) for the label y.

    Where theta + margin would pass pi, cos(theta + margin) rises again; there the target is the straight
    continuation cos(theta) - margin * sin(margin), so that logits keep falling with the angle.

    Args:
        margin: radians, in 0..pi/2.
        easy_margin: the other way out that ArcFace's authors offer: no margin at all where cos(theta) <= 0. The logit
            then jumps at a right angle, and photos far from their class are not pushed by the margin.
        kwargs: of `MarginHead`.
    """

    def __init__(
        self, dim: int, classes: int, scale: float, margin: float | Tensor, *, easy_margin: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(dim, classes, scale, margin, **kwargs)
        self.easy_margin = easy_margin

    def target(self, cosine: Tensor, margin: Tensor) -> Tensor:
        return with_margin(cosine, margin, self.easy_margin)


class CosFace(MarginHead):
    """Additive cosine margin (Wang et al., CVPR 2018, eq. 4): cos(theta_y) - margin for the label y."""

    def target(self, cosine: Tensor, margin: Tensor) -> Tensor:
        return cosine - margin


class CurricularFace(MarginHead):
    """ArcFace whose hard negatives grow in weight as training goes on (Huang et al., CVPR 2020).

    A false class whose cosine is above the target (margin included) is hard, and counts as cosine * (t + cosine).
    t is the running mean of the plain cosine with the true class, starting at 0, so that hard negatives count little
    first and much at the end. It moves in training only, before it is used, and has no gradient; where
    `torch.distributed` runs, it takes the mean over all processes (whose batches are equally large).

    Attributes:
        t: scalar buffer.
        momentum: share of t that stays at each step.
    """

    t: Tensor
    momentum = 0.99

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("t", torch.zeros(()))

    def target(self, cosine: Tensor, margin: Tensor) -> Tensor:
        return with_margin(cosine, margin)

    def others(self, cosines: Tensor, true: Tensor, target: Tensor) -> Tensor:
        if self.training:
            self.t.lerp_(_mean_over_processes(true.detach()).to(self.t.dtype), 1 - self.momentum)
        hard = cosines > target.detach()[:, None]
        return torch.where(hard, cosines * (self.t.to(cosines.dtype) + cosines), cosines)


HEADS: dict[str, type[MarginHead]] = {"arcface": ArcFace, "cosface": CosFace, "curricularface": CurricularFace}


def require_kind(kind: str, dynamic_margin: bool = False, easy_margin: bool = False) -> None:
    """
    Raises:
        InputError: no such kind of head, or one without these margins.
    """
    if kind not in HEADS:
        raise InputError(f"head.kind={kind}: expected one of {', '.join(HEADS)}")
    if easy_margin and kind != "arcface":
        raise InputError(f"head.easy_margin=true: {kind} has none; drop it or use head=arcface")
    if dynamic_margin and kind == "curricularface":
        raise InputError("head.dynamic_margin=true: curricularface has one margin; drop it or use head=subcenter")


def make_head(
    kind: str,
    dim: int,
    counts: np.ndarray | Tensor,
    *,
    scale: float,
    margin: float,
    dynamic_margin: bool = False,
    easy_margin: bool = False,
    centers: int = 1,
    class_weights: bool = False,
    negatives: float = 1.0,
) -> MarginHead:
    """A head for classes with so many photos.

    Args:
        kind: "arcface", "cosface" or "curricularface".
        dim: D of the descriptors.
        counts: (classes,) integers, photos of each class.
        scale, centers, negatives: see `MarginHead`.
        margin: of every class: radians, for cosface a difference of cosines.
        dynamic_margin: `dynamic_margins` instead of `margin`; not with curricularface.
        easy_margin: see `ArcFace`; not with the others.
        class_weights: weigh photos by `log_weights`.

    Raises:
        InputError: unknown kind, settings that exclude each other, or a class without photos.
    """
    require_kind(kind, dynamic_margin, easy_margin)
    return HEADS[kind](
        dim,
        len(counts),
        scale,
        dynamic_margins(counts) if dynamic_margin else margin,
        centers=centers,
        negatives=negatives,
        class_weights=log_weights(counts) if class_weights else None,
        **({"easy_margin": True} if easy_margin else {}),
    )


def _mean_over_processes(values: Tensor) -> Tensor:
    """Mean of (B,) values of every process, B being the same for all."""
    mean = values.mean()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(mean)
        mean /= torch.distributed.get_world_size()
    return mean


def dynamic_margins(counts: np.ndarray | Tensor, least: float = 0.05, most: float = 0.5) -> Tensor:
    """Margins by class size, after haqishen's solution (3rd in Google Landmark Recognition 2020).

    n^(-1/4) of the n photos of a class, brought to `least` for the largest class and `most` for the smallest one.
    Where all classes are equally large, each is the largest and has `least`.

    Args:
        counts: (classes,) integers, photos of each class.

    Returns:
        (classes,) float32.

    Raises:
        InputError: a class without photos.
    """
    rarity = _photo_counts(counts) ** -0.25
    low, high = rarity.min(), rarity.max()
    share = (rarity - low) / (high - low) if high > low else torch.zeros_like(rarity)
    return (least + (most - least) * share).float()


def log_weights(counts: np.ndarray | Tensor) -> Tensor:
    """Class weights 1 / log(1 + n) for n photos, after psinger's solution (1st in Google Landmark Recognition 2020).

    Scaled so that their mean over all photos is 1. psinger divides by the weights of each batch instead; then a
    photo's part depends on its neighbours, and several processes differ from one with the whole batch.

    Args:
        counts: (classes,) integers, photos of each class.

    Returns:
        (classes,) float32.

    Raises:
        InputError: a class without photos.
    """
    photos = _photo_counts(counts)
    weights = 1 / torch.log1p(photos)
    return (weights * photos.sum() / (weights * photos).sum()).float()


def _photo_counts(counts: np.ndarray | Tensor) -> Tensor:
    """(classes,) float64."""
    values = torch.as_tensor(counts).double()
    if not (values >= 1).all():
        empty = int((values < 1).nonzero()[0])
        raise InputError(f"counts: class {empty} has no photos; leave it out")
    return values


# Keeps the slope of sin = sqrt(1 - cos^2) finite at cos = +-1.
_EPS = 1e-6
# A shorter vector has no direction.
_TINY = 1e-12


def with_margin(cosine: Tensor, margin: Tensor, easy: bool = False) -> Tensor:
    """cos(arccos(x) + margin) for x in -1..1, both (B,).

    Beyond pi it is continued straight; with `easy` x itself is taken where x <= 0.
    """
    sine = (1 - cosine.square()).clamp(min=_EPS).sqrt()
    moved = cosine * margin.cos() - sine * margin.sin()
    if easy:
        return torch.where(cosine > 0, moved, cosine)
    return torch.where(cosine > -margin.cos(), moved, cosine - margin * margin.sin())


def class_cosines(x: Tensor, weight: Tensor) -> Tensor:
    """(B, D) against the (S, K, D) centres of S classes -> (B, S) cosine with each class's nearest centre.

    A zero vector has cosine 0 with everything, and no gradient.
    """
    centers = weight.flatten(0, 1)
    cosines: Tensor = _Cosines.apply(x * _inverse_norms(x), centers)
    if weight.shape[1] == 1:
        return cosines
    return cosines.unflatten(1, weight.shape[:2]).max(dim=2).values


def _inverse_norms(x: Tensor) -> Tensor:
    """(n, D) -> (n, 1): 1 / norm, 0 where there is no direction."""
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return 1 / norms.masked_fill(norms <= _TINY, math.inf)


class _Cosines(torch.autograd.Function):
    """Unit vectors (B, D) times the directions of w (N, D): (B, N).

    Normalising w first would hold a second and a third copy of it, forward and backward, and w is by far the largest
    thing here: 5 GB for 203,094 classes with three centres. This needs w's gradient and nothing else of its size.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        inverse = _inverse_norms(w)
        cosines = (x @ w.T).mul_(inverse.T)
        ctx.save_for_backward(x, w, inverse, cosines)
        return cosines

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w, inverse, cosines = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            grad = grad * inverse.T
            # Of each row of w only the part across its direction moves a cosine.
            along = torch.einsum("bn,bn->n", grad, cosines)[:, None] * inverse
            return grad @ w, (grad.T @ x).addcmul_(w, along, value=-1)
