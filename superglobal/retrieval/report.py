"""Results of one run as files and a console table (of many runs: tables.py).

A run's folder holds `results.json` (numbers, settings, fingerprints, versions, seconds), `per_query.csv` (AP per
query and stage), `rankings.npz` (ids and scores), `rankings.csv` and `rankings.json` (names and scores of the
first results of the last stage).
"""

from __future__ import annotations

import csv
import io
import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from superglobal.files import write_atomically
from superglobal.retrieval.metrics import RetrievalResult
from superglobal.retrieval.rerankers import describe

FORMAT = "superglobal-result-1"
TEST_MARK = "(test set)"
"""What `tuned_on` ends with where settings were chosen on a test set."""
_LISTED = 100
_STATISTICS = {"mean": "less the mean", "whiten": "whitened by the covariance"}
_PACKAGES = ("superglobal", "torch", "timm", "numpy", "pillow", "opencv-python-headless", "faiss-cpu", "faiss-gpu")

Stages = Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Names:
    """What the rows are called: queries, database (distractors included), landmark per query."""

    queries: Sequence[str]
    database: Sequence[str]
    clusters: Sequence[str] | None


def summarise(
    config: Mapping[str, Any],
    about: Mapping[str, Any],
    names: Names,
    results: Mapping[str, RetrievalResult],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Everything about a run as plain types.

    Args:
        config: the run's settings as plain types.
        about: weights, network identity, fingerprints, device.
        names: for the counts.
        results: per stage ("search", "rerank"); empty without labels.
        seconds: per stage.
    """
    dataset = config["dataset"]
    # Who made the descriptors knows how the queries were cropped.
    extracted = "network" in about
    return {
        **_header(config),
        "status": "ok",
        "weights": about["weights"],
        "protocol": {
            "crop_query": dataset["crop_query"] if extracted and dataset["kind"] == "revisited" else None,
            "max_side": dataset["max_side"] if extracted else None,
            "average_precision": "trapezoidal, as Revisited Oxford and Paris",
            "junk": "stays in the list that is reranked, removed before ranks are counted",
        },
        "counts": {"queries": len(names.queries), "database": len(names.database)},
        "metrics": {stage: {k: v for k, v in r.to_dict().items() if k != "ap"} for stage, r in results.items()},
        "seconds": dict(seconds),
        "about": dict(about),
        "versions": versions(),
    }


def _header(config: Mapping[str, Any]) -> dict[str, Any]:
    dataset, distractors = config["dataset"], config["distractors"]
    name = dataset["name"] + (f"+{distractors['name']}" if distractors["name"] else "")
    if dataset["kind"] == "revisited" and not dataset["crop_query"]:
        name += " (uncropped)"
    return {
        "format": FORMAT,
        "label": config["ablation"] or "",
        "dataset": name,
        "role": dataset["role"],
        "tuned_on": tuned_on(config),
        "weights": config["weights"],
        "metrics": {},
        "config": dict(config),
    }


def tuned_on(config: Mapping[str, Any]) -> list[str]:
    """On which photos the settings of pooling and reranking were chosen; empty for the paper's and those by hand."""
    return sorted({part["tuned_on"] for part in (config["pooling"], config["rerank"]) if part.get("tuned_on")})


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, str] | None:
    """Commit of the code, and whether it was changed since; None outside a checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": str(bool(git("status", "--porcelain", "-uno")))}
    except (OSError, subprocess.CalledProcessError):
        return None


def main_metric(summary: Mapping[str, Any]) -> float:
    """mAP of the last stage, Medium or over labels, in 0..1; NaN where there is none."""
    if not summary["metrics"]:
        return math.nan
    stage, protocol = main_protocol(summary)
    value = summary["metrics"][stage]["map"][protocol]
    return math.nan if value is None else value


def main_protocol(summary: Mapping[str, Any]) -> tuple[str, str]:
    """Stage and protocol of `main_metric`."""
    stage = list(summary["metrics"])[-1]
    return stage, "medium" if "medium" in summary["metrics"][stage]["map"] else "all"


def write_result(
    folder: Path, summary: Mapping[str, Any], results: Mapping[str, RetrievalResult], stages: Stages, names: Names
) -> None:
    """Write a run's files into `folder`; `results.json` comes last and marks the run as finished."""
    arrays: dict[str, Any] = {
        f"{stage}_{what}": a for stage, pair in stages.items() for what, a in zip(("scores", "ids"), pair, strict=True)
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(folder / "rankings.npz", buffer.getvalue())
    _write_lists(folder, stages, names)
    if results:
        _write_per_query(folder, results, names)
    write_atomically(folder / "results.json", json.dumps(_plain(summary), indent=1).encode())


def write_without_numbers(folder: Path, config: Any, status: str, reason: str) -> None:
    """Leave a result that says why it has no numbers.

    Args:
        folder: of the run.
        config: the run's settings as plain types.
        status: "n/a" for a row that does not apply, "failed" for one that ended in an error.
        reason: in words.
    """
    row = {**_header(config), "status": status, "reason": reason}
    write_atomically(folder / "results.json", json.dumps(_plain(row), indent=1).encode())


def _modules(summary: Mapping[str, Any]) -> str:
    """Which modules made these numbers: the default is what the weights were trained with, and hard to guess."""
    rerank = summary["config"]["rerank"]
    after = f"rerank {describe(rerank)}" if rerank["enabled"] else "no rerank"
    statistics = summary["about"].get("statistics")
    if statistics is not None:
        after = f"{_STATISTICS[statistics['kind']]} of {statistics['rows']} searched images; {after}"
    network = summary["about"].get("network")
    if network is None:
        return after
    pooling = network["pooling"]
    on = [name for name in ("gem_plus", "regional", "scale") if pooling[name]]
    on += [] if pooling["relup"] == "off" else [f"relup {pooling['relup']}"]
    return f"pooling: {', '.join(on) or 'gem, no modules'}; {after}"


def print_result(summary: Mapping[str, Any], folder: Path) -> None:
    """One row per stage and protocol, in percent."""
    out = console()
    if summary["metrics"]:
        counts = summary["counts"]
        size = f"{counts['queries']} queries, {counts['database']} images"
        table = Table(title=escape(f"{summary['dataset']}: {size}, weights {summary['weights']}"))
        for column in ("stage", "protocol", "mAP", "95 %", "mP@1", "mP@5", "mP@10", "queries"):
            table.add_column(column, justify="left" if column in ("stage", "protocol") else "right")
        for stage, result in summary["metrics"].items():
            for protocol in result["map"]:
                low, high = result["interval"][protocol]
                table.add_row(
                    stage,
                    protocol,
                    percent(result["map"][protocol]),
                    f"{percent(low, 1)}-{percent(high, 1)}",
                    *(percent(result["mp"][protocol][k], 1) for k in ("1", "5", "10")),
                    str(result["queries"][protocol]),
                )
        out.print(table)
    out.print(_modules(summary), soft_wrap=True, highlight=False, markup=False)
    if summary["tuned_on"]:
        out.print(f"settings tuned on {', '.join(summary['tuned_on'])}", soft_wrap=True, highlight=False, markup=False)
    seconds = ", ".join(f"{stage} {value:.2f} s" for stage, value in summary["seconds"].items())
    out.print(f"{seconds}\nresults in {folder}", soft_wrap=True, highlight=False, markup=False)


def _write_lists(folder: Path, stages: Stages, names: Names) -> None:
    scores, ids = list(stages.values())[-1]
    listed = []
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["number", "query", "rank", "image", "score"])
    for number, (row_scores, row_ids) in enumerate(zip(scores[:, :_LISTED], ids[:, :_LISTED], strict=True)):
        images = [names.database[i] for i in row_ids]
        values = [round(float(s), 6) if math.isfinite(s) else None for s in row_scores]
        found = [{"image": image, "score": value} for image, value in zip(images, values, strict=True)]
        # One photo may be several queries, with different boxes: the number tells them apart.
        listed.append({"number": number, "query": names.queries[number], "results": found})
        writer.writerows(
            [number, names.queries[number], rank, image, "" if value is None else value]
            for rank, (image, value) in enumerate(zip(images, values, strict=True), 1)
        )
    write_atomically(folder / "rankings.csv", text.getvalue().encode())
    write_atomically(folder / "rankings.json", json.dumps(listed, indent=1).encode())


def _write_per_query(folder: Path, results: Mapping[str, RetrievalResult], names: Names) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    columns = [(stage, protocol) for stage, result in results.items() for protocol in result.ap]
    writer.writerow(["query", "landmark", *(f"{stage} {protocol} AP" for stage, protocol in columns)])
    for query, name in enumerate(names.queries):
        values = [results[stage].ap[protocol][query] for stage, protocol in columns]
        landmark = names.clusters[query] if names.clusters is not None else ""
        writer.writerow([name, landmark, *("" if math.isnan(v) else repr(float(v)) for v in values)])
    write_atomically(folder / "per_query.csv", text.getvalue().encode())


def console() -> Console:
    """Without a terminal rich assumes 80 columns and cuts names short; a log has room."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=160)


def percent(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def _plain(value: Any) -> Any:
    """JSON types only: infinities as text, since JSON has none."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
