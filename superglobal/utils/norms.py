"""Check that descriptors are unit vectors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from superglobal.errors import InputError

_UNIT_TOLERANCE = 1e-3


def is_unit(norms: np.ndarray) -> np.ndarray:
    """Return a bool mask that is true for norms that differ from 1 by at most 1e-3, and false for NaN.

    The tolerance allows for the rounding of unit vectors to float16.
    """
    return np.abs(norms - 1) <= _UNIT_TOLERANCE


def norm_fault(norm: float) -> str:
    """Return the text that ends an error message about a descriptor with an invalid norm: the problem and the fix."""
    if not np.isfinite(norm):
        return "has NaN or infinite values; extract it again"
    if norm < 1e-6:
        return "is a zero vector, which has no direction; extract it again or remove it"
    return f"has norm {norm:.6g}, expected 1; normalize first: x / np.linalg.norm(x, axis=1, keepdims=True)"


def network_norms(descriptors: np.ndarray, name: Callable[[int], str]) -> np.ndarray:
    """Validate descriptors that a network has computed, and return their L2 norms, (n,) float64.

    Args:
        descriptors: (n, D).
        name: function that returns the name of the image with the given index, for the message.

    Raises:
        InputError: a descriptor is not a unit vector.
    """
    norms = np.linalg.norm(descriptors.astype(np.float64), axis=1)
    for i in np.flatnonzero(~is_unit(norms)).tolist():
        fault = f"has norm {norms[i]:g}, expected 1" if np.isfinite(norms[i]) else "has NaN or infinite values"
        raise InputError(
            f"{name(i)}: the network's descriptor {fault}; its weights or pooling settings are unusable, for example "
            "because its training diverged (lower optim.lr)"
        )
    return norms
