"""Typed schemas of every setting, registered with Hydra: a wrong type or a typo ends the run with the choices.

Without them Hydra would take `pooling.regional=off` for the string "off", which is true.
"""

from __future__ import annotations

import sys

from hydra.core.config_store import ConfigStore

from superglobal.config.common import (
    BackboneConfig,
    LoggerConfig,
    PathsConfig,
    PoolingSettings,
    TrainerConfig,
    conf_dir,
    pooling_overrides,
)
from superglobal.config.evaluation import (
    CompareConfig,
    DatasetConfig,
    DescriptorsConfig,
    DistractorsConfig,
    EvalConfig,
    ExtractionConfig,
    FiguresConfig,
    IndexConfig,
    RerankConfig,
    StoreConfig,
    WhiteningConfig,
    rerank_parameters,
)
from superglobal.config.help import Entry, help_text
from superglobal.config.page import DemoConfig, PageConfig
from superglobal.config.training import DataConfig, FitConfig, HeadConfig, OptimConfig, TrainConfig, ValidationConfig
from superglobal.config.tuning import SpaceConfig, TuneConfig
from superglobal.reporting.runs import ABLATIONS, MODULES

ENTRIES = (
    Entry(
        "eval",
        "eval.py",
        EvalConfig,
        "Evaluate retrieval: describe images, search, rerank, score. One run, or with -m a sweep that ends in a table.",
        (
            "python eval.py dataset=roxford5k weights=r50.safetensors",
            "python eval.py -m dataset=roxford5k,rparis6k weights=r50.safetensors 'ablation=glob(*)'",
            "python eval.py dataset=folder dataset.database=photos dataset.query=query.jpg backbone=efficientnet_lite0",
        ),
    ),
    Entry(
        "train",
        "train.py",
        TrainConfig,
        "Train a network on landmarks in GLDv2's layout. The same command goes on where an interrupted one was.",
        (
            "python train.py experiment=r50_gldv2_clean",
            "python train.py experiment=quickstart optim.epochs=5 name=short",
        ),
    ),
    Entry(
        "tune",
        "superglobal tune",
        TuneConfig,
        "Choose pooling and reranking for a trained network, on what its training held out or on labelled photos.",
        ("superglobal tune name=quickstart trials=200",),
    ),
    Entry(
        "compare",
        "superglobal compare-rerankers",
        CompareConfig,
        "Compare rerankings on one set of stored descriptors and one first search.",
        ("superglobal compare-rerankers dataset=toy name=quickstart 'rerankers=[none,superglobal,mutual]'",),
    ),
    Entry(
        "demo",
        "superglobal serve",
        DemoConfig,
        "A page that searches: upload a photo, see what is found and what reranking moves.",
        (
            "superglobal serve dataset=folder dataset.database=photos backbone=efficientnet_lite0",
            "superglobal serve store=outputs/stores/...",
        ),
    ),
)
"""Everything that Hydra configures."""

__all__ = [
    "ENTRIES",
    "BackboneConfig",
    "CompareConfig",
    "DataConfig",
    "DatasetConfig",
    "DemoConfig",
    "DescriptorsConfig",
    "DistractorsConfig",
    "EvalConfig",
    "ExtractionConfig",
    "FiguresConfig",
    "FitConfig",
    "HeadConfig",
    "IndexConfig",
    "LoggerConfig",
    "OptimConfig",
    "PageConfig",
    "PathsConfig",
    "PoolingSettings",
    "RerankConfig",
    "SpaceConfig",
    "StoreConfig",
    "TrainConfig",
    "TrainerConfig",
    "TuneConfig",
    "ValidationConfig",
    "WhiteningConfig",
    "conf_dir",
    "pooling_overrides",
    "register",
    "rerank_parameters",
]


def register() -> None:
    """Make the schemas and the help known to Hydra; called by the entry points before composing."""
    for entry in ENTRIES:
        ConfigStore.instance().store(name=f"{entry.name}_schema", node=entry.schema)
        # A page of words that --help alone needs.
        words = help_text(entry) if {"--help", "-h"} & set(sys.argv) else ""
        node = {"app_name": entry.name, "header": "", "footer": "", "template": words}
        ConfigStore.instance().store(group="hydra/help", name=f"{entry.name}_help", node=node)
    for name, states in ABLATIONS.items():
        on = dict(zip(MODULES, states, strict=True))
        rerank = "superglobal" if on.pop("rerank") else "none"
        pooling = {**on, "relup": "auto" if on["relup"] else "off"}
        options = {"defaults": [{"override /rerank": rerank}], "ablation": name, "pooling": pooling}
        ConfigStore.instance().store(group="ablation", name=name, package="_global_", node=options)
