"""Compare `superglobal.rerank` with a direct implementation of its formula, and with a lower bound.

With --methods, compare all rerankers of shortlists with each other instead.

The lower bound is the time to compute only the inner products between the candidates of each query (their Gram matrix).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benches.common import Measured, measured

N_QUERIES, N_ROWS, DIM, DEPTH, K, BETA = 70, 4993, 2048, 400, 9, 0.15  # size of ROxford5k and settings of the paper


def clustered(n_queries: int = N_QUERIES, n_rows: int = N_ROWS, dim: int = DIM) -> tuple[np.ndarray, np.ndarray]:
    """Generate random unit vectors that form 300 clusters.

    Args:
        n_queries: number Q of queries.
        n_rows: number N of database vectors.
        dim: number D of dimensions.

    Returns:
        The queries, (Q, D) float32, and the database, (N, D) float32.
    """
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((300, dim), dtype=np.float32)
    x = centers[rng.integers(300, size=n_queries + n_rows)]
    x += rng.standard_normal(x.shape, dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x[:n_queries], x[n_queries:]


def straightforward_rerank(Q: np.ndarray, X: np.ndarray, ids: np.ndarray, chunk: int | None = None) -> np.ndarray:
    """Rerank with a direct implementation of SuperGlobal's formula.

    This implementation copies the descriptors of the K+1 nearest neighbors of every candidate, which takes much memory.

    Args:
        Q: (Q, D) float32 query descriptors.
        X: (N, D) float32 database descriptors.
        ids: (Q, M) int64 database ids of the candidates, best first.
        chunk: number of queries processed at a time; None for all queries, as in the authors' code.

    Returns:
        (Q, M) int64 ids of the candidates in their new order.
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


def _inputs(n_rows: int = N_ROWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Generate the inputs of reranking.

    Args:
        n_rows: number N of database vectors.

    Returns:
        The queries, (Q, D) float32, the database, (N, D) float32, and the ids of the `DEPTH` database vectors nearest
        to each query, (Q, DEPTH) int64.
    """
    Q, X = clustered(n_rows=n_rows)
    return Q, X, np.argsort(-(Q @ X.T), axis=1)[:, :DEPTH].astype(np.int64)


def _method(name: str = "superglobal", n_rows: int = N_ROWS) -> Callable[[], Any]:
    from superglobal.reranking.registry import rerank

    Q, X, ids = _inputs(n_rows)
    return lambda: rerank(Q, X, ids, DEPTH, method=name)[1]


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


def main(argv: list[str]) -> list[Measured]:
    """Measure the time and the memory of each variant of reranking, and return one row per variant.

    A row also contains the fraction of all ranks at which the variant returns the same id as `superglobal.rerank`.
    """
    parser = argparse.ArgumentParser("bench.py rerank", description=__doc__)
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="number of rounds; each round measures every variant, and medians are printed",
    )
    parser.add_argument("--methods", action="store_true", help="compare all rerankers of shortlists")
    parser.add_argument("--rows", type=int, default=N_ROWS, help="size of the database with --methods")
    args = parser.parse_args(argv)
    variants: dict[str, tuple[Callable[[], Callable[[], Any]], int]] = {
        # The fast variants run three times per round, because the first run in a process is slower.
        "superglobal.rerank": (_method, 3),
        "Gram product alone (not a reranking)": (_gram, 3),
        "straightforward, 4 queries at a time": (_chunked, 1),
        "straightforward, all queries at once": (_whole, 1),
    }
    if args.methods:
        from superglobal.reranking.registry import RERANKERS

        names = [name for name, reranker in RERANKERS.items() if reranker.searches_again is None]
        variants = {name: (partial(_method, name, args.rows), 3) for name in names}
    n_rows = args.rows if args.methods else N_ROWS
    print(f"{N_QUERIES} queries, {n_rows} x {DIM}, M={DEPTH}, K={K}; {torch.get_num_threads()} threads")
    turns = [{name: measured(*variant) for name, variant in variants.items()} for _ in range(args.repeats)]
    results = {
        name: (
            statistics.median(turn[name][0] for turn in turns),
            max(turn[name][1] for turn in turns),
            turns[0][name][2],
        )
        for name in variants
    }
    own_seconds, _, own_order = next(iter(results.values()))
    rows: list[Measured] = []
    for name, (seconds, megabytes, order) in results.items():
        agreed = None if order is None else float((order == own_order).mean())
        same = "" if agreed is None else f"   same ranks: {agreed:.4%}"
        print(f"{name:38}{seconds:8.3f} s{seconds / own_seconds:8.1f} x{megabytes:8.0f} MB besides inputs{same}")
        row = {"variant": name, "seconds": seconds, "ratio": seconds / own_seconds, "megabytes": megabytes}
        rows.append(row | {"same_place": agreed})
    return rows
