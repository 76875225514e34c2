"""Check that image files exist and are complete, and compute signatures that reveal later changes of the files.

An image is identified by all bytes of its file. The file is read once. `CheckCache` keeps the result, which is used as
long as the size and the times of the last change of the file stay the same.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from superglobal.data.images import (
    Box,
    CorruptImageError,
    ImageItem,
    box_bounds,
    decode_image,
    file_signature,
    open_image,
    reason_of,
    require_end,
    upright_size,
)
from superglobal.errors import InputError
from superglobal.utils.io import atomic_file, file_stamp, is_settled, read_file, require_regular

CHECKED_IMAGES = "checked_images.npz"
"""Name of the file of `CheckCache`, in the folder of the stores."""
_BATCH = 512  # number of images that one task of a thread checks
_DAMAGED = (0, 0)  # size that stands for an image that cannot be decoded
_SAVED_IMAGES = 100_000  # number of newly checked images after which the results are written


class CheckedImage(NamedTuple):
    """Result of the check of an image that is complete.

    Attributes:
        signature: file size and CRC-32 of all bytes of the file, see `file_signature`.
        size: (height, width) in pixels: of the crop if there is one, else of the whole upright image.
    """

    signature: str
    size: tuple[int, int]


class CheckCache:
    """Results of earlier checks, so that only new and changed files are read again.

    Several processes may use the same file. If it is missing, damaged or not writable, all images are read.

    Args:
        path: file of the results; None to keep none.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        # (n, 7) int64, sorted by key: key of the path, size, st_mtime_ns, st_ctime_ns, CRC-32, height and width
        self._rows = np.empty((0, 7), np.int64)
        self._load()

    def _load(self) -> None:
        """Add the rows of the file. Without a readable file, nothing is added."""
        if self._path is None:
            return
        with suppress(Exception):  # NumPy raises many types of exceptions for a damaged file.
            require_regular(self._path)
            with np.load(self._path) as file:
                self._add(file["rows"].reshape(-1, 7).astype(np.int64))

    def _add(self, rows: np.ndarray) -> None:
        """Add rows (n, 7), which replace rows with the same keys."""
        joined = np.concatenate([rows, self._rows])  # of equal keys, the first one is kept
        self._rows = joined[np.unique(joined[:, 0], return_index=True)[1]]

    def get(self, path: Path, stamp: Sequence[int] | None) -> CheckedImage | None:
        """Return the result of an earlier check of a file with this `file_stamp`; None if there is none."""
        row = int(np.searchsorted(self._rows[:, 0], key := _path_key(path)))
        if row == len(self._rows) or self._rows[row, :4].tolist() != [key, *(stamp or ())]:
            return None
        size, _, _, crc, height, width = self._rows[row, 1:].tolist()
        return CheckedImage(f"{size}-{crc:08x}", (height, width))

    def mark_damaged(self, images: Sequence[tuple[Path, str]]) -> None:
        """Record each image that cannot be decoded although its structure is complete, unless its file has changed.

        Args:
            images: path of each image, and the signature of its file when it was decoded.
        """
        results: list[tuple[Path, Sequence[int], CheckedImage]] = []
        for path, signature in images:
            stamp = file_stamp(path)  # before the file is read, as in `_check_batch`
            with suppress(OSError):
                if stamp is not None and file_signature(read_file(path)) == signature:
                    results.append((path, stamp, CheckedImage(signature, _DAMAGED)))
        self.update(results)

    def update(self, results: Sequence[tuple[Path, Sequence[int], CheckedImage]]) -> None:
        """Add the path, the stamp and the result of each newly checked image, and write the file."""
        if self._path is None or not results:
            return
        rows = [
            [_path_key(path), *stamp, int(image.signature.partition("-")[2], 16), *image.size]
            for path, stamp, image in results
        ]
        self._load()  # Another process may have written the file meanwhile.
        self._add(np.array(rows, np.int64))
        with suppress(InputError), atomic_file(self._path) as file:
            np.savez(file, rows=self._rows)


