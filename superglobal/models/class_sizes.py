"""What a margin head makes of how many photos a class has: margins, and weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from superglobal.errors import InputError


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
