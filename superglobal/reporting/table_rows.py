"""One table for each data set, in the paper's layout: a row per configuration, the set without and with distractors
side by side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from superglobal.reporting.main_effects import Effect, main_effects
from superglobal.reporting.paper_numbers import Published, published_for
from superglobal.reporting.results import METRICS, main_protocol, main_scores, metric_key
from superglobal.reporting.runs import (
    ABLATED,
    LADDER,
    SWITCHES,
    Compared,
    compared,
    gain_interval,
    milliseconds,
    no_number,
    scores_of,
)


@dataclass(frozen=True)
class Cell:
    """The numbers of one run, in percent; by protocol or part."""

    scores: Mapping[str, float | None]
    gains: Mapping[str, float | None]
    """Over the baseline's; empty for a baseline."""
    interval: tuple[float, float] | None
    """Of the main metric's gain, 95 %."""
    milliseconds: float | None
    missing: str = ""
    """Why there are no scores: "n/a" or "failed"."""


@dataclass
class Line:
    """A configuration."""

    run: str
    weights: str
    modules: tuple[bool | str, ...]
    """On, off or as what, by `SetTable.modules`."""
    settings: tuple[str, ...]
    """By `SetTable.settings`."""
    cells: dict[str, Cell] = field(default_factory=dict)
    """By `SetTable.variants`."""


@dataclass(frozen=True)
class SetTable:
    """What was measured on one data set, and what is published for the same."""

    name: str
    variants: tuple[str, ...]
    """"" is the set itself, others what its database is joined by, such as "+revisitop1m"."""
    protocols: tuple[str, ...]
    """Columns of each variant, in the order of the metric."""
    main: str
    """The protocol that gains and intervals are about."""
    metric: str
    modules: tuple[str, ...]
    """Of `SWITCHES`, if the rows differ in them and in all rows are known; else empty."""
    settings: tuple[str, ...]
    """What else the rows differ in."""
    lines: tuple[Line, ...]
    published: tuple[Published, ...]
    """Never measured here; each stands for a line whose data set, network and configuration it is about."""
    effects: tuple[Effect, ...]
    """Of a full factorial: what each module is worth on average."""

    @property
    def several_weights(self) -> bool:
        return len({line.weights for line in self.lines}) > 1

    @property
    def named(self) -> bool:
        """Whether a row has a name beside its columns."""
        return any(line.run for line in self.lines)


def tables_of(results: Sequence[dict[str, Any]]) -> list[SetTable]:
    """A table for each data set that is searched, in the order of the results."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(_split(result)[0], []).append(result)
    return [_table(name, group) for name, group in groups.items()]


def _split(result: Mapping[str, Any]) -> tuple[str, str]:
    """Data set and variant: "roxford5k+revisitop1m (3 unreadable)" is "+revisitop1m (3 unreadable)" of "roxford5k"."""
    name, joined = result["dataset"], result["config"].get("distractors", {}).get("name")
    if not joined:
        return name, ""
    unreadable = re.search(r" \(\d+ unreadable\)", name)
    lost = unreadable[0] if unreadable else ""
    return name.replace(f"+{joined}", "", 1).replace(lost, "", 1), f"+{joined}{lost}"


def _table(name: str, results: Sequence[dict[str, Any]]) -> SetTable:
    rows = compared(results)
    states = [module_states(row.result) for row in rows]
    shown = all(None not in state for state in states) and len(set(states)) > 1
    told = [key for key in rows[0].settings if not (shown and _is_told(key, rows)) and not _is_of_weights(key, rows)]
    variants = sorted(dict.fromkeys(_split(row.result)[1] for row in rows), key=lambda variant: variant != "")
    lines: dict[tuple[Any, ...], Line] = {}
    for row, state in zip(rows, states, strict=True):
        variant = _split(row.result)[1]
        modules = tuple(one for one in state if one is not None) if shown else ()
        settings = tuple(row.settings[key] for key in told)
        # A job's folder names no configuration where columns do; a second run of the same gets a row of its own.
        run = row.run if row.result["label"] or not (shown or told) else row.run.replace(row.result["place"], "", 1)
        keys = ((row.weights, run, modules, settings, n) for n in range(len(rows)))
        key = next(key for key in keys if key not in lines or variant not in lines[key].cells)
        line = lines.setdefault(key, Line(run.strip(), row.weights, modules, settings))
        line.cells[variant] = _cell(row)
    metric, main = next((_measured(row.result) for row in rows if row.result["metrics"]), ("map", ""))
    return SetTable(
        name=name,
        variants=tuple(variants),
        protocols=tuple(dict.fromkeys(protocol for row in rows for protocol in scores_of(row.result))),
        main=main,
        metric=METRICS[metric],
        modules=SWITCHES if shown else (),
        settings=tuple(told),
        lines=tuple(lines.values()),
        published=tuple(dict.fromkeys(found for row in rows if (found := published_for(row.result)))),
        effects=tuple(main_effects(rows, states, [_split(row.result)[1] for row in rows]))
        if shown and not told
        else (),
    )


def _measured(result: Mapping[str, Any]) -> tuple[str, str]:
    """Key of the metric, and the name that `scores_of` gives to the main one."""
    stage, protocol = main_protocol(result)
    names = dict(zip(main_scores(result["metrics"][stage]), scores_of(result), strict=True))
    return metric_key(result["metrics"][stage]), names[protocol]


def _is_told(key: str, rows: Sequence[Compared]) -> bool:
    """Whether the columns of modules say all that this setting does; the kind of a reranking they do not."""
    kinds = {row.settings[key] for row in rows} - {"none"}
    return key in ABLATED and (key != "rerank" or len(kinds) == 1)


def _is_of_weights(key: str, rows: Sequence[Compared]) -> bool:
    """Whether the name of the weights says all that this setting does."""
    values = {(row.weights, row.settings[key]) for row in rows}
    return 1 < len(values) == len({row.weights for row in rows})


def module_states(result: Mapping[str, Any]) -> tuple[bool | str | None, ...]:
    """Of `SWITCHES` each on or off, ReLUP also as what; None where it is not known."""
    if result["label"] in LADDER:
        return LADDER[result["label"]]
    config = result["config"]
    given = config.get("pooling", {})
    pooling = result.get("about", {}).get("network", {}).get("pooling", given)
    relup = {"on": True, "auto": True, "off": False}.get(pooling.get("relup"), pooling.get("relup"))
    return (*(pooling.get(name) for name in SWITCHES[:3]), relup, config.get("rerank", {}).get("enabled"))


def _cell(row: Compared) -> Cell:
    scores = scores_of(row.result)
    if row.baseline is None:
        return Cell({}, {}, None, None, missing=no_number(row.result))
    before = {} if row.baseline is row.result else scores_of(row.baseline)
    gains = {
        protocol: None if (now := scores.get(protocol)) is None or value is None else now - value
        for protocol, value in before.items()
    }
    interval = gain_interval([(row.result, row.baseline)])
    return Cell(scores, gains, interval, milliseconds(row.result))
