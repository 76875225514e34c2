"""Compare runs query by query: compute confidence intervals of gains, and find queries that became better or worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.errors import InputError
from superglobal.metrics.revisited import cluster_interval
from superglobal.reporting.results import METRICS, csv_text, main_protocol, markdown_text, metric_key, print_table
from superglobal.utils.escape import markdown
from superglobal.utils.io import read_csv, write_text

_CORRECT = "correct"
_EQUAL = 1e-9
_SUMMARY = ("protocol", "queries", "won", "lost", "equal", "mean difference", "95 %")
_MAX_PRINTED = 10  # maximum number of won queries to print, and also of lost queries


@dataclass(frozen=True)
class PerQuery:
    """Scores of all queries in one stage (search or rerank) of a run."""

    queries: list[str]
    landmarks: list[str]  # landmark of each query; for an unknown landmark, a name that no other query has
    measure: str  # name of the score: "AP", or "correct" (1 or 0) for recognition
    scores: dict[str, np.ndarray]  # protocol -> (Q,) float64 from 0 to 1; NaN for queries that are not scored


def read_per_query(folder: Path, stage: str) -> PerQuery:
    """Read the scores of all queries in one stage of a run from its `per_query.csv`.

    Args:
        folder: folder of the run.
        stage: "search" or "rerank".

    Raises:
        InputError: the file is missing or damaged, or contains no scores of this stage.
    """
    path = folder / "per_query.csv"
    scores, measure = {}, "AP"
    try:
        columns = {name: list(values) for name, *values in zip(*read_csv(path), strict=True)}
        queries, landmarks = columns["query"], columns["landmark"]
        for name, values in columns.items():
            if name == f"{stage} {_CORRECT}":
                measure, protocol = _CORRECT, "all"
            elif name.startswith(f"{stage} ") and name.endswith(" AP"):
                protocol = name.removeprefix(f"{stage} ").removesuffix(" AP")
            else:
                continue
            scores[protocol] = np.array([float(value or "nan") for value in values])
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: missing or damaged ({error!r}); run eval.py again") from error
    if not scores:
        raise InputError(f"{path}: contains no scores of the stage {stage}; run eval.py again")
    return PerQuery(queries, [name or f"query {i}" for i, name in enumerate(landmarks)], measure, scores)


def gain_interval(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the gain in the main metric, averaged over pairs of runs.

    The interval is computed by a bootstrap that resamples landmarks with replacement.

    Args:
        pairs: pairs of a result and its baseline, each in the form that `runs.read_results` returns.

    Returns:
        (low, high) in percentage points; None if the runs have different queries, the metric is not a mean over
        queries, or a run is its own baseline.

    Raises:
        InputError: a `per_query.csv` is missing or damaged.
    """
    differences, first = [], None
    for result, baseline in pairs:
        if result is baseline or "interval" not in result["metrics"][main_protocol(result)[0]]:
            return None  # The metric GAP has no interval, because it is not a mean over queries.
        runs, aps = [], []
        for run in (result, baseline):
            stage, protocol = main_protocol(run)
            runs.append(read_per_query(run["folder"], stage))
            if protocol not in runs[-1].scores:
                path = run["folder"] / "per_query.csv"
                raise InputError(f"{path}: damaged, the protocol {protocol} is missing; run eval.py again")
            aps.append(runs[-1].scores[protocol])
        first = first or runs[0]
        if any(run.queries != first.queries for run in runs):
            return None
        differences.append(aps[0] - aps[1])
    assert first is not None
    _, (low, high) = _mean_and_interval(
        np.mean(differences, axis=0), first.landmarks, pairs[0][0]["config"].get("seed", 0)
    )
    return None if np.isnan(low) else (100 * low, 100 * high)


