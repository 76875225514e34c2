"""train.py as it is, but killed (SIGKILL) at a chosen moment, or asked to end.

KILL_AT: in the first process, before that step (the first is 0). KILL_SAVING: when the checkpoint of that step is
written but has not got its name yet. TERM_VALIDATING: SIGTERM as the validation after that step begins.
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
save, describe = AtomicCheckpointIO.save_checkpoint, RetrievalValidation._extract


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_batch(self, trainer, module, batch, batch_idx) -> None:
    if trainer.global_step == AT and trainer.is_global_zero:
        kill()


def saving(self, checkpoint, path, storage_options=None) -> None:
    if checkpoint["global_step"] == SAVING:
        os.replace = lambda *_: kill()
    save(self, checkpoint, path, storage_options)


def describing(self, trainer, network, images):
    if trainer.global_step == VALIDATING:
        os.kill(os.getpid(), signal.SIGTERM)
    return describe(self, trainer, network, images)


RetrievalValidation._extract = describing
CheckpointCallback.on_train_batch_start = before_batch
AtomicCheckpointIO.save_checkpoint = saving
if __name__ == "__main__":
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
