"""Rerank shortlists with a method that is chosen by name.

The available methods are those in the modules of this folder, and functions that you registered with
`register_reranker`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import superglobal.reranking
from superglobal.errors import InputError, one_of
from superglobal.reranking.base import RERANKERS, Reranker, score_batch
from superglobal.retrieval.rows import Rows, as_queries, as_rows, as_shortlists
from superglobal.retrieval.search import search

__all__ = ["RERANKERS", "Reranked", "apply_reranker", "get_reranker", "rerank", "rerank_candidates", "rerank_label"]
_IN_MEMORY = 1 << 30  # largest augmented database, in bytes, that is kept in memory instead of a temporary file

for _module in pkgutil.iter_modules(superglobal.reranking.__path__):
    if _module.name != "registry":
        importlib.import_module(f"superglobal.reranking.{_module.name}")
# Help texts and messages list SuperGlobal's reranker first, then the others by module name. Without sorting, the order
# would be that of the imports.
_in_order = sorted(RERANKERS.values(), key=lambda r: (r.name != "superglobal", r.function.__module__))
RERANKERS.clear()
RERANKERS.update({reranker.name: reranker for reranker in _in_order})


def get_reranker(name: str, label: str = "rerank.kind") -> Reranker:
    """Return the reranker with this name.

    Args:
        name: name of the reranker.
        label: setting or argument that contains the name, for the error message.

    Raises:
        InputError: there is no such reranker; the message lists the choices.
    """
    if name not in RERANKERS:
        raise InputError(f"{label}={name}: expected {one_of(name, RERANKERS)}")
    return RERANKERS[name]


def _shortlist_reranker(name: str) -> Reranker:
    """Return the reranker of this name. Raises InputError if this reranker searches the database again."""
    reranker = get_reranker(name, "method")
    if reranker.searches_again is not None:
        raise InputError(
            f"method={name}: this method searches again instead of reordering a shortlist; call "
            f"{reranker.function.__name__}, then superglobal.search"
        )
    return reranker


def rerank(
    Q: Any,
    X: Any,
    ids: Any,
    M: int | None = None,
    K: int | None = None,
    beta: float | None = None,
    *,
    method: str = "superglobal",
    device: str | torch.device | None = None,
    batch_size: int = 16,
    **parameters: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Rerank the first min(M, k) images of each shortlist. All other images follow in unchanged order, with score -inf.

    "superglobal" is the method of the paper (section 3) as implemented in its reference code (modules/reranking).
    The files in `conf/rerank` cite the sources of the other methods.

    Args:
        Q: (Q, D) queries, unit L2 norm.
        X: (N, D) database, unit L2 norm: an array, a memory map, a tensor or a `DescriptorStore`.
        ids: (Q, k) integers, best first, as `search` returns them.
        M: number of images that are reranked, >= 1; 400 by default.
        K: for "superglobal" and "mutual", the number of neighbors that refine a descriptor, >= 1; 9 and 5 by default.
        beta: for "superglobal" and "mutual", the weight of a neighbor per unit of similarity; 0.15 and 0.3 by default.
        method: "superglobal", "mutual", "kreciprocal", "gnn", "auto", "diffusion", or the name of your own reranker.
        device: device to compute on; the CPU by default.
        batch_size: number of shortlists that are processed at a time. A batch takes a few times the memory of a tensor
            (batch_size, M, D + M), float64 for "diffusion", else float32.
        parameters: other parameters of the method; omitted ones have their defaults.

    Returns:
        Scores (Q, k) float32 and ids (Q, k) int64, best first. Among equal scores, the lower id is first;
        "kreciprocal", "gnn", "auto" and "diffusion" keep the order of the shortlist instead.

    Raises:
        InputError: the method or a parameter is unknown, a value is out of range, an id is repeated or outside 0..N-1,
            or a descriptor is invalid.
    """
    reranker = _shortlist_reranker(method)
    given = {name: value for name, value in (("M", M), ("K", K), ("beta", beta)) if value is not None}
    values = reranker.complete({**given, **parameters})
    rows = as_rows(X, "database")
    queries = as_queries(Q, rows.dim)
    shortlist = as_shortlists(ids, len(queries), len(rows))
    skipped = shortlist[np.isin(shortlist, rows.skipped)]
    if skipped.size:
        raise InputError(f"ids: row {skipped[0]} was skipped during extraction; remove it from the shortlist")
    head = shortlist[:, : values["M"]]
    target = _indexed(device)

    def vectors(batch: slice) -> torch.Tensor:
        return rows.take_on(head[batch], target)

    final = _score(reranker, values, queries, vectors, head, "database row", batch_size)
    second_key = head if reranker.ties == "id" else np.broadcast_to(np.arange(head.shape[1]), head.shape)
    order = np.lexsort((second_key, -final), axis=1)
    scores = np.full(shortlist.shape, -np.inf, np.float32)
    scores[:, : head.shape[1]] = np.take_along_axis(final, order, axis=1)
    tail = shortlist[:, head.shape[1] :]
    return scores, np.concatenate([np.take_along_axis(head, order, axis=1), tail], axis=1)


