"""Share extraction between the jobs of an evaluation sweep, and write tables and a chart of their results."""

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
from superglobal.utils.io import read_json, write_atomically

log = logging.getLogger(__name__)
_JOBS = "jobs.json"
# Settings that do not affect the extracted descriptors.
_AFTER_EXTRACTION = ("rerank", "index", "k", "whitening", "logger", "figures", "trainer")
# Two jobs with equal values of these settings extract the same images with the same network, except that the pooling of
# the network may differ.
_EXTRACTION = (
    *("dataset", "distractors", "descriptors", "backbone", "weights", "name", "scales", "antialias"),
    *("extraction", "store", "paths", "seed"),
)


class EvaluationSweep(Callback):
    """Hydra callback that prepares an evaluation sweep and merges the results of its jobs.

    Before the first job, the callback writes the extraction settings of all jobs to `jobs.json`. The first job then
    also extracts the descriptors of the other jobs. After the last job, the callback writes the tables and the chart,
    and exits with status 2 if a job failed.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        # Other launchers run jobs in parallel, so the first job cannot extract for the other jobs.
        if not config.hydra.launcher._target_.endswith("BasicLauncher"):
            return
        choices = _choices(config)
        swept = [values[0].split("=")[0] for values in choices if len(values) > 1]
        jobs: list[dict[str, Any]] = []
        if any(key.split(".")[0] not in _AFTER_EXTRACTION for key in swept):
            composed = (
                _extraction_settings(config.hydra.job.config_name, list(job)) for job in itertools.product(*choices)
            )
            jobs = [job for job in composed if job is not None]
        write_atomically(Path(config.hydra.sweep.dir) / _JOBS, json.dumps(jobs, indent=1).encode())
        extractions = max(1, len({json.dumps(job, sort_keys=True) for job in jobs}))
        passes = max(1, len({json.dumps(job["shared"], sort_keys=True) for job in jobs}))
        log.info(
            "sweep: %d jobs, %d different extractions in %d passes over the images; stored descriptors are reused",
            math.prod(len(values) for values in choices),
            extractions,
            passes,
        )

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        if not any(folder.rglob("results.json")):
            log.info("no table is written, because no job has results")
            return
        rows = write_tables(folder)
        log.info("wrote table.csv (all runs), table-*.{md,csv,tex} (per data set) and chart.png to %s", folder)
        if any(row["status"] == "failed" for row in rows):
            sys.exit(2)


def sibling_poolings(config: EvalConfig) -> list[dict[str, Any]]:
    """Return the pooling settings of the other sweep jobs that extract the same images.

    Returns:
        One dict for each distinct pooling that differs from this job's pooling, as returned by
        `PoolingOverrides.overrides`; an empty list outside a sweep.
    """
    path = Path(HydraConfig.get().sweep.dir) / _JOBS if sweeping() else None
    if path is None or not path.is_file():
        return []
    # `jobs.json` contains lists in place of tuples, so the settings of this job are converted in the same way, by JSON.
    this_job = json.loads(json.dumps(_job(config)))
    poolings: list[dict[str, Any]] = []
    for job in read_json(path):
        if job["shared"] == this_job["shared"] and job["pooling"] not in [*poolings, this_job["pooling"]]:
            poolings.append(job["pooling"])
    return poolings


def _choices(config: DictConfig) -> list[list[str]]:
    """Return the alternatives of each command-line override, such as `["scales=1", "scales=3"]` for `scales=1,3`.

    An override that is not swept has one alternative. Hydra's basic sweeper runs one job for each combination of
    alternatives.
    """
    loader = GlobalHydra.instance().config_loader()
    swept = config.hydra.sweeper.params or {}
    lines = [*(f"{key}={value}" for key, value in swept.items()), *config.hydra.overrides.task]
    return [
        [f"{override.get_key_element()}={value}" for value in map(str, override.sweep_string_iterator())]
        if override.is_sweep_override()
        else [override.input_line or ""]
        for override in OverridesParser.create(config_loader=loader).parse_overrides(lines)
    ]


def _extraction_settings(config_name: str, overrides: list[str]) -> dict[str, Any] | None:
    """Return the extraction settings of a sweep job.

    Args:
        config_name: name of the main configuration file.
        overrides: overrides of the job, such as `["scales=1"]`.

    Returns:
        The settings as returned by `_job`; None if they are invalid. The job itself reports the error when it runs.
    """
    try:
        config = validate_config(compose(config_name, overrides=overrides), EvalConfig)
    except (HydraException, OmegaConfBaseException, InputError):
        return None
    assert isinstance(config, EvalConfig)
    return _job(config)


def _job(config: EvalConfig) -> dict[str, Any]:
    """Return the settings of a sweep job that affect its descriptors.

    Returns:
        A dict with two entries: "pooling" contains the pooling settings, and "shared" contains all other settings,
        which must be equal for two jobs to extract the same images in one pass.
    """
    settings = asdict(config)
    return {"shared": {key: settings[key] for key in _EXTRACTION}, "pooling": config.pooling.overrides()}
