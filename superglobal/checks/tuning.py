"""Settings of a search for the pooling, and on which photos it may be."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

from superglobal.checks.evaluation import check_dataset
from superglobal.checks.limits import require_choice, require_within
from superglobal.config import DatasetConfig, TuneConfig
from superglobal.errors import InputError
from superglobal.models.network import SCALES

_BENCHMARKS = ("roxford5k", "rparis6k", "gldv2_test")


def check_tuning(config: TuneConfig) -> None:
    """Raise InputError for what `tune_pooling.py` could not or must not do as told."""
    d, space = config.dataset, config.space
    if d is not None:
        check_dataset(d)
        _check_tuned_set(d, config.allow_test)
    if importlib.util.find_spec("optuna") is None:
        raise InputError("tuning searches with Optuna, which is not installed: pip install optuna")
    for count in space.scales:
        require_choice("space.scales", str(count), [str(n) for n in SCALES])
    for window in space.windows:
        require_choice("space.windows", str(window), ["1", "3", "5", "7", "9", "11"])
    limits: dict[str, tuple[Any, float, float]] = {
        "trials": (config.trials, 1, math.inf),
        "max_images": (config.max_images, 8, math.inf),
        "trainer.num_workers": (config.trainer.num_workers, 0, math.inf),
        "seed": (config.seed, 0, 2**32 - 1),
    }
    limits |= {f"space.relup_alphas[{i}]": (alpha, 0, 1) for i, alpha in enumerate(space.relup_alphas)}
    require_within(limits)


def _check_tuned_set(d: DatasetConfig, allow_test: bool) -> None:
    """Nobody chooses settings on the set that is reported, by accident."""
    if d.kind == "descriptors":
        raise InputError("dataset=descriptors: the pooling is tuned on feature maps, so photos are needed")
    if d.kind == "folder" and not d.labels:
        raise InputError(
            "dataset=folder: tuning needs to know what is right: dataset.labels=true, a sub-folder a place"
        )
    if d.kind == "gldv2_recognition":
        raise InputError(f"{d.name}: pooling is tuned by average precision per query, which recognition does not have")
    if d.role == "train":
        raise InputError(
            f"{d.name}: its role is train, and settings chosen on photos that the network saw fit no others"
        )
    if d.name in _BENCHMARKS and d.role != "test":
        raise InputError(f"dataset.role={d.role}: {d.name} is what others report their numbers on; its role is test")
    if d.role == "test" and not allow_test:
        raise InputError(
            f"{d.name}: its role is test. Tuning on a test set makes its numbers worthless, for these settings were "
            "then chosen to make them high. Tune on a training's held-out landmarks (name=RUN without dataset=) or on "
            "photos of your own (dataset=folder dataset.labels=true); allow_test=true does it all the same, and marks "
            "every result"
        )
