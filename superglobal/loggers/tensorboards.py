"""Curves and evaluations as TensorBoard's event files."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning.loggers import TensorBoardLogger

from superglobal.config import EvalConfig
from superglobal.loggers.evaluated import Evaluated, spread

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
        for query in spread(len(found.names.queries), self.config.logger.pictures if found.has_photos else 0):
            name = f"{query:04d} {found.names.queries[query]}"
            writer.add_image(f"{name}/query", np.asarray(found.picture(query)), 0, dataformats="HWC")
            for stage in found.stages:
                strip = found.ranked(query, stage, self.config.pictures.ranks)
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
