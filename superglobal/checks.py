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


def _require_within(limits: Mapping[str, tuple[Any, float, float]]) -> None:
    """Each number, unless it is None, between its limits, both included; never NaN."""
    for key, (value, least, most) in limits.items():
        if value is not None and not value >= least:
            raise InputError(f"{key}={value}: expected at least {least:g}")
        if value is not None and not value <= most:
            raise InputError(f"{key}={value}: expected at most {most:g}")


def _check_training(config: TrainConfig) -> None:
    d, o, h = config.data, config.optim, config.head
    _require_choice("data.table", d.table, _TABLES)
    _require_choice("optim.name", o.name, _OPTIMISERS)
    devices = config.trainer.devices
    if devices not in (1, "1") and not (isinstance(devices, list) and len(devices) == 1):
        raise InputError(f"trainer.devices={devices}: training runs on one device; use 1, or [2] for the third GPU")
    _require_within(
        {
            "data.min_images": (d.min_images, 2, math.inf),
            "data.val_fraction": (d.val_fraction, 0, 0.5),
            "data.val_images": (d.val_images, 2, math.inf),
            "data.val_max_side": (d.val_max_side, 1, math.inf),
            "data.image_size": (d.image_size, 1, math.inf),
            "data.crop": (d.crop, 0.001, 1),
            "data.jitter": (d.jitter, 0, 1),
            "dim": (config.dim, 0, math.inf),
            "head.scale": (h.scale, 1, 1e4),
            "head.margin": (h.margin, 0, math.pi / 2),
            "optim.lr": (o.lr, 0, 1e6),
            "optim.head_lr": (o.head_lr, 0, 1e6),
            "optim.weight_decay": (o.weight_decay, 0, 1e6),
            "optim.momentum": (o.momentum, 0, 0.999),
            "optim.warmup": (o.warmup, 0, 0.9),
            "optim.batch_size": (o.batch_size, 2, math.inf),
            "optim.epochs": (o.epochs, 1, math.inf),
            "trainer.num_workers": (config.trainer.num_workers, 0, math.inf),
            "trainer.log_every": (config.trainer.log_every, 1, math.inf),
            "seed": (config.seed, 0, 2**32 - 1),
        }
    )


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
    _require_within(
        {
            "k": (config.k, 1, math.inf),
            "rerank.M": (config.rerank.M, 1, math.inf),
            "rerank.K": (config.rerank.K, 1, math.inf),
            "dataset.max_side": (config.dataset.max_side, 1, math.inf),
            "trainer.num_workers": (config.trainer.num_workers, 0, math.inf),
            "pictures.queries": (config.pictures.queries, 0, math.inf),
            "pictures.ranks": (config.pictures.ranks, 1, math.inf),
            "seed": (config.seed, 0, 2**63 - 1),
        }
    )
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
