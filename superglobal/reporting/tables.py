"""Write tables that compare several runs: one list of all runs, and one table per data set.

The tables are printed, and written as Markdown, CSV and LaTeX.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from superglobal.errors import printable
from superglobal.reporting.chart import draw_chart
from superglobal.reporting.paired_comparison import gain_interval
from superglobal.reporting.results import (
    console,
    csv_text,
    main_metric,
    main_protocol,
    main_scores,
    markdown_text,
    percent,
    percent_range,
    print_table,
)
from superglobal.reporting.runs import (
    RunRow,
    milliseconds_per_query,
    missing_text,
    read_all,
    run_rows,
    scores_in_percent,
)
from superglobal.reporting.table_rows import CITATION, Cell, DatasetTable, Effect, Row, dataset_tables
from superglobal.utils.escape import markdown
from superglobal.utils.io import write_text

FormatCell = Callable[[Cell, str], list[str]]
"""Function that formats a run's metrics for a table: (metrics, variant of the data set) -> text of each column."""
_NOTE = f"as published ({CITATION}), not measured here"


def write_tables(folder: Path, *others: Path) -> list[dict[str, Any]]:
    """Compare all results below one or more folders: print tables, and write tables and a chart to files.

    `table.csv` and `table.md` list every run with all of its metrics. For each data set, `table-NAME.csv`, `.md` and
    `.tex` have one row per configuration. `chart.png` shows the rows of all data sets.

    Args:
        folder: first folder with results, into which the files are written.
        others: more folders with results.

    Returns:
        All results, in the form that `read_all` returns.

    Raises:
        InputError: a folder contains no results, a result is damaged, or a file cannot be written.
    """
    results = read_all([folder, *others])
    columns, rows = _run_list(results)
    write_text(folder / "table.csv", csv_text([columns, *rows]))
    write_text(folder / "table.md", markdown_text(columns, rows))
    tables = dataset_tables(results)
    for name, table in _by_file_name(tables).items():
        for ending, text in (("csv", as_csv(table)), ("md", as_markdown(table)), ("tex", as_latex(table))):
            write_text(folder / f"table-{name}.{ending}", text)
        _print(table)
    draw_chart(folder / "chart.png", tables)
    return results


def _by_file_name(tables: Sequence[DatasetTable]) -> dict[str, DatasetTable]:
    """Choose a unique file name for each table, from the name of the data set.

    Returns:
        File name without extension -> table. Characters that are unsafe in file names are replaced by hyphens.
    """
    named: dict[str, DatasetTable] = {}
    for table in tables:
        plain = re.sub(r"[^\w.-]+", "-", table.name).strip("-.") or "set"
        name, number = plain, 1
        while name in named:
            number += 1
            name = f"{plain}-{number}"
        named[name] = table
    return named


