"""Define the settings that training, evaluation and tuning share, and the validation of all settings."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf

from superglobal.errors import InputError, did_you_mean, in_range, integer_limit
from superglobal.models.pooling import PoolingConfig, make_pooling

C = TypeVar("C")
TRAIN_LISTS = ("train_clean.csv", "train.csv")
"""File names of GLDv2's training lists: the cleaned list and the full list."""
SEEDS = 2**32
"""Number of valid seeds for training runs and data sets. The valid seeds are 0 to SEEDS - 1."""


def conf_dir() -> Path:
    """Return the folder that contains the Hydra configuration files.

    It is `conf/` inside the installed package, or `conf/` at the top level of a checkout.

    Raises:
        InputError: neither folder exists.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "eval.yaml").is_file():
            return folder
    raise InputError(f"{package / 'conf'}: the configurations are missing; reinstall superglobal")


FILE_NAME, RUN_NAME = "a file name that does not begin with a dot", "a relative path without . and .."
"""Kinds of names for `setting`. Names become parts of paths, and must not lead out of the folder of the path."""
_FILE_NAME = re.compile(r'(?!\.)[^/\\:*?"<>|\x00-\x1f]+')
_MAX_NAME = 200  # maximum number of bytes of a name; file systems allow 255, and file names contain further parts


def setting(
    default: Any,
    *,
    minimum: float | None = None,
    maximum: float = math.inf,
    choices: Iterable[Any] = (),
    name: str | None = None,
) -> Any:
    """Declare a dataclass field and the values that it allows.

    `validate_values` checks the value of the field. `--help` and the configuration reference show the allowed values.

    Args:
        default: default value of the setting.
        minimum: smallest allowed number; for a list, the limit applies to every element. None for no limits.
        maximum: largest allowed number; for a list, the limit applies to every element. `maximum` requires `minimum`.
        choices: allowed values; for a list, the allowed elements. Empty for no choices.
        name: `FILE_NAME` or `RUN_NAME` if the setting is a name in a path; None otherwise.

    Returns:
        A `dataclasses.field` whose metadata contains the choices, the range or the kind of name.
    """
    if name is not None:
        return field(default=default, metadata={"name": name})
    limits = {"choices": tuple(choices)} if minimum is None else {"minimum": minimum, "maximum": maximum}
    return field(default=default, metadata=limits)


def allowed_values(declared: Field[Any]) -> str:
    """Return a text that describes the allowed values of a field, such as "an integer >= 1".

    Args:
        declared: dataclass field, declared with `setting`.

    Returns:
        The text; empty if every value is allowed.
    """
    if declared.metadata.get("choices"):
        return f"one of {', '.join(map(str, declared.metadata['choices']))}"
    if "minimum" not in declared.metadata:
        return str(declared.metadata.get("name", ""))
    kind = "a number" if "float" in str(declared.type) else "an integer"
    return range_text(kind, declared.metadata["minimum"], declared.metadata["maximum"])


def range_text(kind: str, minimum: float, maximum: float = math.inf) -> str:
    """Return a range as text, such as "a number from 0 to 1".

    Args:
        kind: type of the values with its article, such as "a number".
        minimum: smallest value.
        maximum: largest value; infinity for no upper limit.
    """
    low, high = (f"{limit:.6g}" if isinstance(limit, float) else str(limit) for limit in (minimum, maximum))
    return f"{kind} from {low} to {high}" if math.isfinite(maximum) else f"{kind} >= {low}"


def validate_values(config: Any, prefix: str = "") -> None:
    """Check that all fields of a dataclass object, including nested dataclasses, have values that `setting` allows.

    Args:
        config: dataclass object; fields that are None are not checked.
        prefix: text to put before the field names in error messages, such as "optim.".

    Raises:
        InputError: a value is not one of the choices, is out of range, infinite or NaN, or is not a valid name.
    """
    for declared in fields(config):
        value, limits = getattr(config, declared.name), declared.metadata
        if is_dataclass(value):
            validate_values(value, f"{prefix}{declared.name}.")
            continue
        for element in value if isinstance(value, list) else [] if value is None else [value]:
            valid = not limits.get("choices") or element in limits["choices"]
            if "minimum" in limits:
                valid = in_range(element, limits["minimum"], limits["maximum"])
            if not valid:
                limit = integer_limit(element, limits.get("maximum", 0))
                hint = did_you_mean(str(element), map(str, limits.get("choices", ())))
                raise InputError(f"{prefix}{declared.name}={element}: expected {allowed_values(declared)}{limit}{hint}")
            if "name" in limits:
                validate_name(f"{prefix}{declared.name}", element, limits["name"])


def validate_name(setting: str, value: str, kind: str) -> None:
    """Check that a name can be a part of a path, and does not lead out of the folder.

    Args:
        setting: setting that contains the name, for the error message.
        value: the name.
        kind: `FILE_NAME`, or `RUN_NAME` for several file names that are joined by slashes.

    Raises:
        InputError: the name is empty, too long, begins with a dot, or contains characters that some file systems lack.
    """
    parts = value.split("/") if kind == RUN_NAME else [value]
    if not all(_FILE_NAME.fullmatch(part) and len(part.encode()) <= _MAX_NAME for part in parts):
        raise InputError(f"{setting}={value}: expected {kind}")


def validate_config(cfg: DictConfig, schema: type[C]) -> C:
    """Convert a configuration that Hydra composed to typed objects, and validate it.

    A setting that is null or "auto" is replaced by its final value if other settings determine this value.

    Args:
        cfg: configuration composed by Hydra.
        schema: dataclass that describes the configuration, such as `EvalConfig`; it must have a method `validate`.

    Returns:
        The validated configuration as an object of `schema`.

    Raises:
        InputError: a setting is missing, is not allowed, or contradicts another setting.
    """
    missing = sorted(str(key) for key in OmegaConf.missing_keys(cfg))
    if missing:
        raise InputError(f"missing settings: {', '.join(missing)}; add them to the command line, e.g. {missing[0]}=...")
    config: Any = OmegaConf.to_object(cfg)
    assert isinstance(config, schema)
    validate_values(config)
    config.validate()  # type: ignore[attr-defined]
    return config


def _overrides(self: Any) -> dict[str, Any]:
    """Return the pooling settings that are not null: name -> value. This is the method `PoolingOverrides.overrides`."""
    return {name: value for name, value in vars(self).items() if value is not None and name != "tuned_on"}


def _validate_pooling(self: Any) -> None:
    """Raise InputError if a pooling setting is invalid or contradicts another one.

    This is the method `PoolingOverrides.validate`.
    """
    make_pooling(self.overrides())


_POOLING = """Pooling (`conf/pooling`). A setting replaces the one in the weights file; null keeps the one in the file.

