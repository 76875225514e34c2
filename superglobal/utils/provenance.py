"""Results of one run as files and a console table (of many runs: tables.py).

A run's folder holds `results.json` (numbers, settings, fingerprints, versions, seconds), `per_query.csv` (AP per
query and stage), `rankings.npz` (ids and scores), `rankings.csv` and `rankings.json` (names and scores of the
first results of the last stage).
"""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

_PACKAGES = ("superglobal", "torch", "timm", "numpy", "pillow", "opencv-python-headless", "faiss-cpu", "faiss-gpu")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, str] | None:
    """Commit of the code, and whether it was changed since; None outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": str(bool(git("status", "--porcelain", "-uno")))}
    except (OSError, subprocess.CalledProcessError):
        return None
