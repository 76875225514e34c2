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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from superglobal.metrics.revisited import Result, RetrievalResult
from superglobal.reranking.registry import rerank_label
from superglobal.utils.io import write_atomically
from superglobal.utils.provenance import versions

FORMAT = "superglobal-result-1"
TEST_MARK = "(test set)"
"""What `tuned_on` ends with where settings were chosen on a test set."""
METRICS = {"map": "mAP", "mAP@100": "mAP@100", "GAP": "GAP"}
"""Key of a stage's main numbers in `results.json`, and what tables call them."""
_LISTED, _ROWS = 100, 500_000  # results per query that are listed by name, and results of all queries together
_DROPPED = "of reranking: removed beforehand, a list for each protocol"
_WHITENING = {"center": "less the mean", "pca": "whitened by the covariance"}
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
    results: Mapping[str, Result],
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
    definition = next(iter(results.values())).definition if results else RetrievalResult.definition
    header = _header(config)
    if about.get("skipped"):
        header["dataset"] += f" ({about['skipped']} unreadable)"
    return {
        **header,
        "status": "ok",
        "weights": about["weights"],
        "protocol": {
            "crop_query": dataset["crop_query"] if extracted and dataset["kind"] == "revisited" else None,
            "max_side": dataset["max_side"] if extracted else None,
            "min_side": about["network"]["min_side"] if extracted else None,
            **definition,
            **({"junk": _DROPPED} if config["rerank"]["enabled"] and config["rerank"]["junk"] == "drop" else {}),
        },
        "counts": {"queries": len(names.queries), "database": len(names.database) - about.get("skipped", 0)},
        "metrics": {stage: {k: v for k, v in r.to_dict().items() if k != "ap"} for stage, r in results.items()},
        "seconds": dict(seconds),
        "about": dict(about),
        "versions": versions(),
    }


def _header(config: Mapping[str, Any]) -> dict[str, Any]:
    dataset, distractors = config["dataset"], config["distractors"]
    name = dataset["name"]
    if dataset["kind"] == name == "folder" and dataset["database"]:
        name = Path(dataset["database"]).resolve().name or name  # folders of photos are told apart by their own names
    name += f"+{distractors['name']}" if distractors["name"] else ""
    if dataset["kind"] == "revisited" and not dataset["crop_query"]:
        name += " (uncropped)"
    if config["index"]["kind"] != "flat":
        name += f" ({config['index']['kind']}, approximate)"
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


def main_metric(summary: Mapping[str, Any]) -> float:
    """mAP of the last stage (Medium or over labels), mAP@100 or GAP (over all queries), in 0..1; NaN for none."""
    if not summary["metrics"]:
        return math.nan
    stage, protocol = main_protocol(summary)
    value = main_scores(summary["metrics"][stage])[protocol]
    return math.nan if value is None else value


def main_protocol(summary: Mapping[str, Any]) -> tuple[str, str]:
    """Stage and protocol of `main_metric`."""
    stage = list(summary["metrics"])[-1]
    return stage, "medium" if "medium" in main_scores(summary["metrics"][stage]) else "all"


def metric_key(metrics: Mapping[str, Any]) -> str:
    """Which of `METRICS` a stage was scored by."""
    return next(key for key in METRICS if key in metrics)


