"""Load the index of a GLDv2 image list, and read the images of the list from the folder tree or from tar files.

`superglobal.data.prepare_gldv2` checks every image of a list and writes the index, `<root>/<list>.index.npz`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Protocol

import numpy as np

from superglobal.data.download_links import tree_path
from superglobal.data.images import CorruptImageError
from superglobal.errors import InputError
from superglobal.utils.io import atomic_file, open_file, read_file, require_regular

VERSION = 2
# size in bytes of the header before the contents of each member of a tar file; it contains the member's name
_TAR_HEADER = 512


class ImageSource(Protocol):
    """Interface for reading image files by their id. Implementations can be pickled for worker processes."""

    def read(self, image: bytes) -> bytes:
        """Return the contents of the image file with the id `image`.

        Raises:
            CorruptImageError: the file cannot be read. The message gives only the reason, not the file.
        """

    def location(self, image: bytes) -> str:
        """Return where the image with the id `image` is stored: a text for messages."""


@dataclass(frozen=True)
class ImageTree:
    """Images in a folder tree, at `<root>/a/b/c/<id>.jpg`.

    Args:
        root: folder of the tree.
    """

    root: Path

    def path(self, image: bytes) -> Path:
        """Return the path of the image with the id `image`."""
        return self.root / tree_path(image)

    def read(self, image: bytes) -> bytes:
        try:
            return read_file(self.path(image))
        except FileNotFoundError:
            raise CorruptImageError("missing") from None
        except OSError as error:
            raise CorruptImageError(error.strerror or str(error)) from error

    def location(self, image: bytes) -> str:
        return str(self.path(image))


@dataclass(frozen=True)
class ImageFiles(ImageTree):
    """Images with any names in a folder and its sub-folders.

    Args:
        root: the folder.
        names: id of an image -> its path relative to the folder.
    """

    names: dict[bytes, str]

    def path(self, image: bytes) -> Path:
        return self.root / self.names[image]


@dataclass(frozen=True)
class ImageTars:
    """Images in tar files, which are read without unpacking them.

    Each process opens a tar file when it first needs it. Files are read with `os.pread`, because a forked worker shares
    the position of an open file with its parent.

    Args:
        folder: folder of the tar files.
        names: file names of the tar files.
        ids: (N,) S16 image ids, sorted.
        tars: (N,) int16 index in `names` of the tar file that contains each image; -1 if no tar file contains it.
        offsets: (N,) int64 position of each image in its tar file, in bytes.
        sizes: (N,) int64 size of each image file in bytes.
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
                require_regular(self.folder / self.names[tar])
                self._open[tar] = os.open(self.folder / self.names[tar], os.O_RDONLY)
            data = os.pread(self._open[tar], _TAR_HEADER + size, offset - _TAR_HEADER)
        except FileNotFoundError:
            raise CorruptImageError(f"missing ({self.names[tar]} does not exist)") from None
        except OSError as error:
            raise CorruptImageError(error.strerror or str(error)) from error
        if image not in data[:_TAR_HEADER]:
            raise CorruptImageError(
                "not at the position that the index contains, because the tar file has changed; run superglobal "
                "prepare-gldv2"
            )
        return data[_TAR_HEADER:]

    def location(self, image: bytes) -> str:
        tar = self.tars[self._row(image)]
        return f"{self.folder / (self.names[tar] if tar >= 0 else 'images_*.tar')}:{tree_path(image)}"

    def _row(self, image: bytes) -> int:
        """Return the index in `ids` of the image with the id `image`. `ids` must contain this image."""
        return int(np.searchsorted(self.ids, np.array(image, "S16")))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}  # An unpickled copy in another process opens the tar files itself.


