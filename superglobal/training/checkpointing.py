"""Checkpoints that are whole or not there, and what a signal makes of a run."""

from __future__ import annotations

import contextlib
import logging
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

from superglobal.errors import InputError
from superglobal.training.callbacks import NonFiniteGuard, StepCallback, any_rank, side_group
from superglobal.training.module import TrainingModule
from superglobal.utils.distributed import first_process, in_main_thread
from superglobal.utils.io import atomic_file

log = logging.getLogger(__name__)
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
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
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames; the checkpoint before becomes `previous.ckpt`.

    Lightning's own goes through the folder for temporary files, which may be another file system: there a full disk
    leaves half a file under the final name, and a lost permission leaves nothing and says nothing.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        with atomic_file(path, path.with_name(PREVIOUS)) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's writer hides the error of the file beneath
                cause = error.__context__
                raise cause if isinstance(cause, OSError) else OSError(str(error).splitlines()[0]) from error


class CheckpointCallback(StepCallback):
    """Saves at the end of every epoch, every so many steps or minutes, and when a signal asks to stop.

    SIGTERM, Ctrl-C, and SIGUSR1 and SIGUSR2 (SLURM and submitit send them before the end of a job) end the run after
    the step in progress, saved, with status 128 + the signal's number. A second Ctrl-C ends it at once.

    Args:
        folder: of the checkpoints.
        every_steps, every_minutes: None for never.
        guard: nothing is saved that it objects to.
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

    @property
    def asked_to_stop(self) -> bool:
        """Whether a signal has come to this process."""
        return self.received is not None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.group = side_group(trainer)
        # Lightning's own handlers broadcast from within the handler, in whatever collective the run is.
        if in_main_thread():
            self.handlers = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        if trainer.is_global_zero:
            for stray in self.folder.glob(".*.ckpt.*"):
                stray.unlink()
        self.saved_at = time.monotonic()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def on_step(self, trainer: pl.Trainer, module: TrainingModule, epoch_ends: bool) -> None:
        due = self.every_minutes is not None and time.monotonic() - self.saved_at >= 60 * self.every_minutes
        due, *stop = any_rank(self.group, due, *(self.received == number for number in _SIGNALS))
        due |= self.every_steps is not None and trainer.global_step % self.every_steps == 0
        due |= epoch_ends or trainer.should_stop
        if due or any(stop):
            with module.pause():
                self.guard.check(trainer, module)
                trainer.save_checkpoint(self.folder / LAST, weights_only=False)
            self.saved_at = time.monotonic()
        if any(stop):
            number = next(number for number, flag in zip(_SIGNALS, stop, strict=True) if flag)
            name = signal.Signals(number).name
            log.warning("%s: saved at step %d; the same command goes on from there", name, trainer.global_step)
            # Lightning takes a child process that ends with anything else for a crash and kills the first.
            sys.exit(128 + number if trainer.is_global_zero else 0)

    def _receive(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        # From within a handler logging might wait for a lock that this thread holds.
        with contextlib.suppress(OSError):
            sys.stderr.write(f"\n{signal.Signals(number).name}: saving after this step\n")


def newest_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest checkpoint that loads and its step; None if there is none at all. A damaged one is put aside.

    Raises:
        InputError: there are checkpoints and none of them loads.
    """
    bad = []
    for path in (folder / LAST, folder / PREVIOUS):
        try:
            size = path.stat().st_size
            step = _step_of(path)
        except FileNotFoundError:
            continue
        except _DAMAGED as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
            what = f"corrupt or incomplete ({reason})"
            if isinstance(error, pickle.UnpicklingError):
                what = "damaged, or it asks to run code on loading; it was not run"
            bad.append(f"{path} ({size} bytes): {what}")
            continue
        for text in bad:
            log.warning("%s; going on from %s, step %d", text, path, step)
        if bad and first_process():
            # The next save would put it in the place of the one that loads.
            (folder / LAST).replace(folder / f"{LAST}.damaged")
        return path, step
    if bad:
        raise InputError("\n".join([*bad, "no checkpoint is left to go on from; resume=restart begins again"]))
    return None


def _step_of(path: Path) -> int:
    """The step of a checkpoint, every byte of which is checked: torch itself does not compare check sums."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"{damaged} is not what was written")
    return int(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["global_step"])
