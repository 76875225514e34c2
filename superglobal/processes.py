"""Which of a run's processes this is, before Lightning has joined them."""

from __future__ import annotations

import os


def first_process() -> bool:
    """Whether this is the process that writes, by what torchrun, Lightning or SLURM has set (in Lightning's order)."""
    if int(os.environ.get("NODE_RANK", 0)) > 0:
        return False
    ranks = (os.environ.get(key) for key in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return int(next((rank for rank in ranks if rank is not None), 0)) == 0
