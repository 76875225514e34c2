"""Look at every photo of a GLDv2 list once and for all: which are bad, and where in its tar file each lies.

The work is cut into parts (2048 photos of the tree, or one tar file); a part's result is a file in
`<root>/.<list>.index.parts`, whole or not there, so that a killed run goes on where it was.
"""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from superglobal.data.catalogue import how_to_get_gldv2_train, tree_path
from superglobal.data.gldv2 import read_train
from superglobal.data.image_index import VERSION, Part, PhotoIndex, check_tar, check_tree, index_path, list_digest
from superglobal.errors import InputError
from superglobal.utils.distributed import end_with_parent
from superglobal.utils.io import file_lock, write_atomically

log = logging.getLogger(__name__)
_PART = 2048  # photos of the tree
_IDS = "ids.npy"  # beside the parts: workers map it in place of a copy each
Task = tuple[Path, Callable[[], Part]]
"""Where a part's result goes, and what computes it."""


@dataclass(frozen=True)
class Prepared:
    """What came of it.

    Attributes:
        photos: of the list.
        bad: (place, reason) of each photo that is missing or cannot be read.
        tars: what is wrong with tar files as a whole.
        index, report: files written.
    """

    photos: int
    bad: list[tuple[str, str]]
    tars: list[str]
    index: Path
    report: Path

    def text(self) -> str:
        """Counts by kind, the share, every bad tar file and photo with its reason."""
        kinds = Counter(reason.partition(" (")[0] for _, reason in self.bad)
        lines = [f"{self.photos} photos, {len(self.bad)} bad ({len(self.bad) / self.photos:.4%})"]
        lines += [f"{count:>10} {kind}" for kind, count in kinds.most_common()]
        return "\n".join([*lines, *self.tars, *(f"{place}\t{reason}" for place, reason in self.bad), ""])


