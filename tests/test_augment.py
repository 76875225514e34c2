"""Augment compared to the transforms of torchvision on completely decoded images."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from superglobal.data.images import CorruptImageError, decode_image, image_size, image_tensor
from superglobal.data.train_dataset import Augment


def jpeg(width: int, height: int, seed: int = 0, orientation: int = 1, **options) -> bytes:
    """Encode a JPEG with shapes of several sizes, as photos have them, and a little noise."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.float32)
    for cells in (3, 9, 27):
        coarse = rng.uniform(0, 255, (cells, cells, 3)).astype(np.uint8)
        pixels += np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) / 3
    image = Image.fromarray(np.clip(pixels + rng.normal(0, 3, pixels.shape), 0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92, exif=exif, **options)
    return file.getvalue()


def call_seeded(augment, *args, seed: int):
    """Call an augmentation with a fixed seed."""
    torch.manual_seed(seed)
    return augment(*args)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("orientation", [1, 6])
def test_full_decoding_equals_the_torchvision_pipeline_bit_for_bit(flip, orientation):
    data, side, crop, jitter = jpeg(331, 250, orientation=orientation), 64, 0.2, 0.3
    steps = [v2.RandomResizedCrop(side, scale=(crop, 1.0), antialias=True)]
    steps += [v2.RandomHorizontalFlip()] if flip else []
    plain = v2.Compose([*steps, v2.ColorJitter(jitter, jitter, jitter)])
    whole = image_tensor(decode_image(data))
    augment = Augment(crop, flip, jitter, reduced=False)
    for seed in range(12):
        expected = call_seeded(plain, whole, seed=seed)
        got = call_seeded(augment, data, side, seed=seed)
        assert got.dtype == torch.uint8
        assert got.is_contiguous()
        assert torch.equal(got, expected)


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("size", [(1601, 1203), (640, 480)])
def test_reduced_decoding_shows_the_same_crop(size, orientation):
    """The mean difference is below 6 of 255 gray levels; most of it is a shift by a fraction of a pixel."""
    data, side = jpeg(*size, orientation=orientation), 96
    reduced, full = Augment(0.2, True, 0.0), Augment(0.2, True, 0.0, reduced=False)
    smaller = 0
    for seed in range(4):
        box = call_seeded(reduced.box, *image_size(data), seed=seed)
        assert box == call_seeded(full.box, *image_size(data), seed=seed)
        smaller += reduced.reduction(*box[2:], side) > 1
        difference = (
            call_seeded(reduced, data, side, seed=seed).float() - call_seeded(full, data, side, seed=seed).float()
        )
        assert difference.abs().mean() < 6
    assert smaller


def test_a_crop_has_at_least_the_requested_pixels():
    rng = np.random.default_rng(0)
    augment = Augment(0.1, True, 0.0)
    for _ in range(2000):
        rows, columns, top, side = (int(n) for n in rng.integers(1, 2000, 4))
        reduction = augment.reduction(rows, columns, side)
        assert reduction in (1, 2, 4, 8)
        if reduction > 1:
            assert round((top + rows) / reduction) - round(top / reduction) >= side
            assert round((top + columns) / reduction) - round(top / reduction) >= side
    assert augment.reduction(600, 600, 64) == 8
    assert augment.reduction(100, 600, 64) == 1


def test_reduced_decoding_is_used_for_jpegs_only():
    data = jpeg(403, 301)
    assert decode_image(data, 4).shape == (76, 101, 3)
    assert image_size(jpeg(403, 301, orientation=6)) == (301, 403)
    whole = Image.open(io.BytesIO(data))
    for image, file_format in ((whole, "PNG"), (whole.convert("CMYK"), "JPEG")):
        file = io.BytesIO()
        image.save(file, file_format)
        assert decode_image(file.getvalue(), 4).shape == (301, 403, 3)
        got = [call_seeded(Augment(0.5, True, 0.1, reduced=r), file.getvalue(), 32, seed=0) for r in (True, False)]
        assert torch.equal(*got)


def test_gray_and_progressive_jpegs_are_decoded_at_reduced_size():
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg(640, 480))).convert("L").save(file, "JPEG", progressive=True)
    assert decode_image(file.getvalue(), 8).shape == (60, 80, 3)


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "empty"),
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: b"<!DOCTYPE html><html>404</html>", "not an image"),
    ],
)
def test_corrupt_images_raise_errors(reduced, damage, reason):
    with pytest.raises(CorruptImageError, match=reason):
        Augment(0.5, True, 0.1, reduced=reduced)(damage(jpeg(800, 600)), 64)
