"""A data set's table on the console, in Markdown and CSV (LaTeX: table_latex.py). What is published stands apart."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from superglobal.reporting.main_effects import Effect
from superglobal.reporting.paper_numbers import CITATION
from superglobal.reporting.results import console
from superglobal.reporting.table_rows import Cell, Line, SetTable

_ON = "✓"
_NOTE = f"as published ({CITATION}), not measured here"


def csv_text(rows: Sequence[Sequence[str]]) -> str:
    """A CSV file."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def markdown_text(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *cells]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def interval_text(interval: tuple[float, float] | None) -> str:
    """As text; empty for none."""
    return "" if interval is None else f"{interval[0]:+.1f} to {interval[1]:+.1f}"


def as_csv(table: SetTable) -> str:
    """Everything as numbers, in percent; `source` says which rows are the paper's, `effect of` which are means."""
    heads = heads_of(table)
    columns = ["source", "effect of", *heads]
    for variant in table.variants:
        columns += [f"{protocol} {variant}".strip() for protocol in table.protocols]
        columns += [f"gain {protocol} {variant}".strip() for protocol in table.protocols]
        columns += [f"95 % gain {table.main} {variant}".strip(), f"ms per query {variant}".strip()]
    rows = [columns]
    for line in table.lines:
        row = ["measured", "", *head_cells(table, line, "on", "off")]
        for variant in table.variants:
            row += _numbers(table, line.cells.get(variant))
        rows.append(row)
    for one in table.published:
        scores = dict(one.scores)
        row = [f"paper, {CITATION}, by {one.source}", "", one.name, *[""] * (len(heads) - 1)]
        row += [f"{scores[p]:.2f}" if p in scores else "" for p in table.protocols]
        rows.append([*row, *[""] * (len(columns) - len(row))])
    for module, effects in _by_module(table).items():
        row = ["measured", module[0], *[""] * len(heads)]
        if table.several_weights:
            row[2 + heads.index("weights")] = module[1]
        for variant in table.variants:
            effect = effects.get(variant)
            gains = effect.gains if effect else {}
            row += [*[""] * len(table.protocols), *(signed(gains.get(p)) for p in table.protocols)]
            row += [interval_text(effect.interval) if effect else "", ""]
        rows.append(row)
    return csv_text(rows)


def as_markdown(table: SetTable) -> str:
    """The table, the effects under it; what is published in italics."""
    columns, rows = grid(table)
    paper = [[f"*{cell}*" if cell else "" for cell in row] for row in published_rows(table)]
    text = f"**{table.name}**, {title_of(table)}\n\n" + markdown_text(columns, [*rows, *paper])
    if paper:
        sources = ", ".join(dict.fromkeys(one.source for one in table.published))
        text += f"\nIn italics: {_NOTE}; read in {sources}.\n"
    if table.effects:
        text += f"\n**{effects_title(table)}**\n\n" + markdown_text(*effects_grid(table))
    return text


def print_table(table: SetTable) -> None:
    """On the console, where room is short: modules as a list, the gain of the main score alone."""
    note = f"paper: {_NOTE}" if table.published else None
    found = Table(title=escape(f"{table.name}, {title_of(table, 'gain over')}"), caption=note)
    found.add_column("")
    for variant in table.variants:
        for i, name in enumerate((*table.protocols, "gain", "95 % gain", "ms/query")):
            over = "" if table.variants == ("",) else f"{'' if i else variant}\n"
            found.add_column(escape(over + name), justify="right", no_wrap=True)
    for line in table.lines:
        cells = [cell for variant in table.variants for cell in _short(table, line.cells.get(variant))]
        found.add_row(*map(escape, (line_name(table, line), *cells)))
    if table.published:
        found.add_section()
        for one in table.published:
            scores = dict(one.scores)
            cells = [f"{scores[p]:.1f}" if p in scores else "" for p in table.protocols]
            found.add_row(*map(escape, (one.short, *cells)), style="italic")
    out = console()
    out.print(found)
    if table.effects:
        effects = Table(title=escape(effects_title(table)))
        columns, rows = effects_grid(table)
        for column in columns:
            effects.add_column(escape(column), justify="left" if column in ("module", "weights") else "right")
        for row in rows:
            effects.add_row(*map(escape, row))
        out.print(effects)


def _short(table: SetTable, cell: Cell | None) -> list[str]:
    if cell is None:
        return [""] * (len(table.protocols) + 3)
    if cell.missing:
        return [*[cell.missing] * len(table.protocols), "", "", ""]
    scores = [score_of(cell, protocol) for protocol in table.protocols]
    return [*scores, signed(cell.gains.get(table.main)), interval_text(cell.interval), time_of(cell)]


