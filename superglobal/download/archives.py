"""Check downloaded files, and extract the images of a source safely from archives.

Archives are untrusted. A member is extracted only to a path that the image list contains, and no image is moved to its
path before the whole archive has been read.
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
"""Function that maps the name of an archive member to its path in the image folder, or None if it is in no list."""
_MAX_GROWTH, _MAX_EXTRA = 3, 64 << 20
# Maximum size of an unpacked archive: 3 times its own size and 64 MB. Images are compressed already, so they stay
# below.
_CHUNK = 1 << 20
_GLDV2_NAME = re.compile(r"[0-9a-f]{16}\.jpg")


class DiskFullError(InputError):
    """Error for a full disk, which stops all downloads."""


def disk_error(problem: str, folder: Path, error: OSError) -> InputError:
    """Return the error to raise for a failed write in `folder`: a `DiskFullError` if the disk is full."""
    kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else InputError
    free = shutil.disk_usage(folder).free
    return kind(
        f"{problem} ({error.strerror or error}); {free / 1e6:.1f} MB are free. Free space or choose another --data, "
        "and run the command again to resume"
    )


def listed_images(source: Source, root: Path) -> np.ndarray:
    """Return the paths of all images in the lists of a source, (N,) S, relative to its image folder.

    Raises:
        InputError: the list is missing or invalid.
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
    """Return the function that maps archive members to the listed images `names`.

    The path of a GLDv2 image is given by its id. For any other member, leading folders are removed until the rest of
    its path is in the list, so that the folders inside an archive do not matter.
    """
    listed = np.sort(names)

    def is_listed(path: str) -> bool:
        name = os.fsencode(path)
        if len(name) > listed.itemsize:
            return False
        row = np.searchsorted(listed, np.array(name, listed.dtype))  # NumPy would copy `listed` for another dtype.
        return bool(row < len(listed) and listed[row] == name)

    def target(member: PurePosixPath) -> str | None:
        candidates: Iterable[str] = ("/".join(member.parts[start:]) for start in range(len(member.parts)))
        if source.folder == "gldv2":
            candidates = [tree_path(member.stem.encode())] if _GLDV2_NAME.fullmatch(member.name) else []
        return next((path for path in candidates if is_listed(path)), None)

    return target


def present_images(folder: Path, names: Iterable[bytes]) -> np.ndarray:
    """Return a mask of the names that are non-empty files below `folder`, (N,) bool."""
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
        InputError: the file is empty, damaged, in another format, or a web page.
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
    """Extract the listed images of a .tar, .tar.gz or .tgz file below `folder`; existing images are replaced.

    Returns:
        The paths of the extracted images, relative to `folder`, and the names of the members that are in no list.

    Raises:
        InputError: the archive is incomplete, has special files or members outside the folder, or unpacks to more bytes
            than images can have. No image is extracted then.
        DiskFullError: the disk is full.
    """
    temporary = folder / f".{archive.name}.unpacking"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # An interrupted run may have left it.
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
    """Error for an archive that unpacks to more bytes than images can have."""


class _Member(tarfile.TarInfo):
    """A header of an archive. Long names and extended headers are read into memory, so their size is limited."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        plain = (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)
        if member.type not in plain and member.size > _CHUNK:
            raise _TooLargeError(f"it has a header of {member.size} bytes")
        return member


class _LimitedReader(io.RawIOBase):
    """A stream that raises `_TooLargeError` after `limit` bytes."""

    def __init__(self, stream: gzip.GzipFile | io.BufferedReader, limit: int) -> None:
        self.stream, self.limit, self.size = stream, limit, 0

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(_CHUNK if size < 0 else size)
        self.size += len(data)
        if self.size > self.limit:
            raise _TooLargeError(f"it unpacks to more than {self.limit} bytes")
        return data


def _extract(archive: Path, temporary: Path, target_of: TargetOf) -> tuple[list[str], list[str]]:
    """Extract images to numbered files, and return their target paths in this order, and the skipped names."""
    numbers: dict[str, int] = {}
    skipped: list[str] = []
    limit = _MAX_GROWTH * archive.stat().st_size + _MAX_EXTRA
    with archive.open("rb") if archive.suffix == ".tar" else gzip.open(archive) as file:
        stream = _LimitedReader(file, limit)
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as tar:
            for member in tar:
                tarfile.data_filter(
                    member, str(temporary)
                )  # This raises an error for paths and links that leave the folder, and for devices.
                path = PurePosixPath(member.name)
                target = target_of(path) if member.isreg() and not member.issparse() else None
                content = tar.extractfile(member) if target is not None else None
                if target is None or content is None:
                    skipped += [] if member.isdir() else [str(path)]
                    continue
                with (temporary / str(numbers.setdefault(target, len(numbers)))).open("wb") as output:
                    shutil.copyfileobj(content, output, _CHUNK)
        while stream.read():  # The checksum of gzip is at the end.
            pass
    return list(numbers), skipped
