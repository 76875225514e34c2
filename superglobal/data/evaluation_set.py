"""Define evaluation sets (queries, database, ground truth). Register functions that load the sets. Check images."""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import numpy as np

import superglobal.data
from superglobal.data.image_checks import CheckReport, check_images
from superglobal.data.images import IMAGE_EXTENSIONS, NEEDS_PACKAGE, ImageItem
from superglobal.errors import InputError, one_of, printable

log = logging.getLogger(__name__)
_MAX_LISTED = 5  # maximum number of files listed in a message
# Two queries show the same landmark if the intersection over union of their positives is at least this value.
_MIN_OVERLAP = 0.25
NOTHING_COMPUTED = "nothing was computed, because some input is missing or corrupt:"
T = TypeVar("T")


@dataclass(frozen=True)
class RetrievalTruth:
    """Ground truth of the GLDv2 retrieval task: the relevant database images of each query.

    Attributes:
        queries: (Q,) S16 image ids of the queries.
        database: (N,) S16 image ids of the database.
        relevant: for each query, the database rows of its relevant images, (n,) int64.
        parts: subsets of the queries on which metrics are computed. Each key is the name of a subset, for example
            "public", "private" or "all"; each value is its mask, (Q,) bool.
        clusters: (Q,) landmark of each query.
    """

    queries: np.ndarray
    database: np.ndarray
    relevant: Sequence[np.ndarray]
    parts: Mapping[str, np.ndarray]
    clusters: Sequence[str]


@dataclass(frozen=True)
class RecognitionTruth:
    """Ground truth of the GLDv2 recognition task: the landmarks of the queries and of the database images.

    Attributes:
        queries: (Q,) S16 image ids of the queries.
        truth: for each query, the ids of its landmarks, (n,) int64; empty if it shows no landmark.
        labels: (N,) int64 landmark id of each database image.
        parts: subsets of the queries on which metrics are computed. The keys are their names, "public", "private" and
            "all"; the values are their masks, (Q,) bool.
        neighbors: number of nearest database images that vote for the landmark of a query.
        votes: how the votes are weighted, see `superglobal.metrics.gldv2.vote`.
    """

    queries: np.ndarray
    truth: Sequence[np.ndarray]
    labels: np.ndarray
    parts: Mapping[str, np.ndarray]
    neighbors: int
    votes: str


@dataclass(frozen=True)
class EvaluationSet:
    """Query images, database images and, if there is one, the ground truth.

    Attributes:
        name: name of the set.
        queries: query images. Row i of the query descriptors belongs to `queries[i]`.
        database: database images. Row i of the database descriptors belongs to `database[i]`.
        gnd: for each query, a dict of arrays of database rows, (n,) int64, with the keys described at `protocols`; None
            without ground truth.
        clusters: landmark or label of each query. Confidence intervals resample whole landmarks instead of single
            queries (cluster bootstrap).
        protocols: kind of ground truth, which determines the keys of the dicts in `gnd`: "revisited" has `easy`,
            `hard`, `junk` and `bbx` (the box of the query, not an array of rows); "labels" has `positive` and `junk`;
            "landmarks" has `positive`, and the set has a `landmark_truth`; "none" means that `gnd` is None.
        leave_one_out: whether the queries are the database images themselves. Each query is then excluded from its own
            ranking.
        root: folder of the set; names of images in results are relative to it.
        how_to_get: expected file layout and download command, for messages about missing images.
        landmark_truth: ground truth for the GLDv2 metrics, which replace mean average precision; None for other sets.
        unreadable: (path, reason) of each image that `drop_unreadable` has removed.
        about: additional entries for `results.json`; the values must have JSON types.
    """

    name: str
    queries: Sequence[ImageItem]
    database: Sequence[ImageItem]
    gnd: list[dict[str, Any]] | None
    clusters: Sequence[str] | None
    protocols: Literal["revisited", "labels", "landmarks", "none"]
    leave_one_out: bool
    root: Path
    how_to_get: str
    landmark_truth: RetrievalTruth | RecognitionTruth | None = None
    unreadable: Sequence[tuple[Path, str]] = ()
    about: dict[str, Any] = field(default_factory=dict)


