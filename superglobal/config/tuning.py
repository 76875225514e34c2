"""Settings of `scripts/tune_pooling.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from superglobal.config.common import BackboneConfig, PathsConfig, TrainerConfig
from superglobal.config.evaluation import DatasetConfig


@dataclass
class SpaceConfig:
    """What `scripts/tune_pooling.py` chooses from; the paper's value is always among the choices.

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
    """Everything `scripts/tune_pooling.py` takes.

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