def rerank_candidates(
    Q: Any,
    candidates: Any,
    K: int | None = None,
    beta: float | None = None,
    *,
    method: str = "superglobal",
    device: str | torch.device | None = None,
    batch_size: int = 16,
    **parameters: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Rerank candidates that are given as vectors, such as the results of a vector database.

    Args:
        Q: (Q, D) queries, or (D,) for a single query, unit L2 norm.
        candidates: (Q, M, D) candidates of each query, or (M, D) for a single query, best first, unit L2 norm.
        K: for "superglobal" and "mutual", the number of neighbors that refine a descriptor, >= 1; 9 and 5 by default.
        beta: for "superglobal" and "mutual", the weight of a neighbor per unit of similarity; 0.15 and 0.3 by default.
        method: "superglobal", "mutual", "kreciprocal", "gnn", "auto", "diffusion", or the name of your own reranker.
        device: device to compute on; the CPU by default.
        batch_size: number of queries whose candidates are processed at a time.
        parameters: other parameters of the method; omitted ones have their defaults.

    Returns:
        Scores (Q, M) float32, best first, and the positions (Q, M) int64 of the reranked images in `candidates`. Among
        equal scores, the lower position is first. For a single query, both have shape (M,).

    Raises:
        InputError: the method or a parameter is unknown, a value is out of range, a shape is wrong, or a vector is not
            finite or not of unit norm.
    """
    reranker = _shortlist_reranker(method)
    if "M" in parameters:
        raise InputError(f"M={parameters['M']}: all candidates are reranked; pass the first M of them instead")
    given = {name: value for name, value in (("K", K), ("beta", beta)) if value is not None}
    values = reranker.complete({**given, **parameters})
    Q, vectors = _as_array(Q, "Q"), _as_array(candidates, "candidates")
    single = Q.ndim == 1
    if vectors.ndim != 3 - single or 0 in vectors.shape:
        raise InputError(
            f"candidates: expected (Q, M, D) for queries (Q, D), or (M, D) for one query (D,), got shape "
            f"{tuple(vectors.shape)} for queries {tuple(np.shape(Q))}"
        )
    n_queries, depth = (1, len(vectors)) if single else vectors.shape[:2]
    flat = as_rows(vectors.reshape(n_queries * depth, -1), "candidates")
    queries = as_queries(Q[None] if single else Q, flat.dim)
    if len(queries) != n_queries:
        raise InputError(f"candidates: expected the candidates of {len(queries)} queries, got {n_queries}")
    target = _indexed(device)

    def shortlists(batch: slice) -> torch.Tensor:
        return flat.block_on(batch.start * depth, batch.stop * depth, target).view(-1, depth, flat.dim)

    numbers = np.tile(np.arange(depth), (n_queries, 1))
    final = _score(reranker, values, queries, shortlists, numbers, "candidate", batch_size)
    order = np.argsort(-final, axis=1, kind="stable")
    scores = np.take_along_axis(final, order, axis=1)
    return (scores[0], order[0]) if single else (scores, order)


def _as_array(values: Any, name: str) -> np.ndarray | torch.Tensor:
    """Convert nested lists to a float32 array; return arrays and tensors unchanged.

    Args:
        values: vectors.
        name: name of the argument that contains the vectors, for the error message.

    Raises:
        InputError: the vectors have different lengths or contain values that are not numbers.
    """
    if isinstance(values, np.ndarray | torch.Tensor):
        return values
    try:
        return np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: expected vectors of one length ({error})") from error


def _score(
    reranker: Reranker,
    values: Mapping[str, Any],
    queries: np.ndarray,
    vectors: Callable[[slice], torch.Tensor],
    numbers: np.ndarray,
    name: str,
    batch_size: Any,
) -> np.ndarray:
    """Score the shortlists of all queries, batch by batch.

    Args:
        reranker: reranker that scores shortlists.
        values: values of the reranker's parameters by name.
        queries: (Q, D) queries.
        vectors: function that takes a slice of the query indices, and returns the descriptors (B, M, D) of the
            shortlists of these queries.
        numbers: (Q, M) ids of the descriptors in the shortlists, for error messages.
        name: what error messages call a descriptor of a shortlist, such as "database row".
        batch_size: number of shortlists per batch.

    Returns:
        Scores (Q, M) float32.
    """
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise InputError(f"batch_size={batch_size}: expected an integer >= 1")
    batches = (slice(start, start + batch_size) for start in range(0, len(queries), batch_size))
    scores = [score_batch(reranker, values, queries[b], vectors(b), numbers[b], name) for b in batches]
    return np.concatenate(scores)


def _indexed(device: str | torch.device | None) -> torch.device:
    """Return the device with its index, such as "cuda:0" for "cuda"; the CPU for None.

    The result can be compared with the `device` of a tensor, which always has an index on CUDA.
    """
    return torch.empty(0, device=device or "cpu").device


def rerank_label(settings: Mapping[str, Any]) -> str:
    """Return a short text for a table: the kind of reranker and its parameters, or "none" without reranking.

    Args:
        settings: a `RerankConfig` as a dict.
    """
    if not settings["enabled"]:
        return "none"
    kind = settings.get("kind", "superglobal")
    # The kind may be unknown, because tables also list runs that failed for this reason.
    declared = RERANKERS[kind].parameters if kind in RERANKERS else {}
    words = [kind]
    for name, parameter in declared.items():
        value = settings.get(name)
        # A string or boolean is shown only if it differs from the parameter's default.
        if value is not None and not (isinstance(value, str | bool) and value == parameter.default):
            words.append(f"{name}={value}")
    return " ".join([*words, "junk=drop"] if settings.get("junk") == "drop" else words)


@dataclass(frozen=True)
class Reranked:
    """Result of reranking, with the descriptors that are needed to compute the exact ranks of images not in `ids`.

    Attributes:
        scores, ids: (Q, k) scores and database rows, best first.
        queries, database: the original descriptors if the shortlists were reordered; the descriptors of the second
            search if the database was searched again.
        shortlist: `ids` if the shortlists were reordered; None if the database was searched again.
    """

    scores: np.ndarray
    ids: np.ndarray
    queries: np.ndarray
    database: Rows
    shortlist: np.ndarray | None


def apply_reranker(
    kind: str,
    values: Mapping[str, Any],
    Q: np.ndarray,
    X: Rows,
    ids: np.ndarray,
    *,
    exclude: np.ndarray | None = None,
    backend: str = "auto",
    device: str = "cpu",
    folder: Path | None = None,
) -> Reranked:
    """Rerank the result of `search` by any kind of reranker, including those that search again.

    Args:
        kind: name of the reranker.
        values: values of the reranker's parameters by name; missing parameters have their defaults.
        Q: (Q, D) queries, unit L2 norm.
        X: (N, D) database, unit L2 norm.
        ids: (Q, k) results of `search`.
        exclude: (Q,) ids, one per query, that the search excluded.
        backend: backend of a second search.
        device: device to compute on.
        folder: folder for a temporary file if the augmented database is larger than 1 GiB; None keeps it in memory.
    """
    reranker = get_reranker(kind)
    if reranker.searches_again is None:
        scores, order = rerank(Q, X, ids, method=kind, device=device, **values)
        return Reranked(scores, order, Q, X, order)
    values = reranker.complete(values)
    if reranker.searches_again == "queries":
        Q = reranker.function(Q, X, **values, exclude=exclude, backend=backend, device=device)
    else:
        large = folder is not None and 4 * X.shape[0] * X.shape[1] > _IN_MEMORY
        path = folder / "augmented.npy" if folder is not None and large else None
        try:
            X = reranker.function(X, **values, path=path, backend=backend, device=device)
        finally:
            if path is not None:
                # The memory map stays valid after the file is deleted.
                path.unlink(missing_ok=True)
    scores, order = search(Q, X, ids.shape[1], exclude=exclude, backend=backend, device=device)
    return Reranked(scores, order, Q, X, None)
