"""What is chosen, and the search for the best of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from superglobal.config.evaluation import RerankConfig
from superglobal.config.tuning import SpaceConfig
from superglobal.errors import InputError
from superglobal.models.network import RetrievalNetwork, make_scales

log = logging.getLogger(__name__)
_DEPTHS = (25, 50, 100, 200, 400, 800)


@dataclass(frozen=True)
class Settings:
    """One choice; the defaults are the paper's.

    Args:
        gem_plus_p: exponent of GeM+.
        regional_window, regional_p: of RegionalGeM, in cells; a window of 1 switches it off.
        scale: Scale-GeM, or else the mean over the scales.
        scales: how many, 1, 3 or 5.
        relup_alpha: floor of ReLUP; 0 switches it off.
        M, K, beta: of reranking.
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
        """As settings of `PoolingConfig`; what is switched off has no constants."""
        on = self.regional_window > 1
        return {
            "gem_plus": True,
            "gem_plus_p": self.gem_plus_p,
            "regional": on,
            **({"regional_window": self.regional_window, "regional_p": self.regional_p} if on else {}),
            "scale": self.scale,
            **({"relup": "on", "relup_alpha": self.relup_alpha} if self.relup_alpha else {"relup": "off"}),
        }

    def rerank(self, enabled: bool = True) -> RerankConfig:
        return RerankConfig(M=self.M, K=self.K, beta=self.beta) if enabled else RerankConfig(enabled=False)


@dataclass(frozen=True)
class Trial:
    """Settings that were tried, and their mAP (0..1) on the half that is searched."""

    settings: Settings
    score: float


def configure(network: RetrievalNetwork, settings: Settings) -> None:
    """Make `network` pool as the settings say; ReLUP, which is inside the backbone, stays."""
    pooling = {key: value for key, value in settings.pooling().items() if not key.startswith("relup")}
    network.pooling.config = replace(network.config, **pooling)
    network.scales = make_scales(settings.scales)


def paper(has_relup: bool) -> Settings:
    """The paper's settings, without ReLUP where the backbone has no place for it."""
    return Settings() if has_relup else Settings(relup_alpha=0.0)


def choices(space: SpaceConfig, has_relup: bool, reachable: int) -> dict[str, Any]:
    """Optuna's distributions by name of the setting; the paper's values are in every one.

    Args:
        space: lists to choose from.
        has_relup: whether the backbone has a place for ReLUP.
        reachable: images that a query can find; a deeper M is the same as all of them, which the paper's 400 stands
            for.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {
        "gem_plus_p": FloatDistribution(1.0, 8.0, step=0.2),
        "regional_window": CategoricalDistribution(sorted({5, *space.windows})),
        "regional_p": FloatDistribution(1.0, 6.0, step=0.5),
        "scale": CategoricalDistribution([True, False]),
        "scales": CategoricalDistribution(sorted({3, *space.scales})),
    }
    if has_relup:
        found["relup_alpha"] = CategoricalDistribution(sorted({0.014, *space.relup_alphas}))
    if space.rerank:
        found["M"] = CategoricalDistribution([m for m in _DEPTHS if m < reachable or m == 400])
        found["K"] = IntDistribution(1, 20)
        found["beta"] = FloatDistribution(0.0, 0.6, step=0.01)
    return found


def search(
    distributions: dict[str, Any],
    first: Settings,
    score: Callable[[Settings], float],
    trials: int,
    seed: int,
    journal: Path,
) -> list[Trial]:
    """Try `first`, then what Optuna's TPE proposes, until there are `trials` of them.

    Every trial is on disk when it is done, and each proposal depends on the seed and the trials before it alone: a
    search that was interrupted, or is given more trials, goes on as if it had never stopped.

    Args:
        distributions: of the settings that are searched; the others stay as in `first`.
        score: mAP of settings, in 0..1.
        journal: file of the trials.

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
        raise InputError(f"{journal}: damaged or not writable ({error!r}); remove it to search anew") from error
    if done:
        log.info("%d trials are there already", len(done))
    else:
        params = {name: value for name, value in asdict(first).items() if name in distributions}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=score(first)))
    for number in range(max(1, len(done)), trials):
        # A sampler of its own for each trial: the state of one that ran through would be lost with the process.
        own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        study.sampler = optuna.samplers.TPESampler(seed=own, multivariate=True, constant_liar=False)
        trial = study.ask(distributions)
        value = score(_settings(first, trial.params))
        study.tell(trial, value)
        log.debug("trial %d: %.4f %s", number, value, trial.params)
    done = study.get_trials(states=(TrialState.COMPLETE,))
    return [Trial(_settings(first, t.params), t.values[0]) for t in done]


def _settings(first: Settings, params: dict[str, Any]) -> Settings:
    """Steps of 0.2 add up to 4.6000000000000005; say the number that was meant."""
    rounded: dict[str, Any] = {
        name: round(value, 6) if isinstance(value, float) else value for name, value in params.items()
    }
    return replace(first, **rounded)
