"""Check downloaded files, and extract the images of a source safely from archives.

Archives are not trusted. A member of an archive is extracted only if its path is in the list of images. Images are
moved to their final paths only after the whole archive has been read without an error.
"""

from __future__ import annotations

import errno
import gzip
import io
import os
import re
import shutil
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

import numpy as np

from superglobal.data.distractors import load_distractors
from superglobal.data.download_links import Source, tree_path
from superglobal.data.evaluation_set import image_path
from superglobal.data.gldv2_csv import read_ids, read_list
from superglobal.data.gldv2_solutions import read_solution
from superglobal.data.revisited import load_ground_truth
from superglobal.errors import InputError

TargetOf = Callable[[PurePosixPath], str | None]
"""Function that maps the path of an archive member to the path of the image below the image folder.

It returns None if the member is not in the list of images.
"""
# An archive may unpack to at most 3 times its own size plus 64 MB, as a protection against malicious archives. Archives
# of images stay below this limit, because compressed images hardly shrink further.
_MAX_GROWTH, _MAX_EXTRA = 3, 64 << 20
_CHUNK = 1 << 20
_GLDV2_NAME = re.compile(r"[0-9a-f]{16}\.jpg")


class DiskFullError(InputError):
    """Error for a full disk. It stops all downloads, whereas other errors stop only the download of one file."""


def disk_error(problem: str, folder: Path, error: OSError) -> InputError:
    """Return the error to raise after a failed write: a `DiskFullError` if the disk is full, else an `InputError`.

    Args:
        problem: start of the message: which file could not be written.
        folder: folder whose free disk space is reported in the message.
        error: the original error.
    """
    kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else InputError
    free = shutil.disk_usage(folder).free
    return kind(
        f"{problem} ({error.strerror or error}); {free / 1e6:.1f} MB are free. Free space or choose another --data, "
        "and run the command again to resume"
    )


def listed_images(source: Source, root: Path) -> np.ndarray:
    """Read the paths of all images of a source from the downloaded lists.

    Args:
        source: a source that has images.
        root: folder of the source.

    Returns:
        (N,) array of bytes: paths relative to the image folder of the source.

    Raises:
        InputError: a list is missing or invalid.
    """
    folder = root / source.image_folder
    if source.image_list == "revisited":
        path = root / f"gnd_{source.name}.pkl"
        truth = load_ground_truth(path)
        paths = [image_path(folder, name, path) for name in (*truth.imlist, *truth.qimlist)]
        return np.array([os.fsencode(path.relative_to(folder)) for path in paths])
    if source.image_list == "distractors":
        items = load_distractors(root.parent, root.name)
        return np.array([os.fsencode(item.path.relative_to(folder)) for item in items])
    table = root / f"{source.image_list}.csv"
    ids = read_list(table)[0] if source.image_list == "train" else read_ids(table)
    return np.fromiter((tree_path(image).encode() for image in ids), "S26", len(ids))


def target_paths(source: Source, names: np.ndarray) -> TargetOf:
    """Return a function that maps a member of an archive to the path to extract it to, or to None to skip the member.

    For GLDv2, the id in the name of a member determines its path. For other sources, leading folders of the member are
    removed until the rest of its path is in the list of images, because the images may be in any folder of an archive.

    Args:
        source: source of the archive.
        names: (N,) array of bytes: paths of the listed images, as returned by `listed_images`.
    """
    listed = np.sort(names)

    def is_listed(path: str) -> bool:
        name = os.fsencode(path)
        if len(name) > listed.itemsize:
            return False
        row = np.searchsorted(listed, np.array(name, listed.dtype))  # With another dtype, NumPy would copy `listed`.
        return bool(row < len(listed) and listed[row] == name)

    def target(member: PurePosixPath) -> str | None:
        candidates: Iterable[str] = ("/".join(member.parts[start:]) for start in range(len(member.parts)))
        if source.folder == "gldv2":
            candidates = [tree_path(member.stem.encode())] if _GLDV2_NAME.fullmatch(member.name) else []
        return next((path for path in candidates if is_listed(path)), None)

    return target


def present_images(folder: Path, names: Iterable[bytes]) -> np.ndarray:
    """Return which images exist as non-empty files.

    Args:
        folder: image folder.
        names: N paths relative to `folder`.

    Returns:
        (N,) bool, True for each image that exists.
    """
    prefix = os.fsencode(folder)

    def is_present(name: bytes) -> bool:
        try:
            status = os.stat(os.path.join(prefix, name))
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size > 0

    return np.array([is_present(name) for name in names], bool)


