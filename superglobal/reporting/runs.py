"""Results of many runs: read, put into the order of a table, and each with the run that it is compared with."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.errors import InputError
from superglobal.metrics.revisited import cluster_interval
from superglobal.reporting.results import FORMAT, METRICS, TEST_MARK, main_protocol, main_scores, metric_key
from superglobal.reranking.registry import rerank_label
from superglobal.utils.io import EXPORT

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
    "figures.",
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
_OF_THE_SET = ("database", "max_side", "solution", "table", "landmarks", "seed", "neighbors", "votes")
_ALWAYS = ("label", "dataset", "weights", "status", "metrics", "config")
"""What every result has, also one without numbers."""
ABLATED = ("pooling.gem_plus", "pooling.regional", "pooling.scale", "pooling.relup", "rerank.enabled", "rerank")
"""The settings that an ablation's rows differ in."""


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All `results.json` below a folder, each with its sub-folder as `place` and the whole of it as `path`.

    Raises:
        InputError: none there, or a damaged one.
    """
    rows = [
        {**read_result(path), "place": path.parent.relative_to(folder).as_posix(), "path": path.parent.resolve()}
        for path in sorted(folder.rglob("results.json"), key=_job)
    ]
    if not rows:
        raise InputError(f"{folder}: no results.json in it; give the folder that eval.py printed")
    return rows


def read_result(path: Path) -> dict[str, Any]:
    """One `results.json`.

    Raises:
        InputError: not there, damaged, or of another version.
    """
    try:
        row = json.loads(path.read_bytes())
        found = row["format"]
        lacking = [name for name in _ALWAYS if name not in row]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: no results.json of eval.py, or damaged ({error!r}); run eval.py again") from error
    if found != FORMAT:
        raise InputError(f"{path}: format {found!r}, expected {FORMAT!r}; run eval.py again")
    if lacking:
        raise InputError(f"{path}: damaged, without {', '.join(lacking)}; run eval.py again")
    return row


def _job(path: Path) -> tuple[str, int, str]:
    """Sorts a sweep's jobs by their numbers, so that 10 comes after 9."""
    number = path.parent.name.split("_")[0]
    return path.parent.parent.as_posix(), int(number) if number.isdecimal() else -1, path.as_posix()


@dataclass(frozen=True)
class Compared:
    """A run among others: what tells it from them, and the run that it is compared with."""

    result: dict[str, Any]
    weights: str
    """As short as tells them apart."""
    run: str
    settings: dict[str, str]
    """Those that differ among the runs."""
    baseline: dict[str, Any] | None
    """None for a run without numbers; the first of its kind is its own."""


def read_all(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The results of several folders, each with its `place` below what the folders have in common.

    Raises:
        InputError: a folder without results, or a damaged one.
    """
    if len(folders) == 1:
        return read_results(folders[0])
    rows = [row for folder in dict.fromkeys(folders) for row in read_results(folder)]
    common = Path(os.path.commonpath([row["path"] for row in rows]))
    unique = {row["path"]: row | {"place": row["path"].relative_to(common).as_posix()} for row in rows}
    return list(unique.values())


def compared(results: Sequence[dict[str, Any]]) -> list[Compared]:
    """Runs in the order of a table: by data set, weights, ladder of the ablation, and as they come."""
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
    differing = _differing(settings, hidden=ABLATED if all(ladder) else ())
    baselines: dict[tuple[str, ...], dict[str, Any]] = {}
    rows = []
    for result, setting, named in zip(results, settings, ladder, strict=True):
        run = result["label"] or result["place"]
        # A number that was made high by looking at it says so wherever it goes.
        run += "".join(f" (tuned on {photos})" for photos in result.get("tuned_on", ()) if photos.endswith(TEST_MARK))
        values = {key: str(setting.get(key, "")) for key in differing}
        others = [value for name, value in values.items() if name not in ABLATED]
        # Of an ablation each set of other settings has its own baseline; of a plain sweep the first row is it.
        place = values.get("dataset.database", "")
        key = (result["dataset"], str(result["weights"]), *others) if named else (result["dataset"], place)
        baseline = baselines.setdefault(key, result) if result["metrics"] else None
        rows.append(Compared(result, shown[str(result["weights"])], run, values, baseline))
    return rows


def scores_of(result: Mapping[str, Any]) -> dict[str, float | None]:
    """The main metric of the last stage in percent; the usual mAP goes by its protocols alone, no other may be taken
    for it.
    """
    if not result["metrics"]:
        return {}
    last = result["metrics"][main_protocol(result)[0]]
    metric = "" if metric_key(last) == "map" else f"{METRICS[metric_key(last)]} "
    return {f"{metric}{p}": None if value is None else 100 * value for p, value in main_scores(last).items()}


def milliseconds(result: Mapping[str, Any]) -> float | None:
    """What a query takes: search and reranking; None where nothing was searched."""
    seconds, queries = result.get("seconds", {}), result.get("counts", {}).get("queries")
    return 1000 * (seconds["search"] + seconds.get("rerank", 0)) / queries if queries and "search" in seconds else None


def no_number(result: Mapping[str, Any]) -> str:
    """What stands in place of the numbers of a run that has none."""
    return "failed" if result["status"] == "failed" else "n/a"


def _join_kinds(settings: list[dict[str, Any]], results: Sequence[Mapping[str, Any]]) -> None:
    """Rerankings of several kinds have no parameters in common: one column says kind and parameters."""
    kinds = {setting.get("rerank.kind", "superglobal") for setting in settings if setting.get("rerank.enabled")}
    if len(kinds) > 1:
        for setting, result in zip(settings, results, strict=True):
            for key in [key for key in setting if key.startswith("rerank.")]:
                del setting[key]
            setting["rerank"] = rerank_label(result["config"]["rerank"])


def _short_names(networks: Sequence[str]) -> dict[str, str]:
    """A training's export by the training's name, unless two would then be called the same."""
    names = {one: Path(one).parent.name if one.endswith(f"/{EXPORT}") else one for one in networks}
    return names if len(set(names.values())) == len(names) else {one: one for one in networks}


def gain_interval(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> tuple[float, float] | None:
    """95 % interval of the main metric's gain, the mean over pairs (run, baseline), in percent; landmarks drawn with
    replacement, the same queries in all runs. None where the queries are not the same, or the metric is no mean over
    queries, or a run is its own baseline.
    """
    differences, names = [], None
    for result, baseline in pairs:
        if result is baseline or "interval" not in result["metrics"][main_protocol(result)[0]]:
            return None  # GAP is not a mean over queries
        (queries, landmarks, ap), (others, _, before) = (_per_query(row) for row in (result, baseline))
        if queries != others or names not in (None, queries):
            return None
        names = queries
        differences.append(ap - before)
    difference = np.mean(differences, axis=0)
    counted = ~np.isnan(difference)
    low, high = cluster_interval(
        difference[counted], np.array(landmarks)[counted], pairs[0][0]["config"].get("seed", 0)
    )
    return None if np.isnan(low) else (100 * float(low), 100 * float(high))


def _per_query(result: Mapping[str, Any]) -> tuple[list[str], list[str], np.ndarray]:
    """Names and landmarks of the queries (each its own where there is none); (Q,) AP, NaN where not counted."""
    path = result["path"] / "per_query.csv"
    column = " ".join((*main_protocol(result), "AP"))
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        ap = np.array([float(row[column] or "nan") for row in rows])
        return [row["query"] for row in rows], [row["landmark"] or f"query {i}" for i, row in enumerate(rows)], ap
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: missing or damaged ({error!r}); run eval.py again") from error


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
