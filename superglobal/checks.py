"""What the types of a configuration cannot say: choices, ranges, contradictions."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from superglobal.config import EvalConfig, TrainConfig
from superglobal.errors import InputError
from superglobal.models.network import make_scales
from superglobal.models.pooling import relup_mode
from superglobal.retrieval.tables import LADDER, SWITCHES

_KINDS = ("revisited", "folder", "descriptors")
_BACKENDS = ("auto", "faiss", "torch")
_TABLES = ("train_clean.csv", "train.csv")
_OPTIMISERS = ("sgd", "adamw")
C = TypeVar("C", EvalConfig, TrainConfig)


def validated(cfg: DictConfig, schema: type[C]) -> C:
    """Composed configuration as typed objects.

    Raises:
        InputError: a setting is missing, out of its choices, or contradicts another.
    """
    missing = sorted(str(key) for key in OmegaConf.missing_keys(cfg))
    if missing:
        raise InputError(
            f"missing settings: {', '.join(missing)}; give them on the command line, e.g. {missing[0]}=..."
        )
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, schema)
    if isinstance(config, EvalConfig):
        _check_evaluation(config)
    else:
        _check_training(config)
    if config.pooling.relup is not None:
        relup_mode(config.pooling.relup)
    return config


def _require_choice(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{key}={value}: expected one of {', '.join(allowed)}")


def _require_at_least(limits: Mapping[str, tuple[Any, float]]) -> None:
    for key, (value, least) in limits.items():
        if value is not None and not value >= least:
            raise InputError(f"{key}={value}: expected at least {least}")


def _check_training(config: TrainConfig) -> None:
    d, o, h = config.data, config.optim, config.head
    _require_choice("data.table", d.table, _TABLES)
    _require_choice("optim.name", o.name, _OPTIMISERS)
    devices = config.trainer.devices
    if devices not in (1, "1") and not (isinstance(devices, list) and len(devices) == 1):
        raise InputError(f"trainer.devices={devices}: training runs on one device; use 1, or [2] for the third GPU")
    _require_at_least(
        {
            "data.min_images": (d.min_images, 2),
            "data.val_images": (d.val_images, 2),
            "data.val_max_side": (d.val_max_side, 1),
            "data.image_size": (d.image_size, 1),
            "data.jitter": (d.jitter, 0),
            "dim": (config.dim, 1),
            "head.margin": (h.margin, 0),
            "optim.head_lr": (o.head_lr, 0),
            "optim.weight_decay": (o.weight_decay, 0),
            "optim.momentum": (o.momentum, 0),
            "optim.warmup": (o.warmup, 0),
            "optim.batch_size": (o.batch_size, 2),
            "optim.epochs": (o.epochs, 1),
            "trainer.num_workers": (config.trainer.num_workers, 0),
            "trainer.log_every": (config.trainer.log_every, 1),
            "seed": (config.seed, 0),
        }
    )
    above_zero = {"data.crop": d.crop, "head.scale": h.scale, "optim.lr": o.lr, "data.val_fraction": d.val_fraction}
    for key, value in above_zero.items():
        if not 0 < value < math.inf:
            raise InputError(f"{key}={value}: expected a number above 0")
    at_most = {
        "data.crop": (d.crop, 1),
        "data.val_fraction": (d.val_fraction, 0.5),
        "data.jitter": (d.jitter, 1),
        "head.margin": (h.margin, math.pi / 2),
        "optim.momentum": (o.momentum, 0.999),
        "optim.warmup": (o.warmup, 0.9),
        "seed": (config.seed, 2**32 - 1),
    }
    for key, (value, most) in at_most.items():
        if not value <= most:
            raise InputError(f"{key}={value}: expected at most {most:.6g}")


def _check_evaluation(config: EvalConfig) -> None:
    d, own = config.dataset, config.descriptors
    _require_choice("dataset.kind", d.kind, _KINDS)
    _require_choice("index.backend", config.index.backend, _BACKENDS)
    if config.index.backend == "faiss" and importlib.util.find_spec("faiss") is None:
        raise InputError("index=faiss: FAISS is not installed; pip install faiss-cpu (or faiss-gpu), or index=torch")
    if d.kind == "folder" and not d.database:
        raise InputError("dataset=folder: dataset.database=FOLDER is missing")
    if (own.query is None) != (own.database is None):
        raise InputError("descriptors.query and descriptors.database go together: give both .npy files")
    if d.kind == "descriptors" and own.query is None:
        raise InputError("dataset=descriptors needs descriptors.query=Q.npy descriptors.database=X.npy")
    if d.kind == "descriptors" and config.distractors.name is not None:
        raise InputError("dataset=descriptors knows no images: put distractors into descriptors.database")
    _check_evaluation_ranges(config)
    _check_ablation(config)
    make_scales(config.scales)


def _check_evaluation_ranges(config: EvalConfig) -> None:
    _require_at_least(
        {
            "k": (config.k, 1),
            "rerank.M": (config.rerank.M, 1),
            "rerank.K": (config.rerank.K, 1),
            "dataset.max_side": (config.dataset.max_side, 1),
            "trainer.num_workers": (config.trainer.num_workers, 0),
            "pictures.queries": (config.pictures.queries, 0),
            "pictures.ranks": (config.pictures.ranks, 1),
            "seed": (config.seed, 0),
        }
    )
    if config.seed >= 2**63:
        raise InputError(f"seed={config.seed}: expected less than 2^63")
    if not math.isfinite(config.rerank.beta):
        raise InputError(f"rerank.beta={config.rerank.beta}: expected a finite number")


def _check_ablation(config: EvalConfig) -> None:
    """A row is what its name says, or its number would stand under a wrong name in every table."""
    if config.ablation is None:
        return
    if config.ablation not in LADDER:
        raise InputError(f"ablation={config.ablation}: expected one of {', '.join(LADDER)}")
    p = config.pooling
    found = (p.gem_plus, p.regional, p.scale, relup_mode(p.relup) != "off", config.rerank.enabled)
    for switch, wanted, value in zip(SWITCHES, LADDER[config.ablation], found, strict=True):
        if wanted != value:
            state = "on" if wanted else "off"
            raise InputError(f"ablation={config.ablation} means {switch} {state}; drop the ablation or the override")
