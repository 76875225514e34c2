"""Google Landmarks v2 as it is: its lists, beside them `train/a/b/c/<id>.jpg` or elsewhere its tar files.

Layout and formats: github.com/cvdfoundation/google-landmark.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from superglobal.data.catalogue import how_to_get_gldv2, how_to_get_gldv2_train, tree_path
from superglobal.data.evaluation_set import (
    EvaluationSet,
    RecognitionTruth,
    RetrievalTruth,
    landmarks,
    loader,
    tree_items,
)
from superglobal.data.gldv2_csv import hex_values, read_ids, read_landmarks, read_list
from superglobal.data.gldv2_solutions import (
    Solution,
    Task,
    read_solution,
)
from superglobal.data.image_index import load_index
from superglobal.data.image_sources import PhotoSource, PhotoTree
from superglobal.errors import InputError
from superglobal.utils.io import write_atomically

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainList:
    """Training photos of chosen landmarks.

    Attributes:
        root: the `train` folder, above a/b/c/<id>.jpg.
        ids: (N,) image ids, bytes of 16 hexadecimal digits.
        labels: (N,) int32, 0..classes-1.
        landmarks: (classes,) int64, the landmark_id behind each label.
        source: where the photos' bytes come from; None is the tree below `root`.
    """

    root: Path
    ids: np.ndarray
    labels: np.ndarray
    landmarks: np.ndarray
    source: PhotoSource | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, index: int) -> Path:
        """`a/b/c/abc....jpg` below the root: the first three digits are folders."""
        return self.root / tree_path(self.ids[index])

    def read(self, index: int) -> bytes:
        """The photo's file.

        Raises:
            CorruptImageError: it is missing or cannot be read; the message is the reason, `place` says where.
        """
        return self._source().read(self.ids[index])

    def place(self, index: int) -> str:
        """Its path, or tar file and member ("images_012.tar:a/b/c/abc....jpg"), for messages."""
        return self._source().place(self.ids[index])

    def digest(self) -> str:
        """SHA-256 over which photos show which landmarks."""
        digest = hashlib.sha256(self.ids.tobytes())
        digest.update(self.landmarks[self.labels].tobytes())
        return digest.hexdigest()

    def _source(self) -> PhotoSource:
        return self.source or PhotoTree(self.root)


def read_train(
    root: str | Path,
    table: str = "train_clean.csv",
    min_images: int = 2,
    classes_of: str | None = None,
    leave_out: str | Path | None = None,
    tars: str | Path | None = None,
) -> TrainList:
    """Photos of every landmark with at least `min_images` of them, sorted by landmark and id.

    Args:
        root: folder with the lists and the `train` folder.
        table: "train_clean.csv" or "train.csv".
        min_images: landmarks with fewer are left out: one photo teaches no likeness.
        classes_of: another list in `root`; only landmarks that it has too count. `train.csv` with the classes of
            `train_clean.csv` is what the Kaggle teams call GLDv2x.
        leave_out: a file of landmark ids, one a line (# begins a comment), that do not count: those of the evaluation
            sets, for training without overlap. Ids that no list has are counted in a warning.
        tars: folder of the official tar files, to read the photos from; needs the index of `prepare`.

    A clean landmark without photos counts as not there.

    Raises:
        InputError: no such list, another format, an id that is none or comes twice, no landmark left, or `tars`
            without an index that fits.
    """
    root = Path(root)
    path = root / table
    ids, landmarks = _read(root, table)
    if classes_of is not None:
        _, others = _read(root, classes_of)
        ids, landmarks = _where(np.isin(landmarks, others), ids, landmarks)
    if leave_out is not None:
        excluded = read_landmarks(leave_out)
        unknown = np.setdiff1d(excluded, landmarks)
        if len(unknown):
            log.warning("%s: %d of %d landmarks are not in %s", leave_out, len(unknown), len(excluded), path)
        kept = ~np.isin(landmarks, excluded)
        log.info("%s: left out %d landmarks, %d photos", leave_out, len(excluded) - len(unknown), int((~kept).sum()))
        ids, landmarks = _where(kept, ids, landmarks)
    values, labels, counts = np.unique(landmarks, return_inverse=True, return_counts=True)
    keep = counts >= min_images
    if not keep.any():
        raise InputError(f"{path}: no landmark has {min_images} images; lower data.min_images")
    source = None if tars is None else load_index(root, table, tars).tars(Path(tars))
    return _subset(TrainList(root / "train", ids, labels.astype(np.int32), values, source), keep)


def _read(root: Path, table: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids, landmarks) of a list, sorted by landmark and id."""
    path = root / table
    try:
        ids, landmarks = read_list(path)
    except FileNotFoundError as error:
        raise InputError(f"training list not found: {path}\n{how_to_get_gldv2_train(root)}") from error
    values = require_unique(path, ids)
    order = np.lexsort((values, landmarks))
    del values
    return ids[order], landmarks[order]


def require_unique(path: Path, ids: np.ndarray) -> np.ndarray:
    """(N,) S16 ids of a list as (N,) uint64.

    Raises:
        InputError: one is listed twice.
    """
    values = hex_values(ids)
    assert values is not None
    ordered = np.sort(values)
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        raise InputError(f"{path}: image {ordered[twice[0]]:016x} is listed twice; remove one line")
    return values


def _where(keep: np.ndarray, ids: np.ndarray, landmarks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return ids[keep], landmarks[keep]


def split_landmarks(photos: TrainList, fraction: float, seed: int) -> tuple[TrainList, TrainList]:
    """Hold out whole landmarks, drawn by `seed`, for retrieval validation: (training, validation).

    Retrieval is asked about places never seen in training, so the validation's places are not either.
    """
    classes = len(photos.landmarks)
    held = np.zeros(classes, bool)
    held[np.random.default_rng(seed).permutation(classes)[: round(fraction * classes)]] = True
    return _subset(photos, ~held), _subset(photos, held)


def _subset(photos: TrainList, keep: np.ndarray) -> TrainList:
    if keep.all():
        return photos
    chosen = keep[photos.labels]
    label_of = (np.cumsum(keep) - 1).astype(np.int32)
    labels = label_of[photos.labels[chosen]]
    return replace(photos, ids=photos.ids[chosen], labels=labels, landmarks=photos.landmarks[keep])


_NONE = np.empty(0, np.int64)


@loader("gldv2")
def retrieval_set(root: str | Path, name: str = "gldv2_test", solution: str = "v2.1") -> EvaluationSet:
    """Test images with a place in the retrieval solution, searched for in the index of 761,757 images.

    Args:
        root: folder of `index.csv`, the solution, `index/a/b/c/<id>.jpg` and `test/a/b/c/<id>.jpg`.
        name: name of the set.
        solution: version of the ground truth, "v2.1" for `retrieval_solution_v2.1.csv`, or the path of its file.

    Raises:
        InputError: a list that is missing or faulty, or ground truth that the index does not have.
    """
    root = Path(root)
    hint = how_to_get_gldv2(root)
    truth = _solution(root, "retrieval", solution, hint)
    path = root / "index.csv"
    try:
        index = read_ids(path)
    except FileNotFoundError as error:
        raise InputError(f"list of the index not found: {path}\n{hint}") from error
    relevant = _rows_in(path, index, truth)
    landmark = [truth.ids[i].decode() for i in query_landmarks(truth.truth)]
    return EvaluationSet(
        name=name,
        queries=tree_items(root / "test", truth.ids),
        database=tree_items(root / "index", index),
        gnd=[{"positive": one} for one in relevant],
        clusters=landmark,
        protocols="landmarks",
        leave_one_out=False,
        root=root,
        how_to_get=hint,
        landmark_truth=RetrievalTruth(truth.ids, index, relevant, truth.parts, landmark),
        about={"solution": truth.about()},
    )


@loader("gldv2_recognition")
def recognition_set(
    root: str | Path,
    name: str = "gldv2_recognition",
    table: str = "train_clean.csv",
    solution: str = "v2.1",
    neighbors: int = 3,
    votes: str = "similarity",
) -> EvaluationSet:
    """All test images that count, recognised by their nearest training photos.

    Landmarks of training, not those of the index, which are numbered differently. A landmark of the solution that the
    training list does not have cannot be recognised and counts all the same.

    Args:
        root: folder of the training list, the solution, `train/a/b/c/<id>.jpg` and `test/a/b/c/<id>.jpg`.
        name: name of the set.
        table: training list, "train_clean.csv" or "train.csv"; its images are the database.
        solution: version of the ground truth, "v2.1" for `recognition_solution_v2.1.csv`, or the path of its file.
        neighbors: number of nearest database images that vote.
        votes: "similarity" (the score of a landmark is the sum of s over its images among the neighbors), "distance"
            (the sum of 2 s - 1) or "nearest" (the nearest image alone). After reranking, its scores take the place of
            the cosine s.

    Raises:
        InputError: a list that is missing or faulty.
    """
    root = Path(root)
    hint = how_to_get_gldv2(root)
    truth = _solution(root, "recognition", solution, hint)
    photos = read_train(root, table, min_images=1)
    labels = photos.landmarks[photos.labels]
    known = set(photos.landmarks.tolist())
    unknown = sum(len(one) > 0 and known.isdisjoint(one.tolist()) for one in truth.truth)
    if unknown:
        log.warning("%d test images show landmarks that %s does not have; they count as not recognised", unknown, table)
    return EvaluationSet(
        name=name,
        queries=tree_items(root / "test", truth.ids),
        database=tree_items(photos.root, photos.ids),
        gnd=[{"positive": _rows_of(labels, one)} for one in truth.truth],
        clusters=[str(one[0]) if len(one) else "" for one in truth.truth],
        protocols="landmarks",
        leave_one_out=False,
        root=root,
        how_to_get=hint,
        landmark_truth=RecognitionTruth(truth.ids, truth.truth, labels, truth.parts, neighbors, votes),
        about={"solution": truth.about(), "landmarks_not_in_database": unknown},
    )


@loader("gldv2_val")
def validation_set(
    root: str | Path, name: str = "gldv2_val", table: str = "train_clean.csv", landmarks: int = 800, seed: int = 0
) -> EvaluationSet:
    """Training photos of landmarks that a training holds out: one photo of each is a query, the others are the index.

    The landmarks are the first that `split_landmarks` draws by `seed`: every training on the same list and seed, with
    nothing left out, that holds out as many or more has not seen them. The split is written down beside the list, as
    `<name>_<landmarks>_seed<seed>.csv` with id, landmark_id and split (query or index).

    Args:
        root: folder of the training list and of `train/a/b/c/<id>.jpg`.
        name: name of the set.
        table: training list, "train_clean.csv" or "train.csv".
        landmarks: number of held-out landmarks; a training that holds out as many (`validation.fraction`) saw none of
            them.
        seed: seed of the training.

    Raises:
        InputError: no such list, fewer landmarks than wanted, or a split written down that is another one.
    """
    root = Path(root)
    listed = read_train(root, table)
    if landmarks >= len(listed.landmarks):
        raise InputError(
            f"dataset.landmarks={landmarks}: {root / table} has {len(listed.landmarks)} of two photos or more, and "
            "training needs some too"
        )
    photos = split_landmarks(listed, landmarks / len(listed.landmarks), seed)[1]
    query = _drawn_queries(photos, seed)
    _write_down(root / f"{name}_{landmarks}_seed{seed}.csv", root / table, photos, query)
    index, labels = photos.ids[~query], photos.landmarks[photos.labels]
    relevant = [_rows_of(labels[~query], one) for one in labels[query, None]]
    landmark = [str(one) for one in labels[query]]
    return EvaluationSet(
        name=name,
        queries=tree_items(photos.root, photos.ids[query]),
        database=tree_items(photos.root, index),
        gnd=[{"positive": one} for one in relevant],
        clusters=landmark,
        protocols="landmarks",
        leave_one_out=False,
        root=root,
        how_to_get=how_to_get_gldv2(root),
        landmark_truth=RetrievalTruth(
            photos.ids[query], index, relevant, {"all": np.ones(len(landmark), bool)}, landmark
        ),
        about={"landmarks": landmarks, "drawn_from": table, "seed": seed},
    )


def _solution(root: Path, task: Task, solution: str, hint: str) -> Solution:
    version = root / f"{task}_solution_{solution}.csv"
    path = version if "/" not in solution and not solution.endswith(".csv") else Path(solution)
    if not path.is_file():
        raise InputError(f"solution not found: {path} (dataset.solution={solution}: a version or a path)\n{hint}")
    return read_solution(path, task)


def _rows_in(path: Path, index: np.ndarray, truth: Solution) -> list[np.ndarray]:
    """Per query the rows of its relevant images in the index."""
    known, wanted = require_unique(path, index), hex_values(np.concatenate(truth.truth))
    assert wanted is not None
    order = np.argsort(known)
    rows = order[np.minimum(np.searchsorted(known, wanted, sorter=order), len(known) - 1)]
    counts = np.array([len(one) for one in truth.truth])
    absent = np.flatnonzero(known[rows] != wanted)
    if len(absent):
        line = truth.lines[np.repeat(np.arange(len(counts)), counts)[absent[0]]]
        raise InputError(
            f"{truth.path}, line {line}: image {wanted[absent[0]]:016x} is not in {path} ({len(absent)} such); do they "
            "belong together?"
        )
    return np.split(rows, np.cumsum(counts))[:-1]


def _rows_of(labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Rows with one of the wanted labels; `labels` (N,) are sorted."""
    if not len(wanted):
        return _NONE
    low, high = (np.searchsorted(labels, wanted, side=side) for side in ("left", "right"))
    return np.concatenate([np.arange(*ends) for ends in zip(low, high, strict=True)])


def _drawn_queries(photos: TrainList, seed: int) -> np.ndarray:
    """(N,) bool: one photo of each landmark; photos are sorted by landmark."""
    counts = np.bincount(photos.labels)
    chosen = np.cumsum(counts) - counts + np.random.default_rng([seed, 1]).integers(counts)
    query = np.zeros(len(photos), bool)
    query[chosen] = True
    return query


def _write_down(path: Path, table: Path, photos: TrainList, query: np.ndarray) -> None:
    """Write the split, or check that it is the one that is there."""
    columns = photos.ids.tolist(), photos.landmarks[photos.labels].tolist(), query.tolist()
    lines = ["id,landmark_id,split"]
    lines += [f"{i.decode()},{n},{'query' if q else 'index'}" for i, n, q in zip(*columns, strict=True)]
    if path.is_file():
        if path.read_text(errors="replace").splitlines() != lines:
            raise InputError(
                f"{path}: not the split that {table} gives; one of the two was changed. Remove {path.name} to write it "
                "anew, or take another dataset.name"
            )
        return
    try:
        write_atomically(path, ("\n".join(lines) + "\n").encode())
    except InputError as error:
        log.warning("the split is not written down: %s", error)


def query_landmarks(truth: Sequence[np.ndarray]) -> list[int]:
    """`landmarks` of queries from the S16 ids of their relevant images."""
    numbers = hex_values(np.concatenate(truth))
    assert numbers is not None
    ends = np.cumsum([len(one) for one in truth])
    return landmarks([one.tolist() for one in np.split(numbers, ends)[:-1]])
