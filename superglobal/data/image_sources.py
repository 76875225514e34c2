"""Where the bytes of GLDv2's photos come from: the folder tree, or its tar files without unpacking them."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from superglobal.data.catalogue import tree_path
from superglobal.data.images import CorruptImageError

_MEMBER = re.compile(r"(?:.*/)?([0-9a-f]{16})\.jpg")
_HEADER = 512  # bytes of a tar file's block that names the member behind it


class PhotoSource(Protocol):
    """Photos by their id; goes to worker processes."""

    def read(self, image: bytes) -> bytes:
        """The photo's file; CorruptImageError with the reason if it is not there."""

    def place(self, image: bytes) -> str:
        """Where it is, for messages."""


@dataclass(frozen=True)
class PhotoTree:
    """`<root>/a/b/c/<id>.jpg`."""

    root: Path

    def read(self, image: bytes) -> bytes:
        try:
            return (self.root / tree_path(image)).read_bytes()
        except FileNotFoundError:
            raise CorruptImageError("missing") from None
        except OSError as error:
            raise CorruptImageError(error.strerror or str(error)) from error

    def place(self, image: bytes) -> str:
        return str(self.root / tree_path(image))


@dataclass(frozen=True)
class PhotoTars:
    """Members of tar files, read where they lie.

    Each process opens a tar file when it first needs it, and reads at given places (`os.pread`), so that forked
    workers never move one another's position in a file.

    Args:
        folder: of the tar files.
        names: of the tar files.
        ids: (N,) S16, sorted.
        tars: (N,) int16, number of the tar file, -1 for a photo that none has.
        offsets: (N,) int64, in bytes, where the photo begins.
        sizes: (N,) int64, in bytes.
    """

    folder: Path
    names: Sequence[str]
    ids: np.ndarray
    tars: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    _open: dict[int, int] = field(default_factory=dict, compare=False, repr=False)

    def read(self, image: bytes) -> bytes:
        row = self._row(image)
        if self.tars[row] < 0:
            raise CorruptImageError("missing")
        try:
            offset, size = int(self.offsets[row]), int(self.sizes[row])
            data = os.pread(self._descriptor(int(self.tars[row])), _HEADER + size, offset - _HEADER)
        except FileNotFoundError:
            raise CorruptImageError(f"missing (no {self.names[self.tars[row]]})") from None
        except OSError as error:
            raise CorruptImageError(error.strerror or str(error)) from error
        if image not in data[:_HEADER]:
            raise CorruptImageError("not where the index has it (another tar file since); run prepare_gldv2.py again")
        return data[_HEADER:]

    def place(self, image: bytes) -> str:
        number = self.tars[self._row(image)]
        return f"{self.folder / (self.names[number] if number >= 0 else 'images_*.tar')}:{tree_path(image)}"

    def _row(self, image: bytes) -> int:
        return int(np.searchsorted(self.ids, np.array(image, "S16")))

    def _descriptor(self, number: int) -> int:
        if number not in self._open:
            self._open[number] = os.open(self.folder / self.names[number], os.O_RDONLY)
        return self._open[number]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}  # another process opens its own


def tar_members(path: Path) -> tuple[list[tuple[bytes, int, int]], str | None]:
    """Photos of a tar file.

    Returns:
        (id, offset, size) each, in bytes, the last one perhaps cut off; and what is wrong with the file as a whole, or
        None.

    Raises:
        OSError: it cannot be opened.
    """
    members: list[tuple[bytes, int, int]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = _MEMBER.fullmatch(member.name)
                if name and member.isreg():
                    members.append((name[1].encode(), member.offset_data, member.size))
        ended = members and members[-1][1] + members[-1][2] < path.stat().st_size
        return members, None if ended or not members else "cut off (ends without an end-of-archive block)"
    except tarfile.TarError as error:
        return members, f"cut off or not a tar file ({error})"
