"""Read the `results.json` files of finished runs, arrange the runs as table rows, and assign a baseline to each run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superglobal.errors import InputError
from superglobal.reporting.ablations import ABLATION_SETTINGS, ABLATIONS
from superglobal.reporting.results import FORMAT, METRICS, TEST_MARK, main_protocol, main_scores, metric_key
from superglobal.reranking.registry import rerank_label
from superglobal.utils.io import EXPORT, read_json, walk

# Prefixes of the settings that get no column in a table. Some do not affect the scores; the others are shown by another
# column or by the name of the row.
_HIDDEN_SETTINGS = (
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
# Settings of a data set that get a column in a table, because the name of the data set does not show them.
_DATASET_SETTINGS = ("database", "max_side", "solution", "table", "landmarks", "seed", "neighbors", "votes")
_OBJECTS = ("counts", "seconds", "about", "protocol", "versions", "location")
_REQUIRED_KEYS = ("ablation", "dataset", "weights", "status", "metrics", "config")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read every `results.json` below a folder.

    Returns:
        The contents of the files, in the order of the jobs of a sweep. Two keys are added to each result: `folder` is
        the absolute path of the run's folder, and `run` is the path of the run's folder relative to the folder that was
        searched.

    Raises:
        InputError: the folder contains no result, a folder in it cannot be listed, or a result is damaged.
    """
    results = [
        {**read_result(path), "run": path.parent.relative_to(folder).as_posix(), "folder": path.parent.resolve()}
        for path in sorted(_result_files(folder), key=_job_order)
    ]
    if not results:
        raise InputError(f"{folder}: contains no results.json; give the folder that eval.py printed")
    return results


def _result_files(folder: Path) -> list[Path]:
    """Return the paths of all `results.json` below a folder."""
    return [directory / "results.json" for directory, _, files in walk(folder) if "results.json" in files]


def read_result(path: Path) -> dict[str, Any]:
    """Read one `results.json`.

    Raises:
        InputError: the file is missing or damaged, or has another format version.
    """
    try:
        result = read_json(path)
        version = result["format"]
        missing = [key for key in _REQUIRED_KEYS if key not in result]
        if version == FORMAT and not missing:
            _validate(result)
    except (OSError, AttributeError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: missing, damaged, or not a result of eval.py ({error!r}); run eval.py again"
        ) from error
    if version != FORMAT:
        raise InputError(f"{path}: format {version!r}, expected {FORMAT!r}; run eval.py again")
    if missing:
        raise InputError(f"{path}: damaged, the keys {', '.join(missing)} are missing; run eval.py again")
    return result


def _validate(result: Mapping[str, Any]) -> None:
    """Check the types of those values of a `results.json` on which tables depend.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: a value is missing, has another type, or is out of range.
    """
    parts = [result["metrics"], result["config"], *(result.get(key, {}) for key in _OBJECTS)]
    parts += [result["config"].get(key, {}) for key in ("dataset", "distractors", "pooling", "rerank", "index")]
    if not all(isinstance(part, dict) for part in parts):
        raise TypeError(f"expected objects for metrics, config, {', '.join(_OBJECTS)} and the sections of config")
    texts = [*(result[key] for key in ("ablation", "dataset", "status")), *result.get("location", {}).values()]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("expected texts for ablation, dataset, status and location")
    numbers = [*result.get("seconds", {}).values(), *result.get("counts", {}).values()]
    for stage, metrics in result["metrics"].items():
        if not all(isinstance(values, dict) for values in metrics.values()):
            raise TypeError(f"metrics.{stage}: expected objects")
        scores = [score for score in main_scores(metrics).values() if score is not None]
        if not all(0 <= score <= 1 for score in scores):
            raise ValueError(f"metrics.{stage}: expected numbers from 0 to 1")
        numbers += metrics.get("queries", {}).values()
        for protocol, (low, high) in metrics.get("interval", {}).items():
            numbers += [main_scores(metrics)[protocol], low, high]
    if not all(isinstance(number, int | float | None) for number in numbers):
        raise TypeError("expected numbers for seconds, counts, queries and intervals")


def _job_order(path: Path) -> tuple[str, int, str]:
    """Return a key that sorts the `results.json` files of a sweep by job number, so that job 10 follows job 9.

    Args:
        path: path of a `results.json`. The name of its folder begins with the job number.
    """
    number = path.parent.name.split("_")[0]
    return path.parent.parent.as_posix(), int(number) if number.isdecimal() else -1, path.as_posix()


