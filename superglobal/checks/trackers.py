"""Settings of the trackers, of trainings and evaluations alike."""

from __future__ import annotations

import importlib.util
import math

from superglobal.checks.limits import require_within
from superglobal.config import LoggerConfig
from superglobal.errors import InputError


def check_logger(logger: LoggerConfig) -> None:
    """Raise InputError for a tracker that is not installed."""
    require_within({"logger.pictures": (logger.pictures, 0, math.inf)})
    if logger.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise InputError(
            "logger.tensorboard=true: TensorBoard is not installed; pip install -e '.[tensorboard]', or logger=csv"
        )


def require_wandb(logger: LoggerConfig) -> None:
    """Raise InputError if W&B is enabled and not installed.

    Only runs that log to W&B call this: a finished run opens without it.
    """
    if logger.wandb and importlib.util.find_spec("wandb") is None:
        raise InputError("logger.wandb=true: the package wandb is not installed; pip install wandb, or use logger=csv")
