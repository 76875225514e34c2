"""Two results query by query: which queries the one wins and loses against the other."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from superglobal.errors import InputError
from superglobal.metrics.revisited import cluster_interval
from superglobal.reporting.results import METRICS, console, main_protocol, metric_key
from superglobal.reporting.table_formats import csv_text, markdown_text
from superglobal.utils.io import write_atomically

_CORRECT = "correct"
_EQUAL = 1e-9
_SUMMARY = ("protocol", "queries", "won", "lost", "equal", "mean difference", "95 %")
_ON_CONSOLE = 10  # queries of either kind


@dataclass(frozen=True)
class PairedComparison:
    """Scores per query of a result and of the other that it is compared with; by protocol, NaN where not counted.

    Attributes:
        queries, landmarks: (Q,) names; a query without a known landmark is its own.
        measure: what is compared, "AP", or "correct" (1 or 0) in recognition.
        main: the protocol that queries are ordered by.
        scores, baseline_scores: protocol -> (Q,) in 0..1.
        seed: of the bootstrap.
    """

    queries: Sequence[str]
    landmarks: Sequence[str]
    measure: str
    main: str
    scores: Mapping[str, np.ndarray]
    baseline_scores: Mapping[str, np.ndarray]
    seed: int

    def difference(self, protocol: str | None = None) -> np.ndarray:
        """(Q,) `scores` minus `baseline_scores`, of the main protocol by default."""
        protocol = protocol or self.main
        return self.scores[protocol] - self.baseline_scores[protocol]

    def order(self) -> np.ndarray:
        """(Q,) numbers of the queries, most won first, not counted last; equal ones in the set's order."""
        return np.argsort(-self.difference(), kind="stable")

    def counts(self, protocol: str | None = None) -> dict[str, int]:
        """How many queries are won, lost and equal."""
        difference = self.difference(protocol)
        signs = {"won": difference > _EQUAL, "lost": difference < -_EQUAL, "equal": np.abs(difference) <= _EQUAL}
        return {name: int(one.sum()) for name, one in signs.items()}

    def mean(self, protocol: str | None = None) -> tuple[float, tuple[float, float]]:
        """Mean difference, and its 95 % interval with whole landmarks drawn; NaN for what cannot be said."""
        difference = self.difference(protocol)
        counted = ~np.isnan(difference)
        if not counted.any():
            return float("nan"), (float("nan"), float("nan"))
        labels = np.array(self.landmarks)[counted]
        return float(difference[counted].mean()), cluster_interval(difference[counted], labels, self.seed)


def read_comparison(folder: Path, ours: Mapping[str, Any], other: Path, theirs: Mapping[str, Any]) -> PairedComparison:
    """Compare the last stages of two results.

    folder, other: of the results; ours, theirs: their `results.json`.
    Raises InputError for results without scores, by other metrics, or of other queries.
    """
    for place, one in ((folder, ours), (other, theirs)):
        if not one["metrics"]:
            raise InputError(f"{place}: no scores per query (no labels, or status {one['status']}), nothing to compare")
    (stage, main), (stage_2, _) = main_protocol(ours), main_protocol(theirs)
    keys = [metric_key(one["metrics"][s]) for one, s in ((ours, stage), (theirs, stage_2))]
    if keys[0] != keys[1]:
        raise InputError(f"{folder} is scored by {METRICS[keys[0]]}, {other} by {METRICS[keys[1]]}: not comparable")
    mine, yours = _columns(folder), _columns(other)
    for name in ("query", "landmark"):
        if mine[name] != yours[name]:
            raise InputError(
                f"{folder} ({ours['dataset']}, {len(mine['query'])} queries) and {other} ({theirs['dataset']}, "
                f"{len(yours['query'])}) have other queries; only the same ones can be compared"
            )
    scores, others = _scores(folder, mine, stage), _scores(other, yours, stage_2)
    common = [name for name in scores if name in others]
    if main not in common:
        raise InputError(f"{folder} is scored on {', '.join(scores)}, {other} on {', '.join(others)}: not comparable")
    measure = _CORRECT if f"{stage} {_CORRECT}" in mine else "AP"
    return PairedComparison(
        mine["query"],
        [name or f"query {i}" for i, name in enumerate(mine["landmark"])],
        measure,
        main,
        {name: scores[name] for name in common},
        {name: others[name] for name in common},
        ours["config"].get("seed", 0),
    )


