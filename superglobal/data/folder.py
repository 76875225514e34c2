"""Your own photos: a folder as database, queries beside it, and labels, if wanted, by sub-folder."""

import logging
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.data.evaluation_set import EvaluationSet, loader
from superglobal.data.images import IMAGE_EXTENSIONS, ImageItem
from superglobal.errors import InputError

log = logging.getLogger(__name__)


@loader("folder")
def folder_set(
    database: str | Path, query: str | Path | None = None, labels: bool = False, name: str = "folder"
) -> EvaluationSet:
    """An evaluation set of the photos under `database`, in the order of their relative paths.

    - `query` given, no labels: ranked lists only.
    - `labels`: a photo's label is its first-level sub-folder. Without `query` each database photo is a query
      against all others (leave-one-out, its own id is junk). With `query`, a folder with sub-folders of the
      same names, the positives are the database photos of the query's label; the query's own file, should
      the database have it, is junk.

    The images of a query folder inside the database folder stay part of the database.

    Args:
        database: folder of the database images.
        query: query image, or folder of query images.
        labels: use the first-level sub-folder of an image as its label, so that results can be scored.
        name: name of the set.

    Raises:
        InputError: no such folder, no photos in it, photos without a label, labels that match nothing, or
            neither `query` nor `labels`.
    """
    database = Path(database)
    if query is None and not labels:
        raise InputError(
            f"nothing to search for in {database}: give queries by dataset.query=FILE_OR_FOLDER, or "
            "dataset.labels=true for leave-one-out over sub-folders"
        )
    paths = _photos(database, "database")
    queries = paths if query is None else _query_photos(Path(query), labels)
    gnd, clusters = None, None
    if labels:
        clusters = [_label(path, database if query is None else Path(query)) for path in queries]
        gnd = _label_gnd(queries, clusters, paths, [_label(path, database) for path in paths])
        if not any(len(entry["positive"]) for entry in gnd):
            place = database if query is None else f"{query} and {database}"
            raise InputError(
                f"no query has another photo of its label in the database ({place}); expected sub-folders "
                "of the same names, or several photos in one. Rename them or set dataset.labels=false"
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
        how_to_get=f"{name}: photos anywhere under {database}; remove or replace the files named above",
    )


def _query_photos(query: Path, labels: bool) -> list[Path]:
    if not query.is_file():
        return _photos(query, "query")
    if labels:
        raise InputError(
            f"query {query} is a single file and has no label; give a folder with sub-folders named as the "
            "database's, or set dataset.labels=false"
        )
    return [query]


def _photos(folder: Path, role: str) -> list[Path]:
    """All photos under `folder`, links followed, hidden ones left out, by relative POSIX path."""
    if not folder.is_dir():
        raise InputError(f"{role} folder not found: {folder}; set dataset.{role}= to a folder of photos")
    found: list[Path] = []
    others: list[str] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
        if real not in seen:
            found += [Path(place, f) for f in files if _is_photo(f)]
            others += [f for f in sorted(files) if not f.startswith(".") and not _is_photo(f)]
        seen.add(real)
    if others:
        log.warning("%s: %d files left out that are no photos by their names, e.g. %s", folder, len(others), others[0])
    if not found:
        extensions = " ".join(extension.removeprefix(".") for extension in IMAGE_EXTENSIONS)
        raise InputError(f"no photos under {role} folder {folder}; looked for files ending in {extensions}")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _is_photo(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_EXTENSIONS)


def _label(path: Path, root: Path) -> str:
    parts = path.relative_to(root).parts
    if len(parts) < 2:
        raise InputError(
            f"{path} has no label: with dataset.labels=true each photo lies in a sub-folder of {root} "
            "that names its label. Move it, or set dataset.labels=false"
        )
    return parts[0]


def _label_gnd(
    queries: list[Path], query_labels: list[str], database: list[Path], labels: list[str]
) -> list[dict[str, Any]]:
    """Per query {"positive": ids, "junk": ids}, int64; junk is the query's own file."""
    members: dict[str, list[int]] = defaultdict(list)
    for i, label in enumerate(labels):
        members[label].append(i)
    own = {os.path.realpath(path): i for i, path in enumerate(database)}
    gnd = []
    for path, label in zip(queries, query_labels, strict=True):
        same = own.get(os.path.realpath(path), -1)
        positive = np.array(members.get(label, []), dtype=np.int64)
        junk = [] if same < 0 else [same]
        gnd.append({"positive": positive[positive != same], "junk": np.array(junk, dtype=np.int64)})
    return gnd
