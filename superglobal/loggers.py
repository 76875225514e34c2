"""Lightning's loggers: CSV always, Weights & Biases if configured."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import wandb
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger

from superglobal.config import EvalConfig, TrainConfig

log = logging.getLogger(__name__)


def log_result(config: EvalConfig, summary: dict[str, Any], folder: Path) -> None:
    """Write one evaluation's numbers and its sheet to every logger.

    The results are on disk already, so a tracker that fails costs a warning and not the run.
    """
    numbers = _flat(summary)
    table = CSVLogger(folder, name="csv", version="")
    table.log_hyperparams(summary["config"])
    table.log_metrics(dict(numbers))
    table.finalize("success")
    if config.logger.wandb:
        try:
            _log_to_wandb(config, summary, numbers, folder)
        except Exception as error:  # of the tracker, its settings or the network
            log.warning("W&B failed (%s); everything else is in %s", error, folder)


@contextmanager
def training_loggers(config: TrainConfig, folder: Path) -> Iterator[list[Logger]]:
    """Loggers for the curves of one training; a tracker that fails costs a warning and not the run."""
    table = CSVLogger(folder, name="csv", version="")
    table.log_hyperparams(asdict(config))
    loggers: list[Logger] = [table]
    run = None
    try:
        if config.logger.wandb:
            run = _start_run(config.logger.project, config.name, folder)
            curves = _Curves(experiment=run)
            curves.log_hyperparams(asdict(config))
            loggers.append(curves)
    except Exception as error:  # of the tracker, its settings or the network
        log.warning("W&B failed (%s); the curves are in %s", error, folder / "csv")
    try:
        yield loggers
    finally:
        try:
            if run is not None:
                run.finish()
        except Exception as error:
            log.warning("W&B failed (%s); the curves are in %s", error, folder / "csv")


class _Curves(WandbLogger):
    """W&B that is given up, with a warning, at its first failure."""

    given_up = False

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        try:
            if not self.given_up:
                super().log_metrics(*args, **kwargs)
        except Exception as error:
            self.given_up = True
            log.warning("W&B failed (%s); the curves go on in the CSV", error)


def _log_to_wandb(config: EvalConfig, summary: dict[str, Any], numbers: dict[str, float], folder: Path) -> None:
    run = _start_run(config.logger.project, summary["label"] or summary["dataset"], folder)
    try:
        logger = WandbLogger(experiment=run)
        logger.log_hyperparams(summary["config"])
        logger.log_metrics(dict(numbers))
        if (folder / "sheet.png").exists():
            logger.log_image("sheet", [str(folder / "sheet.png")])
    finally:
        run.finish()


def _start_run(project: str, name: str, folder: Path) -> wandb.Run:
    """A run that never asks anything: offline without a key, unless WANDB_MODE says otherwise."""
    # A key may come from the environment, a settings file or `wandb login`; looking for it needs no network.
    mode: Any = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
    if mode == "offline":
        log.info("W&B offline: `wandb sync %s/wandb/offline-run-*` uploads it", folder)
    settings = wandb.Settings(silent=True)
    # The run's mode is given here: Lightning's own `offline` sets a mode that wandb no longer knows.
    return wandb.init(
        project=project,
        name=name,
        dir=folder,
        mode=mode,
        settings=settings,
    )


def _flat(summary: dict[str, Any]) -> dict[str, float]:
    """`search/map/medium` and so on, in percent, with the seconds of each stage."""
    numbers = {f"seconds/{stage}": value for stage, value in summary["seconds"].items()}
    for stage, result in summary["metrics"].items():
        for protocol, value in result["map"].items():
            if value is not None:
                numbers[f"{stage}/map/{protocol}"] = 100 * value
        for protocol, row in result["mp"].items():
            numbers |= {f"{stage}/mp@{k}/{protocol}": 100 * v for k, v in row.items() if v is not None}
    return numbers
