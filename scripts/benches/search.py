"""Measure the time of exact search, and of computing the exact ranks of given images, in a million descriptors on disk.

Each time is compared with that of a baseline. The baseline reads the same descriptors, converts them to float32 and
multiplies them with the queries, but does not select any results.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benches.common import Measured
from superglobal.data.revisited import load_ground_truth
from superglobal.metrics.evaluate import evaluate
from superglobal.retrieval.ranks import exact_ranks, search_and_rank
from superglobal.retrieval.rows import copy_into
from superglobal.retrieval.search import search
from superglobal.retrieval.store import DescriptorStore

K, STEP = 400, 16384


def random_units(seed: int, rows: int, dim: int) -> np.ndarray:
    """Return random unit vectors, (rows, dim) float32. The same seed always gives the same vectors."""
    x = np.random.default_rng(seed).standard_normal((rows, dim), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def filled_store(folder: Path, rows: int, dim: int, dtype: str) -> DescriptorStore:
    """Return a descriptor store of random unit vectors.

    If `folder` already contains the store, only its missing rows are written.

    Args:
        folder: folder in which the store is created.
        rows: number of vectors.
        dim: number of dimensions.
        dtype: "float16" or "float32".
    """
    identity = {"made_by": "bench.py search"}
    path = folder / f"bench-{rows}x{dim}-{dtype}"
    store = DescriptorStore.open_or_create(path, identity, [f"{i:08d}.jpg" for i in range(rows)], dim, dtype=dtype)
    missing = store.missing
    for start in range(0, len(missing), STEP):
        ids = missing[start : start + STEP]
        store.write_rows(ids, random_units(int(ids[0]), len(ids), dim))
    store.flush()
    return store


def targets(n_queries: int, n_rows: int, ground_truth: str | None) -> Any:
    """Return the ground truth of each query: relevance ("easy", "hard" or "junk") -> database ids.

    Args:
        n_queries: number of queries.
        n_rows: number of database descriptors.
        ground_truth: file gnd_<name>.pkl to load; None for random ids, about as many as in ROxford5k.
    """
    if ground_truth is not None:
        return load_ground_truth(ground_truth).gnd[:n_queries]
    rng = np.random.default_rng(1)
    ids = [rng.choice(min(n_rows, 5000), 300, replace=False) for _ in range(n_queries)]
    return [{"easy": row[:50], "hard": row[50:100], "junk": row[100:]} for row in ids]


def bare(shards: list[np.ndarray], Q: np.ndarray, rows: int = 4096) -> float:
    """Run the baseline: read descriptors, convert them to float32, and multiply them with the queries.

    Args:
        shards: arrays of descriptors on disk, each (n, D).
        Q: (Q, D) float32 queries.
        rows: number of descriptors processed at a time.

    Returns:
        The sum of all inner products.
    """
    q, total = torch.from_numpy(Q), 0.0
    buffer = np.empty((rows, Q.shape[1]), np.float32)
    for shard in shards:
        for start in range(0, len(shard), rows):
            part = shard[start : start + rows]
            copy_into(part, buffer[: len(part)])
            total += float((q @ torch.from_numpy(buffer[: len(part)]).T).sum())
    return total


class Peak:
    """Context manager that measures how much the memory of this process grows. Memory-mapped files are not counted.

    The memory is sampled every 5 ms. The attribute `value` is the largest increase over the memory at the start of the
    `with` statement, in MB.
    """

    def __enter__(self) -> Peak:
        self._before, self.value, self._over = _anonymous(), 0.0, threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.value = max(self.value, _anonymous() - self._before)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()


def _anonymous() -> float:
    """Return the anonymous memory of this process in MB. It does not include the pages of memory-mapped files."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def main(argv: list[str]) -> list[Measured]:
    """Parse the arguments of the command line, run the benchmark, and return one row per variant of the search."""
    parser = argparse.ArgumentParser("bench.py search", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="number of database descriptors")
    parser.add_argument("--dim", type=int, default=2048, help="number of dimensions")
    parser.add_argument("--queries", type=int, default=70, help="number of queries")
    parser.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="data type of the stored descriptors"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder in which to keep the descriptors (4.1 GB by default); by default a temporary folder",
    )
    parser.add_argument(
        "--ground-truth",
        help="path of gnd_roxford5k.pkl, whose images are ranked; by default images are chosen at random",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="number of rounds; each round measures every variant, and medians are printed",
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        return run(args, args.folder or Path(temporary))


def run(args: argparse.Namespace, folder: Path) -> list[Measured]:
    """Write random descriptors to a store, and measure all variants of search and ranking on this store.

    The variants take turns, so that changes in the load of the machine affect all of them.

    Args:
        args: arguments of the command line.
        folder: folder in which the store is created.

    Returns:
        One row per variant.
    """
    filled_store(folder, args.rows, args.dim, args.dtype)
    Q = random_units(-1 % 2**32, args.queries, args.dim)
    gnd = targets(args.queries, args.rows, args.ground_truth)
    start = time.perf_counter()
    store = DescriptorStore.open(folder / f"bench-{args.rows}x{args.dim}-{args.dtype}")
    opened = time.perf_counter() - start
    ids = [np.concatenate([entry[name] for name in ("easy", "hard", "junk")]) for entry in gnd]
    shards = sorted(store.folder.glob("shard-*.npy"))
    size = sum(p.stat().st_size for p in shards) / 1e9
    print(
        f"{args.queries} queries, {args.rows} x {args.dim} {args.dtype} ({size:.1f} GB), "
        f"k={K}, {sum(map(len, ids))} targets; {torch.get_num_threads()} threads; opened in {1000 * opened:.1f} ms"
    )
    maps = [np.load(path, mmap_mode="r+") for path in shards]
    variants: dict[str, Callable[[], Any]] = {
        "read, convert and multiply only": lambda: bare(maps, Q),
        "search and ranks in one pass": lambda: search_and_rank(Q, store, K, ids, backend="torch"),
        "one pass, search with FAISS": lambda: search_and_rank(Q, store, K, ids, backend="faiss"),
        "search with FAISS, then ranks": lambda: (search(Q, store, K, backend="faiss"), exact_ranks(Q, store, ids)),
        "search only": lambda: search(Q, store, K, backend="torch"),
        "search only, with FAISS": lambda: search(Q, store, K, backend="faiss"),
        "exact ranks only": lambda: exact_ranks(Q, store, ids),
        "ranks and all metrics": lambda: evaluate(Q, store, gnd),
    }
    if importlib.util.find_spec("faiss") is None:
        variants = {name: run for name, run in variants.items() if "FAISS" not in name}
    bare(maps, Q)  # reads the files into the page cache, so that later runs do not wait for the disk
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    peaks = dict.fromkeys(variants, 0.0)
    for _ in range(args.repeats):
        for name, variant in variants.items():
            with Peak() as peak:
                start = time.perf_counter(), time.process_time()
                variant()
                seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
            peaks[name] = max(peaks[name], peak.value)
    base = [statistics.median(column) for column in zip(*next(iter(seconds.values())), strict=True)]
    rows: list[Measured] = []
    for name, values in seconds.items():
        # Other load on the machine increases the elapsed time, but hardly the processor time.
        wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        print(
            f"{name:32}{wall:8.2f} s{wall / base[0]:6.2f} x{cpu:8.2f} s of CPU{cpu / base[1]:6.2f} x"
            f"{peaks[name]:8.0f} MB anonymous"
        )
        row = {"variant": name, "seconds": wall, "ratio": wall / base[0], "megabytes": peaks[name]}
        rows.append(row | {"cpu_seconds": cpu, "cpu_ratio": cpu / base[1], "opened_seconds": opened})
    return rows
