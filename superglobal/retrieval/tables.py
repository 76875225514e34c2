"""Results of many runs as one table: the ladder of the ablation, sweeps."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from superglobal.errors import InputError
from superglobal.files import EXPORT, write_atomically
from superglobal.retrieval.metrics import cluster_interval
from superglobal.retrieval.report import (
    FORMAT,
    METRICS,
    TEST_MARK,
    console,
    main_metric,
    main_protocol,
    main_scores,
    metric_key,
    percent,
)
from superglobal.retrieval.rerankers import describe

SWITCHES = ("gem_plus", "regional", "scale", "relup", "rerank")
LADDER: dict[str, tuple[bool, ...]] = {
    **{step: tuple(i < n for i in range(len(SWITCHES))) for n, step in enumerate(("gem", *SWITCHES))},
    **{f"no_{step}": tuple(other != step for other in SWITCHES) for step in SWITCHES},
}
"""Rows of the ablation in the paper's order, then each module left out: which of `SWITCHES` are on."""
# Settings that do not change a number, or that a row's own name says.
_UNTOLD = (
    "ablation",
    "paths.",
    "trainer.",
    "logger.",
    "pictures.",
    "index.backend",
    "index.compare",
    "dataset.",
    "distractors",
    "weights",
    "name",
    "pooling.tuned_on",
    "rerank.tuned_on",
)
# What a set of photos is, as far as its name does not say.
_OF_THE_SET = ("max_side", "solution", "table", "landmarks", "seed", "neighbours", "votes")
_ABLATED = ("pooling.gem_plus", "pooling.regional", "pooling.scale", "pooling.relup", "rerank.enabled", "rerank")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All `results.json` below a folder, each with its sub-folder as `place`.

    Raises:
        InputError: none there, or a damaged one.
    """
    rows = []
    for path in sorted(folder.rglob("results.json"), key=_job):
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


def _job(path: Path) -> tuple[str, int, str]:
    """Sorts a sweep's jobs by their numbers, so that 10 comes after 9."""
    number = path.parent.name.split("_")[0]
    return path.parent.parent.as_posix(), int(number) if number.isdecimal() else -1, path.as_posix()


def merge(folder: Path) -> list[dict[str, Any]]:
    """Merge all results below `folder` into one table: console, `table.md`, `table.csv`.

    A row is a run, its numbers those of its last stage in percent: mAP per protocol (mAP@100 and GAP under their
    names), mP@10, the 95 % interval of the main metric, and what that gains over the first row of the same data set and
    settings, with the interval of the gain (landmarks drawn with replacement; of the gain, the same queries in both
    rows). Every setting that differs between the runs has a column, so that no two rows look alike.

    Returns:
        The results, as read.
    """
    results = read_results(folder)
    columns, cells = _table(folder, results)
    text = io.StringIO()
    csv.writer(text).writerows([columns, *cells])
    write_atomically(folder / "table.csv", text.getvalue().encode())
    lines = [columns, ["---"] * len(columns), *cells]
    write_atomically(folder / "table.md", "".join("| " + " | ".join(line) + " |\n" for line in lines).encode())
    table = Table(title=escape(str(folder)))
    for i, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if i < 3 else "right")
    for line in cells:
        table.add_row(*map(escape, line))
    console().print(table)
    return results