Args:
    tuned_on: name of the image set on which `superglobal tune` chose the settings. It is shown with every result, but
        does not affect the scores.
"""
PoolingOverrides: Any = make_dataclass(
    "PoolingOverrides",
    [
        *((name, hint if hint is Any else hint | None, None) for name, hint in get_type_hints(PoolingConfig).items()),
        ("tuned_on", str | None, None),
    ],
    namespace={"__doc__": _POOLING, "overrides": _overrides, "validate": _validate_pooling},
)


@dataclass
class BackboneConfig:
    """Backbone (`conf/backbone`), which is a timm model.

    Args:
        name: name of the model in timm.
        weights: weights to load if the top-level setting `weights` is null.
    """

    name: str = MISSING
    weights: str | None = None


@dataclass
class TrainerConfig:
    """Devices and processes (`conf/trainer`); the names are those of Lightning's Trainer.

    Args:
        accelerator: type of device: "auto" (a GPU if there is one), "cpu" or "gpu".
        devices: number of devices, or a list of their indices.
        strategy: method of distributing the work: "auto", or "ddp" for several devices.
        num_workers: number of processes per device that decode images.
        progress: show progress bars.
    """

    accelerator: str = "auto"
    devices: Any = 1
    strategy: str = "auto"
    num_workers: int = setting(2, minimum=0)
    progress: bool = True


@dataclass
class LoggerConfig:
    """Loggers (`conf/logger`) that are used in addition to the CSV files, which are always written.

    Args:
        wandb: log to Weights & Biases. Without an API key the run stays offline, unless WANDB_MODE is set. null logs
            evaluations of all sets except images of your own (dataset=folder).
        tensorboard: write TensorBoard event files into the folder of the run.
        project: project of the run in Weights & Biases.
        entity: user or team of the run in Weights & Biases; null for your default.
        tags: tags of the run in Weights & Biases; the names of the data set and of the ablation are added to them.
        images: number of queries for which an evaluation logs the images of the top `figures.ranks` results. The
            queries are spread evenly over the list of all queries.
    """

    wandb: bool | None = True
    tensorboard: bool = False
    project: str = "superglobal"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)
    images: int = setting(8, minimum=0)

    def validate(self, own_images: bool = False) -> None:
        """Replace `wandb` by its final value if it is null.

        Args:
            own_images: whether the run evaluates images of your own, which are logged only on request.

        Raises:
            InputError: logging to TensorBoard is enabled but TensorBoard is not installed.
        """
        self.wandb = not own_images if self.wandb is None else self.wandb
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise InputError(
                "logger.tensorboard=true: TensorBoard is not installed; run `pip install tensorboard`, or use "
                "logger=csv"
            )


def require_wandb(logger: LoggerConfig) -> None:
    """Raise InputError if logging to Weights & Biases is enabled but the package wandb is not installed.

    This check is not part of `LoggerConfig.validate`, because other commands validate the configuration of a finished
    run again, and do not need wandb for that. Call this function only before a run that logs.
    """
    if logger.wandb and importlib.util.find_spec("wandb") is None:
        raise InputError(
            "logger.wandb=true: the package wandb is not installed; run `pip install wandb`, or use logger=csv"
        )


@dataclass
class PathsConfig:
    """Folders (`conf/paths`).

    Args:
        data: folder of the data sets.
        outputs: folder of the results and training runs.
        stores: folder of the stored descriptors and search indexes, which later runs reuse.
    """

    data: str = "data"
    outputs: str = "outputs"
    stores: str = "${paths.outputs}/stores"
