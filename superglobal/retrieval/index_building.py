"""Indexes on disk: loaded, or built by one process at a time and left there with what they belong to."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from superglobal.errors import InputError
from superglobal.files import digest, one_at_a_time, write_atomically
from superglobal.retrieval.index import ApproximateIndex, kept_rows
from superglobal.retrieval.index_plan import (
    SEED,
    IndexSettings,
    factory,
    faiss_module,
    memory,
    seconds_to_build,
    training_rows,
    with_defaults,
)
from superglobal.retrieval.vectors import Rows, as_rows, block_size

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
    with one_at_a_time(path.with_suffix(".lock"), f"index {s.kind}"):
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
