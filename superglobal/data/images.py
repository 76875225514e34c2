"""Read images with exactly the pixels of the reference implementation, and raise an error for truncated files.

The reference reads images with `cv2.imread(path, cv2.IMREAD_COLOR)` (its test/dataset.py). For a truncated file, OpenCV
returns a partly gray image without an error, while Pillow raises an error. Images are therefore decoded with Pillow.
Both use libjpeg-turbo, and their pixels are identical for 8-bit JPEG, PNG, WebP, BMP and TIFF. Where the pixels would
differ (CMYK, 16 bits, TIFF with alpha, GIF with transparency), Pillow validates the file and OpenCV decodes it. Pillow
alone decodes AVIF and HEIC images; HEIC needs the package pillow-heif.

Neither decoder detects damage to the compressed data of a JPEG if the structure of the file is still valid.
"""

import io
import math
import re
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image, features

from superglobal.errors import InputError
from superglobal.utils.io import read_file

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif")
MAX_PIXELS = 128_000_000  # maximum number of pixels of an image; decoding takes about 10 bytes per pixel
# The only formats that are opened, with those of `NEEDS_PACKAGE`; JPEG includes MPO. Pillow passes others, such as EPS,
# to external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# Reasons of the check for an image whose format needs an optional package. Messages count these images.
NEEDS_PACKAGE = {
    "AVIF": "AVIF images need Pillow 11.3 or later: pip install --upgrade pillow",
    "HEIF": "HEIC images need the package pillow-heif: pip install pillow-heif",
}
_BRANDS = {  # first bytes of a file after "ftyp" -> format; mif1 and msf1 are used by both
    "AVIF": (b"avif", b"avis"),
    "HEIF": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
}

Box = tuple[float, float, float, float]
"""Crop of an image: left, top, right and bottom edge (x1, y1, x2, y2) in pixels."""

# maximum number of segments and fill bytes before the image data of a JPEG; each costs Pillow about a microsecond. In
# an image with many scans, it is the maximum number of segments.
_MAX_SEGMENTS = 100_000
_MAX_SCANS = 20  # maximum number of scans of a JPEG with `MAX_PIXELS` pixels; a usual progressive JPEG has ten
# Start of a segment of a JPEG. Decoders skip all other bytes between segments and in the compressed data.
_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
_SCAN, _END = b"\xff\xda", b"\xff\xd9"  # markers of the start of a scan, and of the end of the image
_EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}
_SAME_AS_CV2 = {"JPEG", "MPO", "PNG", "WEBP"}
_SAME_BMP = {"1", "L", "P", "BGR", "BGRX", "BGRA", "RGBA"}  # Pillow's orders of channels in BMP files
_ORIENTATION_TAG, _BITS_PER_SAMPLE_TAG = 0x0112, 258
_UNDO_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_open_lock = threading.Lock()


@dataclass(frozen=True)
class ImageItem:
    """Image file with an optional crop.

    Attributes:
        path: image file.
        box: crop (x1, y1, x2, y2) in pixels of the upright image; None for the whole image. When the image is read, the
            values are truncated to integers and clipped to the image.
    """

    path: Path
    box: Box | None = None


class ImageList(NamedTuple):
    """Images to read for one store or data set.

    Attributes:
        items: images.
        max_side: maximum longer side in pixels, to which larger images are shrunk; None for no limit.
        signatures: `file_signature` that each image file is expected to have; None to read any file.
    """

    items: Sequence[ImageItem]
    max_side: int | None
    signatures: Sequence[str] | None = None


class CorruptImageError(InputError):
    """Error for a missing, truncated or damaged image file. The message gives only the reason; callers add the path."""


def file_signature(data: bytes) -> str:
    """Return the text that identifies an image: the size in bytes and the CRC-32 of the contents of its file."""
    return f"{len(data)}-{zlib.crc32(data):08x}"


def require_signature(data: bytes, signature: str | None) -> None:
    """Raise OSError if the contents of an image file do not have this `file_signature`; None or "" allows any."""
    if signature and signature != file_signature(data):
        raise OSError("the file has changed since it was checked; run the command again")


