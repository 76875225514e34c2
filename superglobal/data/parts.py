"""The work of `prepare`, a part at a time: what each photo of a stretch of the tree, or of a tar file, is like."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np

from superglobal.data.image_checks import check_image, check_images
from superglobal.data.images import FaultyImageError
from superglobal.data.photo_index import signature_codes
from superglobal.data.sources import relative_path, tar_members

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
    paths = [tree / relative_path(image) for image in ids]
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
        except (OSError, FaultyImageError) as error:
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
