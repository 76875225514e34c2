"""What a search found: both halves' scores, and configurations that `eval.py` takes."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.metrics.revisited import cluster_interval
from superglobal.tuning.search_space import Settings, Trial
from superglobal.utils.io import write_atomically


@dataclass(frozen=True)
class Outcome:
    """The winner against the paper's settings; mAP in 0..1.

    Attributes:
        tuned_on: the photos, as every result made with the settings will say.
        winner, paper: settings.
        searched, other: mAP (winner, paper) of the half that was searched and of the one that was not.
        interval: 95 % of the gain on the other half, whole landmarks drawn with replacement.
        trials: how many were tried.
        queries, landmarks: of the other half.
        rerank: whether reranking was searched, or off.
    """

    tuned_on: str
    winner: Settings
    paper: Settings
    searched: tuple[float, float]
    other: tuple[float, float]
    interval: tuple[float, float]
    trials: int
    queries: int
    landmarks: int
    rerank: bool

    @property
    def gain(self) -> float:
        """Of mAP on the half that was not searched."""
        return self.other[0] - self.other[1]

    @property
    def verdict(self) -> str:
        low, high = (f"{100 * value:+.1f}" for value in self.interval)
        found = f"{100 * self.gain:+.2f} mAP on the half that was not searched (95 % {low} to {high})"
        if self.gain <= 0:
            return f"NO GAIN: {found}; keep the paper's settings"
        return f"gain {found}" + ("" if self.interval[0] > 0 else "; the interval holds zero: it may be chance")


def compare(
    trials: Sequence[Trial],
    ap: Sequence[np.ndarray],
    searched: np.ndarray,
    clusters: Sequence[str],
    tuned_on: str,
    rerank: bool,
    seed: int,
) -> Outcome:
    """Score the best trial against the first, the paper's, on both halves.

    Args:
        trials: in order; of equals the earlier wins.
        ap: (Q,) average precision of every query with the best trial's settings and with the first's, NaN where a
            query has no positive.
        searched: (Q,) bool, queries of the half that was searched.
        clusters: the landmark of each query.
        tuned_on, rerank: see `Outcome`.
        seed: of the bootstrap.
    """
    counted = ~np.isnan(ap[1])
    half, other = searched & counted, ~searched & counted
    labels = np.array(clusters)[other]
    return Outcome(
        tuned_on=tuned_on,
        winner=best(trials).settings,
        paper=trials[0].settings,
        searched=(float(ap[0][half].mean()), float(ap[1][half].mean())),
        other=(float(ap[0][other].mean()), float(ap[1][other].mean())),
        interval=cluster_interval((ap[0] - ap[1])[other], labels, seed),
        trials=len(trials),
        queries=int(other.sum()),
        landmarks=len(np.unique(labels)),
        rerank=rerank,
    )


def best(trials: Sequence[Trial]) -> Trial:
    """The trial of the highest score, of equals the earliest."""
    return max(trials, key=lambda trial: trial.score)


def write_outcome(folder: Path, name: str, outcome: Outcome, trials: Sequence[Trial]) -> None:
    """Write `trials.csv`, `result.json`, and under `conf` a `pooling` and a `rerank` option called `name`."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["trial", *asdict(trials[0].settings), "mAP"])
    for number, trial in enumerate(trials):
        writer.writerow([number, *asdict(trial.settings).values(), repr(trial.score)])
    write_atomically(folder / "trials.csv", text.getvalue().encode())
    summary = {**asdict(outcome), "gain": outcome.gain, "verdict": outcome.verdict}
    write_atomically(folder / "result.json", json.dumps(summary, indent=1).encode())
    pooling, reranking = _sections(outcome)
    head = _comments(outcome)
    scales = f"scales: {outcome.winner.scales}\n"
    text_of = {"pooling": f"# @package _global_\n{head}{scales}pooling:\n{_yaml(pooling, 2)}"}
    text_of["rerank"] = head + _yaml(reranking, 0)
    for group, lines in text_of.items():
        write_atomically(folder / "conf" / group / f"{name}.yaml", lines.encode())


def how_to_use(folder: Path, name: str, outcome: Outcome, weights: str) -> str:
    """Command lines that evaluate with the winner, by its files and by its values."""
    rest = f"dataset=... weights={shlex.quote(weights)}"
    pooling, reranking = _sections(outcome)
    values = [f"scales={outcome.winner.scales}"]
    values += [f"pooling.{key}={_plain(value)}" for key, value in pooling.items()]
    values += [f"rerank.{key}={_plain(value)}" for key, value in reranking.items()]
    # The mark is a text with spaces, for the shell and for Hydra.
    by_value = " ".join(f"'{value}'" if " " in value else value for value in values)
    by_file = f"--config-dir {shlex.quote(str(folder / 'conf'))} {rest} pooling={name} rerank={name}"
    return f"to use it:   python eval.py {by_file}\nor by value: python eval.py {rest} {by_value}"


def _sections(outcome: Outcome) -> tuple[dict[str, Any], dict[str, Any]]:
    pooling = {**outcome.winner.pooling(), "tuned_on": outcome.tuned_on}
    r = outcome.winner.rerank(outcome.rerank)
    values = {"M": r.M, "K": r.K, "beta": r.beta} if outcome.rerank else {}
    return pooling, {"enabled": r.enabled, **values, "tuned_on": outcome.tuned_on}


def _comments(outcome: Outcome) -> str:
    (won, paper), (won_other, paper_other) = outcome.searched, outcome.other
    lines = (
        outcome.verdict,
        f"Tuned on {outcome.tuned_on}: best of {outcome.trials} trials, the paper's settings the first of them.",
        f"mAP in percent, winner and paper: {100 * won:.2f} and {100 * paper:.2f} on the half that was searched, "
        f"{100 * won_other:.2f} and {100 * paper_other:.2f} on the other",
        f"({outcome.queries} queries of {outcome.landmarks} landmarks there; all photos are in the database of both).",
    )
    return "".join(f"# {line}\n" for line in lines)


def _yaml(section: dict[str, Any], indent: int) -> str:
    return "".join(f"{' ' * indent}{key}: {_plain(value)}\n" for key, value in section.items())


def _plain(value: Any) -> str:
    """As YAML and as Hydra's command line read it; on, off and texts quoted."""
    return json.dumps(value)
