"""Open the database of a search page as the command does, without starting the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evaluations import QUIET, ROOT
from hydra import compose, initialize_config_dir

from superglobal.config import register
from superglobal.search_page.image_search import SearchDatabase
from superglobal.search_page.serve import open_database, read_config


def compose_serve_config(*overrides: str) -> Any:
    """Compose the configuration of `superglobal serve`."""
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("serve", overrides=[*QUIET, *overrides])


def open_search_database(outputs: Path, *overrides: str) -> SearchDatabase:
    """Open the search database for a configuration."""
    config, folder = read_config(compose_serve_config(f"paths.outputs={outputs}", *overrides))
    return open_database(config, folder)
