"""Settings of `scripts/demo.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from superglobal.config.evaluation import EvalConfig, StoreConfig


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
    """Everything `scripts/demo.py` takes: what `eval.py` takes, without what scores results, and `page`.

    Args:
        store: the folder of a store, which says what its photos are and what described them; or the settings that
            `eval.py` has there.
    """

    store: Any = field(default_factory=StoreConfig)
    page: PageConfig = field(default_factory=PageConfig)
