"""What an evaluation runs on: queries, database, distractors, and the check that every file is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

import numpy as np

from superglobal.data.download.catalogue import SOURCES, download_command
from superglobal.data.image_checks import CheckReport, check_images
from superglobal.data.images import IMAGE_EXTENSIONS, ImageItem
from superglobal.errors import InputError
from superglobal.retrieval.metrics import Result

_SHOWN = 5
NOTHING_COMPUTED = "nothing was computed, because input is missing or unreadable:"

TOY = (
    "without a download: python scripts/make_toy_data.py renders toy landmarks (a minute), then "
    "python train.py experiment=quickstart and python eval.py dataset=toy"
)
"""What every message about missing data ends with."""


class RankingTask(Protocol):
    """What is asked of a ranking, where that is more than average precision by `gnd`."""

    @property
    def depth(self) -> int:
        """Results per query that it needs, if the database has so many."""

    def of(self, queries: np.ndarray) -> RankingTask | None:
        """That of some of the queries; None where the metric of a few says nothing about that of all."""

    def score(self, scores: np.ndarray, ids: np.ndarray, seed: int) -> Result:
        """Of (Q, k) scores and database ids, best first; `seed` is the bootstrap's."""

    def submission(self, scores: np.ndarray, ids: np.ndarray) -> bytes:
        """The ranking as the benchmark takes it."""


@dataclass(frozen=True)
class EvaluationSet:
    """Queries, database and, where there is one, the ground truth.

    `protocols` says what a gnd entry holds: "revisited" has int64 arrays `easy`, `hard`, `junk` (and `bbx`),
    "labels" has int64 arrays `positive`, `junk`, "landmarks" has `positive` and a `task`; with "none", `gnd` is None.
    """

    name: str
    queries: Sequence[ImageItem]
    database: Sequence[ImageItem]
    gnd: list[dict[str, Any]] | None
    clusters: Sequence[str] | None
    """The landmark or label of each query: the unit that the bootstrap draws."""
    protocols: Literal["revisited", "labels", "landmarks", "none"]
    leave_one_out: bool
    """Whether the queries are the database itself, each with its own id as junk."""
    root: Path
    how_to_get: str
    """Expected layout and where the files are had; ends the message about missing ones."""
    task: RankingTask | None = None
    about: dict[str, Any] = field(default_factory=dict)
    """Plain facts for the record of a result."""


def leave_one_out_truth(labels: np.ndarray) -> list[dict[str, Any]]:
    """Ground truth of images that are searched for among one another, each excluded from its own ranking.

    Args:
        labels: (n,) of the images.

    Returns:
        Per image {"positive": int64 ids of the others with its label}.
    """
    order = np.argsort(labels, kind="stable")
    _, start, count = np.unique(labels[order], return_index=True, return_counts=True)
    found: list[dict[str, Any]] = [{} for _ in labels]
    for first, members in zip(start, count, strict=True):
        same = order[first : first + members]
        for image in same:
            found[image] = {"positive": same[same != image]}
    return found


def image_path(folder: Path, name: str, source: Path) -> Path:
    """The file that a list's line means: `name` inside `folder`, with ".jpg" if it names no image extension.

    Raises:
        InputError: `name` is empty, absolute or leads out of `folder`; `source` is the list that has it.
    """
    relative = PurePosixPath(name)
    if not name.strip() or relative.is_absolute() or ".." in relative.parts or "\0" in name:
        raise InputError(f"{source}: image name {name!r} is not a plain name inside {folder}; correct the list")
    return folder / (name if relative.suffix.lower() in IMAGE_EXTENSIONS else f"{name}.jpg")


def how_to_get_distractors(root: Path, name: str) -> str:
    """Layout of a distractor set and, for revisitop1m, the command that gets it."""
    base = Path(root) / name
    text = f"{name} is expected as {base}/{name}.txt (one file name a line) and {base}/jpg/<line>"
    if name in SOURCES:
        text += f"; this gets it from {SOURCES[name].page}: {download_command(name, base)}"
    return text


def load_distractors(root: str | Path, name: str) -> list[ImageItem]:
    """Images of `<root>/<name>/jpg/` in the order of the list file `<root>/<name>/<name>.txt`.

    One file name a line, blank lines ignored, ".jpg" added where the extension is missing.

    Raises:
        InputError: no list file, an empty one, a name that comes twice or leads out of the folder.
    """
    folder = Path(root) / name
    source = folder / f"{name}.txt"
    try:
        lines = [line.strip() for line in source.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        hint = how_to_get_distractors(Path(root), name)
        raise InputError(f"list of distractors not found: {source}\n{hint}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text; expected one file name a line") from error
    paths = [image_path(folder / "jpg", line, source) for line in lines if line]
    if not paths:
        raise InputError(f"{source} lists no images; expected one file name a line")
    if len(set(paths)) < len(paths):
        seen: set[Path] = set()
        twice = next(path for path in paths if path in seen or seen.add(path))  # type: ignore[func-returns-value]
        raise InputError(f"{source} lists {twice.name} twice; remove the duplicate")
    return [ImageItem(path) for path in paths]


def require_images(
    sets: Sequence[tuple[str, Sequence[ImageItem], str]],
    also: Sequence[str] = (),
    workers: int | None = None,
) -> dict[str, CheckReport]:
    """Check every image of every set before anything is computed.

    Args:
        sets: (title, images, how_to_get) each; titles differ.
        also: other things found missing (weights, ...), to be told in the same message.
        workers: threads of `check_images`.

    Returns:
        title -> report without problems.

    Raises:
        InputError: anything is missing or unreadable: one message with, per title, the counts, the first five
            files with their reasons, the layout and where it is had, and then `also`.
    """
    reports = {title: check_images(items, workers) for title, items, _ in sets}
    lines: list[str] = []
    hints: list[str] = []
    for title, items, how_to_get in sets:
        if reports[title].problems:
            lines += describe_problems(title, len(items), reports[title].problems)
            if how_to_get not in hints:  # queries and database mostly share theirs
                hints.append(how_to_get)
    lines += [*hints, *also]
    if lines:
        raise InputError("\n".join([NOTHING_COMPUTED, *lines]))
    return reports


def describe_problems(title: str, total: int, problems: Sequence[tuple[Path | str, str]]) -> list[str]:
    """Lines for a message: how many of `total` images are missing or unreadable, and the first five with reasons.

    Args:
        title: what the images are.
        problems: place and reason of each; of a missing one the reason begins with "missing".
    """
    missing = sum(reason.startswith("missing") for _, reason in problems)
    lines = [f"{title}: of {total} images {missing} missing, {len(problems) - missing} unreadable"]
    lines += [f"  {place}: {reason}" for place, reason in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"  ... and {len(problems) - _SHOWN} more")
    return lines
