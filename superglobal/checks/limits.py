"""One setting at a time: a choice, a range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from superglobal.errors import InputError

TABLES = ("train_clean.csv", "train.csv")
"""GLDv2's training lists."""


def require_choice(key: str, value: str, allowed: Sequence[str]) -> None:
    """Raise InputError for a value that is none of those allowed."""
    if value not in allowed:
        raise InputError(f"{key}={value}: expected one of {', '.join(allowed)}")


def require_within(limits: Mapping[str, tuple[Any, float, float]]) -> None:
    """Raise InputError for a number, unless it is None, that is not between its limits, both included, or NaN."""
    for key, (value, least, most) in limits.items():
        if value is not None and not value >= least:
            raise InputError(f"{key}={value}: expected at least {least:g}")
        if value is not None and not value <= most:
            raise InputError(f"{key}={value}: expected at most {most:g}")