@dataclass(frozen=True)
class ImageIndex:
    """Index of all images of a list, including missing and corrupt images.

    The index file contains one array per attribute.

    Attributes:
        ids: (N,) S16 image ids, sorted.
        sizes: (N,) int64 size of each image file in bytes; 0 for a missing image, and for a corrupt image of the folder
            tree.
        codes: (N,) uint64 hash of the contents of each image, see `signature_codes`; 0 for a missing or corrupt image.
        numbers: (N,) int16 index in `tar_names` of the tar file that contains each image; -1 if no tar file contains
            it, and for the folder tree.
        offsets: (N,) int64 position of each image in its tar file, in bytes; 0 for the folder tree.
        bad: (K,) int64 indices in `ids` of the missing and corrupt images, ascending.
        reasons: (K,) str reasons why the images of `bad` are missing or corrupt, in the same order.
        tar_names: (T,) str file names of the tar files; empty for the folder tree.
        tar_sizes: (T,) int64 sizes of the tar files in bytes.
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
        """Return the hashes of the contents, (n,) uint64, of the images with the given ids, (n,) S16."""
        return self.codes[np.searchsorted(self.ids, ids)]

    def corrupt_among(self, ids: np.ndarray) -> list[tuple[int, str]]:
        """Find the missing and corrupt images among the images with the given `ids`, (n,) S16.

        Returns:
            (position in `ids`, reason) of each missing or corrupt image.
        """
        rows = np.searchsorted(self.ids, ids)
        reasons = dict(zip(self.bad.tolist(), self.reasons.tolist(), strict=True))
        return [(int(i), reasons[int(rows[i])]) for i in np.flatnonzero(np.isin(rows, self.bad))]

    def tars(self, folder: Path) -> ImageTars:
        """Return a reader for the images of the list. `folder` is the folder of the tar files.

        Raises:
            InputError: the operating system is Windows.
        """
        require_posix(folder)
        return ImageTars(folder, self.tar_names.tolist(), self.ids, self.numbers, self.offsets, self.sizes)

    def save(self, path: Path, list_digest: str) -> None:
        """Write the index to the file `path`, together with `list_digest`, the SHA-256 of the list file."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        with atomic_file(path) as file:
            np.savez(file, version=VERSION, list_digest=list_digest, **arrays)


def signature_codes(signatures: Iterable[str]) -> np.ndarray:
    """Return a 64-bit hash of each image signature that `check_images` returns, (N,) uint64. The hash of "" is 0."""
    packed = (hashlib.blake2b(text.encode(), digest_size=8).digest() if text else bytes(8) for text in signatures)
    return np.frombuffer(b"".join(packed), "<u8").astype(np.uint64)


def index_path(root: Path, table: str) -> Path:
    """Return the path of the index file of an image list. `table` is the file name of the list in the folder `root`."""
    return root / f"{Path(table).stem}.index.npz"


def list_digest(root: Path, table: str) -> str:
    """Return the SHA-256 of a list file in hexadecimal digits. `table` is the file name of the list in `root`."""
    with open_file(root / table) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare_command(root: Path, table: str, tars: str | Path | None) -> str:
    """Return the command that writes the index of an image list, for error messages.

    Args:
        root: folder of the list.
        table: file name of the list.
        tars: folder of the tar files if the images are read from tar files; None for the folder tree.
    """
    command = f"superglobal prepare-gldv2 --root {root} --table {table}"
    return command if tars is None else f"{command} --tars {tars}"


def load_index(root: Path, table: str, tars: str | Path | None) -> ImageIndex:
    """Load the index of an image list.

    Args:
        root: folder of the list.
        table: file name of the list.
        tars: folder of the tar files if the images are read from tar files; None for the folder tree.

    Raises:
        InputError: the index is missing or damaged, or it does not match the list, or it does not match the tar files
            or the folder tree.
    """
    path, command = index_path(root, table), prepare_command(root, table, tars)
    try:
        require_regular(path)
        with np.load(path, allow_pickle=False) as stored:
            identity = int(stored["version"]), str(stored["list_digest"])
            index = ImageIndex(**{field.name: stored[field.name] for field in fields(ImageIndex)})
    except FileNotFoundError as error:
        raise InputError(f"index of the images not found: {path}; create it with: {command}") from error
    except Exception as error:  # A damaged zip file raises exceptions of many types.
        raise InputError(f"{path}: damaged ({error}); create it again with: {command}") from error
    mismatch = _tar_mismatch(index, tars)
    if identity != (VERSION, list_digest(root, table)):
        mismatch = f"{root / table} has changed"
    if mismatch:
        raise InputError(f"{path} is out of date: {mismatch}; create it again with: {command}")
    return index


def _tar_mismatch(index: ImageIndex, tars: str | Path | None) -> str | None:
    """Compare an index with the tar files, or with the folder tree if `tars` is None.

    Returns:
        A description of the first difference, or None if there is none.
    """
    if (tars is None) != (len(index.tar_names) == 0):
        return "it is an index of tar files" if tars is None else "it is an index of the folder tree"
    for name, size in zip(index.tar_names.tolist(), index.tar_sizes.tolist(), strict=True):
        path = Path(str(tars)) / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has changed"
    return None


def require_posix(tars: Path) -> None:
    """Raise InputError on Windows, which lacks `os.pread`. `tars` is the folder of the tar files."""
    if not hasattr(os, "pread"):
        raise InputError(f"{tars}: reading images from tar files needs Linux or macOS; unpack them, or use WSL")