def _mean_and_interval(
    differences: np.ndarray, landmarks: Sequence[str], seed: int
) -> tuple[float, tuple[float, float]]:
    """Compute the mean of differences, and its 95 % confidence interval by a bootstrap over landmarks.

    Args:
        differences: (Q,) difference of each query; NaN for queries that are not scored.
        landmarks: landmark of each query. The bootstrap resamples landmarks, because queries of the same landmark have
            similar scores.
        seed: seed of the bootstrap.

    Returns:
        The mean and the interval (low, high); all NaN if no query is scored.
    """
    counted = ~np.isnan(differences)
    if not counted.any():
        return float("nan"), (float("nan"), float("nan"))
    low, high = cluster_interval(differences[counted], np.array(landmarks)[counted], seed)
    return float(differences[counted].mean()), (float(low), float(high))


@dataclass(frozen=True)
class PairedComparison:
    """Scores of all queries in a result and in its baseline."""

    queries: Sequence[str]
    landmarks: Sequence[str]
    measure: str  # "AP" or "correct"
    main: str  # main protocol; `order`, `most_won` and `most_lost` use its scores
    scores: Mapping[str, np.ndarray]  # protocol -> (Q,) float64 from 0 to 1; NaN for queries that are not scored
    baseline_scores: Mapping[str, np.ndarray]
    seed: int  # seed of the bootstrap

    def difference(self, protocol: str | None = None) -> np.ndarray:
        """Return the score of each query minus its score in the baseline, (Q,) float64.

        Args:
            protocol: protocol of the scores; None for the main protocol.
        """
        protocol = protocol or self.main
        return self.scores[protocol] - self.baseline_scores[protocol]

    def order(self) -> np.ndarray:
        """Return the query indices by descending difference, (Q,) int64. Queries that are not scored are last."""
        return np.argsort(-self.difference(), kind="stable")

    def counts(self, protocol: str | None = None) -> dict[str, int]:
        """Count the queries that are "won" (better than in the baseline), "lost" (worse) and "equal".

        Args:
            protocol: protocol of the scores; None for the main protocol.
        """
        difference = self.difference(protocol)
        kinds = {"won": difference > _EQUAL, "lost": difference < -_EQUAL, "equal": np.abs(difference) <= _EQUAL}
        return {kind: int(mask.sum()) for kind, mask in kinds.items()}

    def most_won(self, limit: int) -> list[int]:
        """Return the indices of at most `limit` won queries, those with the largest gains, best first."""
        return self.order()[: min(limit, self.counts()["won"])].tolist()

    def most_lost(self, limit: int) -> list[int]:
        """Return the indices of at most `limit` lost queries, those with the largest losses, worst first."""
        counted = int((~np.isnan(self.difference())).sum())
        return self.order()[:counted][::-1][: min(limit, self.counts()["lost"])].tolist()

    def mean(self, protocol: str | None = None) -> tuple[float, tuple[float, float]]:
        """Return the mean difference, and its 95 % confidence interval (low, high) from a bootstrap over landmarks.

        All values are NaN if no query is scored.

        Args:
            protocol: protocol of the scores; None for the main protocol.
        """
        return _mean_and_interval(self.difference(protocol), self.landmarks, self.seed)


def read_comparison(
    folder: Path, result: Mapping[str, Any], baseline_folder: Path, baseline: Mapping[str, Any]
) -> PairedComparison:
    """Read the scores of all queries of a result and of its baseline. The scores are those of the last stage.

    Args:
        folder: folder of the result.
        result: content of the `results.json` in `folder`.
        baseline_folder: folder of the baseline.
        baseline: content of the `results.json` in `baseline_folder`.

    Returns:
        The comparison, with the protocols that both results have.

    Raises:
        InputError: a result has no scores per query, or the metrics, protocols or queries of the results differ.
    """
    for run_folder, run in ((folder, result), (baseline_folder, baseline)):
        if not run["metrics"]:
            reason = "evaluated without labels" if run["status"] == "ok" else f"status {run['status']}"
            raise InputError(f"{run_folder}: the result has no scores per query ({reason}); compare another result")
    (stage, main), (baseline_stage, _) = main_protocol(result), main_protocol(baseline)
    keys = metric_key(result["metrics"][stage]), metric_key(baseline["metrics"][baseline_stage])
    if keys[0] != keys[1]:
        raise InputError(
            f"{folder} has the metric {METRICS[keys[0]]}, and {baseline_folder} has {METRICS[keys[1]]}: the results "
            "are not comparable; expected the same metric"
        )
    scored, compared = read_per_query(folder, stage), read_per_query(baseline_folder, baseline_stage)
    if (scored.queries, scored.landmarks) != (compared.queries, compared.landmarks):
        raise InputError(
            f"{folder} ({result['dataset']}, {len(scored.queries)} queries) and {baseline_folder} "
            f"({baseline['dataset']}, {len(compared.queries)} queries) have different queries; compare results of the "
            "same queries"
        )
    common = [protocol for protocol in scored.scores if protocol in compared.scores]
    if main not in common:
        raise InputError(
            f"{folder} has the protocols {', '.join(scored.scores)}, and {baseline_folder} has "
            f"{', '.join(compared.scores)}: the results are not comparable; expected {main} in both"
        )
    return PairedComparison(
        scored.queries,
        scored.landmarks,
        scored.measure,
        main,
        {protocol: scored.scores[protocol] for protocol in common},
        {protocol: compared.scores[protocol] for protocol in common},
        result["config"].get("seed", 0),
    )


