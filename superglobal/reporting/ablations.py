"""Ablations of the method: the modules that each row of the table enables, and the modules of a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODULES = ("gem_plus", "regional", "scale", "relup", "rerank")
"""Modules of the method: four of pooling, and reranking."""
ABLATIONS: dict[str, tuple[bool, ...]] = {
    **{name: tuple(i < count for i in range(len(MODULES))) for count, name in enumerate(("gem", *MODULES))},
    **{f"no_{name}": tuple(module != name for module in MODULES) for name in MODULES},
}
"""Option of `ablation=` -> whether it enables each of `MODULES`.

The options have the order of the paper: first none of the modules, then one more in each row, then all but one.
"""
ABLATION_SETTINGS = (*(f"pooling.{name}" for name in MODULES[:4]), "rerank.enabled", "rerank")
"""Settings in which the rows of an ablation differ."""
States = tuple[bool | str | None, ...]
"""State of each of `MODULES`: True (on), False (off), the name of a variant, or None if unknown."""


def module_states(result: Mapping[str, Any]) -> States:
    """Return the state of each of `MODULES` in a run."""
    if result["ablation"] in ABLATIONS:
        return ABLATIONS[result["ablation"]]
    config = result["config"]
    pooling = result.get("about", {}).get("network", {}).get("pooling", config.get("pooling", {}))
    relup = {"on": True, "auto": True, "off": False}.get(pooling.get("relup"), pooling.get("relup"))
    return (*(pooling.get(name) for name in MODULES[:3]), relup, config.get("rerank", {}).get("enabled"))
