"""Write checkpoints atomically, and save one when a signal ends the run."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO

from superglobal.data.datamodules import ImageLoader
from superglobal.errors import InputError, first_line
from superglobal.training.callbacks import NonFiniteGuard, StepCallback, any_rank, cpu_process_group
from superglobal.training.module import TrainingModule
from superglobal.utils.distributed import STOP_SIGNALS, first_process, in_main_thread
from superglobal.utils.io import atomic_file, write_error

log = logging.getLogger(__name__)
_MAX_WAIT = 30.0  # seconds to wait for images after a signal
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
# Exceptions that reading a damaged checkpoint can raise.
_DAMAGED = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    TypeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically and keep the previous one as `previous.ckpt`.

    Lightning's own implementation first writes a checkpoint to the system's folder for temporary files, and then moves
    it to its final path. If the two are on different file systems, the move copies the file. A full disk then leaves a
    truncated checkpoint at the final path, and a missing write permission is not reported.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint. Raises InputError if it cannot be written."""
        path = Path(path)
        with atomic_file(path, path.with_name(PREVIOUS)) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch raises RuntimeError if writing the file raises an error
                if isinstance(error.__context__, InputError):
                    raise error.__context__ from error
                raise write_error(path, OSError(first_line(error))) from error


class CheckpointCallback(StepCallback):
    """Save a checkpoint at the end of each epoch, every given number of steps or minutes, and on a signal.

    SIGTERM, Ctrl-C, SIGUSR1 and SIGUSR2 (sent by SLURM and submitit before the end of a job) end the run after the
    current step with a checkpoint and exit status 128 + the number of the signal. A second Ctrl-C ends the run at once.

    Args:
        folder: folder of the checkpoints.
        every_steps: number of steps between checkpoints; None for never.
        every_minutes: minutes between checkpoints; None for never.
        guard: callback that checks for non-finite values before each save.
    """

    def __init__(
        self, folder: Path, every_steps: int | None, every_minutes: float | None, guard: NonFiniteGuard
    ) -> None:
        self.folder = folder
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.guard = guard
        self.received: int | None = None
        self.handlers: dict[int, Any] = {}
        self.saved_at = time.monotonic()
        self.group: Any = None
        self.usual_wait = ImageLoader.max_wait

    @property
    def asked_to_stop(self) -> bool:
        """True if this process has received a signal to end the run."""
        return self.received is not None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.group = cpu_process_group(trainer)
        # Lightning's own signal handlers run a broadcast, which may interrupt another collective operation.
        if in_main_thread():
            self.handlers = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        if trainer.is_global_zero:
            for temporary in self.folder.glob(".*.ckpt.*"):
                temporary.unlink()
        self.saved_at = time.monotonic()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}
        ImageLoader.max_wait = self.usual_wait

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, epoch_ends: bool) -> None:
        due = self.every_minutes is not None and time.monotonic() - self.saved_at >= 60 * self.every_minutes
        due, *stop = any_rank(self.group, due, *(self.received == number for number in STOP_SIGNALS))
        due |= self.every_steps is not None and trainer.global_step % self.every_steps == 0
        due |= epoch_ends or trainer.should_stop
        if due or any(stop):
            with module.pause():
                self.guard.check(trainer, module)
                trainer.save_checkpoint(self.folder / LAST, weights_only=False)
            self.saved_at = time.monotonic()
        if any(stop):
            number = next(number for number, flag in zip(STOP_SIGNALS, stop, strict=True) if flag)
            name = signal.Signals(number).name
            log.warning("%s: saved a checkpoint at step %d; run the same command to resume", name, trainer.global_step)
            # Only the first process exits with this status. If another process exited with a status other than 0,
            # Lightning would kill the first process.
            sys.exit(128 + number if trainer.is_global_zero else 0)

    def _receive(self, number: int, frame: Any) -> None:
        """Record a signal, so that the run ends after the current step. A second Ctrl-C ends the run at once.

        Args:
            number: number of the signal.
            frame: not used; Python passes it to every signal handler.
        """
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        ImageLoader.max_wait = _MAX_WAIT
        # Logging in a signal handler could wait forever for a lock that this thread has acquired. `sys.stderr` exits if
        # the reader of a pipe has ended.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{signal.Signals(number).name}: saving a checkpoint after this step\n".encode())


def newest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """Find the newest valid checkpoint.

    If `last.ckpt` is damaged and `previous.ckpt` is valid, the first process renames the damaged file.

    Args:
        folder: folder of the checkpoints.

    Returns:
        The path and the step of the checkpoint; None if there are no checkpoints.

    Raises:
        InputError: all checkpoints are damaged.
    """
    damaged = []
    for path in (folder / LAST, folder / PREVIOUS):
        try:
            size = path.stat().st_size
            step = _step_of(path)
        except FileNotFoundError:
            continue
        except _DAMAGED as error:
            reason = f"corrupt or incomplete ({first_line(error)})"
            if isinstance(error, pickle.UnpicklingError):
                reason = "damaged, or contains code (which was not run)"
            damaged.append(f"{path} ({size} bytes): {reason}")
            continue
        for text in damaged:
            log.warning("%s; resuming from %s, step %d", text, path, step)
        if damaged and first_process():
            # Each save renames `last.ckpt` to `previous.ckpt`. With a damaged `last.ckpt`, this would overwrite the
            # valid checkpoint.
            (folder / LAST).replace(folder / f"{LAST}.damaged")
        return path, step
    if damaged:
        raise InputError("\n".join([*damaged, "no valid checkpoint to resume from; set resume=restart to train again"]))
    return None


def _step_of(path: Path) -> int:
    """Verify the checksums of a checkpoint, which torch does not verify, and return its step.

    Raises:
        ValueError: a checksum is wrong. Reading a damaged file can also raise the other exceptions in `_DAMAGED`.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"{damaged} has a wrong checksum")
    return int(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["global_step"])
