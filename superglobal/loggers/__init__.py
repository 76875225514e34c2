"""Loggers: CSV always, Weights & Biases and TensorBoard if enabled.

A run writes its own files first, so a logger that fails causes a warning and does not end the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from superglobal.config.common import require_wandb
from superglobal.config.evaluation import EvalConfig
from superglobal.config.training import TrainConfig
from superglobal.loggers.record import EvaluationRecord
from superglobal.utils.distributed import first_process
from superglobal.utils.io import EXPORT

__all__ = ["EvaluationRecord", "evaluation_loggers", "training_loggers"]

log = logging.getLogger(__name__)


class _SafeTracker:
    """A tracker whose failures become warnings.

    Trackers have `close(error)`, where `error` is what ended the run, if anything, and those of evaluations
    `log(record)`; trainings log through Lightning.
    """

    def __init__(self, name: str, folder: Path, start: Callable[[], Any]) -> None:
        self.name, self.folder = name, folder
        self.tracker = self._call(start)

    def _call(self, action: Callable[..., Any], *args: Any) -> Any:
        try:
            return action(*args)
        except Exception as error:  # of the tracker, its settings or the network
            log.warning("%s failed (%s); everything else is in %s", self.name, error, self.folder)
            return None

    def log(self, record: EvaluationRecord) -> None:
        if self.tracker is not None:
            self._call(self.tracker.log, record)

    def close(self, error: BaseException | None) -> None:
        if self.tracker is not None:
            self._call(self.tracker.close, error)


@contextmanager
def _trackers(folder: Path, starts: dict[str, Callable[[], Any] | None]) -> Iterator[list[_SafeTracker]]:
    """Start the trackers in the first process, and close them after the run, also after Ctrl-C or SIGTERM."""
    names = starts if first_process() else ()
    trackers = [_SafeTracker(name, folder, start) for name in names if (start := starts[name]) is not None]
    error: BaseException | None = None
    try:
        yield trackers
    except BaseException as caught:
        error = caught
        raise
    finally:
        for tracker in trackers:
            tracker.close(error)


@contextmanager
def evaluation_loggers(
    config: EvalConfig, folder: Path, sweep: str | None
) -> Iterator[Callable[[EvaluationRecord], None]]:
    """Yield a function that logs the result of an evaluation; open during the run, to show runs that fail.

    Args:
        config: Settings of the run.
        folder: Folder of the run; `csv/`, `wandb/` and `tensorboard/` are created there.
        sweep: Name of the sweep that the run belongs to.

    Raises:
        InputError: W&B is enabled and not installed.
    """
    require_wandb(config.logger)

    def csv() -> Any:
        from superglobal.loggers.csv_tensorboard import CsvEvaluation

        return CsvEvaluation(folder)

    def tensorboard() -> Any:
        from superglobal.loggers.csv_tensorboard import TensorBoardEvaluation

        return TensorBoardEvaluation(config, folder)

    def wandb() -> Any:
        from superglobal.loggers.wandb import WandbEvaluation

        return WandbEvaluation(config, folder, sweep)

    starts = {
        "CSV": csv,
        "TensorBoard": tensorboard if config.logger.tensorboard else None,
        "W&B": wandb if config.logger.wandb else None,
    }
    with _trackers(folder, starts) as trackers:

        def log_record(record: EvaluationRecord) -> None:
            for tracker in trackers:
                tracker.log(record)

        yield log_record


@contextmanager
def training_loggers(
    config: TrainConfig, folder: Path, step: int, about: dict[str, Any], sweep: str | None
) -> Iterator[list[Logger]]:
    """Yield the Lightning loggers of a training.

    Args:
        config: Settings of the run.
        folder: Folder of the run; `curves.csv`, `wandb/` and `tensorboard/` are created there.
        step: Step at which the run resumes; later points belong to steps that are repeated.
        about: Further facts as plain types: git state, versions.
        sweep: Name of the sweep that the run belongs to.
    """
    from superglobal.loggers.csv_tensorboard import CurveFile, TensorBoardCurves

    loggers: list[Logger] = [CurveFile(folder / "curves.csv", step)]
    settings = {**asdict(config), **about}

    def tensorboard() -> Any:
        curves = TensorBoardCurves(folder, step)
        curves.log_hyperparams(settings)
        loggers.append(curves)
        return curves

    def wandb() -> Any:
        from superglobal.loggers.wandb import WandbTraining

        training = WandbTraining(config, settings, folder, folder / EXPORT, sweep)
        loggers.append(training.curves)
        return training

    starts = {
        "TensorBoard": tensorboard if config.logger.tensorboard else None,
        "W&B": wandb if config.logger.wandb else None,
    }
    with _trackers(folder, starts):
        yield loggers
