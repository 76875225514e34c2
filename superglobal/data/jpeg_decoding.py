"""Decode batches of JPEG files with torchvision on the device of the network. On a GPU, torchvision uses nvJPEG."""

from __future__ import annotations

import functools
import io
import logging
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from superglobal.data.images import (
    Box,
    ImageList,
    add_path_to_errors,
    box_bounds,
    crop_and_shrink,
    decode_image,
    image_tensor,
    is_plain_jpeg,
    open_image,
    require_end,
    require_signature,
    shrunk_size,
)
from superglobal.errors import InputError, first_line
from superglobal.utils.io import read_file

log = logging.getLogger(__name__)

_COMPARED = 16  # maximum number of images on which the GPU decoder is compared with the CPU decoder
_CANDIDATES = 64  # maximum number of images that are read to find images for the comparison
# Parts of error messages that mean that the GPU memory is full. torchvision raises a RuntimeError for every failure on
# a GPU. Status 5 of nvJPEG is NVJPEG_STATUS_ALLOCATOR_FAILURE.
_OUT_OF_MEMORY = re.compile(r"out of memory|Failed to [\w ]+: 5\b")
_CUDA_FAULT = re.compile(r"CUDA error|Failed to synchronize CUDA stream")


class EncodedImage(NamedTuple):
    """A JPEG file that is to be decoded on the GPU.

    Attributes:
        data: (n,) uint8, the contents of the file.
        bounds: crop (x1, y1, x2, y2) in pixels, to be cut out of the decoded image.
    """

    data: Tensor
    bounds: tuple[int, int, int, int]


def read_encoded(
    path: str | Path, box: Box | None = None, max_side: int | None = None, signature: str | None = None
) -> EncodedImage | np.ndarray:
    """Read an image file. Leave it encoded if `decode_batch` can decode it on the GPU; otherwise, decode it on the CPU.

    A JPEG file in grayscale or YCbCr is left encoded if it has no EXIF rotation and need not be shrunk. For such files,
    `decode_batch` returns the same pixels as the CPU decoder, except for rounding differences. The header and the end
    of each file are checked here.

    Args:
        path: image file.
        box: crop (x1, y1, x2, y2) in pixels; None for the whole image.
        max_side: maximum longer side in pixels after the crop; None for no limit.

    Returns:
        The encoded file, or the result of `read_image`, (H, W, 3) uint8.

    Raises:
        InputError: the file is missing, empty, truncated, not an image or larger than `MAX_PIXELS`, or the crop is
            empty.
    """
    path = Path(path)
    with add_path_to_errors(path):
        data = read_file(path)
        require_signature(data, signature)
        bounds = _bounds(data, box, max_side)
        if bounds is None:
            return crop_and_shrink(decode_image(data), box, max_side)
    return EncodedImage(_as_tensor(data), bounds)


def _bounds(data: bytes, box: Box | None, max_side: int | None) -> tuple[int, int, int, int] | None:
    """Return the part of an image to cut out after the GPU has decoded it.

    Args:
        data: contents of the image file.
        box: crop (x1, y1, x2, y2) in pixels; None for the whole image.
        max_side: maximum longer side in pixels after the crop; None for no limit.

    Returns:
        Integer crop (x1, y1, x2, y2) in pixels; None if the GPU cannot decode the file, or the image must be shrunk.
    """
    with open_image(data) as image:
        require_end(image.format, data)
        if not is_plain_jpeg(image):
            return None
        width, height = image.size
    x1, y1, x2, y2 = (0, 0, width, height) if box is None else box_bounds(box, width, height)
    size = (y2 - y1, x2 - x1)
    return (x1, y1, x2, y2) if shrunk_size(size, max_side) == size else None


def _as_tensor(data: bytes) -> Tensor:
    """Copy the contents of a file to a tensor, (n,) uint8."""
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def decode_batch(files: Sequence[Tensor], device: torch.device) -> list[Tensor | None]:
    """Decode JPEG files on a device.

    Args:
        files: contents of each file, (n,) uint8, on the CPU.
        device: a CUDA device, or the CPU.

    Returns:
        For each file, the RGB image, (3, H, W) uint8 on the device, or None if the decoder does not support the file.

    Raises:
        InputError: there is not enough GPU memory, even for one file at a time.
    """
    try:
        return list(_decode(files, device))
    except RuntimeError as error:  # The error does not say which file caused it. Each file is decoded separately below.
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(str(error))
        if not out_of_memory and (isinstance(error, torch.AcceleratorError) or _CUDA_FAULT.search(str(error))):
            raise
        if len(files) == 1:
            if out_of_memory:
                raise InputError(
                    f"extraction.decoder=gpu: out of memory on {device} while decoding a JPEG ({first_line(error)}); "
                    "lower extraction.batch_size, or use extraction.decoder=cpu"
                ) from error
            return [None]
    # nvJPEG cannot use the memory that PyTorch keeps reserved for later tensors, so release this memory.
    torch.cuda.empty_cache()
    return [image for file in files for image in decode_batch([file], device)]


