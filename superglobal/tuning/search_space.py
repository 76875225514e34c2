"""Define the settings of pooling and reranking that can be tuned, search for the best ones, and report the result."""

from __future__ import annotations

import csv
import io
import json
import logging
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.config.tuning import SpaceConfig
from superglobal.errors import InputError
from superglobal.metrics.revisited import cluster_interval
from superglobal.models.network import RetrievalNetwork, make_scales
from superglobal.utils.io import write_atomically

log = logging.getLogger(__name__)
_SHORTLIST_LENGTHS = (25, 50, 100, 200, 400, 800)


@dataclass(frozen=True)
class Settings:
    """One combination of settings of pooling and reranking; the defaults are the paper's settings.

    Args:
        gem_plus_p: exponent of GeM+.
        regional_window: window size of Regional-GeM in positions of the feature map; 1 turns Regional-GeM off.
        regional_p: exponent of Regional-GeM.
        scale: whether to use Scale-GeM instead of the mean over the scales.
        scales: number of scales, 1, 3 or 5.
        relup_alpha: lower bound of ReLUP; 0 turns ReLUP off.
        M: number of reranked images.
        K: number of neighbors in reranking.
        beta: weight of the neighbors in reranking.
    """

    gem_plus_p: float = 4.6
    regional_window: int = 5
    regional_p: float = 2.5
    scale: bool = True
    scales: int = 3
    relup_alpha: float = 0.014
    M: int = 400
    K: int = 9
    beta: float = 0.15

    def pooling(self) -> dict[str, Any]:
        """Return the pooling settings as arguments of `PoolingConfig`; parameters of disabled modules are left out."""
        regional = self.regional_window > 1
        return {
            "gem_plus": True,
            "gem_plus_p": self.gem_plus_p,
            "regional": regional,
            **({"regional_window": self.regional_window, "regional_p": self.regional_p} if regional else {}),
            "scale": self.scale,
            **({"relup": "on", "relup_alpha": self.relup_alpha} if self.relup_alpha else {"relup": "off"}),
        }


@dataclass(frozen=True)
class Trial:
    """Settings that the search has tried, with their score."""

    settings: Settings
    score: float  # mAP in 0..1 on the half of the landmarks that is used for the search


def configure(network: RetrievalNetwork, settings: Settings) -> None:
    """Change the pooling and the scales of a network to `settings`.

    ReLUP stays unchanged, because it is part of the backbone.
    """
    pooling = {key: value for key, value in settings.pooling().items() if not key.startswith("relup")}
    network.pooling.config = replace(network.config, **pooling)
    network.scales = make_scales(settings.scales)


def choices(space: SpaceConfig, has_relup: bool, reachable: int) -> dict[str, Any]:
    """Return an Optuna distribution for each setting to tune; every distribution contains the paper's value.

    Args:
        space: configured search space.
        has_relup: whether the backbone supports ReLUP.
        reachable: number of database images that a query can retrieve. With M equal to or above this
            number, every image is reranked, so these values are left out, except for the paper's value 400.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    distributions: dict[str, Any] = {
        "gem_plus_p": FloatDistribution(1.0, 8.0, step=0.2),
        "regional_window": CategoricalDistribution(sorted({5, *space.windows})),
        "regional_p": FloatDistribution(1.0, 6.0, step=0.5),
        "scale": CategoricalDistribution([True, False]),
        "scales": CategoricalDistribution(sorted({3, *space.scales})),
    }
    if has_relup:
        distributions["relup_alpha"] = CategoricalDistribution(sorted({0.014, *space.relup_alphas}))
    if space.rerank:
        distributions["M"] = CategoricalDistribution([m for m in _SHORTLIST_LENGTHS if m < reachable or m == 400])
        distributions["K"] = IntDistribution(1, 20)
        distributions["beta"] = FloatDistribution(0.0, 0.6, step=0.01)
    return distributions


def search(
    distributions: dict[str, Any],
    first: Settings,
    score: Callable[[Settings], float],
    trials: int,
    seed: int,
    journal: Path,
) -> list[Trial]:
    """Try the settings `first`, and then settings proposed by Optuna's TPE sampler.

    Every finished trial is saved, and the settings of a trial depend only on the seed and on the earlier trials. If a
    search is interrupted and resumed, it therefore gives the same trials as a search without interruption. The same is
    true if a finished search is continued with a higher number of trials.

    Args:
        distributions: Optuna distribution of each setting to tune, by name. All other settings have the values in
            `first`.
        first: settings of the first trial.
        score: function that computes the mAP of settings, in 0..1.
        trials: total number of trials.
        seed: seed of the sampler.
        journal: file in which the trials are saved.

    Returns:
        All trials in order, including those of earlier calls.

    Raises:
        InputError: the journal is damaged.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.create_study(storage=storage, study_name="pooling", direction="maximize", load_if_exists=True)
        done = study.get_trials(states=(TrialState.COMPLETE,))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{journal}: damaged or not writable ({error!r}); delete it to restart the search") from error
    if done:
        log.info("Resuming the search after %d finished trials", len(done))
    else:
        params = {name: value for name, value in asdict(first).items() if name in distributions}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=score(first)))
    for number in range(max(1, len(done)), trials):
        # Each trial uses a new sampler with its own seed, because the state of a single sampler for all trials would be
        # lost when the search is interrupted.
        sampler_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(seed=sampler_seed, multivariate=True, constant_liar=False)
        trial = study.ask(distributions)
        value = score(_with_params(first, trial.params))
        study.tell(trial, value)
        log.debug("trial %d: %.4f %s", number, value, trial.params)
    done = study.get_trials(states=(TrialState.COMPLETE,))
    return [Trial(_with_params(first, t.params), t.values[0]) for t in done]


