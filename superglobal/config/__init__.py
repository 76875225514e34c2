"""Define typed schemas for all settings, and register them with Hydra.

The schemas give every setting a type, so that Hydra converts `pooling.regional=off` to false. Without a type, the value
would be the string "off", which Python treats as true. Hydra also rejects names that no schema contains.
"""

from __future__ import annotations

import re
import sys

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from superglobal.config.command_line import OLD_SETTINGS, prepare_arguments, validate_arguments
from superglobal.config.common import conf_dir
from superglobal.config.evaluation import CompareConfig, EvalConfig
from superglobal.config.help import Entry, help_text
from superglobal.config.search_page import ServeConfig
from superglobal.config.training import TrainConfig
from superglobal.config.tuning import TuneConfig
from superglobal.models.pooling import PRESETS
from superglobal.reporting.ablations import ABLATIONS

__all__ = ["ENTRIES", "OLD_SETTINGS", "Entry", "conf_dir", "prepare_arguments", "register", "validate_arguments"]

ENTRIES = (
    Entry(
        "eval",
        "eval.py",
        EvalConfig,
        "Evaluate retrieval: extract descriptors, search, rerank and score. With -m, run a sweep and print a table.",
        (
            "python eval.py dataset=roxford5k weights=r50.safetensors",
            "python eval.py -m dataset=roxford5k,rparis6k weights=r50.safetensors 'ablation=glob(*)'",
            "python eval.py experiment=photos dataset.database=photos dataset.query=query.jpg",
        ),
    ),
    Entry(
        "train",
        "train.py",
        TrainConfig,
        "Train a network on landmarks in GLDv2's layout. Run the same command again to resume an interrupted run.",
        (
            "python train.py experiment=r50_gldv2_clean",
            "python train.py experiment=demo optim.epochs=2 name=short",
        ),
    ),
    Entry(
        "tune",
        "superglobal tune",
        TuneConfig,
        "Choose pooling and reranking settings for a trained network on its held-out landmarks or on labeled photos.",
        ("superglobal tune name=demo trials=200",),
    ),
    Entry(
        "compare",
        "superglobal compare-rerankers",
        CompareConfig,
        "Compare rerankers on the same stored descriptors and the same results of the first search.",
        ("superglobal compare-rerankers dataset=toy name=demo 'rerankers=[none,superglobal,mutual]'",),
    ),
    Entry(
        "serve",
        "superglobal serve",
        ServeConfig,
        "Serve a search page in the browser: upload a photo, see the most similar images and the effect of reranking.",
        (
            "superglobal serve experiment=photos dataset.database=photos",
            "superglobal serve store=outputs/stores/...",
        ),
    ),
)
"""Commands that Hydra configures, in the order of the configuration reference."""


def folder_name(text: str) -> str:
    """Shorten a text to 100 bytes, and replace characters that are not safe in a folder name by "-"."""
    return re.sub(r"[^\w.,=+-]+", "-", text).encode()[:100].decode(errors="ignore")


# The configuration of a sweep uses this resolver. A job that a cluster launcher started imports this module, but does
# not call `register`.
OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def register() -> None:
    """Register schemas, help texts, and the options of `pooling=` and `ablation=` with Hydra.

    Call this function before Hydra composes a configuration.
    """
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
        # Generating the help text takes time, so it is generated only for --help.
        text = help_text(entry) if {"--help", "-h"} & set(sys.argv) else ""
        if not sys.argv[0].endswith(("eval.py", "train.py")):
            text = text.replace("python eval.py", "superglobal evaluate").replace(
                "python train.py", "superglobal train"
            )
        # The callback is in this node too, because every command selects it.
        node = {
            "help": {"app_name": entry.name, "header": "", "footer": "", "template": text},
            "callbacks": {"output_folder": {"_target_": "superglobal.cli.hydra_commands.OutputFolder"}},
        }
        store.store(group="hydra/help", name=f"{entry.name}_help", node=node, package="hydra")
