"""The official layouts around the photos of a toy set, and the rules by which photos are easy, hard or junk."""

from __future__ import annotations

import csv
import io
import pickle
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from superglobal.toy.landmark import EVALUATION, TRAINING
from superglobal.toy.photo import COLUMNS, Photo
from superglobal.utils.io import write_atomically

JUNK_SHARE = 0.15
EASY_SHARE = 0.6
EASY_YAW = 30.0
EASY_SCALE = 2.0
CLEAN_SHARE = 0.2  # what train_clean.csv asks of a photo


def relation(query: Photo, photo: Photo) -> str:
    """What a database photo of the query's landmark is to the query.

    - "junk": under `JUNK_SHARE` of the landmark is seen.
    - "easy": the yaws differ by at most `EASY_YAW` degrees, the scales (pixels a metre) by a factor of at most
      `EASY_SCALE`, at least `EASY_SHARE` is seen, and both photos or neither are taken at night.
    - "hard": everything else.
    """
    if photo.share < JUNK_SHARE:
        return "junk"
    near = abs(query.yaw - photo.yaw) <= EASY_YAW
    alike = max(query.scale, photo.scale) <= EASY_SCALE * min(query.scale, photo.scale)
    same_hour = (query.light == "night") == (photo.light == "night")
    return "easy" if near and alike and same_hour and photo.share >= EASY_SHARE else "hard"


def write_layouts(root: Path, photos: Sequence[Photo]) -> dict[str, int]:
    """All lists and ground truths below `root`; returns how many pairs are easy, hard and junk."""
    sets: dict[str, list[Photo]] = defaultdict(list)
    for photo in photos:
        sets[photo.set].append(photo)
    _write_csv(root / "photos.csv", COLUMNS, (photo.row() for photo in photos))
    _write_train(root / "gldv2", sets["train"])
    _write_index(root / "gldv2", sets["index"])
    _write_test(root / "gldv2", sets["test"], sets["index"])
    names = "".join(f"{PurePosixPath(photo.file).name}\n" for photo in sets["distractor"])
    write_atomically(root / "toy_distractors" / "toy_distractors.txt", names.encode())
    return _write_revisited(root / "toy", sets["query"], sets["database"])


def name_of(photo: Photo) -> str:
    """A photo's file name without ".jpg", which is what the lists of all layouts hold."""
    return PurePosixPath(photo.file).stem


def landmark_id(photo: Photo) -> int:
    """Number in the GLDv2-like lists: not consecutive, and the index counts otherwise than training, as in GLDv2."""
    return 101 + 7 * photo.landmark if photo.place == TRAINING else 50_003 + 11 * photo.landmark


def _write_revisited(folder: Path, queries: Sequence[Photo], database: Sequence[Photo]) -> dict[str, int]:
    counts = {"easy": 0, "hard": 0, "junk": 0}
    gnd: list[dict[str, Any]] = []
    for query in queries:
        entry: dict[str, Any] = {"bbx": [float(v) for v in (query.x1, query.y1, query.x2, query.y2)]}
        entry |= {kind: [] for kind in counts}
        for row, photo in enumerate(database):
            if photo.landmark == query.landmark:
                kind = relation(query, photo)
                entry[kind].append(row)
                counts[kind] += 1
        gnd.append(entry)
    data = {"imlist": [name_of(p) for p in database], "qimlist": [name_of(p) for p in queries], "gnd": gnd}
    write_atomically(folder / "gnd_toy.pkl", pickle.dumps(data, protocol=4))
    return counts


def _write_train(folder: Path, photos: Sequence[Photo]) -> None:
    ordered = sorted(photos, key=name_of)
    _write_csv(
        folder / "train.csv",
        ("id", "url", "landmark_id"),
        ([name_of(p), f"toy://{p.place}/{p.landmark}/{p.view}", str(landmark_id(p))] for p in ordered),
    )
    clean: dict[int, list[str]] = defaultdict(list)
    for photo in ordered:
        if photo.share >= CLEAN_SHARE:
            clean[landmark_id(photo)].append(name_of(photo))
    rows = ([str(number), " ".join(names)] for number, names in sorted(clean.items()) if len(names) > 1)
    _write_csv(folder / "train_clean.csv", ("landmark_id", "images"), rows)


def _write_index(folder: Path, photos: Sequence[Photo]) -> None:
    ordered = sorted(photos, key=name_of)
    _write_csv(folder / "index.csv", ("id",), ([name_of(p)] for p in ordered))
    rows = ([name_of(p), str(landmark_id(p))] for p in ordered)
    _write_csv(folder / "index_image_to_landmark.csv", ("id", "landmark_id"), rows)


def _write_test(folder: Path, photos: Sequence[Photo], index: Sequence[Photo]) -> None:
    """Retrieval asks for index photos of evaluation landmarks, recognition for the number of a training landmark.

    A photo that a task does not ask about is Ignored in retrieval and has no landmark in recognition, as in GLDv2.
    """
    ordered = sorted(photos, key=name_of)
    found: dict[int, list[str]] = defaultdict(list)
    for photo in sorted(index, key=name_of):
        if photo.share >= JUNK_SHARE:
            found[photo.landmark].append(name_of(photo))
    retrieval, recognition = [], []
    for number, photo in enumerate(ordered):
        usage = "Public" if number % 3 == 0 else "Private"
        images = found[photo.landmark] if photo.place == EVALUATION else []
        retrieval.append([name_of(photo), " ".join(images) or "None", usage if images else "Ignored"])
        recognition.append([name_of(photo), str(landmark_id(photo)) if photo.place == TRAINING else "", usage])
    _write_csv(folder / "test.csv", ("id",), ([name_of(p)] for p in ordered))
    _write_csv(folder / "retrieval_solution_v2.1.csv", ("id", "images", "Usage"), retrieval)
    _write_csv(folder / "recognition_solution_v2.1.csv", ("id", "landmarks", "Usage"), recognition)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())
