"""What an evaluation runs on: queries, database, distractors, and the check that every file is there."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Generic, Literal, SupportsIndex, TypeVar, overload

import numpy as np

import superglobal.data
from superglobal.data.catalogue import SOURCES, download_command, tree_path
from superglobal.data.image_checks import CheckReport, check_images
from superglobal.data.images import IMAGE_EXTENSIONS, ImageItem
from superglobal.errors import InputError

_SHOWN = 5
NOTHING_COMPUTED = "nothing was computed, because input is missing or unreadable:"


@dataclass(frozen=True)
class RetrievalTruth:
    """Which images of a database are relevant to which queries, in GLDv2's retrieval task.

    Attributes:
        queries, database: (Q,) and (N,) S16 image ids.
        relevant: per query its relevant rows of the database, (n,) int64.
        parts: name ("public", "private", "all") -> (Q,) bool, the queries of that part.
        clusters: (Q,) the landmark of each query.
    """

    queries: np.ndarray
    database: np.ndarray
    relevant: Sequence[np.ndarray]
    parts: Mapping[str, np.ndarray]
    clusters: Sequence[str]


@dataclass(frozen=True)
class RecognitionTruth:
    """Which landmarks the queries of GLDv2's recognition task show, and those of the database that vote for them.

    Attributes:
        queries: (Q,) S16 image ids.
        truth: per query its landmarks, (n,) int64; empty if it shows no landmark.
        labels: (N,) int64, the landmark of each database row.
        parts: name ("public", "private", "all") -> (Q,) bool, the queries of that part.
        neighbors: number of nearest neighbors that vote.
        votes: weight of a vote, see `superglobal.metrics.gldv2.vote`.
    """

    queries: np.ndarray
    truth: Sequence[np.ndarray]
    labels: np.ndarray
    parts: Mapping[str, np.ndarray]
    neighbors: int
    votes: str


@dataclass(frozen=True)
class EvaluationSet:
    """Queries, database and, where there is one, the ground truth.

    `protocols` says what a gnd entry holds: "revisited" has int64 arrays `easy`, `hard`, `junk` (and `bbx`),
    "labels" has int64 arrays `positive`, `junk`, "landmarks" has `positive` and a `landmark_truth`;
    with "none", `gnd` is None.
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
    landmark_truth: RetrievalTruth | RecognitionTruth | None = None
    """Ground truth of GLDv2's metrics, where they take the place of average precision by `gnd`."""
    about: dict[str, Any] = field(default_factory=dict)
    """Plain facts for the record of a result."""


Loader = Callable[..., EvaluationSet]
"""Load an evaluation set from keyword arguments, which are settings of `conf/dataset`."""
_LOADERS: dict[str, Loader] = {}
# These modules register no loaders, and importing Lightning and torchvision takes seconds.
_WITHOUT_LOADERS = {"datamodules", "train_dataset"}
LoaderT = TypeVar("LoaderT", bound=Loader)


def loader(kind: str) -> Callable[[LoaderT], LoaderT]:
    """Register a function as the loader of `dataset.kind=<kind>`.

    The parameters of the function become settings of `dataset`: their names, types and defaults come from its
    signature, their descriptions from the "Args" section of its docstring. A parameter without a default is required.
    """

    def register(function: LoaderT) -> LoaderT:
        _LOADERS[kind] = function
        return function

    return register


def loaders() -> dict[str, Loader]:
    """Import the modules of this package and return the loader of each `dataset.kind`."""
    for module in pkgutil.iter_modules(superglobal.data.__path__):
        if module.name not in _WITHOUT_LOADERS:
            importlib.import_module(f"superglobal.data.{module.name}")
    return dict(_LOADERS)