def require_format(path: Path) -> None:
    """Check that a downloaded file has the format that its name implies.

    Raises:
        InputError: the file is empty, damaged, a web page, or has another format.
    """
    from superglobal.models.weights import read_weights

    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise InputError(f"{path} is empty: expected a downloaded file")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise InputError(f"{path} is a web page: expected the file itself")
    if path.suffix == ".mat" and not start.startswith(b"MATLAB"):
        raise InputError(f"{path} is not a MATLAB file")
    if path.suffix == ".pkl":
        load_ground_truth(path)
    elif path.suffix == ".pyth" and read_weights(path).kind != "cvnet":
        raise InputError(f"{path} is not a CVNet checkpoint: expected keys encoder_q.* or globalmodel.*")
    elif path.name in ("train.csv", "train_clean.csv"):
        read_list(path)
    elif path.name in ("index.csv", "test.csv"):
        read_ids(path)
    elif path.name.startswith("retrieval_solution"):
        read_solution(path, "retrieval")
    elif path.name.startswith("recognition_solution"):
        read_solution(path, "recognition")


def unpack(archive: Path, folder: Path, target_of: TargetOf) -> tuple[list[str], list[str]]:
    """Extract the listed images of a .tar, .tar.gz or .tgz file to `folder`. Existing images are replaced.

    Args:
        archive: the archive.
        folder: image folder.
        target_of: function that returns the path of an archive member below `folder`, or None to skip the member.

    Returns:
        The paths of the extracted images, relative to `folder`, and the names of the skipped members.

    Raises:
        InputError: the archive is incomplete, contains special files or paths outside the folder, or exceeds the
            maximum unpacked size. No image is extracted then.
        DiskFullError: the disk is full.
    """
    temporary = folder / f".{archive.name}.unpacking"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # An interrupted run may have left this folder.
        temporary.mkdir(parents=True)
        paths, skipped = _extract(archive, temporary, target_of)
        for number, path in enumerate(paths):
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / str(number), target)
        return paths, skipped
    except (tarfile.FilterError, _TooLargeError) as error:
        raise InputError(f"{archive} is unsafe: {error}. Nothing was extracted; remove the file") from error
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
        with archive.open("rb") as file:
            start = file.read(16)
        raise InputError(
            f"{archive} is not a complete archive ({type(error).__name__}: {error}; starts with {start!r}). Nothing "
            "was extracted; remove the file and run the command again"
        ) from error
    except OSError as error:
        raise disk_error(f"{archive}: cannot be unpacked to {folder}", archive.parent, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _TooLargeError(Exception):
    """Error for an archive that exceeds the maximum unpacked size, and is therefore not an archive of images."""


class _Member(tarfile.TarInfo):
    """Header of an archive member. A huge file name or extended header raises `_TooLargeError`.

    tarfile reads the whole name or extended header into memory, so a malicious archive could fill the memory.
    """

    # This method is overridden instead of `frombuf`, because tarfile does not call `frombuf` since Python 3.13.13.
    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        plain = (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)
        if self.type not in plain and self.size > _CHUNK:
            raise _TooLargeError(f"it has a header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


class _LimitedReader(io.RawIOBase):
    """Stream that raises `_TooLargeError` once more than `limit` bytes have been read from it."""

    def __init__(self, stream: gzip.GzipFile | io.BufferedReader, limit: int) -> None:
        self.stream, self.limit, self.size = stream, limit, 0

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(_CHUNK if size < 0 else size)
        self.size += len(data)
        if self.size > self.limit:
            raise _TooLargeError(f"it unpacks to more than {self.limit} bytes")
        return data


def _extract(archive: Path, temporary: Path, target_of: TargetOf) -> tuple[list[str], list[str]]:
    """Extract the listed images of an archive to files named 0, 1, ... in the folder `temporary`.

    Args:
        archive: the archive.
        temporary: existing folder for the images.
        target_of: function that returns the final path of an archive member, or None to skip the member.

    Returns:
        The final path of each image, where element i belongs to the file named i, and the names of the skipped members.
    """
    numbers: dict[str, int] = {}
    skipped: list[str] = []
    limit = _MAX_GROWTH * archive.stat().st_size + _MAX_EXTRA
    with archive.open("rb") if archive.suffix == ".tar" else gzip.open(archive) as file:
        stream = _LimitedReader(file, limit)
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as tar:
            for member in tar:
                # `data_filter` raises an error for devices, and for paths and links that lead outside the folder.
                tarfile.data_filter(member, str(temporary))
                path = PurePosixPath(member.name)
                target = target_of(path) if member.isreg() and not member.issparse() else None
                content = tar.extractfile(member) if target is not None else None
                if target is None or content is None:
                    skipped += [] if member.isdir() else [str(path)]
                    continue
                with (temporary / str(numbers.setdefault(target, len(numbers)))).open("wb") as output:
                    shutil.copyfileobj(content, output, _CHUNK)
        while stream.read():  # Read the rest of the file, because gzip verifies the checksum only at the end.
            pass
    return list(numbers), skipped
