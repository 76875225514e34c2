"""How many photos a training may lack: counted before it begins, and again as it meets them."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from superglobal.data.gldv2 import TrainList, how_to_get
from superglobal.data.image_checks import check_images
from superglobal.data.photo_index import index_path, load_index, prepare_command, signature_codes
from superglobal.data.photos import Bad
from superglobal.data.sets import NOTHING_COMPUTED, describe_problems
from superglobal.errors import InputError

log = logging.getLogger(__name__)

_MANY = 50_000  # photos that take minutes to check on a disk that turns


class BadPhotos:
    """The file of a run's bad photos, `place<TAB>reason` a line, each photo once, whatever the processes and restarts.

    Args:
        file: made when the first one comes.
        total: photos of the run.
        budget: the largest share of them that may be bad.
        place: index of a photo -> where it is.
    """

    def __init__(self, file: Path, total: int, budget: float, place: Callable[[int], str]) -> None:
        self.file = file
        self.total = total
        self.budget = budget
        self.place = place

    def add(self, bad: Iterable[Sequence]) -> None:
        """List the photos that are not listed yet.

        Args:
            bad: (index, reason) each.

        Raises:
            InputError: more than the budget are listed, by this process or another one.
        """
        found = {self.place(index): " ".join(reason.split()) for index, reason in bad}
        if not found:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a+", encoding="utf-8") as file:
                fcntl.lockf(file, fcntl.LOCK_EX)  # until the file is closed
                file.seek(0)
                listed = {line.partition("\t")[0] for line in file if line.endswith("\n")}
                new = {place: reason for place, reason in found.items() if place not in listed}
                file.write("".join(f"{place}\t{reason}\n" for place, reason in new.items()))
        except OSError as error:
            raise InputError(f"{self.file}: cannot be written ({error.strerror}); free space") from error
        if new and not listed:
            place, reason = next(iter(new.items()))
            log.warning(
                "a photo cannot be read, another one stands in: %s: %s; all are listed in %s", place, reason, self.file
            )
        require_budget(
            len(listed) + len(new),
            self.total,
            self.budget,
            f"; they are listed in {self.file}: remove it when they are mended",
        )


def require_budget(bad: int, total: int, budget: float, where: str = "") -> None:
    """InputError if more than `budget * total` photos are bad; `where` goes into the message."""
    if bad > budget * total:
        raise InputError(
            f"{bad} of {total} photos ({bad / total:.3%}) are missing or cannot be read, more than data.bad_budget="
            f"{budget:g} allows{where}; mend them (scripts/prepare_gldv2.py checks all), or raise data.bad_budget"
        )


def require_photos(
    lists: Sequence[TrainList], root: str | Path, table: str, tars: str | Path | None, budget: float
) -> tuple[list[Bad], np.ndarray]:
    """Check every photo before anything is computed: by the index where there is one, else by looking at each file.

    Args:
        lists: photos of one table, training and held-out ones, say.
        root, table: where the index of the table is.
        tars: folder of the tar files if the photos are read from them.
        budget: the largest share that may be missing or unreadable.

    Returns:
        (index, reason) of the bad photos of each list, and (N,) uint64 codes of the contents of all photos of all
        lists, 0 for a bad one.

    Raises:
        InputError: more than the budget are bad, the index does not fit, or there is none for the tar files.
    """
    root, where = Path(root), ""
    if tars is not None or index_path(root, table).exists():
        index = load_index(root, table, tars)
        where = (
            f", by {index_path(root, table)} (when they are mended, once more: {prepare_command(root, table, tars)})"
        )
        bad = [index.bad_among(photos.ids) for photos in lists]
        contents = [index.codes_of(photos.ids) for photos in lists]
    else:
        checked = [_check(photos, prepare_command(root, table, tars)) for photos in lists]
        bad, contents = [found for found, _ in checked], [codes for _, codes in checked]
    problems = [(photos.place(i), reason) for photos, found in zip(lists, bad, strict=True) for i, reason in found]
    total = sum(len(photos) for photos in lists)
    try:
        require_budget(len(problems), total, budget, where)
    except InputError as error:
        lines = describe_problems("training photos", total, problems)
        hint = [how_to_get(root)] if 2 * len(problems) > total else []
        raise InputError("\n".join([NOTHING_COMPUTED, *lines, str(error), *hint])) from None
    return bad, np.concatenate(contents)


def _check(photos: TrainList, command: str) -> tuple[Bad, np.ndarray]:
    """Bad photos and content codes by looking at every file of the tree."""
    if len(photos) > _MANY:
        log.info(
            "looking at %d photos, which may take a while; this does it once for all runs: %s", len(photos), command
        )
    paths = [photos.path(i) for i in range(len(photos))]
    report = check_images(paths)
    reasons = dict(report.problems)
    bad = [(i, reasons[path]) for i, path in enumerate(paths) if path in reasons]
    return bad, signature_codes(report.signatures)