def load_evaluation_set(kind: str, **settings: Any) -> EvaluationSet:
    """Load the lists and the ground truth of an evaluation set; its images are not read.

    Args:
        kind: a key of `loaders()`.
        settings: of `conf/dataset`; those that the loader has no parameter for are ignored.

    Raises:
        InputError: the kind is unknown, or the lists or the ground truth are missing or invalid.
    """
    available = loaders()
    if kind not in available:
        raise InputError(f"dataset.kind={kind}: expected one of {', '.join(sorted(available))}")
    parameters = inspect.signature(available[kind]).parameters
    return available[kind](**{name: value for name, value in settings.items() if name in parameters})


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
            lines += problem_lines(title, len(items), reports[title].problems)
            if how_to_get not in hints:  # queries and database mostly share theirs
                hints.append(how_to_get)
    lines += [*hints, *also]
    if lines:
        raise InputError("\n".join([NOTHING_COMPUTED, *lines]))
    return reports


def problem_lines(title: str, total: int, problems: Sequence[tuple[Path | str, str]]) -> list[str]:
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


T = TypeVar("T")


class LazySequence(Sequence[T], Generic[T]):
    """`make(0)`, ..., `make(count - 1)`; a slice is a list. Goes to other processes if `make` does."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._places = range(count)
        self._make = make

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: SupportsIndex) -> T: ...

    @overload
    def __getitem__(self, place: slice) -> list[T]: ...

    def __getitem__(self, place: SupportsIndex | slice) -> T | list[T]:
        chosen = self._places[place]
        return self._make(chosen) if isinstance(chosen, int) else [self._make(i) for i in chosen]


def tree_items(root: Path, ids: np.ndarray) -> LazySequence[ImageItem]:
    """The photos `<root>/a/b/c/<id>.jpg` of (N,) S16 ids."""
    return LazySequence(len(ids), partial(_tree_item, root, ids))


def chain_sequences(first: Sequence[T], second: Sequence[T]) -> Sequence[T]:
    """One sequence behind the other, neither copied."""
    return LazySequence(len(first) + len(second), partial(_either, first, second)) if len(second) else first


def file_names(items: Sequence[ImageItem], root: Path) -> LazySequence[str]:
    """Each image's path below `root`, or the whole path of one that lies elsewhere."""
    return LazySequence(len(items), partial(_file_name, items, root))


def _tree_item(root: Path, ids: np.ndarray, place: int) -> ImageItem:
    return ImageItem(root / tree_path(ids[place]))


def _either(first: Sequence[T], second: Sequence[T], place: int) -> T:
    return first[place] if place < len(first) else second[place - len(first)]


def _file_name(items: Sequence[ImageItem], root: Path, place: int) -> str:
    path = items[place].path
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


Sets = dict[str, np.ndarray]  # of one query: set name -> ids, or -> ranks


def concatenated(arrays: Iterable[Any]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *(np.asarray(one, np.int64) for one in arrays)])


_SAME_LANDMARK = 0.25


def landmarks(positives: Sequence[Iterable[int]]) -> list[int]:
    """The landmark of each query, as the number of the first query that shows the same one.

    Two queries show the same landmark if their positives have an intersection over union of at least 0.25,
    directly or through others. File names do not tell: `oxford_*` queries of ROxford5k belong to eight landmarks.
    The rule finds 12 there (its 11 buildings, one Balliol query on its own) and the 11 of RParis6k, for any
    threshold between 0.1 and 0.5.
    """
    sets = [set(map(int, one)) for one in positives]
    first = list(range(len(sets)))
    for i, mine in enumerate(sets):
        for j, theirs in enumerate(sets[:i]):
            common = len(mine & theirs)
            if common and common >= _SAME_LANDMARK * (len(mine) + len(theirs) - common):
                low, high = sorted((first[i], first[j]))
                first = [low if f == high else f for f in first]
    return first


def _joined(sets: Sets, query: int, n_rows: int | None) -> np.ndarray:
    """All ids of a query's sets, which must be disjoint and inside the database."""
    ids = concatenated(sets.values())
    unique, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise InputError(f"ground truth of query {query}: image {unique[counts > 1][0]} is listed more than once")
    if len(unique) and (unique[0] < 0 or (n_rows is not None and unique[-1] >= n_rows)):
        bad = unique[0] if unique[0] < 0 else unique[-1]
        raise InputError(
            f"ground truth of query {query}: image {bad} is outside the database of {n_rows} descriptors; "
            "do they belong to the same data set?"
        )
    return ids