def read_image(
    path: str | Path, box: Box | None = None, max_side: int | None = None, signature: str | None = None
) -> np.ndarray:
    """Read an image as upright RGB, with exactly the pixels of `cv2.imread(path)[..., ::-1]`.

    The alpha channel is dropped, and 16-bit files are converted to 8 bits as in OpenCV. Of an animated GIF or a
    multi-page file, the first frame is read. TIFF files with EXIF orientations 5 to 8, which OpenCV 5.0 cannot read,
    are rotated upright.

    Args:
        path: image file.
        box: crop (x1, y1, x2, y2) in pixels, truncated to integers as in the reference implementation and clipped to
            the image; None for the whole image.
        max_side: maximum longer side in pixels after the crop; larger images are shrunk by `shrink`. None means no
            limit.
        signature: expected `file_signature` of the file; None to read any file.

    Returns:
        (H, W, 3) uint8, contiguous and writable.

    Raises:
        InputError: the file is missing, empty, truncated, not an image or larger than `MAX_PIXELS`, it does not have
            the expected signature, or the crop is empty.
    """
    path = Path(path)
    with add_path_to_errors(path):
        data = read_file(path)
        require_signature(data, signature)
        return crop_and_shrink(decode_image(data), box, max_side)


@contextmanager
def add_path_to_errors(path: Path) -> Iterator[None]:
    """Convert errors that are raised in the `with` statement to an InputError that names the image file `path`."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"image not found: {path}") from error
    except (OSError, CorruptImageError) as error:
        raise InputError(f"image cannot be read: {path}: {reason_of(error)}") from error


def crop_and_shrink(pixels: np.ndarray, box: Box | None, max_side: int | None) -> np.ndarray:
    """Crop an image to a box, and then shrink it.

    Args:
        pixels: (H, W, 3) uint8.
        box: crop (x1, y1, x2, y2) in pixels; None for the whole image.
        max_side: maximum longer side in pixels after the crop; None for no limit.

    Returns:
        A contiguous and writable copy of the result, (h, w, 3) uint8.
    """
    if box is not None:
        pixels = crop(pixels, box)
    # Copy, because the buffer of the decoder is read-only, and a view of it would keep the whole image in memory.
    return np.array(shrink(pixels, max_side), order="C")


def pil_pixels(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image to upright RGB without alpha.

    The pixels are those that `read_image` returns for the file of the image. For files that `read_image` decodes with
    OpenCV, such as GIFs with transparency and BMPs with 16 bits per pixel, they are those of Pillow.

    Returns:
        (H, W, 3) uint8, possibly read-only.

    Raises:
        InputError: the image does not have 8 bits per channel. OpenCV must decode such images from their files.
    """
    if image.mode not in _EIGHT_BIT_MODES:
        raise InputError(f"Pillow image of mode {image.mode}: expected 8 bits per channel; pass the path of its file")
    upright = _UNDO_ORIENTATION.get(0 if image.format == "TIFF" else _orientation(image))
    rgb = image if image.mode == "RGB" else image.convert("RGB")  # The conversion would copy an RGB image.
    return np.asarray(rgb if upright is None else rgb.transpose(upright))


def crop(pixels: np.ndarray, box: Box) -> np.ndarray:
    """Crop an image, (H, W, 3), to a box. The result is a view of the image.

    Raises:
        CorruptImageError: the box is not finite, or the crop is empty.
    """
    x1, y1, x2, y2 = box_bounds(box, *pixels.shape[1::-1])
    return pixels[y1:y2, x1:x2]


