"""The curves of a training as a CSV."""

from __future__ import annotations

import csv
import io
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from superglobal.config.evaluation import EvalConfig
from superglobal.errors import InputError
from superglobal.loggers.record import Evaluated, spread
from superglobal.utils.io import write_atomically


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


log = logging.getLogger(__name__)
_FOLDER = "tensorboard"


class TensorBoardEvaluation:
    """Numbers beside the settings, AP per query as a histogram, and queries with their first results as pictures."""

    def __init__(self, config: EvalConfig, folder: Path) -> None:
        self.config = config
        self.logger = TensorBoardLogger(folder, name=_FOLDER, version="")

    def log(self, found: Evaluated) -> None:
        writer = self.logger.experiment
        self.logger.log_hyperparams(asdict(self.config))
        self.logger.log_metrics(found.numbers(), step=0)
        facts = {key: found.summary[key] for key in ("dataset", "weights", "protocol", "counts", "about", "versions")}
        writer.add_text("about", f"```\n{json.dumps(facts, indent=1, default=str)}\n```")
        for stage, result in found.results.items():
            for name, values in result.per_query().items():
                counted = np.array([value for value in values if isinstance(value, float) and value == value])
                if name.endswith(" AP") and len(counted):
                    writer.add_histogram(f"{stage}/{name}", counted, 0)
        for query in spread(len(found.names.queries), self.config.logger.images if found.has_photos else 0):
            name = f"{query:04d} {found.names.queries[query]}"
            writer.add_image(f"{name}/query", np.asarray(found.picture(query)), 0, dataformats="HWC")
            for stage in found.stages:
                strip = found.ranked(query, stage, self.config.figures.ranks)
                writer.add_image(f"{name}/{stage}", np.asarray(strip), 0, dataformats="HWC")

    def close(self, error: BaseException | None) -> None:
        self.logger.finalize("success" if error is None else "failed")


class TensorBoardCurves(TensorBoardLogger):
    """A training's curves, given up with a warning at the first failure.

    Args:
        folder: of the run.
        step: where the run goes on; TensorBoard hides the points beyond it that it had before.
    """

    given_up = False

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(folder, name=_FOLDER, version="", purge_step=step + 1 if step else None)

    def log(self, found: Any) -> None:
        """Lightning logs."""

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        try:
            if not self.given_up:
                super().log_metrics(*args, **kwargs)
        except Exception as error:
            self.given_up = True
            log.warning("TensorBoard failed (%s); the curves go on in curves.csv", error)

    def close(self, error: BaseException | None) -> None:
        self.finalize("success" if error is None else "failed")
