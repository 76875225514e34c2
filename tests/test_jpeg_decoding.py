"""The decoder of `extraction.decoder=gpu`, run on the CPU: its files, pixels, errors and stores."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluations import fingerprints, run
from PIL import Image
from search_pages import compose_serve_config, open_search_database
from sets import break_scan, texture, write_folders

from superglobal.data import jpeg_decoding
from superglobal.data.images import ImageList, image_tensor, read_image
from superglobal.data.jpeg_decoding import EncodedImage, check_gpu_decoder, compare_decoders, decode_batch, read_encoded
from superglobal.errors import InputError
from superglobal.evaluation import extraction as extracting
from superglobal.retrieval.store import DescriptorStore
from superglobal.search_page.serve import read_config

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda:0")] if torch.cuda.is_available() else [])]
RGB = texture(0, 0)


def save_image(path: Path, image: Image.Image = RGB, file_format: str = "JPEG", **options: object) -> Path:
    """Save an image and return its path."""
    image.save(path, file_format, **options)
    return path


def oriented(value: int) -> Image.Exif:
    """Return EXIF data with an orientation."""
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
    path = save_image(tmp_path / "a.jpg", image, **options)
    image = read_encoded(path, box, max_side=120)
    assert isinstance(image, EncodedImage)
    assert image.data.numpy().tobytes() == path.read_bytes()
    (decoded,) = decode_batch([image.data], CPU)
    assert decoded is not None
    x1, y1, x2, y2 = image.bounds
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
def test_other_files_are_decoded_on_the_cpu_when_they_are_read(tmp_path, image, file_format, options, max_side):
    path = save_image(tmp_path / "a", image, file_format, **options)
    pixels = read_encoded(path, None, max_side)
    assert isinstance(pixels, np.ndarray)
    assert np.array_equal(pixels, read_image(path, None, max_side))


def test_max_side_applies_to_the_crop(tmp_path):
    path = save_image(tmp_path / "a.jpg")
    assert isinstance(read_encoded(path, (0, 0, 60, 60), 60), EncodedImage)
    assert isinstance(read_encoded(path, (0, 0, 61, 60), 60), np.ndarray)


def test_errors_equal_those_of_the_cpu_decoder(tmp_path):
    whole = save_image(tmp_path / "whole.jpg")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[:-200])
    for path, box in ((cut, None), (tmp_path / "none.jpg", None), (tmp_path, None), (whole, (200, 0, 300, 9))):
        with pytest.raises(InputError) as expected:
            read_image(path, box)
        with pytest.raises(InputError) as raised:
            read_encoded(path, box)
        assert str(raised.value) == str(expected.value)


def test_the_other_images_of_a_batch_with_an_unsupported_file_are_decoded(tmp_path):
    paths = [save_image(tmp_path / f"{i}.jpg", texture(i, 0)) for i in range(3)]
    break_scan(paths[1])
    first, second, third = decode_batch(encoded(paths), CPU)
    assert second is None
    for decoded, path in ((first, paths[0]), (third, paths[2])):
        assert torch.equal(decoded, image_tensor(read_image(path)))


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12.00 GiB"),
    RuntimeError("Error while decoding JPEG images: CUDA out of memory. Tried to allocate 12.00 GiB"),
    RuntimeError("Error while decoding JPEG images: Failed to decode batch: 5"),
]


def encoded(paths: list[Path]) -> list[torch.Tensor]:
    """Return the contents of files as tensors."""
    return [torch.from_numpy(np.frombuffer(path.read_bytes(), np.uint8).copy()) for path in paths]


def fail_above(monkeypatch, count: int, error: Exception) -> None:
    """Make the decoder fail on more than `count` files at once."""
    decode = jpeg_decoding._decode

    def failing(files, device):
        if len(files) > count:
            raise error
        return decode(files, device)

    monkeypatch.setattr(jpeg_decoding, "_decode", failing)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_batch_that_runs_out_of_memory_is_decoded_one_by_one(tmp_path, monkeypatch, error):
    paths = [save_image(tmp_path / f"{i}.jpg", texture(i, 0)) for i in range(3)]
    fail_above(monkeypatch, 1, error)
    for image, path in zip(decode_batch(encoded(paths), CPU), paths, strict=True):
        assert torch.equal(image, image_tensor(read_image(path)))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_running_out_of_memory_for_one_file_is_an_input_error(tmp_path, monkeypatch, error, count):
    fail_above(monkeypatch, 0, error)
    with pytest.raises(InputError, match=r"out of memory on cpu .*lower extraction\.batch_size, or .*decoder=cpu"):
        decode_batch(encoded([save_image(tmp_path / "a.jpg")] * count), CPU)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("unspecified launch failure", 719),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Error while decoding JPEG images: Failed to synchronize CUDA stream: 700"),
    ],
)
def test_a_cuda_error_is_not_treated_as_an_unsupported_file(tmp_path, monkeypatch, error):
    fail_above(monkeypatch, 0, error)
    with pytest.raises(type(error)) as raised:
        decode_batch(encoded([save_image(tmp_path / "a.jpg")]), CPU)
    assert raised.value is error


@pytest.mark.parametrize(
    "text", ["Failed to decode jpeg stream: 4", "Failed to get image info: 3", "Unknown chroma", ""]
)
def test_unsupported_files_are_decoded_to_none(tmp_path, monkeypatch, text):
    fail_above(monkeypatch, 0, RuntimeError(text))
    assert decode_batch(encoded([save_image(tmp_path / "a.jpg")] * 2), CPU) == [None, None]


@pytest.mark.parametrize(("text", "reason"), [("", "RuntimeError"), ("\nno nvJPEG\nframe #0", "no nvJPEG")])
def test_a_device_that_cannot_decode_is_an_input_error(monkeypatch, text, reason):
    fail_above(monkeypatch, 0, RuntimeError(text))
    with pytest.raises(InputError, match=rf"torchvision cannot decode JPEGs on cuda:0 \({reason}\); install"):
        check_gpu_decoder([], torch.device("cuda:0"))


def test_decoders_are_compared_on_the_first_jpegs(tmp_path):
    items = write_items(tmp_path, 20)
    assert compare_decoders([ImageList(items[:5], None), ImageList(items[5:], None)], CPU) == {
        "images": 16,
        "mean_difference": 0.0,
        "max_difference": 0,
    }
    assert compare_decoders([ImageList(items, 10)], CPU)["images"] == 0


def write_items(folder: Path, count: int):
    """Write images, the first a PNG and the second an empty file."""
    from superglobal.data.images import ImageItem

    paths = [save_image(folder / f"{i}.jpg", texture(i, 0)) for i in range(count)]
    save_image(paths[0], file_format="PNG")
    paths[1].write_bytes(b"")
    return [ImageItem(path) for path in paths]


@pytest.fixture
def photos(tmp_path) -> Path:
    """Write JPEGs of two sizes, a PNG and a rotated JPEG."""
    photos = write_folders(tmp_path / "photos")
    save_image(photos / "label0/9.jpg", texture(0, 9, (90, 110)))
    save_image(photos / "label0/png.png", texture(0, 7), "PNG")
    save_image(photos / "label1/turned.jpg", texture(1, 7), exif=oriented(6))
    return photos


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Use the CPU in place of a GPU."""
    monkeypatch.setattr(extracting, "check_gpu_decoder", compare_decoders)


