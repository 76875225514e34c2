"""Load the Revisited benchmarks (ROxford5k and RParis6k), and other data sets with the same file layout.

The folder `<root>/<name>` contains the images in `jpg/` and the ground truth in `gnd_<name>.pkl`.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.data.download_links import SOURCES, TOY_DATA_HINT, download_command
from superglobal.data.evaluation_set import EvaluationSet, group_by_landmark, image_path, loader
from superglobal.data.images import Box, ImageItem
from superglobal.data.safe_pickle import BlockedGlobalError, load_plain_pickle
from superglobal.errors import InputError
from superglobal.utils.io import read_file


@dataclass(frozen=True)
class GroundTruth:
    """Validated contents of a ground-truth file `gnd_<name>.pkl`.

    Attributes:
        name: name of the set.
        imlist: names of the database images.
        qimlist: names of the query images.
        gnd: for each query, a dict. "bbx" is the box of the query, (x1, y1, x2, y2) in pixels, or None. "easy", "hard"
            and "junk" are disjoint arrays of 0-based indices into `imlist`, (n,) int64.
    """

    name: str
    imlist: list[str]
    qimlist: list[str]
    gnd: list[dict[str, Any]]


def load_ground_truth(path: str | Path) -> GroundTruth:
    """Load and validate a ground-truth file. Code that the pickle file may contain is not run.

    Args:
        path: pickle file `gnd_<name>.pkl` in the format of the Revisited benchmarks (Radenovic et al., CVPR 2018).

    Returns:
        The contents of the file.

    Raises:
        InputError: the file is missing, is damaged or contains code, or its contents are invalid. The message names the
            file, the query and the field.
    """
    path = Path(path)
    try:
        data = load_plain_pickle(read_file(path))
    except OSError as error:
        raise InputError(f"ground truth not found: {path} ({error.strerror})") from error
    except BlockedGlobalError as error:
        message = f"{path}: the pickle file contains code ({error}), expected plain data; no code was run"
        raise InputError(f"{message}. Download the file from its official address") from error
    except Exception as error:  # A damaged pickle raises errors of any type.
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: damaged pickle file ({reason}); download it again") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: {type(data).__name__}, expected a dict with imlist, qimlist and gnd")
    imlist, qimlist = (_names(path, data, key) for key in ("imlist", "qimlist"))
    entries = _field(path, data, "gnd", "")
    if len(entries) != len(qimlist):
        raise InputError(f"{path}: gnd has {len(entries)} entries, expected {len(qimlist)}, one per query of qimlist")
    gnd = [
        _entry(path, entry, f"query {i} ({name})", len(imlist))
        for i, (entry, name) in enumerate(zip(entries, qimlist, strict=True))
    ]
    return GroundTruth(path.stem.removeprefix("gnd_"), imlist, qimlist, gnd)


@loader("revisited")
def revisited_set(root: str | Path, name: str, crop_query: bool = True) -> EvaluationSet:
    """Load the evaluation set in the folder `<root>/<name>`. The image files are not read.

    The ground truth is `gnd_<name>.pkl`, and the images are in `jpg/`. ".jpg" is appended to image names without an
    extension.

    Args:
        root: folder that contains the folder of the set.
        name: name of the set and of its folder.
        crop_query: crop each query to its box, as the reference implementation does; if false, use the whole query
            images.

    Raises:
        InputError: the ground truth is missing or invalid.
    """
    folder = Path(root) / name
    source = folder / f"gnd_{name}.pkl"
    how_to_get = _how_to_get(folder, name)
    if not source.is_file():
        raise InputError(f"ground truth of {name} not found: {source}\n{how_to_get}")
    truth = load_ground_truth(source)

    def item(image: str, box: Box | None = None) -> ImageItem:
        return ImageItem(image_path(folder / "jpg", image, source), box)

    boxes = [entry["bbx"] if crop_query else None for entry in truth.gnd]
    return EvaluationSet(
        name=name,
        queries=[item(image, box) for image, box in zip(truth.qimlist, boxes, strict=True)],
        database=[item(image) for image in truth.imlist],
        gnd=truth.gnd,
        clusters=query_landmarks(truth),
        protocols="revisited",
        leave_one_out=False,
        root=folder,
        how_to_get=how_to_get,
    )


def query_landmarks(truth: GroundTruth) -> list[str]:
    """Find out which queries show the same landmark, from the overlap of their relevant images.

    `group_by_landmark` defines how large the overlap must be.

    Returns:
        For each query, the name of the first query that shows the same landmark.
    """
    return [truth.qimlist[i] for i in group_by_landmark([{*entry["easy"], *entry["hard"]} for entry in truth.gnd])]


def _how_to_get(folder: Path, name: str) -> str:
    """Return the expected file layout of a set and, if the set can be downloaded, the command to do so."""
    text = f"{name} is expected as {folder}/gnd_{name}.pkl and {folder}/jpg/<image>.jpg, without sub-folders"
    if name in SOURCES:
        text += f"; download it from {SOURCES[name].page}: {download_command(name, folder)}"
    return f"{text}\n{TOY_DATA_HINT}"


def _field(path: Path, entry: Any, key: str, where: str) -> Sequence[Any]:
    """Return `entry[key]`, after checking that it is a list, tuple, set or range.

    Elements of a set are sorted. NumPy arrays are accepted too, because `load_plain_pickle` converts them to lists.

    Args:
        path: the ground-truth file, for messages.
        entry: the object that should be a dict with the key `key`.
        key: the key.
        where: description of the query that `entry` belongs to, for messages; "" if `entry` is the whole file.
    """
    place = f"{path}: {where}, {key}" if where else f"{path}: {key}"
    if not isinstance(entry, dict) or key not in entry:
        raise InputError(f"{place} is missing; expected the format of a Revisited ground truth")
    value = entry[key]
    if isinstance(value, (set, frozenset)):
        try:
            value = sorted(value, key=lambda element: (str(type(element)), element))
        except TypeError as error:  # such as tuples of different types
            raise InputError(f"{place}: a set whose elements cannot be sorted ({error}), expected a list") from error
    if isinstance(value, range):
        value = value[: sys.maxsize]  # `len` does not support longer ranges.
    if not isinstance(value, (list, tuple, range)):
        raise InputError(f"{place}: {type(value).__name__}, expected a list")
    return value


def _text(value: Any) -> str:
    """Return a short text of a value for messages. The full text is immense if the parts of the value are shared."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python does not convert integers of more than 4300 digits.
        return f"{type(value).__name__} of too many digits"


