"""Read the GLDv2 lists of millions of images into arrays. Arrow parses them without creating a Python object per image.

The lists are CSV files (github.com/cvdfoundation/google-landmark). train.csv has the columns id, url and landmark_id.
train_clean.csv has one row per landmark, with the columns landmark_id and images (image ids separated by spaces).
index.csv and test.csv have the column id.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from superglobal.errors import InputError
from superglobal.utils.io import open_file, read_file

IMAGE_ID, LANDMARK_ID = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9]{1,18}")
# Number of bytes that Arrow parses at a time. It must exceed the longest row: a landmark of 10,000 images takes 170 KB.
_BLOCK = 1 << 23


def read_list(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a training list, train.csv or train_clean.csv.

    Returns:
        The image ids of 16 hexadecimal digits, (N,) S16, and the non-negative landmark id of each image, (N,) int64,
        in the order of the list.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file cannot be read, lacks a column, contains no images, contains an invalid landmark or image
            id, or contains an image twice.
    """
    with _input_errors(path):
        columns = _column_names(path)
        clean = {"landmark_id", "images"} <= columns  # A row of a clean list has all images of a landmark.
        if not clean and not {"landmark_id", "id"} <= columns:
            expected = "landmark_id and either images (clean list) or id (full list)"
            raise InputError(f"{path}: columns {sorted(columns)}, expected {expected}")
        numbers, texts = _read_columns(path, ["landmark_id", "images" if clean else "id"])
        if not pc.all(pc.match_substring_regex(numbers, "^[0-9]{1,18}$"), min_count=0).as_py():
            raise _first_error(path, "a landmark_id is not a number")
        landmarks = pc.cast(numbers, pa.int64()).to_numpy()
        if clean:
            words = pc.utf8_split_whitespace(texts)
            landmarks = landmarks[pc.list_parent_indices(words).to_numpy()]
            texts = pc.list_flatten(words)
            nonempty = pc.greater(pc.binary_length(texts), 0)  # An empty cell is split into one empty text.
            texts, landmarks = texts.filter(nonempty), landmarks[nonempty.to_numpy()]
        return _image_ids(path, texts), landmarks


def read_ids(path: Path) -> np.ndarray:
    """Read a list that has no column of landmarks (index.csv or test.csv).

    Returns:
        The image ids of 16 hexadecimal digits, (N,) S16, in the order of the list.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: the file cannot be read, lacks a column, contains no images, contains an invalid image id, or
            contains an image twice.
    """
    with _input_errors(path):
        columns = _column_names(path)
        if "id" not in columns:
            raise InputError(f"{path}: columns {sorted(columns)}, expected id")
        return _image_ids(path, _read_columns(path, ["id"])[0])


def read_landmark_ids(path: str | Path) -> np.ndarray:
    """Read landmark ids from a text file with one id per line. Blank lines and comments after # are ignored.

    Returns:
        Sorted unique ids, (n,) int64.

    Raises:
        InputError: there is no such file, or a line is not a number.
    """
    try:
        lines = read_file(path).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected one landmark_id per line") from error
    landmarks = []
    for number, line in enumerate(lines, 1):
        word = line.partition("#")[0].strip()
        if word and not LANDMARK_ID.fullmatch(word):
            raise InputError(f"{path}, line {number}: {word!r} is not a landmark_id; expected one number per line")
        if word:
            landmarks.append(int(word))
    return np.unique(np.array(landmarks, np.int64))


@contextmanager
def _input_errors(path: Path) -> Iterator[None]:
    """Convert errors that are raised in the `with` statement to an InputError that names the file `path`.

    A FileNotFoundError is not converted.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file ({error}); download it again") from error
    except pa.ArrowInvalid as error:
        raise _first_error(path, str(error)) from error
    finally:
        # Return the memory to the operating system. Otherwise, Arrow would keep it.
        pa.default_memory_pool().release_unused()


def _column_names(path: Path) -> set[str]:
    """Return the column names in the first line of a CSV file."""
    with io.TextIOWrapper(open_file(path), encoding="utf-8-sig", newline="") as file:
        return set(next(csv.reader(file), ()))


def _read_columns(path: Path, names: list[str]) -> list[pa.ChunkedArray]:
    """Read the columns with the given names from a CSV file, as strings."""
    table = pyarrow.csv.read_csv(
        str(path),
        pyarrow.csv.ReadOptions(block_size=_BLOCK),
        pyarrow.csv.ParseOptions(newlines_in_values=True),
        pyarrow.csv.ConvertOptions(include_columns=names, column_types=dict.fromkeys(names, pa.string())),
    )
    return table.columns


def _image_ids(path: Path, texts: pa.ChunkedArray) -> np.ndarray:
    """Check that all image ids `texts` are valid and unique, and return them as (N,) S16.

    `path` is the list that contains the ids, for the error message.
    """
    if not len(texts):
        raise InputError(f"{path}: contains no images; download it again")
    if not pc.all(pc.match_substring_regex(texts, "^[0-9a-f]{16}$"), min_count=0).as_py():
        raise _first_error(path, "an image id does not have 16 hexadecimal digits")
    fixed = texts.cast(pa.binary(16)).combine_chunks()
    ids = np.frombuffer(fixed.buffers()[1], "S16", len(fixed), 16 * fixed.offset)
    ordered = np.sort(ids)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise InputError(f"{path}: image {twice[0].decode()} is listed twice; remove one line")
    return ids


def _first_error(path: Path, otherwise: str) -> InputError:
    """Find the first invalid row of a list that Arrow could not parse, and return the error to raise for this row.

    The list is read a second time, row by row, with Python's csv module.

    Args:
        path: the list.
        otherwise: reason for the error message if every row is valid.
    """
    csv.field_size_limit(2**31 - 1)  # Python's default limit is too small for a field with thousands of image ids.
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        clean = "images" in (rows.fieldnames or ())
        for row in rows:
            number = row.get("landmark_id", "0") or ""  # index.csv and test.csv lack this column; 0 is valid.
            if not LANDMARK_ID.fullmatch(number):
                return InputError(f"{path}, line {rows.line_num}: landmark_id {number!r} is not a number")
            for image in (row["images"] or "").split() if clean else [row["id"] or ""]:
                if not IMAGE_ID.fullmatch(image):
                    expected = "expected an image id of 16 hexadecimal digits"
                    return InputError(f"{path}, line {rows.line_num}: {image!r}; {expected}")
    return InputError(f"{path}: not a list of images ({otherwise}); download it again")
