"""Approximate FAISS indexes: settings, defaults, memory use and storage.

The defaults follow "Guidelines to choose an index" in FAISS's wiki (github.com/facebookresearch/faiss/wiki). For a
database of N rows, an inverted file (IVF) has 4 sqrt(N) lists if N is at most a million. For larger databases, it has
65536, 262144 or 1048576 lists, with an HNSW graph over the centroids of the lists. An inverted file is trained on 30 to
256 rows per list. An HNSW index has 32 links per row. `with_defaults` documents the choices that the guidelines leave
open.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from superglobal.errors import InputError, first_line, one_of
from superglobal.retrieval.rows import Rows, as_exclude, as_queries, as_rows, block_size
from superglobal.retrieval.scores import pair_scores
from superglobal.retrieval.search import BACKENDS, FAISS_GPU_RESULTS, faiss_module
from superglobal.utils.io import digest, file_lock, file_stamp, read_json, write_atomically, write_error

log = logging.getLogger(__name__)
_TRAINED_ROWS = 40  # training rows per list; FAISS warns if there are fewer than 39
_PQ_ROWS = 65536  # number of rows on which FAISS trains product quantization (PQ)
_PROGRESS_SECONDS = 30.0
_SEED = 1234
_GPU_LISTS = 2048  # maximum number of lists per query that FAISS searches on a GPU
_APPROXIMATE = ("flat_fp16", "ivf_flat", "ivf_pq", "hnsw")
KINDS = ("flat", *_APPROXIMATE)
COMPARED = 100  # default number of queries that are also searched exactly, to evaluate an approximate index


def _setting(*kinds: str, minimum: int = 1, maximum: float = 2**31 - 1) -> Any:
    """Declare an optional integer setting of `IndexConfig`.

    Args:
        kinds: kinds of index that have the setting.
        minimum, maximum: smallest and largest valid value.
    """
    return field(default=None, metadata={"kinds": kinds, "minimum": minimum, "maximum": maximum})


@dataclass
class IndexConfig:
    """Index for searching the database (`conf/index`).

    null selects the default of the kind of index, which usually depends on the size of the database. A setting that the
    kind does not have raises an error.

    Args:
        kind: "flat" is exact search; "flat_fp16" (all rows in float16), "ivf_flat" (rows in nlist lists), "ivf_pq"
            (rows in lists, compressed to pq_m bytes each) and "hnsw" (a graph, on the CPU) are approximate FAISS
            indexes, which are built once and stored under `paths.stores`; their candidates are scored exactly.
        backend: only for flat: "auto", "faiss" or "torch"; all give the same result.
        nlist, nprobe: only for ivf_flat and ivf_pq: number of lists, and number of lists searched per query.
        pq_m: only for ivf_pq: bytes per row, a divisor of the descriptors' dimension.
        M: only for hnsw: links per row.
        ef_construction, ef_search: only for hnsw: search width while the graph is built, and for queries.
        candidates: all kinds except flat: number of candidates that the index returns for each result.
        compare: all kinds except flat: number of queries that are also searched exactly, to measure recall and the
            difference in mAP or mAP@100; 100 by default, 0 for none.
    """

    kind: str = "flat"
    backend: str = field(default="auto", metadata={"kinds": ("flat",)})
    nlist: int | None = _setting("ivf_flat", "ivf_pq")
    nprobe: int | None = _setting("ivf_flat", "ivf_pq")
    pq_m: int | None = _setting("ivf_pq")
    M: int | None = _setting("hnsw", minimum=2, maximum=2048)  # with M = 1, FAISS ends the process
    ef_construction: int | None = _setting("hnsw")
    ef_search: int | None = _setting("hnsw")
    candidates: int | None = _setting(*_APPROXIMATE)
    compare: int | None = _setting(*_APPROXIMATE, minimum=0, maximum=math.inf)

    def index_settings(self) -> dict[str, Any]:
        """Return a dict of the kind and the settings that define the index, without those that are None."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("backend", "compare")}
        return {name: value for name, value in values.items() if value is not None}