def grid(table: SetTable) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for reading: each score with its gain, what the main one gains with its interval, the time."""
    columns = heads_of(table)
    for variant in table.variants:
        names = (*table.protocols, f"95 % of {table.main} gain", "ms per query")
        columns += [f"{name} {variant}".strip() for name in names]
    rows = []
    for line in table.lines:
        row = head_cells(table, line)
        for variant in table.variants:
            row += told(table, line.cells.get(variant))
        rows.append(row)
    return columns, rows


def effects_grid(table: SetTable) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the main effects."""
    columns = ["module", *(["weights"] if table.several_weights else [])]
    for variant in table.variants:
        columns += [f"{name} {variant}".strip() for name in (*table.protocols, f"95 % of {table.main}")]
    rows = []
    for (module, weights), effects in _by_module(table).items():
        row = [module, *([weights] if table.several_weights else [])]
        for variant in table.variants:
            effect = effects.get(variant)
            row += [signed(effect.gains.get(p)) if effect else "" for p in table.protocols]
            row.append(interval_text(effect.interval) if effect else "")
        rows.append(row)
    return columns, rows


def line_name(table: SetTable, line: Line) -> str:
    """A configuration in one line, for a chart: the modules as a list unless the row has a name of its own."""
    words = [line.weights] if table.several_weights else []
    if line.run:
        words.append(line.run)
    elif table.modules:
        on = [
            name if state is True else f"{name} {state}" for name, state in _states(table, line) if state is not False
        ]
        words.append(" + ".join(on) or "no modules")
    words += [f"{name}={value}" for name, value in zip(table.settings, line.settings, strict=True)]
    return ", ".join(words)


def _states(table: SetTable, line: Line) -> list[tuple[str, bool | str]]:
    return list(zip(table.modules, line.modules, strict=True))


def title_of(table: SetTable, gain: str = "in brackets the gain over") -> str:
    """Metric, weights, and what a gain is over."""
    weights = "" if table.several_weights or not table.lines else f", weights {table.lines[0].weights}"
    cells = [line.cells[table.variants[0]] for line in table.lines if table.variants[0] in line.cells]
    kinds = sum(not cell.gains and not cell.missing for cell in cells)
    over = "the first row" if kinds < 2 else "the first row of the same weights and settings"
    return f"{table.metric} in %{weights}; {gain} {over}"


def effects_title(table: SetTable) -> str:
    """What the effects are."""
    pairs = table.effects[0].pairs
    return f"{table.name}, what each module is worth: {table.metric} with it less without, mean of {pairs} pairs"


def heads_of(table: SetTable) -> list[str]:
    """The columns that say what a row is."""
    weights = ["weights"] if table.several_weights else []
    return [*(["run"] if table.named or table.published else []), *weights, *table.modules, *table.settings] or ["run"]


def head_cells(table: SetTable, line: Line, on: str = _ON, off: str = "") -> list[str]:
    """By `heads_of`."""
    states = [on if state is True else off if state is False else str(state) for state in line.modules]
    cells = {"run": line.run, "weights": line.weights}
    cells |= dict(zip(table.modules, states, strict=True)) | dict(zip(table.settings, line.settings, strict=True))
    return [cells[head] for head in heads_of(table)]


def published_rows(table: SetTable) -> list[list[str]]:
    """Only the set itself has published numbers, and no row of theirs has a gain, an interval or a time."""
    columns, _ = grid(table)
    heads = len(heads_of(table))
    rows = []
    for one in table.published:
        scores = dict(one.scores)
        cells = [f"{scores[p]:.1f}" if p in scores else "" for p in table.protocols]
        row = [one.name, *[""] * (heads - 1), *cells]
        rows.append([*row, *[""] * (len(columns) - len(row))])
    return rows


def told(table: SetTable, cell: Cell | None) -> list[str]:
    """What a variant's columns of `grid` hold."""
    if cell is None:
        return [""] * (len(table.protocols) + 2)
    if cell.missing:
        return [*[cell.missing] * len(table.protocols), "", ""]
    scores = [score_of(cell, protocol) for protocol in table.protocols]
    scores = [
        score if gain is None else f"{score} ({gain:+.2f})"
        for score, gain in zip(scores, gains_of(table, cell), strict=True)
    ]
    return [*scores, interval_text(cell.interval), time_of(cell)]


def _numbers(table: SetTable, cell: Cell | None) -> list[str]:
    """For a CSV: the scores, the gains, interval and time of a variant."""
    count = len(table.protocols)
    if cell is None:
        return [""] * (2 * count + 2)
    if cell.missing:
        return [*[cell.missing] * count, *[""] * (count + 2)]
    gains = [signed(gain) for gain in gains_of(table, cell)]
    return [*(score_of(cell, p) for p in table.protocols), *gains, interval_text(cell.interval), time_of(cell)]


