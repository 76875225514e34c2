"""What is known of every photo of a list once `prepare` has looked at it: `<root>/<list>.index.npz`."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from superglobal.data.sources import PhotoTars
from superglobal.errors import InputError
from superglobal.files import write_atomically

VERSION = 1


@dataclass(frozen=True)
class PhotoIndex:
    """Every photo of a list, sound or not.

    Attributes:
        ids: (N,) S16, sorted.
        sizes: (N,) int64, in bytes; 0 for a bad photo of the tree, and for a missing one.
        codes: (N,) uint64, `signature_codes` of their contents; 0 for a bad photo.
        numbers: (N,) int16, which of `tar_names` has it; -1 in the tree, or where none has it.
        offsets: (N,) int64, in bytes, where it begins in its tar file; 0 in the tree.
        bad: (K,) int64, rows of the bad photos, ascending.
        reasons: (K,) str, of each.
        tar_names: (T,) str, the tar files; none for the tree.
        tar_sizes: (T,) int64, their sizes in bytes.
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
        """(n,) uint64 for (n,) S16 ids of the list."""
        return self.codes[np.searchsorted(self.ids, ids)]

    def bad_among(self, ids: np.ndarray) -> list[tuple[int, str]]:
        """(place in `ids`, reason) of the bad photos among (n,) S16 ids of the list, in order."""
        rows = np.searchsorted(self.ids, ids)
        reasons = dict(zip(self.bad.tolist(), self.reasons.tolist(), strict=True))
        return [(int(place), reasons[int(rows[place])]) for place in np.flatnonzero(np.isin(rows, self.bad))]

    def tars(self, folder: Path) -> PhotoTars:
        """The photos in the tar files of `folder`."""
        return PhotoTars(folder, self.tar_names.tolist(), self.ids, self.numbers, self.offsets, self.sizes)

    def save(self, path: Path, list_digest: str) -> None:
        """Write it, with what makes it stale."""
        file = io.BytesIO()
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        np.savez(file, version=VERSION, list_digest=list_digest, **arrays)
        write_atomically(path, file.getvalue())


def signature_codes(signatures: Iterable[str]) -> np.ndarray:
    """(N,) uint64: 64 bits of a hash of each of the signatures of `check_images`, 0 for an empty one."""
    packed = (hashlib.blake2b(text.encode(), digest_size=8).digest() if text else bytes(8) for text in signatures)
    return np.frombuffer(b"".join(packed), "<u8").astype(np.uint64)


def index_path(root: Path, table: str) -> Path:
    """Beside the list."""
    return root / f"{Path(table).stem}.index.npz"


def list_digest(root: Path, table: str) -> str:
    """SHA-256 of the list's bytes."""
    with (root / table).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare_command(root: Path, table: str, tars: str | Path | None) -> str:
    """What makes the index, or makes it anew."""
    command = f"python scripts/prepare_gldv2.py --root {root} --table {table}"
    return command if tars is None else f"{command} --tars {tars}"


def load_index(root: Path, table: str, tars: str | Path | None) -> PhotoIndex:
    """The index of a list.

    Args:
        root, table: folder and name of the list.
        tars: folder of the tar files if the photos are read from them.

    Raises:
        InputError: there is none, it is damaged, or it does not fit the list, the tar files or the tree: with the
            command that makes it.
    """
    path, command = index_path(root, table), prepare_command(root, table, tars)
    try:
        with np.load(path, allow_pickle=False) as stored:
            about = int(stored["version"]), str(stored["list_digest"])
            index = PhotoIndex(**{field.name: stored[field.name] for field in fields(PhotoIndex)})
    except FileNotFoundError as error:
        raise InputError(f"index of the photos not found: {path}; make it: {command}") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: damaged ({error}); make it anew: {command}") from error
    stale = _stale(index, tars)
    if about != (VERSION, list_digest(root, table)):
        stale = f"{root / table} has changed since"
    if stale:
        raise InputError(f"{path}: does not fit any more, {stale}; make it anew: {command}")
    return index


def _stale(index: PhotoIndex, tars: str | Path | None) -> str | None:
    if (tars is None) != (len(index.tar_names) == 0):
        return "it is of tar files" if tars is None else "it is of the folder tree"
    for name, size in zip(index.tar_names.tolist(), index.tar_sizes.tolist(), strict=True):
        path = Path(str(tars)) / name
        try:
            found = path.stat().st_size
        except OSError:
            return f"{path} is not there"
        if found != size:
            return f"{path} has changed since"
    return None
