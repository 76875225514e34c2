"""Load your own images: evaluation sets and labeled training images. Labels are the names of sub-folders."""

from __future__ import annotations

import logging
import os
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.data.evaluation_set import EvaluationSet, loader, require_meaningful_labels
from superglobal.data.images import IMAGE_EXTENSIONS, ImageItem
from superglobal.errors import InputError, did_you_mean, printable
from superglobal.utils.io import read_csv, walk

log = logging.getLogger(__name__)
# Folders with thumbnails, snapshots and deleted files, in lower case.
_SYSTEM_FOLDERS = (
    *("@eadir", "__macosx", "#recycle", "@recycle", "$recycle.bin"),
    *("#snapshot", "system volume information", "lost+found"),
)


@loader("folder")
def folder_set(
    database: str | Path, query: str | Path | None = None, labels: bool = False, name: str = "folder"
) -> EvaluationSet:
    """Load an evaluation set from the images in a folder and its sub-folders, sorted by relative path.

    With labels, the positives of a query are the database images with the same label, in any Unicode form. If the image
    file of the query is also in the database, even as a symbolic link with another name, this database image is junk:
    it is ignored in the ranking of the query. Without `query`, each database image is a query, and its results are the
    other database images. Without labels, there is no ground truth. If the query folder is inside the database folder,
    its images also belong to the database. Images are found by their file extension. The files are not read.

    Args:
        database: folder of the database images.
        query: query image, or folder of query images.
        labels: use the name of the first-level sub-folder of an image as its label, so that results can be scored.
        name: name of the set.

    Raises:
        InputError: a folder is missing, has no images or cannot be listed, images have no label, no query has a
            positive, all results would be right, or neither `query` nor `labels` is given.
    """
    database = Path(database)
    _require_exists(database, "database", "dataset.database")
    if query is None and not labels:
        raise InputError(
            f"{database}: no queries; set dataset.query to an image or a folder, or dataset.labels=true to use each "
            "image as a query"
        )
    paths = _list_images(database, "database", "dataset.database")
    queries = paths if query is None else _query_images(Path(query), labels)
    gnd, clusters, notes = None, None, []
    if labels:
        query_folders = [_label(path, database if query is None else Path(query)) for path in queries]
        folders = [_label(path, database) for path in paths]
        notes = _label_notes(query_folders, folders)
        clusters, database_labels = [list(map(_normalized, names)) for names in (query_folders, folders)]
        gnd = _ground_truth(queries, clusters, paths, database_labels)
    dataset = EvaluationSet(
        name=name,
        queries=[ImageItem(path) for path in queries],
        database=[ImageItem(path) for path in paths],
        gnd=gnd,
        clusters=clusters,
        protocols="labels" if labels else "none",
        leave_one_out=query is None,
        root=database,
        about={"notes": notes} if notes else {},
        how_to_get="replace or remove the files listed above, or leave them out with dataset.unreadable=skip",
    )
    require_meaningful_labels(dataset)
    return dataset


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
        names, labels = _read_labels(path)
    else:
        images = _list_images(path, "training", "data.root")
        hint = "or list images and labels in a CSV file with the columns path,label and set data.root to this file"
        names = [image.relative_to(path).as_posix() for image in images]
        labels = [_label(image, path, hint) for image in images]
    for note in _label_notes([], labels):
        log.warning("%s: %s", path, note)
    return names, list(map(_normalized, labels))


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
        if not name or not label or "\0" in name:
            raise InputError(f"{path}: row {','.join(row)!r}: expected a path and a label")
        name = posixpath.normpath(name)
        if name in labels:
            raise InputError(f"{path}: {name} is listed twice; remove one row")
        labels[name] = label
    return list(labels), list(labels.values())