Loader = Callable[..., EvaluationSet]
"""Function that loads an evaluation set. Its keyword arguments are the settings of the group `dataset`."""
_LOADERS: dict[str, Loader] = {}
# These modules contain no loaders. Importing them is slow, because they import Lightning and torchvision.
_WITHOUT_LOADERS = {"datamodules", "train_dataset"}
LoaderT = TypeVar("LoaderT", bound=Loader)


def loader(kind: str) -> Callable[[LoaderT], LoaderT]:
    """Return a decorator that registers a function as the loader for `dataset.kind=<kind>`.

    The parameters of the function become settings of the group `dataset`. Their names, types and defaults come from the
    signature, and their descriptions from the "Args" section of the docstring. A parameter without a default is a
    required setting. If two loaders have a parameter with the same name, its type and default must be the same in both.
    """

    def register(function: LoaderT) -> LoaderT:
        _LOADERS[kind] = function
        return function

    return register


def loaders() -> dict[str, Loader]:
    """Import all modules of this package that register loaders, and return the loader of each `dataset.kind`."""
    for module in pkgutil.iter_modules(superglobal.data.__path__):
        if module.name not in _WITHOUT_LOADERS:
            importlib.import_module(f"superglobal.data.{module.name}")
    # Sort the loaders, because their order depends on which module was imported first.
    return dict(sorted(_LOADERS.items()))


def load_evaluation_set(kind: str, **settings: Any) -> EvaluationSet:
    """Load the image lists and the ground truth of an evaluation set. The image files are not read.

    Args:
        kind: kind of data set, a key of `loaders()`.
        **settings: settings of the group `dataset`; those that are not parameters of the loader are ignored.

    Raises:
        InputError: the kind is unknown, or the lists or the ground truth are missing or invalid.
    """
    available = loaders()
    if kind not in available:
        raise InputError(f"dataset.kind={kind}: expected {one_of(kind, sorted(available))}")
    parameters = inspect.signature(available[kind]).parameters
    given = {name: value for name, value in settings.items() if name in parameters}
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and given.get(name) is None:
            raise InputError(f"dataset.{name} is missing; dataset.kind={kind} needs it")
    return available[kind](**given)


def leave_one_out_truth(labels: np.ndarray) -> list[dict[str, Any]]:
    """Return the ground truth of a set in which every image is both a query and a database image.

    Args:
        labels: (n,) label of each image.

    Returns:
        For each image, a dict {"positive": rows} with the rows of the other images that have its label, (m,) int64.
    """
    order = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    truth: list[dict[str, Any]] = [{} for _ in labels]
    for start, count in zip(starts, counts, strict=True):
        same = order[start : start + count]
        for image in same:
            truth[image] = {"positive": same[same != image]}
    return truth


def image_path(folder: Path, name: str, source: Path) -> Path:
    """Return the path of an image, given its entry in a list of images.

    Args:
        folder: folder of the images.
        name: entry of the list: a path relative to `folder`. ".jpg" is appended if it has no image extension.
        source: file of the list, for the error message.

    Raises:
        InputError: the name is empty or absolute, or leads outside the folder.
    """
    relative = PurePosixPath(name)
    if not name.strip() or relative.is_absolute() or ".." in relative.parts or "\0" in name:
        raise InputError(f"{source}: image name {name!r} is not a relative path inside {folder}; correct the list")
    return folder / (name if relative.suffix.lower() in IMAGE_EXTENSIONS else f"{name}.jpg")


