"""The trainer of a training, and what its failures are called."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger

from superglobal.callbacks import AtomicCheckpoints
from superglobal.config import FitConfig, OptimConfig
from superglobal.data.datamodules import TrainingDataModule
from superglobal.engine.common import make_trainer, process_failure
from superglobal.errors import InputError
from superglobal.training import TrainingModule

log = logging.getLogger(__name__)

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
        plugins=[AtomicCheckpoints()],
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
        told = process_failure(error, trainer.world_size, "training", "from the last checkpoint")
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
