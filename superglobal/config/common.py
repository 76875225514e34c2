"""What training, evaluation and tuning have in common."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import MISSING

from superglobal.errors import InputError
from superglobal.models.pooling import PoolingConfig

_POOLING = """`PoolingConfig` (`conf/pooling`) with every setting optional: null is what the weights file says.

Args:
    tuned_on: on which photos the settings were chosen (written by superglobal tune); it changes no number.
"""
PoolingSettings: Any = make_dataclass(
    "PoolingSettings",
    [
        *((name, Any if hint is Any else hint | None, None) for name, hint in get_type_hints(PoolingConfig).items()),
        ("tuned_on", str | None, None),
    ],
    namespace={"__doc__": _POOLING},
)


@dataclass
class BackboneConfig:
    """A timm model (`conf/backbone`).

    Args:
        name: timm's.
        weights: what it takes when `weights` is not given.
    """

    name: str = MISSING
    weights: str | None = None


@dataclass
class TrainerConfig:
    """Where it runs (`conf/trainer`), in Lightning's terms.

    Args:
        accelerator: "auto" (a GPU where there is one), "cpu", "gpu".
        devices: how many, or a list of indices.
        strategy: "auto", or "ddp" for several devices.
        num_workers: processes per device that decode photos.
        progress: show how far it is.
    """

    accelerator: str = "auto"
    devices: Any = 1
    strategy: str = "auto"
    num_workers: int = 2
    progress: bool = True


@dataclass
class LoggerConfig:
    """Trackers beside the CSV, which is always written (`conf/logger`).

    Args:
        wandb: Weights & Biases: offline without a key, unless WANDB_MODE says otherwise, and never a question.
        tensorboard: event files in the run's folder.
        project, entity, tags: of W&B; the names of the data set and of the ablation's row are tags, too.
        images: queries that an evaluation shows with their first results (`figures.ranks`), evenly from the list;
            0 for none.
    """

    wandb: bool = True
    tensorboard: bool = False
    project: str = "superglobal"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)
    images: int = 8


@dataclass
class PathsConfig:
    """Folders (`conf/paths`).

    Args:
        data: of the data sets.
        outputs: of results and trainings.
        stores: of descriptors and indexes, for use again.
    """

    data: str = "data"
    outputs: str = "outputs"
    stores: str = "${paths.outputs}/stores"


def pooling_overrides(settings: Any) -> dict[str, Any]:
    """The pooling settings that were given."""
    return {name: value for name, value in vars(settings).items() if value is not None and name != "tuned_on"}


def conf_dir() -> Path:
    """Return the folder of the Hydra configurations: the installed one, or `conf/` of the checkout.

    Raises:
        InputError: neither exists.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "eval.yaml").is_file():
            return folder
    raise InputError(f"{package / 'conf'}: the configurations are missing; reinstall superglobal")


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


def check_logger(logger: LoggerConfig) -> None:
    """Raise InputError for a tracker that is not installed."""
    require_within({"logger.images": (logger.images, 0, math.inf)})
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
