"""Define the settings of the search page, which `superglobal serve` starts."""

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
    """Search page.

    Args:
        host: address on which the page listens; "127.0.0.1" allows access from this machine only, "0.0.0.0" from all
            machines that can reach it.
        port: port on which the page listens; 0 for any free port.
        results: number of results shown at first, and added by each click on the button below them.
        samples: number of example images from the data set that are shown at a time; 0 for none.
        max_upload: maximum size of an uploaded file, in MB.
        max_megapixels: maximum size of an uploaded image, in megapixels.
    """

    host: str = "127.0.0.1"
    port: int = setting(7860, minimum=0, maximum=65535)
    results: int = setting(40, minimum=1, maximum=500)
    samples: int = setting(12, minimum=0, maximum=100)
    max_upload: int = setting(20, minimum=1, maximum=2000)
    max_megapixels: int = setting(MAX_PIXELS // 10**6, minimum=1, maximum=MAX_PIXELS // 10**6)


@dataclass
class ServeConfig(EvalConfig):
    """Top-level settings of `superglobal serve`: those of `eval.py`, and `page`; loggers and figures have no effect.

    Args:
        store: folder of an existing descriptor store to search; the images and the network are those of the store. If
            no folder is given, the settings of `eval.py` (among them `store.dtype`) select the images and the network.
    """

    store: Any = field(default_factory=StoreConfig)
    page: PageConfig = field(default_factory=PageConfig)

    def validate(self) -> None:
        """Check the settings as `EvalConfig` does, and reject settings that the page does not support.

        Raises:
            InputError: settings contradict each other, or a package is missing.
        """
        super().validate()
        shard, devices = self.extraction.shard, self.trainer.devices
        if self.dataset.kind == "descriptors" or self.descriptors.query is not None:
            raise InputError(
                "dataset=descriptors: the search page extracts descriptors from images itself; use another dataset= "
                "without descriptors.*"
            )
        if self.rerank.enabled and get_reranker(self.rerank.kind).searches_again is not None:
            raise InputError(
                f"rerank={self.rerank.kind}: the search page reranks the first M images and does not search again; use "
                "rerank=auto, superglobal or none"
            )
        if shard is not None:
            raise InputError(
                f"extraction.shard={shard}: the search page searches the whole database; remove extraction.shard"
            )
        if importlib.util.find_spec("gradio") is None:
            raise InputError("superglobal serve: Gradio is not installed; run `pip install gradio`")
        if not (devices in (1, "1") or (isinstance(devices, list) and len(devices) == 1)):
            raise InputError(
                f"trainer.devices={devices}: expected 1, because the search page is a single process; to use several "
                "devices, extract the descriptors with eval.py first"
            )
        if not self.page.host:
            raise InputError(
                "page.host is empty: expected an address, such as 127.0.0.1 (this machine only) or 0.0.0.0"
            )
