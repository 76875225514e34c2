"""What each module is worth on average, from every combination of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from superglobal.reporting.runs import SWITCHES, Compared, gain_interval, scores_of

State = tuple[bool | str | None, ...]


@dataclass(frozen=True)
class Effect:
    """The mean over all pairs of runs that differ in `module` alone: the score with it less that without it."""

    module: str
    variant: str
    """Without distractors or with which: `SetTable.variants`."""
    weights: str
    pairs: int
    gains: Mapping[str, float | None]
    """In percent, by protocol or part."""
    interval: tuple[float, float] | None
    """Of the main metric's, 95 %."""


def main_effects(rows: Sequence[Compared], states: Sequence[State], variants: Sequence[str]) -> list[Effect]:
    """Main effects of a full factorial; none for networks whose runs are not every combination of two or more modules.

    Args:
        rows: of one table, apart in nothing but modules, weights and distractors.
        states, variants: which modules are on in each, and its variant.
    """
    groups: dict[tuple[str, str], dict[State, dict[str, Any]]] = {}
    for row, state, variant in zip(rows, states, variants, strict=True):
        # A module that is neither on nor off, such as ReLUP as the reference has it, has no pair.
        if row.result["metrics"] and all(isinstance(one, bool) for one in state):
            groups.setdefault((variant, row.weights), {})[state] = row.result
    found = []
    for key, runs in groups.items():
        varied = [i for i in range(len(SWITCHES)) if len({state[i] for state in runs}) > 1]
        if len(varied) > 1 and _complete(runs, varied):
            found += [_effect(i, *key, runs) for i in varied]
    return found


def _complete(runs: Mapping[State, Any], varied: Sequence[int]) -> bool:
    """Whether every combination of the varied modules is there."""
    first = next(iter(runs))
    combinations = itertools.product((False, True), repeat=len(varied))
    changed = (dict(zip(varied, values, strict=True)) for values in combinations)
    return all(tuple(change.get(i, value) for i, value in enumerate(first)) in runs for change in changed)


def _effect(i: int, variant: str, weights: str, runs: Mapping[State, dict[str, Any]]) -> Effect:
    pairs = [(run, runs[(*state[:i], False, *state[i + 1 :])]) for state, run in runs.items() if state[i] is True]
    scores = [[scores_of(run) for run in pair] for pair in pairs]
    gains: dict[str, float | None] = {}
    for protocol in scores[0][0]:
        values = [(on[protocol], off[protocol]) for on, off in scores]
        known = [on - off for on, off in values if on is not None and off is not None]
        gains[protocol] = float(np.mean(known)) if len(known) == len(pairs) else None
    return Effect(SWITCHES[i], variant, weights, len(pairs), gains, gain_interval(pairs))
