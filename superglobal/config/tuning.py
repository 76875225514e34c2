"""Settings of `superglobal tune`."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field
from typing import Any

from superglobal.config.common import BackboneConfig, PathsConfig, TrainerConfig, require_choice, require_within
from superglobal.config.evaluation import DatasetConfig, check_dataset
from superglobal.errors import InputError


@dataclass
class SpaceConfig:
    """What `superglobal tune` chooses from; the paper's value is always among the choices.

    Each window needs no maps of its own, each list of scales some, each alpha all of them once more.

    Args:
        windows: of RegionalGeM, odd, in cells; 1 is off.
        scales: 1, 3 or 5 of them.
        relup_alphas: floors of ReLUP, 0 is off; only off where the backbone has no place for it.
        rerank: whether M, K and beta are searched too; false searches and scores without reranking.
    """

    windows: list[int] = field(default_factory=lambda: [1, 3, 5, 7])
    scales: list[int] = field(default_factory=lambda: [1, 3, 5])
    relup_alphas: list[float] = field(default_factory=lambda: [0.0, 0.007, 0.014, 0.028])
    rerank: bool = True


@dataclass
class TuneConfig:
    """Everything `superglobal tune` takes.

    Args:
        name: of the tuning, and by default of the training whose network is tuned.
        run: folder of that training: its export, and what it held out.
        data_root: where the training's photos are, if no longer where they were; folder of its list.
        dataset: validation set in place of the held-out landmarks (`conf/dataset`).
        allow_test: tune on a set whose role is "test"; everything made with the result is marked so.
        backbone, weights, antialias: as in `EvalConfig`; without weights the export of `run`.
        space: what is chosen from.
        trials: settings tried in all, the paper's among them.
        max_images: most photos of the validation set, in whole landmarks drawn by `seed`.
        seed: of the draw, the halves, the search, the bootstrap and of random weights.
    """

    name: str = "superglobal"
    run: str = "${paths.outputs}/train/${name}"
    data_root: str | None = None
    dataset: DatasetConfig | None = None
    allow_test: bool = False
    backbone: BackboneConfig | None = None
    weights: str | None = None
    antialias: bool | None = None
    space: SpaceConfig = field(default_factory=SpaceConfig)
    trials: int = 100
    max_images: int = 400
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    seed: int = 0


_BENCHMARKS = ("roxford5k", "rparis6k", "gldv2_test")


def check_tuning(config: TuneConfig) -> None:
    """Raise InputError for what `superglobal tune` could not or must not do as told."""
    d, space = config.dataset, config.space
    if d is not None:
        check_dataset(d)
        _check_tuned_set(d, config.allow_test)
    if importlib.util.find_spec("optuna") is None:
        raise InputError("tuning searches with Optuna, which is not installed: pip install optuna")
    for count in space.scales:
        require_choice("space.scales", str(count), ["1", "3", "5"])
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
