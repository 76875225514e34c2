"""train.py as it is, but killed (SIGKILL) at a chosen moment.

KILL_AT: in the first process, before that step (the first is 0). KILL_SAVING: when the checkpoint of that step is
written but has not got its name yet.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from superglobal.callbacks import AtomicCheckpoints, Checkpoints  # noqa: E402

AT, SAVING = int(os.environ.get("KILL_AT", -1)), int(os.environ.get("KILL_SAVING", -1))
save = AtomicCheckpoints.save_checkpoint


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_batch(self, trainer, module, batch, batch_idx) -> None:
    if trainer.global_step == AT and trainer.is_global_zero:
        kill()


def saving(self, checkpoint, path, storage_options=None) -> None:
    if checkpoint["global_step"] == SAVING:
        os.replace = lambda *_: kill()
    save(self, checkpoint, path, storage_options)


Checkpoints.on_train_batch_start = before_batch
AtomicCheckpoints.save_checkpoint = saving
if __name__ == "__main__":
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