def _names(path: Path, data: dict[str, Any], key: str) -> list[str]:
    """Return the list of image names `data[key]`, after checking that it is valid and not empty.

    `data` is the unpickled contents of the ground-truth file `path`.
    """
    names = _field(path, data, key, "")
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise InputError(f"{path}: {key}[{i}]: {type(name).__name__}, expected an image name")
    if not names:
        raise InputError(f"{path}: {key}: empty, expected image names")
    return list(names)


def _entry(path: Path, entry: Any, where: str, database: int) -> dict[str, Any]:
    """Validate the ground truth of one query, and return it as an element of `GroundTruth.gnd`.

    Args:
        path: the ground-truth file, for messages.
        entry: the unpickled entry of the query.
        where: description of the query, for messages.
        database: number of database images.

    Raises:
        InputError: a field is missing or has the wrong type, or an index is out of range or repeated.
    """
    checked: dict[str, Any] = {"bbx": None}
    key_of: dict[int, str] = {}
    for key in ("easy", "hard", "junk"):
        ids = _field(path, entry, key, where)
        if len(ids) > database:
            raise InputError(f"{path}: {where}, {key}: {len(ids)} indices, expected at most {database}")
        for value in ids:
            if not isinstance(value, int | float) or isinstance(value, bool) or value % 1 != 0:
                raise InputError(f"{path}: {where}, {key}: {_text(value)}, expected an index into imlist")
            if not 0 <= value < database:
                raise InputError(f"{path}: {where}, {key}: index {_text(value)}, expected 0 to {database - 1}")
            if int(value) in key_of:
                earlier = key_of[int(value)]
                raise InputError(f"{path}: {where}, {key}: index {value} is also in {earlier}, expected once")
            key_of[int(value)] = key
        checked[key] = np.array([int(value) for value in ids], dtype=np.int64)
    if entry.get("bbx") is not None:
        box = _field(path, entry, "bbx", where)
        if len(box) != 4 or not all(isinstance(v, int | float) and abs(v) < 2**63 for v in box):
            raise InputError(f"{path}: {where}, bbx: {_text(list(box[:6]))}, expected four numbers x1, y1, x2, y2")
        checked["bbx"] = tuple(float(v) for v in box)
    return checked
