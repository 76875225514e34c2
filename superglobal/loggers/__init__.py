"""Loggers for evaluation and training runs.

CSV files are always written. TensorBoard and Weights & Biases (W&B) are optional. If one of these services fails, the
run continues with a warning, because the results of the run are also written to files.
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
    """Wrapper around a tracker that turns exceptions of the tracker into warnings.

    A tracker logs one run to one service, such as TensorBoard. Every tracker has a method `close(error)`, which
    receives the exception that ended the run, or None. A tracker for an evaluation also has a method `log(record)`. A
    tracker for a training run needs no such method, because Lightning logs the curves.

    Args:
        name: name of the service.
        folder: folder of the run; warnings state that the results are there.
        start: function that creates the tracker.
    """

    def __init__(self, name: str, folder: Path, start: Callable[[], Any]) -> None:
        self.name, self.folder = name, folder
        self.tracker = self._call(start)

    def _call(self, action: Callable[..., Any], *args: Any) -> Any:
        """Return the result of `action(*args)`; if it fails, log a warning and return None."""
        try:
            return action(*args)
        except Exception as error:  # a service can raise any exception, for example after a lost connection
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
    """Start trackers in the first process, and close them when the `with` statement ends.

    The trackers are also closed if the body of the `with` statement ends by an exception, Ctrl-C or SIGTERM.

    Args:
        folder: folder of the run.
        starts: name of a service -> function that creates its tracker; None if the service is disabled.

    Yields:
        The wrapped trackers of the enabled services; an empty list in all processes except the first.
    """
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

    The `with` statement must enclose the whole run, so that a failed run is logged, too.

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
    """Yield the Lightning loggers for a training run.

    Args:
        config: settings of the run.
        folder: folder of the run, in which `curves.csv`, `wandb/` and `tensorboard/` are created.
        step: step at which the run resumes; 0 for a new run. The steps after it are repeated, so the points that the
            interrupted run logged for these steps are removed.
        about: further information about the run, such as the git state and package versions, as JSON types.
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
