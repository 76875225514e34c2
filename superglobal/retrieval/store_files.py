"""Create and read the files of a descriptor store, and detect damaged files.

The files are the manifest, the shards, and the lists of image names, image paths and skipped rows.
"""

from __future__ import annotations

import contextlib
import errno
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
from superglobal.retrieval.rows import map_npy
from superglobal.utils.io import parse_json, read_file, read_json, umask, write_atomically, write_error

FORMAT = "superglobal-store-2"
SHARD_ROWS = 16384
DTYPES = ("float32", "float16")
NAMES, PATHS, SKIPPED = "names.json", "paths.json", "skipped.txt"
DONE, CHECKSUMS, VERIFIED = "done.npy", "checksums.npy", "verified.npy"
NO_REASON = "\tno reason given"
_MAX_SHARDS = 100_000  # maximum number of shards of a store
_MANIFEST_TYPES = {"fingerprint": str, "rows": int, "dim": int, "shard_rows": int, "identity": dict}


def fingerprint(identity: Mapping[str, Any], images: Sequence[str], dtype: str = "float32") -> str:
    """Return a SHA-256 digest, in hexadecimal, of everything that affects the stored descriptors.

    Args:
        identity: settings as plain types, such as `RetrievalNetwork.identity()` with the image settings added.
        images: one line per row with the name and the content signature of the image.
        dtype: dtype of the stored descriptors, "float32" or "float16".
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
    """Create a store without descriptors.

    The store is created in a temporary folder, which is then renamed. If several processes create the same store, all
    of them use the first one that is ready.

    Args:
        folder: folder of the new store.
        identity: everything that affects a descriptor, as plain types.
        images: N lines, one per row, with the name and the content signature of the image.
        dim: dimension D of the descriptors.
        shard_rows: number of rows per shard.
        provenance: versions and device, which are recorded in the manifest.
        dtype: dtype of the stored values, "float32" or "float16".

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
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
        for name, (shape, kind) in array_files(len(images), dim, shard_rows, dtype).items():
            np.lib.format.open_memmap(temporary / name, "w+", kind, shape).flush()
            if hasattr(os, "posix_fallocate"):
                # Reserve disk space for the sparse file now, because a process that writes to a memory map on a full
                # disk is killed.
                with (temporary / name).open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(temporary / name))
        write_atomically(temporary / NAMES, json.dumps(list(images)).encode())
        write_atomically(temporary / "manifest.json", json.dumps(manifest, indent=1).encode())
        with contextlib.suppress(FileExistsError, NotADirectoryError):
            _rename_new(temporary, folder)
    except OSError as error:
        size = len(images) * dim * np.dtype(dtype).itemsize / 2**20
        raise write_error(
            folder, error, f"set paths.stores to another folder (the store needs {size:.0f} MiB)"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def array_files(rows: int, dim: int, shard_rows: int, dtype: str) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return the shape and dtype of each `.npy` file of a store, by file name; the shards are the last ones, in order.

    Args:
        rows, dim, shard_rows, dtype: number of rows, dimension, rows per shard and dtype, as in the manifest.
    """
    shards = [min(shard_rows, rows - start) for start in range(0, rows, shard_rows)]
    return {
        DONE: ((rows,), np.dtype(np.uint8)),
        CHECKSUMS: ((rows,), np.dtype(np.uint32)),
        VERIFIED: ((len(shards), 3), np.dtype(np.int64)),
        **{f"shard-{i:05d}.npy": ((count, dim), np.dtype(dtype)) for i, count in enumerate(shards)},
    }


def _rename_new(source: Path, target: Path) -> None:
    """Rename the folder `source` to `target`. An empty folder at `target` is replaced.

    Raises:
        FileExistsError: there is already a store at `target`.
        InputError: there are other files at `target`.
    """
    try:
        os.rename(source, target)
    except OSError as error:
        if (target / "manifest.json").exists():  # Another process has already created the same store.
            raise FileExistsError(str(target)) from error
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise InputError(
                f"{target}: the folder has files but no manifest.json, so it is no complete descriptor store; remove it"
            ) from error
        raise


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and validate the manifest of a store, a dict with the settings, shape and origin of its descriptors.

    Raises:
        InputError: there is no store, or its manifest is damaged.
    """
    try:
        manifest = read_json(folder / "manifest.json")
        if manifest["format"] != FORMAT:
            raise InputError(
                f"{folder}: format {manifest['format']!r}, expected {FORMAT!r}; delete the folder to extract again"
            )
        for key, kind in _MANIFEST_TYPES.items():
            if not isinstance(manifest[key], kind) or (kind is int and manifest[key] < (key != "rows")):
                raise TypeError(f"{key}: {manifest[key]!r}")
        if manifest["dtype"] not in DTYPES:
            raise TypeError(f"dtype: {manifest['dtype']!r}")
        if manifest["rows"] > _MAX_SHARDS * manifest["shard_rows"]:
            raise ValueError(f"rows: {manifest['rows']}, shard_rows: {manifest['shard_rows']}")
        return manifest
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: no descriptor store (manifest.json is missing); give the folder of a store"
        ) from error
    except InputError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder}/manifest.json is damaged ({error!r}); delete the folder to extract again"
        ) from error


