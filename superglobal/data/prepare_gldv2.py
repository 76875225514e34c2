"""Check every image of a GLDv2 list once, and write an index of the images and a report.

The work is split into shards. A shard is one tar file, or 2048 images of the folder tree. The result of each shard is
written atomically to a file in `<root>/.<list>.index.parts`, so that an interrupted run can be resumed.
"""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from superglobal.data.download_links import how_to_get_gldv2_train, tree_path
from superglobal.data.gldv2 import read_train
from superglobal.data.image_checks import check_image, check_images
from superglobal.data.image_index import (
    VERSION,
    ImageIndex,
    ImageSource,
    ImageTree,
    index_path,
    list_digest,
    require_posix,
    signature_codes,
)
from superglobal.data.images import CorruptImageError
from superglobal.errors import InputError
from superglobal.utils.distributed import available_cpus, end_with_parent
from superglobal.utils.io import atomic_file, file_lock, open_file, read_json, walk, write_atomically

log = logging.getLogger(__name__)
_SHARD = 2048  # number of images per shard if the images are read from the folder tree
_THREADS = 4  # number of threads per process; more than one, because threads mostly wait for the disk
_IDS = "ids.npy"  # name of the file that contains the ids of all images; worker processes memory-map it
_MEMBER = re.compile(r"(?:.*/)?([0-9a-f]{16})\.jpg")
Shard = dict[str, np.ndarray]
"""Result of one shard, as arrays with one element per image.

"rows", (n,) int64: rows of the images in the sorted list of ids. "sizes" and "offsets", (n,) int64: size of each image
file and its position in the tar file, in bytes. "codes", (n,) uint64: hashes of the contents. "reasons", (n,) str: why
an image is corrupt, else "". In addition, "note" is a str that describes damage to the tar file, or "".
"""
Task = tuple[Path, Callable[[], Shard]]
"""(file for the results of one shard, function that checks the images of this shard and returns the results)."""


@dataclass(frozen=True)
class PreparedIndex:
    """Result of the check of all images of a list, as returned by `prepare`.

    Attributes:
        n_images: number of images in the list.
        corrupt: (location, reason) of each missing or corrupt image.
        tar_problems: one message per damaged tar file.
        index: path of the index file.
        report: path of the text file with the report.
    """

    n_images: int
    corrupt: list[tuple[str, str]]
    tar_problems: list[str]
    index: Path
    report: Path

    def text(self) -> str:
        """Return the text of the report.

        It contains the number of corrupt images per reason, then all damaged tar files and all corrupt images.
        """
        kinds = Counter(reason.partition(" (")[0] for _, reason in self.corrupt)
        share = len(self.corrupt) / self.n_images
        lines = [f"{self.n_images} images, {len(self.corrupt)} missing or corrupt ({share:.4%})"]
        lines += [f"{count:>10} {kind}" for kind, count in kinds.most_common()]
        lines += [*self.tar_problems, *(f"{location}\t{reason}" for location, reason in self.corrupt)]
        return "\n".join([*lines, ""])


