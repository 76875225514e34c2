"""A sweep of evaluations: one pass over the images for all its jobs, and tables and a chart at its end."""

from __future__ import annotations

import itertools
import json
import logging
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from superglobal.config.common import validate_config
from superglobal.config.evaluation import EvalConfig
from superglobal.errors import InputError
from superglobal.reporting.tables import write_tables
from superglobal.training.trainer import sweeping
from superglobal.utils.io import write_atomically

log = logging.getLogger(__name__)
_JOBS = "jobs.json"
# Settings that change nothing about how an image is described.
_AFTERWARDS = ("rerank", "index", "k", "whitening", "logger", "figures", "trainer")
# Jobs that agree in these describe the same images with the same network, but for its pooling.
_SHARED = (
    "dataset",
    "distractors",
    "descriptors",
    "backbone",
    "weights",
    "name",
    "scales",
    "antialias",
    "extraction",
    "store",
    "paths",
    "seed",
)


class EvaluationSweep(Callback):
    """Hydra callback: tells the jobs of a sweep of one another, and merges their results; status 2 if one failed."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        # Jobs of another launcher run at the same time: the first would not be done before the others begin.
        if not config.hydra.launcher._target_.endswith("BasicLauncher"):
            return
        choices = _choices(config)
        swept = [values[0].split("=")[0] for values in choices if len(values) > 1]
        described: list[dict[str, Any]] = []
        if any(key.split(".")[0] not in _AFTERWARDS for key in swept):
            found = (_about(config.hydra.job.config_name, list(job)) for job in itertools.product(*choices))
            described = [job for job in found if job is not None]
        write_atomically(Path(config.hydra.sweep.dir) / _JOBS, json.dumps(described, indent=1).encode())
        log.info(_told(math.prod(len(values) for values in choices), described))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        if not any(Path(config.hydra.sweep.dir).rglob("results.json")):
            log.info("no job has results: there is no table")
            return
        folder = Path(config.hydra.sweep.dir)
        rows = write_tables(folder)
        log.info("table.csv (all runs), table-*.md, .csv, .tex (by data set) and chart.png: %s", folder)
        if any(row["status"] == "failed" for row in rows):
            sys.exit(2)


def sibling_poolings(config: EvalConfig) -> list[dict[str, Any]]:
    """Pooling settings (`PoolingOverrides.overrides`) of the other jobs of the sweep that describe the same images."""
    path = Path(HydraConfig.get().sweep.dir) / _JOBS if sweeping() else None
    if path is None or not path.is_file():
        return []
    mine = _plain(_shared(config))
    found: list[dict[str, Any]] = []
    for job in json.loads(path.read_text()):
        if job["shared"] == mine and job["pooling"] not in [*found, _plain(config.pooling.overrides())]:
            found.append(job["pooling"])
    return found


def _told(jobs: int, described: list[dict[str, Any]]) -> str:
    """How many descriptions of images the jobs of a sweep need, and how many passes over images those are."""
    sets = {json.dumps(job["shared"], sort_keys=True) for job in described}
    different = {json.dumps(job, sort_keys=True) for job in described}
    count, passes = max(1, len(different)), max(1, len(sets))
    extractions = "1 extraction" if count == 1 else f"{count} extractions"
    together = "" if count == passes else f", made in {passes} {'pass' if passes == 1 else 'passes'} over the images"
    return f"sweep: {jobs} jobs need {extractions}{together}; what is in the stores is not described again"


def _choices(config: DictConfig) -> list[list[str]]:
    """The overrides that a job has one of each of, as Hydra's own sweeper combines them."""
    loader = GlobalHydra.instance().config_loader()
    swept = config.hydra.sweeper.params or {}
    lines = [*(f"{key}={value}" for key, value in swept.items()), *config.hydra.overrides.task]
    return [
        [f"{one.get_key_element()}={value}" for value in map(str, one.sweep_string_iterator())]
        if one.is_sweep_override()
        else [one.input_line or ""]
        for one in OverridesParser.create(config_loader=loader).parse_overrides(lines)
    ]


def _about(config_name: str, job: list[str]) -> dict[str, Any] | None:
    """What the others need to know of a job; None for one that will end in an error of its own."""
    try:
        config = validate_config(compose(config_name, overrides=job), EvalConfig)
    except (HydraException, OmegaConfBaseException, InputError):
        return None
    assert isinstance(config, EvalConfig)
    return {"shared": _shared(config), "pooling": config.pooling.overrides()}


def _shared(config: EvalConfig) -> dict[str, Any]:
    settings = asdict(config)
    return {key: settings[key] for key in _SHARED}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
