"""A search page as its command opens it, without the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evaluations import QUIET, ROOT
from hydra import compose, initialize_config_dir

from superglobal.config import register
from superglobal.search_page.image_search import SearchDatabase
from superglobal.search_page.serve import open_database, read_config


def composed(*overrides: str) -> Any:
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("serve", overrides=[*QUIET, *overrides])


def opened(outputs: Path, *overrides: str) -> SearchDatabase:
    config, folder = read_config(composed(f"paths.outputs={outputs}", *overrides))
    return open_database(config, folder)
