"""Determine the rank before Lightning connects the processes, and end child processes with their parent."""

from __future__ import annotations

import multiprocessing
import os
import threading


def first_process() -> bool:
    """Return True in the process that writes files, from the environment variables of torchrun, Lightning or SLURM."""
    if int(os.environ.get("NODE_RANK", 0)) > 0:
        return False
    ranks = (os.environ.get(key) for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))  # in Lightning's order
    return int(next((rank for rank in ranks if rank is not None), 0)) == 0


def in_main_thread() -> bool:
    """Return True in the main thread, which is the only one that may install signal handlers."""
    return threading.current_thread() is threading.main_thread()


def end_with_parent() -> None:
    """End this process, which `multiprocessing` started, as soon as its parent ends or is killed.

    The parent process ID cannot be used: for a process from a fork server it is that of the server, which may still run
    after the parent has ended.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()
