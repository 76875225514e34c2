"""Define the settings of `superglobal tune`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

from superglobal.config.common import RUN_NAME, SEEDS, BackboneConfig, PathsConfig, TrainerConfig, setting
from superglobal.config.evaluation import DatasetConfig
from superglobal.errors import InputError

_BENCHMARKS = ("roxford5k", "rparis6k", "gldv2_test")


@dataclass
class SpaceConfig:
    """Search space of `superglobal tune`; the settings of the paper are always tried, too.

    Feature maps are extracted once and reused for all trials. More image scales require additional feature maps, and
    each value in `relup_alphas` requires a separate set of feature maps at all scales. All values in `windows` use the
    same feature maps.

    Args:
        windows: window sizes of Regional-GeM to try, in cells of the feature map; 1 turns Regional-GeM off.
        scales: numbers of image scales to try.
        relup_alphas: lower bounds of ReLUP to try; 0 turns ReLUP off. Backbones that do not support ReLUP ignore them.
        rerank: also tune the reranking parameters M, K and beta; false tunes the pooling without reranking.
    """

    windows: list[int] = field(default_factory=lambda: [1, 3, 5, 7], metadata={"choices": (1, 3, 5, 7, 9, 11)})
    scales: list[int] = field(default_factory=lambda: [1, 3, 5], metadata={"choices": (1, 3, 5)})
    relup_alphas: list[float] = field(
        default_factory=lambda: [0.0, 0.007, 0.014, 0.028], metadata={"minimum": 0, "maximum": 1}
    )
    rerank: bool = True


@dataclass
class TuneConfig:
    """Top-level settings of `superglobal tune`.

    Args:
        name: name of the tuning run, and by default of the training run whose network is tuned.
        run: folder of the training run, which contains the exported weights and the record of the held-out landmarks.
        data_root: folder of the training list, if it was moved after training; null for the folder that the training
            run recorded.
        dataset: validation set used instead of the held-out landmarks (`conf/dataset`); null for the held-out
            landmarks.
        allow_test: allow tuning on a set whose role is "test"; all results with the tuned settings are marked as such.
        backbone: backbone of the network (`conf/backbone`); null for the backbone of the weights.
        weights: weights of the network, as for `eval.py`; null for the exported weights of `run`.
        antialias: apply an antialiasing filter when a scale shrinks the image, as for `eval.py`.
        space: search space.
        trials: number of combinations of settings to try, including the paper's.
        max_images: maximum number of validation images; landmarks are chosen at random, each with all of its images.
        seed: seed for choosing landmarks, splitting them into two halves, the search, the bootstrap and random weights.
    """

    name: str = setting("superglobal", name=RUN_NAME)
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
        """Raise InputError if settings must not be chosen on the data set, or if Optuna is not installed."""
        if self.dataset is not None:
            self.dataset.validate()
            _validate_tuning_set(self.dataset, self.allow_test)
        if importlib.util.find_spec("optuna") is None:
            raise InputError("superglobal tune: Optuna is not installed; run `pip install optuna`")


def _validate_tuning_set(d: DatasetConfig, allow_test: bool) -> None:
    """Raise InputError if the data set cannot be used to choose settings, or must not be used for this purpose.

    Args:
        d: data set to tune on.
        allow_test: allow data sets whose role is "test".
    """
    if d.kind == "descriptors":
        raise InputError("dataset=descriptors: tuning needs images to compute feature maps; use another dataset=")
    if d.kind == "folder" and not d.labels:
        raise InputError(
            "dataset=folder: tuning needs ground truth; add dataset.labels=true and use one sub-folder per landmark"
        )
    if d.kind == "gldv2_recognition":
        raise InputError(
            f"dataset={d.name}: tuning needs an average precision per query, which recognition sets do not have; use a "
            "retrieval set"
        )
    if d.role == "train":
        raise InputError(
            f"dataset.role=train: settings chosen on the training images of {d.name} do not generalize to other "
            "images; use a validation set"
        )
    if d.name in _BENCHMARKS and d.role != "test":
        raise InputError(f"dataset.role={d.role}: {d.name} is a benchmark, so expected dataset.role=test")
    if d.role == "test" and not allow_test:
        raise InputError(
            f"dataset={d.name}: expected a validation set, but the role of this set is test. Results on a test set are "
            "too optimistic if settings were chosen on it. Tune on the held-out landmarks of a training run (name=RUN "
            "without dataset=) or on your own photos (dataset=folder dataset.labels=true). To tune on the test set "
            "anyway, add allow_test=true; every result will be marked accordingly"
        )
