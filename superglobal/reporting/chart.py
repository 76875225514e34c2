"""The tables of a comparison as one picture: a row per configuration, a mark per score."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from superglobal.reporting.main_effects import Effect
from superglobal.reporting.paper_numbers import CITATION
from superglobal.reporting.table_formats import line_name
from superglobal.reporting.table_rows import Line, SetTable
from superglobal.utils.io import write_atomically

_COLOURS = ("#4393c3", "#1a9850", "#d6604d", "#762a83", "#b8860b")
_VARIANTS = ("o", "D", "s", "^")  # marks; the first, of the set itself, is filled
_ROW, _EDGES, _WIDTH = 0.24, 1.15, 5.2  # inches
_MATRIX = 0.16  # inches a module
_MOST_ROWS = 120


def draw_chart(path: Path, tables: Sequence[SetTable]) -> None:
    """Write a PNG: a panel for each data set, one above the other, and beside it the effects of a full factorial.

    Of a full factorial the rows are ordered by the main score, best first, and dots say which modules are on; others
    stand as in the table. What is published is a star under the measured rows. Tables without a number are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [table for table in tables if _rows(table)]
    if not shown:
        return
    heights = [
        _EDGES + _names_above(table) + _ROW * max(3, len(_rows(table)) + len(table.published)) for table in shown
    ]
    labels = max(len(label) for table in shown for label in _labels(table))
    left = 0.35 + max(0.068 * min(labels, 60), *(_MATRIX * len(t.modules) if t.effects else 0 for t in shown))
    right = 3.4 if any(table.effects for table in shown) else 0.25
    width, height = left + _WIDTH + right, sum(heights)
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    top = height
    for table, tall in zip(shown, heights, strict=True):
        top -= tall
        inside = tall - _EDGES - _names_above(table)
        _panel(figure.add_axes((left / width, (top + 0.5) / height, _WIDTH / width, inside / height)), table)
        groups = {variant: [e for e in table.effects if e.variant == variant] for variant in table.variants}
        groups = {variant: effects for variant, effects in groups.items() if effects}
        each = inside / max(1, len(groups))
        for i, (variant, effects) in enumerate(groups.items()):
            bars = min(each - 0.75 * bool(i or len(groups) > 1), 0.34 * len(effects) + 0.3)
            bottom = top + 0.5 + inside - i * each - bars
            _effects(
                figure.add_axes(((left + _WIDTH + 1.0) / width, bottom / height, 2.2 / width, bars / height)),
                table,
                effects,
                variant,
            )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())


def _names_above(table: SetTable) -> float:
    """Inches for the modules' names."""
    return 0.35 if table.effects else 0.0


def _rows(table: SetTable) -> list[Line]:
    """The lines that have a number, in the chart's order."""
    lines = [line for line in table.lines if any(cell.scores for cell in line.cells.values())]
    if table.effects:
        lines.sort(key=lambda line: -max(cell.scores.get(table.main) or 0 for cell in line.cells.values()))
    return lines[:_MOST_ROWS]


def _labels(table: SetTable) -> list[str]:
    if table.effects:
        return [line.weights if table.several_weights else "" for line in _rows(table)]
    return [line_name(table, line) for line in _rows(table)]


