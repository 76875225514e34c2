"""Every reranking on the same descriptors and the same first search: scores, time and memory side by side."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.markup import escape
from rich.table import Table

from superglobal.config.common import validate_config
from superglobal.config.evaluation import CompareConfig, RerankConfig, complete_rerank, rerank_parameters
from superglobal.data.evaluation_set import EvaluationSet
from superglobal.errors import InputError
from superglobal.evaluation.inputs import Clock, Inputs, gathered
from superglobal.evaluation.pipeline import score_set, search_device, shortlist_size
from superglobal.metrics.revisited import RetrievalResult, cluster_interval
from superglobal.reporting.results import console, percent
from superglobal.reranking.registry import apply_reranker, rerank_label
from superglobal.retrieval.search import search
from superglobal.utils.io import write_atomically
from superglobal.utils.provenance import versions

_FORMAT = "superglobal-comparison-1"


def compare(cfg: DictConfig, folder: Path, sources: Sequence[Path]) -> list[dict[str, Any]]:
    """Rerank one first search in every way that `rerankers` names, and score each.

    Args:
        cfg: composed `CompareConfig`.
        folder: of the results: `comparison.json`, `table.md`.
        sources: configuration folders, whose `rerank/NAME.yaml` a name in `rerankers` means; the first that has it.

    Returns:
        One row per reranking: name, settings, mAP per protocol (0..1), gain of the main one over the first row with
        its interval, milliseconds per query, MB; empty in all processes but the first.

    Raises:
        InputError: anything missing, unreadable or contradicting.
    """
    config = validate_config(cfg, CompareConfig)
    chosen = [(name, _option(name, sources)) for name in config.rerankers]
    if not chosen:
        raise InputError("rerankers=[]: name at least one, e.g. rerankers=[none,superglobal]")
    if config.index.kind != "flat":
        raise InputError(f"index={config.index.kind}: rerankers are compared on an exact first search; index=flat")
    if config.dataset.kind.startswith("gldv2"):
        raise InputError(
            f"{config.dataset.name}: comparing scores by mAP; python eval.py -m rerank=... for GLDv2's scores"
        )
    if config.dataset.kind == "descriptors" or (config.dataset.kind == "folder" and not config.dataset.labels):
        raise InputError("comparing needs to know what is right: dataset.labels=true, or a set with a ground truth")
    clock = Clock()
    inputs = gathered(config, clock)
    if not isinstance(inputs, Inputs):
        return []
    skipped = len(inputs.database.skipped)
    if skipped and any(one.enabled and one.kind == "adba" for _, one in chosen):
        raise InputError(f"{skipped} distractors were skipped, which adba cannot average; take it out of rerankers=")
    rows = _compared(config, inputs, chosen, folder)
    _report(config, inputs, rows, folder)
    return rows


def _option(words: str, sources: Sequence[Path]) -> RerankConfig:
    """The settings in `rerank/NAME.yaml`, with what `words`, "NAME key=value ...", has after the name; completed."""
    name, *given = words.split() or [""]
    path = next((p for p in (source / "rerank" / f"{name}.yaml" for source in sources) if p.is_file()), None)
    if path is None:
        names = sorted({path.stem for source in sources for path in (source / "rerank").glob("*.yaml")})
        raise InputError(f"rerankers: no rerank={name}; there are {', '.join(names)}")
    try:
        parts = [OmegaConf.structured(RerankConfig), OmegaConf.load(path), OmegaConf.from_dotlist(given)]
        found = OmegaConf.to_object(OmegaConf.merge(*parts))
    except OmegaConfBaseException as error:
        raise InputError(f"rerankers: {words!r} is no reranking ({str(error).splitlines()[0]})") from error
    assert isinstance(found, RerankConfig)
    complete_rerank(found)
    if found.junk != "keep":
        raise InputError(
            f"rerankers: {words!r}: comparing keeps junk in the lists; eval.py has rerank.junk={found.junk}"
        )
    return found


def _compared(
    config: CompareConfig, inputs: Inputs, chosen: Sequence[tuple[str, RerankConfig]], folder: Path
) -> list[dict[str, Any]]:
    dataset, X, Q, exclude = inputs.dataset, inputs.database, inputs.query_block(), inputs.exclude()
    assert dataset is not None
    device, backend = search_device(config), config.index.backend
    k = max(shortlist_size(config.k, one, inputs) for _, one in chosen)
    search(Q, X, k, backend=backend, device=device, exclude=exclude)  # what the disk gives once, it gives to all
    with _watched(device) as first_cost:
        _, ids = search(Q, X, k, backend=backend, device=device, exclude=exclude)
    rows: list[dict[str, Any]] = []
    baseline: RetrievalResult | None = None
    for name, one in chosen:
        queries, database, shortlist, cost = Q, X, None, first_cost
        if one.enabled:
            values = rerank_parameters(one)
            with _watched(device) as cost:
                found = apply_reranker(
                    one.kind, values, Q, X, ids, exclude=exclude, backend=backend, device=device, folder=folder
                )
            queries, database, shortlist = found.queries, found.database, found.shortlist
        result = score_set(dataset, queries, database, shortlist, exclude, device, config.seed)
        baseline = baseline or result
        settings = {"enabled": one.enabled, "kind": one.kind, **rerank_parameters(one)}
        row = {"name": name, "rerank": rerank_label(settings), "settings": settings, "tuned_on": one.tuned_on}
        rows.append(row | _numbers(result, baseline, dataset, config.seed) | _per_query(cost, len(Q)))
    return rows


def _numbers(result: RetrievalResult, baseline: RetrievalResult, dataset: EvaluationSet, seed: int) -> dict[str, Any]:
    """mAP per protocol, and what the main one gains over the baseline, landmarks drawn with replacement."""
    main = "medium" if "medium" in result.map else "all"
    difference = result.ap[main] - baseline.ap[main]
    counted = ~np.isnan(difference)
    clusters = np.array(dataset.clusters if dataset.clusters is not None else range(len(difference)))
    low, high = cluster_interval(difference[counted], clusters[counted], seed)
    return {"map": dict(result.map), "gain": float(difference[counted].mean()), "interval": [float(low), float(high)]}


def _per_query(cost: dict[str, float | None], queries: int) -> dict[str, Any]:
    """Milliseconds per query, and the MB of all queries, which come in batches."""
    seconds, peak = cost["seconds"], cost["peak"]
    assert seconds is not None
    return {"milliseconds": 1000 * seconds / queries, "megabytes": peak}


@contextmanager
def _watched(device: str) -> Iterator[dict[str, float | None]]:
    """Seconds, and MB at the peak above what was there before, on the device; None where the system does not tell."""
    cost: dict[str, float | None] = {"seconds": None, "peak": None}
    before: float | None
    gpu = torch.device(device).type == "cuda"
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        before = _resident(reset=True)
    start = time.perf_counter()
    yield cost
    if gpu:
        torch.cuda.synchronize()
    cost["seconds"] = time.perf_counter() - start
    after = torch.cuda.max_memory_allocated() / 2**20 if gpu else _resident(reset=False)
    cost["peak"] = None if before is None or after is None else max(0.0, after - before)


def _resident(reset: bool) -> float | None:
    """Peak of this process's memory in MB since the last reset, by Linux's /proc."""
    try:
        if reset:
            # What was freed before is to be asked for again, and not be there for nothing.
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def _report(config: CompareConfig, inputs: Inputs, rows: list[dict[str, Any]], folder: Path) -> None:
    """`comparison.json`, `table.md` and the console's table."""
    about = {key: value for key, value in inputs.about.items() if key != "extracted"}
    summary: dict[str, Any] = {"format": _FORMAT, "dataset": config.dataset.name, "role": config.dataset.role}
    summary |= {"rows": rows, "config": asdict(config), "about": about, "versions": versions()}
    write_atomically(folder / "comparison.json", json.dumps(summary, indent=1, default=str).encode())
    protocols = list(rows[0]["map"])
    columns = ["rerank", *protocols, "gain", "95 % gain", "ms per query", "MB"]
    cells = [[row["rerank"], *(percent(row["map"][p]) for p in protocols), *_told(row, rows[0])] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    write_atomically(folder / "table.md", "".join("| " + " | ".join(line) + " |\n" for line in lines).encode())
    size = f"{len(inputs.queries)} queries, {len(inputs.database)} images"
    table = Table(title=escape(f"{config.dataset.name}: {size}, weights {inputs.about['weights']}"))
    for column in columns:
        table.add_column(column, justify="left" if column == "rerank" else "right")
    for line in cells:
        table.add_row(*map(escape, line))
    out = console()
    out.print(table)
    out.print("MB: peak above what was there before; adba's time is mostly that of averaging the database, once")
    out.print(f"results in {folder}", soft_wrap=True, highlight=False, markup=False)


def _told(row: dict[str, Any], first: dict[str, Any]) -> list[str]:
    gain, interval = ("", "") if row is first else (f"{100 * row['gain']:+.2f}", _interval(row["interval"]))
    peak = "-" if row["megabytes"] is None else f"{row['megabytes']:.0f}"
    return [gain, interval, f"{row['milliseconds']:.2f}", peak]


def _interval(interval: Sequence[float]) -> str:
    low, high = interval
    return "" if np.isnan(low) else f"{100 * low:+.1f} to {100 * high:+.1f}"