def _run_list(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Build the table that lists all runs.

    The table contains the metrics of the last stage of each run in percent. It has one column for each setting in which
    the runs differ, so that no two rows look the same.

    Args:
        results: results of the runs, in the form of `read_all`.

    Returns:
        The column names, and the rows.
    """
    runs = run_rows(results)
    settings = list(dict.fromkeys(key for run in runs for key in run.settings))
    names = list(dict.fromkeys(name for run in runs for name in _metrics(run.result)))
    rows = []
    for run in runs:
        metrics, missing = _metrics(run.result), missing_text(run.result)
        time = milliseconds_per_query(run.result)
        row = [run.result["dataset"], run.weights, run.name, *(run.settings[key] for key in settings)]
        row += [metrics.get(name, "" if metrics else missing) for name in names]
        row += [*(_gain_cells(run) if metrics else [missing] * 2), "" if time is None else f"{time:.2f}"]
        rows.append(row)
    return ["data set", "weights", "run", *settings, *names, "gain", "95 % gain", "ms per query"], rows


def _metrics(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the metrics of the last stage of a run in percent.

    Args:
        result: content of `results.json`.

    Returns:
        Name of the column -> text; empty for a run without metrics.
    """
    if not result["metrics"]:
        return {}
    stage, main = main_protocol(result)
    metrics = result["metrics"][stage]
    names = dict(zip(main_scores(metrics), scores_in_percent(result), strict=True))
    cells = {names[protocol]: percent(score) for protocol, score in main_scores(metrics).items()}
    if "interval" in metrics:
        cells[f"95 % {names[main]}"] = percent_range(*metrics["interval"][main])
    for key, column in (("mp", "mP"), ("precision", "P")):
        cells |= {f"{column}@10 {protocol}": percent(at["10"], 1) for protocol, at in metrics.get(key, {}).items()}
    return cells | {f"top-1 {protocol}": percent(score) for protocol, score in metrics.get("top1", {}).items()}


def _gain_cells(run: RunRow) -> list[str]:
    """Return two texts: the gain of a run over its baseline, and the 95 % confidence interval of the gain."""
    assert run.baseline is not None
    gain = 100 * (main_metric(run.result) - main_metric(run.baseline))
    return ["-" if math.isnan(gain) else _signed(gain), _interval(gain_interval([(run.result, run.baseline)]))]


def as_csv(table: DatasetTable) -> str:
    """Return a table, its published scores and its main effects as CSV text, with all scores in percent.

    The column `source` says whether a row contains measured or published scores. If the column `effect of` contains the
    name of a module, the row contains the main effect of this module instead of scores.
    """
    heads = _head_columns(table)
    columns = ["source", "effect of", *heads]
    for variant in table.variants:
        names = [*table.protocols, *(f"gain {protocol}" for protocol in table.protocols)]
        columns += [f"{name} {variant}".strip() for name in (*names, f"95 % gain {table.main}", "ms per query")]

    def cells(cell: Cell, _: str) -> list[str]:
        return [*_scores(table, cell), *_gains(table, cell.gains), _interval(cell.interval), _time(cell)]

    rows = [["measured", "", *row] for row in _rows(table, cells, "on", "off")]
    for paper, row in zip(table.published, _published_rows(table, len(columns) - 2, digits=2), strict=True):
        rows.append([f"paper, {CITATION}, by {paper.source}", "", *row])
    for (module, weights), effects in _effects_by_module(table).items():
        row = ["measured", module, *(weights if head == "weights" else "" for head in heads)]
        for variant in table.variants:
            row += [*[""] * len(table.protocols), *_effect_cells(table, effects.get(variant)), ""]
        rows.append(row)
    return csv_text([columns, *rows])


def as_markdown(table: DatasetTable) -> str:
    """Return a table and its main effects as Markdown text. Published scores are in italics."""
    columns = _columns(table, f"95 % of {table.main} gain", "ms per query")

    def cells(cell: Cell, _: str) -> list[str]:
        pairs = zip(_scores(table, cell), _gains(table, cell.gains), strict=True)
        return [
            *(f"{score} ({gain})" if gain else score for score, gain in pairs),
            _interval(cell.interval),
            _time(cell),
        ]

    paper = _published_rows(table, len(columns))
    title = f"**{markdown(table.name)}**, {markdown(_title(table))}"
    text = f"{title}\n\n" + markdown_text(columns, _rows(table, cells), paper)
    text += "".join(f"\n{markdown(note)}\n" for note in table.notes)
    if paper:
        sources = ", ".join(dict.fromkeys(paper.source for paper in table.published))
        text += f"\nScores in italics are {_NOTE}; source: {sources}.\n"
    if table.effects:
        text += f"\n**{markdown(_effects_title(table))}**\n\n" + markdown_text(*_effects_table(table))
    return text


def _print(table: DatasetTable) -> None:
    """Print a table and its main effects on the console.

    To save width, all modules are in one column, and only the gain under the main protocol is shown.
    """
    notes = [*table.notes, *([f"Scores of the paper are {_NOTE}."] if table.published else [])]
    caption = escape("\n".join(notes)) or None
    shown = Table(title=escape(f"{table.name}, {_title(table, 'gain over')}"), caption=caption)
    shown.add_column("")
    for variant in table.variants:
        for i, name in enumerate((*table.protocols, "gain", "95 % gain", "ms/query")):
            group = "" if table.variants == ("",) else f"{'' if i else variant}\n"
            shown.add_column(escape(group + name), justify="right", no_wrap=True)

    def cells(cell: Cell, _: str) -> list[str]:
        gain = _signed(cell.gains.get(table.main))
        return [*_scores(table, cell), gain, _interval(cell.interval), _time(cell)]

    for row in table.rows:
        shown.add_row(*map(escape, (table.label(row), *_variant_cells(table, row, cells))))
    shown.add_section()
    for paper in table.published:
        shown.add_row(*map(escape, (paper.short_name, *_published_scores(table, paper.scores))), style="italic")
    console().print(shown)
    if table.effects:
        print_table(_effects_title(table), *_effects_table(table), left=1 + table.several_weights)


_LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "✓": r"\checkmark",
    }
)


