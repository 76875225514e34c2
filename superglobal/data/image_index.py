"""Load the index of a GLDv2 image list, `<root>/<list>.index.npz`, and read images from the folder tree or tar files.

`superglobal.data.prepare_gldv2` checks every image of a list and writes the index.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Protocol

import numpy as np

from superglobal.data.download_links import tree_path
from superglobal.data.images import CorruptImageError
from superglobal.errors import InputError
from superglobal.utils.io import atomic_file

VERSION = 1
_TAR_HEADER = 512  # bytes of the block before a member, which contains its name


class ImageSource(Protocol):
    """Source of image files by id. It can be sent to worker processes."""

    def read(self, image: bytes) -> bytes:
        """Return the bytes of an image file.

        Raises:
            CorruptImageError: the file cannot be read. The message is the reason.
        """

    def location(self, image: bytes) -> str:
        """Return the location of an image, for messages."""


@dataclass(frozen=True)
class ImageTree:
    """Image files at `<root>/a/b/c/<id>.jpg`."""

    root: Path

    def read(self, image: bytes) -> bytes:
        try:
            return (self.root / tree_path(image)).read_bytes()
        except FileNotFoundError:
            raise CorruptImageError("missing") from None
        except OSError as error:
            raise CorruptImageError(error.strerror or str(error)) from error

    def location(self, image: bytes) -> str:
        return str(self.root / tree_path(image))


@dataclass(frozen=True)
class ImageTars:
    """Image files in tar files that are not unpacked.

    Each process opens a tar file when it first needs it. It reads with `os.pread`, because forked workers share the
    position of an open file.

    Args:
        folder: folder of the tar files.
        names: names of the tar files.
        ids: (N,) S16, sorted.
        tars: (N,) int16 index of the tar file in `names`, -1 for an image that is in no tar file.
        offsets: (N,) int64 position of the image in its tar file, in bytes.
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
        tar, offset, size = int(self.tars[row]), int(self.offsets[row]), int(self.sizes[row])
        if tar < 0:
            raise CorruptImageError("missing")
        try:
            if tar not in self._open:
                self._open[tar] = os.open(self.folder / self.names[tar], os.O_RDONLY)
            data = os.pread(self._open[tar], _TAR_HEADER + size, offset - _TAR_HEADER)
        except FileNotFoundError:
            raise CorruptImageError(f"missing ({self.names[tar]} does not exist)") from None
        except OSError as error:
            raise CorruptImageError(error.strerror or str(error)) from error
        if image not in data[:_TAR_HEADER]:
            raise CorruptImageError(
                "not at the position in the index, because the tar file has changed; run superglobal prepare-gldv2"
            )
        return data[_TAR_HEADER:]

    def location(self, image: bytes) -> str:
        tar = self.tars[self._row(image)]
        return f"{self.folder / (self.names[tar] if tar >= 0 else 'images_*.tar')}:{tree_path(image)}"

    def _row(self, image: bytes) -> int:
        return int(np.searchsorted(self.ids, np.array(image, "S16")))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}  # Each process opens the tar files itself.


@dataclass(frozen=True)
class ImageIndex:
    """Index of all images of a list, including missing and corrupt ones. The attributes are the arrays of the file.

    Attributes:
        ids: (N,) S16, sorted.
        sizes: (N,) int64, in bytes; 0 for a missing image and for a corrupt image of the tree.
        codes: (N,) uint64 `signature_codes` of the contents; 0 for a missing or corrupt image.
        numbers: (N,) int16 index of the tar file in `tar_names`; -1 for the tree, or if no tar file has the image.
        offsets: (N,) int64 position of the image in its tar file, in bytes; 0 for the tree.
        bad: (K,) int64 rows of the missing and corrupt images, ascending.
        reasons: (K,) str reason for each of them.
        tar_names: (T,) str names of the tar files; empty for the tree.
        tar_sizes: (T,) int64, in bytes.
    """

    ids: np.ndarray
    sizes: np.ndarray
    codes: np.ndarray
    numbers: np.ndarray
    offsets: np.ndarray
    bad: np.ndarray
    reasons: np.ndarray
    tar_names: np.ndarray
    tar_sizes: np.ndarray

    def codes_of(self, ids: np.ndarray) -> np.ndarray:
        """Return (n,) uint64 codes for (n,) S16 ids of the list."""
        return self.codes[np.searchsorted(self.ids, ids)]

    def corrupt_among(self, ids: np.ndarray) -> list[tuple[int, str]]:
        """Return (position in `ids`, reason) of the missing and corrupt images among (n,) S16 ids of the list."""
        rows = np.searchsorted(self.ids, ids)
        reasons = dict(zip(self.bad.tolist(), self.reasons.tolist(), strict=True))
        return [(int(i), reasons[int(rows[i])]) for i in np.flatnonzero(np.isin(rows, self.bad))]

    def tars(self, folder: Path) -> ImageTars:
        """Return the images in the tar files of `folder`."""
        return ImageTars(folder, self.tar_names.tolist(), self.ids, self.numbers, self.offsets, self.sizes)

    def save(self, path: Path, list_digest: str) -> None:
        """Write the index and the digest of its list."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        with atomic_file(path) as file:
            np.savez(file, version=VERSION, list_digest=list_digest, **arrays)


def signature_codes(signatures: Iterable[str]) -> np.ndarray:
    """Return (N,) uint64: a 64-bit hash of each signature of `check_images`, 0 for an empty one."""
    packed = (hashlib.blake2b(text.encode(), digest_size=8).digest() if text else bytes(8) for text in signatures)
    return np.frombuffer(b"".join(packed), "<u8").astype(np.uint64)


def index_path(root: Path, table: str) -> Path:
    """Return the path of the index of a list, which is in the folder of the list."""
    return root / f"{Path(table).stem}.index.npz"


def list_digest(root: Path, table: str) -> str:
    """Return the SHA-256 of a list file."""
    with (root / table).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare_command(root: Path, table: str, tars: str | Path | None) -> str:
    """Return the command that writes the index of a list, for messages."""
    command = f"superglobal prepare-gldv2 --root {root} --table {table}"
    return command if tars is None else f"{command} --tars {tars}"


def load_index(root: Path, table: str, tars: str | Path | None) -> ImageIndex:
    """Load the index of a list.

    Args:
        root: folder of the list.
        table: name of the list.
        tars: folder of the tar files if the images are read from them.

    Raises:
        InputError: the index is missing or damaged, or it does not match the list, the tar files or the tree.
    """
    path, command = index_path(root, table), prepare_command(root, table, tars)
    try:
        with np.load(path, allow_pickle=False) as stored:
            identity = int(stored["version"]), str(stored["list_digest"])
            index = ImageIndex(**{field.name: stored[field.name] for field in fields(ImageIndex)})
    except FileNotFoundError as error:
        raise InputError(f"index of the images not found: {path}; create it with: {command}") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: damaged ({error}); create it again with: {command}") from error
    mismatch = _tar_mismatch(index, tars)
    if identity != (VERSION, list_digest(root, table)):
        mismatch = f"{root / table} has changed"
    if mismatch:
        raise InputError(f"{path} is out of date: {mismatch}; create it again with: {command}")
    return index


def _tar_mismatch(index: ImageIndex, tars: str | Path | None) -> str | None:
    """Return a description of the first difference between the tar files and the index, or None if they match."""
    if (tars is None) != (len(index.tar_names) == 0):
        return "it is an index of tar files" if tars is None else "it is an index of the folder tree"
    for name, size in zip(index.tar_names.tolist(), index.tar_sizes.tolist(), strict=True):
        path = Path(str(tars)) / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has changed"
    return None
