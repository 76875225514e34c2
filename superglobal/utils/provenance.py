"""Determine the versions of the code and of the packages that results depend on."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

_PACKAGES = ("superglobal", "torch", "timm", "numpy", "pillow", "opencv-python-headless", "faiss-cpu", "faiss-gpu")


def versions() -> dict[str, str]:
    """Return a dict of version numbers: of Python, and of each installed package that results depend on."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def git_state() -> dict[str, str] | None:
    """Return the state of the Git checkout that contains this code, or None outside a checkout.

    Returns:
        A dict: "commit" is the hash of the commit, and "changed" is "True" if tracked files have uncommitted changes,
        else "False".
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": str(bool(git("status", "--porcelain", "-uno")))}
    except (OSError, subprocess.CalledProcessError):
        return None
