"""Settings of `superglobal tune`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

from superglobal.config.common import SEEDS, BackboneConfig, PathsConfig, TrainerConfig, setting
from superglobal.config.evaluation import DatasetConfig
from superglobal.errors import InputError

_BENCHMARKS = ("roxford5k", "rparis6k", "gldv2_test")


@dataclass
class SpaceConfig:
    """Search space of `superglobal tune`; the paper's value is always among the choices.

    Windows need no feature maps of their own. Each list of scales needs some, and each alpha all of them once more.

    Args:
        windows: of RegionalGeM, in cells; 1 switches it off.
        scales: numbers of scales.
        relup_alphas: lower bounds of ReLUP; 0 switches it off, as for backbones that do not support it.
        rerank: search M, K and beta, too; false searches and scores without reranking.
    """

    windows: list[int] = field(default_factory=lambda: [1, 3, 5, 7], metadata={"choices": (1, 3, 5, 7, 9, 11)})
    scales: list[int] = field(default_factory=lambda: [1, 3, 5], metadata={"choices": (1, 3, 5)})
    relup_alphas: list[float] = field(
        default_factory=lambda: [0.0, 0.007, 0.014, 0.028], metadata={"minimum": 0, "maximum": 1}
    )
    rerank: bool = True


@dataclass
class TuneConfig:
    """Everything `superglobal tune` takes.

    Args:
        name: name of the tuning, and by default of the training run whose network is tuned.
        run: folder of that run, which has its export and its held-out landmarks.
        data_root: folder of the training list, if the images have moved since the training.
        dataset: validation set in place of the held-out landmarks (`conf/dataset`).
        allow_test: tune on a set whose role is "test"; all results with these settings are marked.
        backbone, weights, antialias: as in `EvalConfig`; without weights, the export of `run`.
        space: search space.
        trials: number of settings that are tried, including the paper's.
        max_images: maximum number of validation images, in whole landmarks drawn by `seed`.
        seed: of the draw, the halves, the search, the bootstrap and random weights.
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
    trials: int = setting(100, minimum=1)
    max_images: int = setting(400, minimum=8)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    seed: int = setting(0, minimum=0, maximum=SEEDS - 1)

    def validate(self) -> None:
        """Raise InputError for a set that settings cannot or must not be chosen on, or if Optuna is not installed."""
        if self.dataset is not None:
            self.dataset.validate()
            _validate_tuning_set(self.dataset, self.allow_test)
        if importlib.util.find_spec("optuna") is None:
            raise InputError("superglobal tune: Optuna is not installed; pip install optuna")


def _validate_tuning_set(d: DatasetConfig, allow_test: bool) -> None:
    if d.kind == "descriptors":
        raise InputError("dataset=descriptors: pooling is tuned on feature maps, which need images")
    if d.kind == "folder" and not d.labels:
        raise InputError(
            "dataset=folder: tuning needs ground truth; use dataset.labels=true, with one sub-folder per landmark"
        )
    if d.kind == "gldv2_recognition":
        raise InputError(f"{d.name}: tuning needs average precision per query, which recognition does not have")
    if d.role == "train":
        raise InputError(f"dataset.role=train: {d.name}: settings chosen on training images do not fit other images")
    if d.name in _BENCHMARKS and d.role != "test":
        raise InputError(f"dataset.role={d.role}: {d.name} is a benchmark; its role is test")
    if d.role == "test" and not allow_test:
        raise InputError(
            f"{d.name}: its role is test. Settings that are chosen on a test set make its numbers worthless. Tune on "
            "the held-out landmarks of a training (name=RUN without dataset=) or on your own photos (dataset=folder "
            "dataset.labels=true). allow_test=true tunes on it all the same, and marks every result"
        )
