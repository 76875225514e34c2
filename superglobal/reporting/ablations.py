"""Define the rows of the ablation table, and determine which modules of the method a finished run used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODULES = ("gem_plus", "regional", "scale", "relup", "rerank")
"""Modules of SuperGlobal: four pooling modules, and reranking."""
ABLATIONS: dict[str, tuple[bool, ...]] = {
    **{name: tuple(i < count for i in range(len(MODULES))) for count, name in enumerate(("gem", *MODULES))},
    **{f"no_{name}": tuple(module != name for module in MODULES) for name in MODULES},
}
"""Name of a row of the ablation table -> for each of `MODULES`, True if the row turns the module on.

The names are the options of `ablation=`. The rows have the order of the paper: first the row without modules, then rows
with one more module each, and then rows with all modules but one.
"""
ABLATION_SETTINGS = (*(f"pooling.{name}" for name in MODULES[:4]), "rerank.enabled", "rerank")
"""Settings in which the rows of the ablation table differ."""
States = tuple[bool | str | None, ...]
"""State of each of `MODULES`: True (on), False (off), the name of a variant of the module, or None if unknown."""


def module_states(result: Mapping[str, Any]) -> States:
    """Return the state of each of `MODULES` in a run.

    Args:
        result: content of the run's `results.json`.
    """
    config = result["config"]
    pooling = result.get("about", {}).get("network", {}).get("pooling", config.get("pooling", {}))
    if result["ablation"] in ABLATIONS:
        *modules, relup, reranked = ABLATIONS[result["ablation"]]
        # A row with ReLUP sets `pooling.relup` to "auto". A network without plain ReLUs then runs without ReLUP, so the
        # state is off.
        return (*modules, relup and pooling.get("relup") != "off", reranked)
    relup = {"on": True, "auto": True, "off": False}.get(pooling.get("relup"), pooling.get("relup"))
    return (*(pooling.get(name) for name in MODULES[:3]), relup, config.get("rerank", {}).get("enabled"))
