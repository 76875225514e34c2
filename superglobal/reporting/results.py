"""Write the results of one run to files, and print them. The module `tables` compares several runs.

The folder of a run contains `results.json` (metrics, settings, fingerprints, versions and times), `per_query.csv` (AP
of each query in each stage), and `rankings.npz` (ids and scores of the ranked images). `rankings.csv` and
`rankings.json` contain the names and scores of the top images of the last stage.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from superglobal.errors import printable
from superglobal.metrics.revisited import Result, RetrievalResult
from superglobal.reranking.registry import rerank_label
from superglobal.utils.escape import csv_cell, markdown
from superglobal.utils.io import write_atomically, write_text
from superglobal.utils.provenance import versions

UNREADABLE = "unreadable.txt"
"""Name of the file that lists the images that were left out, with the reasons."""
FORMAT = "superglobal-result-2"
TEST_MARK = "(test set)"
"""Suffix that the name of a test set has in the setting `tuned_on`."""
METRICS = {"map": "mAP", "mAP@100": "mAP@100", "GAP": "GAP"}
"""Key of a main metric in `results.json` -> name of the metric in tables. Each result has one of these metrics."""
_MAX_LISTED, _MAX_ROWS = 100, 500_000  # maximum numbers of rows in rankings.csv: per query, and in total
_JUNK_DROPPED = "removed before reranking, with a separate list for each protocol"
_WHITENING = {"center": "whitening: subtracted the mean", "pca": "whitening: PCA"}
Stages = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Stage ("search", "rerank") -> (scores, ids), each of shape (Q, k), best first."""


@dataclass(frozen=True)
class Names:
    """Names of the queries and the database images of a run, and the landmarks of the queries."""

    queries: Sequence[str]
    database: Sequence[str]  # including distractors
    clusters: Sequence[str] | None  # landmark of each query; None if unknown


