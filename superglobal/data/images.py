"""Photos as arrays: read strictly, with the reference's pixels.

The reference reads with `cv2.imread(path, cv2.IMREAD_COLOR)` (its test/dataset.py). cv2 answers a truncated file
with a half-grey picture and no error, so Pillow, which refuses it, decodes here. Both bundle libjpeg-turbo;
for 8-bit JPEG, PNG, WebP, BMP and TIFF their pixels were measured identical. Where the two differ (CMYK,
16 bits, TIFF with alpha, rare formats) Pillow vouches for the file and cv2 gives the pixels.

What no decoder here reports is damage inside a JPEG's scan that leaves its structure whole: libjpeg paints on.
"""

import io
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from superglobal.errors import InputError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_PIXELS = 500_000_000

Box = tuple[float, float, float, float]

_EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}
_SAME_AS_CV2 = {"JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF"}
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
    """One image of a set; `box` is (x1, y1, x2, y2) in pixels of the upright image."""

    path: Path
    box: Box | None = None


class CorruptImageError(InputError):
    """A photo's bytes are not there or are not a whole image; the message is the reason, the caller knows the place."""


def read_image(path: str | Path, box: Box | None = None, max_side: int | None = None) -> np.ndarray:
    """Read one photo whole, upright and in RGB, bit for bit as `cv2.imread(path)[..., ::-1]` gives it.

    Alpha is dropped (as cv2 does), 16-bit files become 8-bit by cv2's rule, the first frame of a GIF or of a
    multi-page file counts. TIFFs with EXIF orientations 5-8, which cv2 5.0 cannot read, are turned upright.

    Args:
        path: the file.
        box: (x1, y1, x2, y2) in pixels; truncated to integers as the reference does and clipped to the image.
        max_side: the longer side, after the crop, is brought down to this by `shrink`.

    Returns:
        (H, W, 3) uint8, contiguous and writable.

    Raises:
        InputError: the file is missing, empty, truncated or no image, is larger than `MAX_PIXELS`, or the
            crop is empty.
    """
    path = Path(path)
    with faults_named(path):
        return cropped_and_shrunk(decode_image(path.read_bytes()), box, max_side)


