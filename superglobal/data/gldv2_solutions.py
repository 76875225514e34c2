"""GLDv2's solutions (ground truth of the test images) and submissions (predictions for them) as CSV files.

Formats: github.com/cvdfoundation/google-landmark; what counts as a prediction as the organisers' reader has it
(tensorflow/models, delf, google_landmarks_dataset/dataset_file_io.py), but that contradictions are refused.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from superglobal.errors import InputError

Task = Literal["retrieval", "recognition"]
_ANSWERS: dict[Task, str] = {"retrieval": "images", "recognition": "landmarks"}
_ID, _NUMBER = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9]{1,18}")
_USAGES = ("Public", "Private", "Ignored")


@dataclass(frozen=True)
class Solution:
    """Ground truth of the Q test images that count, in the order of the file.

    Attributes:
        path: of the file.
        task: "retrieval" or "recognition".
        ids: (Q,) S16 image ids.
        truth: per image its relevant index images, (n,) S16, one at least; or its landmarks, (n,) int64, none for an
            image that shows no landmark.
        lines: (Q,) int64, where each stands in the file.
        public: (Q,) bool; the others are private.
        ignored: ids of the test images that do not count.
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
        """(Q,) bool each."""
        return {"public": self.public, "private": ~self.public, "all": np.ones(len(self.ids), bool)}

    def about(self) -> dict[str, str]:
        """Which file it was, for the record."""
        return {"file": self.path.name, "sha256": hashlib.sha256(self.path.read_bytes()).hexdigest()}


def read_solution(path: str | Path, task: Task | None = None) -> Solution:
    """Read a solution: columns id, Usage (Public, Private or Ignored) and images or landmarks, which is the task.

    Raises:
        InputError: no such file, another task, or a line that is none: with its number.
    """
    path = Path(path)
    rows = _Rows(path, {"id", "Usage"})
    found = task or next((name for name, column in _ANSWERS.items() if column in rows.columns), None)
    if found is None or _ANSWERS[found] not in rows.columns:
        wanted = _ANSWERS[task] if task else " or ".join(_ANSWERS.values())
        raise InputError(f"{path}: columns {', '.join(rows.columns)}; expected id, {wanted}, Usage")
    read = _images if found == "retrieval" else _landmarks
    ids, truth, lines, public, ignored = [], [], [], [], set()
    for place, row in rows.unique():
        if row["Usage"] not in _USAGES:
            raise InputError(f"{place}: Usage {row['Usage']!r}, expected one of {', '.join(_USAGES)}")
        if row["Usage"] == "Ignored":
            ignored.add(row["id"].encode())
            continue
        ids.append(row["id"].encode())
        truth.append(read(row[_ANSWERS[found]], place))
        lines.append(rows.line)
        public.append(row["Usage"] == "Public")
    if not ids:
        raise InputError(f"{path}: all {len(ignored)} test images are Ignored; expected some Public or Private")
    arrays = np.array(ids, "S16"), truth, np.array(lines, np.int64), np.array(public, bool)
    return Solution(path, found, *arrays, frozenset(ignored))


def read_ranked(path: str | Path, solution: Solution) -> list[np.ndarray]:
    """A retrieval submission: columns id and images, the ids of index images separated by spaces, best first.

    Blank lines, empty predictions, spaces at an end and predictions for ignored test images do not count.

    Returns:
        Per image of the solution (n,) S16; none where there is no prediction.

    Raises:
        InputError: no such file, other columns, or a line that repeats or does not know its id or holds what is none.
    """
    found = [np.empty(0, "S16") for _ in solution.ids]
    for row, place, cell in _predictions(Path(path), solution):
        found[row] = np.array([_image(word, place) for word in cell.split(" ")], "S16")
    return found


def read_recognised(path: str | Path, solution: Solution) -> tuple[np.ndarray, np.ndarray]:
    """A recognition submission: columns id and landmarks, which is a landmark id, a space and a score.

    What does not count: see `read_ranked`.

    Returns:
        (Q,) int64 landmark ids, -1 where there is no prediction; (Q,) float64 scores, NaN there.

    Raises:
        InputError: as `read_ranked`, or a prediction that is not a landmark and a number.
    """
    classes, scores = np.full(len(solution.ids), -1), np.full(len(solution.ids), np.nan)
    for row, place, cell in _predictions(Path(path), solution):
        words = cell.split(" ")
        try:
            score = float(words[1])
        except (IndexError, ValueError):
            score = math.nan
        if len(words) != 2 or not _NUMBER.fullmatch(words[0]) or math.isnan(score):
            raise InputError(f"{place}: {cell!r} is no prediction; expected a landmark_id, a space and a score")
        classes[row], scores[row] = int(words[0]), score
    return classes, scores


