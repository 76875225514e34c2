"""What a descriptor store is on disk: its manifest and shards, how a new one comes to be, and how damage is seen."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.errors import InputError
from superglobal.retrieval.rows import NPY_FAULTS
from superglobal.utils.io import umask, write_atomically

FORMAT = "superglobal-store-1"
SHARD_ROWS = 16384
DTYPES = ("float32", "float16")


def fingerprint(identity: Mapping[str, Any], images: Sequence[str], dtype: str = "float32") -> str:
    """SHA-256 of everything that changes a stored descriptor and of the list of images.

    Args:
        identity: plain types, such as `RetrievalNetwork.identity()` with the image settings beside it.
        images: one line per row: name and content signature.
        dtype: what descriptors are rounded to on disk; "float32" leaves the fingerprint as it was without it.
    """
    rounded = {} if dtype == "float32" else {"dtype": dtype}
    text = json.dumps({"identity": identity, "images": list(images), **rounded}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def create_store(
    folder: Path,
    identity: Mapping[str, Any],
    images: Sequence[str],
    dim: int,
    shard_rows: int,
    provenance: Mapping[str, Any],
    dtype: str,
) -> None:
    """Build the whole store beside its place and rename it there: of two creators one wins, none mixes."""
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint(identity, images, dtype),
        "rows": len(images),
        "dim": dim,
        "dtype": dtype,
        "shard_rows": shard_rows,
        "identity": dict(identity),
        "provenance": dict(provenance),
    }
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        temporary.chmod(0o777 & ~umask())
        np.lib.format.open_memmap(temporary / "done.npy", "w+", np.uint8, (len(images),)).flush()
        for i, count in enumerate(shard_sizes(len(images), shard_rows)):
            path = shard_path(temporary, i)
            np.lib.format.open_memmap(path, "w+", np.dtype(dtype), (count, dim)).flush()
            _reserve(path)
        write_atomically(temporary / NAMES, json.dumps(list(images)).encode())
        write_atomically(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
        # Renaming onto an existing folder fails: then another process made the same store first.
        with contextlib.suppress(FileExistsError, NotADirectoryError):
            _rename_new(temporary, folder)
    except OSError as error:
        raise InputError(
            f"{folder}: the descriptor store cannot be written ({error.strerror or error}); it needs "
            f"{len(images) * dim * np.dtype(dtype).itemsize / 2**20:.0f} MiB; set paths.stores to a place with room"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the descriptors in `folder` are and were made with.

    Raises:
        InputError: no store, or a damaged manifest.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise InputError(f"{folder}: store format {manifest['format']!r}, expected {FORMAT!r}; delete the folder")
        for key, kind in (
            ("fingerprint", str),
            ("rows", int),
            ("dim", int),
            ("shard_rows", int),
            ("identity", dict),
        ):
            if not isinstance(manifest[key], kind) or (kind is int and manifest[key] < (key != "rows")):
                raise TypeError(f"{key}: {manifest[key]!r}")
        if manifest["dtype"] not in DTYPES:
            raise TypeError(f"dtype: {manifest['dtype']!r}")
        return manifest
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no descriptor store (manifest.json is missing)") from error
    except InputError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder}/manifest.json is damaged ({error!r}); delete the folder to extract again"
        ) from error


def map_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A `.npy` of a store, writable where its file is. Raises InputError if it is missing, damaged or another."""
    if shape[0] == 0:
        return np.zeros(shape, dtype)
    try:
        array = np.lib.format.open_memmap(path, "r")
        if os.access(path, os.W_OK):  # only now: NumPy fills up a file that is too short if it may write to it
            array = np.lib.format.open_memmap(path, "r+")
    except NPY_FAULTS as error:
        raise InputError(f"{path}: missing or damaged ({error}); delete {path.parent} to extract again") from error
    if array.shape != shape or array.dtype != dtype:
        raise InputError(f"{path}: {array.shape} {array.dtype}, expected {shape} {dtype}; delete {path.parent}")
    return array


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.npy"


def shard_sizes(rows: int, shard_rows: int) -> list[int]:
    """Rows of each shard."""
    return [min(shard_rows, rows - start) for start in range(0, rows, shard_rows)]


def _reserve(path: Path) -> None:
    """Take the blocks of a sparse file now: later a full disk would kill the process through its memory map."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _rename_new(source: Path, target: Path) -> None:
    """Rename a folder to a name that must not exist (POSIX would replace an empty folder)."""
    try:
        os.rename(source, target)
    except OSError as error:
        if (target / "manifest.json").exists():
            raise FileExistsError(str(target)) from error
        raise


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