def image_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Convert an image from a NumPy array (H, W, 3) uint8 to a tensor (3, H, W) uint8."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def shrink(pixels: np.ndarray, max_side: int | None) -> np.ndarray:
    """Shrink an image so that its longer side has at most `max_side` pixels.

    The image is resized by Pillow's antialiased bicubic filter, and keeps its aspect ratio. An image that is small
    enough is returned unchanged, without a copy.

    Args:
        pixels: (H, W, 3) uint8.
        max_side: maximum longer side in pixels; None for no limit.

    Raises:
        InputError: `max_side` is less than 1.
    """
    height, width = shrunk_size(pixels.shape[:2], max_side)
    if (height, width) == pixels.shape[:2]:
        return pixels
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def shrunk_size(size: Sequence[int], max_side: int | None) -> tuple[int, int]:
    """Return the (height, width) in pixels to which `shrink` resizes an image of the (height, width) `size`.

    Raises:
        InputError: `max_side` is less than 1.
    """
    if max_side is not None and max_side < 1:
        raise InputError(f"max_side={max_side}: expected an integer >= 1, or None for no limit")
    height, width = size
    if max_side is None or max(height, width) <= max_side:
        return height, width
    ratio = max_side / max(height, width)
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the (width, height) in pixels that an open image has after it is rotated upright."""
    # Pillow rotates TIFF images itself, so their size is already that of the upright image.
    transposed = image.format != "TIFF" and _orientation(image) >= 5
    return (image.height, image.width) if transposed else image.size


def require_end(file_format: str | None, data: bytes) -> None:
    """Check that a JPEG or PNG file is not truncated.

    Args:
        file_format: format that Pillow detected.
        data: contents of the file.

    Raises:
        CorruptImageError: the end of the image is missing.
    """
    if file_format in ("JPEG", "MPO"):
        # An EXIF thumbnail has an end marker too, but precedes the image data. Search only after the start of the data.
        scan = _scan_start(data)
        if scan < 0 or data.rfind(_END, scan) < 0:
            raise CorruptImageError("truncated JPEG (no end-of-image marker)")
    elif file_format == "PNG" and data.rfind(b"IEND\xaeB`\x82") < 0:
        raise CorruptImageError("truncated PNG (no IEND chunk)")


def _scan_start(data: bytes) -> int:
    """Return the offset of the first byte after the first start-of-scan marker in a JPEG file.

    `data` is the start of the file, or the whole file. If it ends before this marker, return -1.

    Raises:
        CorruptImageError: there are more than `_MAX_SEGMENTS` segments and stray bytes before this marker.
    """
    position, cost = 2, 0
    while match := _SEGMENT.search(data, position):
        cost += match.start() - position + 1
        if cost > _MAX_SEGMENTS:
            raise CorruptImageError(f"damaged header (no image data after {cost} segments and fill bytes)")
        if match[0] == _SCAN:
            return match.end()
        position = _segment_end(data, match.end())
    return -1


def _segment_end(data: bytes, start: int) -> int:
    """Return the offset of the end of a JPEG segment, whose marker ends at `start` and is followed by its length."""
    return start + int.from_bytes(data[start : start + 2], "big")


def _require_few_scans(data: bytes, pixels: int) -> None:
    """Raise CorruptImageError if a JPEG file with this number of pixels has too many scans.

    Each scan of a progressive JPEG refines all pixels, so it can take as long to decode as a whole image.
    """
    limit = _MAX_SCANS * MAX_PIXELS // pixels
    if data.count(_SCAN) <= limit:  # Bytes inside other segments and after the image count too, so this is a bound.
        return
    position, scans, segments = _scan_start(data) - 2, 0, 0
    while (match := _SEGMENT.search(data, position)) and match[0] != _END:
        scans, segments = scans + (match[0] == _SCAN), segments + 1
        if scans > limit or segments > _MAX_SEGMENTS:
            raise CorruptImageError(
                f"more than {limit} scans or {_MAX_SEGMENTS} segments take too long to decode; save the image again in "
                "an image editor"
            )
        position = _segment_end(data, match.end())


class _TimedFile(io.BytesIO):
    """File in memory that raises CorruptImageError when a decoder still reads it after `seconds`."""

    def __init__(self, data: bytes, seconds: float) -> None:
        super().__init__(data)
        self.seconds, self.end = seconds, time.monotonic() + seconds

    def read(self, size: int | None = -1, /) -> bytes:
        if time.monotonic() > self.end:
            raise CorruptImageError(f"decoding takes more than {self.seconds:g} s; save it again in an image editor")
        return super().read(size)


def open_image(data: bytes, max_pixels: int = MAX_PIXELS, seconds: float = math.inf) -> Image.Image:
    """Parse the header of an image file, and return the image, which is not decoded yet.

    Args:
        data: contents of the file, or of its start.
        max_pixels: maximum number of pixels of the image.
        seconds: time after which Pillow stops reading the file.

    Raises:
        CorruptImageError: the file is empty or not an image in a supported format, its header is damaged, or the image
            has more than `max_pixels` pixels or too many scans.
    """
    if not data:
        raise CorruptImageError("empty file (0 bytes)")
    is_jpeg = data.startswith(b"\xff\xd8")
    if is_jpeg:
        _scan_start(data)  # Pillow would parse a header of millions of segments for a long time.
    # Disable Pillow's global limit against decompression bombs, 89 megapixels. The limit MAX_PIXELS is checked below.
    with _open_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(_TimedFile(data, seconds), formats=_formats(data))
        except Image.UnidentifiedImageError as error:
            raise CorruptImageError(
                f"not an image (JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF or HEIC), or truncated in its header: "
                f"{data[:12]!r}..."
            ) from error
        except CorruptImageError:
            raise
        except Exception as error:  # Plugins raise SyntaxError, struct.error, ValueError and others.
            raise CorruptImageError(f"damaged header ({error})") from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    if image.width * image.height > max_pixels:
        size = f"{image.width} x {image.height}"
        raise CorruptImageError(f"{size} pixels, expected at most {max_pixels / 1e6:g} megapixels; shrink the image")
    if is_jpeg:
        _require_few_scans(data, image.width * image.height)
    return image


def _formats(data: bytes) -> tuple[str, ...]:
    """Return the formats that Pillow may try for a file with the contents `data`.

    Raises:
        CorruptImageError: the file is an AVIF or HEIC image, and the package that reads it is not installed.
    """
    if data[4:8] != b"ftyp":
        return FORMATS
    image_format = next((name for name, brands in _BRANDS.items() if data[8:12] in brands), None)
    if image_format == "HEIF" and b"avif" in data[12:64]:
        image_format = "AVIF"
    # Before Pillow 11.3, `features.check` warns about the unknown name.
    has_avif = image_format == "AVIF" and "avif" in features.modules and features.check("avif")
    if image_format and not (has_avif if image_format == "AVIF" else _register_heif()):
        raise CorruptImageError(NEEDS_PACKAGE[image_format])
    return (image_format,) if image_format else FORMATS


@cache
def _register_heif() -> bool:
    """Let Pillow open HEIC images, and return True, if the package pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener(thumbnails=False)
    return True


