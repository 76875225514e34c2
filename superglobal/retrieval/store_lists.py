"""The lists in a descriptor store, beside its rows: what was described, where it lay, what was skipped and why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from superglobal.errors import InputError
from superglobal.files import write_atomically

NAMES, PATHS, SKIPPED = "names.json", "paths.json", "skipped.txt"
NO_REASON = "\tno reason given"


def read_names(folder: Path, rows: int) -> list[str]:
    """The line of each row that the fingerprint covers.

    Raises:
        InputError: the list is missing or damaged.
    """
    mend = f"copy it from another part of the same list, or delete {folder} to extract again"
    return _read_lines(folder / NAMES, rows, mend)


def read_paths(folder: Path, rows: int) -> list[str]:
    """The name of each row's image for people and other programs: its path, each once.

    Raises:
        InputError: there are none, or they are damaged.
    """
    path = folder / PATHS
    mend = "run the evaluation again, which writes it and extracts nothing that is there"
    found = _read_lines(path, rows, mend)
    if len(set(found)) < rows:
        raise InputError(f"{path}: expected a path for each row, none of them twice; {mend}")
    return found


def record_paths(folder: Path, paths: Sequence[str]) -> None:
    """Keep the paths of all rows, unless these are there already.

    Raises:
        InputError: the place cannot be written.
    """
    path, data = folder / PATHS, json.dumps(list(paths)).encode()
    if not (path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data):
        write_atomically(path, data)


def read_skipped(folder: Path, rows: int) -> dict[int, str]:
    """Row -> image, tab, reason; empty where nothing was skipped.

    Raises:
        InputError: the list is damaged.
    """
    path = folder / SKIPPED
    if not path.exists():
        return {}
    found: dict[int, str] = {}
    for number, line in enumerate(_text(path, "remove it; the rows stay skipped").splitlines(), 1):
        note, _, row = line.rpartition("\t")
        if "\t" not in note or not row.isdecimal() or int(row) >= rows:
            raise InputError(
                f"{path}, line {number}: expected image, reason and a row under {rows}, tabs between them; mend the "
                "line or remove the file: the rows stay skipped"
            )
        found[int(row)] = note
    return found


def add_skipped(folder: Path, notes: Mapping[int, str]) -> None:
    """Append row -> image, tab, reason.

    Raises:
        InputError: the place cannot be written.
    """
    try:
        with (folder / SKIPPED).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(_skipped_text(notes))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); free space and run again") from error


def write_skipped(folder: Path, notes: Mapping[int, str]) -> None:
    """These and no others; no file where there are none.

    Raises:
        InputError: the place cannot be written.
    """
    if notes or (folder / SKIPPED).exists():
        write_atomically(folder / SKIPPED, _skipped_text(notes).encode(errors="backslashreplace"))


def _skipped_text(notes: Mapping[int, str]) -> str:
    return "".join(f"{' '.join(note.splitlines())}\t{row}\n" for row, note in notes.items())


def _read_lines(path: Path, rows: int, mend: str) -> list[str]:
    """A JSON list of as many strings as there are rows."""
    try:
        found = json.loads(_text(path, mend))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); expected a line for each of {rows} rows; {mend}") from error
    if not isinstance(found, list) or not all(isinstance(line, str) for line in found):
        raise InputError(f"{path} is damaged: expected a JSON list of text, a line for each of {rows} rows; {mend}")
    if len(found) != rows:
        raise InputError(f"{path}: {len(found)} lines, expected one for each of {rows} rows; {mend}")
    return found


def _text(path: Path, mend: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; {mend}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); expected UTF-8 text; {mend}") from error