def as_latex(table: DatasetTable) -> str:
    """Return a table and its main effects as LaTeX code that uses the package booktabs.

    The best measured score in each column is bold. Published scores are in italics, below a horizontal line.
    """
    heads = len(_head_columns(table))
    columns = [_latex(name) for name in _columns(table, f"95 % of {table.main}", "ms/query", with_variant=False)]
    width = len(table.protocols) + 2
    lines = [printable(f"% {table.name}: {_title(table)}"), r"% \usepackage{booktabs,amssymb}"]
    lines += [rf"\begin{{tabular}}{{{'l' * heads}{'r' * (len(columns) - heads)}}}", r"\toprule"]
    if len(table.variants) > 1:
        names = [table.name + table.variants[0], *table.variants[1:]]
        first = [heads + 1 + width * i for i in range(len(names))]
        groups = [rf"\multicolumn{{{width}}}{{c}}{{{_latex(name)}}}" for name in names]
        lines += [_latex_row([*[""] * heads, *groups])]
        lines += [" ".join(rf"\cmidrule(lr){{{i}-{i + width - 1}}}" for i in first)]
    lines += [_latex_row(columns), r"\midrule"]
    for row in table.rows:
        cells = _variant_cells(table, row, lambda cell, variant: _latex_cells(table, cell, variant))
        lines.append(_latex_row([*map(_latex, _head_cells(table, row)), *cells]))
    paper = _published_rows(table, len(columns))
    lines += [r"\midrule"] if paper else []
    lines += [_latex_row([rf"\textit{{{_latex(cell)}}}" if cell else "" for cell in row]) for row in paper]
    lines += [r"\bottomrule", r"\end{tabular}"]
    if table.effects:
        lines += _latex_effects(table)
    return "\n".join(lines) + "\n"


def _latex_cells(table: DatasetTable, cell: Cell, variant: str) -> list[str]:
    """Format the metrics of a run as LaTeX code.

    Args:
        table: table that contains the run. The best scores of the table are bold.
        cell: metrics of the run.
        variant: variant of the data set on which the run was evaluated.

    Returns:
        The code for each column of this variant.
    """
    others = [row.cells[variant].scores for row in table.rows if variant in row.cells]
    texts = []
    for protocol, score in zip(table.protocols, _scores(table, cell), strict=True):
        values = [value for scores in others if (value := scores.get(protocol)) is not None]
        is_best = len(values) > 1 and cell.scores.get(protocol) == max(values)
        gain = cell.gains.get(protocol)
        suffix = "" if gain is None else rf" {{\scriptsize ${gain:+.2f}$}}"
        texts.append((rf"\textbf{{{score}}}" if is_best else score) + suffix)
    return [*texts, _latex_numbers(_interval(cell.interval)), _time(cell)]


def _latex_effects(table: DatasetTable) -> list[str]:
    columns, rows = _effects_table(table)
    left = 1 + table.several_weights
    lines = ["", printable(f"% {_effects_title(table)}")]
    lines += [rf"\begin{{tabular}}{{{'l' * left}{'r' * (len(columns) - left)}}}", r"\toprule"]
    lines += [_latex_row([_latex(column) for column in columns]), r"\midrule"]
    lines += [_latex_row([*map(_latex, row[:left]), *map(_latex_numbers, row[left:])]) for row in rows]
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _latex(text: str) -> str:
    """Escape text for LaTeX. Replace "--" by "-{}-", because LaTeX would print "--" as one dash."""
    return printable(text).translate(_LATEX).replace("--", "-{}-")


def _latex_numbers(text: str) -> str:
    """Put the signed numbers in a text into math mode, so that LaTeX prints a minus sign instead of a hyphen."""
    return re.sub(r"[+-][\d.]+", lambda match: f"${match[0]}$", text)


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _title(table: DatasetTable, gain: str = "in brackets the gain over") -> str:
    weights = "" if table.several_weights or not table.rows else f", weights {table.rows[0].weights}"
    cells = [row.cells[table.variants[0]] for row in table.rows if table.variants[0] in row.cells]
    baselines = sum(not cell.gains and not cell.missing for cell in cells)
    baseline = "the first row" if baselines < 2 else "the first row of the same weights and settings"
    return f"{table.metric} in %{weights}; {gain} {baseline}"


def _head_columns(table: DatasetTable) -> list[str]:
    """Return the names of the columns that identify a row.

    These are the run, the weights, the modules and other settings. The column of the run is left out if no row has a
    name, and the column of the weights is left out if all rows have the same weights.
    """
    name = ["run"] if table.published or any(row.name for row in table.rows) else []
    return [*name, *(["weights"] if table.several_weights else []), *table.modules, *table.settings] or ["run"]


def _head_cells(table: DatasetTable, row: Row, on: str = "✓", off: str = "") -> list[str]:
    states = [on if state is True else off if state is False else str(state) for state in row.modules]
    cells = {"run": row.name, "weights": row.weights}
    cells |= dict(zip(table.modules, states, strict=True)) | dict(zip(table.settings, row.settings, strict=True))
    return [cells[column] for column in _head_columns(table)]


