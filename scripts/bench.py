"""Benchmarks against a straightforward implementation, in the same run: python scripts/bench.py rerank

Each variant runs in a process of its own, in turn, so that peak memory is its own and other load on the machine
falls on all alike. Read the ratios; the seconds are those of this machine at this moment.
"""

import argparse
import multiprocessing
import queue
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

N_QUERIES, N_ROWS, DIM, DEPTH, K, BETA = 70, 4993, 2048, 400, 9, 0.15  # ROxford5k under the paper's settings


def clustered(n_queries: int = N_QUERIES, n_rows: int = N_ROWS, dim: int = DIM) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around a few hundred centres: queries (Q, D) and database (N, D), float32."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((300, dim), dtype=np.float32)
    x = centres[rng.integers(300, size=n_queries + n_rows)]
    x += rng.standard_normal(x.shape, dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x[:n_queries], x[n_queries:]


def straightforward_rerank(Q: np.ndarray, X: np.ndarray, ids: np.ndarray, chunk: int | None = None) -> np.ndarray:
    """Reranking as the formula is written, every refined descriptor made from its gathered (K+1, D) neighbours.

    `chunk`: queries at a time, all of them by default, as the reference does it.
    """
    orders = []
    for start in range(0, len(Q), chunk or len(Q)):
        part = slice(start, start + (chunk or len(Q)))
        q, T = torch.from_numpy(Q[part]), torch.from_numpy(X[ids[part]])
        values, near = torch.bmm(T, T.transpose(1, 2)).sort(dim=-1, descending=True)
        weights = values[..., : K + 1] * BETA
        weights[..., 0] = 1
        batch = torch.arange(len(q))[:, None, None]
        gathered = T[batch, near[..., : K + 1]]  # (Q, M, K+1, D)
        refined = (weights[..., None] * gathered).sum(dim=2) / weights.sum(dim=2)[..., None]
        s1 = (refined * q[:, None]).sum(dim=-1)
        best = s1.argsort(dim=1, descending=True)[:, : K + 1]
        expanded = refined[batch[..., 0], best].amax(dim=1)
        final = (s1 + (refined * expanded[:, None]).sum(dim=-1)) / 2
        orders.append(torch.from_numpy(ids[part]).gather(1, final.argsort(dim=1, descending=True)))
    return torch.cat(orders).numpy()


def _status(key: str) -> float:
    """A line of /proc/self/status in MB, e.g. VmRSS; elsewhere the peak so far."""
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _measure(make: Callable[[], Callable[[], Any]], repeats: int, answers: Any) -> None:
    """In a child: build inputs, run `repeats` times; sends (median seconds, MB above the inputs, result)."""
    run = make()
    before = _status("VmRSS")
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    answers.put((statistics.median(seconds), _status("VmHWM") - before, result))


def measured(make: Callable[[], Callable[[], Any]], repeats: int) -> tuple[float, float, Any]:
    """`_measure` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=_measure, args=(make, repeats, answers))
    process.start()
    while True:
        try:
            answer = answers.get(timeout=1)
            break
        except queue.Empty:
            if not process.is_alive():
                raise RuntimeError(f"the benchmark process ended with {process.exitcode}; out of memory?") from None
    process.join()
    return answer


def _inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    Q, X = clustered()
    return Q, X, np.argsort(-(Q @ X.T), axis=1)[:, :DEPTH].astype(np.int64)


def _ours() -> Callable[[], Any]:
    from superglobal.retrieval.rerank import rerank

    Q, X, ids = _inputs()
    return lambda: rerank(Q, X, ids, DEPTH, K, BETA)[1]


def _whole() -> Callable[[], Any]:
    Q, X, ids = _inputs()
    return lambda: straightforward_rerank(Q, X, ids)


def _chunked() -> Callable[[], Any]:
    Q, X, ids = _inputs()
    return lambda: straightforward_rerank(Q, X, ids, chunk=4)


def _gram() -> Callable[[], Any]:
    _, X, ids = _inputs()

    def run() -> None:
        for start in range(0, N_QUERIES, 14):
            T = torch.from_numpy(X[ids[start : start + 14]])
            torch.bmm(T, T.transpose(1, 2))

    return run


def bench_rerank(repeats: int) -> None:
    """superglobal.rerank against the straightforward forms, and against the Gram product of the shortlists alone."""
    variants = {
        "superglobal.rerank": (_ours, repeats),
        "Gram product alone (not a reranking)": (_gram, repeats),
        "straightforward, 4 queries at a time": (_chunked, 1),
        "straightforward, all queries at once": (_whole, 1),
    }
    print(f"{N_QUERIES} queries, {N_ROWS} x {DIM}, M={DEPTH}, K={K}; {torch.get_num_threads()} threads")
    results = {name: measured(*variant) for name, variant in variants.items()}
    own_seconds, _, own_order = results["superglobal.rerank"]
    for name, (seconds, megabytes, order) in results.items():
        same = "" if order is None else f"   same place: {(order == own_order).mean():.4%}"
        print(f"{name:38}{seconds:8.3f} s{seconds / own_seconds:8.1f} x{megabytes:8.0f} MB above inputs{same}")


def main() -> None:
    benchmarks = {"rerank": bench_rerank}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=benchmarks)
    parser.add_argument("--repeats", type=int, default=5, help="runs of the fast variants; the median is shown")
    arguments = parser.parse_args()
    benchmarks[arguments.benchmark](arguments.repeats)


if __name__ == "__main__":
    main()
