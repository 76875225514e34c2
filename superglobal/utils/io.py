"""Files that are whole or not there, locks, and the names of what a training leaves for others."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from superglobal.errors import InputError

log = logging.getLogger(__name__)
EXPORT, CORRUPT_IMAGES = "best.safetensors", "corrupt_images.txt"


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


@contextmanager
def only_process(path: Path, taken: str, way_out: str) -> Iterator[None]:
    """Meanwhile no other process gets this far with the same lock file; the lock dies with its process.

    Args:
        path: of the file; its folder exists.
        taken, way_out: beginning and end of the message when another process has it.

    Raises:
        InputError: another process has it, or the place cannot be written.
    """
    with _lock_file(path) as file:
        if not _taken(path, file):
            raise InputError(f"{taken} ({_holder(file)}); wait for it, stop it, {way_out}")
        _sign(path, file)
        yield


@contextmanager
def one_at_a_time(path: Path, what: str) -> Iterator[None]:
    """Meanwhile other processes that get here with the same lock file wait; the lock dies with its process.

    Args:
        path: of the file; its folder exists.
        what: the process does, for the message of one that waits.

    Raises:
        InputError: the place cannot be written.
    """
    with _lock_file(path) as file:
        if not _taken(path, file):
            log.info("%s: another process is at it (%s); waiting for it", what, _holder(file))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX)
            except OSError as error:
                raise InputError(f"{path}: cannot be locked ({error.strerror}); choose another place") from error
        _sign(path, file)
        yield


def _lock_file(path: Path) -> TextIO:
    try:
        return path.open("a+")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def _taken(path: Path, file: TextIO) -> bool:
    """Take the lock, if no other process has it; whether it was taken."""
    try:
        # Unlike flock's, these locks are not inherited by the processes that decode photos.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise InputError(f"{path}: cannot be locked ({error.strerror}); choose another place") from error
    return True


def _holder(file: TextIO) -> str:
    file.seek(0)
    return file.read().strip() or "unknown process"


def _sign(path: Path, file: TextIO) -> None:
    """Say in a lock file who has it."""
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); free space") from error


def digest(path: Path) -> str:
    """BLAKE2 of a file's bytes, to know them by."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


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