def validate_index(config: IndexConfig) -> None:
    """Validate the index settings.

    Raises:
        InputError: the kind or the backend is unknown, FAISS is required but not installed, or a setting is out of
            range or not supported by the kind.
    """
    if config.kind not in KINDS:
        raise InputError(f"index.kind={config.kind}: expected {one_of(config.kind, KINDS)}")
    declared = [f for f in fields(config) if f.name != "kind"]
    known = [f.name for f in declared if config.kind in f.metadata["kinds"]]
    for f in declared:
        value = getattr(config, f.name)
        # compare=0 is valid for a flat index, because saved results contain it and are validated when they are opened.
        if f.name not in known and value not in (None, "auto") and not (f.name == "compare" and value == 0):
            raise InputError(
                f"index.{f.name}={value}: index={config.kind} has no setting {f.name}; choose from {', '.join(known)}"
            )
        if "minimum" in f.metadata and value is not None:
            low, high = f.metadata["minimum"], f.metadata["maximum"]
            number = isinstance(value, int | np.integer)
            if not number or not low <= value <= high:
                expected = f"<= {high}" if number and value > high else f">= {low}"
                raise InputError(f"index.{f.name}={value}: expected an integer {expected}")
    if config.backend not in BACKENDS:
        raise InputError(f"index.backend={config.backend}: expected {one_of(config.backend, BACKENDS)}")
    if config.kind != "flat":
        faiss_module(f"index.kind={config.kind}: ")
    elif config.backend == "faiss":
        faiss_module("index.backend=faiss: ", "index.backend=torch, which gives the same result")


