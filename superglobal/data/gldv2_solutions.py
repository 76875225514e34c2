"""Read GLDv2 solutions (ground truth of the test images), and read and write submissions (predictions), as CSV files.

The formats are described at github.com/cvdfoundation/google-landmark. Submissions are parsed in the same way as by the
code of the organizers (tensorflow/models, delf, google_landmarks_dataset/dataset_file_io.py), with one exception: here,
lines that contradict each other raise an error.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from superglobal.data.gldv2_csv import IMAGE_ID, LANDMARK_ID
from superglobal.errors import InputError
from superglobal.utils.io import read_file

Task = Literal["retrieval", "recognition"]
_COLUMN: dict[Task, str] = {"retrieval": "images", "recognition": "landmarks"}
_USAGES = ("Public", "Private", "Ignored")


@dataclass(frozen=True)
class Solution:
    """Ground truth of the Q test images that are scored, in the order of the file.

    Attributes:
        path: the solution file.
        task: "retrieval" or "recognition".
        ids: (Q,) S16 image ids of the scored test images.
        truth: for each scored test image: in the retrieval task, the ids of its relevant index images, (n,) S16 with
            n >= 1; in the recognition task, the ids of its landmarks, (n,) int64, empty if it shows no landmark.
        lines: (Q,) int64 line number of each image in the file.
        public: (Q,) bool mask of the images in the public part of the test set; the others are in the private part.
        ignored: ids of the test images that are not scored.
    """

    path: Path
    task: Task
    ids: np.ndarray
    truth: list[np.ndarray]
    lines: np.ndarray
    public: np.ndarray
    ignored: frozenset[bytes]

    @property
    def parts(self) -> dict[str, np.ndarray]:
        """Masks of the images in the parts "public", "private" and "all" of the test set: name to (Q,) bool."""
        return {"public": self.public, "private": ~self.public, "all": np.ones(len(self.ids), bool)}

    def provenance(self) -> dict[str, str]:
        """Return the name and the SHA-256 of the solution file, to be recorded with the results."""
        return {"file": self.path.name, "sha256": hashlib.sha256(read_file(self.path)).hexdigest()}


def read_solution(path: str | Path, task: Task | None = None) -> Solution:
    """Read a solution file.

    The file has the columns id, Usage (Public, Private or Ignored), and images (retrieval) or landmarks (recognition).

    Args:
        path: the file.
        task: expected task; by default, the columns of the file determine the task.

    Raises:
        InputError: the file is missing or belongs to another task, or a line is invalid.
    """
    path = Path(path)
    columns, rows = _read_rows(path, {"id", "Usage"})
    file_task = task or next((name for name, column in _COLUMN.items() if column in columns), None)
    if file_task is None or _COLUMN[file_task] not in columns:
        expected = _COLUMN[task] if task else " or ".join(_COLUMN.values())
        raise InputError(f"{path}: columns {', '.join(columns)}; expected id, {expected}, Usage")
    read = _image_ids if file_task == "retrieval" else _landmark_ids
    ids, truth, lines, public, ignored = [], [], [], [], set()
    for line, row in rows:
        place = f"{path}, line {line}"
        if row["Usage"] not in _USAGES:
            raise InputError(f"{place}: Usage {row['Usage']!r}, expected one of {', '.join(_USAGES)}")
        if row["Usage"] == "Ignored":
            ignored.add(row["id"].encode())
            continue
        ids.append(row["id"].encode())
        truth.append(read(row[_COLUMN[file_task]], place))
        lines.append(line)
        public.append(row["Usage"] == "Public")
    if not ids:
        raise InputError(
            f"{path}: the Usage of all {len(ignored)} test images is Ignored; expected Public or Private images"
        )
    arrays = np.array(ids, "S16"), truth, np.array(lines, np.int64), np.array(public, bool)
    return Solution(path, file_task, *arrays, frozenset(ignored))


def read_retrieval_submission(path: str | Path, solution: Solution) -> list[np.ndarray]:
    """Read a retrieval submission.

    The file has the columns id and images (ids of index images separated by spaces, best first). Blank lines, empty
    predictions, and predictions for ignored test images are skipped. Spaces around a prediction are removed.

    Returns:
        For each image of the solution, the ids of its predicted images, (n,) S16; empty if there is no prediction.

    Raises:
        InputError: the file is missing or lacks a column, or a line has an unknown, repeated or invalid id.
    """
    ranked = [np.empty(0, "S16") for _ in solution.ids]
    for row, place, cell in _predictions(Path(path), solution):
        ranked[row] = np.array([_image_id(word, place) for word in cell.split(" ")], "S16")
    return ranked


def read_recognition_submission(path: str | Path, solution: Solution) -> tuple[np.ndarray, np.ndarray]:
    """Read a recognition submission.

    The file has the columns id and landmarks (a landmark id, a space and a score). Blank lines, empty predictions, and
    predictions for ignored test images are skipped.

    Returns:
        For each image of the solution, the predicted landmark id, (Q,) int64, and its score, (Q,) float64. If there is
        no prediction for an image, they are -1 and NaN.

    Raises:
        InputError: the file is missing or lacks a column, a line has an unknown, repeated or invalid id, or a
            prediction does not consist of a landmark id and a score.
    """
    landmarks, scores = np.full(len(solution.ids), -1), np.full(len(solution.ids), np.nan)
    for row, place, cell in _predictions(Path(path), solution):
        words = cell.split(" ")
        try:
            score = float(words[1])
        except (IndexError, ValueError):
            score = math.nan
        if len(words) != 2 or not LANDMARK_ID.fullmatch(words[0]) or math.isnan(score):
            raise InputError(f"{place}: prediction {cell!r}; expected a landmark_id, a space and a score")
        landmarks[row], scores[row] = int(words[0]), score
    return landmarks, scores


def retrieval_submission(ids: np.ndarray, images: Iterable[np.ndarray]) -> bytes:
    """Return the contents of a retrieval submission file.

    Args:
        ids: (Q,) S16 ids of the test images.
        images: for each test image, the ids of its predicted index images, best first, (n,) S16.
    """
    return _submission("images", ids, (b" ".join(ranked.tolist()).decode() for ranked in images))


def recognition_submission(ids: np.ndarray, landmarks: np.ndarray, scores: np.ndarray) -> bytes:
    """Return the contents of a recognition submission file.

    Args:
        ids: (Q,) S16 ids of the test images.
        landmarks: (Q,) int64 predicted landmark ids.
        scores: (Q,) float64 scores of the predictions.
    """
    predictions = zip(landmarks.tolist(), scores.tolist(), strict=True)
    return _submission("landmarks", ids, (f"{landmark} {score!r}" for landmark, score in predictions))


def _submission(column: str, ids: np.ndarray, cells: Iterable[str]) -> bytes:
    """Return the contents of a CSV file with one row per test image.

    Args:
        column: name of the second column; the first column is "id".
        ids: (Q,) S16 ids of the test images.
        cells: for each test image, the text in the second column.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", column])
    writer.writerows(zip((image.decode() for image in ids.tolist()), cells, strict=True))
    return text.getvalue().encode()


