"""Compare the accuracy, time and memory of rerankers on the same descriptors and search results."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from superglobal.config.common import validate_config
from superglobal.config.evaluation import CompareConfig, RerankConfig, complete_rerank, rerank_parameters
from superglobal.data.evaluation_set import notes_of
from superglobal.errors import InputError, one_of
from superglobal.evaluation.inputs import Inputs, StageTimer, load_inputs
from superglobal.evaluation.pipeline import make_task, rerank_results, score_set, shortlist_size
from superglobal.metrics.revisited import RetrievalResult, cluster_interval
from superglobal.reporting.results import (
    console,
    markdown_text,
    percent,
    print_table,
    unreadable_text,
    write_unreadable,
)
from superglobal.reranking.registry import rerank_label
from superglobal.retrieval.search import search
from superglobal.utils.io import write_atomically, write_text
from superglobal.utils.memory import return_freed_memory
from superglobal.utils.provenance import versions

_FORMAT = "superglobal-comparison-1"


def compare(cfg: DictConfig, folder: Path, sources: Sequence[Path]) -> list[dict[str, Any]]:
    """Rerank the results of one search with each reranker in `rerankers`, and score every ranking.

    Args:
        cfg: composed `CompareConfig`.
        folder: folder for `comparison.json` and `table.md`.
        sources: configuration folders; a name in `rerankers` is looked up as `rerank/NAME.yaml` in this order.

    Returns:
        One dict per reranker: its name and settings, the mAP per protocol (0..1), the gain in mAP of the main protocol
        over the first reranker with its 95 % confidence interval, the milliseconds per query, and the additional peak
        memory in MB. An empty list in all processes except the first.

    Raises:
        InputError: input or settings are missing, invalid or contradict each other.
    """
    config = validate_config(cfg, CompareConfig)
    rerankers = [(words, _read_reranker(words, sources)) for words in config.rerankers]
    d = config.dataset
    if not rerankers:
        raise InputError("rerankers=[]: expected at least one, e.g. rerankers=[none,superglobal]")
    if config.index.kind != "flat":
        raise InputError(f"index={config.index.kind}: rerankers are compared on an exact search; use index=flat")
    if d.kind.startswith("gldv2"):
        raise InputError(f"{d.name}: expected a set scored by mAP; for GLDv2 use python eval.py -m rerank=...")
    if d.kind == "descriptors" or (d.kind == "folder" and not d.labels):
        raise InputError("rerankers cannot be compared without labels: use dataset.labels=true, or another dataset=")
    inputs = load_inputs(config, StageTimer())
    if inputs is None:
        return []
    skipped = len(inputs.database.skipped)
    if skipped and any(settings.enabled and settings.kind == "adba" for _, settings in rerankers):
        raise InputError(
            f"{skipped} distractors were skipped, and adba cannot average them; remove adba from rerankers="
        )
    rows = _score_rerankers(config, inputs, rerankers, folder)
    _report(config, inputs, rows, folder)
    return rows


def _read_reranker(words: str, sources: Sequence[Path]) -> RerankConfig:
    """Return the settings of one reranker in the configured list `rerankers`.

    Args:
        words: entry of the list, "NAME key=value ...". The values override those in `rerank/NAME.yaml`.
        sources: configuration folders. The file `rerank/NAME.yaml` of the first folder that has one is used.

    Raises:
        InputError: no folder contains `rerank/NAME.yaml`, or a key or value is invalid.
    """
    name, *overrides = words.split() or [""]
    path = next((p for p in (source / "rerank" / f"{name}.yaml" for source in sources) if p.is_file()), None)
    if path is None:
        names = sorted({path.stem for source in sources for path in (source / "rerank").glob("*.yaml")})
        raise InputError(f"rerankers: there is no rerank={name}; expected {one_of(name, names)}")
    try:
        parts = [OmegaConf.structured(RerankConfig), OmegaConf.load(path), OmegaConf.from_dotlist(overrides)]
        settings = OmegaConf.to_object(OmegaConf.merge(*parts))
    except OmegaConfBaseException as error:
        raise InputError(f"rerankers: {words!r} is not a reranker ({str(error).splitlines()[0]})") from error
    assert isinstance(settings, RerankConfig)
    complete_rerank(settings)
    if settings.junk != "keep":
        raise InputError(f"rerankers: {words!r}: expected rerank.junk=keep; use python eval.py for other values")
    return settings


def _score_rerankers(
    config: CompareConfig, inputs: Inputs, rerankers: Sequence[tuple[str, RerankConfig]], folder: Path
) -> list[dict[str, Any]]:
    """Search once, rerank the results with each reranker, and return the dicts that `compare` describes.

    Args:
        config: settings of the comparison.
        inputs: descriptors and ground truth.
        rerankers: name and settings of each reranker.
        folder: folder for large temporary files.
    """
    dataset, task = inputs.dataset, make_task(config, inputs)
    assert dataset is not None
    Q, X, exclude, device = task.queries, task.database, task.exclude, task.device
    k = max(shortlist_size(config.k, settings, inputs) for _, settings in rerankers)
    options: dict[str, Any] = {"backend": config.index.backend, "device": device, "exclude": exclude}
    search(Q, X, k, **options)  # The first search is not measured, because it also reads the database from disk.
    with _measure(device) as search_cost:
        _, ids = search(Q, X, k, **options)
    rows: list[dict[str, Any]] = []
    baseline: RetrievalResult | None = None
    for name, settings in rerankers:
        queries, database, shortlist, cost = Q, X, None, search_cost
        if settings.enabled:
            with _measure(device) as cost:
                reranked = rerank_results(replace(config, rerank=settings), task, ids, folder)
            queries, database, shortlist = reranked.queries, reranked.database, reranked.shortlist
        result = score_set(dataset, queries, database, shortlist, exclude, device, config.seed)
        baseline = baseline or result
        main = "medium" if "medium" in result.map else "all"
        gain = result.ap[main] - baseline.ap[main]
        counted = ~np.isnan(gain)
        landmarks = np.array(dataset.clusters if dataset.clusters is not None else range(len(gain)))
        low, high = cluster_interval(gain[counted], landmarks[counted], config.seed)
        values = {"enabled": settings.enabled, "kind": settings.kind, **rerank_parameters(settings)}
        rows.append(
            {
                "name": name,
                "rerank": rerank_label(values),
                "settings": values,
                "tuned_on": settings.tuned_on,
                "map": dict(result.map),
                "gain": float(gain[counted].mean()),
                "interval": [float(low), float(high)],
                "milliseconds": cost["milliseconds"] / len(Q),
                "megabytes": cost["megabytes"],
            }
        )
    return rows


@contextmanager
def _measure(device: str) -> Iterator[dict[str, Any]]:
    """Measure the time and the increase in peak memory of the code in a `with` statement.

    Args:
        device: device that the code computes on, such as "cuda".

    Yields:
        A dict, which is empty until the `with` statement ends. Then "milliseconds" contains the elapsed time, and
        "megabytes" contains the additional peak memory in MB, or None if the memory cannot be measured.
    """
    cost: dict[str, Any] = {}
    before = _peak_memory(device, reset=True)
    start = time.perf_counter()
    yield cost
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    cost["milliseconds"] = 1000 * (time.perf_counter() - start)
    after = _peak_memory(device, reset=False)
    cost["megabytes"] = None if before is None or after is None else max(0.0, after - before)


def _peak_memory(device: str, reset: bool) -> float | None:
    """Return the peak memory in MB since the last call with `reset`; None if it cannot be measured.

    On a CUDA device, this is the GPU memory that torch has allocated. On the CPU, it is the memory of this process as
    reported by Linux in /proc.

    Args:
        device: device of the computation.
        reset: whether to reset the peak first.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        if reset:
            # Return freed memory to the system. Otherwise, the measured code could reuse this memory, and the measured
            # peak would not rise.
            gc.collect()
            return_freed_memory()
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def _report(config: CompareConfig, inputs: Inputs, rows: list[dict[str, Any]], folder: Path) -> None:
    """Write `comparison.json` and `table.md`, and print the table.

    Args:
        config: settings of the comparison.
        inputs: descriptors that were searched.
        rows: one dict per reranker, as returned by `compare`.
        folder: folder to write to.
    """
    about = {key: value for key, value in inputs.about.items() if key != "extracted"}
    assert inputs.dataset is not None
    unreadable, notes = len(inputs.dataset.unreadable), notes_of(inputs.dataset)
    write_unreadable(folder, inputs.dataset.unreadable)
    about |= {"unreadable": unreadable, "notes": notes}
    notes = notes + ([unreadable_text(folder, unreadable)] if unreadable else [])
    summary: dict[str, Any] = {"format": _FORMAT, "dataset": config.dataset.name, "role": config.dataset.role}
    summary |= {"rows": rows, "config": asdict(config), "about": about, "versions": versions()}
    write_atomically(folder / "comparison.json", json.dumps(summary, indent=1, default=str).encode())
    protocols = list(rows[0]["map"])
    columns = ["rerank", *protocols, "gain", "95 % gain", "ms per query", "MB"]
    lines = []
    for row in rows:
        gain = interval = ""
        if row is not rows[0]:
            low, high = row["interval"]
            gain = f"{100 * row['gain']:+.2f}"
            interval = "" if np.isnan(low) else f"{100 * low:+.1f} to {100 * high:+.1f}"
        memory = "-" if row["megabytes"] is None else f"{row['megabytes']:.0f}"
        scores = [percent(row["map"][protocol]) for protocol in protocols]
        lines.append([row["rerank"], *scores, gain, interval, f"{row['milliseconds']:.2f}", memory])
    write_text(folder / "table.md", markdown_text(columns, lines))
    size = f"{len(inputs.queries)} queries, {len(inputs.database)} images"
    title = f"{config.dataset.name} ({unreadable} unreadable)" if unreadable else config.dataset.name
    print_table(f"{title}: {size}, weights {inputs.about['weights']}", columns, lines)
    out = console()
    out.print("\n".join([*notes, ""]) if notes else "", end="", soft_wrap=True, highlight=False, markup=False)
    out.print("MB: additional peak memory; adba averages the database once, which takes most of its time")
    out.print(f"results in {folder}", soft_wrap=True, highlight=False, markup=False)
