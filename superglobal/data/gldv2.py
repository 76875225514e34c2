"""Load training images, and the evaluation sets of Google Landmarks v2 (GLDv2), from the official lists of GLDv2.

Training images can also be labeled images of your own.

The file layout and the formats are described at github.com/cvdfoundation/google-landmark. A "solution" is the ground
truth of the test images.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from superglobal.data.download_links import how_to_get_gldv2, how_to_get_gldv2_train
from superglobal.data.evaluation_set import EvaluationSet, RecognitionTruth, RetrievalTruth, group_by_landmark, loader
from superglobal.data.folder import labeled_images
from superglobal.data.gldv2_csv import read_ids, read_landmark_ids, read_list
from superglobal.data.gldv2_solutions import Solution, Task, read_solution
from superglobal.data.image_index import ImageFiles, ImageSource, ImageTree, load_index
from superglobal.data.lazy_sequence import tree_items
from superglobal.errors import InputError
from superglobal.utils.io import write_atomically

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainList:
    """Training images of selected landmarks, sorted by landmark and id.

    Attributes:
        root: folder `train`, which contains the images as a/b/c/<id>.jpg, or the folder of your own images.
        ids: (N,) S16 image ids of 16 hexadecimal digits.
        labels: (N,) int32 class of each image, from 0 to C - 1 for C landmarks.
        landmarks: (C,) int64 landmark_id of each class.
        source: where to read the image files; None for the folder tree below `root`.
    """

    root: Path
    ids: np.ndarray
    labels: np.ndarray
    landmarks: np.ndarray
    source: ImageSource | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def path(self, index: int) -> Path:
        """Return the path that the image at position `index` of this list has in the folder tree."""
        source = self._source()
        return (source if isinstance(source, ImageTree) else ImageTree(self.root)).path(self.ids[index])

    def read(self, index: int) -> bytes:
        """Return the contents of the file of the image at position `index` of this list.

        Raises:
            CorruptImageError: the file is missing or cannot be read. The message gives only the reason, not the file.
        """
        return self._source().read(self.ids[index])

    def location(self, index: int) -> str:
        """Return where the image at position `index` of this list is stored, for messages.

        This is the path of the image file or, for an image in a tar file, images_012.tar:a/b/c/<id>.jpg.
        """
        return self._source().location(self.ids[index])

    def digest(self) -> str:
        """Return the SHA-256 digest of the image ids and landmark ids, in hexadecimal digits."""
        digest = hashlib.sha256(self.ids.tobytes())
        digest.update(self.landmarks[self.labels].tobytes())
        return digest.hexdigest()

    def _source(self) -> ImageSource:
        """Return the source of the image files: `source`, or the folder tree below `root` if `source` is None."""
        return self.source or ImageTree(self.root)


def read_train(
    root: str | Path,
    table: str | None = "train_clean.csv",
    min_images: int = 2,
    classes_of: str | None = None,
    leave_out: str | Path | None = None,
    tars: str | Path | None = None,
) -> TrainList:
    """Read the list of the training images. Landmarks with fewer than `min_images` images are dropped.

    Args:
        root: folder that contains the lists and the folder `train`; without `table`, the folder or CSV file that
            `labeled_images` reads.
        table: file name of the list, "train_clean.csv" or "train.csv"; None for labeled images of your own.
        min_images: minimum number of images of a landmark; at least two are needed for a positive pair.
        classes_of: file name of a second list in `root`. Only landmarks that are also in this list are used. For
            example, GLDv2x, as used in Kaggle competitions, consists of the images of `train.csv` that show the
            landmarks of `train_clean.csv`.
        leave_out: text file of landmark ids to exclude, one per line; # starts a comment. Use it to train without the
            landmarks of the evaluation sets. A warning reports how many of the ids are not in the list.
        tars: folder of the official tar files. If it is given, the images are read from the tar files. This requires
            the index that `superglobal prepare-gldv2` writes.

    Raises:
        InputError: a list is missing or invalid, no landmark remains, or the index does not match the tar files.
    """
    root = Path(root)
    if table is None:
        return _drop_small(_read_folder(root), min_images, root)
    path = root / table
    ids, landmarks = _read_sorted(root, table)
    keep = np.ones(len(ids), bool)
    if classes_of is not None:
        keep &= np.isin(landmarks, _read_sorted(root, classes_of)[1])
    if leave_out is not None:
        excluded = read_landmark_ids(leave_out)
        unknown = np.setdiff1d(excluded, landmarks[keep])
        if len(unknown):
            log.warning("%s: %d of %d landmarks are not in %s", leave_out, len(unknown), len(excluded), path)
        excluded_rows = keep & np.isin(landmarks, excluded)
        n_landmarks = len(excluded) - len(unknown)
        log.info("%s: excluded %d landmarks with %d images", leave_out, n_landmarks, int(excluded_rows.sum()))
        keep &= ~excluded_rows
    if not keep.all():
        ids, landmarks = ids[keep], landmarks[keep]
    values, labels = np.unique(landmarks, return_inverse=True)
    source = None if tars is None else load_index(root, table, tars).tars(Path(tars))
    return _drop_small(TrainList(root / "train", ids, labels.astype(np.int32), values, source), min_images, path)


def _read_folder(path: Path) -> TrainList:
    """Return the labeled images of a folder or CSV file. Landmark ids are the positions in the sorted list of labels.

    The id of an image is a hash of its path relative to the folder, so a moved folder contains the same images.
    """
    names, image_labels = labeled_images(path)
    ids = np.array([hashlib.sha256(os.fsencode(name)).hexdigest()[:16].encode() for name in names])
    values, labels = np.unique(image_labels, return_inverse=True)
    order = np.lexsort((ids, labels))
    folder = path if path.is_dir() else path.parent
    source = ImageFiles(folder, dict(zip(ids.tolist(), names, strict=True)))
    return TrainList(folder, ids[order], labels[order].astype(np.int32), np.arange(len(values)), source)


def _drop_small(images: TrainList, min_images: int, path: Path) -> TrainList:
    """Return a training list without the landmarks that have fewer than `min_images` images.

    Args:
        images: training list.
        min_images: minimum number of images of a landmark.
        path: file or folder of the list, for messages.

    Raises:
        InputError: no landmark remains.
    """
    large = np.bincount(images.labels, minlength=len(images.landmarks)) >= min_images
    if not large.any():
        raise InputError(f"{path}: no landmark has {min_images} images; lower data.min_images")
    if not large.all():
        text = "%s: left out %d of %d landmarks, which have fewer than %d images (data.min_images)"
        log.info(text, path, np.count_nonzero(~large), len(large), min_images)
    return _select(images, large)


def _read_sorted(root: Path, table: str) -> tuple[np.ndarray, np.ndarray]:
    """Read a training list, and sort the images by landmark id and image id.

    Args:
        root: folder of the list.
        table: file name of the list.

    Returns:
        The image ids, (N,) S16, and the landmark id of each image, (N,) int64.
    """
    path = root / table
    try:
        ids, landmarks = read_list(path)
    except FileNotFoundError as error:
        raise InputError(f"training list not found: {path}\n{how_to_get_gldv2_train(root)}") from error
    order = np.lexsort((ids, landmarks))
    return ids[order], landmarks[order]


def split_landmarks(images: TrainList, fraction: float | None, seed: int) -> tuple[TrainList, TrainList]:
    """Hold out random landmarks of a training list for validation.

    The benchmarks evaluate retrieval on landmarks that are not in the training set. The training and validation lists
    therefore have no landmarks in common either.

    Args:
        images: list to split.
        fraction: fraction of the landmarks to hold out; None for a fifth of them, at least 2 and at most 50.
        seed: seed of the selection.

    Returns:
        The list of the images for training, and the list of the images for validation.
    """
    n_landmarks = len(images.landmarks)
    count = min(max(2, round(n_landmarks / 5)), 50) if fraction is None else round(fraction * n_landmarks)
    held_out = np.zeros(n_landmarks, bool)
    held_out[np.random.default_rng(seed).permutation(n_landmarks)[:count]] = True
    return _select(images, ~held_out), _select(images, held_out)


def _select(images: TrainList, keep: np.ndarray) -> TrainList:
    """Return a training list of only some landmarks, and renumber the classes.

    Args:
        images: training list of C landmarks.
        keep: (C,) bool, True for the landmarks to keep.
    """
    if keep.all():
        return images
    rows = keep[images.labels]
    new_label = (np.cumsum(keep) - 1).astype(np.int32)
    labels = new_label[images.labels[rows]]
    return replace(images, ids=images.ids[rows], labels=labels, landmarks=images.landmarks[keep])


@loader("gldv2")
def retrieval_set(root: str | Path, name: str = "gldv2_test", solution: str = "v2.1") -> EvaluationSet:
    """Load the GLDv2 retrieval benchmark. The queries are the test images; the database has 761,757 index images.

    Args:
        root: folder that contains `index.csv`, the solution, `index/a/b/c/<id>.jpg` and `test/a/b/c/<id>.jpg`.
        name: name of the set.
        solution: version of the ground truth, "v2.1" for `retrieval_solution_v2.1.csv`, or the path of a solution file.

    Raises:
        InputError: a list is missing or invalid, or an image of the ground truth is not in the index.
    """
    root = Path(root)
    hint = how_to_get_gldv2(root)
    truth = _solution(root, "retrieval", solution, hint)
    path = root / "index.csv"
    try:
        index = read_ids(path)
    except FileNotFoundError as error:
        raise InputError(f"list of the index images not found: {path}\n{hint}") from error
    relevant = _rows_in(path, index, truth)
    clusters = [truth.ids[i].decode() for i in query_landmarks(truth.truth)]
    return EvaluationSet(
        name=name,
        queries=tree_items(root / "test", truth.ids),
        database=tree_items(root / "index", index),
        gnd=[{"positive": rows} for rows in relevant],
        clusters=clusters,
        protocols="landmarks",
        leave_one_out=False,
        root=root,
        how_to_get=hint,
        landmark_truth=RetrievalTruth(truth.ids, index, relevant, truth.parts, clusters),
        about={"solution": truth.provenance()},
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
    """Load the GLDv2 recognition benchmark. The nearest training images predict the landmark of each test image.

    Landmark ids are those of the training list. They differ from the landmark ids of the index images in the retrieval
    benchmark. A test image of a landmark that is not in the training list cannot be recognized and counts as an error.

    Args:
        root: folder that contains the training list, the solution, `train/a/b/c/<id>.jpg` and `test/a/b/c/<id>.jpg`.
        name: name of the set.
        table: training list, "train_clean.csv" or "train.csv"; its images are the database.
        solution: version of the ground truth, "v2.1" for `recognition_solution_v2.1.csv`, or the path of a solution
            file.
        neighbors: number of nearest database images that vote.
        votes: "similarity" (the score of a landmark is the sum of s over its images among the neighbors), "distance"
            (the sum of 2 s - 1) or "nearest" (only the nearest image counts). s is the cosine similarity or, after
            reranking, the score of the reranker.

    Raises:
        InputError: a list is missing or invalid.
    """
    root = Path(root)
    hint = how_to_get_gldv2(root)
    truth = _solution(root, "recognition", solution, hint)
    images = read_train(root, table, min_images=1)
    labels = images.landmarks[images.labels]
    known = set(images.landmarks.tolist())
    unknown = sum(len(shown) > 0 and known.isdisjoint(shown.tolist()) for shown in truth.truth)
    if unknown:
        text = "%d test images show landmarks that %s lacks; they cannot be recognized and count as errors"
        log.warning(text, unknown, table)
    return EvaluationSet(
        name=name,
        queries=tree_items(root / "test", truth.ids),
        database=tree_items(images.root, images.ids),
        gnd=[{"positive": _rows_of(labels, shown)} for shown in truth.truth],
        clusters=[str(shown[0]) if len(shown) else "" for shown in truth.truth],
        protocols="landmarks",
        leave_one_out=False,
        root=root,
        how_to_get=hint,
        landmark_truth=RecognitionTruth(truth.ids, truth.truth, labels, truth.parts, neighbors, votes),
        about={"solution": truth.provenance(), "landmarks_not_in_database": unknown},
    )


@loader("gldv2_val")
def validation_set(
    root: str | Path, name: str = "gldv2_val", table: str = "train_clean.csv", landmarks: int = 800, seed: int = 0
) -> EvaluationSet:
    """Load a validation set from held-out landmarks of the training list.

    One random image of each landmark is a query; all other images of the landmarks form the database. `split_landmarks`
    holds out the first landmarks of a random order that depends on `seed`. A training run on the same list has
    therefore not seen them if it uses the same seed, does not use `leave_out`, and holds out at least as many
    landmarks. The split is written to the folder of the list as `<name>_<landmarks>_seed<seed>.csv`, with the columns
    id, landmark_id and split (query or index).

    Args:
        root: folder that contains the training list and `train/a/b/c/<id>.jpg`.
        name: name of the set.
        table: training list, "train_clean.csv" or "train.csv".
        landmarks: number of held-out landmarks; at most the number that the training run holds out
            (`validation.fraction`).
        seed: seed of the training run.

    Raises:
        InputError: the list is missing or has too few landmarks, or an existing split file contains another split.
    """
    root = Path(root)
    train = read_train(root, table)
    if landmarks >= len(train.landmarks):
        raise InputError(
            f"dataset.landmarks={landmarks}: expected fewer than the {len(train.landmarks)} landmarks with two or more "
            f"images in {root / table}, because training needs some of them"
        )
    images = split_landmarks(train, landmarks / len(train.landmarks), seed)[1]
    is_query = _draw_queries(images, seed)
    _write_split(root / f"{name}_{landmarks}_seed{seed}.csv", root / table, images, is_query)
    index, labels = images.ids[~is_query], images.landmarks[images.labels]
    relevant = [_rows_of(labels[~is_query], label) for label in labels[is_query, None]]
    clusters = [str(label) for label in labels[is_query]]
    subsets = {"all": np.ones(len(clusters), bool)}
    return EvaluationSet(
        name=name,
        queries=tree_items(images.root, images.ids[is_query]),
        database=tree_items(images.root, index),
        gnd=[{"positive": rows} for rows in relevant],
        clusters=clusters,
        protocols="landmarks",
        leave_one_out=False,
        root=root,
        how_to_get=how_to_get_gldv2(root),
        landmark_truth=RetrievalTruth(images.ids[is_query], index, relevant, subsets, clusters),
        about={"landmarks": landmarks, "drawn_from": table, "seed": seed},
    )


def _solution(root: Path, task: Task, solution: str, hint: str) -> Solution:
    """Read the solution (ground truth) of a task.

    Args:
        root: folder of the official solution files.
        task: "retrieval" or "recognition".
        solution: version of the official solution, such as "v2.1", or the path of a solution file.
        hint: end of the error message if the file is missing.
    """
    version = root / f"{task}_solution_{solution}.csv"
    path = version if "/" not in solution and not solution.endswith(".csv") else Path(solution)
    if not path.is_file():
        raise InputError(
            f"solution not found: {path} (dataset.solution={solution}: expected a version or a path)\n{hint}"
        )
    return read_solution(path, task)


def _rows_in(path: Path, index: np.ndarray, solution: Solution) -> list[np.ndarray]:
    """Find the relevant images of each query in the index.

    Args:
        path: file of the index list, for messages.
        index: (N,) S16 image ids of the index.
        solution: ground truth of the retrieval task.

    Returns:
        For each query, the index rows of its relevant images, (n,) int64.

    Raises:
        InputError: an image of the ground truth is not in the index.
    """
    order, relevant = np.argsort(index), np.concatenate(solution.truth)
    rows = order[np.minimum(np.searchsorted(index, relevant, sorter=order), len(index) - 1)]
    counts = np.array([len(ids) for ids in solution.truth])
    absent = np.flatnonzero(index[rows] != relevant)
    if len(absent):
        line = solution.lines[np.repeat(np.arange(len(counts)), counts)[absent[0]]]
        raise InputError(
            f"{solution.path}, line {line}: image {relevant[absent[0]].decode()} is not in {path} ({len(absent)} such "
            "images); use a list and a solution of the same version"
        )
    return np.split(rows, np.cumsum(counts))[:-1]


def _rows_of(labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Find all elements of `labels` that have one of the given values.

    Args:
        labels: (N,) labels in ascending order.
        wanted: (n,) values to find.

    Returns:
        The indices of these elements in `labels`, (n,) int64.
    """
    low, high = (np.searchsorted(labels, wanted, side=side) for side in ("left", "right"))
    return np.concatenate([np.empty(0, np.int64), *(np.arange(*ends) for ends in zip(low, high, strict=True))])