def require_images(
    sets: Sequence[tuple[str, Sequence[ImageItem], str]],
    also: Sequence[str] = (),
    workers: int | None = None,
    cache: Path | None = None,
) -> dict[str, CheckReport]:
    """Check that all images of several sets exist and are complete, before anything is computed.

    Args:
        sets: (title, images, hint) of each set. The title is a description of the set for the error message, and must
            be unique. The hint tells the user how to get the images.
        also: additional lines for the error message, about other missing input such as weights. If `also` is not empty,
            an error is raised even if all images are valid.
        workers: number of threads of `check_images`.
        cache: file that keeps the results of `check_images` for later calls; None to read all files.

    Returns:
        For each title, the result of the check. Every image is valid, because otherwise an error is raised.

    Raises:
        InputError: images are missing or corrupt. The message contains the number of these
            images and the first five files of each set.
    """
    reports = {title: check_images(items, workers, cache=cache) for title, items, _ in sets}
    lines: list[str] = []
    hints: list[str] = []
    for title, items, hint in sets:
        if reports[title].problems:
            lines += problem_lines(title, len(items), reports[title].problems)
            hints += [] if hint in hints else [hint]
    lines += [*hints, *also]
    if lines:
        raise InputError("\n".join([NOTHING_COMPUTED, *lines]))
    return reports


def drop_unreadable(dataset: EvaluationSet, cache: Path | None = None) -> EvaluationSet:
    """Check the images of a set of your own images, and remove those that are missing or corrupt.

    Args:
        dataset: evaluation set without or with labels.
        cache: file that keeps the results of `check_images` for later calls; None to read all files.

    Returns:
        The set of the other images. A removed query is not evaluated, and a removed database image is not ranked.

    Raises:
        InputError: the set is a benchmark, more than half of its queries or of its database images are unreadable, or
            the labels of the other images do not `require_meaningful_labels`.
    """
    if dataset.protocols not in ("labels", "none"):
        raise InputError(
            f"dataset.unreadable=skip: {dataset.name} is a benchmark, whose results require all images; use "
            "dataset.unreadable=error"
        )
    lists = {"database": dataset.database} | ({} if dataset.leave_one_out else {"queries": dataset.queries})
    problems = {title: check_images(items, cache=cache).problems for title, items in lists.items()}
    lines: list[str] = []
    for title, found in problems.items():
        lines += problem_lines(title, len(lists[title]), found) if 2 * len(found) > len(lists[title]) else []
    if lines:
        raise InputError("\n".join([*lines, "too many to leave out; replace or remove these files"]))
    unreadable = dict(problem for found in problems.values() for problem in found)
    if not unreadable:
        return dataset
    text = "\n".join(f"  {line}" for line in list_problems(list(unreadable.items())))
    log.warning("%s: images that cannot be read and are left out: %d\n%s", dataset.root, len(unreadable), text)
    kept = np.array([item.path not in unreadable for item in dataset.database], bool)
    queries = [i for i, item in enumerate(dataset.queries) if item.path not in unreadable]
    row_of = np.cumsum(kept) - 1
    gnd = dataset.gnd and [{name: row_of[rows[kept[rows]]] for name, rows in dataset.gnd[i].items()} for i in queries]
    remaining = replace(
        dataset,
        queries=[dataset.queries[i] for i in queries],
        database=[dataset.database[i] for i in np.flatnonzero(kept).tolist()],
        gnd=gnd,
        clusters=dataset.clusters and [dataset.clusters[i] for i in queries],
        unreadable=list(unreadable.items()),
    )
    require_meaningful_labels(remaining)
    return remaining


def require_meaningful_labels(dataset: EvaluationSet) -> None:
    """Raise InputError if labels cannot score results: no query has a positive, or every image is one for each query.

    Args:
        dataset: evaluation set with or without labels, from which unreadable images may have been removed.
    """
    if dataset.protocols != "labels" or dataset.gnd is None:
        return
    left_out = f" ({len(dataset.unreadable)} unreadable images were left out)" if dataset.unreadable else ""
    scored = [i for i, sets in enumerate(dataset.gnd) if len(sets["positive"])]
    if not scored:
        raise InputError(
            f"no query has another image of its label in the database {dataset.root}{left_out}; expected several "
            "images in a sub-folder, or sub-folders of the same names. Rename them, or set dataset.labels=false"
        )
    if all(_only_positives(dataset, i) for i in scored):
        label = dataset.clusters[scored[0]] if dataset.clusters else "of their query"
        raise InputError(
            f"all images under {dataset.root} have the label {label}{left_out}, so every result would be right; "
            "expected a sub-folder for each label. Add images with other labels, or set dataset.labels=false"
        )


