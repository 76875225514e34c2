"""Which photos are in place, and from which archive."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def list_beside(archive: Path) -> Path:
    """Where it is written down what an archive has put in place."""
    return archive.with_name(f"{archive.name}.files")


class Present:
    """The files below a folder, those of no bytes left aside, as an array: millions take little room.

    Hidden files and folders do not count.
    """

    def __init__(self, folder: Path) -> None:
        found = [np.array(names) for names in _names(folder, "") if names]
        self.names = np.sort(np.concatenate(found)) if found else np.empty(0, "S1")

    def has(self, names: np.ndarray) -> np.ndarray:
        """(N,) bool for (N,) S names below the folder."""
        if not len(self.names):
            return np.zeros(len(names), bool)
        places = np.minimum(np.searchsorted(self.names, names), len(self.names) - 1)
        return self.names[places] == names


def _names(folder: Path, below: str) -> Iterator[list[bytes]]:
    """Of a folder and those below it, one list each."""
    names, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.stat().st_size:
                    names.append(os.fsencode(f"{below}{entry.name}"))
    except (FileNotFoundError, NotADirectoryError):
        return
    yield names
    for name in folders:
        yield from _names(folder / name, f"{below}{name}/")
