"""Ranks before Lightning connects the processes, and child processes that end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import threading


def first_process() -> bool:
    """Return whether this is the process that writes files, by the variables of torchrun, Lightning or SLURM."""
    if int(os.environ.get("NODE_RANK", 0)) > 0:
        return False
    ranks = (os.environ.get(key) for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))  # in Lightning's order
    return int(next((rank for rank in ranks if rank is not None), 0)) == 0


def in_main_thread() -> bool:
    """Return whether this is the thread that may install signal handlers."""
    return threading.current_thread() is threading.main_thread()


def end_with_parent() -> None:
    """End this process, started by `multiprocessing`, as soon as its parent ends, even if that is killed.

    The parent process ID does not tell: for a process from a fork server it is the server, which outlives the parent.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()
