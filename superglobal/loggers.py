"""Lightning's loggers: CSV always, Weights & Biases if configured."""

from __future__ import annotations

import csv
import io
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import wandb
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from superglobal.config import EvalConfig, TrainConfig
from superglobal.errors import InputError
from superglobal.files import write_atomically
from superglobal.processes import first_process
from superglobal.retrieval.report import main_scores, metric_key

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
def training_loggers(config: TrainConfig, folder: Path, step: int, about: dict[str, Any]) -> Iterator[list[Logger]]:
    """Loggers for the curves of one training; a tracker that fails costs a warning and not the run.

    Args:
        config: of the run.
        folder: of the run; `curves.csv` and W&B's files lie there.
        step: where the run goes on; points beyond it are of a part that was lost.
        about: further plain facts for W&B: git state, versions.
    """
    loggers: list[Logger] = [CurveFile(folder / "curves.csv", step)]
    run = None
    try:
        if config.logger.wandb and first_process():
            run = _start_run(config.logger.project, config.name, folder, _run_id(folder))
            curves = _Curves(experiment=run)
            curves.log_hyperparams({**asdict(config), **about})
            loggers.append(curves)
    except Exception as error:  # of the tracker, its settings or the network
        log.warning("W&B failed (%s); the curves are in %s", error, folder / "curves.csv")
    try:
        yield loggers
    finally:
        try:
            if run is not None:
                run.finish()
        except Exception as error:
            log.warning("W&B failed (%s); the curves are in %s", error, folder / "curves.csv")


class CurveFile(Logger):
    """A CSV with a row per step, one column per number, that a resumed run goes on writing.

    Args:
        path: of the file.
        step: where the run goes on; rows beyond it are dropped.
    """

    def __init__(self, path: Path, step: int) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.is_file() and step:
            # A row that was cut off has no end of line.
            whole = path.read_text().rpartition("\n")[0]
            self.rows = [row for row in csv.DictReader(io.StringIO(whole)) if int(row["step"]) <= step]
        self.columns: list[str] = list(dict.fromkeys(key for row in self.rows for key in row)) or ["step"]
        self.fresh = True

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are in training.json."""

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        row = {"step": step, **metrics}
        self.rows.append(row)
        new = [key for key in row if key not in self.columns]
        self.columns += new
        if new or self.fresh:
            write_atomically(self.path, self._text(self.rows, header=True).encode())
            self.fresh = False
        else:
            try:
                with self.path.open("a", newline="") as file:
                    file.write(self._text([row], header=False))
            except OSError as error:
                raise InputError(f"{self.path}: cannot be written ({error.strerror}); free space") from error

    def _text(self, rows: list[dict[str, Any]], header: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def _run_id(folder: Path) -> str:
    """W&B's id of this training, the same after it was interrupted."""
    path = folder / "wandb_id"
    if not path.is_file():
        write_atomically(path, uuid.uuid4().hex[:8].encode())
    return path.read_text().strip()


class _Curves(WandbLogger):
    """W&B that is given up, with a warning, at its first failure."""

    given_up = False

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        try:
            if not self.given_up:
                super().log_metrics(*args, **kwargs)
        except Exception as error:
            self.given_up = True
            log.warning("W&B failed (%s); the curves go on in curves.csv", error)


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


def _start_run(project: str, name: str, folder: Path, run_id: str | None = None) -> wandb.Run:
    """A run that never asks anything: offline without a key, unless WANDB_MODE says otherwise.

    With a `run_id` that the server knows, the run goes on.
    """
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
        id=run_id,
        resume="allow" if run_id else None,
        mode=mode,
        settings=settings,
    )


def _flat(summary: dict[str, Any]) -> dict[str, float]:
    """`search/map/medium` and so on, in percent, with the seconds of each stage."""
    numbers = {f"seconds/{stage}": value for stage, value in summary["seconds"].items()}
    for stage, result in summary["metrics"].items():
        for protocol, value in main_scores(result).items():
            if value is not None:
                numbers[f"{stage}/{metric_key(result)}/{protocol}"] = 100 * value
        for protocol, row in result.get("mp", {}).items():
            numbers |= {f"{stage}/mp@{k}/{protocol}": 100 * v for k, v in row.items() if v is not None}
    return numbers
