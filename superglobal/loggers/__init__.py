"""Loggers of evaluations and trainings: CSV files always, Weights & Biases and TensorBoard if enabled.

A failing logger causes a warning and does not stop the run, because the run also writes its results to files itself.
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
    """Wrapper of a tracker that turns its exceptions into warnings.

    A tracker logs one run to one service. Its method `close(error)` receives the exception that ended the run, or None.
    Trackers of evaluations also have a method `log(record)`; trainings log through Lightning instead.
    """

    def __init__(self, name: str, folder: Path, start: Callable[[], Any]) -> None:
        self.name, self.folder = name, folder
        self.tracker = self._call(start)

    def _call(self, action: Callable[..., Any], *args: Any) -> Any:
        try:
            return action(*args)
        except Exception as error:  # Any failure of the tracker, its settings or the network connection.
            log.warning("%s failed (%s); the run continues, and its results are in %s", self.name, error, self.folder)
            return None

    def log(self, record: EvaluationRecord) -> None:
        if self.tracker is not None:
            self._call(self.tracker.log, record)

    def close(self, error: BaseException | None) -> None:
        if self.tracker is not None:
            self._call(self.tracker.close, error)


@contextmanager
def _trackers(folder: Path, starts: dict[str, Callable[[], Any] | None]) -> Iterator[list[_SafeTracker]]:
    """Start the trackers in the first process, and close them after the run, even after Ctrl-C or SIGTERM."""
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
    """Yield a function that logs the result of an evaluation.

    The context surrounds the whole run, so that the loggers also show runs that fail.

    Args:
        config: settings of the run.
        folder: folder of the run, in which `csv/`, `wandb/` and `tensorboard/` are created.
        sweep: name of the sweep that the run belongs to; None for a single run.

    Raises:
        InputError: W&B is enabled but not installed.
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
        config: settings of the run.
        folder: folder of the run, in which `curves.csv`, `wandb/` and `tensorboard/` are created.
        step: step at which the run resumes; logged points of later steps are dropped, because these steps are repeated.
        about: further facts about the run as plain types, such as the git state and versions.
        sweep: name of the sweep that the run belongs to; None for a single run.
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
