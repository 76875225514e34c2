"""Read regular files, write files atomically, lock, hash and list them; names of files that several modules use."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import logging
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from superglobal.errors import InputError

log = logging.getLogger(__name__)
_MAX_DEPTH = 50  # maximum number of nested levels of a JSON file
_SETTLED = 2 * 10**9  # time in nanoseconds after which the next change of a file changes its times
_MAX_SHOWN = 200  # maximum number of characters of a path in a message
EXPORT, CORRUPT_IMAGES = "best.safetensors", "corrupt_images.txt"


def require_regular(path: str | Path) -> None:
    """Check that a path is a regular file. Opening a FIFO would wait for a writer, and a device may have no end.

    A folder is accepted, because opening it fails with an error.

    Raises:
        OSError: the file does not exist, or is a FIFO, a socket or a device.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "not a regular file but a FIFO, a socket or a device", str(path))


def open_file(path: str | Path) -> io.BufferedReader:
    """Open a regular file for binary reading.

    Raises:
        OSError: the file cannot be opened, or it is not a regular file.
    """
    require_regular(path)
    return open(path, "rb")


def read_file(path: str | Path) -> bytes:
    """Return the contents of a regular file.

    Raises:
        OSError: the file cannot be read, or it is not a regular file.
    """
    with open_file(path) as file:
        return file.read()


def read_json(path: str | Path) -> Any:
    """Return the contents of a JSON file.

    Raises:
        OSError: the file cannot be read, or it is not a regular file.
        ValueError: the file is not JSON, or its values are nested too deeply.
    """
    return parse_json(read_file(path))


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: the text is not JSON, or its values are nested too deeply for functions that call themselves.
    """
    with suppress(RecursionError):
        value = json.loads(text)
        containers = [value] if isinstance(value, dict | list) else []
        for _ in range(_MAX_DEPTH):
            children = (entry.values() if isinstance(entry, dict) else entry for entry in containers)
            containers = [child for entry in children for child in entry if isinstance(child, dict | list)]
            if not containers:
                return value
    raise ValueError(f"more than {_MAX_DEPTH} nested levels")


def read_csv(path: str | Path) -> list[list[str]]:
    """Return the rows of a CSV file, which has UTF-8 encoding. Fields can have any length.

    Raises:
        OSError: the file cannot be read, or it is not a regular file.
        ValueError: the file is not CSV.
    """
    csv.field_size_limit(2**31 - 1)
    try:
        return list(csv.reader(io.StringIO(read_file(path).decode("utf-8-sig"), newline="")))
    except csv.Error as error:
        raise ValueError(f"not CSV: {error}") from error


def link_latest(parent: Path, folder: Path) -> None:
    """Make `<parent>/latest` a relative symbolic link to a folder inside `parent`.

    Nothing happens if the folder is elsewhere, `latest` is not a link, or the operating system does not permit links.
    """
    link, new = parent / "latest", parent / f".latest-{os.getpid()}"
    with suppress(OSError, NotImplementedError, ValueError):  # `relative_to` raises ValueError for a folder elsewhere.
        target = folder.resolve().relative_to(parent.resolve())
        if link.is_symlink() or not link.exists():
            new.unlink(missing_ok=True)  # left by a process that was killed and had the same id
            new.symlink_to(target, target_is_directory=True)
            try:
                os.replace(new, link)
            finally:
                new.unlink(missing_ok=True)


def walk(folder: Path, follow_links: bool = False) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield each folder in the tree below `folder`, with the sorted names of its folders and of its other entries.

    The caller can remove names from the list of folders to leave out these folders. A folder that several links lead to
    is visited once. Nothing is yielded if `folder` does not exist.

    Args:
        folder: root of the tree.
        follow_links: whether to visit folders that symbolic links lead to.

    Raises:
        InputError: a folder in the tree cannot be listed.
    """
    pending, visited = [folder], set[str]()
    while pending:
        directory = pending.pop()
        real = os.path.realpath(directory)
        if real in visited:
            continue
        visited.add(real)
        try:
            with os.scandir(directory) as entries:
                is_folder = {entry.name: _may_be_folder(entry, follow_links) for entry in entries}
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise InputError(
                f"{str(directory)[:_MAX_SHOWN]}: the folder cannot be listed ({error.strerror}); make it readable, or "
                f"move it out of {folder}"
            ) from error
        names = sorted(is_folder)
        folders = [name for name in names if is_folder[name]]
        yield directory, folders, [name for name in names if not is_folder[name]]
        pending += [directory / name for name in reversed(folders)]


def _may_be_folder(entry: os.DirEntry[str], follow_links: bool) -> bool:
    """Return True if an entry is a folder, or a link whose target cannot be examined and may therefore be a folder."""
    try:
        return entry.is_dir(follow_symlinks=follow_links)
    except OSError as error:
        return error.errno != errno.ELOOP


