"""Manage the directory of a training run: its lock, the record of its settings, and its final score."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.errors import InputError
from superglobal.reporting.runs import flatten
from superglobal.retrieval.rows import map_npy
from superglobal.utils.io import CORRUPT_IMAGES, EXPORT, file_lock, read_json, write_atomically, write_error

CHECKPOINTS = "checkpoints"
FORMAT = "superglobal-training-2"
_RECORD, _CODES = "training.json", "images.npy"


def export_path(outputs: str, name: str) -> Path:
    """Return the path to which the training run `name` exports its best network."""
    return Path(outputs) / "train" / name / EXPORT


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Create a run directory, and lock it until the `with` statement ends.

    The lock is also released if the process dies.

    Raises:
        InputError: another process is training in the folder, or the folder cannot be written.
    """
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(Path(error.filename), error, "change paths.outputs") from error
    with file_lock(folder / "lock", f"{folder}: another process is training there", "or give a new name="):
        yield


def start_run(folder: Path, record: dict[str, Any], codes: np.ndarray, restart: bool) -> float | None:
    """Check that a run directory belongs to this training run, and write its record.

    Args:
        folder: run directory.
        record: record of the run, as JSON types; "identity" contains the settings that a resumed run must share.
        codes: (N,) uint64 codes that identify the contents of the images; 0 for corrupt images. A run can be resumed if
            images have become corrupt or were repaired, but not if the contents of a valid image have changed.
        restart: whether to remove the checkpoints of an unfinished run and start again.

    Returns:
        The best validation mAP of a finished run; None if the run is not finished.

    Raises:
        InputError: the directory belongs to another run or is damaged; it stays unchanged.
    """
    existing = _read_record(folder)
    score = finished_score(folder)
    if existing is None and (folder / EXPORT).is_file():
        existing = {}
    if score is None and not (folder / EXPORT).is_file() and not any((folder / CHECKPOINTS).glob("*.ckpt")):
        existing = None  # the run ended before it saved a checkpoint, so there is nothing to resume
    if existing and existing.get("format") != FORMAT:
        raise InputError(
            f"{folder} contains a training run of an earlier version of superglobal, which cannot be resumed; its "
            "network can still be evaluated. Give a new name=, or remove the folder"
        )
    if existing is not None:
        _require_same_settings(folder, existing.get("identity", {}), record["identity"])
        codes = _require_same_images(folder, codes)
    if score is not None:
        return score
    if restart:
        _remove_outputs(folder)
    file = io.BytesIO()
    np.save(file, codes)
    write_atomically(folder / _CODES, file.getvalue())
    _write_record(folder, {"format": FORMAT, **record, "finished": None})
    return None


def is_unfinished(folder: Path) -> bool:
    """Return True if the folder contains an unfinished training run."""
    return (folder / _RECORD).is_file() and finished_score(folder) is None


def finished_score(folder: Path) -> float | None:
    """Return the best validation mAP of a run; None if it is not finished or its exported network is missing."""
    score = (_read_record(folder) or {}).get("finished")
    return None if score is None or not (folder / EXPORT).is_file() else float(score)


def finish_run(folder: Path, score: float) -> None:
    """Record that a run is finished, with its best validation mAP as `score`."""
    record = _read_record(folder)
    assert record is not None
    _write_record(folder, {**record, "finished": score})


def _require_same_settings(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError if the settings of this run differ from those of the run in the folder.

    Args:
        folder: run directory.
        before: identity of the run in the folder, as recorded there.
        now: identity of this run.
    """
    before, now = flatten(before), flatten(now)
    differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if differing:
        values = {key: str(before.get(key)) for key in differing[:6]}
        shown = [
            f"{key} ({value if len(value) <= 24 else f'{value[:20]}...'} in that run)" for key, value in values.items()
        ]
        raise InputError(
            f"{folder} contains a run with different settings: {', '.join(shown)}. Give a new name=, or remove the "
            "folder"
        )


def _require_same_images(folder: Path, codes: np.ndarray) -> np.ndarray:
    """Check that no image has changed since its code was recorded in a run directory.

    Args:
        folder: run directory.
        codes: (N,) uint64 codes of the images; 0 for corrupt images.

    Returns:
        (N,) uint64 codes to record. An image that is corrupt now keeps the code that was recorded before.

    Raises:
        InputError: an image has changed, or the recorded codes cannot be read.
    """
    path = folder / _CODES
    try:
        before = map_npy(path)
        if before.shape != codes.shape or before.dtype != codes.dtype:
            raise ValueError(f"shape {before.shape} and type {before.dtype}, expected {codes.shape} and {codes.dtype}")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}); remove {folder} to train again") from error
    changed = np.flatnonzero((before != codes) & (before != 0) & (codes != 0))
    if len(changed):
        raise InputError(
            f"{folder} contains a run with different images: {len(changed)} of {len(codes)} have changed. Give a new "
            "name=, or remove the folder"
        )
    return np.where(codes != 0, codes, before)


def _remove_outputs(folder: Path) -> None:
    """Remove the outputs of an unfinished run, but keep the record of its settings and its log file.

    Raises:
        InputError: a file or folder cannot be removed.
    """
    try:
        shutil.rmtree(folder / CHECKPOINTS)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        for name in (CORRUPT_IMAGES, "nonfinite.txt", "wandb_id", "curves.csv", EXPORT):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"resume=restart: {error.filename} cannot be removed ({error.strerror}); remove {folder}"
        ) from error


def _read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record in a run directory; None if there is none. Raises InputError if it is damaged."""
    path = folder / _RECORD
    try:
        record = read_json(path) if path.is_file() else None
        if not isinstance(record, dict | None):
            raise ValueError("not an object")
        return record
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); remove {folder} to train again") from error


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of a run into the run directory `folder`."""
    write_atomically(folder / _RECORD, json.dumps(record, indent=1).encode())
