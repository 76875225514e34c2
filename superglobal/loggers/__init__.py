"""Where numbers go beside a run's own files: CSV always, Weights & Biases and TensorBoard if configured.

What a run computes is on disk already, so that a tracker that fails costs a warning and not the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from pytorch_lightning.loggers import CSVLogger, Logger

from superglobal.config.common import require_wandb
from superglobal.config.evaluation import EvalConfig
from superglobal.config.training import TrainConfig
from superglobal.loggers.csv_tensorboard import CurveFile
from superglobal.loggers.record import Evaluated
from superglobal.utils.distributed import first_process
from superglobal.utils.io import EXPORT

__all__ = ["CurveFile", "Evaluated", "evaluation_loggers", "training_loggers"]

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """One of the places."""

    def log(self, found: Any) -> None: ...

    def close(self, error: BaseException | None) -> None:
        """Finish, whatever became of the run; `error` is what ended it."""


class _Careful:
    """A tracker whose failures are warnings, and that is closed whatever failed; without `start`, none."""

    def __init__(self, name: str, folder: Path, start: Callable[[], Tracker] | None) -> None:
        self.name, self.folder = name, folder
        self.tracker: Tracker | None = None
        self._attempt(start)

    def _attempt(self, action: Callable[[], Tracker | None] | None) -> None:
        try:
            if action is not None:
                self.tracker = action()
        except Exception as error:  # of the tracker, its settings or the network
            log.warning("%s failed (%s); everything else is in %s", self.name, error, self.folder)

    def log(self, found: Any) -> None:
        def told(tracker: Tracker) -> Tracker:
            tracker.log(found)
            return tracker

        self._with(told)

    def close(self, error: BaseException | None) -> None:
        def closed(tracker: Tracker) -> None:
            tracker.close(error)

        self._with(closed)

    def _with(self, action: Callable[[Tracker], Tracker | None]) -> None:
        if (tracker := self.tracker) is not None:
            self._attempt(lambda: action(tracker))


@contextmanager
def _open(trackers: list[_Careful]) -> Iterator[None]:
    """Close all of them at the end, also after an error, Ctrl-C or SIGTERM."""
    try:
        yield
    except BaseException as error:
        for tracker in trackers:
            tracker.close(error)
        raise
    for tracker in trackers:
        tracker.close(None)


@contextmanager
def evaluation_loggers(config: EvalConfig, folder: Path, sweep: str | None) -> Iterator[Callable[[Evaluated], None]]:
    """What takes the result of an evaluation; to be open while it runs, so that trackers show what fails, too.

    Args:
        config: of the run.
        folder: of the run; `csv/`, `wandb/` and `tensorboard/` lie there.
        sweep: name of the sweep that it is a job of; None for none.

    Raises:
        InputError: W&B is enabled and not installed.
    """
    require_wandb(config.logger)
    trackers: list[_Careful] = []
    if first_process():
        trackers = [
            _Careful("CSV", folder, lambda: _Numbers(folder)),
            _Careful("TensorBoard", folder, _tensorboard(config, folder) if config.logger.tensorboard else None),
            _Careful("W&B", folder, _wandb(config, folder, sweep) if config.logger.wandb else None),
        ]

    def track(found: Evaluated) -> None:
        for tracker in trackers:
            tracker.log(found)

    with _open(trackers):
        yield track


def _tensorboard(config: EvalConfig, folder: Path) -> Callable[[], Tracker]:
    def start() -> Tracker:
        from superglobal.loggers.csv_tensorboard import TensorBoardEvaluation

        return TensorBoardEvaluation(config, folder)

    return start


def _wandb(config: EvalConfig, folder: Path, sweep: str | None) -> Callable[[], Tracker]:
    def start() -> Tracker:
        from superglobal.loggers.wandb import WandbEvaluation

        return WandbEvaluation(config, folder, sweep)

    return start


class _Numbers:
    """The numbers as a CSV of one row, and the settings, by Lightning's logger."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def log(self, found: Evaluated) -> None:
        table = CSVLogger(self.folder, name="csv", version="")
        table.log_hyperparams(found.summary["config"])
        table.log_metrics(dict(found.numbers()))
        table.finalize("success")

    def close(self, error: BaseException | None) -> None:
        """Nothing is open."""


@contextmanager
def training_loggers(
    config: TrainConfig, folder: Path, step: int, about: dict[str, Any], sweep: str | None
) -> Iterator[list[Logger]]:
    """Loggers for the curves of one training.

    Args:
        config: of the run.
        folder: of the run; `curves.csv`, `wandb/` and `tensorboard/` lie there.
        step: where the run goes on; points beyond it are of a part that was lost.
        about: further plain facts: git state, versions.
        sweep: name of the sweep that it is a job of; None for none.
    """
    loggers: list[Logger] = [CurveFile(folder / "curves.csv", step)]
    settings = {**asdict(config), **about}

    def tensorboard() -> Tracker:
        from superglobal.loggers.csv_tensorboard import TensorBoardCurves

        curves = TensorBoardCurves(folder, step)
        curves.log_hyperparams(settings)
        loggers.append(curves)
        return curves

    def wandb() -> Tracker:
        from superglobal.loggers.wandb import WandbTraining

        training = WandbTraining(config, settings, folder, folder / EXPORT, sweep)
        loggers.append(training.curves)
        return training

    trackers = []
    if first_process():
        trackers = [
            _Careful("TensorBoard", folder, tensorboard if config.logger.tensorboard else None),
            _Careful("W&B", folder, wandb if config.logger.wandb else None),
        ]
    with _open(trackers):
        yield loggers