def _draw_queries(images: TrainList, seed: int) -> np.ndarray:
    """Choose one random image of each landmark in a list of N images. Return the mask of these images, (N,) bool."""
    counts = np.bincount(images.labels)
    rows = np.cumsum(counts) - counts + np.random.default_rng([seed, 1]).integers(counts)
    is_query = np.zeros(len(images), bool)
    is_query[rows] = True
    return is_query


def _write_split(path: Path, table: Path, images: TrainList, is_query: np.ndarray) -> None:
    """Write a CSV file that says which images are queries and which are in the database.

    If the file exists, check that it contains the same split instead.

    Args:
        path: file to write.
        table: training list, for messages.
        images: images of the held-out landmarks.
        is_query: (N,) bool mask of the queries.

    Raises:
        InputError: the existing file contains a different split.
    """
    columns = images.ids.tolist(), images.landmarks[images.labels].tolist(), is_query.tolist()
    lines = ["id,landmark_id,split"]
    lines += [f"{i.decode()},{n},{'query' if q else 'index'}" for i, n, q in zip(*columns, strict=True)]
    if path.is_file():
        if path.read_text(errors="replace").splitlines() != lines:
            raise InputError(
                f"{path}: expected the split of {table}, but one of these files has changed; remove {path.name} to "
                "write it again, or set another dataset.name"
            )
        return
    try:
        write_atomically(path, ("\n".join(lines) + "\n").encode())
    except InputError as error:
        log.warning("cannot write the file of the validation split, continuing without it: %s", error)


def query_landmarks(relevant: Sequence[np.ndarray]) -> list[int]:
    """Find out which queries show the same landmark, from the overlap of their relevant images.

    If the relevant images of two queries overlap enough, both queries show the same landmark. `group_by_landmark`
    defines "enough".

    Args:
        relevant: for each query, the ids of its relevant images, (n,) S16.

    Returns:
        For each query, the index of the first query that shows the same landmark.
    """
    _, numbers = np.unique(np.concatenate(relevant), return_inverse=True)
    ends = np.cumsum([len(ids) for ids in relevant])
    return group_by_landmark([ids.tolist() for ids in np.split(numbers, ends)[:-1]])
