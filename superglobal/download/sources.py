"""Download the data sets and weights that data/download_links.py defines.

Archives of images are downloaded in parallel. All progress is stored on disk, so that a resumed run downloads no file
twice. The docstring of fetch.py describes the files that are written next to each download. `<archive>.files` lists the
images extracted from an archive.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from superglobal.data.download_links import GOOGLE_DRIVE_FOLDER, RemoteFile, Source
from superglobal.download import extracted_record
from superglobal.download.archives import (
    DiskFullError,
    TargetOf,
    listed_images,
    present_images,
    require_format,
    target_paths,
    unpack,
)
from superglobal.download.fetch import (
    DownloadOptions,
    Report,
    checksum_file,
    checksum_problem,
    download_file,
    file_size,
    part_path,
    published_md5,
    record_checksum,
    recorded_sha256,
    remote_size,
)
from superglobal.errors import InputError
from superglobal.utils.io import file_lock, write_atomically, write_error

_MAX_SHOWN = 5  # maximum number of files or errors listed in a message
# disk space of the unpacked images divided by the size of the archive; above 1, because files fill whole disk blocks
_IMAGE_GROWTH = 1.05


def download_source(source: Source, data: Path, options: DownloadOptions) -> str:
    """Download a data set or weights to the folder of the source below `data`. Resume an interrupted download.

    Args:
        source: what to download.
        data: folder of all data sets.
        options: options of the download.

    Returns:
        A one-line summary.

    Raises:
        InputError: another process is downloading to the folder, there is not enough disk space, a file cannot be
            downloaded or has the wrong contents, or no archive contains some of the listed images.
    """
    if options.packed and not source.name.startswith("gldv2-"):
        raise InputError(
            f"--packed: {source.name} cannot be read from archives, only GLDv2 can (data.tars); omit --packed"
        )
    root = data / source.folder
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(root, error, "choose another folder with --data", "created") from error
    lock = root / ".download.lock"
    with file_lock(lock, f"{root}: another process is downloading to it", "or choose another --data"):
        if source.google_drive and not options.base_urls:
            download_google_drive(source, root, options)
        for file in source.files:
            _download_and_check(file, root / file.path, options)
        summary = _download_images(source, root, options) if source.archives else f"{len(source.files)} files in {root}"
        lock.unlink()
        return summary


def download_google_drive(source: Source, root: Path, options: DownloadOptions) -> None:
    """Download the files of CVNet's Google Drive folder that are missing in `root`.

    Raises:
        InputError: gdown is not installed, or the download failed. The message explains how to download by hand.
    """
    if all((root / file.path).is_file() for file in source.files):
        return
    names = " and ".join(file.name for file in source.files)
    hint = (
        f"Google limits downloads. Open {GOOGLE_DRIVE_FOLDER} in a browser, save {names} to {root} and run the command "
        "again to check them, or give another server with --base-url"
    )
    try:
        import gdown
    except ImportError as error:
        raise InputError(
            f"the weights of CVNet need the package gdown; install it: pip install gdown\n{hint}"
        ) from error
    timeout, retries = options.timeout, options.tries - 1
    try:
        gdown.download_folder(
            url=GOOGLE_DRIVE_FOLDER, output=str(root), use_cookies=False, resume=True, timeout=timeout, retries=retries
        )
    except Exception as error:  # gdown raises errors of many types.
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"the weights of CVNet could not be downloaded from Google Drive ({reason})\n{hint}"
        ) from error
    if missing := [file.name for file in source.files if not (root / file.path).is_file()]:
        raise InputError(f"the Google Drive folder of CVNet does not contain {', '.join(missing)}\n{hint}")


def _download_and_check(file: RemoteFile, target: Path, options: DownloadOptions) -> None:
    """Download a file that is not an archive (list, ground truth or weights), and check its format.

    If the file exists already, do not download it again. After the first successful check of the format, the SHA-256 of
    the file is recorded. Later runs only check that the file still has this SHA-256.

    Raises:
        InputError: the file cannot be downloaded, has changed, or has a wrong format.
    """
    checksum, is_new = recorded_sha256(target), not target.is_file()
    if is_new:
        with _ProgressBar(file.name) as bar:
            download_file(file.urls, target, options, bar.reporter(), checksum)
    elif problem := checksum_problem(target, checksum):
        raise InputError(f"{target} has changed: {problem}; remove {target.name} to download it again")
    if checksum:
        return
    try:
        require_format(target)
    except InputError as error:
        if not is_new:
            raise
        target.unlink()
        raise InputError(
            f"{file.urls[0]} returned the wrong file, which was removed: {error}; try again later"
        ) from error
    record_checksum(target, "sha256")


def _download_images(source: Source, root: Path, options: DownloadOptions) -> str:
    """Download and unpack the archives of a source, and return a one-line summary.

    An archive is skipped if it was unpacked before and all images in it still exist.

    With `options.packed`, download all archives and do not unpack them.
    """
    names, folder = listed_images(source, root), root / source.image_folder
    if not options.packed and present_images(folder, names).all():
        return f"{len(names)} of {len(names)} images in {folder}"
    archives = [a for a in source.archives if options.packed or not _is_unpacked(root / a.path, folder)]
    total = _require_space(source.name, root, archives, options)
    target_of, skipped = target_paths(source, names), list[str]()

    def work(archive: RemoteFile, report: Report) -> None:
        target = root / archive.path
        _download_archive(archive, target, options, report)
        if not options.packed:
            skipped.extend(_unpack_archive(archive, target, folder, target_of, options.keep))

    with _ProgressBar(source.name, total) as bar:
        _run_parallel(work, archives, bar, options.jobs, source.name)
    if options.packed:
        tars = (root / source.archives[0].path).parent
        return f"{len(archives)} archives with the right MD5 in {tars} (data.tars={tars})"
    missing = names[~present_images(folder, names)].tolist()
    if missing:
        lines = [f"{source.name}: {len(missing)} of {len(names)} listed images are missing:"]
        lines += [f"  {folder / os.fsdecode(name)}" for name in missing[:_MAX_SHOWN]]
        lines += [f"  ... and {len(missing) - _MAX_SHOWN} more"] if len(missing) > _MAX_SHOWN else []
        lines.append(f"no archive contains them; compare the lists and the archives with {source.page}")
        raise InputError("\n".join(lines))
    n_corrupt = sum(name.rpartition("/")[2] in source.corrupt for name in skipped)
    summary = f"{len(names)} of {len(names)} images in {folder}"
    summary += f"; skipped {n_corrupt} files that are known to be corrupt" if n_corrupt else ""
    return summary + (
        f"; skipped {len(skipped) - n_corrupt} files that are in no list" if len(skipped) > n_corrupt else ""
    )


def _is_unpacked(archive: Path, folder: Path) -> bool:
    """Return True if the archive was unpacked before and all images in it still exist below `folder`."""
    record = extracted_record(archive)
    return record.is_file() and bool(present_images(folder, record.read_bytes().split(b"\n")[:-1]).all())


def _require_space(name: str, root: Path, archives: Sequence[RemoteFile], options: DownloadOptions) -> int | None:
    """Check before a download that there is enough disk space for the archives and the unpacked images.

    Args:
        name: name of the source, for messages.
        root: folder of the source.
        archives: archives that have not been unpacked yet, including archives that are on disk already.
        options: options of the download.

    Returns:
        The total size of the archives in bytes, or None if no server reports the size of one of them.

    Raises:
        InputError: there is not enough disk space.
    """
    targets = [root / archive.path for archive in archives]
    with ThreadPoolExecutor(options.jobs) as pool:
        remote_sizes = pool.map(lambda archive: remote_size(archive.urls, options), archives)
        sizes = [file_size(target) or size for target, size in zip(targets, remote_sizes, strict=True)]
    present = [file_size(target) or file_size(part_path(target)) for target in targets]
    needed, free = required_space(sizes, present, options), shutil.disk_usage(root).free
    if needed > free:
        raise InputError(
            f"{name} needs {needed / 1e9:.2f} GB more in {root}, but {free / 1e9:.2f} GB are free, so nothing was "
            "downloaded; free disk space, or choose another folder with --data"
        )
    return None if None in sizes else sum(size or 0 for size in sizes)


def required_space(sizes: Sequence[int | None], present: Sequence[int], options: DownloadOptions) -> int:
    """Return how many more bytes a download needs on the disk, for the archives and the unpacked images.

    Unless archives are kept, each is deleted after it has been unpacked. At most `options.jobs` archives then exist at
    the same time.

    Args:
        sizes: size of each archive in bytes; unknown sizes (None) are ignored.
        present: how many bytes of each archive are on disk already.
        options: options of the download.
    """
    known = sorted((size for size in sizes if size is not None), reverse=True)
    archives = sum(known if options.keep or options.packed else known[: options.jobs])
    images = 0 if options.packed else int(_IMAGE_GROWTH * sum(known))
    return archives + images - sum(min(size or 0, here) for size, here in zip(sizes, present, strict=True))


def _download_archive(archive: RemoteFile, target: Path, options: DownloadOptions, report: Report) -> None:
    """Download an archive, unless it exists, and verify its checksum.

    The checksum is the published MD5 or, if none is published, the SHA-256 recorded at an earlier download. If an
    earlier run has verified the MD5 of an archive, it is not verified again.

    Raises:
        InputError: the archive cannot be downloaded or has a wrong checksum.
    """
    if not (archive.md5_url and target.is_file() and checksum_file(target, "md5").is_file()):
        checksum = published_md5(archive.md5_url, target, options) if archive.md5_url else recorded_sha256(target)
        if not target.is_file():
            download_file(archive.urls, target, options, report, checksum)
        elif problem := checksum_problem(target, checksum):
            raise InputError(f"{target}: {problem}; remove it to download it again")
        if archive.md5_url and checksum:
            record_checksum(target, "md5", checksum.partition(":")[2])
    report(file_size(target), file_size(target))


def _unpack_archive(archive: RemoteFile, target: Path, folder: Path, target_of: TargetOf, keep: bool) -> list[str]:
    """Unpack an archive, record which images it contained, and delete it unless `keep` is True.

    Args:
        archive: the archive on the server.
        target: path of the downloaded archive.
        folder: image folder.
        target_of: function that returns the path of an archive member below `folder`, or None to skip the member.
        keep: whether to keep the archive.

    Returns:
        The names of the members that were skipped, because they are not in the list of images.
    """
    try:
        paths, skipped = unpack(target, folder, target_of)
    except DiskFullError:
        raise
    except InputError as error:
        raise InputError(f"{error} (downloaded from {archive.urls[0]})") from error
    if not archive.md5_url and recorded_sha256(target) is None:
        record_checksum(target, "sha256")
    write_atomically(extracted_record(target), "".join(f"{path}\n" for path in paths).encode())
    if not keep:
        target.unlink()
    return skipped


class _StoppedError(Exception):
    """Error that ends a download thread after another thread found the disk full or the program was interrupted."""


class _ProgressBar:
    """Progress bar that counts bytes. Several download threads update the bar, and setting `stopped` ends all of them.

    Args:
        title: text before the bar.
        total: number of bytes; None if it is unknown.
    """

    def __init__(self, title: str, total: int | None = None) -> None:
        # If the output is not a terminal, print each update on a new line instead of overwriting the bar.
        style = {"mininterval": 0.1} if sys.stderr.isatty() else {"mininterval": 30, "bar_format": "{l_bar}{r_bar}\n"}
        self.bar = tqdm(desc=title, total=total, unit="B", unit_scale=True, file=sys.stderr, **style)
        self.total, self.stopped, self.lock = total, threading.Event(), threading.Lock()

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def reporter(self) -> Report:
        """Return the progress callback for one file. The callback adds the downloaded bytes of this file to the bar."""
        shown = 0

        def report(size: int, length: int | None) -> None:
            nonlocal shown
            if self.stopped.is_set():
                raise _StoppedError
            with self.lock:
                self.bar.total = self.total or length
                self.bar.update(size - shown)
            shown = size

        return report


def _run_parallel(
    work: Callable[[RemoteFile, Report], None], archives: Sequence[RemoteFile], bar: _ProgressBar, jobs: int, name: str
) -> None:
    """Run `work` on all archives in several threads.

    If an archive fails, the threads continue with the other archives, unless the disk is full.

    Args:
        work: function of an archive and the progress callback for it.
        archives: the archives.
        bar: progress bar of all archives.
        jobs: number of threads.
        name: name of the source, for the error message.

    Raises:
        InputError: one or more archives failed.
    """
    failures = []
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in as_completed([pool.submit(work, archive, bar.reporter()) for archive in archives]):
                try:
                    future.result()
                except _StoppedError:
                    continue
                except InputError as error:
                    failures.append(error)
                    if isinstance(error, DiskFullError):
                        bar.stopped.set()
        except BaseException:  # Stop the other threads too, for example after Ctrl-C.
            bar.stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if failures:
        rest = "the other archives were stopped" if bar.stopped.is_set() else "the other archives are complete"
        lines = [f"{name}: {len(failures)} of {len(archives)} archives failed; {rest}"]
        lines += [str(failure) for failure in failures[:_MAX_SHOWN]]
        lines += [f"... and {len(failures) - _MAX_SHOWN} more"] if len(failures) > _MAX_SHOWN else []
        raise InputError("\n".join(lines))
