"""Read evaluation results for a model card, check that they belong to the weights of the model, and format them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from superglobal.errors import InputError
from superglobal.models.hub import CardResult
from superglobal.models.network import RetrievalNetwork, weights_digest
from superglobal.reporting import results as report
from superglobal.reporting.runs import read_result, read_results
from superglobal.utils.escape import markdown

_STAGES = {"search": "", "rerank": ", reranked"}


def read_card_results(paths: Sequence[str | Path], network: RetrievalNetwork) -> list[CardResult]:
    """Read evaluation results of a network for `superglobal.model_card`.

    Args:
        paths: `results.json` files written by `eval.py`, or folders that contain such files.
        network: network whose weights were evaluated; its other settings may differ from those of the evaluations.

    Returns:
        One `CardResult` per result.

    Raises:
        InputError: a result is missing, has no metrics, or was computed with other weights or without a network.
    """
    digest = weights_digest(network.state_dict())
    card_results = []
    for path in map(Path, paths):
        for source, summary in _read(path):
            if summary["status"] != "ok" or not summary["metrics"]:
                reason = "evaluated without labels" if summary["status"] == "ok" else f"status {summary['status']}"
                raise InputError(f"{source}: the result has no metrics ({reason}); leave it out")
            weights = summary["about"].get("network", {}).get("weights")
            if weights != digest:
                evaluated = f"the weights {weights[:12]}..." if weights else "your own descriptors, without a network"
                raise InputError(
                    f"{source}: the result was computed with {evaluated}; expected the weights {digest[:12]}...; leave "
                    "it out"
                )
            card_results.append(_card_result(summary))
    return card_results


def _read(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Read one result, or all results in a folder.

    Args:
        path: `results.json` file, or folder that contains such files.

    Returns:
        (path, content of `results.json`) of each result.
    """
    if path.is_dir():
        # Skip rows of an ablation table that do not apply to the backbone, such as ReLUP without a ResNet.
        return [(path / row["run"], row) for row in read_results(path) if row["status"] != "n/a"]
    return [(path, read_result(path))]


def _card_result(summary: Mapping[str, Any]) -> CardResult:
    """Return the content of the model card for one result: a table of metrics, notes, and metadata.

    Args:
        summary: content of `results.json`.
    """
    tuned_on = summary["tuned_on"]
    warning = f"**Settings tuned on {markdown(', '.join(tuned_on))}.**" if tuned_on else ""
    if any(name.endswith(report.TEST_MARK) for name in tuned_on):
        warning += " **These numbers are too optimistic for other images; do not compare them with other results.**"
    rows = [
        {"stage": stage, "protocol": protocol, **report.metric_cells(metrics, protocol)}
        for stage, metrics in summary["metrics"].items()
        for protocol in report.main_scores(metrics)
    ]
    columns = dict.fromkeys(rows[0], "")
    rows = [columns | {key: markdown(text) for key, text in row.items() if key in columns} for row in rows]
    notes = list(map(markdown, _notes(summary)))
    return CardResult(markdown(summary["dataset"]), warning, rows, notes, _entries(summary))


def _notes(summary: Mapping[str, Any]) -> list[str]:
    """Return lines of text that describe the settings on which the metrics depend, for the model card.

    Args:
        summary: content of `results.json`.
    """
    counts, protocol, versions = summary["counts"], summary["protocol"], summary["versions"]
    notes = [
        f"{counts['queries']} queries, {counts['database']} images; role of the set: {summary['role']}",
        _settings(summary),
        report.image_sizes_text(protocol),
    ]
    if protocol["crop_query"] is not None:
        notes.append(f"queries {'cropped to their boxes' if protocol['crop_query'] else 'not cropped'}")
    listed = ("crop_query", "max_side", "min_side")
    notes += [f"{key.replace('_', ' ')}: {value}" for key, value in protocol.items() if key not in listed]
    if "index" in summary["about"]:
        notes.append(report.approximation_text(summary["about"]["index"]).replace("\n", "; "))
    packages = [f"{name} {versions[name]}" for name in ("superglobal", "torch", "timm") if name in versions]
    return [*notes, f"versions: {', '.join(packages)}"]


def _entries(summary: Mapping[str, Any]) -> list[EvalResult]:
    """Return the metadata entries of the model card, one for each stage and protocol that has a score.

    Args:
        summary: content of `results.json`.
    """
    tuned = f"; settings tuned on {', '.join(summary['tuned_on'])}" if summary["tuned_on"] else ""
    entries = []
    for stage, metrics in summary["metrics"].items():
        metric = report.METRICS[report.metric_key(metrics)]
        for protocol, value in report.main_scores(metrics).items():
            if value is not None:
                entry = EvalResult(
                    task_type="image-retrieval",
                    dataset_type=summary["config"]["dataset"]["name"],
                    dataset_name=summary["dataset"],
                    metric_type=metric,
                    metric_name=f"{metric} {protocol}{_STAGES.get(stage, f', {stage}')}{tuned}",
                    metric_value=round(100 * value, 2),
                    metric_args={"settings": _settings(summary)},
                )
                entries.append(entry)
    return entries


def _settings(summary: Mapping[str, Any]) -> str:
    network = summary["about"]["network"]
    scales = ", ".join(f"{scale:g}" for scale in network["scales"])
    antialias = "with" if network["antialias"] else "without"
    return f"{report.modules_text(summary)}; scales {scales}, {antialias} antialias; {network['precision']}"
