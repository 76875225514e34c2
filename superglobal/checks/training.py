"""Settings of a training."""

from __future__ import annotations

import math
from pathlib import Path

from superglobal.checks.limits import TABLES, require_choice, require_within
from superglobal.checks.trackers import check_logger, require_wandb
from superglobal.config import HeadConfig, TrainConfig
from superglobal.errors import InputError
from superglobal.models.heads import require_kind

_OPTIMISERS = ("sgd", "adamw")
_PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "64-true")
_BATCH_NORMS = ("train", "frozen", "sync")


def check_training(config: TrainConfig) -> None:
    """Raise InputError for what `train.py` could not do as told."""
    d, o, t, v = config.data, config.optim, config.trainer, config.validation
    require_choice("data.role", d.role, ("train",))
    require_choice("data.table", d.table, TABLES)
    if d.classes_of is not None:
        require_choice("data.classes_of", d.classes_of, TABLES)
    require_choice("optim.name", o.name, _OPTIMISERS)
    require_choice("optim.batch_norm", o.batch_norm, _BATCH_NORMS)
    require_choice("trainer.precision", t.precision, _PRECISIONS)
    require_choice("resume", config.resume, ("auto", "anew"))
    if not config.name or Path(config.name).is_absolute() or ".." in Path(config.name).parts:
        raise InputError(f"name={config.name}: expected the name of a folder inside paths.outputs")
    require_within(
        {
            "data.min_images": (d.min_images, 2, math.inf),
            "data.bad_budget": (d.bad_budget, 0, 0.1),
            "data.image_size": (d.image_size, 1, math.inf),
            "data.crop": (d.crop, 0.001, 1),
            "data.jitter": (d.jitter, 0, 1),
            "dim": (config.dim, 0, math.inf),
            "optim.lr": (o.lr, 0, 1e9),
            "optim.head_lr": (o.head_lr, 0, 1e6),
            "optim.weight_decay": (o.weight_decay, 0, 1e6),
            "optim.momentum": (o.momentum, 0, 0.999),
            "optim.warmup": (o.warmup, 0, 0.9),
            "optim.batch_size": (o.batch_size, 2, math.inf),
            "optim.epochs": (o.epochs, 1, math.inf),
            "optim.clip": (o.clip, 1e-9, 1e9),
            "optim.ema": (o.ema, 0, 0.999999),
            "validation.fraction": (v.fraction, 0, 0.5),
            "validation.images": (v.images, 2, math.inf),
            "validation.max_side": (v.max_side, 1, math.inf),
            "validation.every_epochs": (v.every_epochs, 1, math.inf),
            "validation.every_steps": (v.every_steps, 1, math.inf),
            "validation.patience": (v.patience, 1, math.inf),
            "trainer.num_nodes": (t.num_nodes, 1, math.inf),
            "trainer.num_workers": (t.num_workers, 0, math.inf),
            "trainer.accumulate": (t.accumulate, 1, math.inf),
            "trainer.log_every": (t.log_every, 1, math.inf),
            "trainer.save_every_steps": (t.save_every_steps, 1, math.inf),
            "trainer.save_every_minutes": (t.save_every_minutes, 0, math.inf),
            "seed": (config.seed, 0, 2**32 - 1),
        }
    )
    for stage in d.stages:
        if len(stage) != 2 or min(stage) < 1:
            raise InputError(f"data.stages={d.stages}: expected [epochs, side] pairs, e.g. [[8,256],[4,384]]")
    if d.stages and sum(epochs for epochs, _ in d.stages) >= o.epochs:
        raise InputError(f"data.stages={d.stages} leaves no epoch of optim.epochs={o.epochs} to data.image_size")
    if o.batch_size % t.accumulate:
        raise InputError(f"optim.batch_size={o.batch_size} is no multiple of trainer.accumulate={t.accumulate}")
    _check_head(config.head)
    check_logger(config.logger)
    require_wandb(config.logger)


def _check_head(head: HeadConfig) -> None:
    require_kind(head.kind, head.dynamic_margin, head.easy_margin)
    require_within(
        {
            "head.scale": (head.scale, 1, 1e4),
            "head.margin": (head.margin, 0, 1 if head.kind == "cosface" else math.pi / 2),
            "head.centers": (head.centers, 1, 100),
            "head.negatives": (head.negatives, 1e-4, 1),
        }
    )