def _read_rows(path: Path, required: set[str]) -> tuple[Sequence[str], Iterator[tuple[int, dict[str, str]]]]:
    """Read a CSV file that has one row per image.

    Args:
        path: the file.
        required: names of the columns that the file must have; "id" must be among them.

    Returns:
        The column names, and an iterator over the rows. For each row, the iterator yields the line number and a dict
        from column name to text.

    Raises:
        InputError: the file cannot be read or lacks a required column, a row has the wrong number of fields, or an id
            is invalid or repeated. Errors in rows are raised by the iterator.
    """
    # Python's default limit on the length of a field is too small, because a field can contain thousands of ids.
    csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.reader(io.StringIO(read_file(path).decode("utf-8-sig"), newline=""))
    except FileNotFoundError as error:
        raise InputError(f"file not found: {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    columns: Sequence[str] = next(reader, [])
    if not required <= set(columns):
        raise InputError(f"{path}: columns {', '.join(columns) or 'none'}; expected {', '.join(sorted(required))}")

    def rows() -> Iterator[tuple[int, dict[str, str]]]:
        line_of: dict[str, int] = {}
        try:
            for cells in filter(None, reader):
                line, place = reader.line_num, f"{path}, line {reader.line_num}"
                if len(cells) != len(columns):
                    raise InputError(f"{place}: {len(cells)} fields, expected {len(columns)}")
                row = dict(zip(columns, cells, strict=True))
                _image_id(row["id"], place)
                if (first := line_of.setdefault(row["id"], line)) != line:
                    raise InputError(f"{place}: image {row['id']} is also in line {first}; remove one of the lines")
                yield line, row
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: not CSV ({error})") from error

    return columns, rows()


def _predictions(path: Path, solution: Solution) -> Iterator[tuple[int, str, str]]:
    """Read a submission, and yield each prediction for a test image that is scored.

    Yields:
        The index of the test image in `solution.ids`, the file and line of the prediction for error messages, and the
        text of the prediction.
    """
    column = _COLUMN[solution.task]
    row_of = {image: row for row, image in enumerate(solution.ids.tolist())}
    for line, row in _read_rows(path, {"id", column})[1]:
        image, cell = row["id"].encode(), row[column].strip(" ")
        if not cell or image in solution.ignored:
            continue
        if image not in row_of:
            raise InputError(f"{path}, line {line}: image {row['id']} is not in {solution.path}")
        yield row_of[image], f"{path}, line {line}", cell


def _image_ids(cell: str, place: str) -> np.ndarray:
    """Parse the text of a CSV field: image ids separated by spaces.

    Args:
        cell: text of the field.
        place: file and line of the field, for error messages.

    Returns:
        The image ids, (n,) S16 with n >= 1.
    """
    if not cell.split():
        raise InputError(f"{place}: no relevant images; expected image ids, or Usage Ignored")
    return _require_unique(np.array([_image_id(word, place) for word in cell.split()], "S16"), place)


def _landmark_ids(cell: str, place: str) -> np.ndarray:
    """Parse the text of a CSV field: landmark ids separated by spaces.

    Args:
        cell: text of the field.
        place: file and line of the field, for error messages.

    Returns:
        The landmark ids, (n,) int64.
    """
    for word in cell.split():
        if not LANDMARK_ID.fullmatch(word):
            raise InputError(f"{place}: {word!r} is not a landmark_id; expected a number")
    return _require_unique(np.array(cell.split(), "S18").astype(np.int64), place)


def _image_id(word: str, place: str) -> bytes:
    """Check that `word` is a valid image id, and return it as bytes.

    `place` is the file and line that contain it, for the error message.
    """
    if not IMAGE_ID.fullmatch(word):
        raise InputError(f"{place}: {word!r}; expected an image id of 16 hexadecimal digits")
    return word.encode()


def _require_unique(values: np.ndarray, place: str) -> np.ndarray:
    """Check that no id in `values`, (n,), occurs twice, and return `values`.

    `place` is the file and line that contain the ids, for the error message.
    """
    unique, counts = np.unique(values, return_counts=True)
    if len(unique) < len(values):
        twice: Any = unique[counts > 1][0]
        raise InputError(f"{place}: {twice.decode() if isinstance(twice, bytes) else twice} is listed twice")
    return values