def open_stores(outputs: Path) -> list[DescriptorStore]:
    """Open all stores of an output folder."""
    return [DescriptorStore.open(path.parent) for path in sorted((outputs / "stores").glob("*/manifest.json"))]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_has_separate_stores_and_the_same_result(tmp_path, photos, on_the_cpu, workers):
    folder = ["dataset=folder", f"dataset.database={photos}", "dataset.labels=true"]
    first = run(tmp_path, *folder)
    (before,) = open_stores(tmp_path)
    second = run(tmp_path, *folder, "extraction.decoder=gpu", f"trainer.num_workers={workers}")
    assert second["about"]["extracted"] == first["about"]["extracted"]
    assert fingerprints(second) != fingerprints(first)
    assert second["metrics"] == first["metrics"]
    after = next(store for store in open_stores(tmp_path) if store.folder != before.folder)
    assert "decoder" not in before.manifest["identity"]
    assert after.manifest["identity"] == {**before.manifest["identity"], "decoder": "gpu"}
    assert second["about"]["stores"]["database"]["provenance"]["decoder"]["images"] == len(after) - 2
    assert len(after) == 12
    assert np.abs(after.block(0, 12) - before.block(0, 12)).max() < 1e-5
    third = run(tmp_path, *folder, "extraction.decoder=gpu")
    assert third["about"]["extracted"] == {"database": 0}