def _columns(folder: Path) -> dict[str, list[str]]:
    path = folder / "per_query.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            columns = {name: list(values) for name, *values in zip(*csv.reader(file), strict=True)}
        return columns | {name: columns[name] for name in ("query", "landmark")}
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: missing or damaged ({error!r}); run eval.py again") from error


def _scores(folder: Path, columns: Mapping[str, Sequence[str]], stage: str) -> dict[str, np.ndarray]:
    """By protocol, of one stage."""
    names = {f"{stage} {_CORRECT}": "all"}
    names |= {name: name.removeprefix(f"{stage} ").removesuffix(" AP") for name in columns if name.endswith(" AP")}
    try:
        found = {
            protocol: np.array([float(value or "nan") for value in columns[name]])
            for name, protocol in names.items()
            if name in columns and name.startswith(f"{stage} ")
        }
    except ValueError as error:
        raise InputError(f"{folder / 'per_query.csv'}: damaged ({error}); run eval.py again") from error
    if not found:
        raise InputError(f"{folder / 'per_query.csv'}: no scores of {stage}; run eval.py again")
    return found


def write_comparison(place: Path, found: PairedComparison, folder: Path, other: Path) -> None:
    """Write `queries.csv` and `queries.md` into `place` and print both ends of the table.

    In percent: per query what the other has, what the result has and the difference, most won first; behind it the
    differences under the other protocols.
    """
    order = found.order()
    columns, rows = _table(found, order)
    write_atomically(place / "queries.csv", csv_text([columns, *rows]).encode())
    parts = f"{folder} against {other}", markdown_text(_SUMMARY, _summary(found)), markdown_text(columns, rows)
    write_atomically(place / "queries.md", "\n\n".join(part.rstrip("\n") for part in parts).encode() + b"\n")
    _print(found, folder, other, columns, rows)


def _table(found: PairedComparison, order: np.ndarray) -> tuple[list[str], list[list[str]]]:
    more = [name for name in found.scores if name != found.main]
    what = f"{found.main} {found.measure}"
    columns = ["number", "query", "landmark", f"{what} of the other", what, "difference", *(f"{m} diff." for m in more)]
    rows = []
    for query in order:
        values = [_cell(one[found.main][query], "") for one in (found.baseline_scores, found.scores)]
        differences = [_cell(found.difference(name)[query], "+") for name in (found.main, *more)]
        rows.append([str(query), found.queries[query], found.landmarks[query], *values, *differences])
    return columns, rows


def _cell(value: float, sign: str) -> str:
    return "-" if np.isnan(value) else f"{100 * value:{sign}.2f}"


def _summary(found: PairedComparison) -> list[list[str]]:
    """Per protocol: how many queries count, are won, lost, equal; mean difference and interval. The main one first."""
    rows = []
    for name in (found.main, *(name for name in found.scores if name != found.main)):
        counts, (mean, (low, high)) = found.counts(name), found.mean(name)
        interval = "" if np.isnan(low) else f"{100 * low:+.1f} to {100 * high:+.1f}"
        rows.append([name, str(sum(counts.values())), *map(str, counts.values()), _cell(mean, "+"), interval])
    return rows


def _print(found: PairedComparison, folder: Path, other: Path, columns: list[str], rows: list[list[str]]) -> None:
    out = console()
    summary = Table(title=escape(f"{folder} against {other}: {found.measure} per query"))
    for column in _SUMMARY:
        summary.add_column(column, justify="left" if column == "protocol" else "right")
    for line in _summary(found):
        summary.add_row(*line)
    out.print(summary)
    counts = found.counts()
    ends = {
        "most won": rows[: min(counts["won"], _ON_CONSOLE)],
        "most lost": lost_first(found, rows)[: min(counts["lost"], _ON_CONSOLE)],
    }
    for title, some in ends.items():
        if some:
            table = Table(title=title)
            for i, column in enumerate(columns):
                table.add_column(escape(column), justify="left" if i in (1, 2) else "right")
            for line in some:
                table.add_row(*map(escape, line))
            out.print(table)


def lost_first(found: PairedComparison, ordered: Sequence[Any]) -> list[Any]:
    """What stands in `PairedComparison.order`, most lost first; what does not count is left out."""
    counted = int((~np.isnan(found.difference())).sum())
    return list(ordered[:counted])[::-1]
