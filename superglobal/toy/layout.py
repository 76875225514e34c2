"""Write the image lists and ground-truth files of the toy data set. Classify images as easy, hard or junk."""

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

JUNK_SHARE = 0.15  # junk images show less than this fraction of the landmark
EASY_SHARE = 0.6  # easy images show at least this fraction of the landmark
EASY_YAW = 30.0  # maximum difference between the yaw angles of an easy pair, in degrees
EASY_SCALE = 2.0  # maximum ratio of the scales of an easy pair
CLEAN_SHARE = 0.2  # images in train_clean.csv show at least this fraction of the landmark


def relation(query: Photo, photo: Photo) -> str:
    """Classify a database image of the same landmark as the query.

    Returns:
        "junk" if less than `JUNK_SHARE` of the landmark is visible in the database image. "easy" if at least
        `EASY_SHARE` is visible in it, the yaw angles differ by at most `EASY_YAW` degrees, the scales (pixels per
        meter) differ by a factor of at most `EASY_SCALE`, and both images or neither show a night scene. "hard"
        otherwise.
    """
    if photo.share < JUNK_SHARE:
        return "junk"
    near = abs(query.yaw - photo.yaw) <= EASY_YAW
    alike = max(query.scale, photo.scale) <= EASY_SCALE * min(query.scale, photo.scale)
    same_hour = (query.light == "night") == (photo.light == "night")
    return "easy" if near and alike and same_hour and photo.share >= EASY_SHARE else "hard"


def write_layouts(root: Path, photos: Sequence[Photo]) -> dict[str, int]:
    """Write all image lists and ground-truth files below `root`, in the layouts of the official data sets.

    Returns:
        The numbers of "easy", "hard" and "junk" pairs of a query and a database image.
    """
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
    """Return the file name of an image without ".jpg". All image lists use this name."""
    return PurePosixPath(photo.file).stem


def landmark_id(photo: Photo) -> int:
    """Return the `landmark_id` of an image in the GLDv2 lists.

    As in GLDv2, the ids are not consecutive, and the ids of the index images differ from those of the training images.
    """
    return 101 + 7 * photo.landmark if photo.place == TRAINING else 50_003 + 11 * photo.landmark


def _write_revisited(folder: Path, queries: Sequence[Photo], database: Sequence[Photo]) -> dict[str, int]:
    """Write the ground-truth file `gnd_toy.pkl` to `folder`.

    Return the numbers of "easy", "hard" and "junk" pairs of a query and a database image.
    """
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
    """Write the lists `train.csv` and `train_clean.csv` to `folder`.

    `train.csv` lists all training images. `train_clean.csv` lists only those that show enough of the landmark.
    """
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
    """Write `index.csv` and `index_image_to_landmark.csv` to `folder`.

    The first file lists the index images, and the second one lists the landmark id of each index image.
    """
    ordered = sorted(photos, key=name_of)
    _write_csv(folder / "index.csv", ("id",), ([name_of(p)] for p in ordered))
    rows = ([name_of(p), str(landmark_id(p))] for p in ordered)
    _write_csv(folder / "index_image_to_landmark.csv", ("id", "landmark_id"), rows)


def _write_test(folder: Path, photos: Sequence[Photo], index: Sequence[Photo]) -> None:
    """Write `test.csv` and the solution files (ground truth) of the retrieval and recognition tasks.

    If a test image shows an evaluation landmark, its retrieval solution lists the index images of this landmark. If it
    shows a training landmark, its recognition solution is the id of this landmark. As in GLDv2, a test image without a
    solution is marked "Ignored" in the retrieval file and has an empty landmark in the recognition file.
    """
    ordered = sorted(photos, key=name_of)
    relevant: dict[int, list[str]] = defaultdict(list)
    for photo in sorted(index, key=name_of):
        if photo.share >= JUNK_SHARE:
            relevant[photo.landmark].append(name_of(photo))
    retrieval, recognition = [], []
    for number, photo in enumerate(ordered):
        usage = "Public" if number % 3 == 0 else "Private"
        images = relevant[photo.landmark] if photo.place == EVALUATION else []
        retrieval.append([name_of(photo), " ".join(images) or "None", usage if images else "Ignored"])
        recognition.append([name_of(photo), str(landmark_id(photo)) if photo.place == TRAINING else "", usage])
    _write_csv(folder / "test.csv", ("id",), ([name_of(p)] for p in ordered))
    _write_csv(folder / "retrieval_solution_v2.1.csv", ("id", "images", "Usage"), retrieval)
    _write_csv(folder / "recognition_solution_v2.1.csv", ("id", "landmarks", "Usage"), recognition)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a CSV file atomically. `header` has the column names, and `rows` the values of each row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())
