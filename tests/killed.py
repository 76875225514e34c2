"""Run train.py and interrupt it by a signal at a chosen moment.

The moment is set by environment variables. KILL_AT: SIGKILL in the first process before this step (the first step is
0). KILL_SAVING: SIGKILL when the checkpoint of this step is written but not yet renamed to its final name.
TERM_VALIDATING: SIGTERM when the validation after this step begins.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from superglobal.training.checkpointing import AtomicCheckpointIO, CheckpointCallback  # noqa: E402
from superglobal.training.validation import RetrievalValidation  # noqa: E402

AT, SAVING, VALIDATING = (int(os.environ.get(key, -1)) for key in ("KILL_AT", "KILL_SAVING", "TERM_VALIDATING"))
save_checkpoint, extract = AtomicCheckpointIO.save_checkpoint, RetrievalValidation._extract


def kill() -> None:
    """Kill this process (SIGKILL)."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before_step(self, trainer, module, batch, batch_idx) -> None:
    """Kill the first process before the step KILL_AT."""
    if trainer.global_step == AT and trainer.is_global_zero:
        kill()


def kill_while_saving(self, checkpoint, path, storage_options=None) -> None:
    """Kill the process before the checkpoint of the step KILL_SAVING is renamed."""
    if checkpoint["global_step"] == SAVING:
        os.replace = lambda *_: kill()
    save_checkpoint(self, checkpoint, path, storage_options)


def terminate_while_validating(self, trainer, network, images):
    """Send SIGTERM to this process at the validation after the step TERM_VALIDATING."""
    if trainer.global_step == VALIDATING:
        os.kill(os.getpid(), signal.SIGTERM)
    return extract(self, trainer, network, images)


RetrievalValidation._extract = terminate_while_validating
CheckpointCallback.on_train_batch_start = kill_before_step
AtomicCheckpointIO.save_checkpoint = kill_while_saving
if __name__ == "__main__":
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
