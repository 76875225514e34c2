"""read_image compared to cv2.imread bit for bit, its errors, and check_images on the same files."""

import io
import os
import random
import socket
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile

from superglobal.data import image_checks, images
from superglobal.data.datamodules import BatchedImageDataset, LoadedBatch
from superglobal.data.evaluation_set import problem_lines
from superglobal.data.image_checks import check_image, check_images
from superglobal.data.images import CorruptImageError, ImageItem, ImageList, decode_image, read_image, shrink
from superglobal.data.samplers import ImageBatch
from superglobal.errors import InputError

REAL = Path(__file__).parents[2] / "shared" / "data"


def picture(height: int = 47, width: int = 60, channels: int = 3) -> np.ndarray:
    """Return smooth colors with noise, for which every orientation, channel and filter gives a different result."""
    rng = np.random.default_rng(7)
    ramp = np.linspace(0, 200, height * width * channels).reshape(height, width, channels)
    return (ramp + rng.integers(0, 56, ramp.shape)).astype(np.uint8)


RGB = Image.fromarray(picture())
ALPHA = Image.fromarray(picture()[..., 1])
RGBA, GRAY_ALPHA = RGB.copy(), Image.merge("LA", (RGB.convert("L"), ALPHA))
RGBA.putalpha(ALPHA)
WIDE = np.random.default_rng(3).integers(0, 65536, (40, 51, 4), dtype=np.uint16)


def encoded(file_format: str, **options: object) -> bytes:
    """Encode the RGB image."""
    buffer = io.BytesIO()
    RGB.save(buffer, file_format, **options)
    return buffer.getvalue()


PNG = encoded("PNG")
# The start of an EXIF block with an empty directory, after which anything may follow.
EXIF = b"Exif\0\0" + b"MM\0*\0\0\0\x08\0\0\0\0\0\0"
# Complete files; the thumbnail is a small JPEG inside the EXIF block, end marker included.
WHOLE = {
    "baseline": encoded("JPEG"),
    "progressive": encoded("JPEG", progressive=True),
    "thumbnail": encoded("JPEG", exif=EXIF + encoded("JPEG")),
    "png": PNG,
    "webp": encoded("WEBP"),
    "bmp": encoded("BMP"),
    "tif": encoded("TIFF", compression="tiff_lzw"),
}


def png_claiming(width: int, height: int) -> bytes:
    """Return a small PNG whose header states this size."""
    header = b"IHDR" + struct.pack(">II", width, height) + PNG[24:29]
    return PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]


def oriented(value: int) -> Image.Exif:
    """Return EXIF data with an orientation."""
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def read_with_cv2(path: Path) -> np.ndarray:
    """Read an image with OpenCV, as RGB."""
    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR)
    assert pixels is not None, "cv2 cannot read the fixture"
    return pixels[..., ::-1]


def assert_equals_cv2(path: Path) -> None:
    """Assert that read_image and OpenCV read the same pixels and that check_images finds no problem."""
    pixels = read_image(path)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    np.testing.assert_array_equal(pixels, read_with_cv2(path))
    assert check_images([path]).problems == []


def assert_rejected(path: Path, reason: str, by_check: bool = True) -> None:
    """Assert that read_image raises an error with this reason, and that check_images reports it if `by_check`."""
    with pytest.raises(InputError) as error:
        read_image(path)
    assert str(path) in str(error.value)
    assert reason in str(error.value)
    if by_check:
        ((bad_path, problem),) = check_images([path]).problems
        assert bad_path == path
        assert reason in problem


