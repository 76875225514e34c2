"""Check before a computation that image files exist and are complete, and compute a signature of their contents."""

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

_HEAD, _TAIL = 65_536, 4_096  # number of bytes read at the start (enough for almost every header) and at the end
_BATCH = 512  # images that a thread checks at a time
_COMPRESSED = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "AVIF", "JPEG2000")


class CheckedImage(NamedTuple):
    """Result for a complete image.

    Attributes:
        signature: file size and CRC-32 of the contents, for fingerprints. Only the first 64 KB and the last 4 KB of a
            large compressed file are used, because a change of the image changes them too.
        size: (height, width) of the upright image, or of its box, in pixels.
    """

    signature: str
    size: tuple[int, int]


@dataclass(frozen=True)
class CheckReport:
    """Result of `check_images`.

    Attributes:
        signatures: signature per image, see `CheckedImage`; empty for a missing or corrupt one.
        sizes: (height, width) per image, (0, 0) for a missing or corrupt one.
        missing: paths of missing files.
        unreadable: path and reason of each empty, truncated or otherwise corrupt file.
    """

    signatures: list[str]
    sizes: list[tuple[int, int]]
    missing: list[Path]
    unreadable: list[tuple[Path, str]]

    @property
    def problems(self) -> list[tuple[Path, str]]:
        """Path and reason of each missing or unreadable file, the missing ones first."""
        return [(path, "missing") for path in self.missing] + self.unreadable


def check_images(
    items: Sequence[ImageItem | str | Path], workers: int | None = None, decode: bool = False
) -> CheckReport:
    """Check image files without decoding them, which is fast enough for a million files.

    The check detects files that are missing or empty, that do not start as an image, JPEGs without their end marker,
    PNGs without their last chunk, images over `MAX_PIXELS` and empty boxes. Bytes after the end of an image are
    accepted, as in every decoder. Damage inside a file is only found by decoding it.

    Args:
        items: images or plain paths.
        workers: number of threads; by default 4 per CPU and at most 32, because most of the time is spent on disk
            access.
        decode: whether to decode every image too, which also finds damage inside files, but takes much longer.
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
    """Check one image as `check_images` does.

    Args:
        read: function of (start, count) that returns these bytes of the image file.
        size: size of the file in bytes.
        box: as in `ImageItem`.
        decode: whether to decode the image too.

    Raises:
        CorruptImageError: the image is incomplete or damaged, or the box is empty.
    """
    if size <= _HEAD + _TAIL:
        head = tail = read(0, size)
        width, height, compressed = _inspect(head, tail)
    else:
        head, tail = read(0, _HEAD), read(size - _TAIL, _TAIL)
        try:
            width, height, compressed = _inspect(head, tail)
        except CorruptImageError:
            # The header may be longer, or many bytes may follow the end of the image, so check the complete file.
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
    """Return (width, height, compressed) of an upright image from its header, after checking its end.

    `head` and `tail` are the same object if `head` is the complete file. Otherwise they do not overlap.
    """
    with open_image(head) as image:
        require_end(image.format, head, tail)
        return *upright_size(image), image.format in _COMPRESSED


def _check_batch(items: Sequence[ImageItem | str | Path], start: int, decode: bool) -> list[CheckedImage | Exception]:
    results: list[CheckedImage | Exception] = []
    for path, box in map(_path_and_box, items[start : start + _BATCH]):
        try:
            with path.open("rb") as file:
                results.append(check_image(partial(_read_at, file), os.fstat(file.fileno()).st_size, box, decode))
        except (OSError, CorruptImageError) as error:
            results.append(error)
    return results


def _read_at(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count)


def _path_and_box(item: ImageItem | str | Path) -> tuple[Path, Box | None]:
    return (item.path, item.box) if isinstance(item, ImageItem) else (Path(item), None)