def main_scores(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """The main metric of a stage by protocol or part."""
    return metrics[metric_key(metrics)]


def write_result(
    folder: Path, summary: Mapping[str, Any], results: Mapping[str, Result], stages: Stages, names: Names
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
    write_atomically(folder / "results.json", json.dumps(plain_types(summary), indent=1).encode())


def write_without_numbers(folder: Path, config: Any, status: str, reason: str) -> None:
    """Leave a result that says why it has no numbers.

    Args:
        folder: of the run.
        config: the run's settings as plain types.
        status: "n/a" for a row that does not apply, "failed" for one that ended in an error.
        reason: in words.
    """
    row = {**_header(config), "status": status, "reason": reason}
    write_atomically(folder / "results.json", json.dumps(plain_types(row), indent=1).encode())


def modules_text(summary: Mapping[str, Any]) -> str:
    """Which modules made these numbers: the default is what the weights were trained with, and hard to guess."""
    rerank = summary["config"]["rerank"]
    after = f"rerank {rerank_label(rerank)}" if rerank["enabled"] else "no rerank"
    whitening = summary["about"].get("whitening")
    if whitening is not None:
        after = f"{_WHITENING[whitening['kind']]} of {whitening['rows']} searched images; {after}"
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
        print_metrics(f"{summary['dataset']}: {size}, weights {summary['weights']}", summary["metrics"])
    out.print(modules_text(summary), soft_wrap=True, highlight=False, markup=False)
    if summary["protocol"]["min_side"] is not None:
        out.print(sizes_text(summary["protocol"]), soft_wrap=True, highlight=False, markup=False)
    if "index" in summary["about"]:
        out.print(approximation_text(summary["about"]["index"]), soft_wrap=True, highlight=False, markup=False)
    if summary["tuned_on"]:
        out.print(f"settings tuned on {', '.join(summary['tuned_on'])}", soft_wrap=True, highlight=False, markup=False)
    if summary["about"].get("skipped"):
        count = summary["about"]["skipped"]
        text = f"{count} distractors could not be read and are never ranked: skipped.txt of their store"
        out.print(text, soft_wrap=True, highlight=False, markup=False)
    seconds = ", ".join(f"{stage} {value:.2f} s" for stage, value in summary["seconds"].items())
    out.print(f"{seconds}\nresults in {folder}", soft_wrap=True, highlight=False, markup=False)


def sizes_text(protocol: Mapping[str, Any]) -> str:
    """The image sizes that the network saw: numbers of two runs compare only where they are the same."""
    most = f"shrunk to a longer side of {protocol['max_side']} px" if protocol["max_side"] else "not shrunk"
    return f"images: {most}; enlarged to a shorter side of {protocol['min_side']} px where it is less"


def print_metrics(title: str, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """One row per stage and protocol or part, in percent.

    Args:
        title: of the table.
        metrics: `to_dict` of a result per stage.
    """
    table = Table(title=escape(title))
    rows = [
        (stage, protocol, metric_cells(one, protocol))
        for stage, one in metrics.items()
        for protocol in main_scores(one)
    ]
    for column in ("stage", "protocol", *rows[0][2]):
        table.add_column(column, justify="left" if column in ("stage", "protocol") else "right")
    for stage, protocol, cells in rows:
        table.add_row(stage, protocol, *cells.values())
    console().print(table)


def metric_cells(one: Mapping[str, Any], protocol: str) -> dict[str, str]:
    """Column -> cell of one stage and protocol."""
    cells = {METRICS[metric_key(one)]: percent(main_scores(one)[protocol])}
    if "GAP_landmarks_only" in one:
        cells["GAP, landmarks only"] = percent(one["GAP_landmarks_only"][protocol])
        cells["top-1"] = percent(one["top1"][protocol])
    if "interval" in one:
        cells["95 %"] = percent_range(*one["interval"][protocol])
    for key, column in (("mp", "mP"), ("precision", "P")):
        cells |= {f"{column}@{k}": percent(v, 1) for k, v in one.get(key, {}).get(protocol, {}).items()}
    for key, value in one.get("position", {}).get(protocol, {}).items():
        cells[f"{key} position"] = "-" if value is None else f"{value:.1f}"
    cells["queries"] = str(one["queries"][protocol])
    if "with_landmark" in one:
        cells["with landmark"] = str(one["with_landmark"][protocol])
    return cells


def approximation_text(index: Mapping[str, Any]) -> str:
    """Which index searched, and how far it is from exact."""
    settings = ", ".join(f"{name} {value}" for name, value in index["settings"].items())
    text = f"approximate search: {settings}"
    if "compared" in index:
        c = index["compared"]
        text += f"\nagainst exact, {c['queries']} queries: recall@{c['k']} {c['recall']:.4f} (least {c['least']:.4f})"
        for key, metric in METRICS.items():
            for part, value in c.get(f"{key}_difference", {}).items():
                text += "" if value is None else f", {part} {metric} {100 * value:+.2f}"
        if not any(f"{key}_difference" in c for key in METRICS):
            text += "; recall only"
    return text


def _write_lists(folder: Path, stages: Stages, names: Names) -> None:
    scores, ids = list(stages.values())[-1]
    depth = min(_LISTED, max(1, _ROWS // len(ids)))
    listed = []
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["number", "query", "rank", "image", "score"])
    for number, (row_scores, row_ids) in enumerate(zip(scores[:, :depth], ids[:, :depth], strict=True)):
        images = [names.database[i] for i in row_ids]
        values = [round(float(s), 6) if math.isfinite(s) else None for s in row_scores]
        found = [{"image": image, "score": value} for image, value in zip(images, values, strict=True)]
        # One photo may be several queries, with different boxes: the number tells them apart.
        query = names.queries[number]
        listed.append({"number": number, "query": query, "results": found})
        writer.writerows(
            [number, query, rank, image, "" if value is None else value]
            for rank, (image, value) in enumerate(zip(images, values, strict=True), 1)
        )
    write_atomically(folder / "rankings.csv", text.getvalue().encode())
    write_atomically(folder / "rankings.json", json.dumps(listed, indent=1).encode())


def _write_per_query(folder: Path, results: Mapping[str, Result], names: Names) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    columns = {f"{stage} {name}": v for stage, result in results.items() for name, v in result.per_query().items()}
    writer.writerow(["query", "landmark", *columns])
    for query, (name, *values) in enumerate(zip(names.queries, *columns.values(), strict=True)):
        landmark = names.clusters[query] if names.clusters is not None else ""
        writer.writerow([name, landmark, *("" if v != v else v for v in values)])
    write_atomically(folder / "per_query.csv", text.getvalue().encode())


def console() -> Console:
    """Without a terminal rich assumes 80 columns and cuts names short; a log has room."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=160)


def percent(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}"


def percent_range(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{percent(low, 1)}-{percent(high, 1)}"


def plain_types(value: Any) -> Any:
    """JSON types only: infinities as text, since JSON has none."""
    if isinstance(value, Mapping):
        return {str(k): plain_types(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_types(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