def _with_params(first: Settings, params: dict[str, Any]) -> Settings:
    """Return a copy of `first` in which the settings in `params` have new values.

    Floats are rounded to 6 digits, because Optuna proposes values such as 4.6000000000000005 instead of 4.6.
    """
    rounded: dict[str, Any] = {
        name: round(value, 6) if isinstance(value, float) else value for name, value in params.items()
    }
    return replace(first, **rounded)


def best(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the highest score. If several trials have this score, return the earliest of them."""
    return max(trials, key=lambda trial: trial.score)


@dataclass(frozen=True)
class Outcome:
    """Comparison of the best settings with the paper's settings; all mAP values are in 0..1.

    The landmarks of the validation set are divided into two halves. The best settings are chosen by the mAP on one
    half, the search half. Their gain in mAP over the paper's settings is measured on the other half, the check half.

    Attributes:
        tuned_on: description of the validation set, which is shown with every result that uses the settings.
        winner: best settings.
        paper: settings of the paper.
        search_half: mAP of (winner, paper) on the search half.
        check_half: mAP of (winner, paper) on the check half.
        interval: 95 % confidence interval of the gain on the check half, from a bootstrap over landmarks.
        trials: number of trials.
        queries: number of queries of the check half.
        landmarks: number of landmarks of the check half.
        rerank: True if settings of reranking were tuned, False if reranking was disabled.
    """

    tuned_on: str
    winner: Settings
    paper: Settings
    search_half: tuple[float, float]
    check_half: tuple[float, float]
    interval: tuple[float, float]
    trials: int
    queries: int
    landmarks: int
    rerank: bool

    @property
    def gain(self) -> float:
        """Difference in mAP between the best settings and the paper's settings on the check half."""
        return self.check_half[0] - self.check_half[1]

    @property
    def verdict(self) -> str:
        """Sentence that states the gain, the confidence interval of the gain, and whether it may be due to chance."""
        low, high = (f"{100 * value:+.1f}" for value in self.interval)
        gain = f"{100 * self.gain:+.2f} mAP on the half that was not searched (95 % interval {low} to {high})"
        if self.gain <= 0:
            return f"NO GAIN: {gain}; keep the paper's settings"
        return f"gain {gain}" + ("" if self.interval[0] > 0 else "; the gain may be due to chance")

    def overrides(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the best settings as two dicts, for the configuration groups `pooling` and `rerank`.

        Both dicts also contain `tuned_on`.
        """
        w, mark = self.winner, {"tuned_on": self.tuned_on}
        parameters = {"M": w.M, "K": w.K, "beta": w.beta} if self.rerank else {}
        return {**w.pooling(), **mark}, {"enabled": self.rerank, **parameters, **mark}


def compare(
    trials: Sequence[Trial],
    ap: Sequence[np.ndarray],
    searched: np.ndarray,
    clusters: Sequence[str],
    tuned_on: str,
    rerank: bool,
    seed: int,
) -> Outcome:
    """Compare the best trial with the first trial, which has the paper's settings, on both halves of the landmarks.

    Args:
        trials: all trials, in the order in which they were run.
        ap: two arrays (Q,) with the average precision of every query: the first for the settings of the best trial, the
            second for those of the first trial. NaN for queries without a positive.
        searched: (Q,) bool, True for queries of the search half.
        clusters: landmark of each query.
        tuned_on: description of the validation set.
        rerank: whether reranking was enabled and its settings were tuned, too.
        seed: seed of the bootstrap.
    """
    counted = ~np.isnan(ap[1])
    search_half, check_half = searched & counted, ~searched & counted
    landmarks = np.array(clusters)[check_half]
    return Outcome(
        tuned_on=tuned_on,
        winner=best(trials).settings,
        paper=trials[0].settings,
        search_half=(float(ap[0][search_half].mean()), float(ap[1][search_half].mean())),
        check_half=(float(ap[0][check_half].mean()), float(ap[1][check_half].mean())),
        interval=cluster_interval((ap[0] - ap[1])[check_half], landmarks, seed),
        trials=len(trials),
        queries=int(check_half.sum()),
        landmarks=len(np.unique(landmarks)),
        rerank=rerank,
    )


def write_outcome(folder: Path, name: str, outcome: Outcome, trials: Sequence[Trial]) -> None:
    """Write the results of a tuning run.

    `trials.csv` contains the settings and the mAP of each trial, and `result.json` contains the outcome. Two files in
    `conf/` contain the best settings, so that you can select them by `pooling=<name>` and `rerank=<name>`.

    Args:
        folder: folder to write to.
        name: name of the two configuration files, without extension.
        outcome: comparison of the best settings with the paper's settings.
        trials: all trials, in the order in which they were run.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["trial", *asdict(trials[0].settings), "mAP"])
    for number, trial in enumerate(trials):
        writer.writerow([number, *asdict(trial.settings).values(), repr(trial.score)])
    write_atomically(folder / "trials.csv", text.getvalue().encode())
    summary = {**asdict(outcome), "gain": outcome.gain, "verdict": outcome.verdict}
    write_atomically(folder / "result.json", json.dumps(summary, indent=1).encode())
    pooling, rerank = outcome.overrides()
    comments = _comments(outcome)
    scales = f"scales: {outcome.winner.scales}\n"
    files = {"pooling": f"# @package _global_\n{comments}{scales}pooling:\n{_yaml(pooling, 2)}"}
    files["rerank"] = comments + _yaml(rerank, 0)
    for group, content in files.items():
        write_atomically(folder / "conf" / group / f"{name}.yaml", content.encode())


def usage(folder: Path, name: str, outcome: Outcome, weights: str) -> str:
    """Return text with two commands that evaluate with the best settings.

    The first command uses the configuration files that `write_outcome` has written. The second command contains all
    values and needs no files.

    Args:
        folder: folder that contains `conf/`.
        name: name of the configuration files, without extension.
        outcome: comparison of the best settings with the paper's settings.
        weights: weights of the tuned network, for `weights=`.
    """
    rest = f"dataset=... weights={shlex.quote(weights)}"
    pooling, rerank = outcome.overrides()
    values = [f"scales={outcome.winner.scales}"]
    values += [f"pooling.{key}={json.dumps(value)}" for key, value in pooling.items()]
    values += [f"rerank.{key}={json.dumps(value)}" for key, value in rerank.items()]
    # The value of `tuned_on` contains spaces, so it is quoted for Hydra. The shell needs another pair of quotes.
    by_value = " ".join(f"'{value}'" if " " in value else value for value in values)
    by_file = f"--config-dir {shlex.quote(str(folder / 'conf'))} {rest} pooling={name} rerank={name}"
    return (
        f"Evaluate with these settings: python eval.py {by_file}\n"
        f"or, without the written files: python eval.py {rest} {by_value}"
    )


def _comments(outcome: Outcome) -> str:
    """Return YAML comments that state how the best settings were tuned and what mAP they have."""
    search_half, check_half = (
        "{:.2f} and {:.2f}".format(*(100 * value for value in pair))
        for pair in (outcome.search_half, outcome.check_half)
    )
    lines = (
        outcome.verdict,
        f"Tuned on {outcome.tuned_on}: best of {outcome.trials} trials, of which the first has the paper's settings.",
        f"mAP in percent of these and of the paper's settings: {search_half} on the half that was searched,",
        f"{check_half} on the other half ({outcome.queries} queries of {outcome.landmarks} landmarks).",
        "For both halves, the database contains all images.",
    )
    return "".join(f"# {line}\n" for line in lines)


def _yaml(section: dict[str, Any], indent: int) -> str:
    """Format settings as indented YAML.

    Values are written as JSON, which quotes all strings. Without quotes, YAML would read "on" as a boolean.
    """
    return "".join(f"{' ' * indent}{key}: {json.dumps(value)}\n" for key, value in section.items())
