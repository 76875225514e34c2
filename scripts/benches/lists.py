"""Measure the time to load training lists, and the memory that a worker process needs for a list.

The lists are generated with random ids. They are as large as the training lists of GLDv2.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benches.common import Measured, measured
from superglobal.data.gldv2 import TrainList, read_train
from superglobal.data.samplers import EpochBatches

LISTS = {"train.csv": (4_132_914, 203_094), "train_clean.csv": (1_580_470, 81_313)}  # numbers of images and landmarks
URL = "http://upload.wikimedia.org/wikipedia/commons/{:x}/Some_church_of_a_town,_seen_from_the_river.jpg"


def write_list(root: Path, table: str, images: int, landmarks: int) -> None:
    """Generate a training list with random ids, and write it in the format of GLDv2.

    The landmarks have between one and more than ten thousand images.

    Args:
        root: folder to write to.
        table: name of the file, a key of `LISTS`. It determines the format of the list.
        images: number of images.
        landmarks: number of landmarks.
    """
    rng = np.random.default_rng(0)
    share = 1 / (np.arange(landmarks) + 20) ** 0.8
    of = np.concatenate([np.arange(landmarks), rng.choice(landmarks, images - landmarks, p=share / share.sum())])
    ids = [value.tobytes().hex() for value in rng.integers(2**64, size=images, dtype=np.uint64)]
    with (root / table).open("w") as file:
        if table == "train.csv":
            file.write("id,url,landmark_id\n")
            file.writelines(f'{ids[i]},"{URL.format(i)}",{of[i]}\n' for i in rng.permutation(images).tolist())
            return
        file.write("landmark_id,images\n")
        order, ends = np.argsort(of, kind="stable"), np.cumsum(np.bincount(of))
        for landmark, rows in enumerate(np.split(order, ends[:-1])):
            file.write(f"{landmark},{' '.join(ids[i] for i in rows.tolist())}\n")


def straightforward_read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a training list with Python's csv module, without optimization.

    Returns:
        The ids, (N,) S16, and the landmarks, (N,) int64, both sorted by landmark and then by id.
    """
    csv.field_size_limit(2**31 - 1)
    with path.open(newline="") as file:
        pairs = []
        for row in csv.DictReader(file):
            names = row["images"].split() if "images" in row else [row["id"]]
            pairs += [(int(row["landmark_id"]), name) for name in names]
    pairs.sort()
    return np.array([name for _, name in pairs], "S16"), np.array([landmark for landmark, _ in pairs])


def _superglobal(root: Path, table: str) -> Callable[[], Any]:
    return lambda: len(read_train(root, table, min_images=1))


def _baseline(root: Path, table: str) -> Callable[[], Any]:
    return lambda: len(straightforward_read(root / table)[0])


def _private() -> float:
    """Return the memory, in MB, that this process does not share with other processes."""
    with open("/proc/self/smaps_rollup") as lines:
        return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def _work(images: TrainList | None, answers: Any) -> None:
    """Read one seventh of a training list, as one of seven workers does, and measure the memory of this process.

    Args:
        images: training list; None to measure the memory of a process without a list.
        answers: queue for the result, the memory of this process in MB.
    """
    for row in range(0 if images is None else len(images)):
        if row % 7 == 0:
            images.path(row), int(images.labels[row])
    answers.put(_private())


def _workers(root: Path, table: str) -> Callable[[], Any]:
    """Return a function that measures how much memory a training list adds to a worker process.

    The returned function starts a worker that reads the list and a worker that does not, and computes how much more
    memory the first one needs. It returns this difference in MB for each start method of multiprocessing, "fork" and
    "spawn".

    Args:
        root: folder that contains the list.
        table: file name of the list.
    """

    def run() -> dict[str, float]:
        images, added = read_train(root, table, min_images=1), {}
        for method in ("fork", "spawn"):
            context, values = multiprocessing.get_context(method), []
            for given in (None, images):
                answers = context.Queue()
                process = context.Process(target=_work, args=(given, answers))
                process.start()
                values.append(answers.get(timeout=300))
                process.join()
            added[method] = values[1] - values[0]
        return added

    return run


def main(argv: list[str]) -> list[Measured]:
    """Compare the time of `read_train` with that of `straightforward_read`, and return one row per list.

    Also measure the memory that a list adds to a worker process, and the time to draw the first batch of an epoch.
    """
    parser = argparse.ArgumentParser("bench.py lists", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="number of runs of read_train; the median is printed")
    parser.add_argument(
        "--share", type=float, default=1.0, help="size of the lists as a fraction of GLDv2, e.g. 0.01 for a quick test"
    )
    args = parser.parse_args(argv)
    rows: list[Measured] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for table, (images, landmarks) in LISTS.items():
            images, landmarks = int(images * args.share), int(landmarks * args.share)
            write_list(root, table, images, landmarks)
            print(f"{table}: {images} images of {landmarks} landmarks, {(root / table).stat().st_size / 1e6:.0f} MB")
            own, own_megabytes, count = measured(partial(_superglobal, root, table), args.repeats)
            assert count == images
            print(f"  {'read_train':32}{own:8.2f} s{1:8.1f} x{own_megabytes:8.0f} MB besides the imports")
            seconds, megabytes, _ = measured(partial(_baseline, root, table), 1)
            print(f"  {'csv module, Python lists':32}{seconds:8.2f} s{seconds / own:8.1f} x{megabytes:8.0f} MB")
            _, _, added = measured(partial(_workers, root, table), 1)
            print(
                "  additional memory of a worker: "
                + ", ".join(f"{value:.0f} MB ({name})" for name, value in added.items())
            )
            start = time.perf_counter()
            next(iter(EpochBatches(images, 256, 0)))
            drawn = time.perf_counter() - start
            print(f"  time to the first batch of an epoch: {drawn:.2f} s")
            row = {"list": table, "images": images, "landmarks": landmarks, "seconds": own, "megabytes": own_megabytes}
            row |= {"baseline_seconds": seconds, "baseline_megabytes": megabytes, "ratio": seconds / own}
            rows.append(row | {"worker_megabytes": added, "first_draw_seconds": drawn})
    return rows
