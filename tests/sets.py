"""Write small evaluation sets in the official layouts, with several views of noise textures."""

from __future__ import annotations

import pickle
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def texture(landmark: int, view: int, size: tuple[int, int] = (120, 96)) -> Image.Image:
    """Return a view of a landmark: a coarse pattern per landmark, with a shift and noise per view."""
    coarse = np.random.default_rng(landmark).uniform(0, 255, (8, 10, 3))
    rng = np.random.default_rng([landmark, view])
    noisy = np.clip(coarse + rng.normal(0, 12, coarse.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(np.roll(noisy, rng.integers(0, 2), axis=1)).resize(size, Image.Resampling.BICUBIC)


def write_revisited(
    root: Path, name: str = "mini", landmarks: int = 6, views: int = 5, size: tuple[int, int] = (120, 96)
) -> Path:
    """Write `root/name/{jpg/,gnd_name.pkl}`; view 0 of a landmark is the query, 1 and 2 are easy, the last is junk."""
    jpg = root / name / "jpg"
    jpg.mkdir(parents=True)
    imlist, qimlist, gnd = [], [], []
    for landmark in range(landmarks):
        first = len(imlist)
        for view in range(views):
            image = f"l{landmark}_{view:06d}"
            texture(landmark, view, size).save(jpg / f"{image}.jpg", quality=95)
            (imlist if view else qimlist).append(image)
        ids = list(range(first, len(imlist)))
        box = [4.5, 3.2, size[0] - 2.0, size[1] - 1.0]
        gnd.append({"bbx": box, "easy": ids[:2], "hard": ids[2:-1], "junk": ids[-1:]})
    data = {"imlist": imlist, "qimlist": qimlist, "gnd": gnd}
    (root / name / f"gnd_{name}.pkl").write_bytes(pickle.dumps(data))
    return root / name


def write_distractors(root: Path, name: str = "noise", count: int = 4) -> Path:
    """Write distractors to `root/name/{jpg/,name.txt}`."""
    jpg = root / name / "jpg"
    jpg.mkdir(parents=True)
    for i in range(count):
        texture(1000 + i, 0).save(jpg / f"d{i}.jpg")
    (root / name / f"{name}.txt").write_text("".join(f"d{i}.jpg\n" for i in range(count)))
    return root / name


def break_scan(path: Path) -> None:
    """Damage a JPEG so that its header and its end are valid but decoding fails."""
    data = bytearray(path.read_bytes())
    data[data.rindex(b"\xff\xda") + 6] = 0x33  # Huffman tables that the file does not define
    path.write_bytes(data)


def write_folders(root: Path, landmarks: int = 3, views: int = 3) -> Path:
    """Write labeled images to `root/<label>/<view>.jpg`."""
    for landmark in range(landmarks):
        (root / f"label{landmark}").mkdir(parents=True)
        for view in range(views):
            texture(landmark, view).save(root / f"label{landmark}" / f"{view}.jpg")
    return root


def png_of(width: int, height: int) -> bytes:
    """Return a PNG whose header states this size, but which contains almost no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def make_tars(photos: Any, folder: Path, count: int = 3) -> Path:
    """Write the images to images_000.tar, ... in turn, with a file that is not an image in each."""
    folder.mkdir()
    for number in range(count):
        with tarfile.open(folder / f"images_{number:03d}.tar", "w") as tar:
            tar.add(__file__, "README.txt")
            for index in range(number, len(photos), count):
                tar.add(photos.path(index), photos.path(index).relative_to(photos.root))
    return folder
