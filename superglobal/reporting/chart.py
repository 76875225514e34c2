"""Draw tables of results as a chart, with one line per configuration and one mark per score."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from superglobal.reporting.table_rows import CITATION, DatasetTable, Effect, Row
from superglobal.utils.io import write_atomically

_COLORS = ("#4393c3", "#1a9850", "#d6604d", "#762a83", "#b8860b")  # colors of the marks, one per protocol
_MARKERS = ("o", "D", "s", "^")  # one per variant of the data set; marks of scores without distractors are filled
_ROW_HEIGHT, _MARGINS, _PANEL_WIDTH, _MODULE_WIDTH = 0.24, 1.15, 5.2, 0.16  # all in inches
_MAX_ROWS = 120


def draw_chart(path: Path, tables: Sequence[DatasetTable]) -> None:
    """Draw one panel of scores per data set, and write the chart to a PNG file.

    If the runs of a data set form a full factorial design, its rows are sorted by the main score, dots show which
    modules are on, and a second panel shows the main effects of the modules. Otherwise the rows have the order of the
    table. Published scores are shown as stars below the measured rows.

    Args:
        path: PNG file to write; no file is written if no table has scores.
        tables: one table per data set; tables without scores are skipped.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [table for table in tables if _rows(table)]
    if not shown:
        return
    heights = [
        _MARGINS + _names_height(table) + _ROW_HEIGHT * max(3, len(_rows(table)) + len(table.published))
        for table in shown
    ]
    label_length = max(len(label) for table in shown for label in _labels(table))
    dots = [_MODULE_WIDTH * len(table.modules) if table.effects else 0 for table in shown]
    left = 0.35 + max(0.068 * min(label_length, 60), *dots)
    right = 3.4 if any(table.effects for table in shown) else 0.25
    width, height = left + _PANEL_WIDTH + right, sum(heights)
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    bottom = height
    for table, table_height in zip(shown, heights, strict=True):
        bottom -= table_height
        inner = table_height - _MARGINS - _names_height(table)
        _draw_rows(
            figure.add_axes((left / width, (bottom + 0.5) / height, _PANEL_WIDTH / width, inner / height)), table
        )
        groups = [(variant, [e for e in table.effects if e.variant == variant]) for variant in table.variants]
        groups = [(variant, effects) for variant, effects in groups if effects]
        for i, (variant, effects) in enumerate(groups):
            bars = min(inner / len(groups) - 0.75 * (len(groups) > 1), 0.34 * len(effects) + 0.3)
            start = bottom + 0.5 + inner - i * inner / len(groups) - bars
            axes = figure.add_axes(((left + _PANEL_WIDTH + 1) / width, start / height, 2.2 / width, bars / height))
            _draw_effects(axes, table, effects, variant)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())


def _names_height(table: DatasetTable) -> float:
    """Return the height in inches of the space above the rows, in which the names of the modules are written."""
    return 0.35 if table.effects else 0.0


def _rows(table: DatasetTable) -> list[Row]:
    """Return the rows that the chart shows: the first `_MAX_ROWS` rows of the table that have scores.

    If the table has main effects, the rows are first sorted by descending score under the main protocol.
    """
    rows = [row for row in table.rows if any(cell.scores for cell in row.cells.values())]
    if table.effects:
        rows.sort(key=lambda row: -max(cell.scores.get(table.main) or 0 for cell in row.cells.values()))
    return rows[:_MAX_ROWS]


def _labels(table: DatasetTable) -> list[str]:
    """Return the label of each row in the chart.

    If the table has main effects, dots show the modules of each row. The label is then only the name of the weights, or
    empty if all rows have the same weights.
    """
    if table.effects:
        return [row.weights if table.several_weights else "" for row in _rows(table)]
    return [table.label(row) for row in _rows(table)]


