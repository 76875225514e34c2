"""Every reranking by name, with the parameters it takes: those of shortlists, and those that search again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.errors import InputError
from superglobal.reranking.diffusion import diffuse
from superglobal.reranking.kreciprocal import kreciprocal
from superglobal.reranking.mutual import rerank_mutual
from superglobal.reranking.query_expansion import augment_database, expand_queries
from superglobal.reranking.superglobal import rerank
from superglobal.retrieval.rows import Rows
from superglobal.retrieval.search import search

_OF_SHORTLISTS: dict[str, Callable[..., tuple[np.ndarray, np.ndarray]]] = {
    "superglobal": rerank,
    "mutual": rerank_mutual,
    "kreciprocal": kreciprocal,
    "diffusion": diffuse,
}
_OF_VECTORS: dict[str, Callable[..., Any]] = {"aqe": expand_queries, "adba": augment_database}
SEARCH_AGAIN = tuple(_OF_VECTORS)
KINDS = (*_OF_SHORTLISTS, *_OF_VECTORS)
JUNK = ("keep", "drop")
_PLUMBING = ("Q", "X", "ids", "exclude", "backend", "device", "batch_size", "block_rows", "path")
_IN_MEMORY = 1 << 30  # bytes of an augmented database; a larger one is a file while the run lasts


def parameters(kind: str) -> dict[str, Any]:
    """What a kind of reranking takes, with its defaults.

    Raises InputError for a kind that does not exist.
    """
    if kind not in KINDS:
        raise InputError(f"rerank.kind={kind}: expected one of {', '.join(KINDS)}")
    signature = inspect.signature((_OF_SHORTLISTS | _OF_VECTORS)[kind])
    return {name: one.default for name, one in signature.parameters.items() if name not in _PLUMBING}


def completed(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a kind: what is given, and its defaults for what is not.

    Raises InputError for one that the kind does not take.
    """
    defaults = parameters(kind)
    for name, value in given.items():
        if name not in defaults:
            raise InputError(f"rerank.{name}={value}: {kind} has no {name}; it takes {', '.join(defaults)}")
    return defaults | dict(given)


def describe(settings: Mapping[str, Any]) -> str:
    """A `RerankConfig` as plain types in words: the kind and its parameters, or none."""
    if not settings["enabled"]:
        return "none"
    kind = settings.get("kind", "superglobal")
    # A table also has the runs that failed for it.
    defaults = parameters(kind) if kind in KINDS else {}
    # Words and switches are told where they are not what the kind is known for.
    told = {n: settings[n] for n, d in defaults.items() if settings.get(n) is not None}
    shown = {n: v for n, v in told.items() if not isinstance(v, str | bool) or v != defaults[n]}
    dropped = ["junk=drop"] if settings.get("junk") == "drop" else []
    return " ".join([kind, *(f"{n}={v}" for n, v in shown.items()), *dropped])


@dataclass(frozen=True)
class Reranked:
    """A ranking, scores (Q, k) and ids (Q, k), and what its exact ranks are counted with.

    Where a shortlist was reordered, `shortlist` is `ids` and the vectors are the first stage's; where vectors were
    changed and searched again, it is None and the vectors are the new ones.
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
    """Rerank, by any kind, what `search` found.

    values: as `completed` gives them. Q (Q, D), X: unit L2 norm. ids: (Q, k) of the first stage, which `exclude` was
    left out of. folder: for a database too large for memory; nothing stays there.
    """
    if kind in _OF_SHORTLISTS:
        scores, order = _OF_SHORTLISTS[kind](Q, X, ids, **values, device=device)
        return Reranked(scores, order, Q, X, order)
    if kind == "aqe":
        Q = expand_queries(Q, X, **values, exclude=exclude, backend=backend, device=device)
    else:
        X = _augmented(X, values, backend, device, folder)
    scores, order = search(Q, X, ids.shape[1], exclude=exclude, backend=backend, device=device)
    return Reranked(scores, order, Q, X, None)


def _augmented(X: Rows, values: Mapping[str, Any], backend: str, device: str, folder: Path | None) -> Rows:
    large = folder is not None and 4 * X.shape[0] * X.shape[1] > _IN_MEMORY
    path = folder / "augmented.npy" if folder is not None and large else None
    try:
        return augment_database(X, **values, path=path, backend=backend, device=device)
    finally:
        if path is not None:
            # The map keeps the file's contents until it is let go.
            path.unlink(missing_ok=True)
