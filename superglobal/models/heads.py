"""Margin heads, which compute classification losses from descriptors and landmark labels.

A head computes the cosine of each descriptor with one or several learned centers of every class, applies a margin to
the cosine of the true class, and returns the softmax cross entropy of the scaled cosines. It computes in float32 even
under autocast.
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

from superglobal.errors import InputError, one_of


class MarginOutput(NamedTuple):
    """Output of a head for a batch.

    Attributes:
        loss: scalar, the mean over images of cross entropy times class weight. It is not divided by the mean weight of
            the batch. The loss of a batch that is split into equal parts is therefore the mean of the losses of the
            parts.
        cosine: (B,) cosine of each descriptor with the nearest center of its true class, without margin, detached.
        correct: (B,) bool, true if the true class has the largest cosine, without margin, of all classes in the softmax
            of this step.
    """

    loss: Tensor
    cosine: Tensor
    correct: Tensor


class MarginHead(nn.Module, ABC):
    """Base class of losses with a margin. Subclasses apply the margin to the true class in their method `target`.

    Args:
        dim: dimension D of the descriptors.
        classes: number of classes (landmarks).
        scale: factor by which all cosines are multiplied, such as sqrt(D).
        margin: one margin for all classes, or a tensor (classes,) of margins.
        centers: number K of centers per class, of which the nearest one is used (Sub-center ArcFace, Deng et al., ECCV
            2020).
        negatives: fraction, in (0, 1], of the classes that are in the softmax of a training step; see `sample_classes`.
        class_weights: tensor (classes,) of factors for the cross entropy of the images of each class.

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
        """Compute the logits of the true classes, before they are multiplied by `scale`.

        Args:
            cosine: (B,) cosines with the true classes.
            margin: (B,) margins of the true classes.

        Returns:
            (B,) logits / scale.
        """

    def negative_logits(self, cosines: Tensor, true: Tensor, target: Tensor) -> Tensor:
        """Compute the logits of the other classes, before they are multiplied by `scale`.

        Args:
            cosines: (B, S) cosines with the S classes in the softmax.
            true: (B,) cosines with the true classes.
            target: (B,) result of `target` for the true classes.

        Returns:
            (B, S) logits / scale. The values of the true classes are not used.
        """
        return cosines

    def forward(self, descriptors: Tensor, labels: Tensor) -> MarginOutput:
        """Compute the loss of a batch.

        Args:
            descriptors: (B, D) of any norm and any float dtype.
            labels: (B,) int64, classes in 0..classes - 1.

        Returns:
            Loss, cosines and correctness, in float32 (float64 for float64 descriptors).
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
        """Sample the classes in the softmax of a training step (Partial FC, CVPR 2022).

        The sample contains all classes of the batch; the others are drawn uniformly. The number S of sampled classes is
        always max(B, ceil(negatives * classes)), but at most the number of classes, so that all steps take the same
        time. Sampling uses the global random generator of the device of the weights. The logits are not corrected for
        the sampling.

        Args:
            labels: (B,) int64, classes of the batch.

        Returns:
            The sampled classes (S,) int64, all different, and the position (B,) int64 of each label among them.
        """
        classes = len(self.weight)
        count = min(classes, max(len(labels), math.ceil(self.negatives * classes)))
        keys = torch.rand(classes, device=self.weight.device)
        keys[labels] = 2.0  # larger than all random keys, so that the classes of the batch are always in the sample
        sampled = keys.topk(count).indices
        index = sampled.new_empty(classes)
        index[sampled] = torch.arange(count, device=sampled.device)
        return sampled, index[labels]

    def _margins_of(self, labels: Tensor, cosine: Tensor) -> Tensor:
        """Return the margin of the true class of each image.

        Args:
            labels: (B,) int64, true classes.
            cosine: tensor whose dtype and device the result has.

        Returns:
            (B,) margins.
        """
        if self.margins is not None:
            return self.margins[labels].to(cosine.dtype)
        assert self.margin is not None
        return cosine.new_full(labels.shape, self.margin)


class ArcFace(MarginHead):
    """Loss with an additive angular margin (Deng et al., CVPR 2019, eq. 3).

    If theta is the angle between a descriptor and its true class, the logit of this class is cos(theta + margin), times
    the scale. For theta + margin > pi, where this function would increase with theta, it is replaced by
    cos(theta) - margin * sin(margin), so that the logit always decreases with the angle.

    Args:
        dim: dimension D of the descriptors.
        classes: number of classes (landmarks).
        scale: factor by which all cosines are multiplied, such as sqrt(D).
        margin: margin in radians, in 0..pi/2: one for all classes, or a tensor (classes,).
        easy_margin: apply no margin where cos(theta) <= 0, an option in the code of ArcFace's authors. The logit is
            then discontinuous at a right angle, and the margin has no effect on images that are far from their class.
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
    """ArcFace with several centers per class, of which the nearest one is used (Deng et al., ECCV 2020).

    Args:
        dim: dimension D of the descriptors.
        classes: number of classes (landmarks).
        scale: factor by which all cosines are multiplied, such as sqrt(D).
        margin: margin in radians, in 0..pi/2: one for all classes, or a tensor (classes,).
        centers: number of centers per class, >= 1.
        kwargs: other arguments of `ArcFace`.
    """

    def __init__(
        self, dim: int, classes: int, scale: float, margin: float | Tensor, *, centers: int = 3, **kwargs: Any
    ) -> None:
        super().__init__(dim, classes, scale, margin, centers=centers, **kwargs)


