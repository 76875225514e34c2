"""Settings of `superglobal serve`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

from superglobal.config.common import require_within
from superglobal.config.evaluation import EvalConfig, StoreConfig
from superglobal.data.images import MAX_PIXELS
from superglobal.errors import InputError
from superglobal.reranking.registry import get_reranker


@dataclass
class PageConfig:
    """The search page.

    Args:
        host: address that it listens at; "127.0.0.1" is this machine alone, "0.0.0.0" whoever reaches it.
        port: 0 for any that is free.
        results: shown at most.
        samples: photos of the data set that are offered at a time.
        max_upload: MB of an uploaded file.
        max_megapixels: of an uploaded photo.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    results: int = 40
    samples: int = 12
    max_upload: int = 20
    max_megapixels: int = 100


@dataclass
class DemoConfig(EvalConfig):
    """Everything `superglobal serve` takes: what `eval.py` takes, without what scores results, and `page`.

    Args:
        store: the folder of a store, which says what its photos are and what described them; or the settings that
            `eval.py` has there.
    """

    store: Any = field(default_factory=StoreConfig)
    page: PageConfig = field(default_factory=PageConfig)


def check_page(config: DemoConfig) -> None:
    """Raise InputError for what `superglobal serve` could not show."""
    d, page, kind = config.dataset, config.page, config.rerank.kind
    if d.kind == "descriptors" or config.descriptors.query is not None:
        raise InputError("the page describes what is searched for, so it needs the photos and the weights; dataset=...")
    if config.rerank.enabled and not {"M", "K", "beta"} <= get_reranker(kind).parameters.keys():
        raise InputError(f"rerank={kind}: the page has M, K and beta to set; rerank=superglobal, mutual or none")
    if config.extraction.shard is not None:
        raise InputError(
            f"extraction.shard={config.extraction.shard}: a page searches all of the database; leave it out"
        )
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the page needs Gradio, which is not installed: pip install gradio")
    devices = config.trainer.devices
    if not (devices in (1, "1") or (isinstance(devices, list) and len(devices) == 1)):
        raise InputError(
            f"trainer.devices={devices}: a page is one process; describe with eval.py, then trainer.devices=1"
        )
    if not page.host:
        raise InputError("page.host is empty: 127.0.0.1 is this machine alone, 0.0.0.0 whoever reaches it")
    require_within(
        {
            "page.port": (page.port, 0, 65535),
            "page.results": (page.results, 1, 500),
            "page.samples": (page.samples, 0, 100),
            "page.max_upload": (page.max_upload, 1, 2000),
            "page.max_megapixels": (page.max_megapixels, 1, MAX_PIXELS // 10**6),
        }
    )