def image_size(data: bytes) -> tuple[int, int]:
    """Return the (width, height) in pixels of the upright image, from the header of the image file `data`.

    Raises:
        CorruptImageError: the file is not an image, its header is damaged, or the image has too many pixels.
    """
    with open_image(data) as image:
        return upright_size(image)


def decode_image(
    data: bytes, reduction: int = 1, max_pixels: int = MAX_PIXELS, seconds: float = math.inf
) -> np.ndarray:
    """Decode an image file, with the pixels that `read_image` returns.

    Args:
        data: contents of the whole file.
        reduction: 2, 4 or 8 to decode a JPEG at 1/2, 1/4 or 1/8 of its width and height, which is faster. Images in
            formats and color spaces that do not support this are decoded at full size.
        max_pixels: maximum number of pixels of the image.
        seconds: time after which Pillow stops reading the file.

    Returns:
        Upright RGB image, (H, W, 3) uint8, possibly read-only. If `reduction` applies, H and W are rounded up.

    Raises:
        CorruptImageError: the image is truncated, damaged, or too large, or decoding it takes too long.
    """
    with open_image(data, max_pixels, seconds) as image:
        # Pillow raises no error for a truncated image if other code has set its global LOAD_TRUNCATED_IMAGES.
        require_end(image.format, data)
        if image.mode in ("I", "F"):
            raise CorruptImageError("32-bit pixels, expected 8 or 16 bits; convert the file")
        same = _same_as_cv2(image)
        if same and reduction > 1 and image.format in ("JPEG", "MPO"):
            image.draft(None, (max(1, image.width // reduction), max(1, image.height // reduction)))
        try:
            image.load()
        except CorruptImageError:
            raise
        except Exception as error:  # Plugins raise errors of any type.
            raise CorruptImageError(f"truncated or damaged ({error})") from error
        if same:
            image.info.pop("transparency", None)  # Pillow would warn that the conversion to RGB drops the transparency.
            return pil_pixels(image)
        file_format, mode = image.format, image.mode
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise CorruptImageError(f"OpenCV cannot decode it ({error})") from error
    if pixels is None:
        raise CorruptImageError(f"OpenCV cannot decode this kind of {file_format} ({mode}); convert it to PNG or JPEG")
    return pixels[..., ::-1]


def _same_as_cv2(image: Image.Image) -> bool:
    """Return True if Pillow decodes an image of this format and color mode, because OpenCV has the same pixels or none.

    `image` is not decoded yet. tests/test_images.py compares the pixels for each format and mode.
    """
    if image.format == "TIFF":  # OpenCV premultiplies alpha, and rounds 16 bits in another way.
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE_TAG, (1,))
        return image.mode in ("1", "L", "P", "RGB") and max(bits) <= 8
    tile = next(iter(getattr(image, "tile", [])), None)
    if image.format == "GIF":  # OpenCV has another color for pixels that the first frame leaves transparent or out.
        return tile is not None and tile[1] == (0, 0, *image.size) and "transparency" not in image.info
    if image.format == "BMP":  # OpenCV converts 5 and 6 bits per channel, and unusual orders of channels, otherwise.
        return tile is not None and tile[3][0] in _SAME_BMP
    if image.format in NEEDS_PACKAGE:  # OpenCV does not read HEIC, and the reference implementation has neither format.
        return True
    return image.format in _SAME_AS_CV2 and image.mode in _EIGHT_BIT_MODES


def is_plain_jpeg(image: Image.Image) -> bool:
    """Return True if an open image is a JPEG in grayscale or YCbCr without EXIF rotation.

    All decoders interpret these color spaces in the same way.
    """
    if image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB") or _orientation(image) != 1:
        return False
    # libjpeg decodes an image whose components are named R, G and B as RGB, but other decoders may not.
    components = bytes(component[0] for component in getattr(image, "layer", ()))
    is_rgb = image.info.get("adobe_transform") == 0 or components == b"RGB"
    return image.mode == "L" or not is_rgb


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an open image, 1 to 8. If there is no valid orientation, return 1 (upright)."""
    # Do not use Pillow's getexif: it also reads the orientation in XMP metadata, which OpenCV ignores.
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        value = exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # OpenCV ignores damaged EXIF data too.
        return 1
    return value if value in _UNDO_ORIENTATION else 1


def box_bounds(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """Convert a box to an integer crop inside the image.

    The values are truncated as in the reference implementation, `im[int(y1):int(y2), int(x1):int(x2)]`, and clipped to
    the image.

    Args:
        box: (x1, y1, x2, y2) in pixels.
        width: width of the image in pixels.
        height: height of the image in pixels.

    Returns:
        (x1, y1, x2, y2) in pixels.

    Raises:
        CorruptImageError: the box is not finite, or the crop is empty.
    """
    if not all(math.isfinite(value) for value in box):
        raise CorruptImageError(f"box {tuple(box)} is not finite")
    x1, y1, x2, y2 = (max(0, int(value)) for value in box)  # Clip: NumPy counts negative indices from the end.
    x2, y2 = min(x2, width), min(y2, height)
    if x1 >= x2 or y1 >= y2:
        raise CorruptImageError(f"box {tuple(box)} does not overlap the image of {width} x {height} pixels")
    return x1, y1, x2, y2


def reason_of(error: Exception) -> str:
    """Return the reason why a file cannot be read, for messages. It is the message of `error` without the path."""
    if isinstance(error, IsADirectoryError):
        return "a folder, not a file"
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