def read_all(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Read every `results.json` below one or more folders. A file below several of the folders is read only once.

    Returns:
        The results, in the form of `read_results`. With several folders, `run` is relative to the innermost folder
        that contains all results.

    Raises:
        InputError: a folder contains no result, or a result is damaged.
    """
    if len(folders) == 1:
        return read_results(folders[0])
    results = [result for folder in dict.fromkeys(folders) for result in read_results(folder)]
    common = Path(os.path.commonpath([result["folder"] for result in results]))
    unique = {r["folder"]: r | {"run": r["folder"].relative_to(common).as_posix()} for r in results}
    return list(unique.values())


@dataclass(frozen=True)
class RunRow:
    """One run, as a row of a table."""

    result: dict[str, Any]
    weights: str  # short name of the weights, different from the names of all other weights in the table
    name: str  # row of the ablation table, or path of the run
    settings: dict[str, str]  # values of the settings in which the rows differ
    baseline: dict[str, Any] | None  # result of the baseline, which may be this run; None for a run without metrics


def run_rows(results: Sequence[dict[str, Any]]) -> list[RunRow]:
    """Return one row per run, sorted by data set, weights and ablation row.

    Rows that are equal in all three keep the order of `results`.
    """
    order = {name: i for i, name in enumerate(ABLATIONS)}
    results = _complete_weights(results)
    weights = list(dict.fromkeys(str(result["weights"]) for result in results))
    short_names = _short_names(weights)
    results = sorted(
        results,
        key=lambda r: (r["dataset"], weights.index(str(r["weights"])), order.get(r["ablation"], len(order))),
    )
    settings = [flatten(result["config"]) for result in results]
    _merge_rerank_settings(settings, results)
    is_ablation = [result["ablation"] in order for result in results]
    # In an ablation table the settings of the modules need no columns, because the names of the rows show them.
    columns = _differing_settings(settings, hidden=ABLATION_SETTINGS if all(is_ablation) else ())
    baselines: dict[tuple[str, ...], dict[str, Any]] = {}
    rows = []
    for result, own_settings, in_ablation in zip(results, settings, is_ablation, strict=True):
        name = result["ablation"] or result["run"]
        # Mark results whose settings were chosen on a test set in every table.
        name += "".join(f" (tuned on {images})" for images in result.get("tuned_on", ()) if images.endswith(TEST_MARK))
        values = {key: str(own_settings.get(key, "")) for key in columns}
        others = [value for key, value in values.items() if key not in ABLATION_SETTINGS]
        # The baseline is the first run on a data set. In an ablation table there is one baseline for each combination
        # of weights and other settings.
        key = (result["dataset"], values.get("dataset.database", ""))
        if in_ablation:
            key = (result["dataset"], str(result["weights"]), *others)
        baseline = baselines.setdefault(key, result) if result["metrics"] else None
        rows.append(RunRow(result, short_names[str(result["weights"])], name, values, baseline))
    return rows


def _complete_weights(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the results, with the name of the weights filled in for runs without metrics.

    These runs loaded no network, so the name is copied from a run with metrics and the same network settings.
    """

    def settings(result: Mapping[str, Any]) -> str:
        return json.dumps([result["config"].get(key) for key in ("weights", "backbone", "name")])

    known = {settings(result): result["weights"] for result in results if result["metrics"]}
    return [result | {"weights": known.get(settings(result), result["weights"])} for result in results]


def scores_in_percent(result: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the main metric of the last stage under each protocol, in percent.

    Args:
        result: content of `results.json`.

    Returns:
        Protocol -> score, or None if no query has a relevant image under this protocol; empty for a run without
        metrics. For metrics other than mAP, the name of the protocol begins with the name of the metric, such as
        "GAP all".
    """
    if not result["metrics"]:
        return {}
    metrics = result["metrics"][main_protocol(result)[0]]
    prefix = "" if metric_key(metrics) == "map" else f"{METRICS[metric_key(metrics)]} "
    return {f"{prefix}{p}": None if value is None else 100 * value for p, value in main_scores(metrics).items()}


def milliseconds_per_query(result: Mapping[str, Any]) -> float | None:
    """Return the time per query for search and reranking, in milliseconds; None if the run has no search time."""
    seconds, queries = result.get("seconds", {}), result.get("counts", {}).get("queries")
    return 1000 * (seconds["search"] + seconds.get("rerank", 0)) / queries if queries and "search" in seconds else None


def missing_text(result: Mapping[str, Any]) -> str:
    """Return the text that tables show for a run without metrics: "failed" or "n/a"."""
    return "failed" if result["status"] == "failed" else "n/a"


def _merge_rerank_settings(settings: list[dict[str, Any]], results: Sequence[Mapping[str, Any]]) -> None:
    """Replace the settings `rerank.*` with one setting `rerank` if the runs use several kinds of rerankers.

    Different kinds have different parameters, for which a table would need many mostly empty columns.

    Args:
        settings: flat settings of each run, modified in place.
        results: result of each run.
    """
    kinds = {values.get("rerank.kind", "superglobal") for values in settings if values.get("rerank.enabled")}
    if len(kinds) > 1:
        for values, result in zip(settings, results, strict=True):
            for key in [key for key in values if key.startswith("rerank.")]:
                del values[key]
            values["rerank"] = rerank_label(result["config"]["rerank"])


def _short_names(weights: Sequence[str]) -> dict[str, str]:
    """Return a short name for the weights of each run.

    The short name of exported weights is the name of their training run. If two short names would be equal, all weights
    keep their paths as names.

    Args:
        weights: paths or other names of the weights, as in `results.json`.

    Returns:
        Element of `weights` -> short name.
    """
    names = {path: Path(path).parent.name if path.endswith(f"/{EXPORT}") else path for path in weights}
    return names if len(set(names.values())) == len(names) else {path: path for path in weights}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as a flat dictionary: dotted name, such as "rerank.M" -> value.

    Args:
        config: nested settings.
        prefix: text to put before all names.
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _differing_settings(settings: Sequence[Mapping[str, Any]], hidden: Sequence[str]) -> list[str]:
    """Return the names of the settings that get a column in a table, because they differ between the runs.

    Args:
        settings: flat settings of each run.
        hidden: names of settings that get no column, in addition to `_HIDDEN_SETTINGS`.
    """
    keys = dict.fromkeys(key for values in settings for key in values)
    shown = [key for key in keys if not key.startswith(_HIDDEN_SETTINGS) and key not in hidden]
    shown += [key for name in _DATASET_SETTINGS if (key := f"dataset.{name}") in keys]
    return [key for key in shown if len({str(values.get(key)) for values in settings}) > 1]
