"""Which of a run's processes this is, before Lightning has joined them, and how those that it starts end with it."""

from __future__ import annotations

import multiprocessing
import os
import threading


def first_process() -> bool:
    """Whether this is the process that writes, by what torchrun, Lightning or SLURM has set (in Lightning's order)."""
    if int(os.environ.get("NODE_RANK", 0)) > 0:
        return False
    ranks = (os.environ.get(key) for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return int(next((rank for rank in ranks if rank is not None), 0)) == 0


def in_main_thread() -> bool:
    """Whether this is the thread that may handle signals."""
    return threading.current_thread() is threading.main_thread()


def end_with_parent() -> None:
    """Make this process, started by `multiprocessing`, end as soon as the one that started it, even if that is killed.

    Not by the number of the parent process: that of a process from a fork server is the server, which lives as long
    as the processes that it forked.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=[parent], daemon=True).start()


def _end_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