def _path_key(path: Path) -> int:
    """Return a 64-bit hash of the absolute path of a file, as a signed integer."""
    digest = hashlib.blake2b(os.fsencode(os.path.abspath(path)), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@dataclass(frozen=True)
class CheckReport:
    """Result of the check of several images, as returned by `check_images`.

    Attributes:
        signatures: signature of each image, as defined at `CheckedImage`; "" for a missing or corrupt image.
        sizes: (height, width) of each image in pixels; (0, 0) for a missing or corrupt image.
        missing: paths of the missing files.
        unreadable: (path, reason) of each empty, truncated or otherwise corrupt file.
    """

    signatures: list[str]
    sizes: list[tuple[int, int]]
    missing: list[Path]
    unreadable: list[tuple[Path, str]]

    @property
    def problems(self) -> list[tuple[Path, str]]:
        """Return the (path, reason) of each missing or corrupt file. The missing files come first."""
        return [(path, "missing") for path in self.missing] + self.unreadable


def check_images(
    items: Sequence[ImageItem | str | Path],
    workers: int | None = None,
    decode: bool = False,
    cache: Path | None = None,
) -> CheckReport:
    """Check that image files exist and are complete, without decoding them.

    The check finds missing and empty files, FIFOs and devices, files that are not images in one of `FORMATS` or
    `NEEDS_PACKAGE`, JPEG files without an end marker, PNG files without the last chunk, images with more than
    `MAX_PIXELS` pixels, and empty crops. Bytes after the end of an image are accepted, because every decoder ignores
    them. Damage inside a file is found only by decoding it.

    Args:
        items: images, or paths of images.
        workers: number of threads; by default, 4 per CPU and at most 32, because the threads mostly wait for the disk.
        decode: whether to decode every image too, which also finds damage inside files but takes much longer.
        cache: file that keeps the results for later calls, see `CheckCache`; None to read all files.
    """
    report, known = CheckReport([], [], [], []), CheckCache(cache)
    starts = range(0, len(items), _BATCH)
    check = partial(_check_batch, items, decode=decode, known=known)
    new: list[tuple[Path, Sequence[int], CheckedImage]] = []
    with ThreadPoolExecutor(workers or min(32, 4 * (os.cpu_count() or 1))) as pool:
        for start, (results, checked) in zip(starts, pool.map(check, starts), strict=True):
            new += checked
            if len(new) >= _SAVED_IMAGES:
                known.update(new)
                new = []
            for row, result in enumerate(results, start):
                image = result if isinstance(result, CheckedImage) else CheckedImage("", (0, 0))
                report.signatures.append(image.signature)
                report.sizes.append(image.size)
                if isinstance(result, FileNotFoundError):
                    report.missing.append(_path_and_box(items[row])[0])
                elif isinstance(result, Exception):
                    report.unreadable.append((_path_and_box(items[row])[0], reason_of(result)))
    known.update(new)
    return report


def check_image(data: bytes, decode: bool = False) -> CheckedImage:
    """Check one image as `check_images` does.

    Args:
        data: contents of the image file.
        decode: whether to decode the image too.

    Raises:
        CorruptImageError: the image is incomplete or damaged.
    """
    with open_image(data) as image:
        require_end(image.format, data)
        width, height = upright_size(image)
    if decode:
        decode_image(data)
    return CheckedImage(file_signature(data), (height, width))


def _check_batch(
    items: Sequence[ImageItem | str | Path], start: int, decode: bool, known: CheckCache
) -> tuple[list[CheckedImage | Exception], list[tuple[Path, Sequence[int], CheckedImage]]]:
    """Check up to `_BATCH` images, starting at `items[start]`.

    Returns:
        For each image, the result of the check, or the error if the image is missing or corrupt; and the path, the
        stamp and the result, without the crop, of each image that was read.
    """
    results: list[CheckedImage | Exception] = []
    new: list[tuple[Path, Sequence[int], CheckedImage]] = []
    for path, box in map(_path_and_box, items[start : start + _BATCH]):
        try:
            stamp = file_stamp(path)  # before the file is read, so that a later change is noticed
            is_stable = stamp is not None and is_settled(stamp)
            image = None if decode else known.get(path, stamp)
            if image is None:
                image = check_image(read_file(path), decode)
                new += [(path, stamp, image)] if stamp is not None and is_stable else []
            if image.size == _DAMAGED:
                raise CorruptImageError("damaged inside, which was found when it was decoded; repair or replace it")
            results.append(image if box is None else CheckedImage(image.signature, _cropped_size(box, image.size)))
        except (OSError, CorruptImageError) as error:
            results.append(error)
    return results, new


def _cropped_size(box: Box, size: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) of a crop of an image of the (height, width) `size`."""
    left, top, right, bottom = box_bounds(box, *size[::-1])
    return bottom - top, right - left


def _path_and_box(item: ImageItem | str | Path) -> tuple[Path, Box | None]:
    """Return the path of an image, and its crop or None if it has no crop."""
    return (item.path, item.box) if isinstance(item, ImageItem) else (Path(item), None)