def with_defaults(config: IndexConfig, n_rows: int, dim: int) -> IndexConfig:
    """Replace settings that are None with their defaults.

    FAISS's guidelines leave these choices open: nprobe is 1/32 of nlist, but at least 8. pq_m is the largest divisor of
    the dimension up to 64, and ivf_pq fetches four candidates per result. ef_construction is 40, as in FAISS, and
    ef_search is 256.

    Args:
        config: settings of an approximate index.
        n_rows: number of rows in the index.
        dim: dimension of the descriptors.

    Returns:
        A copy of the configuration, with a value for every setting of its kind.

    Raises:
        InputError: the settings are invalid, or do not fit the number of rows or the dimension.
    """
    validate_index(config)
    kind = config.kind
    if kind not in _APPROXIMATE:
        raise InputError(f"index.kind={kind}: exact search has no index; expected one of {', '.join(_APPROXIMATE)}")
    full = replace(config, candidates=config.candidates or (4 if kind == "ivf_pq" else 1))
    if kind.startswith("ivf"):
        full.nlist = config.nlist or max(1, min(_lists(n_rows), n_rows // _TRAINED_ROWS))
        full.nprobe = min(full.nlist, config.nprobe or max(8, full.nlist // 32))
        if full.nlist > n_rows:
            raise InputError(
                f"index.nlist={full.nlist}: expected at most the number of rows, {n_rows}; omit it for the default"
            )
    if kind == "ivf_pq":
        full.pq_m = config.pq_m or max(m for m in range(1, min(64, dim) + 1) if dim % m == 0)
        if dim % full.pq_m:
            raise InputError(f"index.pq_m={full.pq_m}: expected a divisor of the descriptors' dimension, {dim}")
        if n_rows < 256:
            raise InputError(f"index=ivf_pq: PQ needs at least 256 rows to train on, got {n_rows}; use index=flat")
    if kind == "hnsw":
        full.M = config.M or 32
        full.ef_construction, full.ef_search = config.ef_construction or 40, config.ef_search or 256
    return full


def _lists(n_rows: int) -> int:
    """Return the number of IVF lists for `n_rows` rows, according to FAISS's guidelines."""
    if n_rows <= 10**6:
        return round(4 * math.sqrt(n_rows))
    return 2**16 if n_rows <= 10**7 else 2**18 if n_rows <= 10**8 else 2**20


def _factory(config: IndexConfig) -> str:
    """Return the text from which `faiss.index_factory` creates the index, such as "IVF4096,Flat"."""
    if config.kind == "flat_fp16":
        return "SQfp16"
    if config.kind == "hnsw":
        return f"HNSW{config.M}"
    assert config.nlist is not None
    centroids = "_HNSW32" if config.nlist >= 2**16 else ""
    # "np" disables polysemous training, which is only useful for Hamming distances.
    return f"IVF{config.nlist}{centroids},{'Flat' if config.kind == 'ivf_flat' else f'PQ{config.pq_m}np'}"


def memory(config: IndexConfig, n_rows: int, dim: int) -> tuple[int, int]:
    """Estimate the memory of an index.

    Args:
        config: configuration from `with_defaults`.
        n_rows: number of rows in the index.
        dim: dimension of the descriptors.

    Returns:
        Size of the index in bytes, and number of additional bytes that are needed while the index is built, to
        hold the training rows or a block of rows.
    """
    block = block_size(65536, 1, dim) * dim * 4
    if config.kind == "flat_fp16":
        return 2 * n_rows * dim, block
    if config.kind == "hnsw":
        return n_rows * (4 * dim + 8 * int(config.M or 0)), block
    row = 4 * dim if config.kind == "ivf_flat" else int(config.pq_m or 0)
    codebooks = 0 if config.kind == "ivf_flat" else 256 * dim * 4
    index = n_rows * (row + 8) + int(config.nlist or 0) * dim * 4 + codebooks
    return index, max(block, _training_rows(config, n_rows) * dim * 4)


def _training_rows(config: IndexConfig, n_rows: int) -> int:
    """Return the number of rows on which the index is trained."""
    minimum = _PQ_ROWS if config.kind == "ivf_pq" else 0
    return min(n_rows, max(_TRAINED_ROWS * (config.nlist or 0), minimum))


class ApproximateIndex:
    """FAISS index of all database rows that were not skipped during extraction. Create it with `open_index`."""

    def __init__(self, index: Any, rows: Rows, config: IndexConfig, on_gpu: bool) -> None:
        """Wrap a FAISS index.

        Args:
            index: FAISS index of the rows that are not skipped.
            rows: all rows of the database.
            config: configuration from `with_defaults`.
            on_gpu: True if the index is on a GPU.
        """
        self.index = index
        self.rows = rows
        self.config = config
        self._kept = _kept_rows(rows)
        self._on_gpu = on_gpu
        self._max_probes = min(config.nlist or 0, _GPU_LISTS if on_gpu else 2**31)
        if (config.nprobe or 0) > self._max_probes:
            raise InputError(
                f"index.nprobe={config.nprobe}: FAISS searches at most {_GPU_LISTS} lists on a GPU; lower it, or use "
                "trainer.accelerator=cpu"
            )

    def search(self, Q: Any, k: int = 400, *, exclude: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Score the candidates from the index exactly, and return the best k for each query.

        Args:
            Q: (Q, D) queries, unit L2 norm.
            k: number of results per query.
            exclude: (Q,) ids, one per query, that are never returned.

        Returns:
            Scores (Q, k) float32 and ids (Q, k) int64, best first; among equal scores, the lower id is first.

        Raises:
            InputError: k is larger than the number of rows, or the index returns fewer than k results.
        """
        queries = as_queries(Q, self.rows.dim)
        excluded = as_exclude(exclude, len(queries))
        available = len(self._kept) - (excluded is not None)
        if not isinstance(k, int | np.integer) or not 1 <= k <= available:
            raise InputError(f"k={k}: expected 1..{available} for a database of {len(self.rows)} rows")
        count = min(k * int(self.config.candidates or 1) + (excluded is not None), len(self._kept))
        if self._on_gpu and count > FAISS_GPU_RESULTS:
            if k + (excluded is not None) > FAISS_GPU_RESULTS:
                raise InputError(
                    f"k={k}: FAISS returns at most {FAISS_GPU_RESULTS} results on a GPU; use trainer.accelerator=cpu"
                )
            count = FAISS_GPU_RESULTS
        ids = self._candidates(queries, count, k, excluded)
        query_of, column = np.nonzero(ids >= 0)
        scores = np.full(ids.shape, -np.inf)
        scores[query_of, column] = pair_scores(queries, self.rows, query_of, ids[query_of, column])
        order = np.lexsort((ids, -scores), axis=1)[:, :k]
        return np.take_along_axis(scores, order, axis=1).astype(np.float32), np.take_along_axis(ids, order, axis=1)

    def _candidates(self, queries: np.ndarray, count: int, k: int, excluded: np.ndarray | None) -> np.ndarray:
        """Fetch candidates from the index.

        For a query with fewer than k candidates, the search is repeated with more and more IVF lists.

        Args:
            queries: (Q, D) queries.
            count: maximum number of candidates per query.
            k: minimum number of candidates per query.
            excluded: (Q,) ids, one per query, that are never returned; None for none.

        Returns:
            Database ids (Q, count) int64, padded with -1.

        Raises:
            InputError: a query has fewer than k candidates.
        """
        ids = np.full((len(queries), count), -1)
        todo, probes = np.arange(len(queries)), self.config.nprobe
        while True:
            results = self._search_index(queries[todo], count, probes)
            results = np.where(results < 0, -1, self._kept[results])
            if excluded is not None:
                results[results == excluded[todo][:, None]] = -1
            ids[todo] = results
            todo = todo[(results >= 0).sum(axis=1) < k]
            if not len(todo):
                return ids
            if probes is None or probes >= self._max_probes:
                raise InputError(
                    f"index={self.config.kind}: found only {(ids[todo[0]] >= 0).sum()} of k={k} results of query "
                    f"{todo[0]}; raise index.ef_search or use index=flat"
                )
            probes = min(2 * probes, self._max_probes)

    def _search_index(self, queries: np.ndarray, count: int, probes: int | None) -> np.ndarray:
        """Search the FAISS index.

        Args:
            queries: (Q, D) queries.
            count: number of results per query.
            probes: number of lists searched per query; None for an index without lists.

        Returns:
            Row numbers (Q, count) int64 in the index, padded with -1. They differ from database ids if the database has
            skipped rows, which are not in the index.
        """
        faiss = faiss_module()
        options = {}
        if probes is not None:
            options["params"] = faiss.SearchParametersIVF(nprobe=probes)
        elif self.config.kind == "hnsw":
            options["params"] = faiss.SearchParametersHNSW(efSearch=max(count, int(self.config.ef_search or 0)))
        return self.index.search(queries, count, **options)[1]


def _kept_rows(rows: Rows) -> np.ndarray:
    """Return the ids (n,) of the database rows that are in the index: all rows that are not skipped."""
    return np.setdiff1d(np.arange(len(rows)), rows.skipped, assume_unique=True)


def recall(ids: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Compute the recall of each query: the fraction of its exact results `exact` (Q, k) that are in `ids` (Q, n)."""
    return np.array([np.isin(truth, row).mean() for truth, row in zip(exact, ids, strict=True)])


def open_index(
    X: Any, config: IndexConfig, folder: str | Path, *, device: str | torch.device | None = None
) -> ApproximateIndex:
    """Load an approximate index of a database from `folder`. If it is not stored there yet, build and store it.

    If several processes need the same index, one builds it, and the others wait and load it. The required memory is
    logged before the index is built, and the progress while it is built. On a CUDA device, the index is built and
    searched on the GPU if FAISS's GPU package is installed and supports this kind of index.

    Args:
        X: (N, D) database, or anything that `as_rows` accepts, unit L2 norm.
        config: settings of an approximate index; None values are replaced by their defaults.
        folder: folder of the stored index.
        device: device to build and search on; the CPU by default.

    Returns:
        The index.

    Raises:
        InputError: FAISS is not installed, a setting does not fit the rows, or the folder cannot be written.
    """
    faiss = faiss_module()
    rows = as_rows(X, "database")
    kept = _kept_rows(rows)
    full = with_defaults(config, len(kept), rows.dim)
    identity = {
        "rows": rows.fingerprint(),
        "count": len(kept),
        "dim": rows.dim,
        "factory": _factory(full),
        "ef_construction": full.ef_construction,
        "faiss": faiss.__version__,
    }
    text = json.dumps(identity, sort_keys=True).encode()
    path = Path(folder) / f"index-{full.kind}-{hashlib.sha256(text).hexdigest()[:16]}.faiss"
    gpu = None
    supported = hasattr(faiss, "StandardGpuResources") and full.kind != "hnsw" and "HNSW" not in _factory(full)
    if torch.device(device or "cpu").type == "cuda" and supported and faiss.get_num_gpus():
        gpu = faiss.StandardGpuResources()
    before = file_stamp(path)
    index = _load(path, identity)
    if index is None:
        index = _build_once(path, identity, before, rows, kept, full, gpu)
    return ApproximateIndex(
        index if gpu is None else faiss.index_cpu_to_gpu(gpu, 0, index), rows, full, gpu is not None
    )


def _build_once(
    path: Path,
    identity: Mapping[str, Any],
    before: list[int] | None,
    rows: Rows,
    kept: np.ndarray,
    config: IndexConfig,
    gpu: Any,
) -> Any:
    """Build and store the index. If another process has stored it in the meantime, load it instead.

    Args:
        path: file of the index.
        identity: everything that the index depends on.
        before: `file_stamp(path)` before the caller tried to load the index. If it has changed, another process has
            stored the index.
        rows: rows of the database.
        kept: ids of the rows that are not skipped.
        config: configuration from `with_defaults`.
        gpu: FAISS resources of a GPU; None for the CPU.

    Returns:
        FAISS index on the CPU.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error, "set paths.stores to another folder") from error
    with file_lock(path.with_suffix(".lock"), f"index {config.kind}: another process is building it", wait=True):
        index = _load(path, identity) if file_stamp(path) != before else None
        if index is None:
            index = _build(rows, kept, config, gpu)
            _save(index, path, identity)
        return index


def _build(rows: Rows, kept: np.ndarray, config: IndexConfig, gpu: Any) -> Any:
    """Build an index: train it on a sample of the rows, and add all rows block by block.

    Args:
        rows: rows of the database.
        kept: ids of the rows that are not skipped.
        config: configuration from `with_defaults`.
        gpu: FAISS resources of a GPU; None for the CPU.

    Returns:
        FAISS index on the CPU.
    """
    faiss = faiss_module()
    name = f"index {config.kind} ({_factory(config)})"
    index_bytes, additional = memory(config, len(kept), rows.dim)
    text = "%s: building from %d descriptors of dimension %d; needs %.2f GB, and another %.2f GB while building"
    log.info(text, name, len(kept), rows.dim, index_bytes / 1e9, additional / 1e9)
    start = reported = time.perf_counter()
    index = faiss.index_factory(rows.dim, _factory(config), faiss.METRIC_INNER_PRODUCT)
    if config.kind == "hnsw":
        index.hnsw.efConstruction = config.ef_construction
    if gpu is not None:
        index = faiss.index_cpu_to_gpu(gpu, 0, index)
    if not index.is_trained:
        count = max(1, _training_rows(config, len(kept)))
        sample = np.random.default_rng(_SEED).choice(kept, count, replace=False)
        index.train(rows.take(np.sort(sample)))
        log.info("%s: trained on %d rows in %.0f s", name, count, time.perf_counter() - start)
    skipped = np.isin(np.arange(len(rows)), rows.skipped)
    for first, block in rows.blocks(block_size(65536, 1, rows.dim)):
        skipped_here = skipped[first : first + len(block)]
        index.add(np.ascontiguousarray(block[~skipped_here] if skipped_here.any() else block))
        if time.perf_counter() - reported > _PROGRESS_SECONDS:
            reported = time.perf_counter()
            log.info("%s: added %d/%d rows in %.0f s", name, index.ntotal, len(kept), reported - start)
    log.info("%s: built in %.0f s", name, time.perf_counter() - start)
    return index if gpu is None else faiss.index_gpu_to_cpu(index)


def _save(index: Any, path: Path, identity: Mapping[str, Any]) -> None:
    """Write the index to `path`, and then its identity and checksum to a `.json` file, each atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        faiss_module().write_index(index, str(temporary))
        checksum = digest(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise write_error(path, error, "set paths.stores to another folder") from error
    except RuntimeError as error:
        raise InputError(
            f"{path}: the index cannot be written ({first_line(error)}); set paths.stores to a folder with enough free "
            "space that you may write"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    identity = {**identity, "bytes": path.stat().st_size, "digest": checksum}
    write_atomically(path.with_suffix(".json"), json.dumps(identity, indent=1).encode())


def _load(path: Path, identity: Mapping[str, Any]) -> Any:
    """Load the stored index, and verify its checksum and its identity.

    Args:
        path: file of the index.
        identity: everything that the index depends on, which must equal the stored identity.

    Returns:
        FAISS index on the CPU. None if there is no file, or if the file is damaged; a warning is logged in this case.
    """
    if not path.exists():
        return None
    try:
        stored = read_json(path.with_suffix(".json"))
        if {key: stored[key] for key in identity} != dict(identity):
            raise ValueError("it belongs to other rows or settings")
        if stored["bytes"] != path.stat().st_size or stored["digest"] != digest(path):
            raise ValueError("its checksum differs")
        index = faiss_module().read_index(str(path))
        if (index.ntotal, index.d) != (identity["count"], identity["dim"]):
            raise ValueError(f"it has {index.ntotal} rows of dimension {index.d}")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        log.warning("index: %s is damaged (%s); building it again", path, next(iter(str(error).splitlines()), "?"))
        return None
    log.info("index: loaded %s", path)
    return index
