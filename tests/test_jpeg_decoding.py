"""The decoder of `extraction.decoder=gpu`, run on the CPU: which files it gets, its pixels, its faults, its stores."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sets import break_scan, texture, write_folders
from test_engine import fingerprints, run

from superglobal.data.images import image_tensor, read_image
from superglobal.data.jpeg_decoding import EncodedImage, check_gpu_decoder, compare_decoders, decode_batch, read_encoded
from superglobal.engine import extracting
from superglobal.errors import InputError
from superglobal.retrieval.store import DescriptorStore

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda:0")] if torch.cuda.is_available() else [])]
RGB = texture(0, 0)


def saved(path: Path, image: Image.Image = RGB, file_format: str = "JPEG", **options: object) -> Path:
    image.save(path, file_format, **options)
    return path


def oriented(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (RGB, {}),
        (RGB, {"progressive": True}),
        (RGB, {"subsampling": 0}),
        (RGB, {"exif": oriented(1)}),
        (RGB.convert("L"), {}),
    ],
)
@pytest.mark.parametrize("box", [None, (10.7, 5.2, 90.0, 300.0)])
def test_plain_jpegs_stay_encoded_and_give_the_same_pixels(tmp_path, image, options, box):
    path = saved(tmp_path / "a.jpg", image, **options)
    encoded = read_encoded(path, box, max_side=120)
    assert isinstance(encoded, EncodedImage)
    assert encoded.data.numpy().tobytes() == path.read_bytes()
    (decoded,) = decode_batch([encoded.data], CPU)
    assert decoded is not None
    x1, y1, x2, y2 = encoded.bounds
    expected = image_tensor(read_image(path, box))
    assert torch.equal(decoded[:, y1:y2, x1:x2], expected)


@pytest.mark.parametrize(
    ("image", "file_format", "options", "max_side"),
    [
        (RGB, "PNG", {}, None),
        (RGB, "JPEG", {"exif": oriented(6)}, None),
        (RGB, "JPEG", {"keep_rgb": True}, None),
        (RGB.convert("CMYK"), "JPEG", {}, None),
        (RGB, "JPEG", {}, 119),
    ],
)
def test_other_files_are_decoded_at_once(tmp_path, image, file_format, options, max_side):
    path = saved(tmp_path / "a", image, file_format, **options)
    pixels = read_encoded(path, None, max_side)
    assert isinstance(pixels, np.ndarray)
    assert np.array_equal(pixels, read_image(path, None, max_side))


def test_max_side_applies_to_the_crop(tmp_path):
    path = saved(tmp_path / "a.jpg")
    assert isinstance(read_encoded(path, (0, 0, 60, 60), 60), EncodedImage)
    assert isinstance(read_encoded(path, (0, 0, 61, 60), 60), np.ndarray)


def test_faults_are_those_of_the_cpu_decoder(tmp_path):
    whole = saved(tmp_path / "whole.jpg")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:-200])
    for path, box in ((cut, None), (tmp_path / "none.jpg", None), (tmp_path, None), (whole, (200, 0, 300, 9))):
        with pytest.raises(InputError) as expected:
            read_image(path, box)
        with pytest.raises(InputError) as found:
            read_encoded(path, box)
        assert str(found.value) == str(expected.value)


def test_a_file_that_the_decoder_refuses_does_not_take_its_batch_along(tmp_path):
    paths = [saved(tmp_path / f"{i}.jpg", texture(i, 0)) for i in range(3)]
    break_scan(paths[1])
    files = [torch.from_numpy(np.frombuffer(path.read_bytes(), np.uint8).copy()) for path in paths]
    first, second, third = decode_batch(files, CPU)
    assert second is None
    for decoded, path in ((first, paths[0]), (third, paths[2])):
        assert torch.equal(decoded, image_tensor(read_image(path)))


def test_decoders_are_compared_on_the_first_jpegs(tmp_path):
    items = write_items(tmp_path, 20)
    assert compare_decoders([(items[:5], None), (items[5:], None)], CPU) == {
        "images": 16,
        "mean_difference": 0.0,
        "max_difference": 0,
    }
    assert compare_decoders([(items, 10)], CPU)["images"] == 0


def write_items(folder: Path, count: int):
    from superglobal.data.images import ImageItem

    paths = [saved(folder / f"{i}.jpg", texture(i, 0)) for i in range(count)]
    saved(paths[0], file_format="PNG")
    paths[1].write_bytes(b"")
    return [ImageItem(path) for path in paths]


@pytest.fixture
def photos(tmp_path) -> Path:
    """JPEGs of two sizes beside a PNG and a rotated JPEG."""
    photos = write_folders(tmp_path / "photos")
    saved(photos / "label0/9.jpg", texture(0, 9, (90, 110)))
    saved(photos / "label0/png.png", texture(0, 7), "PNG")
    saved(photos / "label1/turned.jpg", texture(1, 7), exif=oriented(6))
    return photos


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Let the CPU pass for a GPU."""
    monkeypatch.setattr(extracting, "check_gpu_decoder", compare_decoders)


