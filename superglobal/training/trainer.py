"""Create Lightning Trainers, run the training, recognize sweeps, and explain errors of other processes."""

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
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from superglobal.config.common import TrainerConfig
from superglobal.config.training import FitConfig, OptimConfig
from superglobal.data.datamodules import TrainingDataModule
from superglobal.errors import InputError, first_line
from superglobal.training.checkpointing import AtomicCheckpointIO
from superglobal.training.module import TrainingModule

log = logging.getLogger(__name__)
# Messages and categories of warnings that Lightning prints at each start, although they do not apply here.
_IRRELEVANT_WARNINGS: list[tuple[str, type[Warning]]] = [
    (".*LeafSpec.*is deprecated", FutureWarning),
    (".*your dataloader is not resumable", UserWarning),  # the sampler resumes after the checkpoint's step
    (".*in eval mode at the start of training", UserWarning),  # frozen layers stay in evaluation mode on purpose
    (".*does not have many workers", UserWarning),
    (".*smaller than the logging interval", UserWarning),  # CurveLogger has its own interval
]
# Parts of the error messages of torch that mean that the connection to another process was lost.
_LOST_CONNECTION = (
    "Connection closed by peer",
    "Connection reset by peer",
    "gloo/transport",
    "NCCL error",
    "timed out",
    "Timed out",
)


def make_trainer(t: TrainerConfig, precision: Any = "32-true", **options: Any) -> pl.Trainer:
    """Create a Trainer without Lightning's distributed sampler.

    Args:
        t: settings of the devices and the strategy.
        precision: precision in Lightning's notation; by default float32 without autocast.
        options: further arguments of `pl.Trainer`.

    Raises:
        InputError: Lightning rejects the settings, a sweep uses several devices per job, or torchrun or SLURM has
            started a different number of processes.
    """
    for pattern, category in _IRRELEVANT_WARNINGS:
        warnings.filterwarnings("ignore", pattern, category)
    devices = t.devices
    nodes = options.get("num_nodes", 1)
    # Under SLURM, a sweep job can use several devices, because SLURM starts the processes of a job, not Lightning.
    if sweeping() and not SLURMEnvironment.detect():
        single = devices in (1, "1", "auto") or (isinstance(devices, list) and len(devices) == 1)
        if not single or nodes > 1:
            raise InputError(
                f"trainer.devices={devices} on {nodes} machines: expected one device per job of a sweep, because "
                "Lightning would start the whole sweep again in each further process; use one device, or run without -m"
            )
        if devices == "auto":
            log.info("sweep: one device per job")
            devices = 1
    try:
        if SLURMEnvironment.detect():
            # Lightning's automatic requeue is disabled, because it would save a checkpoint in a signal handler, in the
            # middle of a step. `CheckpointCallback` saves after the step.
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
        settings = f"accelerator={t.accelerator} devices={t.devices} strategy={t.strategy}"
        raise InputError(f"trainer: Lightning rejects {settings}: {error}") from error
    launcher, count = _launched()
    if count not in (None, trainer.world_size):
        raise InputError(
            f"{launcher} has started {count} processes, but trainer.devices={t.devices} on {nodes} machines needs "
            f"{trainer.world_size}; set trainer.devices and trainer.num_nodes to the numbers given to {launcher}"
        )
    return trainer


def launched_externally() -> bool:
    """Return True if torchrun or SLURM has started this process as one of several processes."""
    return (_launched()[1] or 1) > 1


def _launched() -> tuple[str, int | None]:
    """Return the launcher of this run, "torchrun" or "SLURM", and the number of processes that it has started.

    Without a launcher, return "" and None.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun", int(os.environ.get("WORLD_SIZE", 1))
    if SLURMEnvironment.detect():
        return "SLURM", int(os.environ["SLURM_NTASKS"])
    return "", None


def translate_process_error(error: RuntimeError, processes: int, run: str, resume_point: str) -> InputError | None:
    """Return an InputError that explains the crash of another process; None for other errors.

    Args:
        error: error that ended the run in this process.
        processes: number of processes of the run.
        run: "training" or "evaluation".
        resume_point: where the same command resumes, such as "from the last checkpoint".
    """
    text = str(error)
    if processes > 1 and (
        isinstance(error, torch.distributed.DistError) or any(words in text for words in _LOST_CONNECTION)
    ):
        return InputError(
            f"another process of this {run} has ended or does not respond, see its message above "
            f"({first_line(error)}); run the same command to resume {resume_point}"
        )
    return None


def sweeping() -> bool:
    """Return True if this process runs one of the jobs of a Hydra multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def sweep_name() -> str | None:
    """Return the folder name of the Hydra multirun that this job belongs to; None outside a multirun."""
    return Path(HydraConfig.get().sweep.dir).name if sweeping() else None


