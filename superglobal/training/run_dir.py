"""What training, evaluation and tuning share."""

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
from superglobal.utils.io import CORRUPT_IMAGES, EXPORT, file_lock, write_atomically


def export_path(outputs: str, name: str) -> Path:
    """Where the training run `name` leaves its best network."""
    return Path(outputs) / "train" / name / EXPORT


CHECKPOINTS = "checkpoints"
_RECORD, _CODES = "training.json", "photos.npy"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other process trains in `folder` meanwhile; the lock dies with its process, however that ends.

    Raises:
        InputError: another process does, or the folder cannot be written.
    """
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{error.filename}: cannot be written ({error.strerror}); choose another paths.outputs="
        ) from error
    with file_lock(folder / "lock", f"{folder}: another training is running there", "or give a new name="):
        yield


def claim(folder: Path, about: dict[str, Any], codes: np.ndarray, anew: bool) -> float | None:
    """Make `folder` this training's, and give the score if it is finished.

    Args:
        folder: of the training.
        about: plain types; `identity` is what makes a training another one.
        codes: (N,) uint64, of the contents of its photos, 0 for a bad one. A photo may be lost or mended while a
            training goes on, but not become another.
        anew: whether an unfinished one's checkpoints are removed.

    Raises:
        InputError: it is another training's, or damaged; nothing there was touched.
    """
    record = folder / _RECORD
    found = _read(folder)
    if found is None and (folder / EXPORT).is_file():
        found = {}
    if found is not None and finished(folder) is None and not _holds_work(folder):
        found = None
    if found is not None:
        before, now = flatten(found.get("identity", {})), flatten(about["identity"])
        differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if differing:
            told = [f"{key} ({_short(before.get(key))} there)" for key in differing[:6]]
            raise InputError(
                f"{folder} holds another training; different are {', '.join(told)}. Give a new name=, or remove the "
                "folder"
            )
    codes = codes if found is None else _same_photos(folder, codes)
    score = finished(folder)
    if score is not None:
        return score
    if anew:
        _forget(folder)
    file = io.BytesIO()
    np.save(file, codes)
    write_atomically(folder / _CODES, file.getvalue())
    content = {**about, "finished": None}
    write_atomically(record, json.dumps(content, indent=1).encode())
    return None


def _holds_work(folder: Path) -> bool:
    """Whether a step of its training is kept there."""
    return (folder / EXPORT).is_file() or any((folder / CHECKPOINTS).glob("*.ckpt"))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:20]}..."


def _same_photos(folder: Path, codes: np.ndarray) -> np.ndarray:
    """`codes`, and of photos that are bad now what they were before."""
    path = folder / _CODES
    try:
        before = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: damaged ({error}); remove {folder} to train again") from error
    changed = np.flatnonzero((before != codes) & (before != 0) & (codes != 0))
    if len(changed):
        raise InputError(
            f"{folder} holds another training; different are the contents of {len(changed)} of {len(codes)} photos. "
            "Give a new name=, or remove the folder"
        )
    return np.where(codes != 0, codes, before)


def _forget(folder: Path) -> None:
    """Remove what an unfinished training has left, but for its record and its log."""
    try:
        shutil.rmtree(folder / CHECKPOINTS)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        for name in (CORRUPT_IMAGES, "nonfinite.txt", "wandb_id", "curves.csv", EXPORT):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"resume=restart: {error.filename} cannot be removed ({error.strerror}); remove {folder}"
        ) from error


def is_unfinished(folder: Path) -> bool:
    """Whether a training is recorded there that has not come to its end."""
    return (folder / _RECORD).is_file() and finished(folder) is None


def finished(folder: Path) -> float | None:
    """The score of a finished training, if its export is there."""
    score = (_read(folder) or {}).get("finished")
    return None if score is None or not (folder / EXPORT).is_file() else float(score)


def finish(folder: Path, score: float) -> None:
    """Note that the training is finished."""
    content = _read(folder)
    assert content is not None
    write_atomically(folder / _RECORD, json.dumps({**content, "finished": score}, indent=1).encode())


def _read(folder: Path) -> dict[str, Any] | None:
    record = folder / _RECORD
    try:
        return json.loads(record.read_text()) if record.is_file() else None
    except ValueError as error:
        raise InputError(f"{record}: damaged ({error}); remove {folder} to train again") from error
