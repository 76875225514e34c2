"""What an index by FAISS will be: its settings and their defaults, its memory, and about how long it takes to build.

Defaults follow FAISS's wiki, "Guidelines to choose an index" (github.com/facebookresearch/faiss/wiki): 4 sqrt(N) lists
up to a million rows, then 65536, 262144 and 1048576 with an HNSW over their centroids; 30 to 256 training rows a list;
HNSW with 32 links. What they leave open is said at `with_defaults`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from superglobal.errors import InputError
from superglobal.retrieval.rows import Rows, as_exclude, as_queries, as_rows, block_size
from superglobal.retrieval.scores import pair_scores
from superglobal.utils.io import digest, file_lock, write_atomically

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


_GPU_LIMIT = 2048  # results a query that FAISS gives on a GPU
_GPU_LISTS = 2048  # and lists that it searches there


class ApproximateIndex:
    """A built index over the rows that can be ranked; from `open_index`."""

    def __init__(self, index: Any, rows: Rows, settings: IndexSettings, on_gpu: bool) -> None:
        self.index = index
        self.rows = rows
        self.settings = settings
        self._kept = kept_rows(rows)
        self._on_gpu = on_gpu
        self._most_probes = min(settings.nlist or 0, _GPU_LISTS if on_gpu else 2**31)
        if (settings.nprobe or 0) > self._most_probes:
            raise InputError(
                f"index.nprobe={settings.nprobe}: FAISS searches at most {_GPU_LISTS} lists on a GPU; lower it, or "
                "trainer.accelerator=cpu"
            )

    def search(self, Q: Any, k: int = 400, *, exclude: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """The best k among the candidates that the index finds, by exact scores, in the order (-score, id).

        Returns scores (Q, k) float32 and ids (Q, k) int64, best first.
        Raises InputError for k that there are not so many rows for, or that the index does not reach.
        """
        queries = as_queries(Q, self.rows.dim)
        excluded = as_exclude(exclude, len(queries))
        available = len(self._kept) - (excluded is not None)
        if not 1 <= k <= available:
            raise InputError(f"k: expected 1..{available} for a database of {len(self.rows)} rows, got {k}")
        count = min(k * int(self.settings.candidates or 1) + (excluded is not None), len(self._kept))
        if self._on_gpu and count > _GPU_LIMIT:
            if k + (excluded is not None) > _GPU_LIMIT:
                raise InputError(f"k={k}: FAISS gives at most {_GPU_LIMIT} on a GPU; trainer.accelerator=cpu")
            count = _GPU_LIMIT
        ids = self._candidates(queries, count, k, excluded)
        query_of, place = np.nonzero(ids >= 0)
        scores = np.full(ids.shape, -np.inf)
        scores[query_of, place] = pair_scores(queries, self.rows, query_of, ids[query_of, place])
        order = np.lexsort((ids, -scores), axis=1)[:, :k]
        return np.take_along_axis(scores, order, axis=1).astype(np.float32), np.take_along_axis(ids, order, axis=1)

    def _candidates(self, queries: np.ndarray, count: int, k: int, excluded: np.ndarray | None) -> np.ndarray:
        """(Q, count) ids, -1 where fewer were found; at least k each. Queries that find too few look further."""
        ids = np.full((len(queries), count), -1)
        todo, probes = np.arange(len(queries)), self.settings.nprobe
        while True:
            found = self._ask(queries[todo], count, probes)
            found = np.where(found < 0, -1, self._kept[found])
            if excluded is not None:
                found[found == excluded[todo][:, None]] = -1
            ids[todo] = found
            todo = todo[(found >= 0).sum(axis=1) < k]
            if not len(todo):
                return ids
            if probes is None or probes >= self._most_probes:
                raise InputError(
                    f"index={self.settings.kind}: only {(ids[todo[0]] >= 0).sum()} of k={k} results of query "
                    f"{todo[0]} were reached; raise index.ef_search or use index=flat"
                )
            probes = min(2 * probes, self._most_probes)

    def _ask(self, queries: np.ndarray, count: int, probes: int | None) -> np.ndarray:
        faiss = faiss_module()
        options = {}
        if probes is not None:
            options["params"] = faiss.SearchParametersIVF(nprobe=probes)
        elif self.settings.kind == "hnsw":
            options["params"] = faiss.SearchParametersHNSW(efSearch=max(count, int(self.settings.ef_search or 0)))
        return self.index.search(queries, count, **options)[1]


def kept_rows(rows: Rows) -> np.ndarray:
    """Ids of the rows in the index, by their number there."""
    return np.setdiff1d(np.arange(len(rows)), rows.skipped, assume_unique=True)


def recall(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """(Q,) share of the exact ids (Q, k) that were found (Q, n)."""
    return np.array([np.isin(true, ids).mean() for true, ids in zip(exact, found, strict=True)])


log = logging.getLogger(__name__)


def open_index(
    X: Any, settings: IndexSettings, folder: str | Path, *, device: str | torch.device | None = None
) -> ApproximateIndex:
    """Load the index of these rows and settings from `folder`, or build it and leave it there.

    Of several processes that need the same one builds it, and the others wait and load it. What it needs and about how
    long it takes is logged before it is built. On a CUDA device FAISS's GPU package
    builds and searches there, but for hnsw and lists that an HNSW finds.

    Raises:
        InputError: FAISS is not installed, settings that do not fit, or a place that cannot be written.
    """
    faiss = faiss_module()
    rows = as_rows(X, "database")
    kept = kept_rows(rows)
    full = with_defaults(settings, len(kept), rows.dim)
    identity = {
        "rows": rows.fingerprint(),
        "count": len(kept),
        "dim": rows.dim,
        "factory": factory(full),
        "ef_construction": full.ef_construction,
        "faiss": faiss.__version__,
    }
    text = json.dumps(identity, sort_keys=True).encode()
    path = Path(folder) / f"index-{full.kind}-{hashlib.sha256(text).hexdigest()[:16]}.faiss"
    gpu = _gpu(full, device)
    index = _stored_or_built(path, identity, rows, kept, full, gpu)
    return ApproximateIndex(
        index if gpu is None else faiss.index_cpu_to_gpu(gpu, 0, index), rows, full, gpu is not None
    )


def _gpu(s: IndexSettings, device: str | torch.device | None) -> Any:
    """FAISS's GPU resources, or None for the CPU."""
    faiss = faiss_module()
    wanted = torch.device(device or "cpu").type == "cuda" and hasattr(faiss, "StandardGpuResources")
    possible = s.kind != "hnsw" and "HNSW" not in factory(s)
    return faiss.StandardGpuResources() if wanted and possible and faiss.get_num_gpus() else None


