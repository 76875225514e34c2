"""What is known of every photo of a list once `prepare` has looked at it: `<root>/<list>.index.npz`."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np

from superglobal.data.catalogue import tree_path
from superglobal.data.image_checks import check_image, check_images
from superglobal.data.image_sources import PhotoTars, tar_members
from superglobal.data.images import CorruptImageError
from superglobal.errors import InputError
from superglobal.utils.io import write_atomically

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
    command = f"superglobal prepare-gldv2 --root {root} --table {table}"
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


_THREADS = 4  # in each process: much of the time goes into waiting for the disk
Part = dict[str, np.ndarray]
"""rows (n,) int64 in the list, sizes, offsets (n,) int64 in bytes, codes (n,) uint64, reasons (n,) str, note () str."""


def check_tree(ids_file: Path, tree: Path, part: slice, decode: bool) -> Part:
    """Photos of the tree.

    Args:
        ids_file: (N,) S16, sorted, as .npy.
        tree: the folder above a/b/c/<id>.jpg.
        part: which rows.
        decode: decode each photo as well.
    """
    ids = np.load(ids_file, mmap_mode="r")[part]
    paths = [tree / tree_path(image) for image in ids]
    report = check_images(paths, _THREADS, decode)
    reasons = dict(report.problems)
    found = [
        (part.start + i, int(signature.partition("-")[0] or 0), 0, signature, reasons.get(path, ""))
        for i, (path, signature) in enumerate(zip(paths, report.signatures, strict=True))
    ]
    return _part(found)


def check_tar(ids_file: Path, path: Path, decode: bool) -> Part:
    """Photos of the list in one tar file; arguments as of `check_tree`."""
    ids = np.load(ids_file, mmap_mode="r")
    try:
        members, note = tar_members(path)
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        return _part([], f"{path}: {error.strerror or error}")
    found = []
    for image, offset, size in members:
        row = int(np.searchsorted(ids, np.array(image, "S16")))
        if row == len(ids) or ids[row] != image:
            continue
        signature = reason = ""
        try:
            signature = check_image(partial(_read_tar, descriptor, offset, size), size, decode=decode).signature
        except (OSError, CorruptImageError) as error:
            reason = str(error)
        found.append((row, size, offset, signature, reason))
    os.close(descriptor)
    return _part(found, f"{path}: {note}" if note else "")


def _read_tar(descriptor: int, offset: int, size: int, start: int, count: int) -> bytes:
    return os.pread(descriptor, min(count, size - start), offset + start)


def _part(found: list[tuple[int, int, int, str, str]], note: str = "") -> Part:
    """(row in the list, size, offset, signature, reason) of photos, and what is wrong with a tar file, as arrays."""
    rows, sizes, offsets, signatures, reasons = zip(*found, strict=True) if found else [()] * 5
    return {
        "rows": np.array(rows, np.int64),
        "sizes": np.array(sizes, np.int64),
        "codes": signature_codes(signatures),
        "offsets": np.array(offsets, np.int64),
        "reasons": np.array(reasons, np.str_),
        "note": np.array(note),
    }