def test_the_search_page_uses_the_decoder_of_its_store(tmp_path, photos, on_the_cpu):
    folder = ["dataset=folder", f"dataset.database={photos}", "dataset.labels=true"]
    for decoder in ("cpu", "gpu"):
        run(tmp_path / decoder, *folder, f"extraction.decoder={decoder}")
    ((by_cpu,), (by_gpu,)) = (open_stores(tmp_path / name) for name in ("cpu", "gpu"))
    for store in (by_cpu, by_gpu):
        assert len(open_search_database(tmp_path / "page", f"store={store.folder}").search) == 12
    config, _ = read_config(compose_serve_config(f"store={by_gpu.folder}", "extraction.decoder=gpu"))
    assert config.extraction.decoder == "gpu"
    with pytest.raises(
        InputError, match=r"extraction\.decoder=gpu: .* was extracted with extraction\.decoder=cpu; leave"
    ):
        read_config(compose_serve_config(f"store={by_cpu.folder}", "extraction.decoder=gpu"))


def test_running_out_of_memory_ends_the_run_without_decoding_on_the_cpu(tmp_path, photos, on_the_cpu, monkeypatch):
    monkeypatch.setattr(extracting, "check_gpu_decoder", lambda *_: {})
    fail_above(monkeypatch, 0, OUT_OF_MEMORY[1])
    with pytest.raises(InputError, match=r"out of memory .*lower extraction\.batch_size"):
        run(tmp_path, "dataset=folder", f"dataset.database={photos}", "dataset.labels=true", "extraction.decoder=gpu")


def test_a_corrupt_image_is_reported_as_by_the_cpu_decoder(tmp_path, photos, on_the_cpu, caplog):
    break_scan(photos / "label2/2.jpg")
    folder = ["dataset=folder", f"dataset.database={photos}", "dataset.labels=true", "dataset.unreadable=error"]
    with pytest.raises(InputError) as expected:
        run(tmp_path / "cpu", *folder)
    with pytest.raises(InputError) as raised, caplog.at_level(logging.WARNING):
        run(tmp_path / "gpu", *folder, "extraction.decoder=gpu")
    assert str(raised.value) == str(expected.value)
    assert "label2/2.jpg: the GPU decoder does not support this JPEG" in caplog.text
    ((by_cpu,), (by_gpu,)) = (open_stores(tmp_path / name) for name in ("cpu", "gpu"))
    assert by_gpu.missing.tolist() == by_cpu.missing.tolist()


def test_the_decoder_without_a_gpu_raises_an_input_error_and_makes_no_store(tmp_path, photos):
    folder = ["dataset=folder", f"dataset.database={photos}", "dataset.labels=true"]
    with pytest.raises(InputError, match=r"extraction\.decoder=gpu needs a CUDA device.*runs on cpu; use"):
        run(tmp_path, *folder, "extraction.decoder=gpu")
    assert not open_stores(tmp_path)
    with pytest.raises(InputError, match=r"extraction\.decoder=nvjpeg: expected one of cpu, gpu"):
        run(tmp_path, *folder, "extraction.decoder=nvjpeg")


@pytest.mark.parametrize("device", DEVICES)
def test_decoders_agree_on_every_device(tmp_path, device):
    compare = compare_decoders if device == CPU else check_gpu_decoder
    compared = compare([ImageList(write_items(tmp_path, 20), None)], device)
    assert compared["images"] == 16
    assert compared["mean_difference"] < 2
    assert json.loads(json.dumps(compared)) == compared
    (file,) = encoded([tmp_path / "5.jpg"])
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
    ((by_cpu,), (by_gpu,)) = (open_stores(tmp_path / name) for name in ("cpu", "gpu"))
    assert (by_cpu.block(0, 12) * by_gpu.block(0, 12)).sum(axis=1).min() > 0.99
