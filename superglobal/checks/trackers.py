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
