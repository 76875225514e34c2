"""Build one table of results per data set, in the layout of the paper's tables.

A table has one row per configuration, and shows the scores without and with distractors side by side. It also contains
published scores of the same configurations. If the runs form a full factorial design, that is, there is a run for every
on/off combination of the modules, the table contains the main effects of the modules.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from superglobal.models.pooling import PoolingConfig
from superglobal.reporting.ablations import ABLATION_SETTINGS, MODULES, States, module_states
from superglobal.reporting.paired_comparison import gain_interval
from superglobal.reporting.results import METRICS, main_protocol, main_scores, metric_key
from superglobal.reporting.runs import (
    RunRow,
    milliseconds_per_query,
    missing_text,
    run_rows,
    scores_in_percent,
)
from superglobal.reranking.registry import get_reranker

CITATION = "Shao et al., ICCV 2023, arXiv:2308.06954"


@dataclass(frozen=True)
class Cell:
    """Metrics of one run, to be shown in a table. Scores are in percent, and gains in percentage points."""

    scores: Mapping[str, float | None]  # protocol -> score; empty for a run without metrics
    gains: Mapping[str, float | None]  # protocol -> gain over the baseline; empty for a baseline or without metrics
    interval: tuple[float, float] | None  # 95 % confidence interval of the gain under the main protocol, if known
    milliseconds: float | None  # time per query for search and reranking; None if it was not measured
    missing: str = ""  # "n/a" or "failed" for a run without metrics


@dataclass
class Row:
    """Results of one configuration on all variants of a data set, that is, without and with distractors."""

    name: str  # empty if other columns identify the row
    weights: str  # short name of the weights
    modules: tuple[bool | str, ...]  # state of each module in `DatasetTable.modules`
    settings: tuple[str, ...]  # value of each setting in `DatasetTable.settings`
    cells: dict[str, Cell] = field(default_factory=dict)  # variant of the data set -> metrics


@dataclass(frozen=True)
class Effect:
    """Main effect of a module: its mean gain over all pairs of runs that differ only in this module being on or off."""

    module: str
    variant: str  # variant of the data set, as in `DatasetTable.variants`
    weights: str
    pairs: int  # number of pairs of runs that were compared
    gains: Mapping[str, float | None]  # protocol -> mean gain in percentage points
    interval: tuple[float, float] | None  # 95 % confidence interval of the gain under the main protocol, if known


@dataclass(frozen=True)
class Published:
    """Scores that the paper reports for one data set and backbone, with CVNet's weights and all pooling modules."""

    dataset: str
    backbone: str
    reranked: bool
    scores: tuple[tuple[str, float], ...]  # (protocol, score in percent)
    source: str  # publication or web page from which the scores were copied

    @property
    def short_name(self) -> str:
        return f"paper, {'reranked' if self.reranked else 'no rerank'}"

    @property
    def name(self) -> str:
        return f"{self.short_name}, all modules on ({CITATION})"


@dataclass(frozen=True)
class DatasetTable:
    """Table of the results on one data set, with and without distractors."""

    name: str
    variants: tuple[str, ...]  # "" for the set without distractors; otherwise the distractors, such as "+revisitop1m"
    protocols: tuple[str, ...]  # each variant has one column of scores per protocol
    main: str  # main protocol, for which confidence intervals are computed
    metric: str  # name of the metric, such as "mAP"
    modules: tuple[str, ...]  # `MODULES` if the rows differ in them and all states are known; otherwise empty
    settings: tuple[str, ...]  # names of the other settings in which the rows differ
    rows: tuple[Row, ...]
    notes: tuple[str, ...]  # why rows have no metrics, such as "NAME failed: REASON"
    published: tuple[Published, ...]  # scores that the paper reports for configurations in the table
    effects: tuple[Effect, ...]  # main effects if the runs form a full factorial design; otherwise empty

    @property
    def several_weights(self) -> bool:
        """True if the rows have different weights, so that the table needs a column for them."""
        return len({row.weights for row in self.rows}) > 1

    def label(self, row: Row) -> str:
        """Return one line of text that describes the configuration of a row.

        The line contains the weights if the table has several, the name of the row or the modules that are on, and the
        other settings.
        """
        words = [row.weights] if self.several_weights else []
        if row.name:
            words.append(row.name)
        elif self.modules:
            states = zip(self.modules, row.modules, strict=True)
            on = [name if state is True else f"{name} {state}" for name, state in states if state is not False]
            words.append(" + ".join(on) or "no modules")
        words += [f"{name}={value}" for name, value in zip(self.settings, row.settings, strict=True)]
        return ", ".join(words)


