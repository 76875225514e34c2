"""Measure how many training images per second one CPU core decodes and augments."""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from benches.common import Measured
from superglobal.data.images import decode_image, image_size
from superglobal.data.train_dataset import Augment

SIZES, SIDES = ((800, 600), (1600, 1200)), (256, 512)
CROP, JITTER = 0.3, 0.2  # default values of the settings data.crop and data.jitter of train.py


def synthetic(width: int, height: int, count: int) -> list[bytes]:
    """Generate JPEG files of quality 90 that are about as large as photos.

    The images contain random patterns of several sizes and some noise.

    Args:
        width: width of the images in pixels.
        height: height of the images in pixels.
        count: number of images.

    Returns:
        The contents of the files.
    """
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        pixels = rng.normal(0, 4, (height, width, 3))
        for cells in (4, 16, 64, 256):
            coarse = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
            pixels += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) / 4
        file = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def _seconds(run: Callable[[bytes], object], images: list[bytes]) -> float:
    """Call a function with each image, and return the mean seconds per call.

    Args:
        run: function to measure, which takes the content of a JPEG file.
        images: contents of the JPEG files.
    """
    torch.manual_seed(0)
    start = time.perf_counter()
    for image in images:
        run(image)
    return (time.perf_counter() - start) / len(images)


def _compare(title: str, images: list[bytes], rounds: int) -> list[Measured]:
    """Measure how many images per second are decoded, without and with augmentation, and print the results.

    Args:
        title: description of the images.
        images: contents of the JPEG files.
        rounds: number of measurements of each variant.

    Returns:
        One row per variant. The first variant only decodes the images; each of the others also augments them.
    """
    variants: dict[str, Callable[[bytes], object]] = {"decoded at full size only": decode_image}
    for side in SIDES:
        for reduced in (False, True):
            augment = Augment(CROP, True, JITTER, reduced=reduced)
            name = f"augmented to {side} px, decoded at {'reduced' if reduced else 'full'} size"
            variants[name] = lambda data, augment=augment, side=side: augment(data, side)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            seconds[name].append(_seconds(run, images))
    floor = statistics.median(seconds["decoded at full size only"])
    print(f"{title}: {len(images)} images of {sum(map(len, images)) / len(images) / 1e3:.0f} KB on average")
    rows: list[Measured] = []
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"  {name:42}{1 / median:8.1f} images/s{median / floor:8.2f} x")
        rows.append({"images": title, "variant": name, "images_per_second": 1 / median, "ratio": median / floor})
    return rows


def main(argv: list[str]) -> list[Measured]:
    """Compare the speed of decoding and augmenting images with the speed of decoding alone.

    The variants take turns, so that changes in the load of the machine affect all of them.

    Returns:
        One row per variant and image size.
    """
    parser = argparse.ArgumentParser("bench.py decode", description=__doc__)
    parser.add_argument(
        "--images", type=Path, help="folder of JPEG files; by default images of two sizes are generated"
    )
    parser.add_argument("--count", type=int, default=24, help="number of images per size")
    parser.add_argument(
        "--rounds", type=int, default=5, help="number of measurements of each variant; the median is printed"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    if args.images:
        images = [path.read_bytes() for path in sorted(args.images.rglob("*.jpg"))[: args.count]]
        pixels = statistics.median(np.prod(image_size(image)) for image in images)
        return _compare(f"{args.images}, {pixels / 1e6:.1f} megapixels (median)", images, args.rounds)
    tables = (_compare(f"{w} x {h}", synthetic(w, h, args.count), args.rounds) for w, h in SIZES)
    return [row for rows in tables for row in rows]
