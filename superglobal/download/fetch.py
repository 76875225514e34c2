"""One source from nothing, or from where an earlier run was interrupted, to photos in place that were checked.

Everything that is done is on disk: `<archive>.part` (what has come), `<archive>` (whole, its checksum right),
`<archive>.files` (unpacked: what it has put in place). A killed run therefore loads nothing again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from superglobal.data.catalogue import Remote, Source
from superglobal.download.checksums import confirm, is_confirmed, mismatch, published, record, recorded
from superglobal.download.drive import by_hand, load_folder
from superglobal.download.lists import listed, placing, require_kind
from superglobal.download.news import News, StoppedError
from superglobal.download.presence import Present, list_beside
from superglobal.download.space import Load, needed, require_space
from superglobal.download.transfer import DiskFullError, Report, Way, fetch, part_of, size_at, text_at
from superglobal.download.unpack import Place, unpack
from superglobal.errors import InputError
from superglobal.utils.io import only_process, write_atomically

_SHOWN = 5


@dataclass(frozen=True)
class Options:
    """How a source is got.

    Attributes:
        way: see `Way`.
        jobs: archives at once.
        keep: archives stay after they were unpacked.
        packed: archives are not unpacked at all (of GLDv2, for `data.tars`).
    """

    way: Way = field(default_factory=Way)
    jobs: int = 4
    keep: bool = False
    packed: bool = False


def get(source: Source, data: Path, options: Options) -> str:
    """Everything of a source in its place below `data`; what came of it in a line.

    Raises:
        InputError: another process is at it, there is no room, something could not be had or is not what it must be,
            or photos of the lists are missing in the end. Calling again goes on.
    """
    if options.packed and not source.name.startswith("gldv2-"):
        raise InputError(f"--packed: {source.name} is not read from its archives; only GLDv2 is (data.tars)")
    root = data / source.folder
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{root}: cannot be made ({error.strerror}); choose another place with --data") from error
    lock = root / ".download.lock"
    with only_process(lock, f"{root}: another process is loading into it", "or choose another --data"):
        there = all((root / file.path).is_file() for file in source.files)
        if source.drive and not options.way.bases and not there:
            load_folder(source, root, options.way)
        with News(source.name) as news:
            for file in source.files:
                _file(file, root / file.path, source, options.way, news)
        said = _photos(source, root, options) if source.archives else f"{len(source.files)} files in {root}"
        lock.unlink()
        return said


def _file(file: Remote, target: Path, source: Source, way: Way, news: News) -> None:
    """A list, a ground truth or weights, in place and sound."""
    known, fresh = recorded(target), not target.is_file()
    if fresh and source.drive and not way.bases:
        raise InputError(f"{target.name} is not in CVNet's folder any more\n{by_hand(source, target.parent)}")
    if fresh:
        fetch(file.urls, target, way, news.of(file.name), known)
    elif known and (wrong := mismatch(target, known)):
        raise InputError(f"{target} was changed since it was loaded: {wrong}; or remove the file to load it again")
    if known:
        return
    try:
        require_kind(target)
    except InputError as error:
        if fresh:
            target.unlink()
            raise InputError(f"{file.urls[0]} gave something else, now removed: {error}\ncall again later") from error
        raise
    record(target)


def _photos(source: Source, root: Path, options: Options) -> str:
    names = listed(source, root)
    images = root / source.images
    there = Present(images)
    complete = bool(there.has(names).all())
    if complete and not options.packed:
        return f"{len(names)} of {len(names)} photos in {images}"
    todo = [a for a in source.archives if options.packed or not _is_unpacked(root / a.path, there)]
    with News(source.name, _require_space(source, root, todo, options)) as news:
        work = _Work(source, root, images, placing(source, names), options, news)
        work.run(todo)
    if options.packed:
        folder = (root / source.archives[0].path).parent
        return f"{len(todo)} archives in {folder}, their md5 right (data.tars={folder})"
    return _verified(source, root, names, work.left_out)


def _require_space(source: Source, root: Path, todo: Sequence[Remote], options: Options) -> int | None:
    """Bytes that are to come, None if a server does not say it; `InputError` if there is no room."""
    with ThreadPoolExecutor(options.jobs) as pool:
        loads = list(pool.map(lambda archive: _load(root / archive.path, archive, options.way), todo))
    require_space(root, source.name, needed(loads, options.jobs, options.keep, not options.packed))
    sizes = [load.size for load in loads if load.size is not None]
    return sum(sizes) if len(sizes) == len(loads) else None


def _load(target: Path, archive: Remote, way: Way) -> Load:
    if target.is_file():
        size = target.stat().st_size
        return Load(size, size)
    part = part_of(target)
    return Load(size_at(archive.urls, way), part.stat().st_size if part.is_file() else 0)


class _Work:
    """Archives, several at once."""

    def __init__(self, source: Source, root: Path, images: Path, place: Place, options: Options, news: News) -> None:
        self.source, self.root, self.images, self.place = source, root, images, place
        self.options, self.news = options, news
        self.left_out: list[str] = []
        self.lock = threading.Lock()

    def run(self, todo: Sequence[Remote]) -> None:
        """All of them; one that fails does not keep the others from coming, but a full disk does."""
        with ThreadPoolExecutor(self.options.jobs) as pool:
            futures = {pool.submit(self._one, archive): archive for archive in todo}
            try:
                failures = self._failures(futures)
            except BaseException:  # Ctrl-C
                self.news.stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        if failures:
            lines = [str(failure) for failure in failures[:_SHOWN]]
            lines += [f"... and {len(failures) - _SHOWN} more"] if len(failures) > _SHOWN else []
            others = "what was under way was stopped" if self.news.stopped.is_set() else "the others are done"
            done = f"{self.source.name}: {len(failures)} of {len(todo)} archives failed; {others}"
            raise InputError("\n".join([done, *lines]))

    def _failures(self, futures: dict[Future[None], Remote]) -> list[InputError]:
        failures: list[InputError] = []
        for future in as_completed(futures):
            try:
                future.result()
            except StoppedError:
                pass
            except InputError as error:
                failures.append(error)
                if isinstance(error, DiskFullError):
                    self.news.stopped.set()
        return failures

    def _one(self, archive: Remote) -> None:
        report = self.news.of(archive.name)
        target = self.root / archive.path
        self._load(archive, target, report)
        report(target.stat().st_size, target.stat().st_size)
        if not self.options.packed:
            self._unpack(archive, target)

    def _load(self, archive: Remote, target: Path, report: Report) -> None:
        """Until the whole archive is there and has the checksum that it must have."""
        if archive.md5 and target.is_file() and is_confirmed(target):
            return
        known = published(archive.md5, self._text) if archive.md5 else recorded(target)
        if not target.is_file():
            fetch(archive.urls, target, self.options.way, report, known)
        elif known and (wrong := mismatch(target, known)):
            raise InputError(f"{target}: {wrong}; remove the file to load it again")
        if archive.md5 and known:
            confirm(target, known)

    def _unpack(self, archive: Remote, target: Path) -> None:
        try:
            found = unpack(target, self.images, self.place)
        except DiskFullError:
            raise
        except InputError as error:
            raise InputError(f"{error} (loaded from {archive.urls[0]})") from error
        with self.lock:
            self.left_out += found.left_out
        if not archive.md5 and recorded(target) is None:
            record(target)
        write_atomically(list_beside(target), "".join(f"{name}\n" for name in found.files).encode())
        if not self.options.keep:
            target.unlink()

    def _text(self, address: str) -> str:
        return text_at(address, self.options.way)


def _is_unpacked(target: Path, there: Present) -> bool:
    """Whether all that an archive has put in place is still there."""
    try:
        names = list_beside(target).read_bytes().split(b"\n")[:-1]
    except OSError:
        return False
    return not names or bool(there.has(np.array(names)).all())


def _verified(source: Source, root: Path, names: np.ndarray, left_out: list[str]) -> str:
    """The end, in a line; `InputError` with the photos that are in no archive."""
    missing = names[~Present(root / source.images).has(names)]
    if len(missing):
        some = [f"  {root / source.images / name.decode()}" for name in missing[:_SHOWN].tolist()]
        more = [f"  ... and {len(missing) - _SHOWN} more"] if len(missing) > _SHOWN else []
        raise InputError(
            "\n".join([f"{source.name}: {len(missing)} of {len(names)} photos of the lists are missing:", *some, *more])
            + f"\nevery archive is unpacked and has none of them; compare lists and archives with {source.page}"
        )
    said = f"{len(names)} of {len(names)} photos in {root / source.images}"
    corrupt = sum(name.rpartition("/")[2] in source.corrupt for name in left_out)
    others = len(left_out) - corrupt
    said += f"; {corrupt} left out that are known to be no images" if corrupt else ""
    return said + (f"; {others} files left out that no list has" if others else "")