def _panel(axes: Any, table: SetTable) -> None:
    lines, labels = _rows(table), _labels(table)
    for place, line in enumerate(lines):
        for variant, cell in line.cells.items():
            mark = _VARIANTS[min(table.variants.index(variant), len(_VARIANTS) - 1)]
            for number, protocol in enumerate(table.protocols):
                if (score := cell.scores.get(protocol)) is not None:
                    colour = _COLOURS[number % len(_COLOURS)]
                    face = "white" if variant else colour
                    axes.plot(score, place, mark, color=colour, markerfacecolor=face, markersize=5.5, zorder=3)
    first = next(iter(table.lines[0].cells.values()), None)
    for number, protocol in enumerate(table.protocols):
        # The baseline, to see at a glance who is on which side of it.
        if first is not None and not first.gains and (score := first.scores.get(protocol)) is not None:
            axes.axvline(score, color=_COLOURS[number % len(_COLOURS)], linewidth=0.8, linestyle=":", zorder=1)
    for place, one in enumerate(table.published, len(lines)):
        labels.append(one.short)
        for protocol, score in one.scores:
            colour = _COLOURS[table.protocols.index(protocol) % len(_COLOURS)]
            axes.plot(score, place, "*", color=colour, markeredgecolor="black", markersize=10, zorder=3)
    if table.published:
        axes.axhline(len(lines) - 0.5, color="black", linewidth=0.8)
    axes.set_ylim(len(lines) + len(table.published) - 0.4, -0.6)
    axes.set_yticks(range(len(labels)), [_shortened(label) for label in labels], fontsize=8)
    axes.set_xlabel(f"{table.metric}, %", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    title = table.name + (f" (*: as published, {CITATION})" if table.published else "")
    axes.set_title(title, fontsize=9, loc="left", pad=20)
    axes.legend(*_keys(table), loc="lower left", bbox_to_anchor=(-0.01, 0.995), ncols=8, frameon=False, fontsize=7.5,
                handletextpad=0.1, columnspacing=0.9, borderpad=0.2)  # fmt: skip
    if table.effects:
        _matrix(axes, table, lines)


def _keys(table: SetTable) -> tuple[list[Any], list[str]]:
    """What the marks mean."""
    from matplotlib.lines import Line2D

    def mark(shape: str, colour: str, filled: bool) -> Any:
        return Line2D([], [], marker=shape, color=colour, markerfacecolor=colour if filled else "white", linestyle="")

    handles = [mark("o", _COLOURS[i % len(_COLOURS)], True) for i in range(len(table.protocols))]
    names = list(table.protocols)
    if table.variants != ("",):
        for i, variant in enumerate(table.variants):
            handles.append(mark(_VARIANTS[min(i, len(_VARIANTS) - 1)], "black", not variant))
            names.append(variant or "without distractors")
    handles.append(Line2D([], [], color="black", linestyle=":", linewidth=0.8))
    return handles, [*names, "first row"]


def _matrix(axes: Any, table: SetTable, lines: Sequence[Line]) -> None:
    """Dots left of the panel, a column for each module: full where it is on."""
    step = _MATRIX / _WIDTH
    places = {name: -step * (len(table.modules) - i) + step * 0.3 for i, name in enumerate(table.modules)}
    for place, line in enumerate(lines):
        for x, state in zip(places.values(), line.modules, strict=True):
            axes.plot(
                x, place, "o", transform=axes.get_yaxis_transform(), clip_on=False, markersize=4.5,
                color="#333333" if state else "#dddddd",
            )  # fmt: skip
    for name, x in places.items():
        axes.text(x, 1.005, name, transform=axes.transAxes, rotation=90, fontsize=7, ha="center", va="bottom")
    axes.tick_params(axis="y", length=0, pad=_MATRIX * 72 * len(table.modules) + 4)


def _effects(axes: Any, table: SetTable, effects: Sequence[Effect], variant: str) -> None:
    """What each module is worth on average, on one variant of the set."""
    protocols = list(table.protocols)
    for place, effect in enumerate(effects):
        for number, protocol in enumerate(protocols):
            gain = effect.gains.get(protocol)
            if gain is not None:
                y = place + (number - (len(protocols) - 1) / 2) * 0.26
                axes.barh(y, gain, 0.24, color=_COLOURS[number % len(_COLOURS)])
                if protocol == table.main and effect.interval is not None:
                    axes.plot(effect.interval, (y, y), color="black", linewidth=0.8)
    names = [f"{e.weights}, {e.module}" if table.several_weights else e.module for e in effects]
    axes.set_yticks(range(len(names)), [_shortened(name, 18) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(f"{table.metric} gained, points", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    where = f"{_shortened(variant, 30)}\n" if variant else ""
    axes.set_title(f"{where}gain, mean of {effects[0].pairs} pairs", fontsize=9, loc="left")


def _shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