def summarize(
    config: Mapping[str, Any],
    about: Mapping[str, Any],
    names: Names,
    results: Mapping[str, Result],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Return the content of `results.json` for a run that succeeded.

    Args:
        config: settings of the run as nested dictionaries of JSON types.
        about: description of the run: weights, network, fingerprints and device.
        names: names of the queries and of the database images. Only the number of queries and the number of images are
            stored.
        results: stage -> metrics; empty if the data set has no labels.
        seconds: stage -> duration in seconds.
    """
    dataset = config["dataset"]
    # Descriptors that the user provides come without a network, and it is not known how their images were resized.
    extracted = "network" in about
    definition = next(iter(results.values())).definition if results else RetrievalResult.definition
    header = _header(config)
    for key in ("unreadable", "skipped"):  # images of the data set, and distractors
        header["dataset"] += f" ({about[key]} {key})" if about.get(key) else ""
    drops_junk = config["rerank"]["enabled"] and config["rerank"]["junk"] == "drop"
    return {
        **header,
        "status": "ok",
        "weights": about["weights"],
        "protocol": {
            "crop_query": dataset["crop_query"] if extracted and dataset["kind"] == "revisited" else None,
            "max_side": dataset["max_side"] if extracted else None,
            "min_side": about["network"]["min_side"] if extracted else None,
            **definition,
            **({"junk": _JUNK_DROPPED} if drops_junk else {}),
        },
        "counts": {"queries": len(names.queries), "database": len(names.database) - about.get("skipped", 0)},
        "metrics": {stage: {k: v for k, v in r.to_dict().items() if k != "ap"} for stage, r in results.items()},
        "seconds": dict(seconds),
        "about": dict(about),
        "versions": versions(),
    }


def _header(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of `results.json` that depend only on the settings of a run, not on the results."""
    dataset, distractors = config["dataset"], config["distractors"]
    name = dataset["name"]
    if dataset["kind"] == name == "folder" and dataset["database"]:
        name = (
            printable(Path(dataset["database"]).resolve().name) or name
        )  # Every image folder of a user is a data set of its own, so the result shows the folder's name.
    name += f"+{distractors['name']}" if distractors["name"] else ""
    if dataset["kind"] == "revisited" and not dataset["crop_query"]:
        name += " (uncropped)"
    if config["index"]["kind"] != "flat":
        name += f" ({config['index']['kind']}, approximate)"
    return {
        "format": FORMAT,
        "ablation": config["ablation"] or "",
        "dataset": name,
        "role": dataset["role"],
        "tuned_on": tuned_on(config),
        "weights": config["weights"],
        "metrics": {},
        "config": dict(config),
    }


def tuned_on(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the image sets on which `superglobal tune` chose the settings of a run.

    Args:
        config: settings of the run as nested dictionaries.

    Returns:
        Names of the sets for pooling and reranking; empty if no settings were tuned.
    """
    return sorted({group["tuned_on"] for group in (config["pooling"], config["rerank"]) if group.get("tuned_on")})


def main_metric(summary: Mapping[str, Any]) -> float:
    """Return the main metric of the last stage, from 0 to 1; NaN if the run has no metrics.

    Depending on the data set, it is mAP (of the Medium protocol if there are several protocols), mAP@100 or GAP.

    Args:
        summary: content of `results.json`.
    """
    if not summary["metrics"]:
        return math.nan
    stage, protocol = main_protocol(summary)
    value = main_scores(summary["metrics"][stage])[protocol]
    return math.nan if value is None else value


def main_protocol(summary: Mapping[str, Any]) -> tuple[str, str]:
    """Return the last stage of a run, and the main protocol: "medium" if the metrics have this protocol, else "all".

    Args:
        summary: content of the `results.json` of a run with metrics.
    """
    stage = list(summary["metrics"])[-1]
    return stage, "medium" if "medium" in main_scores(summary["metrics"][stage]) else "all"


def metric_key(metrics: Mapping[str, Any]) -> str:
    """Return the key of the main metric, which is a key of `METRICS`.

    Args:
        metrics: metrics of one stage in `results.json`.
    """
    return next(key for key in METRICS if key in metrics)


def main_scores(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the main metric of a stage under each protocol.

    Args:
        metrics: metrics of one stage in `results.json`.

    Returns:
        Protocol -> value from 0 to 1, or None if no query has a relevant image under this protocol.
    """
    return metrics[metric_key(metrics)]


def write_result(
    folder: Path, summary: Mapping[str, Any], results: Mapping[str, Result], stages: Stages, names: Names
) -> None:
    """Write the result files of a run.

    `results.json` is written last, so that an interrupted run has no `results.json`.

    Args:
        folder: folder of the run.
        summary: content of `results.json`, from `summarize`.
        results: stage -> metrics; empty if the data set has no labels.
        stages: scores and ids of each stage.
        names: names of the queries and of the database images.
    """
    arrays: dict[str, Any] = {
        f"{stage}_{kind}": a for stage, pair in stages.items() for kind, a in zip(("scores", "ids"), pair, strict=True)
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(folder / "rankings.npz", buffer.getvalue())
    _write_rankings(folder, stages, names)
    if results:
        _write_per_query(folder, results, names)
    _write_summary(folder, summary)


def write_status(folder: Path, config: Any, status: str, reason: str) -> None:
    """Write the `results.json` of a run without metrics.

    Args:
        folder: folder of the run.
        config: settings of the run as nested dictionaries of JSON types.
        status: "n/a" for an ablation row that does not apply to the backbone, or "failed" for a run that raised an
            error.
        reason: explanation for the user.
    """
    _write_summary(folder, {**_header(config), "status": status, "reason": reason})


def write_unreadable(folder: Path, unreadable: Sequence[tuple[Path, str]]) -> None:
    """Write the path and the reason of each image that was left out to `unreadable.txt`, if there are any."""
    if unreadable:
        lines = (f"{printable(str(path))}\t{printable(reason)}\n" for path, reason in unreadable)
        write_text(folder / UNREADABLE, "".join(lines))


def unreadable_text(folder: Path, count: int) -> str:
    """Return a note about the images that `write_unreadable` has listed in a folder."""
    return f"left out {count} images that cannot be read; {folder / UNREADABLE} lists them"


def _write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    # Relative paths in the settings are relative to the current folder. Other folders may have to be found again after
    # the results were moved.
    summary = {**summary, "location": {"cwd": os.getcwd(), "folder": str(folder.resolve())}}
    write_atomically(folder / "results.json", json.dumps(plain_types(summary), indent=1).encode())


def modules_text(summary: Mapping[str, Any]) -> str:
    """Return a text that describes the whitening, the pooling modules and the reranking that a run used.

    Args:
        summary: content of `results.json`.
    """
    rerank = summary["config"]["rerank"]
    text = f"rerank {rerank_label(rerank)}" if rerank["enabled"] else "no rerank"
    whitening = summary["about"].get("whitening")
    if whitening is not None:
        text = f"{_WHITENING[whitening['kind']]} of {whitening['rows']} database images; {text}"
    network = summary["about"].get("network")
    if network is None:
        return text
    pooling = network["pooling"]
    modules = [name for name in ("gem_plus", "regional", "scale") if pooling[name]]
    modules += [] if pooling["relup"] == "off" else [f"relup {pooling['relup']}"]
    return f"pooling: {', '.join(modules) or 'gem, no modules'}; {text}"


def print_result(summary: Mapping[str, Any], folder: Path) -> None:
    """Print the metrics of a run, the modules that were on, and notes that help to interpret the metrics.

    The notes are the image sizes, the accuracy of an approximate search, the image sets on which settings were tuned,
    labels that may be misspelled, and the numbers of queries without a score and of images that were left out.

    Args:
        summary: content of `results.json`.
        folder: folder of the run, which is printed at the end.
    """
    if summary["metrics"]:
        counts = summary["counts"]
        by_protocol = list(summary["metrics"].values())[-1]["queries"]
        scored = ", ".join(f"{name} {count}" for name, count in by_protocol.items())
        scored = scored if len(set(by_protocol.values())) > 1 else str(max(by_protocol.values()))
        fewer = min(by_protocol.values()) < counts["queries"]
        queries = f"{counts['queries']} queries" + (f" ({scored} scored)" if fewer else "")
        size = f"{queries}, {counts['database']} images"
        print_metrics(f"{summary['dataset']}: {size}, weights {summary['weights']}", summary["metrics"])
    lines = [modules_text(summary)]
    if summary["protocol"]["min_side"] is not None:
        lines.append(image_sizes_text(summary["protocol"]))
    if "index" in summary["about"]:
        lines.append(approximation_text(summary["about"]["index"]))
    if summary["tuned_on"]:
        lines.append(f"settings tuned on {', '.join(summary['tuned_on'])}")
    lines += summary["about"].get("notes", [])
    if summary["about"].get("unreadable"):
        lines.append(unreadable_text(folder, summary["about"]["unreadable"]))
    if summary["about"].get("skipped"):
        lines.append(
            f"{summary['about']['skipped']} distractors are missing or corrupt and were not ranked; skipped.txt in "
            "their descriptor store lists them"
        )
    lines.append("time: " + ", ".join(f"{stage} {value:.2f} s" for stage, value in summary["seconds"].items()))
    console().print("\n".join([*lines, f"results in {folder}"]), soft_wrap=True, highlight=False, markup=False)


def cosine_texts(stages: Stages, stage: str, query: int, count: int) -> list[str]:
    """Return the cosine similarities to a query of the first `count` results of a stage, such as "0.734".

    Scores of rerankers are on other scales, which differ between queries, and may exceed 1. People read a cosine
    similarity more easily. The text is empty for a result that the first search did not return, and for the id -1, with
    which an approximate index fills up short lists.
    """
    scores, ids = stages["search"]
    cosines = dict(zip(ids[query].tolist(), scores[query].tolist(), strict=True))
    return [f"{cosines[i]:.3f}" if i >= 0 and i in cosines else "" for i in stages[stage][1][query, :count].tolist()]


def print_answers(names: Names, stages: Stages, queries: int = 10, results: int = 5) -> None:
    """Print the first results of the first queries, with their cosine similarities.

    Args:
        names: names of the queries and the database images.
        stages: scores (Q, k) and database ids (Q, k), best first, by stage. The order of the last stage is printed.
        queries: maximum number of queries shown.
        results: maximum number of results shown per query.
    """
    stage = list(stages)[-1]
    order = "after reranking" if stage == "rerank" else "best first"
    lines = [f"first results, {order}: rank, cosine similarity of the descriptors, image"]
    for query in range(min(queries, len(names.queries))):
        lines.append(f"{names.queries[query]}:")
        texts = cosine_texts(stages, stage, query, results)
        found = zip(texts, stages[stage][1][query, :results].tolist(), strict=True)
        lines += [f"  {rank}  {text:>6}  {names.database[i]}" for rank, (text, i) in enumerate(found, 1) if i >= 0]
    if len(names.queries) > queries:
        lines.append(f"... and {len(names.queries) - queries} more queries; rankings.csv has the results of all")
    console().print("\n".join(map(printable, lines)), soft_wrap=True, highlight=False, markup=False)


def image_sizes_text(protocol: Mapping[str, Any]) -> str:
    """Return a text that says how images were resized. Only results with the same size limits are comparable.

    Args:
        protocol: entry "protocol" of `results.json`, which contains the limits `max_side` and `min_side`.
    """
    shrunk = f"shrunk to a longer side of {protocol['max_side']} px" if protocol["max_side"] else "not shrunk"
    if protocol["min_side"] <= 1:
        return f"images: {shrunk}"
    return f"images: {shrunk}; enlarged to a shorter side of {protocol['min_side']} px if smaller"


def print_metrics(title: str, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table of metrics in percent, with one row per stage and protocol.

    Args:
        title: title of the table.
        metrics: stage -> metrics, as in `results.json`.
    """
    rows = [
        {"stage": stage, "protocol": protocol, **metric_cells(values, protocol)}
        for stage, values in metrics.items()
        for protocol in main_scores(values)
    ]
    print_table(title, list(rows[0]), [list(row.values()) for row in rows], left=2)


def metric_cells(metrics: Mapping[str, Any], protocol: str) -> dict[str, str]:
    """Return the cells of a table row for one stage and protocol: column -> text.

    Args:
        metrics: metrics of the stage, as in `results.json`.
        protocol: protocol of the row.
    """
    cells = {METRICS[metric_key(metrics)]: percent(main_scores(metrics)[protocol])}
    if "GAP_landmarks_only" in metrics:
        cells["GAP, landmarks only"] = percent(metrics["GAP_landmarks_only"][protocol])
        cells["top-1"] = percent(metrics["top1"][protocol])
    if "interval" in metrics:
        cells["95 %"] = percent_range(*metrics["interval"][protocol])
    for key, column in (("mp", "mP"), ("precision", "P")):
        cells |= {f"{column}@{k}": percent(v, 1) for k, v in metrics.get(key, {}).get(protocol, {}).items()}
    for key, value in metrics.get("position", {}).get(protocol, {}).items():
        cells[f"{key} position"] = "-" if value is None else f"{value:.1f}"
    cells["queries"] = str(metrics["queries"][protocol])
    if "with_landmark" in metrics:
        cells["with landmark"] = str(metrics["with_landmark"][protocol])
    return cells


def approximation_text(index: Mapping[str, Any]) -> str:
    """Return a text about an approximate search: the settings of the index, and the differences from exact search.

    Args:
        index: settings and accuracy of the index, the entry "index" under "about" in `results.json`.
    """
    text = f"approximate search: {', '.join(f'{name} {value}' for name, value in index['settings'].items())}"
    if "compared_to_exact" not in index:
        return text
    exact = index["compared_to_exact"]
    recall = f"recall@{exact['k']} {exact['recall']:.4f} (minimum {exact['min_recall']:.4f})"
    text += f"\ncompared to exact search of {exact['queries']} queries: {recall}"
    for key, metric in METRICS.items():
        for protocol, value in exact.get(f"{key}_difference", {}).items():
            text += "" if value is None else f", {protocol} {metric} {100 * value:+.2f}"
    return text if any(f"{key}_difference" in exact for key in METRICS) else f"{text}; metrics were not compared"


def _write_rankings(folder: Path, stages: Stages, names: Names) -> None:
    """Write the names and scores of the top results of the last stage to `rankings.csv` and `rankings.json`."""
    scores, ids = list(stages.values())[-1]
    depth = min(_MAX_LISTED, max(1, _MAX_ROWS // len(ids)))
    rankings, rows = [], []
    for number, (row_scores, row_ids) in enumerate(zip(scores[:, :depth], ids[:, :depth], strict=True)):
        row_scores, row_ids = row_scores[row_ids >= 0], row_ids[row_ids >= 0]
        images = [names.database[i] for i in row_ids]
        values = [round(float(s), 6) if math.isfinite(s) else None for s in row_scores]
        # Several queries may be boxes in the same image, so only the number identifies a query.
        query = names.queries[number]
        results = [{"image": image, "score": value} for image, value in zip(images, values, strict=True)]
        rankings.append({"number": number, "query": query, "results": results})
        rows += [
            [number, query, rank, image, "" if value is None else value]
            for rank, (image, value) in enumerate(zip(images, values, strict=True), 1)
        ]
    text = csv_text([["number", "query", "rank", "image", "score"], *rows])
    write_text(folder / "rankings.csv", text)
    write_atomically(folder / "rankings.json", json.dumps(rankings, indent=1).encode())


def _write_per_query(folder: Path, results: Mapping[str, Result], names: Names) -> None:
    """Write `per_query.csv`, with one row per query, and one column of scores per stage and protocol."""
    columns = {f"{stage} {name}": v for stage, result in results.items() for name, v in result.per_query().items()}
    landmarks = names.clusters if names.clusters is not None else [""] * len(names.queries)
    rows = [
        [name, landmarks[query], *("" if v != v else v for v in values)]
        for query, (name, *values) in enumerate(zip(names.queries, *columns.values(), strict=True))
    ]
    write_text(folder / "per_query.csv", csv_text([["query", "landmark", *columns], *rows]))


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows of cells as CSV text. Texts that a spreadsheet would take for formulas are escaped."""
    text = io.StringIO()
    csv.writer(text).writerows(map(csv_cell, row) for row in rows)
    return text.getvalue()


def markdown_text(
    columns: Sequence[str], rows: Iterable[Sequence[str]], italic_rows: Iterable[Sequence[str]] = ()
) -> str:
    """Return a table as Markdown text.

    Args:
        columns: names of the columns, which form the header of the table.
        rows: text of each cell, row by row.
        italic_rows: text of each cell of the last rows, which are set in italics.
    """
    lines = [list(map(markdown, columns)), ["---"] * len(columns), *(map(markdown, row) for row in rows)]
    lines += [[f"*{markdown(cell)}*" if cell else "" for cell in row] for row in italic_rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """Print a table on the console. The first `left` columns are left-aligned, and the others are right-aligned."""
    table = Table(title=escape(title))
    for i, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if i < left else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    console().print(table)


def console() -> Console:
    """Return a rich console. If the output is not a terminal, the console has 160 columns instead of rich's 80."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=160)


def percent(value: float | None, digits: int = 2) -> str:
    """Return a number from 0 to 1 as text in percent, without the percent sign; None becomes "-"."""
    return "-" if value is None else f"{100 * value:.{digits}f}"


def percent_range(low: float | None, high: float | None) -> str:
    """Return an interval in the range from 0 to 1 as text in percent, such as "61.2-66.0"; None becomes "-"."""
    return "-" if low is None or high is None else f"{percent(low, 1)}-{percent(high, 1)}"


def plain_types(value: Any) -> Any:
    """Convert a nested value to JSON types. Infinities and NaN become strings, because JSON does not support them."""
    if isinstance(value, Mapping):
        return {str(k): plain_types(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_types(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
