"""Represent evaluation sets (queries, database and ground truth), register their loaders, and check their images."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import numpy as np

import superglobal.data
from superglobal.data.image_checks import CheckReport, check_images
from superglobal.data.images import IMAGE_EXTENSIONS, ImageItem
from superglobal.errors import InputError

_MAX_LISTED = 5
_MIN_OVERLAP = 0.25  # minimum intersection over union of the positives of two queries of one landmark
NOTHING_COMPUTED = "nothing was computed, because images are missing or corrupt:"
T = TypeVar("T")


@dataclass(frozen=True)
class RetrievalTruth:
    """Ground truth of the retrieval task of GLDv2: the relevant database images of each query.

    Attributes:
        queries: (Q,) S16 image ids.
        database: (N,) S16 image ids.
        relevant: for each query its relevant rows of the database, (n,) int64.
        parts: (Q,) bool masks of the queries of "public", "private" and "all".
        clusters: (Q,) landmark of each query.
    """

    queries: np.ndarray
    database: np.ndarray
    relevant: Sequence[np.ndarray]
    parts: Mapping[str, np.ndarray]
    clusters: Sequence[str]


@dataclass(frozen=True)
class RecognitionTruth:
    """Ground truth of the recognition task of GLDv2: the landmarks of the queries and of the database images.

    Attributes:
        queries: (Q,) S16 image ids.
        truth: for each query its landmarks, (n,) int64, or an empty array if it shows no landmark.
        labels: (N,) int64 landmark of each database row.
        parts: (Q,) bool masks of the queries of "public", "private" and "all".
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
    """Queries and database, with the ground truth if there is one.

    Attributes:
        name: name of the set.
        queries: query images, in the order of their descriptors.
        database: database images, in the order of their descriptors.
        gnd: for each query a dict of id arrays, (n,) int64, see `protocols`; None without ground truth.
        clusters: landmark or label of each query, the unit that the bootstrap resamples.
        protocols: kind of ground truth, which determines the keys of the dicts in `gnd`: "revisited" has `easy`,
            `hard`, `junk` and `bbx`; "labels" has `positive` and `junk`; "landmarks" has `positive`, and the set has a
            `landmark_truth`; "none" means that `gnd` is None.
        leave_one_out: whether the queries are the database images, so that each ranking excludes its query.
        root: folder of the set; image names are relative to it.
        how_to_get: expected layout and download command, for messages about missing images.
        landmark_truth: ground truth for the metrics of GLDv2, which are used instead of mean average precision.
        about: further facts for `results.json`, in JSON types.
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
    about: dict[str, Any] = field(default_factory=dict)


Loader = Callable[..., EvaluationSet]
"""Function that loads an evaluation set; its keyword arguments are the settings in `conf/dataset`."""
_LOADERS: dict[str, Loader] = {}
# These modules register no loaders and are slow to import, because they need Lightning and torchvision.
_WITHOUT_LOADERS = {"datamodules", "train_dataset"}
LoaderT = TypeVar("LoaderT", bound=Loader)


def loader(kind: str) -> Callable[[LoaderT], LoaderT]:
    """Register a function as the loader of `dataset.kind=<kind>`.

    The parameters of the function become settings of `dataset`: their names, types and defaults come from its
    signature, their descriptions from the "Args" section of its docstring. A parameter without a default is required.
    Loaders that have a parameter of the same name must give it the same type and default.
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
    return dict(sorted(_LOADERS.items()))  # The order must not depend on the order of imports.


def load_evaluation_set(kind: str, **settings: Any) -> EvaluationSet:
    """Load the lists and the ground truth of an evaluation set; its images are not read.

    Args:
        kind: a key of `loaders()`.
        **settings: settings in `conf/dataset`; those that are not parameters of the loader are ignored.

    Raises:
        InputError: the kind is unknown, or the lists or the ground truth are missing or invalid.
    """
    available = loaders()
    if kind not in available:
        raise InputError(f"dataset.kind={kind}: expected one of {', '.join(sorted(available))}")
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
        For each image {"positive": ids}, with the ids of the other images of its label, (m,) int64.
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
    """Return the path of an image in a list: `name` inside `folder`, with ".jpg" if it has no image extension.

    Args:
        folder: folder of the images.
        name: line or entry of the list.
        source: the list, for the error message.

    Raises:
        InputError: the name is empty, absolute, or not inside the folder.
    """
    relative = PurePosixPath(name)
    if not name.strip() or relative.is_absolute() or ".." in relative.parts or "\0" in name:
        raise InputError(f"{source}: image name {name!r} is not a relative path inside {folder}; correct the list")
    return folder / (name if relative.suffix.lower() in IMAGE_EXTENSIONS else f"{name}.jpg")


def require_images(
    sets: Sequence[tuple[str, Sequence[ImageItem], str]], also: Sequence[str] = (), workers: int | None = None
) -> dict[str, CheckReport]:
    """Check the images of all sets before anything is computed.

    Args:
        sets: (title, images, hint) of each set: a unique title, and how to get the images, for the error message.
        also: further lines for the error message, about other missing input such as weights.
        workers: number of threads of `check_images`.

    Returns:
        The report of each title. No report has problems.

    Raises:
        InputError: images are missing or corrupt. The message has the counts and the first five files of each set.
    """
    reports = {title: check_images(items, workers) for title, items, _ in sets}
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


def problem_lines(title: str, total: int, problems: Sequence[tuple[Path | str, str]]) -> list[str]:
    """Return lines for a message: the number of missing and corrupt images, and the first five with their reasons.

    Args:
        title: description of the images.
        total: number of images.
        problems: (path, reason) of each image with a problem; the reason of a missing one starts with "missing".
    """
    missing = sum(reason.startswith("missing") for _, reason in problems)
    lines = [f"{title}: {missing} of {total} images missing, {len(problems) - missing} corrupt"]
    lines += [f"  {path}: {reason}" for path, reason in problems[:_MAX_LISTED]]
    if len(problems) > _MAX_LISTED:
        lines.append(f"  ... and {len(problems) - _MAX_LISTED} more")
    return lines


def group_by_landmark(positives: Sequence[Iterable[int]]) -> list[int]:
    """Group queries by landmark and return for each query the index of the first query of its landmark.

    Two queries show the same landmark if the intersection over union of their positives is at least 0.25, or if other
    queries link them. File names cannot be used, because the `oxford_*` queries of ROxford5k show eight landmarks. For
    any threshold between 0.1 and 0.5, this rule finds 12 landmarks in ROxford5k (its 11 buildings, and one query of
    Balliol that has no link to the others) and the 11 landmarks of RParis6k.

    Args:
        positives: ids of the positives of each query.
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
