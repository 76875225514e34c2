"""Typed schemas of every setting, registered with Hydra.

With them Hydra reads `pooling.regional=off` as false, not as the text "off", which is true, and rejects unknown names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from hydra.core.config_store import ConfigStore

from superglobal.config.common import conf_dir
from superglobal.config.evaluation import CompareConfig, EvalConfig
from superglobal.config.help import Entry, help_text
from superglobal.config.search_page import ServeConfig
from superglobal.config.training import TrainConfig
from superglobal.config.tuning import TuneConfig
from superglobal.errors import InputError
from superglobal.models.pooling import PRESETS
from superglobal.reporting.ablations import ABLATIONS

__all__ = ["ENTRIES", "OLD_SETTINGS", "Entry", "conf_dir", "register", "reject_old_settings"]

ENTRIES = (
    Entry(
        "eval",
        "eval.py",
        EvalConfig,
        "Evaluate retrieval: extract descriptors, search, rerank, score. With -m, a sweep that ends in a table.",
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
        "Train a network on landmarks in GLDv2's layout. The same command resumes an interrupted training.",
        (
            "python train.py experiment=r50_gldv2_clean",
            "python train.py experiment=quickstart optim.epochs=5 name=short",
        ),
    ),
    Entry(
        "tune",
        "superglobal tune",
        TuneConfig,
        "Choose pooling and reranking for a trained network on its held-out landmarks or on labeled photos.",
        ("superglobal tune name=quickstart trials=200",),
    ),
    Entry(
        "compare",
        "superglobal compare-rerankers",
        CompareConfig,
        "Compare rerankers on the same stored descriptors and the same first search.",
        ("superglobal compare-rerankers dataset=toy name=quickstart 'rerankers=[none,superglobal,mutual]'",),
    ),
    Entry(
        "serve",
        "superglobal serve",
        ServeConfig,
        "Serve a search page: upload a photo and see the results and the effect of reranking.",
        (
            "superglobal serve dataset=folder dataset.database=photos backbone=efficientnet_lite0",
            "superglobal serve store=outputs/stores/...",
        ),
    ),
)
"""The commands that Hydra configures."""

OLD_SETTINGS = {
    "statistics": "use whitening=none, center or pca",
    "statistics.kind": "use whitening.kind",
    "statistics.dims": "use whitening.dims",
    "extraction.part": "use extraction.shard",
    "extraction.compile": "it was removed and had no effect; delete it",
    "pictures.queries": "use figures.queries",
    "pictures.ranks": "use figures.ranks",
    "logger.pictures": "use logger.images",
    "dataset.neighbours": "use dataset.neighbors",
    "data.bad_budget": "use data.max_corrupt_fraction",
    "data.max_corrupt": "use data.max_corrupt_fraction",
    "distractors.skip_budget": "use distractors.max_corrupt_fraction",
    "validation.images": "use validation.max_images",
}
"""Former settings and what replaces them."""


def reject_old_settings(arguments: Iterable[str]) -> None:
    """Raise InputError if a command line contains a setting that was renamed or removed."""
    for argument in arguments:
        name = argument.lstrip("+~").partition("=")[0]
        if name in OLD_SETTINGS:
            raise InputError(f"{argument}: there is no setting {name}; {OLD_SETTINGS[name]}")


def register() -> None:
    """Register schemas, help pages, pooling presets and ablation rows with Hydra, before a command composes."""
    store = ConfigStore.instance()
    for preset, settings in PRESETS.items():
        store.store(group="pooling", name=preset, node=settings)
    for row, (gem_plus, regional, scale, relup, reranked) in ABLATIONS.items():
        pooling = {"gem_plus": gem_plus, "regional": regional, "scale": scale, "relup": "auto" if relup else "off"}
        defaults = [{"override /rerank": "superglobal" if reranked else "none"}]
        node = {"defaults": defaults, "ablation": row, "pooling": pooling}
        store.store(group="ablation", name=row, node=node, package="_global_")
    for entry in ENTRIES:
        store.store(name=f"{entry.name}_schema", node=entry.schema)
        # Only --help needs the text, which takes time to make.
        text = help_text(entry) if {"--help", "-h"} & set(sys.argv) else ""
        if not sys.argv[0].endswith(("eval.py", "train.py")):
            text = text.replace("python eval.py", "superglobal evaluate").replace(
                "python train.py", "superglobal train"
            )
        node = {"app_name": entry.name, "header": "", "footer": "", "template": text}
        store.store(group="hydra/help", name=f"{entry.name}_help", node=node)