def stored(outputs: Path) -> list[DescriptorStore]:
    return [DescriptorStore.open(path.parent) for path in sorted((outputs / "stores").glob("*/manifest.json"))]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_with_it_has_stores_of_its_own_and_the_same_result(tmp_path, photos, on_the_cpu, workers):
    folder = ["dataset=folder", f"dataset.database={photos}", "dataset.labels=true"]
    first = run(tmp_path, *folder)
    (before,) = stored(tmp_path)
    second = run(tmp_path, *folder, "extraction.decoder=gpu", f"trainer.num_workers={workers}")
    assert second["about"]["extracted"] == first["about"]["extracted"]
    assert fingerprints(second) != fingerprints(first)
    assert second["metrics"] == first["metrics"]
    after = next(store for store in stored(tmp_path) if store.folder != before.folder)
    assert "decoder" not in before.manifest["identity"]
    assert after.manifest["identity"] == {**before.manifest["identity"], "decoder": "gpu"}
    assert second["about"]["stores"]["database"]["provenance"]["decoder"]["images"] == len(after) - 2
    assert len(after) == 12
    assert np.abs(after.block(0, 12) - before.block(0, 12)).max() < 1e-5
    third = run(tmp_path, *folder, "extraction.decoder=gpu")
    assert third["about"]["extracted"] == {"database": 0}


def test_a_corrupt_image_is_reported_as_by_the_cpu_decoder(tmp_path, photos, on_the_cpu, caplog):
    break_scan(photos / "label2/2.jpg")
    folder = ["dataset=folder", f"dataset.database={photos}", "dataset.labels=true"]
    with pytest.raises(InputError) as expected:
        run(tmp_path / "cpu", *folder)
    with pytest.raises(InputError) as found, caplog.at_level(logging.WARNING):
        run(tmp_path / "gpu", *folder, "extraction.decoder=gpu")
    assert str(found.value) == str(expected.value)
    assert "label2/2.jpg: the GPU decoder does not support this JPEG" in caplog.text
    ((by_cpu,), (by_gpu,)) = (stored(tmp_path / name) for name in ("cpu", "gpu"))
    assert by_gpu.missing.tolist() == by_cpu.missing.tolist()


def test_without_a_gpu_it_is_an_input_error_and_leaves_no_store(tmp_path, photos):
    folder = ["dataset=folder", f"dataset.database={photos}", "dataset.labels=true"]
    with pytest.raises(InputError, match=r"extraction\.decoder=gpu: it needs a CUDA device.*runs on cpu; use"):
        run(tmp_path, *folder, "extraction.decoder=gpu")
    assert not stored(tmp_path)
    with pytest.raises(InputError, match=r"extraction\.decoder=nvjpeg: expected one of cpu, gpu"):
        run(tmp_path, *folder, "extraction.decoder=nvjpeg")


@pytest.mark.parametrize("device", DEVICES)
def test_decoders_agree_on_every_device(tmp_path, device):
    compare = compare_decoders if device == CPU else check_gpu_decoder
    compared = compare([(write_items(tmp_path, 20), None)], device)
    assert compared["images"] == 16
    assert compared["mean_difference"] < 2
    assert json.loads(json.dumps(compared)) == compared
    file = torch.from_numpy(np.frombuffer((tmp_path / "5.jpg").read_bytes(), np.uint8).copy())
    first, second = decode_batch([file, torch.full((100,), 7, dtype=torch.uint8)], device)
    assert first is not None
    assert first.device == device
    assert second is None


@pytest.mark.parametrize("device", DEVICES)
def test_descriptors_hardly_depend_on_device_and_decoder(tmp_path, photos, monkeypatch, device):
    if device == CPU:
        monkeypatch.setattr(extracting, "check_gpu_decoder", compare_decoders)
    folder = ["dataset=folder", f"dataset.database={photos}", "dataset.labels=true"]
    run(tmp_path / "cpu", *folder)
    accelerator = "cpu" if device == CPU else "gpu"
    options = [f"trainer.accelerator={accelerator}", "extraction.decoder=gpu", "extraction.batch_size=2"]
    run(tmp_path / "gpu", *folder, *options, "trainer.num_workers=2")
    ((by_cpu,), (by_gpu,)) = (stored(tmp_path / name) for name in ("cpu", "gpu"))
    assert (by_cpu.block(0, 12) * by_gpu.block(0, 12)).sum(axis=1).min() > 0.99
