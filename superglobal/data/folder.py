"""Load your own images: evaluation sets and labeled training images. Labels are the names of sub-folders."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.data.evaluation_set import EvaluationSet, loader
from superglobal.data.images import IMAGE_EXTENSIONS, ImageItem
from superglobal.errors import InputError, printable
from superglobal.utils.io import read_csv, walk

log = logging.getLogger(__name__)


@loader("folder")
def folder_set(
    database: str | Path, query: str | Path | None = None, labels: bool = False, name: str = "folder"
) -> EvaluationSet:
    """Load an evaluation set from the images in a folder and its sub-folders, sorted by relative path.

    With labels, the positives of a query are the database images with the same label. If the image file of the query is
    also in the database, even as a symbolic link with another name, this database image is junk: it is ignored in the
    ranking of the query. Without `query`, each database image is a query, and its results are the other database
    images. Without labels, there is no ground truth. If the query folder is inside the database folder, its images also
    belong to the database. Images are found by their file extension. The files are not read.

    Args:
        database: folder of the database images.
        query: query image, or folder of query images.
        labels: use the name of the first-level sub-folder of an image as its label, so that results can be scored.
        name: name of the set.

    Raises:
        InputError: a folder is missing, has no images or cannot be listed, images have no label, no query has a
            positive, or neither `query` nor `labels` is given.
    """
    database = Path(database)
    if query is None and not labels:
        raise InputError(
            f"{database}: no queries; set dataset.query to an image or a folder, or dataset.labels=true to use each "
            "image as a query"
        )
    paths = _list_images(database, "database", "dataset.database")
    queries = paths if query is None else _query_images(Path(query), labels)
    gnd, clusters = None, None
    if labels:
        clusters = [_label(path, database if query is None else Path(query)) for path in queries]
        gnd = _ground_truth(queries, clusters, paths, [_label(path, database) for path in paths])
        if not any(len(entry["positive"]) for entry in gnd):
            folders = database if query is None else f"{query} and {database}"
            raise InputError(
                f"no query has another image of its label in the database ({folders}); expected several images in a "
                "sub-folder, or sub-folders of the same names. Rename them, or set dataset.labels=false"
            )
    return EvaluationSet(
        name=name,
        queries=[ImageItem(path) for path in queries],
        database=[ImageItem(path) for path in paths],
        gnd=gnd,
        clusters=clusters,
        protocols="labels" if labels else "none",
        leave_one_out=query is None,
        root=database,
        how_to_get=f"{name} contains all images under {database}; remove or replace the files listed above",
    )


def labeled_images(path: str | Path) -> tuple[list[str], list[str]]:
    """Return the training images of a folder, or those that a CSV file lists.

    In a folder, the label of an image is the name of the first-level sub-folder that contains it. A CSV file has a
    header with the columns path (relative to the folder of the file) and label.

    Args:
        path: the folder or the CSV file.

    Returns:
        The path of each image, relative to the folder of the images, and its label. The image files are not read.

    Raises:
        InputError: there is no such folder, it has no images or cannot be listed, an image has no label, or the CSV
            file is invalid.
    """
    path = Path(path)
    if path.is_file():
        return _read_labels(path)
    images = _list_images(path, "training", "data.root")
    hint = "or list images and labels in a CSV file with the columns path,label and set data.root to this file"
    labels = [_label(image, path, hint) for image in images]
    return [image.relative_to(path).as_posix() for image in images], labels


def _read_labels(path: Path) -> tuple[list[str], list[str]]:
    """Read a CSV file of images and labels. Return the paths and the labels in the order of the file."""
    try:
        header, *rows = [row for row in read_csv(path) if row] or [[]]
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); expected a CSV file with the columns path,label"
        ) from error
    if not {"path", "label"} <= set(header) or not rows:
        raise InputError(
            f"{path}: columns {', '.join(header)} and {len(rows)} rows; expected path,label and one row per image"
        )
    columns = header.index("path"), header.index("label")
    labels: dict[str, str] = {}
    for row in rows:
        name, label = (row[column].strip() if column < len(row) else "" for column in columns)
        if not name or not label:
            raise InputError(f"{path}: row {','.join(row)!r}: expected a path and a label")
        if name in labels:
            raise InputError(f"{path}: {name} is listed twice; remove one row")
        labels[name] = label
    return list(labels), list(labels.values())


def _query_images(query: Path, labels: bool) -> list[Path]:
    """Return the images of a query folder, or the single query image if `query` is a file."""
    if not query.is_file():
        return _list_images(query, "query", "dataset.query")
    if labels:
        raise InputError(
            f"query {query} is a file and has no label; expected a folder with sub-folders named as in the database. "
            "Set dataset.query to a folder, or dataset.labels=false"
        )
    return [query]


def _list_images(folder: Path, role: str, setting: str) -> list[Path]:
    """Return all images in a folder and its sub-folders, sorted by relative path.

    Symbolic links are followed, and hidden files are ignored. `role`, such as "database", and the name of the setting
    that contains the folder are used in messages.
    """
    if not folder.is_dir():
        raise InputError(f"{role} folder not found: {folder}; set {setting} to a folder of images")
    images: list[Path] = []
    others: list[str] = []
    for directory, folders, files in walk(folder, follow_links=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith("."):
                images.append(directory / name)
            elif not name.startswith("."):
                others.append(name)
    if others:
        log.warning(
            "%s: ignored %d files without an image extension, e.g. %s", folder, len(others), printable(others[0])
        )
    if not images:
        extensions = " ".join(extension.removeprefix(".") for extension in IMAGE_EXTENSIONS)
        raise InputError(f"no images under {role} folder {folder}; expected files ending in {extensions}")
    return sorted(images, key=lambda path: path.relative_to(folder).as_posix())


def _label(path: Path, root: Path, otherwise: str = "or set dataset.labels=false") -> str:
    """Return the label of an image: the name of the first-level sub-folder of `root` that contains it.

    Raises:
        InputError: the image is not in a sub-folder. `otherwise` is the end of the message.
    """
    parts = path.relative_to(root).parts
    if len(parts) < 2:
        raise InputError(
            f"{path} has no label: expected images in sub-folders of {root} named by their labels. Move the image, "
            f"{otherwise}"
        )
    return parts[0]


def _ground_truth(
    queries: Sequence[Path], query_labels: Sequence[str], database: Sequence[Path], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the ground truth of labeled queries.

    Args:
        queries: paths of the queries.
        query_labels: label of each query.
        database: paths of the database images.
        labels: label of each database image.

    Returns:
        For each query, a dict of arrays of database rows, (n,) int64. "positive" has the images with the label of the
        query, and "junk" has the image file of the query itself, under all names by which the database contains it.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for i, label in enumerate(labels):
        members[label].append(i)
    rows_of: dict[str, list[int]] = defaultdict(list)
    for i, path in enumerate(database):
        rows_of[os.path.realpath(path)].append(i)
    gnd = []
    for path, label in zip(queries, query_labels, strict=True):
        junk = np.array(rows_of.get(os.path.realpath(path), []), dtype=np.int64)
        positive = np.array(members.get(label, []), dtype=np.int64)
        gnd.append({"positive": np.setdiff1d(positive, junk), "junk": junk})
    return gnd
