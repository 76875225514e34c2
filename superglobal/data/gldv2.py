"""Google Landmarks v2 as it is: its lists, beside them `train/a/b/c/<id>.jpg` or elsewhere its tar files.

Layout and formats: github.com/cvdfoundation/google-landmark.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from superglobal.data.download.catalogue import GLDV2_PAGE, download_command
from superglobal.data.landmark_lists import hex_values, read_landmarks, read_list
from superglobal.data.photo_index import load_index
from superglobal.data.sets import TOY
from superglobal.data.sources import PhotoSource, PhotoTree, relative_path
from superglobal.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainList:
    """Training photos of chosen landmarks.

    Attributes:
        root: the `train` folder, above a/b/c/<id>.jpg.
        ids: (N,) image ids, bytes of 16 hexadecimal digits.
        labels: (N,) int32, 0..classes-1.
        landmarks: (classes,) int64, the landmark_id behind each label.
        source: where the photos' bytes come from; None is the tree below `root`.
    """

    root: Path
    ids: np.ndarray
    labels: np.ndarray
    landmarks: np.ndarray
    source: PhotoSource | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, index: int) -> Path:
        """`a/b/c/abc....jpg` below the root: the first three digits are folders."""
        return self.root / relative_path(self.ids[index])

    def read(self, index: int) -> bytes:
        """The photo's file.

        Raises:
            FaultyImageError: it is missing or cannot be read; the message is the reason, `place` says where.
        """
        return self._source().read(self.ids[index])

    def place(self, index: int) -> str:
        """Its path, or tar file and member ("images_012.tar:a/b/c/abc....jpg"), for messages."""
        return self._source().place(self.ids[index])

    def digest(self) -> str:
        """SHA-256 over which photos show which landmarks."""
        digest = hashlib.sha256(self.ids.tobytes())
        digest.update(self.landmarks[self.labels].tobytes())
        return digest.hexdigest()

    def _source(self) -> PhotoSource:
        return self.source or PhotoTree(self.root)


def how_to_get(root: Path) -> str:
    """Layout, the command that gets it, and what does without."""
    return (
        f"GLDv2 is expected as {root}/train/a/b/c/<id>.jpg with {root}/train.csv and {root}/train_clean.csv; this gets "
        f"it from {GLDV2_PAGE}: {download_command('gldv2-train', root)} (with --packed the tar files stay packed, for "
        f"data.tars={root}/archives/train)\n{TOY}"
    )


def read_train(
    root: str | Path,
    table: str = "train_clean.csv",
    min_images: int = 2,
    classes_of: str | None = None,
    leave_out: str | Path | None = None,
    tars: str | Path | None = None,
) -> TrainList:
    """Photos of every landmark with at least `min_images` of them, sorted by landmark and id.

    Args:
        root: folder with the lists and the `train` folder.
        table: "train_clean.csv" or "train.csv".
        min_images: landmarks with fewer are left out: one photo teaches no likeness.
        classes_of: another list in `root`; only landmarks that it has too count. `train.csv` with the classes of
            `train_clean.csv` is what the Kaggle teams call GLDv2x.
        leave_out: a file of landmark ids, one a line (# begins a comment), that do not count: those of the evaluation
            sets, for training without overlap. Ids that no list has are counted in a warning.
        tars: folder of the official tar files, to read the photos from; needs the index of `prepare`.

    A clean landmark without photos counts as not there.

    Raises:
        InputError: no such list, another format, an id that is none or comes twice, no landmark left, or `tars`
            without an index that fits.
    """
    root = Path(root)
    path = root / table
    ids, landmarks = _read(root, table)
    if classes_of is not None:
        _, others = _read(root, classes_of)
        ids, landmarks = _where(np.isin(landmarks, others), ids, landmarks)
    if leave_out is not None:
        excluded = read_landmarks(leave_out)
        unknown = np.setdiff1d(excluded, landmarks)
        if len(unknown):
            log.warning("%s: %d of %d landmarks are not in %s", leave_out, len(unknown), len(excluded), path)
        kept = ~np.isin(landmarks, excluded)
        log.info("%s: left out %d landmarks, %d photos", leave_out, len(excluded) - len(unknown), int((~kept).sum()))
        ids, landmarks = _where(kept, ids, landmarks)
    values, labels, counts = np.unique(landmarks, return_inverse=True, return_counts=True)
    keep = counts >= min_images
    if not keep.any():
        raise InputError(f"{path}: no landmark has {min_images} images; lower data.min_images")
    source = None if tars is None else load_index(root, table, tars).tars(Path(tars))
    return _subset(TrainList(root / "train", ids, labels.astype(np.int32), values, source), keep)


def _read(root: Path, table: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids, landmarks) of a list, sorted by landmark and id."""
    path = root / table
    try:
        ids, landmarks = read_list(path)
    except FileNotFoundError as error:
        raise InputError(f"training list not found: {path}\n{how_to_get(root)}") from error
    values = require_unique(path, ids)
    order = np.lexsort((values, landmarks))
    del values
    return ids[order], landmarks[order]


def require_unique(path: Path, ids: np.ndarray) -> np.ndarray:
    """(N,) S16 ids of a list as (N,) uint64.

    Raises:
        InputError: one is listed twice.
    """
    values = hex_values(ids)
    assert values is not None
    ordered = np.sort(values)
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        raise InputError(f"{path}: image {ordered[twice[0]]:016x} is listed twice; remove one line")
    return values


def _where(keep: np.ndarray, ids: np.ndarray, landmarks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return ids[keep], landmarks[keep]


def split_landmarks(photos: TrainList, fraction: float, seed: int) -> tuple[TrainList, TrainList]:
    """Hold out whole landmarks, drawn by `seed`, for retrieval validation: (training, validation).

    Retrieval is asked about places never seen in training, so the validation's places are not either.
    """
    classes = len(photos.landmarks)
    held = np.zeros(classes, bool)
    held[np.random.default_rng(seed).permutation(classes)[: round(fraction * classes)]] = True
    return _subset(photos, ~held), _subset(photos, held)


def _subset(photos: TrainList, keep: np.ndarray) -> TrainList:
    if keep.all():
        return photos
    chosen = keep[photos.labels]
    label_of = (np.cumsum(keep) - 1).astype(np.int32)
    labels = label_of[photos.labels[chosen]]
    return replace(photos, ids=photos.ids[chosen], labels=labels, landmarks=photos.landmarks[keep])