def dataset_tables(results: Sequence[dict[str, Any]]) -> list[DatasetTable]:
    """Return one table per data set, in the order in which the data sets appear in the results."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(_name_and_variant(result)[0], []).append(result)
    return [_table(name, group) for name, group in groups.items()]


def _name_and_variant(result: Mapping[str, Any]) -> tuple[str, str]:
    """Split the data set name in a result into the name without distractors and the name of the variant.

    For example, "roxford5k+revisitop1m (3 skipped)" becomes ("roxford5k", "+revisitop1m (3 skipped)").
    """
    name, distractors = result["dataset"], result["config"].get("distractors", {}).get("name")
    if not distractors:
        return name, ""
    match = re.search(r" \(\d+ skipped\)", name)
    skipped = match[0] if match else ""
    return name.replace(f"+{distractors}", "", 1).replace(skipped, "", 1), f"+{distractors}{skipped}"


def _table(name: str, results: Sequence[dict[str, Any]]) -> DatasetTable:
    """Return the table of one data set.

    Args:
        name: name of the data set, without distractors.
        results: all results on this data set, with and without distractors.
    """
    runs = run_rows(results)
    states = [module_states(run.result) for run in runs]
    variants = [_name_and_variant(run.result)[1] for run in runs]
    has_modules = all(None not in state for state in states) and len(set(states)) > 1
    settings = [
        key
        for key in runs[0].settings
        if not (has_modules and _shown_by_modules(key, runs)) and not _shown_by_weights(key, runs)
    ]
    rows: dict[tuple[Any, ...], Row] = {}
    for run, state, variant in zip(runs, states, variants, strict=True):
        modules = tuple(value for value in state if value is not None) if has_modules else ()
        values = tuple(run.settings[key] for key in settings)
        # If other columns identify the row, its name does not contain the folder of the job. A second run of the same
        # configuration gets a separate row.
        row_name = run.name
        if not run.result["ablation"] and (has_modules or settings):
            row_name = run.name.replace(run.result["run"], "", 1)
        keys = ((run.weights, row_name, modules, values, n) for n in range(len(runs)))
        key = next(key for key in keys if key not in rows or variant not in rows[key].cells)
        rows.setdefault(key, Row(row_name.strip(), run.weights, modules, values)).cells[variant] = _cell(run)
    metric, main = next((_metric_and_main(run.result) for run in runs if run.result["metrics"]), ("map", ""))
    return DatasetTable(
        name=name,
        variants=tuple(sorted(dict.fromkeys(variants), key=lambda variant: variant != "")),
        protocols=tuple(dict.fromkeys(protocol for run in runs for protocol in scores_in_percent(run.result))),
        main=main,
        metric=METRICS[metric],
        modules=MODULES if has_modules else (),
        settings=tuple(settings),
        rows=tuple(rows.values()),
        notes=tuple(_notes(runs)),
        published=tuple(dict.fromkeys(paper for run in runs if (paper := published_for(run.result)))),
        effects=tuple(_main_effects(runs, states, variants)) if has_modules and not settings else (),
    )


def _notes(runs: Sequence[RunRow]) -> list[str]:
    """Return one note for each reason why runs have no metrics, such as "RUN1, RUN2 failed: REASON"."""
    names: dict[str, list[str]] = {}
    for run in runs:
        if not run.result["metrics"] and (reason := run.result.get("reason")):
            names.setdefault(f"{missing_text(run.result)}: {reason}", []).append(run.name)
    return [f"{', '.join(dict.fromkeys(rows))} {reason}" for reason, rows in names.items()]


def _metric_and_main(result: Mapping[str, Any]) -> tuple[str, str]:
    """Return the main metric, as a key of `METRICS`, and the main protocol, as a name in `DatasetTable.protocols`.

    Args:
        result: result with metrics.
    """
    stage, protocol = main_protocol(result)
    names = dict(zip(main_scores(result["metrics"][stage]), scores_in_percent(result), strict=True))
    return metric_key(result["metrics"][stage]), names[protocol]


def _shown_by_modules(key: str, runs: Sequence[RunRow]) -> bool:
    """Return True if the columns of the modules already show a setting.

    These columns show only whether reranking is on, so the setting `rerank` needs a column if there are several kinds.

    Args:
        key: name of the setting.
        runs: runs in the table.
    """
    kinds = {run.settings[key] for run in runs} - {"none"}
    return key in ABLATION_SETTINGS and (key != "rerank" or len(kinds) == 1)


def _shown_by_weights(key: str, runs: Sequence[RunRow]) -> bool:
    """Return True if a setting needs no column, because it differs only between runs with different weights.

    Args:
        key: name of the setting.
        runs: runs in the table.
    """
    values = {(run.weights, run.settings[key]) for run in runs}
    return 1 < len(values) == len({run.weights for run in runs})


def _cell(run: RunRow) -> Cell:
    """Return the metrics of a run, and the gains of the run over the baseline, as a cell of the table."""
    scores = scores_in_percent(run.result)
    if run.baseline is None:
        return Cell({}, {}, None, None, missing=missing_text(run.result))
    baseline = {} if run.baseline is run.result else scores_in_percent(run.baseline)
    gains = {
        protocol: None if (score := scores.get(protocol)) is None or value is None else score - value
        for protocol, value in baseline.items()
    }
    return Cell(scores, gains, gain_interval([(run.result, run.baseline)]), milliseconds_per_query(run.result))


def _main_effects(runs: Sequence[RunRow], states: Sequence[States], variants: Sequence[str]) -> list[Effect]:
    """Return the main effects of the modules, for each network and variant whose runs form a full factorial design.

    Args:
        runs: runs on one data set.
        states: states of the modules in each run.
        variants: variant of the data set in each run.
    """
    groups: dict[tuple[str, str], dict[States, dict[str, Any]]] = {}
    for run, state, variant in zip(runs, states, variants, strict=True):
        # Skip runs with a module that is neither on nor off, such as a variant of ReLUP.
        if run.result["metrics"] and all(isinstance(value, bool) for value in state):
            groups.setdefault((variant, run.weights), {})[state] = run.result
    effects = []
    for (variant, weights), group in groups.items():
        varied = [i for i in range(len(MODULES)) if len({state[i] for state in group}) > 1]
        if len(varied) > 1 and _is_full_factorial(group, varied):
            effects += [_effect(i, variant, weights, group) for i in varied]
    return effects


def _is_full_factorial(runs: Mapping[States, Any], varied: Sequence[int]) -> bool:
    """Return True if there is a run for every on/off combination of the modules in `varied`.

    Args:
        runs: states of the modules -> run.
        varied: indices of the modules that are on in some runs and off in others.
    """
    first = next(iter(runs))
    choices = [(False, True) if i in varied else (state,) for i, state in enumerate(first)]
    return all(state in runs for state in itertools.product(*choices))


def _effect(i: int, variant: str, weights: str, runs: Mapping[States, dict[str, Any]]) -> Effect:
    """Return the main effect of one module.

    Args:
        i: index of the module in `MODULES`.
        variant: variant of the data set.
        weights: short name of the weights.
        runs: states of the modules -> result, for all runs of a full factorial design.
    """
    pairs = [(run, runs[(*state[:i], False, *state[i + 1 :])]) for state, run in runs.items() if state[i] is True]
    scores = [(scores_in_percent(on), scores_in_percent(off)) for on, off in pairs]
    gains: dict[str, float | None] = {}
    for protocol in scores[0][0]:
        values = [(on[protocol], off[protocol]) for on, off in scores]
        known = [on - off for on, off in values if on is not None and off is not None]
        gains[protocol] = float(np.mean(known)) if len(known) == len(pairs) else None
    return Effect(MODULES[i], variant, weights, len(pairs), gains, gain_interval(pairs))


_WEBSITE = "paperswithcode.com/paper/global-features-are-all-you-need-for-image"
_SUMMARIES = "summaries of the paper by others"
# This list contains only scores that we could confirm. We could not confirm the scores of the paper's ablation table.
_PUBLISHED = (
    Published("roxford5k", "resnet101", False, (("hard", 72.1),), _SUMMARIES),
    Published("rparis6k", "resnet101", False, (("hard", 83.5),), _SUMMARIES),
    Published("roxford5k", "resnet101", True, (("hard", 80.2),), _WEBSITE),
    Published("rparis6k", "resnet101", True, (("hard", 86.7),), _WEBSITE),
)
# Settings of the paper's pooling. The settings of plain GeM are left out, because GeM+ does not use them.
_POOLING = {k: v for k, v in asdict(PoolingConfig(relup="on")).items() if k not in ("p", "eps", "learn_p")}
_SCALES, _WEIGHTS_FORMAT = [0.7071, 1.0, 1.4142], "CVNet"


def published_for(result: Mapping[str, Any]) -> Published | None:
    """Return the scores that the paper reports for the same data set, network and settings as those of a result.

    Args:
        result: content of `results.json`.

    Returns:
        The published scores; None if the paper reports no such scores.
    """
    config, about = result["config"], result.get("about", {})
    network = about.get("network")
    if network is None or about.get("weights_format") != _WEIGHTS_FORMAT or not _is_paper_protocol(config):
        return None
    pooling = {k: math.inf if network["pooling"].get(k) == "inf" else network["pooling"].get(k) for k in _POOLING}
    if pooling != _POOLING or network["scales"] != _SCALES or network["antialias"]:
        return None
    key = (config["dataset"]["name"], network["backbone"], config["rerank"]["enabled"])
    return next((paper for paper in _PUBLISHED if (paper.dataset, paper.backbone, paper.reranked) == key), None)


def _is_paper_protocol(config: Mapping[str, Any]) -> bool:
    """Return True if the data set, the search and the reranking are configured as in the paper."""
    dataset, rerank = config["dataset"], config["rerank"]
    is_paper_rerank = not rerank["enabled"] or (
        rerank["kind"] == "superglobal"
        and rerank["junk"] == "keep"
        and all(rerank.get(name) == value for name, value in get_reranker("superglobal").complete({}).items())
    )
    return (
        is_paper_rerank
        and dataset["kind"] == "revisited"
        and dataset["crop_query"]
        and dataset["max_side"] is None
        and not config["distractors"]["name"]
        and config["whitening"]["kind"] == "none"
        and config["index"]["kind"] == "flat"
    )
