"""Photos checked before anything is computed: each is there, opens, has its end, and is known by its bytes."""

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

_HEAD, _EDGE = 65_536, 4_096  # bytes: enough for nearly every header; what a signature covers at either end
_BATCH = 512  # images that a thread checks at a time
_COMPRESSED = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "AVIF", "JPEG2000")


class Checked(NamedTuple):
    """One sound image.

    Attributes:
        signature: file size and CRC-32 for fingerprints. Of a large compressed file the first 64 and the last 4 KB
            count: an edit that keeps both and the size does not happen by itself there. Of any other file every byte
            counts.
        size: (height, width) of the upright image, of its box if it has one, in pixels.
    """

    signature: str
    size: tuple[int, int]


@dataclass(frozen=True)
class CheckReport:
    """What `check_images` found, one entry per image in the order given."""

    signatures: list[str]
    """Of `Checked`, empty where there is a problem."""
    sizes: list[tuple[int, int]]
    """Of `Checked`, (0, 0) where there is a problem."""
    missing: list[Path]
    unreadable: list[tuple[Path, str]]
    """Empty, truncated, not an image, ...: the path and the reason."""

    @property
    def problems(self) -> list[tuple[Path, str]]:
        """Everything wrong, the missing files first."""
        return [(path, "missing") for path in self.missing] + self.unreadable


def check_images(
    items: Sequence[ImageItem | str | Path], workers: int | None = None, decode: bool = False
) -> CheckReport:
    """Look at every file without decoding it, fast enough for a million files.

    Found are files that are missing or empty, that do not begin as an image, JPEGs without their end marker,
    PNGs without their last chunk, images over `MAX_PIXELS` and boxes that cut out nothing. Trailing bytes
    after the end are accepted, as every decoder does. Damage in the middle of a file shows only on reading.

    Args:
        items: images or plain paths.
        workers: threads; by default 4 per CPU, at most 32, since the time goes into waiting for the disk.
        decode: decode every image as well, so that damage in the middle shows; as slow as reading them all.
    """
    starts = range(0, len(items), _BATCH)
    report = CheckReport([], [], [], [])
    check = partial(_check_batch, items, decode=decode)
    with ThreadPoolExecutor(workers or min(32, 4 * (os.cpu_count() or 1))) as pool:
        for start, outcomes in zip(starts, pool.map(check, starts), strict=True):
            for number, outcome in enumerate(outcomes, start):
                sound = outcome if isinstance(outcome, Checked) else Checked("", (0, 0))
                report.signatures.append(sound.signature)
                report.sizes.append(sound.size)
                if isinstance(outcome, FileNotFoundError):
                    report.missing.append(_place(items[number])[0])
                elif isinstance(outcome, Exception):
                    report.unreadable.append((_place(items[number])[0], reason_of(outcome)))
    return report


def check_image(read: Callable[[int, int], bytes], size: int, box: Box | None = None, decode: bool = False) -> Checked:
    """Check one image wherever its bytes are, as `check_images` does.

    Args:
        read: (start, count) -> those bytes of it.
        size: of the whole, in bytes.
        box: as in `ImageItem`.
        decode: decode it too.

    Raises:
        CorruptImageError: it is not a whole image, or the box cuts nothing out of it.
    """
    if size <= _HEAD + _EDGE:
        head = tail = read(0, size)
        width, height, compressed = _inspect(head, tail)
    else:
        head, tail = read(0, _HEAD), read(size - _EDGE, _EDGE)
        try:
            width, height, compressed = _inspect(head, tail)
        except CorruptImageError:  # a long header, or much behind the end: only the whole file can tell
            whole = read(0, size)
            width, height, compressed = _inspect(whole, whole)
    if not compressed:
        head = tail = read(0, size)
    if decode:
        decode_image(read(0, size))
    left, top, right, bottom = (0, 0, width, height) if box is None else box_bounds(box, width, height)
    signature = f"{size}-{zlib.crc32(head):08x}" + ("" if head is tail else f"{zlib.crc32(tail):08x}")
    return Checked(signature, (bottom - top, right - left))


def _place(item: ImageItem | str | Path) -> tuple[Path, Box | None]:
    return (item.path, item.box) if isinstance(item, ImageItem) else (Path(item), None)


def _check_batch(items: Sequence[ImageItem | str | Path], start: int, decode: bool) -> list[Checked | Exception]:
    outcomes: list[Checked | Exception] = []
    for path, box in map(_place, items[start : start + _BATCH]):
        try:
            with path.open("rb") as file:
                outcomes.append(check_image(partial(_read_at, file), os.fstat(file.fileno()).st_size, box, decode))
        except (OSError, CorruptImageError) as error:
            outcomes.append(error)
    return outcomes


def _read_at(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count)


def _inspect(head: bytes, tail: bytes) -> tuple[int, int, bool]:
    """(width, height, compressed) of the upright image if its header opens and its end is there.

    `tail` is either `head` itself, when that is the whole file, or lies wholly behind it.
    """
    with open_image(head) as image:
        require_end(image.format, head, tail)
        return *upright_size(image), image.format in _COMPRESSED
