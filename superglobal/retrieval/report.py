"""Results of one run as files and a console table; results of many runs as one table.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from superglobal.errors import InputError
from superglobal.files import write_atomically
from superglobal.retrieval.metrics import RetrievalResult

FORMAT = "superglobal-result-1"
_LISTED = 100
_PACKAGES = ("superglobal", "torch", "timm", "numpy", "pillow", "opencv-python-headless", "faiss-cpu", "faiss-gpu")
# Rows of an ablation in the paper's order; other rows follow by name.
_STEPS = ("gem_plus", "regional", "scale", "relup", "rerank")
_LADDER = ("gem", *_STEPS, *(f"no_{step}" for step in _STEPS))

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
    distractors = (config["distractors"] or {}).get("name")
    return {
        "format": FORMAT,
        "status": "ok",
        "label": config["ablation"] or "result",
        "dataset": dataset["name"] + (f"+{distractors}" if distractors else ""),
        "weights": about["weights"],
        "protocol": {
            "crop_query": dataset["crop_query"] if dataset["kind"] == "revisited" else None,
            "max_side": dataset["max_side"],
            "average_precision": "trapezoidal, as Revisited Oxford and Paris",
            "junk": "stays in the list that is reranked, removed before ranks are counted",
        },
        "counts": {"queries": len(names.queries), "database": len(names.database)},
        "metrics": {stage: {k: v for k, v in r.to_dict().items() if k != "ap"} for stage, r in results.items()},
        "seconds": dict(seconds),
        "about": dict(about),
        "config": dict(config),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def main_metric(summary: Mapping[str, Any]) -> float:
    """mAP of the last stage, Medium or over labels, in 0..1; NaN where there is none."""
    if not summary["metrics"]:
        return math.nan
    scores = list(summary["metrics"].values())[-1]["map"]
    value = scores.get("medium", scores.get("all"))
    return math.nan if value is None else value


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


def write_not_applicable(folder: Path, config: Mapping[str, Any], reason: str) -> None:
    """Leave a row that says why it has no numbers."""
    distractors = (config["distractors"] or {}).get("name")
    row = {
        "format": FORMAT,
        "status": "n/a",
        "reason": reason,
        "label": config["ablation"],
        "dataset": config["dataset"]["name"] + (f"+{distractors}" if distractors else ""),
        "weights": config["weights"],
        "metrics": {},
        "config": dict(config),
    }
    write_atomically(folder / "results.json", json.dumps(_plain(row), indent=1).encode())


def print_result(summary: Mapping[str, Any], folder: Path) -> None:
    """One row per stage and protocol, in percent."""
    console = Console()
    if summary["metrics"]:
        counts = summary["counts"]
        size = f"{counts['queries']} queries, {counts['database']} images"
        table = Table(title=f"{summary['dataset']}: {size}, weights {summary['weights']}")
        for column in ("stage", "protocol", "mAP", "95 %", "mP@1", "mP@5", "mP@10", "queries"):
            table.add_column(column, justify="left" if column in ("stage", "protocol") else "right")
        for stage, result in summary["metrics"].items():
            for protocol in result["map"]:
                low, high = result["interval"][protocol]
                table.add_row(
                    stage,
                    protocol,
                    _percent(result["map"][protocol]),
                    f"{_percent(low, 1)}-{_percent(high, 1)}",
                    *(_percent(result["mp"][protocol][k], 1) for k in ("1", "5", "10")),
                    str(result["queries"][protocol]),
                )
        console.print(table)
    seconds = ", ".join(f"{stage} {value:.2f} s" for stage, value in summary["seconds"].items())
    console.print(f"{seconds}\nresults in {folder}", soft_wrap=True, highlight=False)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All `results.json` below a folder, each with its sub-folder as `place`.

    Raises:
        InputError: none there, or a damaged one.
    """
    rows = []
    for path in sorted(folder.rglob("results.json")):
        try:
            row = json.loads(path.read_text())
            if row["format"] != FORMAT:
                raise InputError(f"{path}: format {row['format']!r}, expected {FORMAT!r}; run eval.py again")
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: damaged ({error!r}); run eval.py again") from error
        rows.append({**row, "place": path.parent.relative_to(folder).as_posix()})
    if not rows:
        raise InputError(f"{folder}: no results.json in it; give the folder that eval.py printed")
    return rows


def merge(folder: Path) -> list[dict[str, str]]:
    """Merge all results below `folder` into one table: console, `table.md`, `table.csv`.

    A row is a run, its numbers those of its last stage: mAP per protocol in percent, mP@10, and what the main
    metric gains over the first row of its data set.
    """
    rows = _merged_rows(read_results(folder))
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[row.get(column, "") for column in columns] for row in rows]
    text = io.StringIO()
    csv.writer(text).writerows([columns, *cells])
    write_atomically(folder / "table.csv", text.getvalue().encode())
    lines = [columns, ["---"] * len(columns), *cells]
    write_atomically(folder / "table.md", "".join("| " + " | ".join(line) + " |\n" for line in lines).encode())
    table = Table(title=str(folder))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 3 else "right")
    for line in cells:
        table.add_row(*line)
    Console().print(table)
    return rows


def _merged_rows(results: list[dict[str, Any]]) -> list[dict[str, str]]:
    order = {label: i for i, label in enumerate(_LADDER)}
    results = sorted(results, key=lambda r: (r["dataset"], order.get(r["label"], len(order)), r["place"]))
    baselines: dict[str, float] = {}
    rows = []
    for result in results:
        label = result["label"] if result["label"] in order else result["place"]
        row = {"data set": result["dataset"], "weights": str(result["weights"] or ""), "run": label}
        if result["status"] != "ok" or not result["metrics"]:
            rows.append(row | {"mAP": "n/a"})
            continue
        last = list(result["metrics"].values())[-1]
        value = main_metric(result)
        gain = value - baselines.setdefault(result["dataset"], value)
        row |= {protocol: _percent(score) for protocol, score in last["map"].items()}
        row |= {f"mP@10 {protocol}": _percent(at["10"], 1) for protocol, at in last["mp"].items()}
        rows.append(row | {"gain": f"{100 * gain:+.2f}"})
    measured = list(
        dict.fromkeys(c for row in rows if "mAP" not in row for c in row if c not in ("data set", "weights", "run"))
    )
    return [
        row
        if "mAP" not in row
        else {k: v for k, v in row.items() if k != "mAP"} | dict.fromkeys(measured or ["mAP"], "n/a")
        for row in rows
    ]


def _write_lists(folder: Path, stages: Stages, names: Names) -> None:
    scores, ids = list(stages.values())[-1]
    listed = {}
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["query", "rank", "image", "score"])
    for query, (row_scores, row_ids) in enumerate(zip(scores[:, :_LISTED], ids[:, :_LISTED], strict=True)):
        images = [names.database[i] for i in row_ids]
        values = [round(float(s), 6) if math.isfinite(s) else None for s in row_scores]
        listed[names.queries[query]] = [{"image": i, "score": s} for i, s in zip(images, values, strict=True)]
        writer.writerows(
            [names.queries[query], rank, image, "" if value is None else value]
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


def _percent(value: float | None, digits: int = 2) -> str:
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