def _stored_or_built(
    path: Path, identity: Mapping[str, Any], rows: Rows, kept: np.ndarray, s: IndexSettings, gpu: Any
) -> Any:
    """The stored index, or a new one, which is kept; by one process at a time."""
    before = _stamp(path)
    index = _load(path, identity)
    if index is not None:
        return index
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another paths.stores") from error
    with file_lock(path.with_suffix(".lock"), f"index {s.kind}: another process is building it", wait=True):
        if _stamp(path) != before:  # another process was first
            index = _load(path, identity)
        if index is None:
            index = _build(rows, kept, s, gpu)
            _save(index, path, identity)
        return index


def _stamp(path: Path) -> tuple[int, int] | None:
    """Which file of an index is there, by the one that is written last."""
    try:
        found = path.with_suffix(".json").stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _build(rows: Rows, kept: np.ndarray, s: IndexSettings, gpu: Any) -> Any:
    """Train on a sample, add all rows by blocks; the index on the CPU."""
    faiss = faiss_module()
    own, beside = memory(s, len(kept), rows.dim)
    log.info(
        "index %s (%s): %d x %d, %.2f GB and %.2f GB beside it while it is built, about %.0f s; building",
        s.kind,
        factory(s),
        len(kept),
        rows.dim,
        own / 1e9,
        beside / 1e9,
        seconds_to_build(s, len(kept), rows.dim),
    )
    start = time.perf_counter()
    index = faiss.index_factory(rows.dim, factory(s), faiss.METRIC_INNER_PRODUCT)
    if s.kind == "hnsw":
        index.hnsw.efConstruction = s.ef_construction
    if gpu is not None:
        index = faiss.index_cpu_to_gpu(gpu, 0, index)
    if not index.is_trained:
        drawn = np.random.default_rng(SEED).choice(kept, max(1, training_rows(s, len(kept))), replace=False)
        index.train(rows.take(np.sort(drawn)))
    skipped = np.isin(np.arange(len(rows)), rows.skipped)
    for first, block in rows.blocks(block_size(65536, 1, rows.dim)):
        part = skipped[first : first + len(block)]
        index.add(np.ascontiguousarray(block[~part] if part.any() else block))
    log.info("index %s: built in %.0f s", s.kind, time.perf_counter() - start)
    return index if gpu is None else faiss.index_gpu_to_cpu(index)


def _save(index: Any, path: Path, identity: Mapping[str, Any]) -> None:
    """The index, and then what it is, each whole or not there."""
    faiss = faiss_module()
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(descriptor)
        try:
            faiss.write_index(index, temporary)
            written = digest(Path(temporary))
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{path}: the index cannot be written ({error}); set paths.stores to a place with room"
        ) from error
    about = {**identity, "bytes": path.stat().st_size, "digest": written}
    write_atomically(path.with_suffix(".json"), json.dumps(about, indent=1).encode())


def _load(path: Path, identity: Mapping[str, Any]) -> Any:
    """The stored index; None, with a message, where there is none or it is damaged."""
    faiss = faiss_module()
    if not path.exists():
        log.info("index: none for these rows and settings at %s", path)
        return None
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        if {key: about[key] for key in identity} != dict(identity):
            raise ValueError("it belongs to other rows or settings")
        if about["bytes"] != path.stat().st_size or about["digest"] != digest(path):
            raise ValueError("its bytes are not those that were written")
        index = faiss.read_index(str(path))
        if (index.ntotal, index.d) != (identity["count"], identity["dim"]):
            raise ValueError(f"it holds {index.ntotal} x {index.d}")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        log.warning(
            "index: %s is damaged (%s); it is built again", path, str(error).splitlines()[0] if str(error) else error
        )
        return None
    log.info("index: %s loaded", path)
    return index
