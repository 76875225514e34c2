"""Files that are whole or not there, and the name of the one that training leaves for evaluation."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from superglobal.errors import InputError

EXPORT = "best.safetensors"


@contextmanager
def replacing(path: Path, before: Path | None = None) -> Iterator[BinaryIO]:
    """A file beside `path` to write to; at the end it is flushed to disk and renamed: readers see the old or the new.

    Args:
        path: of the file.
        before: where the old file is moved to, if there is one.

    Raises:
        InputError: the place cannot be written, or is full; what was there is untouched.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())
        if before is not None and path.exists():
            os.replace(path, before)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}){_space(path, temporary)}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all.

    Raises:
        InputError: the place cannot be written; what was there before is untouched.
    """
    with replacing(path) as file:
        file.write(data)


def umask() -> int:
    """The process's file mode mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _space(path: Path, temporary: str | None) -> str:
    """What there is, and what was written of the file when it failed."""
    try:
        free = shutil.disk_usage(path.parent).free
        written = os.path.getsize(temporary) if temporary else 0
    except OSError:
        return "; choose another place"
    return (
        f"; {written / 1e6:.1f} MB of it were written, {free / 1e6:.1f} MB are free: make room or choose another place"
    )