def _draw_rows(axes: Any, table: DatasetTable) -> None:
    """Draw the panel with the scores on one data set.

    A row shows the scores of one configuration, with one mark for each protocol and variant of the data set. A variant
    is the data set without distractors, or with a certain set of distractors.
    """
    rows, labels = _rows(table), _labels(table)
    colors = {protocol: _COLORS[i % len(_COLORS)] for i, protocol in enumerate(table.protocols)}
    for y, row in enumerate(rows):
        for variant, cell in row.cells.items():
            marker = _MARKERS[min(table.variants.index(variant), len(_MARKERS) - 1)]
            for protocol, color in colors.items():
                if (score := cell.scores.get(protocol)) is not None:
                    face = "white" if variant else color
                    axes.plot(score, y, marker, color=color, markerfacecolor=face, markersize=5.5, zorder=3)
    # Vertical lines through the scores of the baseline make it easy to see which rows are better.
    baseline = next(iter(table.rows[0].cells.values()), None)
    for protocol, color in colors.items():
        if baseline is not None and not baseline.gains and (score := baseline.scores.get(protocol)) is not None:
            axes.axvline(score, color=color, linewidth=0.8, linestyle=":", zorder=1)
    for y, paper in enumerate(table.published, len(rows)):
        labels.append(paper.short_name)
        for protocol, score in paper.scores:
            axes.plot(score, y, "*", color=colors[protocol], markeredgecolor="black", markersize=10, zorder=3)
    if table.published:
        axes.axhline(len(rows) - 0.5, color="black", linewidth=0.8)
    axes.set_ylim(len(rows) + len(table.published) - 0.4, -0.6)
    axes.set_yticks(range(len(labels)), [_shorten(label) for label in labels], fontsize=8)
    axes.set_xlabel(f"{table.metric}, %", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    title = table.name + (f" (*: as published, {CITATION})" if table.published else "")
    axes.set_title(title, fontsize=9, loc="left", pad=20)
    _draw_legend(axes, table, colors)
    if table.effects:
        _draw_modules(axes, table, rows)


def _draw_legend(axes: Any, table: DatasetTable, colors: dict[str, str]) -> None:
    """Draw a legend above the panel: the colors of protocols, the marks of variants, and the line of the baseline."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", color=color, linestyle="") for color in colors.values()]
    names = list(colors)
    if table.variants != ("",):
        for i, variant in enumerate(table.variants):
            face, marker = "white" if variant else "black", _MARKERS[min(i, len(_MARKERS) - 1)]
            handles.append(Line2D([], [], marker=marker, color="black", markerfacecolor=face, linestyle=""))
            names.append(variant or "without distractors")
    handles.append(Line2D([], [], color="black", linestyle=":", linewidth=0.8))
    axes.legend(
        handles, [*names, "first row"], loc="lower left", bbox_to_anchor=(-0.01, 0.995), ncols=8, frameon=False,
        fontsize=7.5, handletextpad=0.1, columnspacing=0.9, borderpad=0.2,
    )  # fmt: skip


def _draw_modules(axes: Any, table: DatasetTable, rows: Sequence[Row]) -> None:
    """Draw one column of dots per module to the left of the panel. A dark dot means that the module is on."""
    step = _MODULE_WIDTH / _PANEL_WIDTH
    columns = [-step * (len(table.modules) - i) + step * 0.3 for i in range(len(table.modules))]
    for y, row in enumerate(rows):
        for x, state in zip(columns, row.modules, strict=True):
            axes.plot(
                x, y, "o", transform=axes.get_yaxis_transform(), clip_on=False, markersize=4.5,
                color="#333333" if state else "#dddddd",
            )  # fmt: skip
    for name, x in zip(table.modules, columns, strict=True):
        axes.text(x, 1.005, name, transform=axes.transAxes, rotation=90, fontsize=7, ha="center", va="bottom")
    axes.tick_params(axis="y", length=0, pad=_MODULE_WIDTH * 72 * len(table.modules) + 4)


def _draw_effects(axes: Any, table: DatasetTable, effects: Sequence[Effect], variant: str) -> None:
    """Draw main effects as bars, with a line for the 95 % confidence interval under the main protocol.

    Args:
        axes: axes to draw into.
        table: table that contains the effects.
        effects: effects on one variant of the data set.
        variant: name of this variant.
    """
    count = len(table.protocols)
    for i, effect in enumerate(effects):
        for number, protocol in enumerate(table.protocols):
            gain = effect.gains.get(protocol)
            if gain is not None:
                y = i + (number - (count - 1) / 2) * 0.26
                axes.barh(y, gain, 0.24, color=_COLORS[number % len(_COLORS)])
                if protocol == table.main and effect.interval is not None:
                    axes.plot(effect.interval, (y, y), color="black", linewidth=0.8)
    names = [f"{e.weights}, {e.module}" if table.several_weights else e.module for e in effects]
    axes.set_yticks(range(len(names)), [_shorten(name, 18) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(f"gain in {table.metric}, points", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    title = f"{_shorten(variant, 30)}\n" if variant else ""
    axes.set_title(f"{title}gain, mean of {effects[0].pairs} pairs", fontsize=9, loc="left")


def _shorten(text: str, max_length: int = 60) -> str:
    return text if len(text) <= max_length else f"{text[: max_length - 1]}…"
