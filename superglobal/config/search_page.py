"""Settings of the search page, `superglobal serve`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

from superglobal.config.common import setting
from superglobal.config.evaluation import EvalConfig, StoreConfig
from superglobal.data.images import MAX_PIXELS
from superglobal.errors import InputError
from superglobal.reranking.registry import get_reranker


@dataclass
class PageConfig:
    """The search page.

    Args:
        host: address to listen at; "127.0.0.1" is reachable from this machine only, "0.0.0.0" from everywhere.
        port: 0 for any free port.
        results: maximum number of results shown.
        samples: number of images of the data set offered at a time.
        max_upload: maximum size of an uploaded file, in MB.
        max_megapixels: maximum size of an uploaded image.
    """

    host: str = "127.0.0.1"
    port: int = setting(7860, minimum=0, maximum=65535)
    results: int = setting(40, minimum=1, maximum=500)
    samples: int = setting(12, minimum=0, maximum=100)
    max_upload: int = setting(20, minimum=1, maximum=2000)
    max_megapixels: int = setting(100, minimum=1, maximum=MAX_PIXELS // 10**6)


@dataclass
class ServeConfig(EvalConfig):
    """Everything `superglobal serve` takes: what `eval.py` takes, except what scores results, and `page`.

    Args:
        store: folder of a store, which records its images and its network; or the settings of `eval.py`.
    """

    store: Any = field(default_factory=StoreConfig)
    page: PageConfig = field(default_factory=PageConfig)

    def validate(self) -> None:
        """Check what `EvalConfig` checks, and what a page cannot show.

        Raises:
            InputError: settings contradict each other, or a package is missing.
        """
        super().validate()
        shard, devices = self.extraction.shard, self.trainer.devices
        if self.dataset.kind == "descriptors" or self.descriptors.query is not None:
            raise InputError("descriptors: the page extracts descriptors itself, from images; use another dataset=")
        if self.rerank.enabled and not {"M", "K", "beta"} <= get_reranker(self.rerank.kind).parameters.keys():
            raise InputError(
                f"rerank={self.rerank.kind}: the page has controls for M, K and beta; use rerank=superglobal, "
                "mutual or none"
            )
        if shard is not None:
            raise InputError(f"extraction.shard={shard}: the page searches the whole database; leave it out")
        if importlib.util.find_spec("gradio") is None:
            raise InputError("superglobal serve: Gradio is not installed; pip install gradio")
        if not (devices in (1, "1") or (isinstance(devices, list) and len(devices) == 1)):
            raise InputError(
                f"trainer.devices={devices}: expected 1, because the page is one process; extract with eval.py first"
            )
        if not self.page.host:
            raise InputError("page.host: expected an address, such as 127.0.0.1 (this machine only) or 0.0.0.0")
