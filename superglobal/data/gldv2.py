"""Google Landmarks v2 as it is: `train/a/b/c/<id>.jpg` beside its lists.

Layout and formats: github.com/cvdfoundation/google-landmark (train.csv: id, url, landmark_id; train_clean.csv:
landmark_id, images with the ids separated by spaces).
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from superglobal.data.sets import TOY
from superglobal.errors import InputError

_SITE = "https://s3.amazonaws.com/google-landmark"


@dataclass(frozen=True)
class TrainList:
    """Training photos of chosen landmarks.

    Attributes:
        root: the `train` folder, above a/b/c/<id>.jpg.
        ids: (N,) image ids, bytes of 16 hexadecimal digits.
        labels: (N,) int64, 0..classes-1.
        landmarks: (classes,) int64, the landmark_id behind each label.
    """

    root: Path
    ids: np.ndarray
    labels: np.ndarray
    landmarks: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, index: int) -> Path:
        """`a/b/c/abc....jpg` below the root: the first three digits are folders."""
        image = self.ids[index].decode()
        return self.root / image[0] / image[1] / image[2] / f"{image}.jpg"

    def digest(self) -> str:
        """SHA-256 over which photos show which landmarks."""
        digest = hashlib.sha256(self.ids.tobytes())
        digest.update(self.landmarks[self.labels].tobytes())
        return digest.hexdigest()


def how_to_get(root: Path) -> str:
    """Layout and official addresses, and what does without."""
    return (
        f"GLDv2 is expected as {root}/train/a/b/c/<id>.jpg with {root}/train.csv and {root}/train_clean.csv; images: "
        f"{_SITE}/train/images_{{000..499}}.tar, lists: {_SITE}/metadata/{{train,train_clean}}.csv\n{TOY}"
    )


def read_train(root: str | Path, table: str = "train_clean.csv", min_images: int = 2) -> TrainList:
    """Photos of every landmark with at least `min_images` of them, sorted by landmark and id.

    Args:
        root: folder with the lists and the `train` folder.
        table: "train_clean.csv" or "train.csv".
        min_images: landmarks with fewer are left out: one photo teaches no likeness.

    A clean landmark without photos counts as not there.

    Raises:
        InputError: no such list, another format, an id that is none or comes twice, or no landmark left.
    """
    root = Path(root)
    path = root / table
    # A landmark of thousands of photos has them all in one field.
    csv.field_size_limit(2**31 - 1)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            pairs = sorted(_pairs(path, csv.DictReader(file)))
    except FileNotFoundError as error:
        raise InputError(f"training list not found: {path}\n{how_to_get(root)}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file ({error}); download it again") from error
    if not pairs:
        raise InputError(f"{path}: lists no photos; download it again")
    landmarks = np.array([landmark for landmark, _ in pairs], dtype=np.int64)
    ids = np.array([image for _, image in pairs], dtype="S16")
    names, times = np.unique(ids, return_counts=True)
    if (times > 1).any():
        raise InputError(f"{path}: image {names[times > 1][0].decode()} is listed twice; remove one line")
    values, labels, counts = np.unique(landmarks, return_inverse=True, return_counts=True)
    keep = counts >= min_images
    if not keep.any():
        raise InputError(f"{path}: no landmark has {min_images} images; lower data.min_images")
    return _subset(TrainList(root / "train", ids, labels, values), keep)


def split_landmarks(photos: TrainList, fraction: float, seed: int) -> tuple[TrainList, TrainList]:
    """Hold out whole landmarks, drawn by `seed`, for retrieval validation: (training, validation).

    Retrieval is asked about places never seen in training, so the validation's places are not either.
    """
    classes = len(photos.landmarks)
    held = np.zeros(classes, bool)
    held[np.random.default_rng(seed).permutation(classes)[: round(fraction * classes)]] = True
    return _subset(photos, ~held), _subset(photos, held)


def _subset(photos: TrainList, keep: np.ndarray) -> TrainList:
    chosen = keep[photos.labels]
    label_of = np.cumsum(keep) - 1
    return TrainList(photos.root, photos.ids[chosen], label_of[photos.labels[chosen]], photos.landmarks[keep])


def _pairs(path: Path, rows: csv.DictReader) -> Iterator[tuple[int, str]]:
    columns = set(rows.fieldnames or ())
    clean = {"landmark_id", "images"} <= columns
    if not clean and not {"landmark_id", "id"} <= columns:
        raise InputError(f"{path}: columns {sorted(columns)}, expected landmark_id with images (clean) or id (full)")
    for row in rows:
        number = row["landmark_id"] or ""
        if not number.isdecimal() or len(number) > 18:
            raise InputError(f"{path}, line {rows.line_num}: landmark_id {number!r} is not a number")
        for image in (row["images"] or "").split() if clean else [row["id"] or ""]:
            if len(image) != 16 or not set(image) <= set("0123456789abcdef"):
                raise InputError(f"{path}, line {rows.line_num}: {image!r} is no image id (16 hexadecimal digits)")
            yield int(number), image