def prepare(
    root: str | Path,
    table: str = "train_clean.csv",
    tars: str | Path | None = None,
    workers: int | None = None,
    decode: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PreparedIndex:
    """Check every image of a list, and write `<root>/<list>.index.npz` and `<root>/<list>.report.txt`.

    Args:
        root: folder that contains the list and, unless `tars` is given, the images as `train/a/b/c/<id>.jpg`.
        table: file name of the list.
        tars: folder of the official tar files; None to read the folder tree.
        workers: number of processes; by default, one per CPU that this process may use.
        decode: whether to decode every image, which also finds damage inside files.
        progress: function called with the number of checked images and the total number, at least every ten seconds.

    Raises:
        InputError: the list, the folder tree or the tar files are missing, `root` is not writable, another process is
            preparing the same list, or a worker process died.
    """
    root, tars = Path(root), None if tars is None else Path(tars)
    if workers is not None and workers < 1:
        raise InputError(f"workers={workers}: expected an integer >= 1")
    ids = np.sort(read_train(root, table, min_images=1).ids)
    files = _tar_files(root, tars)
    lock, index_file = root / f".{Path(table).stem}.index.lock", index_path(root, table)
    with file_lock(lock, f"{index_file}: another process is writing it", "or choose another --root"):
        folder, digest = root / f".{Path(table).stem}.index.parts", list_digest(root, table)
        tar_folder = str(tars.resolve()) if tars else "None"
        _open_shards(folder, {"version": VERSION, "list": digest, "tars": tar_folder, "decode": decode}, ids)
        tasks = _tasks(folder, root / "train", files, len(ids), decode)
        done = 0
        for n_images in _run(tasks, workers or available_cpus()):
            done += n_images
            if progress:
                progress(min(done, len(ids)), len(ids))
        index, problems = _merge(ids, files, [path for path, _ in tasks])
        source: ImageSource = index.tars(tars) if tars else ImageTree(root / "train")
        corrupt = zip((source.location(index.ids[row]) for row in index.bad), index.reasons.tolist(), strict=True)
        report = root / f"{Path(table).stem}.report.txt"
        prepared = PreparedIndex(len(ids), list(corrupt), problems, index_file, report)
        write_atomically(report, prepared.text().encode())
        index.save(index_file, digest)
        shutil.rmtree(folder)
        lock.unlink()
        return prepared


def _tar_files(root: Path, tars: Path | None) -> list[Path]:
    """Return the tar files in the folder `tars`, or an empty list if the images are read from the folder tree.

    Raises:
        InputError: there are no tar files, their folder cannot be listed, the folder tree does not exist, or tar files
            would have to be read on Windows, which does not support it.
    """
    if tars:
        require_posix(tars)
    entries = next(walk(tars), (tars, [], []))[2] if tars else []
    files = [Path(str(tars), name) for name in entries if name.endswith(".tar")]
    for path in files:
        if not path.is_file():
            raise InputError(f"{path}: not a file; move it out of {tars}")
    if tars and not files:
        raise InputError(f"no tar files (images_000.tar, ...) in {tars}\n{how_to_get_gldv2_train(root)}")
    if not tars and not (root / "train").is_dir():
        raise InputError(f"images not found: {root / 'train'}\n{how_to_get_gldv2_train(root)}")
    return files


def _open_shards(folder: Path, identity: dict[str, object], ids: np.ndarray) -> None:
    """Prepare the folder for the results of the shards.

    If it contains results for the same list and settings, keep them. Otherwise, start with an empty folder.

    Args:
        folder: folder for the results.
        identity: values that identify the list and the settings.
        ids: (N,) S16 sorted image ids, to be written to the folder.
    """
    record = folder / "parts.json"
    try:
        if read_json(record) == identity:
            log.info("resuming: %d shards in %s are finished", len(list(folder.glob("*.npz"))), folder)
            return
    except (OSError, ValueError):  # The file is missing or incomplete, so start over.
        pass
    shutil.rmtree(folder, ignore_errors=True)
    buffer = io.BytesIO()
    np.save(buffer, ids)
    write_atomically(folder / _IDS, buffer.getvalue())
    write_atomically(record, json.dumps(identity).encode())


def _tasks(folder: Path, tree: Path, files: list[Path], n_images: int, decode: bool) -> list[Task]:
    """Return one task for each shard, including shards that already have results.

    A shard is one tar file or, if there are no tar files, up to `_SHARD` images of the folder tree.

    Args:
        folder: folder for the results.
        tree: root of the folder tree.
        files: the tar files; empty to read the folder tree.
        n_images: number of images in the list.
        decode: whether to decode every image.
    """
    ids = folder / _IDS
    tasks: list[Task] = []
    for path in files:
        # The file name of the result contains the size and the modification time of the tar file. If the tar file has
        # been replaced, its old result therefore has another name and is not used.
        status = path.stat()
        shard = folder / f"{path.stem}-{status.st_size}-{status.st_mtime_ns}.npz"
        tasks.append((shard, partial(_check_tar, ids, path, decode)))
    for start in range(0, 0 if files else n_images, _SHARD):
        shard = folder / f"{start:08d}.npz"
        tasks.append((shard, partial(_check_tree, ids, tree, slice(start, start + _SHARD), decode)))
    return tasks


def _run(tasks: list[Task], workers: int) -> Iterator[int]:
    """Check the images of all shards that have no result yet, in parallel if there are several workers.

    Yields:
        The number of images that have been checked since the previous yield. The first numbers count the images of
        shards that an earlier run has already checked. If no shard is finished for ten seconds, 0 is yielded.

    Raises:
        InputError: a worker process died.
    """
    remaining = []
    for task in tasks:
        if task[0].is_file():
            with np.load(task[0]) as shard:
                yield len(shard["rows"])
        else:
            remaining.append(task)
    pool: Executor = ThreadPoolExecutor(1)
    if workers > 1 and len(remaining) > 1:
        # Start new processes instead of forking, because Arrow runs threads in this process.
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _initialize_worker)
    pending = {pool.submit(_compute, *task) for task in remaining}
    try:
        while pending:
            finished, pending = wait(pending, timeout=10, return_when=FIRST_COMPLETED)
            yield sum(future.result() for future in finished)
    except BrokenProcessPool as error:
        raise InputError(
            f"one of {workers} worker processes died, possibly because memory ran out; run the command again with "
            "fewer --workers to resume"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # Do not wait for running shards after Ctrl-C.


def _initialize_worker() -> None:
    """Initialize a worker process, so that it ends together with the main process.

    Ctrl-C ends the worker without a traceback. The worker also ends if the main process ends or is killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()


def _compute(path: Path, check: Callable[[], Shard]) -> int:
    """Check the images of one shard, and write the results to an .npz file atomically.

    Args:
        path: file for the results.
        check: function without arguments that checks the images and returns the results as a `Shard`.

    Returns:
        The number of images in the results.
    """
    shard = check()
    with atomic_file(path) as file:
        np.savez(file, **shard)  # type: ignore[arg-type]
    return len(shard["rows"])


def _check_tree(ids_file: Path, tree: Path, rows: slice, decode: bool) -> Shard:
    """Check the images of one shard of the folder tree.

    Args:
        ids_file: file with the sorted ids of all images of the list, (N,) S16.
        tree: root of the folder tree.
        rows: indices of the shard's images in the array of ids.
        decode: whether to decode every image.

    Returns:
        "rows", "sizes", "codes", "offsets" and "reasons" with one element per image, and "note"; `_shard` defines them.
    """
    ids = np.load(ids_file, mmap_mode="r")[rows]
    paths = [tree / tree_path(image) for image in ids]
    report = check_images(paths, _THREADS, decode)
    reasons = dict(report.problems)
    results = [
        (row, int(signature.partition("-")[0] or 0), 0, signature, reasons.get(path, ""))
        for row, (path, signature) in enumerate(zip(paths, report.signatures, strict=True), rows.start)
    ]
    return _shard(results)


def _check_tar(ids_file: Path, path: Path, decode: bool) -> Shard:
    """Check all images of one tar file that are in the list. Other members of the tar file are ignored.

    Args:
        ids_file: file with the sorted ids of all images of the list, (N,) S16.
        path: the tar file.
        decode: whether to decode every image.

    Returns:
        "rows", "sizes", "codes", "offsets" and "reasons" with one element per image, and "note"; `_shard` defines them.
    """
    ids = np.load(ids_file, mmap_mode="r")
    results = []
    try:
        members, problem = _tar_members(path)
        with open_file(path) as file:
            end = os.fstat(file.fileno()).st_size
            for image, offset, size in members:
                row = int(np.searchsorted(ids, np.array(image, "S16")))
                if row == len(ids) or ids[row] != image:
                    continue
                signature = reason = ""
                try:
                    if offset + size > end:
                        raise CorruptImageError("truncated: the tar file ends before the image")
                    signature = check_image(os.pread(file.fileno(), size, offset), decode).signature
                except (OSError, CorruptImageError) as error:
                    reason = str(error)
                results.append((row, size, offset, signature, reason))
    except OSError as error:
        return _shard([], f"{path}: {error.strerror or error}")
    return _shard(results, f"{path}: {problem}" if problem else "")


def _tar_members(path: Path) -> tuple[list[tuple[bytes, int, int]], str | None]:
    """Read the member list of a tar file.

    Returns:
        The (id, offset, size) of each image, with offset and size in bytes, and a description of the damage if the tar
        file is damaged, else None.
    """
    members: list[tuple[bytes, int, int]] = []
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = _MEMBER.fullmatch(member.name)
                if name and member.isreg() and not member.issparse():  # The size of a sparse file includes its holes.
                    members.append((name[1].encode(), member.offset_data, member.size))
    except tarfile.TarError as error:
        return members, f"truncated or not a tar file ({error})"
    complete = not members or members[-1][1] + members[-1][2] < path.stat().st_size
    return members, None if complete else "truncated (no end-of-archive block)"


def _shard(results: list[tuple[int, int, int, str, str]], note: str = "") -> Shard:
    """Convert the results of the checked images of a shard to arrays, to be saved with `np.savez`.

    Args:
        results: for each image, (index in the sorted ids of the list, size of the file in bytes, offset in the tar file
            in bytes, signature, reason why the image is corrupt or "").
        note: description of damage to the tar file, or "".

    Returns:
        "rows", "sizes", "codes" (hashes of the signatures), "offsets" and "reasons" have one element per image.
        "note" is a single string.
    """
    rows, sizes, offsets, signatures, reasons = zip(*results, strict=True) if results else [()] * 5
    return {
        "rows": np.array(rows, np.int64),
        "sizes": np.array(sizes, np.int64),
        "codes": signature_codes(signatures),
        "offsets": np.array(offsets, np.int64),
        "reasons": np.array(reasons, np.str_),
        "note": np.array(note),
    }


def _merge(ids: np.ndarray, files: list[Path], shards: list[Path]) -> tuple[ImageIndex, list[str]]:
    """Merge the results of all shards. If several tar files contain the same image, the first tar file is used.

    Args:
        ids: (N,) S16 sorted image ids of the list.
        files: the tar files; empty for the folder tree.
        shards: files with the results of the shards.

    Returns:
        The index of all images, and one message per damaged tar file.
    """
    sizes, offsets = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    codes, numbers = np.zeros(len(ids), np.uint64), np.full(len(ids), -1, np.int16)
    seen = np.zeros(len(ids), bool)
    corrupt: dict[int, str] = {}
    problems = []
    for number, path in enumerate(shards):
        with np.load(path) as shard:
            rows, first = np.unique(shard["rows"], return_index=True)
            rows, first = rows[~seen[rows]], first[~seen[rows]]
            sizes[rows], codes[rows], offsets[rows] = (shard[key][first] for key in ("sizes", "codes", "offsets"))
            numbers[rows], seen[rows] = number if files else -1, True
            reasons = shard["reasons"][first]
            corrupt |= {int(row): str(reason) for row, reason in zip(rows, reasons, strict=True) if reason}
            problems += [str(shard["note"])] if shard["note"] else []
    corrupt |= {int(row): "missing" for row in np.flatnonzero(~seen)}
    rows = np.array(sorted(corrupt), np.int64)
    reasons = np.array([corrupt[row] for row in rows.tolist()], np.str_)
    names = np.array([path.name for path in files], np.str_)
    tar_sizes = np.array([path.stat().st_size for path in files], np.int64)
    return ImageIndex(ids, sizes, codes, numbers, offsets, rows, reasons, names, tar_sizes), problems
