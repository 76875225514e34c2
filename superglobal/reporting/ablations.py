"""The ablations of the method: which modules each row of the table enables, and which a finished run had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODULES = ("gem_plus", "regional", "scale", "relup", "rerank")
"""The modules of the method: four of pooling, and reranking."""
ABLATIONS: dict[str, tuple[bool, ...]] = {
    **{name: tuple(i < count for i in range(len(MODULES))) for count, name in enumerate(("gem", *MODULES))},
    **{f"no_{name}": tuple(module != name for module in MODULES) for name in MODULES},
}
"""The options of `ablation=`, in the order of the paper, and which of `MODULES` each enables: none, then one more per
row, then all but one."""
ABLATION_SETTINGS = (*(f"pooling.{name}" for name in MODULES[:4]), "rerank.enabled", "rerank")
"""The settings in which the rows of an ablation differ."""
States = tuple[bool | str | None, ...]
"""State of each of `MODULES`: on, off, a variant by name, or None if unknown."""


def module_states(result: Mapping[str, Any]) -> States:
    """Return the state of each of `MODULES` in a run."""
    if result["ablation"] in ABLATIONS:
        return ABLATIONS[result["ablation"]]
    config = result["config"]
    pooling = result.get("about", {}).get("network", {}).get("pooling", config.get("pooling", {}))
    relup = {"on": True, "auto": True, "off": False}.get(pooling.get("relup"), pooling.get("relup"))
    return (*(pooling.get(name) for name in MODULES[:3]), relup, config.get("rerank", {}).get("enabled"))
