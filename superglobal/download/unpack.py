"""Tar archives of photos, taken as hostile: a member goes where the list has it, or nowhere.

Nothing is put in place before the whole archive was read: photos are unpacked into a hidden folder beside their place
and then moved one by one, each whole or not there.
"""

from __future__ import annotations

import errno
import gzip
import io
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from superglobal.download.transfer import DiskFullError
from superglobal.errors import InputError

Place = Callable[[PurePosixPath], str | None]
"""From a member's name to its place below the folder of photos, None for one that has none."""
GROWTH, SLACK = 3, 64 << 20  # photos are compressed already: an archive that grows by more is no archive of photos
_HEAD = 1 << 20  # bytes of a member that only says another one's name
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Unpacked:
    """What was in an archive.

    Attributes:
        files: put in place, below the folder of photos.
        left_out: names of members that have no place.
    """

    files: list[str]
    left_out: list[str]


class _HostileError(Exception):
    """What no archive of photos has; the message says what."""


class _Member(tarfile.TarInfo):
    """A header; a name of gigabytes would be read into memory at once."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        plain = (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)
        if member.type not in plain and member.size > _HEAD:
            raise _HostileError(f"has a header of {member.size} bytes")
        return member


class _Bounded(io.RawIOBase):
    """A stream that ends with an error when it grows beyond `limit` bytes."""

    def __init__(self, source: gzip.GzipFile | io.BufferedReader, limit: int) -> None:
        self.source, self.limit, self.taken = source, limit, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self.source.read(_CHUNK if size < 0 else size)
        self.taken += len(data)
        if self.taken > self.limit:
            raise _HostileError(f"unpacks to more than {self.limit} bytes")
        return data


def unpack(archive: Path, folder: Path, place: Place) -> Unpacked:
    """Put an archive's photos (.tar, .tar.gz, .tgz) in place below `folder`.

    A photo that is there already is replaced.

    Raises:
        InputError: no whole archive, or one that has links, devices, names that lead out of it, or that unpacks to
            more than photos do: nothing of it was put in place.
        DiskFullError: there is no room.
    """
    aside = folder / f".{archive.name}.unpacking"
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
        aside.mkdir(parents=True)
        places, left_out = _read(archive, aside, place)
        for number, name in enumerate(places):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(aside / str(number), target)
        return Unpacked(places, left_out)
    except _HostileError as error:
        raise InputError(
            f"{archive} {error}: refused, nothing of it was put in place. Expected are photos and folders alone; get "
            "the file from its official address"
        ) from error
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:  # numbers of a header
        raise InputError(
            f"{archive} is no whole archive ({type(error).__name__}: {error}; it begins {_beginning(archive)!r}), "
            "nothing of it was put in place. Remove it and call again"
        ) from error
    except OSError as error:
        kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else InputError
        free = shutil.disk_usage(archive.parent).free
        raise kind(
            f"{archive}: cannot be unpacked into {folder} ({error.strerror or error}); {free / 1e6:.1f} MB are free: "
            "make room, then call again to go on"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _read(archive: Path, aside: Path, place: Place) -> tuple[list[str], list[str]]:
    """Unpack into `aside`, by number; the places in order of number, and the names that have none."""
    numbers: dict[str, int] = {}
    left_out: list[str] = []
    compressed = not archive.name.endswith(".tar")
    with gzip.open(archive) if compressed else archive.open("rb") as source:
        stream = _Bounded(source, GROWTH * archive.stat().st_size + SLACK)
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as tar:
            for member in tar:
                name = _name(member)
                if name is None:
                    continue
                where = place(name)
                if where is None:
                    left_out.append(str(name))
                    continue
                content = tar.extractfile(member)
                assert content is not None
                with (aside / str(numbers.setdefault(where, len(numbers)))).open("wb") as file:
                    shutil.copyfileobj(content, file, _CHUNK)
        while stream.read():  # to the end, where gzip keeps its checksum
            pass
    return list(numbers), left_out


def _name(member: tarfile.TarInfo) -> PurePosixPath | None:
    """A photo's name, None for a folder; every member is looked at, also one that has no place."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\0" in member.name:
        raise _HostileError(f"has a member {member.name!r} that leads out of it")
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        kind = "link" if member.issym() or member.islnk() else "device, pipe or sparse file"
        raise _HostileError(f"has a {kind}, {member.name!r}")
    return name


def _beginning(archive: Path) -> bytes:
    with archive.open("rb") as file:
        return file.read(16)