@contextmanager
def faults_named(path: Path) -> Iterator[None]:
    """Raise what is wrong with a file as an InputError that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"image not found: {path}") from error
    except (OSError, CorruptImageError) as error:
        raise InputError(f"image cannot be read: {path}: {reason_of(error)}") from error


def cropped_and_shrunk(pixels: np.ndarray, box: Box | None, max_side: int | None) -> np.ndarray:
    """Crop (H, W, 3) to a box, then shrink it: a contiguous and writable copy. Arguments as of `read_image`."""
    if box is not None:
        pixels = crop(pixels, box)
    # A decoder's buffer is read-only and a crop holds on to the whole picture: give the caller an own array.
    return np.array(shrink(pixels, max_side), order="C")


def pil_pixels(image: Image.Image) -> np.ndarray:
    """An open Pillow image as `read_image` would give its file: upright, alpha dropped.

    Returns:
        (H, W, 3) uint8.

    Raises:
        InputError: not an 8-bit image; how OpenCV would read it can only be told from the file.
    """
    if image.mode not in _EIGHT_BIT_MODES:
        raise InputError(f"a Pillow image of mode {image.mode} has no defined 8-bit form; give the path of its file")
    upright = _UNDO_ORIENTATION.get(0 if image.format == "TIFF" else _orientation(image))
    rgb = image.convert("RGB")
    return np.asarray(rgb if upright is None else rgb.transpose(upright))


def crop(pixels: np.ndarray, box: Box) -> np.ndarray:
    """What `box`, (x1, y1, x2, y2) as in `read_image`, cuts out of (H, W, 3): a view; CorruptImageError if nothing."""
    x1, y1, x2, y2 = box_bounds(box, *pixels.shape[1::-1])
    return pixels[y1:y2, x1:x2]


def image_tensor(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H, W) uint8 tensor."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def shrink(pixels: np.ndarray, max_side: int | None) -> np.ndarray:
    """`pixels`, (H, W, 3) uint8, with its longer side at most `max_side` (None: no limit).

    Antialiased (Pillow's bicubic); the aspect ratio is kept and no side falls under 1. An image that fits is
    returned as it is, not copied.

    Raises:
        InputError: `max_side` is under 1.
    """
    height, width = shrunk_size(pixels.shape[:2], max_side)
    if (height, width) == pixels.shape[:2]:
        return pixels
    return np.array(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def shrunk_size(size: Sequence[int], max_side: int | None) -> tuple[int, int]:
    """(height, width) of what `shrink` makes of an image of that size.

    Raises:
        InputError: `max_side` is under 1.
    """
    if max_side is not None and max_side < 1:
        raise InputError(f"max_side is {max_side}; expected at least 1 pixel, or none for no limit")
    height, width = size
    if max_side is None or max(height, width) <= max_side:
        return height, width
    ratio = max_side / max(height, width)
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an image as it is shown."""
    # A TIFF is turned by Pillow itself and shows its upright size already.
    turned = image.format != "TIFF" and _orientation(image) >= 5
    return (image.height, image.width) if turned else image.size


def require_end(file_format: str | None, head: bytes, tail: bytes) -> None:
    """Raise CorruptImageError for a JPEG or PNG without its end; `tail` is `head` itself or lies wholly behind it."""
    if file_format in ("JPEG", "MPO"):
        # A thumbnail in the EXIF block has an end marker of its own: only one behind the scan's start counts.
        scan = _scan_start(head)
        if scan < 0 or tail.rfind(b"\xff\xd9", scan if tail is head else 0) < 0:
            raise CorruptImageError("truncated JPEG (no end-of-image marker)")
    elif file_format == "PNG" and tail.rfind(b"IEND\xaeB`\x82") < 0:
        raise CorruptImageError("truncated PNG (no IEND chunk)")


def _scan_start(data: bytes) -> int:
    """Offset behind the first start-of-scan marker of a JPEG, -1 if `data` ends before it."""
    position = 2
    while position + 4 <= len(data):
        marker = data[position + 1]
        if data[position] != 0xFF:  # stray bytes between segments: decoders skip them
            position += 1
        elif marker == 0xDA:
            return position + 2
        elif marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # fill bytes and markers without a length
            position += 1 if marker in (0x00, 0xFF) else 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return -1


def open_image(data: bytes) -> Image.Image:
    """Open lazily: the header is parsed, nothing is decoded. CorruptImageError unless it opens."""
    if not data:
        raise CorruptImageError("empty file (0 bytes)")
    # Pillow's guard against decompression bombs is a global that warns from 89 megapixels; ours is below.
    with _open_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(io.BytesIO(data))
        except Image.UnidentifiedImageError as error:
            raise CorruptImageError(f"not an image, or cut off in its header (begins with {data[:12]!r})") from error
        except Exception as error:  # plugins raise SyntaxError, struct.error, ValueError, ... on damaged headers
            raise CorruptImageError(f"damaged header ({error})") from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height}"
        raise CorruptImageError(f"{size} pixels, more than the limit of {MAX_PIXELS // 10**6} megapixels: shrink it")
    return image


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) of the upright image, from its header alone; CorruptImageError if that does not open."""
    with open_image(data) as image:
        return upright_size(image)


def decode_image(data: bytes, reduction: int = 1) -> np.ndarray:
    """The pixels of an image file's bytes; everything else as `read_image`.

    Args:
        data: the whole file.
        reduction: 2, 4 or 8 let a JPEG decoder make an image of that fraction of the size, for a fraction of the
            time; a format or colour space without such a way is decoded in full.

    Returns:
        (H, W, 3) uint8 RGB, upright, perhaps read-only; reduced, H and W are rounded up.

    Raises:
        CorruptImageError: unless the whole image is there.
    """
    with open_image(data) as image:
        # Checked here as well because other code may have set Pillow's global LOAD_TRUNCATED_IMAGES.
        require_end(image.format, data, data)
        if image.mode in ("I", "F"):
            raise CorruptImageError("32-bit pixels have no defined 8-bit form: convert the file to 8 or 16 bits")
        same = _same_as_cv2(image)
        if same and reduction > 1 and image.format in ("JPEG", "MPO"):
            image.draft(None, (max(1, image.width // reduction), max(1, image.height // reduction)))
        try:
            image.load()
        except Exception as error:  # as in open_image; MemoryError is one too
            raise CorruptImageError(f"truncated or damaged ({error})") from error
        if same:
            upright = _UNDO_ORIENTATION.get(0 if image.format == "TIFF" else _orientation(image))
            image.info.pop("transparency", None)  # alpha is dropped; Pillow would warn about palettes with it
            rgb = image.convert("RGB")
            return np.asarray(rgb if upright is None else rgb.transpose(upright))
        file_format, mode = image.format, image.mode
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise CorruptImageError(f"OpenCV refuses it ({error})") from error
    if pixels is None:
        raise CorruptImageError(f"OpenCV cannot read this kind of {file_format} ({mode}): convert it to PNG or JPEG")
    return pixels[..., ::-1]


def _same_as_cv2(image: Image.Image) -> bool:
    """Whether Pillow's 8-bit RGB is cv2's, as measured by tests/test_images.py; asked before `load`."""
    if image.format == "TIFF":  # cv2 premultiplies alpha and rounds 16 bits otherwise than Pillow
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE_TAG, (1,))
        return image.mode in ("1", "L", "P", "RGB") and max(bits) <= 8
    return image.format in _SAME_AS_CV2 and image.mode in _EIGHT_BIT_MODES


def is_plain_jpeg(image: Image.Image) -> bool:
    """Return whether an open image is a JPEG that is not rotated and whose color space is unambiguous.

    That is gray or YCbCr, whose color space every decoder interprets the same way.
    """
    if image.format not in ("JPEG", "MPO") or image.mode not in ("L", "RGB") or _orientation(image) != 1:
        return False
    # libjpeg takes these components for RGB, which other decoders may not.
    components = bytes(component[0] for component in getattr(image, "layer", ()))
    is_rgb = image.info.get("adobe_transform") == 0 or components == b"RGB"
    return image.mode == "L" or not is_rgb


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8 from the EXIF block alone: Pillow's getexif would also heed XMP, cv2 does not."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        value = exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged EXIF block turns nothing, in cv2 neither
        return 1
    return value if value in _UNDO_ORIENTATION else 1


def box_bounds(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """Pixel bounds of the reference's crop `im[int(y1):int(y2), int(x1):int(x2)]`, clipped to the image."""
    if not all(math.isfinite(value) for value in box):
        raise CorruptImageError(f"box {tuple(box)} is not finite")
    x1, y1, x2, y2 = (max(0, int(value)) for value in box)  # below 0 numpy would count from the far end
    x2, y2 = min(x2, width), min(y2, height)
    if x1 >= x2 or y1 >= y2:
        raise CorruptImageError(f"box {tuple(box)} cuts nothing out of its {width} x {height} pixels")
    return x1, y1, x2, y2


def reason_of(error: Exception) -> str:
    """Why a file cannot be read, without its path."""
    if isinstance(error, IsADirectoryError):
        return "a folder, not a file"
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
