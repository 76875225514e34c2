"""Typed schemas of every setting, registered with Hydra: a wrong type or a typo ends the run with the choices.

Without them Hydra would take `pooling.regional=off` for the string "off", which is true.
"""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from superglobal.config.common import (
    BackboneConfig,
    LoggerConfig,
    PathsConfig,
    PoolingSettings,
    TrainerConfig,
    pooling_overrides,
)
from superglobal.config.evaluation import (
    CompareConfig,
    DatasetConfig,
    DescriptorsConfig,
    DistractorsConfig,
    EvalConfig,
    ExtractionConfig,
    IndexConfig,
    PicturesConfig,
    RerankConfig,
    StatisticsConfig,
    StoreConfig,
    rerank_parameters,
)
from superglobal.config.page import DemoConfig, PageConfig
from superglobal.config.training import DataConfig, FitConfig, HeadConfig, OptimConfig, TrainConfig, ValidationConfig
from superglobal.config.tuning import SpaceConfig, TuneConfig

__all__ = [
    "BackboneConfig",
    "CompareConfig",
    "DataConfig",
    "DatasetConfig",
    "DemoConfig",
    "DescriptorsConfig",
    "DistractorsConfig",
    "EvalConfig",
    "ExtractionConfig",
    "FitConfig",
    "HeadConfig",
    "IndexConfig",
    "LoggerConfig",
    "OptimConfig",
    "PageConfig",
    "PathsConfig",
    "PicturesConfig",
    "PoolingSettings",
    "RerankConfig",
    "SpaceConfig",
    "StatisticsConfig",
    "StoreConfig",
    "TrainConfig",
    "TrainerConfig",
    "TuneConfig",
    "ValidationConfig",
    "pooling_overrides",
    "register",
    "rerank_parameters",
]


def register() -> None:
    """Make the schemas known to Hydra; called by the entry points before composing."""
    ConfigStore.instance().store(name="eval_schema", node=EvalConfig)
    ConfigStore.instance().store(name="compare_schema", node=CompareConfig)
    ConfigStore.instance().store(name="demo_schema", node=DemoConfig)
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    ConfigStore.instance().store(name="tune_schema", node=TuneConfig)