def _by_module(table: SetTable) -> dict[tuple[str, str], dict[str, Effect]]:
    """(module, weights) -> variant -> its effect."""
    found: dict[tuple[str, str], dict[str, Effect]] = {}
    for effect in table.effects:
        found.setdefault((effect.module, effect.weights), {})[effect.variant] = effect
    return found


def gains_of(table: SetTable, cell: Cell) -> list[float | None]:
    """By protocol; None for a baseline."""
    return [cell.gains.get(protocol) for protocol in table.protocols]


def score_of(cell: Cell, protocol: str) -> str:
    """As text; a dash where no query counts."""
    value = cell.scores.get(protocol)
    return ("-" if protocol in cell.scores else "") if value is None else f"{value:.2f}"


def signed(value: float | None) -> str:
    """As text, with its sign."""
    return "" if value is None else f"{value:+.2f}"


def time_of(cell: Cell) -> str:
    return "" if cell.milliseconds is None else f"{cell.milliseconds:.2f}"


_ESCAPES = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "\n": " ",
        "✓": r"\checkmark",
    }
)


def as_latex(table: SetTable) -> str:
    """The table and, of a full factorial, that of the effects; the best measured score of a column in bold.

    What is published stands under a rule of its own, in italics and never in bold.
    """
    heads = heads_of(table)
    columns = [*table.protocols, f"95 % of {table.main}", "ms/query"]
    lines = ["% " + f"{table.name}: {title_of(table)}".replace("\n", " "), r"% \usepackage{booktabs,amssymb}"]
    lines += [_begin(len(heads), len(columns) * len(table.variants)), r"\toprule"]
    if len(table.variants) > 1:
        lines += _groups(table, len(heads), len(columns))
    lines += [_row([escaped(one) for one in [*heads, *columns * len(table.variants)]]), r"\midrule"]
    best = {variant: _best(table, variant) for variant in table.variants}
    for line in table.lines:
        cells = [escaped(cell) for cell in head_cells(table, line)]
        for variant in table.variants:
            cells += _cells(table, line.cells.get(variant), best[variant])
        lines.append(_row(cells))
    paper = [[rf"\textit{{{escaped(cell)}}}" if cell else "" for cell in row] for row in published_rows(table)]
    lines += [r"\midrule", *map(_row, paper)] if paper else []
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*lines, *_effects(table)]) + "\n"


def escaped(text: str) -> str:
    """Text that LaTeX sets as it is; two hyphens do not become a dash."""
    return text.translate(_ESCAPES).replace("--", "-{}-")


def _groups(table: SetTable, heads: int, width: int) -> list[str]:
    names = [table.name + variant if not i else variant for i, variant in enumerate(table.variants)]
    groups = [rf"\multicolumn{{{width}}}{{c}}{{{escaped(name)}}}" for name in names]
    first = [heads + 1 + width * i for i in range(len(names))]
    return [_row([*[""] * heads, *groups]), " ".join(rf"\cmidrule(lr){{{i}-{i + width - 1}}}" for i in first)]


def _effects(table: SetTable) -> list[str]:
    if not table.effects:
        return []
    columns, rows = effects_grid(table)
    names = 1 + table.several_weights
    lines = ["", "% " + effects_title(table), _begin(names, len(columns) - names), r"\toprule"]
    lines += [_row([escaped(one) for one in columns]), r"\midrule"]
    lines += [_row([escaped(one) for one in row[:names]] + [_math(one) for one in row[names:]]) for row in rows]
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _cells(table: SetTable, cell: Cell | None, best: Mapping[str, float]) -> list[str]:
    plain = told(table, cell)
    if cell is None or cell.missing:
        return [escaped(one) for one in plain]
    scores = []
    for protocol, gain in zip(table.protocols, gains_of(table, cell), strict=True):
        score = score_of(cell, protocol)
        highest = protocol in best and cell.scores.get(protocol) == best[protocol]
        told_gain = "" if gain is None else rf" {{\scriptsize ${gain:+.2f}$}}"
        scores.append((rf"\textbf{{{score}}}" if highest else score) + told_gain)
    return [*scores, _math(plain[-2]), plain[-1]]


def _best(table: SetTable, variant: str) -> dict[str, float]:
    """The highest score of each column; none where there is nothing to choose from."""
    cells = [line.cells[variant] for line in table.lines if variant in line.cells]
    scores = {p: [v for cell in cells if (v := cell.scores.get(p)) is not None] for p in table.protocols}
    return {protocol: max(values) for protocol, values in scores.items() if len(values) > 1}


def _begin(left: int, right: int) -> str:
    return rf"\begin{{tabular}}{{{'l' * left}{'r' * right}}}"


def _row(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _math(text: str) -> str:
    """Signed numbers with a minus that is one."""
    return re.sub(r"[+-][\d.]+", lambda found: f"${found[0]}$", text)