def _decode(files: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Decode JPEG files on a device in one call of torchvision.

    Args:
        files: contents of each file, (n,) uint8, on the CPU.
        device: a CUDA device, or the CPU.

    Returns:
        For each file, the RGB image, (3, H, W) uint8 on the device.

    Raises:
        RuntimeError: one or more of the files cannot be decoded.
    """
    from torchvision.io import ImageReadMode, decode_jpeg  # Imported here because the import takes a second.

    if device.type != "cuda":
        return decode_jpeg(list(files), ImageReadMode.RGB, device)
    # nvJPEG runs on a separate CUDA stream, which does not wait for the current stream. If the images were allocated on
    # the current stream, they could get memory that a kernel of the previous batch still uses.
    stream, current = _decoding_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        images = decode_jpeg(list(files), ImageReadMode.RGB, device)
    current.wait_stream(stream)
    for image in images:
        image.record_stream(current)
    return images


@functools.cache
def _decoding_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the CUDA stream on which all JPEG files are decoded on a device."""
    return torch.cuda.Stream(device)


def check_gpu_decoder(lists: Sequence[ImageList], device: torch.device) -> dict[str, Any]:
    """Check that a device can decode JPEG files, and compare its decoder with the CPU decoder on a few images.

    Args:
        lists: image lists.
        device: device of the extraction.

    Returns:
        The number of compared images, "images", and the mean and the maximum absolute difference of their pixel values,
        "mean_difference" and "max_difference", on the scale from 0 to 255.

    Raises:
        InputError: there is no CUDA device, or torchvision cannot decode on it.
    """
    if device.type != "cuda":
        raise InputError(
            f"extraction.decoder=gpu needs a CUDA device, but the extraction runs on {device}; use "
            "extraction.decoder=cpu, or a machine with an NVIDIA GPU"
        )
    tiny = io.BytesIO()
    Image.new("RGB", (64, 64)).save(tiny, "JPEG")
    try:
        _decode([_as_tensor(tiny.getvalue())], device)
    except (AttributeError, ImportError, RuntimeError) as error:
        raise InputError(
            f"extraction.decoder=gpu: torchvision cannot decode JPEGs on {device} ({first_line(error)}); "
            "install a torchvision that was built with nvJPEG, or use extraction.decoder=cpu"
        ) from error
    comparison = compare_decoders(lists, device)
    text = (
        "GPU JPEG decoder: compared %d images with the CPU decoder, mean absolute difference %.4g, maximum %d (of 255)"
    )
    log.info(text, *comparison.values())
    return comparison


def compare_decoders(lists: Sequence[ImageList], device: torch.device) -> dict[str, Any]:
    """Compare the decoder of a device with the CPU decoder, on the first 16 JPEG files that the device would decode.

    Args:
        lists: image lists.
        device: device of the extraction.

    Returns:
        "images" is the number of compared images. "mean_difference" and "max_difference" are the mean and the maximum
        absolute difference of their pixel values, on the scale from 0 to 255.
    """
    means, largest = [], [0]
    for encoded in islice(_encoded(lists), _COMPARED):
        (image,) = decode_batch([encoded.data], device)
        try:
            pixels = image_tensor(decode_image(encoded.data.numpy().tobytes()))
        except InputError:  # The extraction will report this image.
            continue
        if image is not None:
            difference = (image.cpu().int() - pixels.int()).abs()
            means.append(difference.double().mean().item())
            largest.append(int(difference.max()))
    return {
        "images": len(means),
        "mean_difference": sum(means) / max(1, len(means)),
        "max_difference": max(largest),
    }


def _encoded(lists: Sequence[ImageList]) -> Iterator[EncodedImage]:
    """Go through the first 64 images of the concatenated lists, and yield those that the GPU decoder can decode."""
    items = chain.from_iterable(((item, images.max_side) for item in images.items) for images in lists)
    for item, max_side in islice(items, _CANDIDATES):
        try:
            image = read_encoded(item.path, item.box, max_side)
        except InputError:  # The extraction will report this image.
            continue
        if isinstance(image, EncodedImage):
            yield image
