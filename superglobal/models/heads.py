"""Margin heads: losses over landmark classes from descriptors and labels, in float32 also under autocast.

A head computes the cosine of each descriptor with one or several learned centers of every class, subtracts a margin
from the true class, and returns the softmax cross entropy of the scaled cosines.
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
    """Output of a head for a batch.

    Attributes:
        loss: scalar; the mean over images of class weight times cross entropy. It is not divided by the weights of the
            batch, so that the loss of a batch is the mean of the losses of its equal parts.
        cosine: (B,) detached, cosine with the true class (its nearest center), without margin.
        correct: (B,) bool, whether the true class has the largest cosine, without margin, of all classes of the step.
    """

    loss: Tensor
    cosine: Tensor
    correct: Tensor


class MarginHead(nn.Module, ABC):
    """Scaled cosines with a margin on the true class; subclasses define it in `target`.

    Args:
        dim: D of the descriptors.
        classes: number of classes (landmarks).
        scale: factor of every cosine, such as sqrt(D).
        margin: one margin for all classes, or (classes,) floats.
        centers: K centers per class, of which the nearest counts (Sub-center ArcFace, Deng et al., ECCV 2020).
        negatives: fraction of the classes, in (0, 1], in the softmax of a training step; see `sample_classes`.
        class_weights: (classes,) floats that multiply the cross entropy of each image.

    Raises:
        InputError: an argument has a wrong shape or is out of range.
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
                raise InputError(f"head: {name} has shape {tuple(values.shape)}, expected ({classes},)")
        if centers < 1:
            raise InputError(f"head: centers={centers}: expected an integer >= 1")
        if not 0 < negatives <= 1:
            raise InputError(f"head: negatives={negatives}: expected a fraction in (0, 1]")
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
        """Apply the margin: (B,) cosines with the true classes and (B,) margins -> (B,) target logits / scale."""

    def negative_logits(self, cosines: Tensor, true: Tensor, target: Tensor) -> Tensor:
        """Compute the logits of the other classes / scale: (B, S); values at the true classes are not used.

        Args:
            cosines: (B, S) with the classes of the step.
            true: (B,) cosines with the true classes.
            target: (B,) output of `target` for them.
        """
        return cosines

    def forward(self, descriptors: Tensor, labels: Tensor) -> MarginOutput:
        """Compute the loss of a batch.

        Args:
            descriptors: (B, D), any norm and float dtype.
            labels: (B,) int64 in 0..classes - 1.

        Returns:
            Loss and metrics, float32 (float64 for float64 descriptors).
        """
        with torch.autocast(descriptors.device.type, enabled=False):
            dtype = torch.promote_types(descriptors.dtype, torch.float32)
            weight: Tensor = self.weight
            index = labels
            if self.training and self.negatives < 1:
                classes, index = self.sample_classes(labels)
                weight = weight.index_select(0, classes)
            cosines = class_cosines(descriptors.to(dtype), weight.to(dtype))
            column = index[:, None]
            true = cosines.gather(1, column).squeeze(1)
            target = self.target(true, self._margins_of(labels, true))
            logits = self.scale * self.negative_logits(cosines, true, target)
            losses = F.cross_entropy(logits.scatter_(1, column, self.scale * target[:, None]), index, reduction="none")
            if self.class_weights is not None:
                losses = losses * self.class_weights[labels].to(dtype)
            return MarginOutput(losses.mean(), true.detach(), cosines.detach().argmax(1) == index)

    def sample_classes(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sample the classes of a step: all classes of the batch, and others uniformly (Partial FC, CVPR 2022).

        The number of classes is always max(B, ceil(negatives * classes)), or all, so that steps take the same time.
        Sampling uses the global generator of the weight's device; the logits are not corrected for it.

        Args:
            labels: (B,) int64.

        Returns:
            (S,) int64 distinct classes, and (B,) int64 index of each label among them.
        """
        classes = len(self.weight)
        count = min(classes, max(len(labels), math.ceil(self.negatives * classes)))
        keys = torch.rand(classes, device=self.weight.device)
        keys[labels] = 2.0  # above all random keys, so that the batch's classes are among the largest
        sampled = keys.topk(count).indices
        index = sampled.new_empty(classes)
        index[sampled] = torch.arange(count, device=sampled.device)
        return sampled, index[labels]

    def _margins_of(self, labels: Tensor, cosine: Tensor) -> Tensor:
        """Return the (B,) margins of the labels in the dtype of `cosine`."""
        if self.margins is not None:
            return self.margins[labels].to(cosine.dtype)
        assert self.margin is not None
        return cosine.new_full(labels.shape, self.margin)


class ArcFace(MarginHead):
    """Loss with an additive angular margin, cos(theta_y + margin) for the label y (Deng et al., CVPR 2019, eq. 3).

    For theta + margin > pi, where cos(theta + margin) increases again, the target is cos(theta) - margin * sin(margin),
    so that the logit decreases with the angle everywhere.

    Args:
        dim: D of the descriptors.
        classes: number of classes (landmarks).
        scale: factor of every cosine, such as sqrt(D).
        margin: in radians, in 0..pi/2; one margin for all classes, or (classes,) floats.
        easy_margin: the alternative of ArcFace's authors: no margin where cos(theta) <= 0. The logit then has a jump
            at a right angle, and the margin has no effect on images far from their class.
        kwargs: `centers`, `negatives` and `class_weights` of `MarginHead`.

    Raises:
        InputError: an argument has a wrong shape or is out of range.
    """

    def __init__(
        self, dim: int, classes: int, scale: float, margin: float | Tensor, *, easy_margin: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(dim, classes, scale, margin, **kwargs)
        self.easy_margin = easy_margin

    def target(self, cosine: Tensor, margin: Tensor) -> Tensor:
        return add_angular_margin(cosine, margin, self.easy_margin)


class SubCenterArcFace(ArcFace):
    """ArcFace with several centers per class, of which the nearest counts (Deng et al., ECCV 2020).

    Args:
        dim, classes, scale, margin: see `ArcFace`.
        centers: number of centers per class, >= 1.
        kwargs: other arguments of `ArcFace`.
    """

    def __init__(
        self, dim: int, classes: int, scale: float, margin: float | Tensor, *, centers: int = 3, **kwargs: Any
    ) -> None:
        super().__init__(dim, classes, scale, margin, centers=centers, **kwargs)


class CosFace(MarginHead):
    """Loss with an additive cosine margin, cos(theta_y) - margin for the label y (Wang et al., CVPR 2018, eq. 4).

    The arguments are those of `ArcFace` without `easy_margin`; the margin is a difference of cosines.
    """

    def target(self, cosine: Tensor, margin: Tensor) -> Tensor:
        return cosine - margin


class CurricularFace(MarginHead):
    """Loss of ArcFace with a weight of hard negatives that increases during training (Huang et al., CVPR 2020).

    A negative class with a cosine above the target (with margin) is hard and has the logit cosine * (t + cosine).
    t is the running mean of the cosine with the true class, starting at 0, so hard negatives count less at the start.
    t is updated in training mode only, before it is used, and has no gradient. Under `torch.distributed` the update
    uses the mean over all processes, which must have batches of the same size. The arguments are those of `ArcFace`
    without `easy_margin`.

    Attributes:
        t: scalar buffer.
        momentum: weight of the old t in an update.
    """

    t: Tensor
    momentum = 0.99

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("t", torch.zeros(()))

    def target(self, cosine: Tensor, margin: Tensor) -> Tensor:
        return add_angular_margin(cosine, margin)

    def negative_logits(self, cosines: Tensor, true: Tensor, target: Tensor) -> Tensor:
        if self.training:
            self.t.lerp_(_mean_over_processes(true.detach()).to(self.t.dtype), 1 - self.momentum)
        hard = cosines > target.detach()[:, None]
        return torch.where(hard, cosines * (self.t.to(cosines.dtype) + cosines), cosines)


HEADS: dict[str, type[MarginHead]] = {"arcface": ArcFace, "cosface": CosFace, "curricularface": CurricularFace}


def validate_kind(kind: str, dynamic_margin: bool = False, easy_margin: bool = False) -> None:
    """Raise an InputError if the kind of head is unknown or does not support these margins."""
    if kind not in HEADS:
        raise InputError(f"head.kind={kind}: expected one of {', '.join(HEADS)}")
    if easy_margin and kind != "arcface":
        raise InputError(f"head.easy_margin=true: not supported by {kind}; remove it or use head=arcface")
    if dynamic_margin and kind == "curricularface":
        raise InputError("head.dynamic_margin=true: not supported by curricularface; remove it or use head=subcenter")


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
    """Create a head from settings.

    Args:
        kind: "arcface", "cosface" or "curricularface".
        dim: D of the descriptors.
        counts: (classes,) integers >= 1, number of images of each class.
        scale: factor of every cosine, such as sqrt(D).
        margin: margin of all classes, in radians; for cosface a difference of cosines.
        dynamic_margin: use margins of 0.05 to 0.5 by class size, the larger the rarer, instead of `margin` (3rd place
            in Google Landmark Recognition 2020); not with curricularface.
        easy_margin: see `ArcFace`; with arcface only.
        centers: number of centers per class, of which the nearest counts.
        class_weights: weight each image by 1 / log(1 + images of its class), with mean 1 (1st place in Google Landmark
            Recognition 2020).
        negatives: fraction of the classes, in (0, 1], in the softmax of a training step (Partial FC, CVPR 2022).

    Returns:
        The head. Call it with descriptors (B, D) of any norm and labels (B,) int64; it returns a `MarginOutput` with
        the loss, and per image the cosine with its class and whether that cosine is the largest.

    Raises:
        InputError: unknown kind, settings that exclude each other, or a class without images.
    """
    validate_kind(kind, dynamic_margin, easy_margin)
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
    """Average (B,) values over all processes; B must be the same in all of them."""
    mean = values.mean()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(mean)
        mean /= torch.distributed.get_world_size()
    return mean


def dynamic_margins(counts: np.ndarray | Tensor, min_margin: float = 0.05, max_margin: float = 0.5) -> Tensor:
    """Compute margins by class size, after haqishen's solution (3rd in Google Landmark Recognition 2020).

    The margin is linear in n^(-1/4), n being the number of images of the class: `min_margin` for the largest class,
    `max_margin` for the smallest. If all classes have the same size, all have `min_margin`.

    Args:
        counts: (classes,) integers, number of images of each class.
        min_margin: margin of the largest class, in radians.
        max_margin: margin of the smallest class, in radians.

    Returns:
        (classes,) float32.

    Raises:
        InputError: a class has no images.
    """
    rarity = _positive_counts(counts) ** -0.25
    low, high = rarity.min(), rarity.max()
    relative = (rarity - low) / (high - low) if high > low else torch.zeros_like(rarity)
    return (min_margin + (max_margin - min_margin) * relative).float()


def log_weights(counts: np.ndarray | Tensor) -> Tensor:
    """Compute class weights 1 / log(1 + n), after psinger's solution (1st in Google Landmark Recognition 2020).

    n is the number of images of a class. The weights are scaled so that their mean over all images is 1. psinger
    normalizes by the weights of each batch instead, so that the weight of an image depends on its batch and the result
    on the number of processes.

    Args:
        counts: (classes,) integers, number of images of each class.

    Returns:
        (classes,) float32.

    Raises:
        InputError: a class has no images.
    """
    images = _positive_counts(counts)
    weights = 1 / torch.log1p(images)
    return (weights * images.sum() / (weights * images).sum()).float()


def _positive_counts(counts: np.ndarray | Tensor) -> Tensor:
    """Convert counts to (classes,) float64 and require that all are >= 1."""
    values = torch.as_tensor(counts).double()
    if not (values >= 1).all():
        empty = int((values < 1).nonzero()[0])
        raise InputError(f"counts: class {empty} has no images; remove the class")
    return values


# This lower bound keeps the gradient of sin = sqrt(1 - cos^2) finite at cos = +-1.
_EPS = 1e-6
# Vectors shorter than this count as zero vectors.
_TINY = 1e-12


def add_angular_margin(cosine: Tensor, margin: Tensor, easy: bool = False) -> Tensor:
    """Compute cos(arccos(x) + margin) for cosines x, both (B,).

    Where the angle exceeds pi, the result is x - margin * sin(margin). With `easy`, it is x where x <= 0.
    """
    sine = (1 - cosine.square()).clamp(min=_EPS).sqrt()
    shifted = cosine * margin.cos() - sine * margin.sin()
    if easy:
        return torch.where(cosine > 0, shifted, cosine)
    return torch.where(cosine > -margin.cos(), shifted, cosine - margin * margin.sin())


def class_cosines(x: Tensor, weight: Tensor) -> Tensor:
    """Compute the cosines of (B, D) with the nearest of K centers (S, K, D) of each class: (B, S).

    The cosines of a zero vector are 0 and have no gradient.
    """
    centers = weight.flatten(0, 1)
    cosines: Tensor = _Cosines.apply(x * _inverse_norms(x), centers)
    if weight.shape[1] == 1:
        return cosines
    return cosines.unflatten(1, weight.shape[:2]).max(dim=2).values


def _inverse_norms(x: Tensor) -> Tensor:
    """Return 1 / norm of each row, 0 for a zero vector: (n, D) -> (n, 1)."""
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return 1 / norms.masked_fill(norms <= _TINY, math.inf)


class _Cosines(torch.autograd.Function):
    """Cosines (B, N) of unit vectors (B, D) with the rows of w (N, D), without a normalized copy of w.

    A normalized copy would be needed in the forward and in the backward pass, and w is by far the largest tensor: 5 GB
    for 203,094 classes with three centers. This function only allocates the gradient of w.
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
            # Only the component of the gradient orthogonal to a row of w changes its cosines.
            along = torch.einsum("bn,bn->n", grad, cosines)[:, None] * inverse
            return grad @ w, (grad.T @ x).addcmul_(w, along, value=-1)