PILLOW_FILES = {
    "progressive.jpg": (RGB, {"progressive": True}),
    "444.jpg": (RGB, {"subsampling": 0}),
    "422.jpg": (RGB, {"subsampling": 1}),
    "420.jpg": (RGB, {"subsampling": 2, "quality": 40}),
    "rgb_coded.jpg": (RGB, {"keep_rgb": True}),
    "grey.jpg": (RGB.convert("L"), {}),
    "cmyk.jpg": (RGB.convert("CMYK"), {}),
    "two_frames.jpg": (RGB, {"format": "MPO", "save_all": True, "append_images": [RGB.rotate(180)]}),
    "rgb.png": (RGB, {}),
    "rgb_transparent.png": (RGB, {"transparency": (1, 2, 3)}),
    "grey.png": (RGB.convert("L"), {}),
    "grey_transparent.png": (RGB.convert("L"), {"transparency": 5}),
    "grey_alpha.png": (GRAY_ALPHA, {}),
    "rgba.png": (RGBA, {}),
    "palette.png": (RGB.quantize(50), {}),
    "palette_transparent.png": (RGB.quantize(50), {"transparency": 3}),
    "palette_alpha.png": (RGBA.quantize(50), {}),
    "palette_4bit.png": (RGB.quantize(16), {"bits": 4}),
    "bilevel.png": (RGB.convert("1"), {}),
    "rgb.tif": (RGB, {}),
    "lzw.tif": (RGB, {"compression": "tiff_lzw"}),
    "palette.tif": (RGB.quantize(40), {}),
    "bilevel.tif": (RGB.convert("1"), {}),
    "cmyk.tif": (RGB.convert("CMYK"), {}),
    "rgba.tif": (RGBA, {}),
    "lossy.webp": (RGB, {}),
    "rgba.webp": (RGBA, {"lossless": True}),
    "rgb.bmp": (RGB, {}),
    "palette.bmp": (RGB.quantize(30), {}),
    "UPPER CASE.JPG": (RGB, {}),
    "Café 寺 photo.Jpeg": (RGB, {}),
}


@pytest.mark.parametrize("name", PILLOW_FILES)
def test_eight_bit_files_equal_cv2(name: str, tmp_path: Path) -> None:
    image, options = PILLOW_FILES[name]
    image.save(tmp_path / name, **options)
    assert_equals_cv2(tmp_path / name)


def test_ycck_jpeg_equals_cv2(tmp_path: Path) -> None:
    # Pillow writes CMYK with Adobe transform 0; 2 declares the same samples to be YCCK.
    buffer = io.BytesIO()
    RGB.convert("CMYK").save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    data[data.index(b"Adobe") + 11] = 2
    path = tmp_path / "ycck.jpg"
    path.write_bytes(data)
    assert_equals_cv2(path)