class TrainingSweep(HydraCallback):
    """Hydra callback that prints the scores of a sweep, best first, and exits with status 2 if a run failed."""

    def __init__(self) -> None:
        self.scores: list[tuple[float, str]] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Store the validation mAP that a job returned; NaN if its training failed."""
        if job_return.status == JobStatus.COMPLETED and job_return.hydra_cfg is not None:
            folder = Path(job_return.hydra_cfg.hydra.runtime.output_dir)
            self.scores.append((job_return.return_value, f"{' '.join(job_return.overrides or ())}: {folder}"))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print the scores, best first, and exit with status 2 if a run failed."""
        for score, run in sorted(self.scores, key=lambda pair: -math.inf if math.isnan(pair[0]) else pair[0])[::-1]:
            print("failed" if math.isnan(score) else f"validation mAP {score:.4f}", run, flush=True)
        if any(math.isnan(score) for score, _ in self.scores):
            sys.exit(2)


class EpochProgressBar(RichProgressBar):
    """Lightning's progress bar, with epochs counted from 1 as in all messages."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch + 1}/{self.trainer.max_epochs}"


_END_DELAY = 8  # seconds for which the other processes wait after an error, so that the first process can report it


def make_fit_trainer(t: FitConfig, o: OptimConfig, callbacks: list[Callback], loggers: list[Logger]) -> pl.Trainer:
    """Create the Trainer of a training run.

    Args:
        t: settings of the devices, the precision and gradient accumulation.
        o: settings of the optimizer.
        callbacks: callbacks of the run.
        loggers: loggers of the training curves.

    Raises:
        InputError: Lightning rejects the settings, a sweep uses several devices per job, or torchrun or SLURM has
            started a different number of processes.
    """
    return make_trainer(
        t,
        precision(t),
        num_nodes=t.num_nodes,
        max_epochs=o.epochs,
        accumulate_grad_batches=t.accumulate,
        gradient_clip_val=o.clip,
        deterministic=t.deterministic,
        benchmark=not t.deterministic,
        callbacks=[*callbacks, EpochProgressBar()] if t.progress else callbacks,
        logger=loggers,
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )


def precision(t: FitConfig) -> str:
    """Return the configured precision in Lightning's notation.

    "auto" is float32 on a CPU, bfloat16 autocast on a GPU that supports it, and float16 autocast on other GPUs.
    """
    if t.precision != "auto":
        return t.precision
    if t.accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


def run_fit(trainer: pl.Trainer, module: TrainingModule, data: TrainingDataModule, checkpoint: Path | None) -> None:
    """Train a module, from the beginning or, if `checkpoint` is not None, from this checkpoint.

    Raises:
        InputError: the training failed because of its input, too little GPU memory, or a failure of another process.
    """
    _end_with_first_process()
    if trainer.precision == "64-true":
        # The module is converted to float64 here. Otherwise, Lightning would load the float64 weights of a checkpoint
        # into float32 parameters, which would round them, and convert the module afterwards.
        module.double()
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    except InputError:
        if not trainer.is_global_zero:
            # Lightning kills the first process when another process ends. The other processes therefore wait until the
            # first process has reported the error.
            time.sleep(_END_DELAY)
        raise
    except SystemExit as end:
        if end.code is None:  # Lightning handled SIGTERM before the first step
            sys.exit(128 + signal.SIGTERM)
        if end.code == 1:  # Lightning handled the second Ctrl-C
            log.error("interrupted; run the same command to resume from the last checkpoint")
            sys.exit(130)
        raise
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"out of GPU memory ({first_line(error)}); raise trainer.accumulate (2 halves the memory of a batch), or "
            "lower optim.batch_size or data.image_size"
        ) from error
    except RuntimeError as error:
        translated = translate_process_error(error, trainer.world_size, "training", "from the last checkpoint")
        if translated is None:
            raise
        raise translated from error


def _end_with_first_process() -> None:
    """Make this process end when the first process ends or is killed.

    This applies to processes that the first process has started. torchrun ends the processes of a run itself.
    """
    if "LOCAL_RANK" not in os.environ or os.environ["LOCAL_RANK"] == "0" or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
