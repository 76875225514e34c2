"""Check that image files exist and are complete, and compute signatures that reveal later changes of the files."""

import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from superglobal.data.images import (
    Box,
    CorruptImageError,
    ImageItem,
    box_bounds,
    decode_image,
    open_image,
    reason_of,
    require_end,
    upright_size,
)
from superglobal.utils.io import open_file

# numbers of bytes to read at the start of a file (enough for almost every header) and at the end
_HEAD, _TAIL = 65_536, 4_096
_BATCH = 512  # number of images that one task of a thread checks
_COMPRESSED = ("JPEG", "MPO", "PNG", "WEBP", "GIF")


class CheckedImage(NamedTuple):
    """Result of the check of an image that is complete.

    Attributes:
        signature: file size and CRC-32 of the contents, to detect changes of the file. For a large compressed file, the
            CRC-32 covers only the first 64 KB and the last 4 KB. A change of the image almost
            always changes these bytes too.
        size: (height, width) in pixels: of the crop if there is one, else of the whole upright image.
    """

    signature: str
    size: tuple[int, int]


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
    items: Sequence[ImageItem | str | Path], workers: int | None = None, decode: bool = False
) -> CheckReport:
    """Check that image files exist and are complete, without decoding them.

    This is fast enough for a million files. The check finds missing and empty files, FIFOs and devices, files
    that are not images in one of `FORMATS`, JPEG files without an end marker, PNG files without the last chunk, images
    with more than `MAX_PIXELS` pixels, and empty crops. Bytes after the end of an image are accepted, because every
    decoder ignores them. Damage inside a file is found only by decoding it.

    Args:
        items: images, or paths of images.
        workers: number of threads; by default, 4 per CPU and at most 32, because the threads mostly wait for the disk.
        decode: whether to decode every image too, which also finds damage inside files but takes much longer.
    """
    report = CheckReport([], [], [], [])
    starts = range(0, len(items), _BATCH)
    check = partial(_check_batch, items, decode=decode)
    with ThreadPoolExecutor(workers or min(32, 4 * (os.cpu_count() or 1))) as pool:
        for start, results in zip(starts, pool.map(check, starts), strict=True):
            for row, result in enumerate(results, start):
                image = result if isinstance(result, CheckedImage) else CheckedImage("", (0, 0))
                report.signatures.append(image.signature)
                report.sizes.append(image.size)
                if isinstance(result, FileNotFoundError):
                    report.missing.append(_path_and_box(items[row])[0])
                elif isinstance(result, Exception):
                    report.unreadable.append((_path_and_box(items[row])[0], reason_of(result)))
    return report


def check_image(
    read: Callable[[int, int], bytes], size: int, box: Box | None = None, decode: bool = False
) -> CheckedImage:
    """Check that one image file is complete, in the same way as `check_images`.

    Args:
        read: function of (start, count) that returns `count` bytes of the image file, from the offset `start`.
        size: size of the file in bytes.
        box: crop (x1, y1, x2, y2) in pixels of the upright image; None for the whole image.
        decode: whether to decode the image too.

    Raises:
        CorruptImageError: the image is incomplete or damaged, or the crop is empty.
    """
    if size <= _HEAD + _TAIL:
        head = tail = read(0, size)
        width, height, compressed = _inspect(head, tail)
    else:
        head, tail = read(0, _HEAD), read(size - _TAIL, _TAIL)
        try:
            width, height, compressed = _inspect(head, tail)
        except CorruptImageError:
            # The header may be longer than `head`, or more than 4 KB may follow the end of the image. The image may
            # therefore be complete. Read the whole file, and check again.
            data = read(0, size)
            width, height, compressed = _inspect(data, data)
    if not compressed:
        head = tail = read(0, size)
    if decode:
        decode_image(read(0, size))
    left, top, right, bottom = (0, 0, width, height) if box is None else box_bounds(box, width, height)
    signature = f"{size}-{zlib.crc32(head):08x}" + ("" if head is tail else f"{zlib.crc32(tail):08x}")
    return CheckedImage(signature, (bottom - top, right - left))


def _inspect(head: bytes, tail: bytes) -> tuple[int, int, bool]:
    """Read the header of an image, and check that its end is not missing.

    Args:
        head: start of the file, or the complete file.
        tail: `head` itself if that is the complete file, else the end of the file, which must not overlap `head`.

    Returns:
        The width and height of the upright image in pixels, and whether its format is compressed.

    Raises:
        CorruptImageError: the header is damaged, or the end of the image is missing.
    """
    with open_image(head) as image:
        require_end(image.format, head, tail)
        return *upright_size(image), image.format in _COMPRESSED


def _check_batch(items: Sequence[ImageItem | str | Path], start: int, decode: bool) -> list[CheckedImage | Exception]:
    """Check up to `_BATCH` images, starting at `items[start]`.

    Returns:
        For each image, the result of the check, or the error if the image is missing or corrupt.
    """
    results: list[CheckedImage | Exception] = []
    for path, box in map(_path_and_box, items[start : start + _BATCH]):
        try:
            with open_file(path) as file:
                results.append(check_image(partial(_read_at, file), os.fstat(file.fileno()).st_size, box, decode))
        except (OSError, CorruptImageError) as error:
            results.append(error)
    return results


def _read_at(file: BinaryIO, start: int, count: int) -> bytes:
    """Read `count` bytes of an open file, starting at the offset `start`."""
    file.seek(start)
    return file.read(count)


def _path_and_box(item: ImageItem | str | Path) -> tuple[Path, Box | None]:
    """Return the path of an image, and its crop or None if it has no crop."""
    return (item.path, item.box) if isinstance(item, ImageItem) else (Path(item), None)