def _table(folder: Path, results: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    order = {label: i for i, label in enumerate(LADDER)}
    networks = list(dict.fromkeys(str(result["weights"]) for result in results))
    shown = _short_names(networks)
    results = sorted(
        results, key=lambda r: (r["dataset"], networks.index(str(r["weights"])), order.get(r["label"], len(order)))
    )
    settings = [flat(result["config"]) for result in results]
    _join_kinds(settings, results)
    ladder = [result["label"] in order for result in results]
    # A row of the ablation says by its name which modules are on.
    differing = _differing(settings, hidden=_ABLATED if all(ladder) else ())
    names = list(dict.fromkeys(name for result in results for name in _numbers(result)))
    columns = ["data set", "weights", "run", *differing, *names, "gain", "95 % gain"]
    baselines: dict[tuple[str, ...], dict[str, Any]] = {}
    cells = []
    for result, setting, named in zip(results, settings, ladder, strict=True):
        run = result["label"] or result["place"]
        # A number that was made high by looking at it says so wherever it goes.
        run += "".join(f" (tuned on {photos})" for photos in result.get("tuned_on", ()) if photos.endswith(TEST_MARK))
        place = [result["dataset"], shown[str(result["weights"])], run]
        values = [str(setting.get(key, "")) for key in differing]
        numbers = _numbers(result)
        others = [value for name, value in zip(differing, values, strict=True) if name not in _ABLATED]
        if numbers:
            # Of an ablation each set of other settings has its own baseline; of a plain sweep the first row is it.
            key = (result["dataset"], str(result["weights"]), *others) if named else (result["dataset"],)
            gain = _gain(folder, result, baselines.setdefault(key, result))
        else:
            gain = ["n/a" if result["status"] != "failed" else "failed"] * 2
        cells.append([*place, *values, *(numbers.get(name, "" if numbers else gain[0]) for name in names), *gain])
    return columns, cells


def _join_kinds(settings: list[dict[str, Any]], results: Sequence[Mapping[str, Any]]) -> None:
    """Rerankings of several kinds have no parameters in common: one column says kind and parameters."""
    kinds = {setting.get("rerank.kind", "superglobal") for setting in settings if setting.get("rerank.enabled")}
    if len(kinds) > 1:
        for setting, result in zip(settings, results, strict=True):
            for key in [key for key in setting if key.startswith("rerank.")]:
                del setting[key]
            setting["rerank"] = describe(result["config"]["rerank"])


def _short_names(networks: Sequence[str]) -> dict[str, str]:
    """A training's export by the training's name, unless two would then be called the same."""
    names = {one: Path(one).parent.name if one.endswith(f"/{EXPORT}") else one for one in networks}
    return names if len(set(names.values())) == len(names) else {one: one for one in networks}


def _gain(folder: Path, result: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[str]:
    """What the main metric gains over the baseline, and the interval of that where the queries are the same."""
    gain = f"{100 * (main_metric(result) - main_metric(baseline)):+.2f}"
    if "interval" not in result["metrics"][main_protocol(result)[0]]:
        return [gain, ""]  # GAP is not a mean over queries
    (queries, landmarks, ap), (others, _, before) = (_per_query(folder, row) for row in (result, baseline))
    if result is baseline or queries != others:
        return [gain, ""]
    counted = ~np.isnan(ap - before)
    low, high = cluster_interval((ap - before)[counted], np.array(landmarks)[counted], result["config"].get("seed", 0))
    return [gain, "" if np.isnan(low) else f"{100 * low:+.1f} to {100 * high:+.1f}"]


def _per_query(folder: Path, result: Mapping[str, Any]) -> tuple[list[str], list[str], np.ndarray]:
    """Names and landmarks of the queries (each its own where there is none); (Q,) AP, NaN where not counted."""
    path = folder / result["place"] / "per_query.csv"
    column = " ".join((*main_protocol(result), "AP"))
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        ap = np.array([float(row[column] or "nan") for row in rows])
        return [row["query"] for row in rows], [row["landmark"] or f"query {i}" for i, row in enumerate(rows)], ap
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: missing or damaged ({error!r}); run eval.py again") from error


def _numbers(result: Mapping[str, Any]) -> dict[str, str]:
    if not result["metrics"]:
        return {}
    stage, protocol = main_protocol(result)
    last = result["metrics"][stage]
    # The usual mAP goes by its protocols alone; no other metric may be taken for it.
    metric = "" if metric_key(last) == "map" else f"{METRICS[metric_key(last)]} "
    numbers = {f"{metric}{name}": percent(score) for name, score in main_scores(last).items()}
    if "interval" in last:
        low, high = last["interval"][protocol]
        numbers[f"95 % {metric}{protocol}"] = f"{percent(low, 1)}-{percent(high, 1)}"
    for key, column in (("mp", "mP"), ("precision", "P")):
        numbers |= {f"{column}@10 {name}": percent(at["10"], 1) for name, at in last.get(key, {}).items()}
    return numbers | {f"top-1 {name}": percent(score) for name, score in last.get("top1", {}).items()}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _differing(settings: Sequence[Mapping[str, Any]], hidden: Sequence[str]) -> list[str]:
    """Names of the settings that are not the same everywhere and stand in no other column."""
    keys = dict.fromkeys(key for setting in settings for key in setting)
    told = [key for key in keys if not key.startswith(_UNTOLD) and key not in hidden]
    told += [key for name in _OF_THE_SET if (key := f"dataset.{name}") in keys]
    return [key for key in told if len({str(setting.get(key)) for setting in settings}) > 1]
