"""Log evaluation results and training curves to CSV files and TensorBoard."""

from __future__ import annotations

import csv
import io
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from superglobal.config.evaluation import EvalConfig
from superglobal.loggers.record import EvaluationRecord
from superglobal.reporting.ranking_figures import spread_evenly
from superglobal.utils.io import write_atomically, write_error

log = logging.getLogger(__name__)
_TENSORBOARD = "tensorboard"


class CurveFile(Logger):
    """Lightning logger that writes training curves to a CSV file, one row per logged step and one column per curve.

    A resumed run appends to the file. Lightning's CSVLogger would overwrite it.

    Args:
        path: path of the file.
        step: step at which the run resumes; 0 for a new run. Rows of later steps are removed from an existing file.
    """

    def __init__(self, path: Path, step: int) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.is_file() and step:
            # If the run was interrupted while it wrote the last row, that row is incomplete and has no line ending.
            complete = path.read_text().rpartition("\n")[0]
            self.rows = [row for row in csv.DictReader(io.StringIO(complete)) if int(row["step"]) <= step]
        self.columns: list[str] = list(dict.fromkeys(key for row in self.rows for key in row)) or ["step"]
        self.is_new = True

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing, because training.json contains the settings."""

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        row = {"step": step, **metrics}
        self.rows.append(row)
        new_columns = [key for key in row if key not in self.columns]
        self.columns += new_columns
        if new_columns or self.is_new:
            write_atomically(self.path, self._text(self.rows, header=True).encode())
            self.is_new = False
            return
        try:
            with self.path.open("a", newline="") as file:
                file.write(self._text([row], header=False))
        except OSError as error:
            raise write_error(self.path, error, "change paths.outputs") from error

    def _text(self, rows: list[dict[str, Any]], header: bool) -> str:
        """Format rows as CSV text; if `header` is true, the first line contains the column names."""
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


class CsvEvaluation:
    """Tracker that writes the scalar results of an evaluation to a one-row CSV file, and the settings to YAML."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def log(self, record: EvaluationRecord) -> None:
        logger = CSVLogger(self.folder, name="csv", version="")
        logger.log_hyperparams(record.summary["config"])
        logger.log_metrics(dict(record.numbers()))
        logger.finalize("success")

    def close(self, error: BaseException | None) -> None:
        """Do nothing, because no file is open."""


class TensorBoardEvaluation:
    """Tracker that logs an evaluation to TensorBoard.

    It logs the scalar results, the settings, histograms of the AP of the queries, and images of queries with their
    first results.
    """

    def __init__(self, config: EvalConfig, folder: Path) -> None:
        self.config = config
        self.logger = TensorBoardLogger(folder, name=_TENSORBOARD, version="")

    def log(self, record: EvaluationRecord) -> None:
        writer = self.logger.experiment
        self.logger.log_hyperparams(asdict(self.config))
        self.logger.log_metrics(record.numbers(), step=0)
        facts = {key: record.summary[key] for key in ("dataset", "weights", "protocol", "counts", "about", "versions")}
        writer.add_text("about", f"```\n{json.dumps(facts, indent=1, default=str)}\n```")
        for stage, result in record.results.items():
            for name, values in result.per_query().items():
                counted = np.array([value for value in values if isinstance(value, float) and value == value])
                if name.endswith(" AP") and len(counted):
                    writer.add_histogram(f"{stage}/{name}", counted, 0)
        for query in spread_evenly(len(record.names.queries), self.config.logger.images if record.has_images else 0):
            name = f"{query:04d} {record.names.queries[query]}"
            writer.add_image(f"{name}/query", np.asarray(record.query_image(query)), 0, dataformats="HWC")
            for stage in record.stages:
                strip = record.result_images(query, stage, self.config.figures.ranks)
                writer.add_image(f"{name}/{stage}", np.asarray(strip), 0, dataformats="HWC")

    def close(self, error: BaseException | None) -> None:
        self.logger.finalize("success" if error is None else "failed")


class StopAfterFailure(Logger):
    """Mixin for Lightning loggers: after its first exception, a logger logs a warning and records no more curves."""

    title: str
    has_failed = False

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        try:
            if not self.has_failed:
                super().log_metrics(*args, **kwargs)  # type: ignore[safe-super]
        except Exception as error:
            self.has_failed = True
            log.warning("%s failed (%s) and is stopped; curves.csv still records the curves", self.title, error)


class TensorBoardCurves(StopAfterFailure, TensorBoardLogger):
    """TensorBoard logger for the curves of a training run.

    Args:
        folder: folder of the run.
        step: step at which the run resumes; 0 for a new run. TensorBoard does not show the points that the
            interrupted run logged after this step.
    """

    title = "TensorBoard"

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(folder, name=_TENSORBOARD, version="", purge_step=step + 1 if step else None)

    def close(self, error: BaseException | None) -> None:
        self.finalize("success" if error is None else "failed")
