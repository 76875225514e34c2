"""What settings are chosen on: a validation set of bounded size, its landmarks in two halves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.data.catalogue import how_to_get_gldv2_train
from superglobal.data.evaluation_set import EvaluationSet, leave_one_out_truth
from superglobal.data.gldv2 import read_train, split_landmarks
from superglobal.data.images import ImageItem
from superglobal.errors import InputError
from superglobal.utils.io import CORRUPT_IMAGES


@dataclass(frozen=True)
class HeldOut:
    """The landmarks that a training held out, each photo a query against all others, and their `max_side`."""

    dataset: EvaluationSet
    max_side: int | None


def held_out(run: Path, data_root: str | None) -> HeldOut:
    """Read what the training in `run` was validated on, by its settings there, without the photos it found bad.

    Args:
        run: its folder, with its `training.json`.
        data_root: folder of the training list; None for where it was.

    Raises:
        InputError: no training there, its photos' list is no longer where it was, or they are in tar files.
    """
    record = run / "training.json"
    try:
        content = json.loads(record.read_text())
        settings = content["identity"]["settings"]
        d, v, seed = settings["data"], settings["validation"], settings["seed"]
        root, tars = Path(data_root or content["root"]), content["tars"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{run}: no record of a training ({error!r}); give name= or run= of one, or a validation set: "
            "dataset=folder dataset.database=FOLDER dataset.labels=true"
        ) from error
    if not (root / d["table"]).is_file():
        raise InputError(
            f"{root / d['table']}: the photos of {run} are not there; data_root=FOLDER says where they are"
        )
    if tars is not None and data_root is None:
        raise InputError(
            f"{run} read its photos from {tars}; tuning needs them as files: unpack the tar files, and give "
            f"data_root=FOLDER of {d['table']} and train/a/b/c/<id>.jpg"
        )
    listed = read_train(root, d["table"], d["min_images"], d["classes_of"], d["leave_out"])
    photos = split_landmarks(listed, v["fraction"], seed)[1]
    bad = run / CORRUPT_IMAGES
    known = {line.partition("\t")[0] for line in bad.read_text().splitlines()} if bad.is_file() else set()
    kept = [i for i in range(len(photos)) if photos.location(i) not in known]
    labels = photos.labels[kept]
    dataset = EvaluationSet(
        name=f"held-out landmarks of {d['name']}",
        queries=(items := [ImageItem(photos.path(i)) for i in kept]),
        database=items,
        gnd=leave_one_out_truth(labels),
        clusters=[str(photos.landmarks[label]) for label in labels],
        protocols="labels",
        leave_one_out=True,
        root=root,
        how_to_get=how_to_get_gldv2_train(root),
    )
    return HeldOut(dataset, v["max_side"])


def bounded(dataset: EvaluationSet, most: int, seed: int) -> EvaluationSet:
    """At most `most` photos of the set, in whole landmarks drawn by `seed`, four at least.

    Raises:
        InputError: too many photos in a set with queries of its own: its database means what it is only whole.
    """
    if not dataset.leave_one_out:
        photos = len(dataset.database) + len(dataset.queries)
        if photos > most:
            raise InputError(
                f"{dataset.name}: {photos} photos, and max_images={most}; raise it to store all their maps"
            )
        return dataset
    assert dataset.clusters is not None
    assert dataset.gnd is not None
    names, label = np.unique(np.array(dataset.clusters), return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    total = np.cumsum(np.bincount(label)[order])
    rows = np.flatnonzero(np.isin(label, order[: max(4, np.searchsorted(total, most, side="right"))]))
    place = np.full(len(label), -1)
    place[rows] = np.arange(len(rows))
    kept = rows.tolist()
    gnd: list[dict[str, Any]] = [{key: place[ids] for key, ids in dataset.gnd[i].items()} for i in kept]
    items = [dataset.database[i] for i in kept]
    clusters = [dataset.clusters[i] for i in kept]
    return replace(dataset, queries=items, database=items, gnd=gnd, clusters=clusters)


def searched_half(clusters: Sequence[str], counted: np.ndarray, seed: int) -> np.ndarray:
    """(Q,) bool: the queries that settings are chosen on, those of half the landmarks, drawn by `seed`.

    Args:
        clusters: the landmark of each query.
        counted: (Q,) bool, queries with a positive.

    Raises:
        InputError: under four landmarks have such queries.
    """
    names = np.unique(np.array(clusters)[counted])
    if len(names) < 4:
        raise InputError(
            f"tuning needs four landmarks with two photos or more, two to choose on and two to check on; {len(names)} "
            "are there"
        )
    drawn = np.random.default_rng(seed).permutation(len(names))[: len(names) // 2]
    return np.isin(np.array(clusters), names[drawn])