def prepare(
    root: str | Path,
    table: str = "train_clean.csv",
    tars: str | Path | None = None,
    workers: int | None = None,
    decode: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Check every photo of a list; write `<root>/<list>.index.npz` and `<root>/<list>.report.txt`.

    Args:
        root: folder with the list and, unless `tars` is given, the tree `train/a/b/c/<id>.jpg`.
        table: the list.
        tars: folder of the official tar files.
        workers: processes, by default one per CPU of this process.
        decode: decode every photo, so that damage in its middle shows too.
        progress: called with the photos done and all photos, at least every ten seconds.

    Raises:
        InputError: no list, no tree, no tar files, the root cannot be written, another process is at it, or a worker
            died.
    """
    root, tars = Path(root), None if tars is None else Path(tars)
    if workers is not None and workers < 1:
        raise InputError(f"workers is {workers}; expected 1 or more")
    ids = np.sort(read_train(root, table, min_images=1).ids)
    files = _tar_files(tars, root) if tars else []
    if not tars and not (root / "train").is_dir():
        raise InputError(f"photos not found: {root / 'train'}\n{how_to_get_gldv2_train(root)}")
    digest = list_digest(root, table)
    lock, name = root / f".{Path(table).stem}.index.lock", index_path(root, table)
    with file_lock(lock, f"{name}: another process is making it", "or give another --root"):
        folder = root / f".{Path(table).stem}.index.parts"
        place = str(tars and tars.resolve())
        _claim(folder, {"version": VERSION, "list": digest, "tars": place, "decode": decode}, ids)
        tasks = _tar_tasks(folder, files, decode) if tars else _tree_tasks(folder, root / "train", ids, decode)
        done = 0
        for photos in _run(tasks, workers or _cpus()):
            done += photos
            if progress:
                progress(min(done, len(ids)), len(ids))
        index, notes = _assemble(ids, files, [path for path, _ in tasks])
        result = _result(root, table, tars, index, notes)
        write_atomically(result.report, result.text().encode())
        index.save(result.index, digest)
        shutil.rmtree(folder)
        lock.unlink()
        return result


def _tar_files(tars: Path, root: Path) -> list[Path]:
    files = sorted(tars.glob("*.tar"))
    if not files:
        raise InputError(f"no tar files (images_000.tar, ...) in {tars}\n{how_to_get_gldv2_train(root)}")
    return files


def _claim(folder: Path, identity: dict[str, object], ids: np.ndarray) -> None:
    """Make `folder` the place of this run's parts; those of another list or other settings go."""
    record = folder / "parts.json"
    try:
        if json.loads(record.read_text()) == identity:
            log.info("going on with the %d parts in %s", len(list(folder.glob("*.npz"))), folder)
            return
    except (OSError, ValueError):  # nothing there, or cut off: begin anew
        pass
    shutil.rmtree(folder, ignore_errors=True)
    file = io.BytesIO()
    np.save(file, ids)
    write_atomically(folder / _IDS, file.getvalue())
    write_atomically(record, json.dumps(identity).encode())


def _tree_tasks(folder: Path, tree: Path, ids: np.ndarray, decode: bool) -> list[Task]:
    parts = [slice(start, start + _PART) for start in range(0, len(ids), _PART)]
    return [(folder / f"{p.start:08d}.npz", partial(check_tree, folder / _IDS, tree, p, decode)) for p in parts]


def _tar_tasks(folder: Path, files: list[Path], decode: bool) -> list[Task]:
    tasks: list[Task] = []
    for path in files:
        about = path.stat()  # in the name: a part of a tar file that was downloaded again does not count
        part = folder / f"{path.stem}-{about.st_size}-{about.st_mtime_ns}.npz"
        tasks.append((part, partial(check_tar, folder / _IDS, path, decode)))
    return tasks


def _run(tasks: list[Task], workers: int) -> Iterator[int]:
    """Do what is left to do; yields photos done, and 0 now and then. An interrupt does not wait for running parts."""
    left = []
    for task in tasks:
        if task[0].is_file():
            yield _photos_in(task[0])
        else:
            left.append(task)
    pool: Executor = ThreadPoolExecutor(1)
    if workers > 1 and len(left) > 1:
        # Not forked: Arrow's threads run here.
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker)
    pending = {pool.submit(_do, *task) for task in left}
    try:
        while pending:
            finished, pending = wait(pending, timeout=10, return_when=FIRST_COMPLETED)
            yield sum(future.result() for future in finished)
    except BrokenProcessPool as error:
        message = f"a worker process of {workers} died, perhaps for want of memory"
        raise InputError(f"{message}; call again with fewer --workers, it goes on where it was") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _begin_worker() -> None:
    """A worker ends with the program, even a killed one, and at once; parts are whole or not there."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a word
    end_with_parent()


def _do(path: Path, check: Callable[[], Part]) -> int:
    part = check()
    file = io.BytesIO()
    np.savez(file, **part)  # type: ignore[arg-type]
    write_atomically(path, file.getvalue())
    return len(part["rows"])


def _photos_in(path: Path) -> int:
    with np.load(path) as part:
        return len(part["rows"])


def _assemble(ids: np.ndarray, files: list[Path], parts: list[Path]) -> tuple[PhotoIndex, list[str]]:
    """All parts in one index, and what is wrong with tar files. Of a photo in two tar files the first counts."""
    sizes, offsets = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    codes, numbers = np.zeros(len(ids), np.uint64), np.full(len(ids), -1, np.int16)
    seen = np.zeros(len(ids), bool)
    bad: dict[int, str] = {}
    notes = []
    for number, path in enumerate(parts):
        with np.load(path) as part:
            rows, first = np.unique(part["rows"], return_index=True)
            rows, first = rows[~seen[rows]], first[~seen[rows]]
            sizes[rows], codes[rows], offsets[rows] = (part[key][first] for key in ("sizes", "codes", "offsets"))
            numbers[rows], seen[rows] = number if files else -1, True
            reasons = part["reasons"][first]
            bad |= {int(row): str(reason) for row, reason in zip(rows, reasons, strict=True) if reason}
            notes += [str(part["note"])] if part["note"] else []
    bad |= {int(row): "missing" for row in np.flatnonzero(~seen)}
    rows = np.array(sorted(bad), np.int64)
    reasons = np.array([bad[row] for row in rows.tolist()], np.str_)
    names = np.array([path.name for path in files], np.str_)
    tar_sizes = np.array([path.stat().st_size for path in files], np.int64)
    return PhotoIndex(ids, sizes, codes, numbers, offsets, rows, reasons, names, tar_sizes), notes


def _result(root: Path, table: str, tars: Path | None, index: PhotoIndex, notes: list[str]) -> Prepared:
    def place(row: int) -> str:
        member = tree_path(index.ids[row])
        if tars is None:
            return str(root / "train" / member)
        return index.tars(tars).place(index.ids[row])

    bad = [(place(row), reason) for row, reason in zip(index.bad.tolist(), index.reasons.tolist(), strict=True)]
    return Prepared(len(index.ids), bad, notes, index_path(root, table), root / f"{Path(table).stem}.report.txt")


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
