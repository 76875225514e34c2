"""The paper's own numbers, for the configurations that they are about; nothing of it was measured here.

Only what could be confirmed is here; of the paper's table of modules nothing is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from superglobal.models.pooling import PoolingConfig
from superglobal.reranking.registry import get_reranker

CITATION = "Shao et al., ICCV 2023, arXiv:2308.06954"


@dataclass(frozen=True)
class Published:
    """Numbers of the paper for one data set, in percent by protocol, with CVNet's weights and all modules."""

    dataset: str
    backbone: str
    reranked: bool
    scores: tuple[tuple[str, float], ...]
    source: str
    """Where we read them."""

    @property
    def name(self) -> str:
        return f"{self.short}, everything on ({CITATION})"

    @property
    def short(self) -> str:
        return f"paper, {'reranked' if self.reranked else 'no rerank'}"


_LISTED = "paperswithcode.com/paper/global-features-are-all-you-need-for-image"
_TOLD = "summaries of the paper by others"
PUBLISHED = (
    Published("roxford5k", "resnet101", False, (("hard", 72.1),), _TOLD),
    Published("rparis6k", "resnet101", False, (("hard", 83.5),), _TOLD),
    Published("roxford5k", "resnet101", True, (("hard", 80.2),), _LISTED),
    Published("rparis6k", "resnet101", True, (("hard", 86.7),), _LISTED),
)
# What the configuration has beside its data set, backbone and reranking; GeM's own p plays no part in GeM+.
_POOLING = {k: v for k, v in asdict(PoolingConfig(relup="on")).items() if k not in ("p", "eps", "learn_p")}
_SCALES, _FORMAT = [0.7071, 1.0, 1.4142], "CVNet"


def published_for(result: Mapping[str, Any]) -> Published | None:
    """The paper's numbers for exactly this data set, backbone, weights and configuration; None where there are none."""
    config, about = result["config"], result.get("about", {})
    network = about.get("network")
    if network is None or about.get("weights_format") != _FORMAT or not _paper_protocol(config):
        return None
    pooling = {
        key: math.inf if network["pooling"].get(key) == "inf" else network["pooling"].get(key) for key in _POOLING
    }
    if pooling != _POOLING or network["scales"] != _SCALES or network["antialias"]:
        return None
    wanted = (config["dataset"]["name"], network["backbone"], config["rerank"]["enabled"])
    return next((one for one in PUBLISHED if (one.dataset, one.backbone, one.reranked) == wanted), None)


def _paper_protocol(config: Mapping[str, Any]) -> bool:
    """Whether data set, search and reranking are as the paper's."""
    dataset, rerank = config["dataset"], config["rerank"]
    settings = get_reranker("superglobal").complete({})
    as_published = not rerank["enabled"] or (
        rerank["kind"] == "superglobal"
        and rerank["junk"] == "keep"
        and all(rerank.get(name) == value for name, value in settings.items())
    )
    return (
        as_published
        and dataset["kind"] == "revisited"
        and dataset["crop_query"]
        and dataset["max_side"] is None
        and not config["distractors"]["name"]
        and config["whitening"]["kind"] == "none"
        and config["index"]["kind"] == "flat"
    )