def ranked_submission(ids: np.ndarray, images: Iterable[np.ndarray]) -> bytes:
    """The file for (Q,) S16 test ids and per image (n,) S16 index ids, best first."""
    return _submission("images", ids, (b" ".join(one.tolist()).decode() for one in images))


def recognised_submission(ids: np.ndarray, classes: np.ndarray, scores: np.ndarray) -> bytes:
    """The file for (Q,) S16 test ids, landmark ids and float64 scores."""
    return _submission("landmarks", ids, (f"{c} {s!r}" for c, s in zip(classes.tolist(), scores.tolist(), strict=True)))


def _submission(column: str, ids: np.ndarray, answers: Iterable[str]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", column])
    writer.writerows(zip((one.decode() for one in ids.tolist()), answers, strict=True))
    return text.getvalue().encode()


class _Rows:
    """Lines of a CSV file with a header, blank ones left out, by column.

    Raises InputError if it cannot be read, lacks one of `needed`, or has a line of another length.
    """

    def __init__(self, path: Path, needed: set[str]) -> None:
        self.path = path
        self.line = 0
        csv.field_size_limit(2**31 - 1)  # thousands of ids may be in one field
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError as error:
            raise InputError(f"file not found: {path}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read ({error})") from error
        self._reader = csv.reader(io.StringIO(text, newline=""))
        self.columns: Sequence[str] = next(self._reader, [])
        if not needed <= set(self.columns):
            found = ", ".join(self.columns) or "none"
            raise InputError(f"{path}: columns {found}; expected {', '.join(sorted(needed))} among them")

    def unique(self) -> Iterator[tuple[str, dict[str, str]]]:
        """(place for messages, column -> cell) of each line, of which no two have the same id."""
        seen: dict[str, int] = {}
        try:
            for cells in self._reader:
                self.line = self._reader.line_num
                place = f"{self.path}, line {self.line}"
                if not cells:
                    continue
                if len(cells) != len(self.columns):
                    raise InputError(f"{place}: {len(cells)} fields, expected {len(self.columns)}")
                row = dict(zip(self.columns, cells, strict=True))
                _image(row["id"], place)
                if row["id"] in seen:
                    raise InputError(f"{place}: image {row['id']} is in line {seen[row['id']]} already; remove one")
                seen[row["id"]] = self.line
                yield place, row
        except csv.Error as error:
            raise InputError(f"{self.path}, line {self._reader.line_num}: not CSV ({error})") from error


def _predictions(path: Path, solution: Solution) -> Iterator[tuple[int, str, str]]:
    """(row in the solution, place for messages, prediction without spaces at its ends) of each that counts."""
    column = _ANSWERS[solution.task]
    row_of = {image: row for row, image in enumerate(solution.ids.tolist())}
    for place, row in _Rows(path, {"id", column}).unique():
        image, cell = row["id"].encode(), row[column].strip(" ")
        if not cell or image in solution.ignored:
            continue
        if image not in row_of:
            raise InputError(f"{place}: image {row['id']} is not in {solution.path}")
        yield row_of[image], place, cell


def _images(cell: str, place: str) -> np.ndarray:
    words = cell.split()
    if not words:
        raise InputError(f"{place}: no relevant image for a query that counts; expected ids, or Usage Ignored")
    return _each_once(np.array([_image(word, place) for word in words], "S16"), place)


def _landmarks(cell: str, place: str) -> np.ndarray:
    words = cell.split()
    wrong = [word for word in words if not _NUMBER.fullmatch(word)]
    if wrong:
        raise InputError(f"{place}: {wrong[0]!r} is not a landmark_id, which is a number")
    return _each_once(np.array(words, "S18").astype(np.int64), place)


def _image(word: str, place: str) -> bytes:
    if not _ID.fullmatch(word):
        raise InputError(f"{place}: {word!r} is no image id (16 hexadecimal digits)")
    return word.encode()


def _each_once(values: np.ndarray, place: str) -> np.ndarray:
    unique, counts = np.unique(values, return_counts=True)
    if len(unique) < len(values):
        twice: Any = unique[counts > 1][0]
        raise InputError(f"{place}: {twice.decode() if isinstance(twice, bytes) else twice} is listed twice")
    return values
