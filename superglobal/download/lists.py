"""What the loaders' own lists say must be there, and whether a file is what it is called."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np

from superglobal.data.catalogue import Source
from superglobal.data.evaluation_set import image_path, load_distractors
from superglobal.data.gldv2_csv import read_ids, read_list
from superglobal.data.gldv2_solutions import read_solution
from superglobal.data.image_sources import relative_path
from superglobal.data.revisited import load_ground_truth
from superglobal.download.unpack import Place
from superglobal.errors import InputError

_ID = set("0123456789abcdef")


def listed(source: Source, root: Path) -> np.ndarray:
    """(N,) S names of the photos that a source must have, below its folder of photos.

    Raises:
        InputError: the list is missing or faulty.
    """
    if source.lists == "revisited":
        path = root / f"gnd_{source.name}.pkl"
        truth = load_ground_truth(path)
        jpg = root / source.images
        names = [image_path(jpg, name, path).relative_to(jpg) for name in (*truth.imlist, *truth.qimlist)]
        return np.array([str(name).encode() for name in names])
    if source.lists == "distractors":
        items = load_distractors(root.parent, root.name)
        return np.array([str(item.path.relative_to(root / source.images)).encode() for item in items])
    ids = read_list(root / "train.csv")[0] if source.lists == "train" else read_ids(root / f"{source.lists}.csv")
    return _tree_names(ids)


def placing(source: Source, names: np.ndarray) -> Place:
    """Where the members of a source's archives go.

    A photo goes where the list has it: to the longest end of its name in the archive that is listed, whatever folders
    the archive has around it. GLDv2's name their place themselves.
    """
    if source.lists not in ("revisited", "distractors"):
        return _tree_place
    known = set(names.tolist())

    def place(member: PurePosixPath) -> str | None:
        ends = ("/".join(member.parts[first:]) for first in range(len(member.parts)))
        return next((end for end in ends if os.fsencode(end) in known), None)

    return place


def require_kind(path: Path) -> None:
    """Whether a file is what its name says.

    Raises:
        InputError: it is not: damaged, another format, or a web page in its place.
    """
    check = _CHECKS.get(path.name) or _CHECKS.get(path.suffix)
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")
    with path.open("rb") as file:
        if file.read(512).lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
            raise InputError(f"{path} is a web page in place of the file")
    if check:
        check(path)


def _tree_place(member: PurePosixPath) -> str | None:
    plain = member.suffix == ".jpg" and len(member.stem) == 16 and _ID.issuperset(member.stem)
    return relative_path(member.stem.encode()) if plain else None


def _tree_names(ids: np.ndarray) -> np.ndarray:
    """(N,) S16 ids -> (N,) S26 `a/b/c/abc....jpg`, millions at a time."""
    digits = ids.view(np.uint8).reshape(-1, 16)
    names = np.empty((len(ids), 26), np.uint8)
    names[:, 0:6:2], names[:, 1:6:2] = digits[:, :3], ord("/")
    names[:, 6:22], names[:, 22:] = digits, np.frombuffer(b".jpg", np.uint8)
    return names.view("S26").ravel()


def _mat(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(6) != b"MATLAB":
            raise InputError(f"{path} is no MATLAB file")


def _weights(path: Path) -> None:
    from superglobal.models.weights import read_weights

    if read_weights(path).kind != "cvnet":
        raise InputError(f"{path}: no CVNet checkpoint (no keys encoder_q.* or globalmodel.*)")


_CHECKS: dict[str, Callable[[Path], object]] = {
    ".pkl": load_ground_truth,
    ".mat": _mat,
    ".pyth": _weights,
    "train.csv": read_list,
    "train_clean.csv": read_list,
    "index.csv": read_ids,
    "test.csv": read_ids,
    "retrieval_solution_v2.1.csv": lambda path: read_solution(path, "retrieval"),
    "recognition_solution_v2.1.csv": lambda path: read_solution(path, "recognition"),
}
