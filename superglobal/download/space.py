"""Whether there is room, before anything is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from superglobal.errors import InputError

GROWTH = 1.05  # of photos on disk against their archive: blocks that are not full


@dataclass(frozen=True)
class Load:
    """An archive that is to come.

    Attributes:
        size: in bytes, None if no server says it.
        there: bytes of it that are there.
    """

    size: int | None
    there: int


def needed(loads: Sequence[Load], jobs: int, keep: bool, unpacked: bool) -> int:
    """Bytes that must be free for archives and photos; those of unknown size do not count.

    Args:
        loads: archives.
        jobs: how many are there at once, when each is removed once it is unpacked.
        keep: none is removed.
        unpacked: the photos take room too.
    """
    sizes = sorted((load.size for load in loads if load.size is not None), reverse=True)
    there = sum(min(load.there, load.size) for load in loads if load.size is not None)
    archives = sum(sizes if keep or not unpacked else sizes[:jobs])
    photos = int(GROWTH * sum(sizes)) if unpacked else 0
    return max(0, archives + photos - there)


def require_space(folder: Path, name: str, bytes_needed: int) -> None:
    """Refuse what does not fit.

    Raises:
        InputError: with what is needed and what is free.
    """
    free = shutil.disk_usage(folder).free
    if bytes_needed > free:
        raise InputError(
            f"{name} needs {_size(bytes_needed)} more in {folder} (archives and photos, without what is there), "
            f"{_size(free)} are free: nothing was loaded. Make room, or choose another place with --data"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
