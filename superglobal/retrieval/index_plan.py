"""What an index by FAISS will be: its settings and their defaults, its memory, and about how long it takes to build.

Defaults follow FAISS's wiki, "Guidelines to choose an index" (github.com/facebookresearch/faiss/wiki): 4 sqrt(N) lists
up to a million rows, then 65536, 262144 and 1048576 with an HNSW over their centroids; 30 to 256 training rows a list;
HNSW with 32 links. What they leave open is said at `with_defaults`.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from superglobal.errors import InputError
from superglobal.retrieval.vectors import block_size

TAKEN = {
    "flat_fp16": ("candidates",),
    "ivf_flat": ("nlist", "nprobe", "candidates"),
    "ivf_pq": ("nlist", "nprobe", "pq_m", "candidates"),
    "hnsw": ("M", "ef_construction", "ef_search", "candidates"),
}
"""The settings that each kind takes."""
KINDS = tuple(TAKEN)
_TRAINED_ROWS = 40  # per list; FAISS warns under 39
_ITERATIONS, _PQ_ROWS = 10, 65536  # of FAISS's own training
_PQ_SAMPLE = 10_000
SEED = 1234


@dataclass(frozen=True)
class IndexSettings:
    """How an index is built (kind, nlist, pq_m, M, ef_construction) and searched; None for the default by N.

    Args:
        kind: "flat_fp16" (every row, rounded), "ivf_flat" (rows in nlist lists), "ivf_pq" (the same, each row in pq_m
            bytes) or "hnsw" (a graph, on the CPU).
        nlist, nprobe: lists, and how many of them are searched.
        pq_m: bytes a row of ivf_pq; divides D.
        M, ef_construction, ef_search: links of a row of hnsw, and the width of its searches.
        candidates: rows fetched for each one wanted, to be scored exactly.
    """

    kind: str
    nlist: int | None = None
    nprobe: int | None = None
    pq_m: int | None = None
    M: int | None = None
    ef_construction: int | None = None
    ef_search: int | None = None
    candidates: int | None = None


def with_defaults(settings: IndexSettings, n_rows: int, dim: int) -> IndexSettings:
    """Every setting that the kind has, filled in; the others None.

    Of our own choice: nprobe is 1/32 of the lists and at least 8; a row has at most 64 bytes of PQ and candidates are
    four times as many there; ef_construction is FAISS's 40 and ef_search 256.

    Raises:
        InputError: settings that the kind does not take, or that do not fit N or D.
    """
    kind = settings.kind
    if kind not in KINDS:
        raise InputError(f"index.kind={kind}: expected one of flat, {', '.join(KINDS)}")
    given = settings_in_use(settings)
    require_taken(kind, given, ("kind", *TAKEN[kind]))
    for name in given.keys() - {"kind"}:
        least = 2 if name == "M" else 1  # FAISS ends the process for a graph of one link
        if given[name] < least:
            raise InputError(f"index.{name}={given[name]}: expected at least {least}")
    found: dict[str, Any] = {"candidates": settings.candidates or (4 if kind == "ivf_pq" else 1)}
    if kind.startswith("ivf"):
        nlist = settings.nlist or max(1, min(_lists(n_rows), n_rows // _TRAINED_ROWS))
        found |= {"nlist": nlist, "nprobe": min(nlist, settings.nprobe or max(8, nlist // 32))}
        if nlist > n_rows:
            raise InputError(f"index.nlist={nlist}: more lists than the {n_rows} rows; leave it out for the default")
    if kind == "ivf_pq":
        found["pq_m"] = settings.pq_m or max(m for m in range(1, min(64, dim) + 1) if dim % m == 0)
        if dim % found["pq_m"]:
            raise InputError(f"index.pq_m={found['pq_m']}: descriptors of {dim} dimensions cannot be cut in so many")
        if n_rows < 256:
            raise InputError(f"index=ivf_pq: PQ is trained on at least 256 rows, there are {n_rows}; use index=flat")
    if kind == "hnsw":
        found["M"] = settings.M or 32
        found["ef_construction"], found["ef_search"] = settings.ef_construction or 40, settings.ef_search or 256
    return IndexSettings(kind, **found)


def require_taken(kind: str, given: Mapping[str, Any], taken: Sequence[str]) -> None:
    """Raise InputError for a setting that is given and not among those taken."""
    for name, value in given.items():
        if name not in taken:
            takes = ", ".join(one for one in taken if one != "kind")
            raise InputError(f"index.{name}={value}: {kind} has no {name}; it takes {takes}")


def _lists(n_rows: int) -> int:
    if n_rows <= 10**6:
        return round(4 * math.sqrt(n_rows))
    return 2**16 if n_rows <= 10**7 else 2**18 if n_rows <= 10**8 else 2**20


def factory(s: IndexSettings) -> str:
    """What FAISS's index_factory calls it; np spares PQ a training for Hamming distances, which are not used here."""
    if s.kind == "flat_fp16":
        return "SQfp16"
    if s.kind == "hnsw":
        return f"HNSW{s.M}"
    assert s.nlist is not None
    over = "_HNSW32" if s.nlist >= 2**16 else ""
    return f"IVF{s.nlist}{over},{'Flat' if s.kind == 'ivf_flat' else f'PQ{s.pq_m}np'}"