def _query_images(query: Path, labels: bool) -> list[Path]:
    """Return the images of a query folder, or the single query image if `query` is a file."""
    _require_exists(query, "query", "dataset.query")
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

    Symbolic links are followed. Hidden files, hidden folders and folders of the operating system are left out. `role`,
    such as "database", and the name of the setting that contains the folder are used in messages.
    """
    _require_exists(folder, role, setting)
    images: list[Path] = []
    others: list[str] = []
    hidden: list[Path] = []
    for directory, folders, files in walk(folder, follow_links=True):
        hidden += [directory / name for name in folders if _is_hidden(name)]
        folders[:] = [name for name in folders if not _is_hidden(name)]
        for name in files:
            if not name.lower().endswith(IMAGE_EXTENSIONS):
                others += [] if _is_hidden(name) else [name]
            else:
                (hidden if _is_hidden(name) else images).append(directory / name)
    if hidden:
        example = printable(hidden[0].relative_to(folder).as_posix())
        log.info("%s: hidden images and system folders that are left out: %d, such as %s", folder, len(hidden), example)
    if others:
        log.warning(
            "%s: ignored %d files without an image extension, e.g. %s", folder, len(others), printable(others[0])
        )
    if not images:
        extensions = " ".join(extension.removeprefix(".") for extension in IMAGE_EXTENSIONS)
        raise InputError(f"no images under {role} folder {folder}; expected files ending in {extensions}")
    return sorted(images, key=lambda path: path.relative_to(folder).as_posix())


def _is_hidden(name: str) -> bool:
    """Return True for the name of a hidden file or folder, or of a folder that an operating system creates."""
    return name.startswith(".") or name.casefold() in _SYSTEM_FOLDERS


def _require_exists(path: Path, role: str, setting: str) -> None:
    """Raise InputError if a folder does not exist. The message has the most similar names in its parent folder.

    Args:
        path: the folder; for queries, it may also be a file.
        role: purpose of the folder, such as "database".
        setting: name of the setting that contains the path.
    """
    is_query = role == "query"
    if os.path.isdir(path) or (is_query and os.path.isfile(path)):
        return
    advice = f"set {setting} to {'an image or a folder' if is_query else 'a folder'} of images"
    if os.path.exists(path):
        raise InputError(f"{role} {path} is not a folder; {advice}")
    parent = next(parent for parent in path.parents if os.path.exists(parent))
    names: list[str] = []
    with suppress(OSError), os.scandir(parent) as entries:  # `parent` may be a file, or a folder without permissions
        names = [entry.name for entry in entries if is_query or entry.is_dir()]
    hint = did_you_mean(path.relative_to(parent).parts[0], names) or f"; {advice}"
    kind = "file" if is_query and path.name.lower().endswith(IMAGE_EXTENSIONS) else "folder"
    raise InputError(f"{role} {kind} not found: {path}{hint}")


def _label_notes(query_labels: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Return notes about labels that may be misspelled.

    Args:
        query_labels: labels of the queries, as they were typed.
        labels: labels of the database or training images, as they were typed.
    """
    folders = {*query_labels, *labels}
    forms, cases = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for name in folders:
        forms[_normalized(name)].add(name)
        cases[_normalized(name).casefold()].add(_normalized(name))
    notes = [
        f"label {label}: names that differ only in the Unicode form of a letter count as one label"
        for label, names in sorted(forms.items())
        if len(names) > 1
    ]
    notes += [
        f"labels {' and '.join(sorted(names))} differ only by case and count as different labels; rename one "
        "if they are the same"
        for _, names in sorted(cases.items())
        if len(names) > 1
    ]
    known = set(map(_normalized, labels))
    absent = sorted(set(map(_normalized, query_labels)) - known)
    if absent:
        hint = did_you_mean(absent[0], known)
        notes.append(f"labels of queries that the database lacks: {len(absent)}, such as {absent[0]}{hint}")
    return list(map(printable, notes))


def _normalized(label: str) -> str:
    """Return the composed Unicode form (NFC) of a label, because file systems may store another form."""
    return unicodedata.normalize("NFC", label)


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
