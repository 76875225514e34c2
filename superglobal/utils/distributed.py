"""Find the first process before Lightning connects the processes. End a worker process when its parent ends."""

from __future__ import annotations

import multiprocessing
import os
import threading


def first_process() -> bool:
    """Return True if this process has the global rank 0. Only the process with this rank writes files.

    The rank is read from the environment variables of torchrun, Lightning or SLURM, in the order that Lightning uses.
    """
    if int(os.environ.get("NODE_RANK", 0)) > 0:
        return False
    ranks = (os.environ.get(key) for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return int(next((rank for rank in ranks if rank is not None), 0)) == 0


def in_main_thread() -> bool:
    """Return True if the caller runs in the main thread. Python allows only this thread to set signal handlers."""
    return threading.current_thread() is threading.main_thread()


def end_with_parent() -> None:
    """Start a thread that ends this process as soon as its parent ends or is killed.

    In a process that `multiprocessing` did not start, do nothing. The thread does not check the parent process ID
    (`os.getppid`). In a process started by a fork server, it is the ID of this server, which may outlive the parent.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()