@contextmanager
def _report_write_errors(path: Path) -> Iterator[None]:
    """Convert OSErrors that are raised in the `with` statement to an InputError that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


class _Output(io.FileIO):
    """File that is open for writing and reports a failed write as the InputError that `path` cannot be written."""

    def __init__(self, descriptor: int, path: Path) -> None:
        super().__init__(descriptor, "wb")
        self.path = path

    def write(self, data: Any, /) -> int:
        with _report_write_errors(self.path):
            return super().write(data)


@contextmanager
def atomic_file(path: Path, backup: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a temporary file, open for binary writing. Move it to `path` if the `with` statement raises no error.

    Readers of `path` see either the old file or the complete new file. The data is flushed to disk before the
    replacement. Other errors of the statement, such as those of a file that it reads, are raised unchanged. NumPy's
    `save` and `tofile` write to an open file themselves, so save an array to a buffer first.

    Args:
        path: file to write; its folder is created if necessary.
        backup: path to which an existing file at `path` is moved; by default, the existing file is overwritten.

    Raises:
        InputError: the folder is not writable, or the disk is full. An existing file stays unchanged.
    """
    temporary = None
    try:
        with _report_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with io.BufferedWriter(_Output(descriptor, path)) as file:
            yield file
            file.flush()
            with _report_write_errors(path):
                os.fsync(descriptor)
        with _report_write_errors(path):
            os.chmod(temporary, 0o666 & ~umask())
            if backup is not None and path.exists():
                os.replace(path, backup)
            os.replace(temporary, path)
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to a file atomically: readers see either the old file or the complete new file.

    Raises:
        InputError: the folder is not writable, or the disk is full. An existing file stays unchanged.
    """
    with atomic_file(path) as file:
        file.write(data)


def write_error(
    path: Path, error: OSError, alternative: str = "choose another folder", verb: str = "written"
) -> InputError:
    """Return an InputError about a file or folder that cannot be written, with a hint that depends on the reason.

    Args:
        path: the file or folder.
        error: the reason.
        alternative: the other way out, after the hint.
        verb: what cannot be done.
    """
    hint = ""
    if error.errno in (errno.EACCES, errno.EPERM):
        hint = "change its permissions, or "
    elif error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        existing = next(parent for parent in path.absolute().parents if parent.exists())
        hint = f"{shutil.disk_usage(existing).free / 1e6:.1f} MB are free: free space, or "
    elif error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY):
        hint = "move away what is in its place, or "
    return InputError(f"{path}: cannot be {verb} ({error.strerror or error}); {hint}{alternative}")


def temporary_folder() -> Path:
    """Return the folder for temporary files.

    Raises:
        InputError: no such folder can be written.
    """
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:
        raise InputError(f"{error.strerror}; set TMPDIR to a folder that you can write to") from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically. Bytes of file names that are not UTF-8 are written as escape sequences.

    Raises:
        InputError: see `write_atomically`.
    """
    write_atomically(path, text.encode(errors="backslashreplace"))


@contextmanager
def file_lock(path: Path, busy: str, hint: str = "", wait: bool = False) -> Iterator[None]:
    """Hold a file lock during a `with` statement, so that only one process at a time runs the body of the statement.

    If the process is killed, the operating system releases the lock.

    Args:
        path: lock file; its folder must exist.
        busy: start of the error message or log message if another process holds the lock.
        hint: end of the error message, after "wait for it, stop it, ".
        wait: whether to wait until the other process releases the lock, instead of raising an error.

    Raises:
        InputError: another process holds the lock and `wait` is False, or the file cannot be locked.
    """
    lock, holder = FileLock(path), path.with_name(f"{path.name}.holder")
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            name = _read_holder(holder)
            if not wait:
                raise InputError(f"{busy} ({name}); wait for it, stop it, {hint}") from None
            log.info("%s (%s); waiting for it", busy, name)
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # filelock raises these if the file system does not support locks.
        lock.release()
        if isinstance(error, PermissionError):
            raise write_error(path, error, verb="locked") from error
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be locked ({reason}); choose a folder on another file system") from error
    try:
        with suppress(OSError):  # Ignore failures, because only messages use this file.
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def _read_holder(holder: Path) -> str:
    """Return the description of the process that holds a lock, which this process has written to the file `holder`.

    If the file is missing, because it is not written yet or already deleted, return "unknown process".
    """
    try:
        return holder.read_text()
    except OSError:
        return "unknown process"


def digest(path: Path) -> str:
    """Return the 128-bit BLAKE2b hash of a file as 32 hexadecimal digits."""
    with open_file(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def file_stamp(path: Path) -> list[int] | None:
    """Return the size and the times of the last change of a file (st_size, st_mtime_ns, st_ctime_ns), or None.

    None means that the file is missing. If the file is written or replaced after the stamp `is_settled`, its stamp
    changes. Damage by the disk and writes through an existing memory map can leave the stamp unchanged.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def is_settled(stamp: list[int]) -> bool:
    """Return True unless a file with this `file_stamp` has changed in the last two seconds.

    A file system records times in steps of up to two seconds, so a second change within this time could keep the stamp.
    Call this directly after `file_stamp`, before the file is read.
    Times in the future, from a wrong clock, count as settled.
    """
    return all(abs(time.time_ns() - changed) > _SETTLED for changed in stamp[1:])


def umask() -> int:
    """Return the umask of this process: the permission bits that the system removes from new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