class CosFace(MarginHead):
    """Loss with an additive cosine margin (Wang et al., CVPR 2018, eq. 4).

    If theta is the angle between a descriptor and its true class, the logit of this class is cos(theta) - margin, times
    the scale. The constructor takes the arguments of `MarginHead`. `margin` is a difference of cosines.
    """

    def target(self, cosine: Tensor, margin: Tensor) -> Tensor:
        return cosine - margin


class CurricularFace(MarginHead):
    """ArcFace loss in which the weight of hard negatives increases during training (Huang et al., CVPR 2020).

    A negative class is hard if its cosine exceeds that of the true class after the margin is applied. Its logit is then
    cosine * (t + cosine), times the scale. t is the running mean of the cosine with the true class, starting at 0, so
    hard negatives have less weight at the start. t is updated only in training mode, before it is used, and has no
    gradient. Under `torch.distributed`, the update uses the mean over all processes, which must have batches of equal
    size. The constructor takes the arguments of `MarginHead`. `margin` is an angle in radians.

    Attributes:
        t: scalar buffer, the running mean.
        momentum: weight of the old value of t in an update.
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
    """Raise InputError if the kind of head is unknown, or does not support `dynamic_margin` or `easy_margin`."""
    if kind not in HEADS:
        raise InputError(f"head.kind={kind}: expected {one_of(kind, HEADS)}")
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
        dim: dimension D of the descriptors.
        counts: (classes,) integers >= 1, number of images of each class.
        scale: factor by which all cosines are multiplied, such as sqrt(D).
        margin: margin of all classes, in radians; for "cosface", a difference of cosines.
        dynamic_margin: use margins from 0.05 to 0.5 instead of `margin`, larger for classes with fewer images (3rd
            place in Google Landmark Recognition 2020); not with "curricularface".
        easy_margin: apply no margin to images whose cosine with their class is <= 0; only with "arcface".
        centers: number of centers per class, of which the nearest one is used.
        class_weights: weight each image by 1 / log(1 + number of images of its class), scaled to a mean of 1 over all
            images (1st place in Google Landmark Recognition 2020).
        negatives: fraction, in (0, 1], of the classes that are in the softmax of a training step (Partial FC, CVPR
            2022).

    Returns:
        The head. Call it with descriptors (B, D) of any norm and labels (B,) int64 to get a `MarginOutput`.

    Raises:
        InputError: the kind is unknown, the settings contradict each other, or a class has no images.
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
    """Return the mean of the values (B,) of all processes. B must be the same in all processes."""
    mean = values.mean()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(mean)
        mean /= torch.distributed.get_world_size()
    return mean


def dynamic_margins(counts: np.ndarray | Tensor, min_margin: float = 0.05, max_margin: float = 0.5) -> Tensor:
    """Compute a margin for each class from its size, as haqishen did in Google Landmark Recognition 2020 (3rd place).

    The margin is a linear function of n^(-1/4), where n is the number of images of the class. It is `min_margin` for
    the largest class and `max_margin` for the smallest. If all classes have the same size, it is `min_margin`.

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
    """Compute a weight for each class from its size, as psinger did in Google Landmark Recognition 2020 (1st place).

    The weight is proportional to 1 / log(1 + n), where n is the number of images of the class. The weights are scaled
    so that their mean over all images is 1. psinger's code normalizes the weights in each batch instead. The
    weight of an image then depends on the other images in the batch, and the result on the number of processes.

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
    """Convert the numbers of images per class to a tensor (classes,) float64. Raises InputError if one is below 1."""
    values = torch.as_tensor(counts).double()
    if not (values >= 1).all():
        empty = int((values < 1).nonzero()[0])
        raise InputError(f"counts: class {empty} has no images; remove the class")
    return values


# Lower bound of 1 - cos^2, which keeps the gradient of sin = sqrt(1 - cos^2) finite at cos = +-1.
_EPS = 1e-6
# Vectors shorter than this count as zero vectors.
_TINY = 1e-12


def add_angular_margin(cosine: Tensor, margin: Tensor, easy: bool = False) -> Tensor:
    """Add a margin to the angles of cosines.

    Args:
        cosine: (B,) cosines x.
        margin: (B,) margins in radians.
        easy: apply no margin where x <= 0.

    Returns:
        (B,) cos(arccos(x) + margin), or x - margin * sin(margin) where the angle arccos(x) + margin exceeds pi. With
        `easy`, the result is x where x <= 0.
    """
    sine = (1 - cosine.square()).clamp(min=_EPS).sqrt()
    shifted = cosine * margin.cos() - sine * margin.sin()
    if easy:
        return torch.where(cosine > 0, shifted, cosine)
    return torch.where(cosine > -margin.cos(), shifted, cosine - margin * margin.sin())


def class_cosines(x: Tensor, weight: Tensor) -> Tensor:
    """Compute the cosine of each descriptor with the nearest center of each class.

    The cosines of a zero vector are 0 and have no gradient.

    Args:
        x: (B, D) descriptors of any norm.
        weight: (S, K, D) K centers of each class, of any norm.

    Returns:
        (B, S) cosines.
    """
    centers = weight.flatten(0, 1)
    cosines: Tensor = _Cosines.apply(x * _inverse_norms(x), centers)
    if weight.shape[1] == 1:
        return cosines
    return cosines.unflatten(1, weight.shape[:2]).max(dim=2).values


def _inverse_norms(x: Tensor) -> Tensor:
    """Return 1 / norm (n, 1) of each row of x (n, D), 0 for a zero vector."""
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return 1 / norms.masked_fill(norms <= _TINY, math.inf)


class _Cosines(torch.autograd.Function):
    """Compute the cosines (B, N) of unit vectors x (B, D) with the rows of w (N, D), without a normalized copy of w.

    Without this function, autograd would keep a normalized copy of w. w is by far the largest tensor: 5 GB for 203,094
    classes with three centers each. This function allocates only one tensor of the size of w, the gradient of w.
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
            # The cosines do not depend on the norms of the rows of w, so the gradient has no component along a row.
            along = torch.einsum("bn,bn->n", grad, cosines)[:, None] * inverse
            return grad @ w, (grad.T @ x).addcmul_(w, along, value=-1)