def write_comparison(target: Path, comparison: PairedComparison, folder: Path, baseline: Path) -> None:
    """Write a comparison to `queries.csv` and `queries.md`, and print the queries with the largest gains and losses.

    The files contain one row per query, sorted by descending difference. A row contains the score of the baseline, the
    score of the result and their difference under the main protocol, and the differences under the other protocols, all
    in percent.

    Args:
        target: folder into which the files are written.
        comparison: comparison to write.
        folder: folder of the result, shown in the title.
        baseline: folder of the baseline, shown in the title.
    """
    others = [protocol for protocol in comparison.scores if protocol != comparison.main]
    score = f"{comparison.main} {comparison.measure}"
    columns = ["number", "query", "landmark", f"baseline {score}", score, "difference"]
    columns += [f"{protocol} difference" for protocol in others]
    rows = [_query_row(comparison, query, others) for query in range(len(comparison.queries))]
    ordered = [rows[query] for query in comparison.order()]
    summary = [_summary_row(comparison, protocol) for protocol in (comparison.main, *others)]
    title = f"{folder} compared with {baseline}"
    text = "\n".join([f"{markdown(title)}\n", markdown_text(_SUMMARY, summary), markdown_text(columns, ordered)])
    write_text(target / "queries.csv", csv_text([columns, *ordered]))
    write_text(target / "queries.md", text)
    print_table(f"{title}: {comparison.measure} per query", _SUMMARY, summary)
    ends = {"most won": comparison.most_won(_MAX_PRINTED), "most lost": comparison.most_lost(_MAX_PRINTED)}
    for name, queries in ends.items():
        if queries:
            print_table(name, columns, [rows[query] for query in queries], left=3)


def _query_row(comparison: PairedComparison, query: int, others: Sequence[str]) -> list[str]:
    """Return the row of one query in `queries.csv`.

    Args:
        comparison: comparison of a result with its baseline.
        query: index of the query.
        others: protocols other than the main protocol.
    """
    scores = [scores[comparison.main][query] for scores in (comparison.baseline_scores, comparison.scores)]
    differences = [comparison.difference(protocol)[query] for protocol in (comparison.main, *others)]
    cells = [
        str(query),
        comparison.queries[query],
        comparison.landmarks[query],
        *(_cell(value, "") for value in scores),
    ]
    return [*cells, *(_cell(value, "+") for value in differences)]


def _summary_row(comparison: PairedComparison, protocol: str) -> list[str]:
    """Return the row of one protocol in the summary table. `_SUMMARY` contains the names of the columns."""
    counts, (mean, (low, high)) = comparison.counts(protocol), comparison.mean(protocol)
    interval = "" if np.isnan(low) else f"{100 * low:+.1f} to {100 * high:+.1f}"
    return [protocol, str(sum(counts.values())), *map(str, counts.values()), _cell(mean, "+"), interval]


def _cell(value: float, sign: str) -> str:
    return "-" if np.isnan(value) else f"{100 * value:{sign}.2f}"