def _columns(table: DatasetTable, interval: str, time: str, with_variant: bool = True) -> list[str]:
    columns = _head_columns(table)
    for variant in table.variants:
        names = (*table.protocols, interval, time)
        columns += [f"{name} {variant}".strip() if with_variant else name for name in names]
    return columns


def _rows(
    table: DatasetTable, cells: Callable[[Cell, str], list[str]], on: str = "✓", off: str = ""
) -> list[list[str]]:
    """Return all rows with measured scores, as the text of each cell.

    Args:
        table: table to format.
        cells: function that formats the metrics of a run, as `FormatCell` describes.
        on: text for a module that is on.
        off: text for a module that is off.
    """
    return [[*_head_cells(table, row, on, off), *_variant_cells(table, row, cells)] for row in table.rows]


def _variant_cells(table: DatasetTable, row: Row, cells: FormatCell) -> list[str]:
    """Format the metrics in a row for all variants of the data set, and return the text of each column.

    For a variant without a run, all texts are empty. For a run without metrics, the scores are "failed" or "n/a", and
    the other texts are empty.

    Args:
        table: table that contains the row.
        row: row to format.
        cells: function that formats the metrics of a run.
    """
    width = len(cells(Cell({}, {}, None, None), ""))
    count = len(table.protocols)
    texts = []
    for variant in table.variants:
        cell = row.cells.get(variant)
        if cell is None:
            texts += [""] * width
        elif cell.missing:
            texts += [*[cell.missing] * count, *[""] * (width - count)]
        else:
            texts += cells(cell, variant)
    return texts


def _published_rows(table: DatasetTable, width: int, digits: int = 1) -> list[list[str]]:
    """Return all rows with published scores, as the text of each cell.

    Published scores are shown in the columns of the data set without distractors. All columns after them are empty.

    Args:
        table: table to format.
        width: number of columns of the table.
        digits: number of digits after the decimal point.
    """
    blank = [""] * (len(_head_columns(table)) - 1)
    rows = [[paper.name, *blank, *_published_scores(table, paper.scores, digits)] for paper in table.published]
    return [[*row, *[""] * (width - len(row))] for row in rows]


def _published_scores(table: DatasetTable, scores: Sequence[tuple[str, float]], digits: int = 1) -> list[str]:
    values = dict(scores)
    return [f"{values[protocol]:.{digits}f}" if protocol in values else "" for protocol in table.protocols]


def _effects_title(table: DatasetTable) -> str:
    pairs = table.effects[0].pairs
    return f"{table.name}, main effects: gain in {table.metric} by each module, mean of {pairs} pairs"


def _effects_table(table: DatasetTable) -> tuple[list[str], list[list[str]]]:
    """Return the column names and the rows of the table of main effects."""
    columns = ["module", *(["weights"] if table.several_weights else [])]
    for variant in table.variants:
        columns += [f"{name} {variant}".strip() for name in (*table.protocols, f"95 % of {table.main}")]
    rows = []
    for (module, weights), effects in _effects_by_module(table).items():
        cells = [text for variant in table.variants for text in _effect_cells(table, effects.get(variant))]
        rows.append([module, *([weights] if table.several_weights else []), *cells])
    return columns, rows


def _effects_by_module(table: DatasetTable) -> dict[tuple[str, str], dict[str, Effect]]:
    """Group the main effects of a table: (module, weights) -> variant of the data set -> main effect."""
    effects: dict[tuple[str, str], dict[str, Effect]] = {}
    for effect in table.effects:
        effects.setdefault((effect.module, effect.weights), {})[effect.variant] = effect
    return effects


def _effect_cells(table: DatasetTable, effect: Effect | None) -> list[str]:
    if effect is None:
        return [""] * (len(table.protocols) + 1)
    return [*_gains(table, effect.gains), _interval(effect.interval)]


def _scores(table: DatasetTable, cell: Cell) -> list[str]:
    """Return the scores of a run as text, one per protocol.

    A score is "-" if no query has a relevant image, and empty if the run was not evaluated under this protocol.
    """
    values = [(cell.scores.get(protocol), protocol in cell.scores) for protocol in table.protocols]
    return [("-" if known else "") if value is None else f"{value:.2f}" for value, known in values]


def _gains(table: DatasetTable, gains: Mapping[str, float | None]) -> list[str]:
    return [_signed(gains.get(protocol)) for protocol in table.protocols]


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:+.1f} to {interval[1]:+.1f}"


def _time(cell: Cell) -> str:
    return "" if cell.milliseconds is None else f"{cell.milliseconds:.2f}"