def map_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory-map a `.npy` file of a store, for reading and, if the file is writable, for writing.

    Args:
        path: the file.
        shape: expected shape.
        dtype: expected dtype.

    Raises:
        InputError: the file is missing or damaged, or has another shape or dtype.
    """
    if shape[0] == 0:
        return np.zeros(shape, dtype)
    try:
        array = map_npy(path)
        # The file is first opened for reading, to detect a truncated file. NumPy would extend such a file when opening
        # it for writing.
        if os.access(path, os.W_OK):
            array = map_npy(path, "r+")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: missing or damaged ({error}); delete {path.parent} to extract again") from error
    if array.shape != shape or array.dtype != dtype:
        raise InputError(
            f"{path}: shape {array.shape} and dtype {array.dtype}, expected {shape} and {dtype}; delete {path.parent} "
            "to extract again"
        )
    return array


def read_names(folder: Path, rows: int) -> list[str]:
    """Read the image list of a store: one line per row with the name and content signature of its image.

    Args:
        folder: folder of the store.
        rows: number of rows of the store.

    Raises:
        InputError: the list is missing or damaged.
    """
    fix = f"copy it from another store of the same image list, or delete {folder} to extract again"
    return _read_lines(folder / NAMES, rows, fix)


def read_paths(folder: Path, rows: int) -> list[str]:
    """Read the image path of each row. The paths are distinct, because users and programs identify rows by them.

    Args:
        folder: folder of the store.
        rows: number of rows of the store.

    Raises:
        InputError: the list is missing or damaged.
    """
    path = folder / PATHS
    fix = "run the evaluation again, which writes it without extracting again"
    paths = _read_lines(path, rows, fix)
    if len(set(paths)) < rows:
        raise InputError(f"{path}: expected a different path for each row; {fix}")
    return paths


def record_paths(folder: Path, paths: Sequence[str]) -> None:
    """Write the image paths of all rows to `paths.json`, unless the file already contains exactly these paths.

    Raises:
        InputError: the file cannot be written.
    """
    path, data = folder / PATHS, json.dumps(list(paths)).encode()
    if not (path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data):
        write_atomically(path, data)


def read_skipped(folder: Path, rows: int) -> dict[int, str]:
    """Read the notes about skipped rows from `skipped.txt`.

    Args:
        folder: folder of the store.
        rows: number of rows of the store.

    Returns:
        Dict from row number to note: the image, a tab and the reason. Empty if there is no file.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / SKIPPED
    if not path.exists():
        return {}
    notes: dict[int, str] = {}
    for number, line in enumerate(_read_text(path, "remove it; the rows stay skipped").splitlines(), 1):
        note, _, row = line.rpartition("\t")
        if "\t" not in note or not row.isdecimal() or int(row) >= rows:
            raise InputError(
                f"{path}, line {number}: expected image, reason and a row below {rows}, separated by tabs; correct the "
                "line or remove the file (the rows stay skipped)"
            )
        notes[int(row)] = note
    return notes


def add_skipped(folder: Path, notes: Mapping[int, str]) -> None:
    """Append notes about skipped rows to `skipped.txt`.

    Args:
        folder: folder of the store.
        notes: dict from row number to note: the image, a tab and the reason.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        with (folder / SKIPPED).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(_skipped_text(notes))
    except OSError as error:
        raise write_error(folder / SKIPPED, error, "set paths.stores to another folder") from error


def write_skipped(folder: Path, notes: Mapping[int, str]) -> None:
    """Replace the contents of `skipped.txt`. No file is created if there are no notes.

    Args:
        folder: folder of the store.
        notes: dict from row number to note: the image, a tab and the reason.

    Raises:
        InputError: the file cannot be written.
    """
    if notes or (folder / SKIPPED).exists():
        write_atomically(folder / SKIPPED, _skipped_text(notes).encode(errors="backslashreplace"))


def _skipped_text(notes: Mapping[int, str]) -> str:
    """Return the lines of `skipped.txt`: image, reason and row number, separated by tabs."""
    return "".join(f"{' '.join(note.splitlines())}\t{row}\n" for row, note in notes.items())


def _read_lines(path: Path, rows: int, fix: str) -> list[str]:
    """Read a JSON list with one string per row.

    Args:
        path: the file.
        rows: expected length of the list.
        fix: hint for the error message that says how to replace a missing or damaged file.
    """
    try:
        lines = parse_json(_read_text(path, fix))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); expected a JSON list of {rows} strings; {fix}") from error
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise InputError(f"{path} is damaged: expected a JSON list of {rows} strings, one per row; {fix}")
    if len(lines) != rows:
        raise InputError(f"{path}: {len(lines)} strings, expected {rows}, one per row; {fix}")
    return lines


def _read_text(path: Path, fix: str) -> str:
    """Read a UTF-8 file. If this fails, raise InputError with the text `fix`, which says how to replace the file."""
    try:
        return read_file(path).decode()
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; {fix}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); expected UTF-8 text; {fix}") from error
