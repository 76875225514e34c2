"""What training, evaluation and tuning share."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback as HydraCallback
from hydra.types import RunMode
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from superglobal.config.common import TrainerConfig
from superglobal.config.training import FitConfig, OptimConfig
from superglobal.data.datamodules import TrainingDataModule
from superglobal.errors import InputError
from superglobal.training.checkpointing import AtomicCheckpointIO
from superglobal.training.module import TrainingModule

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
            # Lightning's way to go on saves from within a signal handler; ours is in `CheckpointCallback`.
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


def launched_externally() -> bool:
    """Whether torchrun or SLURM has started this process beside others, before any of them knows the others."""
    return (_started()[1] or 1) > 1


def _started() -> tuple[str, int | None]:
    """What has started the processes of this run, and how many; None where that is Lightning's part."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun", int(os.environ.get("WORLD_SIZE", 1))
    if SLURMEnvironment.detect():
        return "SLURM", int(os.environ["SLURM_NTASKS"])
    return "", None


def translate_process_error(error: RuntimeError, processes: int, run: str, goes_on: str) -> InputError | None:
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


class TrainingSweep(HydraCallback):
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


_GRACE = 8  # seconds


def make_fit_trainer(t: FitConfig, o: OptimConfig, callbacks: list[Callback], loggers: list[Logger]) -> pl.Trainer:
    """A Trainer for `run_fit`; errors as of `make_trainer`."""
    return make_trainer(
        t,
        precision(t),
        num_nodes=t.num_nodes,
        max_epochs=o.epochs,
        accumulate_grad_batches=t.accumulate,
        gradient_clip_val=o.clip,
        deterministic=t.deterministic,
        benchmark=not t.deterministic,
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )


def precision(t: FitConfig) -> str:
    """Lightning's name of the precision; "auto" is bfloat16 autocast where the GPU has it, float32 on a CPU."""
    if t.precision != "auto":
        return t.precision
    if t.accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def run_fit(trainer: pl.Trainer, module: TrainingModule, data: TrainingDataModule, checkpoint: Path | None) -> None:
    """Train, from a checkpoint if one is given.

    Raises:
        InputError: what ended the training, where it can be said.
    """
    _end_with_the_first_process()
    if trainer.precision == "64-true":
        # Lightning reads the checkpoint before it widens the module, and would round the weights.
        module.double()
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    except InputError:
        if not trainer.is_global_zero:
            # Lightning kills the first process as soon as it finds another ended, perhaps before it has said why.
            time.sleep(_GRACE)
        raise
    except SystemExit as end:
        if end.code is None:  # Lightning's answer to SIGTERM, before the first step
            sys.exit(128 + signal.SIGTERM)
        if end.code == 1:  # Lightning's answer to the second Ctrl-C
            log.error("interrupted; the same command goes on from the last checkpoint")
            sys.exit(130)
        raise
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"out of GPU memory ({str(error).splitlines()[0]}): raise trainer.accumulate (2 halves what is held at "
            "once), or lower optim.batch_size or data.image_size"
        ) from error
    except RuntimeError as error:
        told = translate_process_error(error, trainer.world_size, "training", "from the last checkpoint")
        if told is None:
            raise
        raise told from error


def _end_with_the_first_process() -> None:
    """In a process that the first one started: end when that ends, even if it was killed."""
    if "LOCAL_RANK" not in os.environ or os.environ["LOCAL_RANK"] == "0" or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
