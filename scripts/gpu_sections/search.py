"""Measure the time of exact search, of computing the exact ranks of given images, and of reranking.

Search and ranks are measured over a million descriptors. The ids and the ranks are also compared with those of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from benches.rerank import BETA, K, clustered
from benches.search import random_units, targets

from gpu_sections.common import Report, Skip, differences
from superglobal.reranking.registry import rerank
from superglobal.retrieval.ranks import search_and_rank
from superglobal.retrieval.search import search
from superglobal.retrieval.store import DescriptorStore
from superglobal.utils.precision import full_precision

DEPTH, BLOCK = 400, 65536


def main(report: Report) -> None:
    """Measure search over random unit vectors, and then the reranking of shortlists."""
    report.run("a million rows", lambda: _million(report), need=20)
    report.run("reranking", lambda: _reranking(report), need=10)


def _million(report: Report) -> None:
    """Measure search and exact ranks over a million descriptors, and check the results.

    The measurement is made twice: with the descriptors in device memory, and with the descriptors in a descriptor store
    on disk. In both cases, the ids and the ranks must equal those that the CPU computes.
    """
    rows, dim, queries = report.pick((1_000_000, 2048, 70), (1_000_000, 2048, 70), (20_000, 64, 10))
    Q = random_units(1, queries, dim)
    X = _rows(report, rows, dim)
    gnd = targets(queries, rows, None)
    ids = [np.concatenate([entry[name] for name in ("easy", "hard", "junk")]) for entry in gnd]
    what = f"{rows:,} x {dim} float16, {queries} queries"
    results: dict[str, Any] = {}
    base = _bare(report, what, Q, X)

    def measure(name: str, function: Callable[[], Any]) -> None:
        results[name] = function()
        seconds = report.seconds(function, report.pick(5, 3, 1), 0)
        report.add(f"{what}: {name}", seconds, "s", ratio=seconds / base, baseline="only the product")

    on_device = {
        "plain chunked topk in torch, rows on the device (near ties not resolved)": partial(
            _chunked_topk, report, Q, X
        ),
        "search, rows on the device": partial(search, Q, X, DEPTH, device=report.device),
        "search and exact ranks, rows on the device": partial(search_and_rank, Q, X, DEPTH, ids, device=report.device),
        "search, one query, rows on the device": partial(search, Q[:1], X, DEPTH, device=report.device),
    }
    for name, function in on_device.items():
        report.run(name, partial(measure, name, function))
    report.run("FAISS", lambda: _faiss(report, X, Q))
    store = _store(report, X)
    in_store = {
        "search, rows in a store": partial(search, Q, store, DEPTH, device=report.device),
        "search and exact ranks, rows in a store": partial(search_and_rank, Q, store, DEPTH, ids, device=report.device),
        "search and exact ranks on the CPU": partial(search_and_rank, Q, store, DEPTH, ids),
    }
    for name, function in in_store.items():
        report.run(name, partial(measure, name, function), need=8 if "CPU" in name else 0)
    for name, result in results.items():
        if name.startswith("search and exact ranks, ") and "search and exact ranks on the CPU" in results:
            different = differences(results["search and exact ranks on the CPU"], result)
            text = f"{name}: ids and ranks that differ from those of the CPU"
            report.add(text, different, passed=different == 0, expected="0")


def _rows(report: Report, rows: int, dim: int) -> torch.Tensor:
    """Return random unit vectors on the device, (rows, dim) float16."""
    generator = torch.Generator(report.device).manual_seed(0)
    X = torch.empty(rows, dim, dtype=torch.float16, device=report.device)
    for start in range(0, rows, BLOCK):
        block = torch.randn(min(BLOCK, rows - start), dim, device=report.device, generator=generator)
        X[start : start + len(block)] = torch.nn.functional.normalize(block).half()
    return X


def _store(report: Report, X: torch.Tensor) -> DescriptorStore:
    """Write descriptors to a new descriptor store in float16, and return the store."""
    lines = [f"{i:08d}.jpg" for i in range(len(X))]
    path = report.work / "million"
    store = DescriptorStore.open_or_create(path, {"made_by": "gpu_report"}, lines, X.shape[1], dtype="float16")
    for start in range(0, len(X), BLOCK):
        block = X[start : start + BLOCK].cpu().numpy()
        store.copy_rows(np.arange(start, start + len(block)), block)
    store.flush()
    return DescriptorStore.open(path)


def _bare(report: Report, what: str, Q: np.ndarray, X: torch.Tensor) -> float:
    """Measure how long it takes to multiply all database descriptors with the queries, without selecting results.

    Args:
        report: report of the section.
        what: description of the inputs, put at the start of the row's name.
        Q: (Q, D) float32 queries.
        X: (N, D) float16 database descriptors on the device.

    Returns:
        The time in seconds.
    """
    q = torch.from_numpy(Q).to(X.device)

    def run() -> float:
        with full_precision():
            parts = [(q @ X[start : start + BLOCK].float().T).sum() for start in range(0, len(X), BLOCK)]
        return float(torch.stack(parts).sum())

    seconds = report.seconds(run, report.pick(5, 3, 1), 1)
    report.add(f"{what}: bare product, rows on the device", seconds, "s")
    return seconds


def _chunked_topk(report: Report, Q: np.ndarray, X: torch.Tensor) -> np.ndarray:
    """Search with a simple loop over the database, which keeps the best scores of each query with `torch.topk`.

    Args:
        report: not used.
        Q: (Q, D) float32 queries.
        X: (N, D) float16 database descriptors on the device.

    Returns:
        The ids of the `DEPTH` best rows of each query, (Q, DEPTH) int64.
    """
    q = torch.from_numpy(Q).to(X.device)
    best = torch.full((len(q), DEPTH), -2.0, device=q.device)
    places = torch.zeros(len(q), DEPTH, dtype=torch.int64, device=q.device)
    with full_precision():
        for start in range(0, len(X), BLOCK):
            scores = torch.cat([best, q @ X[start : start + BLOCK].float().T], dim=1)
            best, order = scores.topk(DEPTH, dim=1)
            new = torch.arange(start, start + scores.shape[1] - DEPTH, device=q.device).expand(len(q), -1)
            places = torch.cat([places, new], dim=1).gather(1, order)
    return places.cpu().numpy()


def _faiss(report: Report, X: torch.Tensor, Q: np.ndarray) -> None:
    """Measure exact search with FAISS, and check that `search` returns the same ids with FAISS as with torch.

    Args:
        report: report of the section.
        X: (N, D) float16 database descriptors on the device. FAISS uses the same device.
        Q: (Q, D) float32 queries.
    """
    try:
        import faiss
    except ImportError:
        raise Skip("faiss is not installed") from None
    if report.cuda and not hasattr(faiss, "StandardGpuResources"):
        raise Skip("this faiss has no GPU support")
    if not report.cuda:
        rows = X.float().numpy()
        seconds = report.seconds(lambda: faiss.knn(Q, rows, DEPTH, metric=faiss.METRIC_INNER_PRODUCT), 1, 0)
    else:
        resources = faiss.StandardGpuResources()
        options = faiss.GpuIndexFlatConfig()
        options.useFloat16 = True
        index = faiss.GpuIndexFlatIP(resources, X.shape[1], options)
        for start in range(0, len(X), 65536):
            index.add(X[start : start + 65536].float().cpu().numpy())
        seconds = report.seconds(lambda: index.search(Q, DEPTH), 3, 1)
    report.add(f"{len(X):,} x {X.shape[1]}, {len(Q)} queries: FAISS flat", seconds, "s")
    ids, expected = (search(Q, X, DEPTH, backend=name, device=X.device)[1] for name in ("faiss", "torch"))
    different = int((ids != expected).sum())
    report.add("search with FAISS: ids that differ from those of torch", different, passed=different == 0, expected="0")


def _plain_rerank(Q: torch.Tensor, X: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Rerank with a direct implementation of SuperGlobal's formula in torch, 16 queries at a time.

    Args:
        Q: (Q, D) float32 query descriptors.
        X: (N, D) database descriptors.
        ids: (Q, M) int64 database ids of the candidates, best first.

    Returns:
        (Q, M) int64 ids of the candidates in their new order.
    """
    orders = []
    for start in range(0, len(Q), 16):
        q, own = Q[start : start + 16], ids[start : start + 16]
        T = X[own].float()
        values, near = torch.bmm(T, T.transpose(1, 2)).topk(K + 1, dim=-1)
        weights = values * BETA
        weights[..., 0] = 1
        batch = torch.arange(len(q), device=q.device)[:, None, None]
        refined = (weights[..., None] * T[batch, near]).sum(dim=2) / weights.sum(dim=2)[..., None]
        s1 = (refined * q[:, None]).sum(dim=-1)
        best = s1.topk(K + 1, dim=1).indices
        expanded = refined[batch[..., 0], best].amax(dim=1)
        final = (s1 + (refined * expanded[:, None]).sum(dim=-1)) / 2
        orders.append(own.gather(1, final.argsort(dim=1, descending=True)))
    return torch.cat(orders)


