"""What training, evaluation and tuning share."""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from superglobal.config import DatasetConfig, TrainerConfig
from superglobal.data.folder import folder_set
from superglobal.data.gldv2_sets import recognition_set, retrieval_set, validation_set
from superglobal.data.revisited import revisited_set
from superglobal.data.sets import EvaluationSet
from superglobal.errors import InputError
from superglobal.files import EXPORT

log = logging.getLogger(__name__)

# Lightning's, at every start, and nothing that a user could do.
_SAYS_NOTHING: list[tuple[str, type[Warning]]] = [
    (".*LeafSpec.*is deprecated", FutureWarning),
    (".*your dataloader is not resumable", UserWarning),  # it is: the order goes on from the step
    (".*in eval mode at the start of training", UserWarning),  # what is frozen is meant to be
    (".*does not have many workers", UserWarning),
    (".*smaller than the logging interval", UserWarning),  # curves are not logged by Lightning
]
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "gloo/transport",
    "NCCL error",
    "timed out",
    "Timed out",
)


def make_trainer(t: TrainerConfig, precision: Any = "32-true", **options: Any) -> pl.Trainer:
    """A Trainer that leaves sampling to us.

    Args:
        t: where it runs.
        precision: of the forward pass; no autocast by default.
        options: of `pl.Trainer`.

    Raises:
        InputError: Lightning refuses the settings, a sweep asks for more than one device a job, or torchrun or SLURM
            has started another number of processes than the settings make.
    """
    for pattern, category in _SAYS_NOTHING:
        warnings.filterwarnings("ignore", pattern, category)
    devices = t.devices
    # Where SLURM starts the processes of a job, none is started from here.
    if sweeping() and not SLURMEnvironment.detect():
        # Lightning would start the whole sweep again in every further process.
        single = devices in (1, "1", "auto") or (isinstance(devices, list) and len(devices) == 1)
        if not single or options.get("num_nodes", 1) > 1:
            raise InputError(
                f"trainer.devices={devices} on {options.get('num_nodes', 1)} machines: a sweep runs one device a job, "
                "since Lightning would start the whole sweep again in every further process; use 1, or run without -m"
            )
        if devices == "auto":
            log.info("sweep: one device a job")
            devices = 1
    try:
        if SLURMEnvironment.detect():
            # Lightning's way to go on saves from within a signal handler; ours is in `Checkpoints`.
            options["plugins"] = [*options.get("plugins", ()), SLURMEnvironment(auto_requeue=False)]
        trainer = pl.Trainer(
            accelerator=t.accelerator,
            devices=devices,
            strategy=t.strategy,
            use_distributed_sampler=False,
            precision=precision,
            enable_model_summary=False,
            enable_progress_bar=t.progress,
            **options,
        )
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        wish = f"accelerator={t.accelerator} devices={t.devices} strategy={t.strategy}"
        raise InputError(f"trainer: Lightning refuses {wish}: {error}") from error
    starter, started = _started()
    if started not in (None, trainer.world_size):
        raise InputError(
            f"{starter} has started {started} processes, but trainer.devices={t.devices} on "
            f"{options.get('num_nodes', 1)} machines makes {trainer.world_size}: each would run for itself; give "
            f"trainer.devices= and trainer.num_nodes= as {starter} has them"
        )
    return trainer


def started_together() -> bool:
    """Whether torchrun or SLURM has started this process beside others, before any of them knows the others."""
    return (_started()[1] or 1) > 1


def _started() -> tuple[str, int | None]:
    """What has started the processes of this run, and how many; None where that is Lightning's part."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun", int(os.environ.get("WORLD_SIZE", 1))
    if SLURMEnvironment.detect():
        return "SLURM", int(os.environ["SLURM_NTASKS"])
    return "", None


def process_failure(error: RuntimeError, processes: int, run: str, goes_on: str) -> InputError | None:
    """What a failure of somebody else's process is called; None for any other.

    Args:
        error: that Lightning ended with.
        processes: of the run.
        run: "training", "evaluation".
        goes_on: from where the same command does.
    """
    text = str(error)
    resumes = f"; the same command goes on {goes_on}"
    if "DataLoader worker" in text:
        return InputError(
            f"a process that decodes photos died ({text.splitlines()[0]}): mostly too little memory, or too little "
            f"shared memory (/dev/shm; docker run --shm-size=8g); lower trainer.num_workers{resumes}"
        )
    if processes > 1 and (isinstance(error, torch.distributed.DistError) or any(words in text for words in _LOST)):
        return InputError(
            f"another process of this {run} has ended or does not answer: its own message, if it left one, is "
            f"above ({text.splitlines()[0][:200]}){resumes}"
        )
    return None


def sweeping() -> bool:
    """Whether this is a job of a Hydra multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def sweep_name() -> str | None:
    """What the multirun that this is a job of is called: its folder's name; None outside one."""
    return Path(HydraConfig.get().sweep.dir).name if sweeping() else None


def evaluation_set(d: DatasetConfig) -> EvaluationSet | None:
    """The set that is configured, its images not looked at; None where there are only descriptors.

    Raises:
        InputError: its lists or its ground truth are missing or faulty.
    """
    if d.kind == "revisited":
        return revisited_set(d.root, d.name, d.crop_query)
    if d.kind == "folder":
        return folder_set(str(d.database), d.query, d.labels, d.name)
    if d.kind == "gldv2":
        return retrieval_set(d.root, d.name, d.solution)
    if d.kind == "gldv2_val":
        return validation_set(d.root, d.name, d.table, d.landmarks, d.seed)
    if d.kind == "gldv2_recognition":
        return recognition_set(d.root, d.name, d.table, d.solution, d.neighbours, d.votes)
    return None


def export_path(outputs: str, name: str) -> Path:
    """Where the training run `name` leaves its best network."""
    return Path(outputs) / "train" / name / EXPORT


class TrainingSweep(Callback):
    """Hydra callback: ends a sweep of trainings with their scores, best first; with status 2 if one failed (NaN)."""

    def __init__(self) -> None:
        self.scores: list[tuple[float, str]] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if job_return.status == JobStatus.COMPLETED and job_return.hydra_cfg is not None:
            place = Path(job_return.hydra_cfg.hydra.runtime.output_dir)
            self.scores.append((job_return.return_value, f"{' '.join(job_return.overrides or ())}: {place}"))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        for score, what in sorted(self.scores, key=lambda one: -math.inf if math.isnan(one[0]) else one[0])[::-1]:
            print("failed" if math.isnan(score) else f"validation mAP {score:.4f}", what, flush=True)
        if any(math.isnan(score) for score, _ in self.scores):
            sys.exit(2)
