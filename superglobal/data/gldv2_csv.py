"""GLDv2's lists of millions of photos as arrays, read by Arrow: no Python object per photo.

Formats (github.com/cvdfoundation/google-landmark): train.csv has id, url, landmark_id; train_clean.csv has landmark_id
and images, the ids of a landmark separated by spaces.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from superglobal.errors import InputError

T = TypeVar("T")
_BLOCK = 1 << 23  # bytes that Arrow parses at a time; a row must fit, and a landmark of 10,000 photos has 170 KB
_PORTION = 1 << 19  # ids that are looked at as text at a time
_NUMBER, _ID = re.compile(r"[0-9]{1,18}"), re.compile(r"[0-9a-f]{16}")


def read_list(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Every photo of a list, in its order.

    Returns:
        (N,) S16 image ids of 16 hexadecimal digits; (N,) int64 landmark ids, 0 or more.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it cannot be read, has other columns, names no photo, or has a landmark or an image id that is none.
    """
    return _read(path, _parsed)


def read_ids(path: Path) -> np.ndarray:
    """Every photo of a list without landmarks (index.csv, test.csv: one column, id), in its order.

    Returns:
        (N,) S16 image ids of 16 hexadecimal digits.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: as `read_list`.
    """
    return _read(path, _parsed_ids)


def hex_values(ids: np.ndarray) -> np.ndarray | None:
    """(N,) S16 of 16 lower-case hexadecimal digits each -> (N,) uint64, in the same order; None if one is not."""
    values = np.empty(len(ids), np.uint64)
    for start in range(0, len(ids), _PORTION):
        text = ids[start : start + _PORTION].tobytes().decode("latin-1")
        try:
            packed = bytes.fromhex(text)
        except ValueError:
            return None
        if packed.hex() != text:  # Python also takes capitals and skips blanks
            return None
        values[start : start + _PORTION] = np.frombuffer(packed, ">u8")
    return values


def read_landmarks(path: str | Path) -> np.ndarray:
    """Landmark ids of a text file, one a line; blank lines and what follows a # do not count.

    Returns:
        (n,) int64, sorted, each once.

    Raises:
        InputError: no such file, or a line that is no number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"list of landmarks cannot be read: {path} ({error}); expected one landmark_id a line"
        ) from error
    found = []
    for number, line in enumerate(lines, 1):
        word = line.partition("#")[0].strip()
        if word and not _NUMBER.fullmatch(word):
            raise InputError(f"{path}, line {number}: {word!r} is not a landmark_id; expected one number a line")
        if word:
            found.append(int(word))
    return np.unique(np.array(found, np.int64))


def _read(path: Path, parsed: Callable[[Path], T]) -> T:
    try:
        return parsed(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file ({error}); download it again") from error
    except pa.ArrowInvalid as error:
        raise _fault(path, str(error)) from error
    finally:
        pa.default_memory_pool().release_unused()  # what Arrow would keep for the next list


def _parsed_ids(path: Path) -> np.ndarray:
    columns = _header(path)
    if "id" not in columns:
        raise InputError(f"{path}: columns {sorted(columns)}, expected id")
    return _ids(path, _columns(path, ["id"]).column(0))


def _parsed(path: Path) -> tuple[np.ndarray, np.ndarray]:
    clean = _is_clean(path)
    table = _columns(path, ["landmark_id", "images" if clean else "id"])
    numbers, texts = table.column(0), table.column(1)
    if not pc.all(pc.match_substring_regex(numbers, "^[0-9]{1,18}$"), min_count=0).as_py():
        raise _fault(path, "a landmark_id is not a number")
    landmarks = pc.cast(numbers, pa.int64()).to_numpy()
    if clean:
        words = pc.utf8_split_whitespace(texts)
        landmarks = landmarks[pc.list_parent_indices(words).to_numpy()]
        texts = pc.list_flatten(words)
        there = pc.greater(pc.binary_length(texts), 0)  # a landmark without photos has one empty word
        texts, landmarks = texts.filter(there), landmarks[there.to_numpy()]
    return _ids(path, texts), landmarks


def _is_clean(path: Path) -> bool:
    """Whether a line has a landmark and all its photos, rather than one photo."""
    columns = _header(path)
    clean = {"landmark_id", "images"} <= columns
    if not clean and not {"landmark_id", "id"} <= columns:
        raise InputError(f"{path}: columns {sorted(columns)}, expected landmark_id with images (clean) or id (full)")
    return clean


def _header(path: Path) -> set[str]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return set(next(csv.reader(file), ()))


def _columns(path: Path, names: list[str]) -> pa.Table:
    return pyarrow.csv.read_csv(
        str(path),
        pyarrow.csv.ReadOptions(block_size=_BLOCK),
        pyarrow.csv.ParseOptions(newlines_in_values=True),
        pyarrow.csv.ConvertOptions(include_columns=names, column_types=dict.fromkeys(names, pa.string())),
    )


def _ids(path: Path, texts: pa.ChunkedArray) -> np.ndarray:
    if not len(texts):
        raise InputError(f"{path}: lists no photos; download it again")
    if not pc.all(pc.equal(pc.binary_length(texts), 16)).as_py():
        raise _fault(path, "an image id has not 16 digits")
    fixed = texts.cast(pa.binary(16)).combine_chunks()
    ids = np.frombuffer(fixed.buffers()[1], "S16", len(fixed), 16 * fixed.offset)
    if hex_values(ids) is None:
        raise _fault(path, "an image id has other characters than hexadecimal digits")
    return ids


def _fault(path: Path, otherwise: str) -> InputError:
    """The first line at fault, looked for row by row once it is known that there is one."""
    # A landmark of thousands of photos has them all in one field.
    csv.field_size_limit(2**31 - 1)
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        clean = "images" in (rows.fieldnames or ())
        for row in rows:
            number = row.get("landmark_id", "0") or ""  # index.csv and test.csv have none
            if not _NUMBER.fullmatch(number):
                return InputError(f"{path}, line {rows.line_num}: landmark_id {number!r} is not a number")
            for image in (row["images"] or "").split() if clean else [row["id"] or ""]:
                if not _ID.fullmatch(image):
                    return InputError(f"{path}, line {rows.line_num}: {image!r} is no image id (16 hexadecimal digits)")
    return InputError(f"{path}: not a list of photos ({otherwise}); download it again")