def _reranking(report: Report) -> None:
    """Measure the time of reranking per query, for 1, 70 and 1,000 queries with 400 candidates each."""
    rows, dim, depth = report.pick((20_000, 2048, DEPTH), (20_000, 2048, DEPTH), (1_000, 64, 50))
    counts = report.pick((1, 70, 1000), (1, 70, 1000), (1, 10))
    Q, X = clustered(max(counts), rows, dim)
    ids = search(Q, X, depth, device=report.device)[1]
    half = X.astype(np.float16)
    X_device, Q_device, ids_device = (torch.from_numpy(a).to(report.device) for a in (half, Q, ids))
    for count in counts:
        plain = report.seconds(lambda count=count: _plain_rerank(Q_device[:count], X_device, ids_device[:count]), 3, 1)  # type: ignore[misc]
        name = f"reranking, M={depth}, {count} queries"
        report.add(f"{name}: formula in plain torch, rows on the device", 1e3 * plain / count, "ms per query")
        for title, database in {"rows on the device": X_device, "rows in memory": half}.items():
            run = partial(rerank, Q[:count], database, ids[:count], depth, device=report.device)
            seconds = report.seconds(run, 3, 1)
            more: dict[str, Any] = {"ratio": seconds / plain, "baseline": "plain torch"}
            report.add(f"{name}: superglobal, {title}", 1e3 * seconds / count, "ms per query", **more)
    count = min(70, len(Q))
    cpu = report.seconds(lambda: rerank(Q[:count], half, ids[:count], depth), 1, 0)
    name = f"reranking, M={depth}, {count} queries: superglobal on the CPU"
    report.add(name, 1e3 * cpu / count, "ms per query")
