"""Tables of many runs: one that lists them all, and for each data set one that is made for reading, with a chart."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from superglobal.reporting import table_formats as formats
from superglobal.reporting.chart import draw_chart
from superglobal.reporting.results import main_metric, main_protocol, main_scores, percent, percent_range
from superglobal.reporting.runs import Compared, compared, gain_interval, milliseconds, no_number, read_all, scores_of
from superglobal.reporting.table_formats import as_latex
from superglobal.reporting.table_rows import SetTable, tables_of
from superglobal.utils.io import write_atomically


def merge(folder: Path, *others: Path) -> list[dict[str, Any]]:
    """Compare all results below the folders, on the console and in files in the first of them.

    `table.csv` and `table.md` list every run with all its numbers (`list_runs`). Of each data set, `table-NAME` (.csv,
    .md, .tex) has a row per configuration (`per_dataset.SetTable`), and `chart.png` draws those.

    Returns:
        The results, as read.

    Raises:
        InputError: a folder without results, a damaged one, or a place that cannot be written.
    """
    results = read_all([folder, *others])
    list_runs(results, folder / "table")
    tables = tables_of(results)
    for name, table in _named(tables).items():
        write_atomically(folder / f"table-{name}.csv", formats.as_csv(table).encode())
        write_atomically(folder / f"table-{name}.md", formats.as_markdown(table).encode())
        write_atomically(folder / f"table-{name}.tex", as_latex(table).encode())
        formats.print_table(table)
    draw_chart(folder / "chart.png", tables)
    return results


def _named(tables: Sequence[SetTable]) -> dict[str, SetTable]:
    """Tables by what their files are called; a data set may have any name."""
    found: dict[str, SetTable] = {}
    for table in tables:
        plain = re.sub(r"[^\w.-]+", "-", table.name).strip("-.") or "set"
        name, number = plain, 1
        while name in found:
            number += 1
            name = f"{plain}-{number}"
        found[name] = table
    return found


def list_runs(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Write one table of all results: `path` with the endings .csv and .md.

    A row is a run, its numbers those of its last stage in percent: mAP per protocol (mAP@100 and GAP under their
    names), mP@10, the 95 % interval of the main metric, and what that gains over the first row of the same data set and
    settings, with the interval of the gain (landmarks drawn with replacement; of the gain, the same queries in both
    rows), and the time a query takes. Every setting that differs between the runs has a column, so that no two rows
    look alike.
    """
    rows = compared(results)
    differing = list(dict.fromkeys(key for row in rows for key in row.settings))
    names = list(dict.fromkeys(name for row in rows for name in _numbers(row.result)))
    columns = ["data set", "weights", "run", *differing, *names, "gain", "95 % gain", "ms per query"]
    cells = []
    for row in rows:
        numbers, missing = _numbers(row.result), no_number(row.result)
        time = milliseconds(row.result)
        cells.append(
            [
                *(row.result["dataset"], row.weights, row.run),
                *(row.settings[key] for key in differing),
                *(numbers.get(name, "" if numbers else missing) for name in names),
                *(_gain(row) if numbers else [missing] * 2),
                "" if time is None else f"{time:.2f}",
            ]
        )
    write_atomically(path.with_suffix(".csv"), formats.csv_text([columns, *cells]).encode())
    write_atomically(path.with_suffix(".md"), formats.markdown_text(columns, cells).encode())


def _gain(row: Compared) -> list[str]:
    """What the main metric gains over the baseline, and the interval of that where the queries are the same."""
    assert row.baseline is not None
    gain = 100 * (main_metric(row.result) - main_metric(row.baseline))
    return [
        "-" if math.isnan(gain) else formats.signed(gain),
        formats.interval_text(gain_interval([(row.result, row.baseline)])),
    ]


def _numbers(result: Mapping[str, Any]) -> dict[str, str]:
    if not result["metrics"]:
        return {}
    stage, protocol = main_protocol(result)
    last = result["metrics"][stage]
    names = dict(zip(main_scores(last), scores_of(result), strict=True))
    numbers = {names[name]: percent(score) for name, score in main_scores(last).items()}
    if "interval" in last:
        numbers[f"95 % {names[protocol]}"] = percent_range(*last["interval"][protocol])
    for key, column in (("mp", "mP"), ("precision", "P")):
        numbers |= {f"{column}@10 {name}": percent(at["10"], 1) for name, at in last.get(key, {}).items()}
    return numbers | {f"top-1 {name}": percent(score) for name, score in last.get("top1", {}).items()}