def memory(s: IndexSettings, n_rows: int, dim: int) -> tuple[int, int]:
    """Bytes of the index, and those beside it while it is built (training rows or a block)."""
    block = block_size(65536, 1, dim) * dim * 4
    if s.kind == "flat_fp16":
        return 2 * n_rows * dim, block
    if s.kind == "hnsw":
        assert s.M is not None
        return n_rows * (4 * dim + 8 * s.M), block
    assert s.nlist is not None
    row = 4 * dim if s.kind == "ivf_flat" else int(s.pq_m or 0)
    books = 0 if s.kind == "ivf_flat" else 256 * dim * 4
    return n_rows * (row + 8) + s.nlist * dim * 4 + books, max(block, training_rows(s, n_rows) * dim * 4)


def training_rows(s: IndexSettings, n_rows: int) -> int:
    least = _PQ_ROWS if s.kind == "ivf_pq" else 0
    return min(n_rows, max(_TRAINED_ROWS * (s.nlist or 0), least))


def seconds_to_build(s: IndexSettings, n_rows: int, dim: int) -> float:
    """Multiplications that building takes, over what this machine does in a second at this moment.

    HNSW's walk reads rows all over memory and reached a thirtieth of that where it was tried. PQ's training is measured
    on one of its pieces, 10,000 random rows: its many small products reach no rate that arithmetic would give.
    """
    a = torch.rand(1024, dim)
    start = time.perf_counter()
    for _ in range(3):
        a @ a.T
    rate = 3 * 1024 * 1024 * dim / (time.perf_counter() - start)
    work = 0.0
    if s.kind == "hnsw":
        work = 30.0 * n_rows * int(s.ef_construction or 0) * int(s.M or 0) * dim
    if s.nlist:
        near = s.nlist if s.nlist < 2**16 else 40 * 32  # centroids that a row is compared with when it is added
        work = float(dim) * s.nlist * _ITERATIONS * training_rows(s, n_rows) + float(dim) * near * n_rows
    seconds = n_rows * dim * 4 / 1e9  # reading
    if s.pq_m:
        start = time.perf_counter()
        piece = np.random.default_rng(SEED).standard_normal((_PQ_SAMPLE, dim // s.pq_m), dtype=np.float32)
        faiss_module().ProductQuantizer(dim // s.pq_m, 1, 8).train(piece)
        once = time.perf_counter() - start
        seconds += s.pq_m * once * max(1.0, min(n_rows, _PQ_ROWS) / _PQ_SAMPLE)
        work += 256.0 * dim * n_rows
    return work / rate + seconds


def settings_in_use(s: IndexSettings) -> dict[str, Any]:
    """The settings that the kind has, for results."""
    return {name: value for name, value in asdict(s).items() if value is not None}


def faiss_module() -> Any:
    """The module; its type stubs lack half of it."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise InputError(
            "an index needs FAISS, which is not installed: pip install faiss-cpu (or faiss-gpu), or use index=flat"
        ) from error