def _only_positives(dataset: EvaluationSet, query: int) -> bool:
    """Return True if all images that are ranked for a query are positives."""
    assert dataset.gnd is not None
    ignored = np.append(dataset.gnd[query].get("junk", ()), [query] if dataset.leave_one_out else [])
    return len(np.union1d(dataset.gnd[query]["positive"], ignored)) == len(dataset.database)


def notes_of(dataset: EvaluationSet) -> list[str]:
    """Return notes for the result of a set with labels: labels that may be misspelled, and queries without a score."""
    notes = list(dataset.about.get("notes", []))
    if dataset.protocols == "labels" and dataset.gnd is not None:
        lone = [item.path for item, sets in zip(dataset.queries, dataset.gnd, strict=True) if not len(sets["positive"])]
        if lone:
            names = printable(", ".join(f"{path.parent.name}/{path.name}" for path in lone[:_MAX_LISTED]))
            notes.append(
                f"queries without a score, because no other image has their label: {len(lone)}, such as {names}"
            )
    return notes


def problem_lines(title: str, total: int, problems: Sequence[tuple[Path | str, str]]) -> list[str]:
    """Return lines for an error message: the numbers of missing and corrupt images, and the first five of them.

    Args:
        title: description of the set of images.
        total: number of images in the set.
        problems: (path, reason) of each missing or corrupt image. The reason for a missing image starts with "missing".
    """
    missing = sum(reason.startswith("missing") for _, reason in problems)
    lines = [f"{title}: {missing} of {total} images missing, {len(problems) - missing} corrupt"]
    return lines + [f"  {line}" for line in list_problems(problems)]


def list_problems(problems: Sequence[tuple[Path | str, str]]) -> list[str]:
    """Return lines for a message: the first five of some images that cannot be read, with the reasons.

    Images that need a package are listed by one line for each package, with their number.

    Args:
        problems: (path, reason) of each image.
    """
    lines = []
    for needed in NEEDS_PACKAGE.values():
        paths = [path for path, reason in problems if reason == needed]
        lines += [f"{len(paths)} images, such as {paths[0]}: {needed}"] if paths else []
    others = [(path, reason) for path, reason in problems if reason not in NEEDS_PACKAGE.values()]
    lines += [f"{path}: {reason}" for path, reason in others[:_MAX_LISTED]]
    lines += [f"... and {len(others) - _MAX_LISTED} more"] if len(others) > _MAX_LISTED else []
    return list(map(printable, lines))


def group_by_landmark(positives: Sequence[Iterable[int]]) -> list[int]:
    """Find out which queries show the same landmark, from the overlap between the positives of different queries.

    Two queries are linked if the intersection over union of their positives is at least 0.25. Queries that are linked,
    directly or through other queries, show the same landmark. File names cannot be used instead, because the `oxford_*`
    queries of ROxford5k show eight different landmarks. For any threshold between 0.1 and 0.5, this rule finds 12
    landmarks in ROxford5k (its 11 buildings, and one query of Balliol that is not linked to the others) and the 11
    landmarks of RParis6k.

    Args:
        positives: for each query, the database rows of its positives.

    Returns:
        For each query, the index of the first query that shows the same landmark.
    """
    sets = [set(map(int, ids)) for ids in positives]
    first = list(range(len(sets)))
    for i, current in enumerate(sets):
        for j, earlier in enumerate(sets[:i]):
            common = len(current & earlier)
            if common and common >= _MIN_OVERLAP * (len(current) + len(earlier) - common):
                low, high = sorted((first[i], first[j]))
                first = [low if f == high else f for f in first]
    return first