@pytest.mark.parametrize("extension", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bit_files_equal_cv2(extension: str, channels: int, tmp_path: Path) -> None:
    path = tmp_path / f"deep.{extension}"
    assert cv2.imwrite(str(path), WIDE[..., :channels] if channels > 1 else WIDE[..., 0])
    assert_equals_cv2(path)


def test_sixteen_bit_grey_alpha_equals_cv2(tmp_path: Path) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in WIDE[..., :2])
    header = struct.pack(">IIBBBBB", 51, 40, 16, 4, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path = tmp_path / "la16.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    assert_equals_cv2(path)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_orientations_equal_those_of_cv2(orientation: int, extension: str, tmp_path: Path) -> None:
    path = tmp_path / f"turned.{extension}"
    RGB.save(path, exif=oriented(orientation))
    assert_equals_cv2(path)
    assert read_image(path).shape == ((60, 47, 3) if 5 <= orientation <= 8 else (47, 60, 3))
    # check_images uses the size after rotation: the box only fits into images that are not turned by 90 degrees.
    fits = check_images([ImageItem(path, (50, 10, 60, 20))]).problems == []
    assert fits == (not 5 <= orientation <= 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_to_tiff_and_cmyk_files(orientation: int, tmp_path: Path) -> None:
    upright = [None, None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180]
    upright += [Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270]
    upright += [Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90]
    RGB.save(tmp_path / "a.tif", exif=oriented(orientation))  # cv2 5.0 fails on TIFFs with 5-8
    turn = upright[orientation]
    np.testing.assert_array_equal(
        read_image(tmp_path / "a.tif"), np.asarray(RGB if turn is None else RGB.transpose(turn))
    )
    box = (50, 10, 60, 20)
    assert (check_images([ImageItem(tmp_path / "a.tif", box)]).problems == []) == (orientation < 5)
    RGB.convert("CMYK").save(tmp_path / "a.jpg", exif=oriented(orientation))
    assert_equals_cv2(tmp_path / "a.jpg")


def test_orientation_in_xmp_is_ignored(tmp_path: Path) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    path = tmp_path / "xmp.jpg"
    RGB.save(path, xmp=xmp)
    with Image.open(path) as image:
        assert image.getexif().get(0x0112) == 6, "the fixture no longer exercises Pillow's XMP fallback"
    assert_equals_cv2(path)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "exif.jpg"
    RGB.save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert_equals_cv2(path)


def test_the_first_frame_of_a_gif_is_read(tmp_path: Path) -> None:
    first = RGB.quantize(64)
    first.save(tmp_path / "a.gif", save_all=True, append_images=[RGB.rotate(180).quantize(64)])
    np.testing.assert_array_equal(read_image(tmp_path / "a.gif"), np.asarray(first.convert("RGB")))


def test_one_pixel_images_and_str_paths_are_read(tmp_path: Path) -> None:
    for name in ("dot.png", "dot.jpg"):
        Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / name)
        assert_equals_cv2(tmp_path / name)
        assert read_image(str(tmp_path / name), max_side=1).shape == (1, 1, 3)


def test_huge_images_are_read_without_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    pixels = cv2.resize(picture(400, 500), (5000, 4000))
    cv2.imwrite(str(tmp_path / "20mp.jpg"), pixels)
    np.testing.assert_array_equal(read_image(tmp_path / "20mp.jpg"), read_with_cv2(tmp_path / "20mp.jpg"))
    (tmp_path / "128mp.png").write_bytes(png_claiming(8_000, 16_000))  # Pillow itself warns from 89 MP
    (tmp_path / "bomb.png").write_bytes(png_claiming(16_000, 8_001))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_images([tmp_path / "20mp.jpg", tmp_path / "128mp.png"]).problems == []
        assert_rejected(tmp_path / "bomb.png", "at most 128 megapixels")
        # The same code path at a size that is quick to decode.
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        RGB.save(tmp_path / "small.jpg")
        assert_equals_cv2(tmp_path / "small.jpg")
        assert Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.undo()
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.filterwarnings("ignore:Corrupt EXIF|Truncated File")
@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("kept", [0.02, 0.3, 0.7, 0.97, -2, -1])
def test_truncated_files_raise_errors(
    kind: str, kept: float, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"cut.{kind}"
    whole = WHOLE[kind]
    path.write_bytes(whole)
    read_image(path)
    path.write_bytes(whole[: int(kept) if kept < 0 else int(kept * len(whole))])
    # check_images only looks for the ends of JPEG and PNG files.
    assert_rejected(path, "", by_check=kind not in ("webp", "bmp", "tif"))
    assert capfd.readouterr() == ("", "")


def test_truncation_is_detected_despite_the_global_setting_of_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    (tmp_path / "cut.jpg").write_bytes(encoded("JPEG")[:-300])
    assert_rejected(tmp_path / "cut.jpg", "truncated JPEG")


def test_other_corrupt_files_raise_errors(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert_rejected(tmp_path / "empty.jpg", "empty file (0 bytes)")
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html><html><body>404</body></html>")
    assert_rejected(tmp_path / "page.jpg", "not an image")
    (tmp_path / "folder.jpg").mkdir()
    assert_rejected(tmp_path / "folder.jpg", "a folder, not a file")
    cv2.imwrite(str(tmp_path / "float.tif"), np.zeros((5, 6), np.float32))
    assert_rejected(tmp_path / "float.tif", "32-bit", by_check=False)
    damaged = bytearray(PNG)
    damaged[len(damaged) // 2] ^= 0xFF
    (tmp_path / "damaged.png").write_bytes(damaged)
    assert_rejected(tmp_path / "damaged.png", "damaged", by_check=False)


def test_only_the_listed_formats_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pillow would pass EPS to the program `gs`.
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "eps.jpg").write_bytes(eps)
    for name in ("dds", "ico", "tga", "ppm", "jp2"):
        RGB.save(tmp_path / f"{name}.jpg", {"jp2": "JPEG2000"}.get(name, name))
    for name in ("eps", "dds", "ico", "tga", "ppm", "jp2"):
        assert_rejected(tmp_path / f"{name}.jpg", "not an image (JPEG, PNG, WebP, BMP, TIFF, GIF, AVIF or HEIC)")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("file_format", ["AVIF", "HEIF"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_avif_and_heic_are_read_upright_and_checked(file_format: str, orientation: int, tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    smooth = RGB.resize((6, 4)).resize((60, 48))
    smooth.save(tmp_path / "a.heic", file_format, quality=95, exif=oriented(orientation))
    # The orientation of a HEIC image is a property of the container. Its EXIF orientation is not used.
    rotated = orientation == 6 and file_format == "AVIF"
    upright = smooth.transpose(Image.Transpose.ROTATE_270) if rotated else smooth
    pixels = read_image(tmp_path / "a.heic")
    assert pixels.shape[:2] == check_images([tmp_path / "a.heic"]).sizes[0] == upright.size[::-1]
    assert np.abs(pixels.astype(int) - np.asarray(upright)).mean() < 8
    data = (tmp_path / "a.heic").read_bytes()
    with pytest.raises(CorruptImageError, match=r"expected at most 0\.002 megapixels"):
        decode_image(data, max_pixels=2000)
    (tmp_path / "cut.heic").write_bytes(data[: len(data) // 4])
    assert_rejected(tmp_path / "cut.heic", "not an image")


def test_heic_images_without_their_package_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(images, "_register_heif", images._register_heif.__wrapped__)
    for i in range(7):
        (tmp_path / f"{i}.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (tmp_path / "x.jpg").touch()
    lines = problem_lines("database", 9, check_images(sorted(tmp_path.iterdir())).problems)
    assert lines == [
        "database: 0 of 9 images missing, 8 corrupt",
        f"  7 images, such as {tmp_path}/0.heic: HEIC images need the package pillow-heif: pip install pillow-heif",
        f"  {tmp_path}/x.jpg: empty file (0 bytes)",
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_only_regular_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)  # The address of a socket has at most 107 bytes.
        listener.bind("socket.jpg")
    for name in ("fifo", "device", "socket"):
        assert_rejected(tmp_path / f"{name}.jpg", "not a regular file")


def test_images_that_take_long_to_decode_raise_errors() -> None:
    jpeg = encoded("JPEG")
    for filling in (b"\xff" * 5_000_000, b"\xff\xfe\0\2" * 1_000_000, b"\0" * 5_000_000):
        start = time.perf_counter()
        with pytest.raises(CorruptImageError, match="damaged header"):
            decode_image(jpeg[:2] + filling + jpeg[2:])
        assert time.perf_counter() - start < 1
    buffer = io.BytesIO()
    Image.new("L", (1000, 1000)).save(buffer, "JPEG", progressive=True)
    progressive = buffer.getvalue()[:-2]
    scan = progressive[progressive.rindex(b"\xff\xda") :]
    # End markers in a comment do not end the image.
    for filling in (b"", b"\xff\xfe\0\6\xff\xd9\xff\xd9"):
        with pytest.raises(CorruptImageError, match=r"^more than 2560 scans or"):
            decode_image(progressive + filling + 3000 * scan + b"\xff\xd9")
    with pytest.raises(CorruptImageError, match=r"or 100000 segments take too long"):
        decode_image(progressive + 200_000 * b"\xff\xfe\0\2" + 3000 * scan + b"\xff\xd9")
    # Scans in a comment, such as those of a thumbnail, and after the end of the image are not decoded.
    for filling in (b"\xff\xfe\x20\2" + 0x1000 * b"\xff\xda", b"\xff\xd9" + 3000 * scan):
        assert decode_image(progressive + filling + b"\xff\xd9").shape == (1000, 1000, 3)
    # A BMP with one run per pixel is decoded slowly, because Pillow reads it in Python.
    rows = (b"\1\7" * 1000 + b"\0\0") * 1000
    header = struct.pack("<IiiHHIIiiII", 40, 1000, 1000, 1, 8, 1, len(rows), 0, 0, 256, 0)
    bmp = b"BM" + struct.pack("<IHHI", 1078 + len(rows), 0, 0, 1078) + header + bytes(1024) + rows
    with pytest.raises(CorruptImageError, match=r"takes more than 0\.05 s"):
        decode_image(bmp, seconds=0.05)


def gif(background: int = 7, **options: int) -> bytes:
    """Return a GIF with 32 colors."""
    data = bytearray(save_as(RGB.quantize(32), "GIF", **options))
    data[11] = background  # index of the background color in the palette
    return bytes(data)


def save_as(image: Image.Image, file_format: str, **options: int) -> bytes:
    """Encode an image."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def enlarged_gif() -> bytes:
    """Return a GIF whose frame covers only a part of the image."""
    data = bytearray(gif())
    struct.pack_into("<HH", data, 6, 80, 90)
    return bytes(data)


def bmp(bits: int, *masks: int) -> bytes:
    """Return a BMP of random pixels with `bits` bits, and a mask for each channel."""
    width, height = 50, 40
    pixels = np.random.default_rng(0).bytes(width * height * bits // 8)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 3 if masks else 0, len(pixels), 2835, 2835, 0, 0)
    start = 14 + len(info) + 4 * len(masks)
    header = b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start)
    return header + info + struct.pack(f"<{len(masks)}I", *masks) + pixels


@pytest.mark.parametrize(
    "data",
    [
        gif(),
        gif(transparency=5),
        enlarged_gif(),
        bmp(16),
        bmp(16, 0xF800, 0x7E0, 0x1F),
        bmp(16, 0x7C00, 0x3E0, 0x1F),
        bmp(32, 0xFF000000, 0xFF0000, 0xFF00),
        bmp(32, 0xFF0000, 0xFF00, 0xFF),
    ],
    ids=["gif", "gif_transparent", "gif_canvas", "bmp16", "bmp565", "bmp555", "bmp_order", "bmp32"],
)
def test_rare_gifs_and_bmps_equal_cv2(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(data)
    assert_equals_cv2(path)


def test_missing_and_corrupt_images_are_distinguished(tmp_path: Path) -> None:
    RGB.save(tmp_path / "good.jpg")
    (tmp_path / "bad.jpg").write_bytes(b"GIF89a")
    paths = [tmp_path / name for name in ("gone.jpg", "good.jpg", "bad.jpg")]
    with pytest.raises(InputError, match=r"image not found: .*gone\.jpg"):
        read_image(paths[0])
    report = check_images(paths, workers=2)
    assert report.missing == [paths[0]]
    assert [path for path, _ in report.unreadable] == [paths[2]]
    assert [path for path, _ in report.problems] == [paths[0], paths[2]]
    assert [bool(signature) for signature in report.signatures] == [False, True, False]


@pytest.mark.parametrize("trailing", [1, 300, 10_000, 200_000])
def test_trailing_bytes_are_accepted(trailing: int, tmp_path: Path) -> None:
    path = tmp_path / "trailing.jpg"
    path.write_bytes(encoded("JPEG") + bytes(trailing))
    assert_equals_cv2(path)


def test_jpegs_with_long_headers_are_read_and_checked(tmp_path: Path) -> None:
    whole = encoded("JPEG", exif=EXIF + bytes(60_000), icc_profile=bytes(70_000), quality=95)
    path = tmp_path / "long.jpg"
    path.write_bytes(whole)
    assert images._scan_start(whole) > 100_000
    assert_equals_cv2(path)
    path.write_bytes(whole[:-2])
    assert_rejected(path, "truncated JPEG")


def test_the_signature_depends_on_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    data = bytearray(PNG + bytes(200_000))
    signatures = []
    for position in (None, 4000, 150_000, len(data) - 1):
        if position is not None:
            data[position] ^= 1
        path.write_bytes(data)
        signatures += check_images([path]).signatures
    path.write_bytes(data + b"\0")
    signatures += check_images([path]).signatures
    assert len(set(signatures)) == 5
    path.touch()
    assert check_images([path] * 3).signatures == [signatures[-1]] * 3


def test_only_new_and_changed_files_are_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for path in paths:
        RGB.save(path)
    items, cache = [*paths[:2], ImageItem(paths[2], (5, 5, 30, 20))], tmp_path / "stores" / "checked.npz"
    check_images(items, cache=cache)
    assert not cache.exists()  # The images have just changed, so their times may stay the same after another change.
    monkeypatch.setattr("superglobal.utils.io._SETTLED", 0)
    read: list[int] = []
    monkeypatch.setattr(image_checks, "check_image", lambda *args: (read.append(0), check_image(*args))[1])
    first = check_images(items, cache=cache)
    assert check_images(items, cache=cache) == first == check_images(items)
    assert len(read) == 3 + 0 + 3
    changed = bytearray(paths[1].read_bytes() + b"x")
    paths[1].write_bytes(changed)
    paths[0].unlink()
    second = check_images(items, cache=cache)
    assert len(read) == 7
    assert second.missing == [paths[0]]
    assert second.signatures == ["", check_images([paths[1]]).signatures[0], first.signatures[2]]
    cache.write_bytes(cache.read_bytes()[:-50])
    assert check_images(items, cache=cache) == second == check_images(items, cache=cache)
    assert len(read) == 10


def test_an_image_that_was_repaired_after_decoding_is_not_marked_as_damaged(tmp_path: Path) -> None:
    paths, cache = [tmp_path / "damaged.jpg", tmp_path / "repaired.jpg"], tmp_path / "checked.npz"
    for path in paths:
        RGB.save(path)
    signatures = check_images(paths).signatures
    paths[1].write_bytes(paths[1].read_bytes() + b"x")
    image_checks.CheckCache(cache).mark_damaged(list(zip(paths, signatures, strict=True)))
    assert [path for path, _ in check_images(paths, cache=cache).unreadable] == paths[:1]


@pytest.mark.parametrize("decoder", ["cpu", "gpu"])
def test_an_image_that_is_replaced_after_the_check_is_not_extracted(tmp_path: Path, decoder: str) -> None:
    paths = [tmp_path / "kept.jpg", tmp_path / "replaced.jpg"]
    for path in paths:
        RGB.save(path)
    lists = [ImageList([ImageItem(path) for path in paths], None, check_images(paths).signatures)]
    RGB.transpose(Image.Transpose.ROTATE_180).save(paths[1])
    batches = BatchedImageDataset(lists, [ImageBatch(0, (0, 1), (48, 60))], decoder)[0]
    faults = [fault for batch in batches if isinstance(batch, LoadedBatch) for fault in batch.faults]
    assert [(row, permanent) for row, _, permanent in faults] == [(1, False)]
    assert "replaced.jpg: the file has changed since it was checked" in faults[0][1]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((3.9, 2.9, 20.9, 10.1), np.s_[2:10, 3:20]),
        ((0, 0, 60, 47), np.s_[:, :]),
        ((10, 10, 1000.5, 1000), np.s_[10:, 10:]),
        ((-7, -0.5, 5, 5), np.s_[:5, :5]),
    ],
)
def test_crops_equal_those_of_the_reference(box: images.Box, expected: tuple[slice, slice], tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    RGB.save(path)
    np.testing.assert_array_equal(read_image(path, box), read_with_cv2(path)[expected])
    assert check_images([ImageItem(path, box)]).problems == []


@pytest.mark.parametrize("box", [(5, 5, 5.9, 9), (9, 9, 3, 3), (60, 0, 70, 9), (-9, -9, -1, -1), (0, 0, np.nan, 5)])
def test_empty_crops_raise_errors(box: images.Box, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    RGB.save(path)
    with pytest.raises(InputError, match=r"a\.png: box"):
        read_image(path, box)
    ((_, reason),) = check_images([ImageItem(path, box)]).problems
    assert "box" in reason


def test_max_side_shrinks_images_without_aliasing(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.indices((100, 200)).sum(0).astype(np.uint8) % 2 * 255).save(path)
    small = read_image(path, max_side=50)
    assert small.shape == (25, 50, 3)
    assert abs(small.astype(int) - 127).max() < 20, "a checkerboard must average out, not alias"
    assert read_image(path, box=(0, 0, 40, 80), max_side=50).shape == (50, 25, 3)
    assert read_image(path, max_side=200).shape == (100, 200, 3)
    assert shrink(np.zeros((1, 3000, 3), np.uint8), 100).shape == (1, 100, 3)
    with pytest.raises(InputError, match="max_side"):
        read_image(path, max_side=0)


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data does not exist")
def test_real_images_equal_cv2() -> None:
    paths = sorted(REAL.glob("*/jpg/*.jpg"))
    assert len(paths) > 900
    for path in random.Random(0).sample(paths, 60):
        np.testing.assert_array_equal(read_image(path), read_with_cv2(path), err_msg=str(path))
    assert check_images(paths).problems == []
