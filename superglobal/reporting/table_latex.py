"""A data set's table in LaTeX, for booktabs."""

from __future__ import annotations

import re
from collections.abc import Mapping

from superglobal.reporting.per_dataset import Cell, SetTable
from superglobal.reporting.table_formats import (
    effects_grid,
    effects_title,
    gains_of,
    head_cells,
    heads_of,
    published_rows,
    score_of,
    title_of,
    told,
)

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
