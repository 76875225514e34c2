"""What the types of a configuration cannot say: choices, ranges, contradictions."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from superglobal.config import (
    CompareConfig,
    DatasetConfig,
    DemoConfig,
    EvalConfig,
    ExtractionConfig,
    HeadConfig,
    IndexConfig,
    RerankConfig,
    TrainConfig,
    TuneConfig,
    rerank_parameters,
)
from superglobal.data.images import MAX_PIXELS
from superglobal.errors import InputError
from superglobal.models.fast import PRECISIONS
from superglobal.models.heads import require_kind
from superglobal.models.network import SCALES, make_scales
from superglobal.models.pooling import relup_mode
from superglobal.retrieval.index import KINDS
from superglobal.retrieval.landmark_scoring import VOTES
from superglobal.retrieval.rerank import SECOND
from superglobal.retrieval.rerankers import JUNK, SEARCH_AGAIN, completed, parameters
from superglobal.retrieval.search import BACKENDS
from superglobal.retrieval.statistics import KINDS as STATISTICS
from superglobal.retrieval.store import DTYPES
from superglobal.retrieval.tables import LADDER, SWITCHES

_KINDS = ("revisited", "folder", "descriptors", "gldv2", "gldv2_val", "gldv2_recognition")
_ROLES = ("train", "validation", "test")
_BENCHMARKS = ("roxford5k", "rparis6k", "gldv2_test")
_TABLES = ("train_clean.csv", "train.csv")
_OPTIMISERS = ("sgd", "adamw")
_PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "64-true")
_BATCH_NORMS = ("train", "frozen", "sync")
C = TypeVar("C", EvalConfig, CompareConfig, DemoConfig, TrainConfig, TuneConfig)


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
        if isinstance(config, DemoConfig):
            _check_page(config)
    elif isinstance(config, TrainConfig):
        _check_training(config)
    else:
        _check_tuning(config)
        return config
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
    d, o, t, v = config.data, config.optim, config.trainer, config.validation
    _require_choice("data.role", d.role, ("train",))
    _require_choice("data.table", d.table, _TABLES)
    if d.classes_of is not None:
        _require_choice("data.classes_of", d.classes_of, _TABLES)
    _require_choice("optim.name", o.name, _OPTIMISERS)
    _require_choice("optim.batch_norm", o.batch_norm, _BATCH_NORMS)
    _require_choice("trainer.precision", t.precision, _PRECISIONS)
    _require_choice("resume", config.resume, ("auto", "anew"))
    if not config.name or Path(config.name).is_absolute() or ".." in Path(config.name).parts:
        raise InputError(f"name={config.name}: expected the name of a folder inside paths.outputs")
    _require_within(
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


def _check_head(head: HeadConfig) -> None:
    require_kind(head.kind, head.dynamic_margin, head.easy_margin)
    _require_within(
        {
            "head.scale": (head.scale, 1, 1e4),
            "head.margin": (head.margin, 0, 1 if head.kind == "cosface" else math.pi / 2),
            "head.centers": (head.centers, 1, 100),
            "head.negatives": (head.negatives, 1e-4, 1),
        }
    )


def _check_evaluation(config: EvalConfig) -> None:
    d, own = config.dataset, config.descriptors
    _check_dataset(d)
    _check_index(config.index)
    _require_choice("store.dtype", config.store.dtype, DTYPES)
    if (own.query is None) != (own.database is None):
        raise InputError("descriptors.query and descriptors.database go together: give both .npy files")
    if d.kind == "descriptors" and own.query is None:
        raise InputError("dataset=descriptors needs descriptors.query=Q.npy descriptors.database=X.npy")
    if d.kind == "descriptors" and config.distractors.name is not None:
        raise InputError("dataset=descriptors knows no images: put distractors into descriptors.database")
    if d.kind.startswith("gldv2") and config.distractors.name is not None:
        raise InputError(f"{d.name}: distractors={config.distractors.name}: GLDv2's sets have none; distractors=none")
    _require_choice("distractors.unreadable", config.distractors.unreadable, ("error", "skip"))
    _require_within({"distractors.skip_budget": (config.distractors.skip_budget, 0, 1)})
    _check_extraction(config.extraction)
    _check_evaluation_ranges(config)
    if config.rerank.junk == "drop" and d.kind != "revisited":
        raise InputError(f"rerank.junk=drop: {d.name} has no junk; only Revisited sets have")
    M = config.rerank.M
    if d.kind == "gldv2_recognition" and config.rerank.enabled and M is not None and d.neighbours > M:
        raise InputError(
            f"dataset.neighbours={d.neighbours}, but reranking scores rerank.M={M} only; raise that, or rerank=none"
        )
    distances = config.rerank.enabled and config.rerank.kind == "kreciprocal"
    if d.kind == "gldv2_recognition" and distances and d.votes != "nearest":
        raise InputError(
            f"dataset.votes={d.votes}: k-reciprocal reranking gives distances, whose sums say nothing; "
            "dataset.votes=nearest, or another rerank="
        )
    if config.rerank.enabled and config.rerank.kind in SEARCH_AGAIN and config.index.kind != "flat":
        raise InputError(
            f"rerank.kind={config.rerank.kind} searches the whole database again, and exactly: beside the cut lists of "
            f"index={config.index.kind} its numbers would mean something else; index=flat"
        )
    _check_ablation(config)
    make_scales(config.scales)


def _check_page(config: DemoConfig) -> None:
    d, page, kind = config.dataset, config.page, config.rerank.kind
    if d.kind == "descriptors" or config.descriptors.query is not None:
        raise InputError("the page describes what is searched for, so it needs the photos and the weights; dataset=...")
    if config.rerank.enabled and not {"M", "K", "beta"} <= set(parameters(kind)):
        raise InputError(f"rerank={kind}: the page has M, K and beta to set; rerank=superglobal, mutual or none")
    if config.extraction.part is not None:
        raise InputError(f"extraction.part={config.extraction.part}: a page searches all of the database; leave it out")
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the page needs Gradio, which is not installed: pip install -c constraints.txt -e '.[demo]'")
    devices = config.trainer.devices
    if not (devices in (1, "1") or (isinstance(devices, list) and len(devices) == 1)):
        raise InputError(
            f"trainer.devices={devices}: a page is one process; describe with eval.py, then trainer.devices=1"
        )
    if not page.host:
        raise InputError("page.host is empty: 127.0.0.1 is this machine alone, 0.0.0.0 whoever reaches it")
    _require_within(
        {
            "page.port": (page.port, 0, 65535),
            "page.results": (page.results, 1, 500),
            "page.samples": (page.samples, 0, 100),
            "page.max_upload": (page.max_upload, 1, 2000),
            "page.max_megapixels": (page.max_megapixels, 1, MAX_PIXELS // 10**6),
        }
    )


def _check_extraction(how: ExtractionConfig) -> None:
    _require_choice("extraction.precision", how.precision, tuple(PRECISIONS))
    _require_within(
        {
            "extraction.batch_size": (how.batch_size, 1, math.inf),
            "extraction.batch_pixels": (how.batch_pixels, 1, math.inf),
        }
    )
    try:
        how.share()
    except ValueError as error:
        raise InputError(f"extraction.part={how.part}: expected which part of how many, such as 3/16") from error


def _check_index(index: IndexConfig) -> None:
    _require_choice("index.kind", index.kind, ("flat", *KINDS))
    _require_choice("index.backend", index.backend, BACKENDS)
    if (index.kind != "flat" or index.backend == "faiss") and importlib.util.find_spec("faiss") is None:
        raise InputError(
            f"index.kind={index.kind} index.backend={index.backend}: FAISS is not installed; pip install faiss-cpu (or "
            "faiss-gpu), or index=flat"
        )
    numbers = ("nlist", "nprobe", "pq_m", "ef_construction", "ef_search", "candidates")
    _require_within({f"index.{name}": (getattr(index, name), 1, 2**31 - 1) for name in numbers})
    _require_within({"index.M": (index.M, 2, 2048), "index.compare": (index.compare, 0, math.inf)})


def _check_dataset(d: DatasetConfig) -> None:
    _require_choice("dataset.kind", d.kind, _KINDS)
    _require_choice("dataset.role", d.role, _ROLES)
    if d.kind == "folder" and not d.database:
        raise InputError("dataset=folder: dataset.database=FOLDER is missing")
    _require_choice("dataset.table", d.table, _TABLES)
    _require_choice("dataset.votes", d.votes, VOTES)
    _require_within(
        {
            "dataset.max_side": (d.max_side, 1, math.inf),
            "dataset.landmarks": (d.landmarks, 1, math.inf),
            "dataset.seed": (d.seed, 0, 2**32 - 1),
            "dataset.neighbours": (d.neighbours, 1, math.inf),
        }
    )


def _check_tuning(config: TuneConfig) -> None:
    d, space = config.dataset, config.space
    if d is not None:
        _check_dataset(d)
        _check_tuned_set(d, config.allow_test)
    if importlib.util.find_spec("optuna") is None:
        raise InputError("tuning searches with Optuna, which is not installed: pip install 'superglobal[tune]'")
    for count in space.scales:
        _require_choice("space.scales", str(count), [str(n) for n in SCALES])
    for window in space.windows:
        _require_choice("space.windows", str(window), ["1", "3", "5", "7", "9", "11"])
    limits: dict[str, tuple[Any, float, float]] = {
        "trials": (config.trials, 1, math.inf),
        "max_images": (config.max_images, 8, math.inf),
        "trainer.num_workers": (config.trainer.num_workers, 0, math.inf),
        "seed": (config.seed, 0, 2**32 - 1),
    }
    limits |= {f"space.relup_alphas[{i}]": (alpha, 0, 1) for i, alpha in enumerate(space.relup_alphas)}
    _require_within(limits)


def _check_tuned_set(d: DatasetConfig, allow_test: bool) -> None:
    """Nobody chooses settings on the set that is reported, by accident."""
    if d.kind == "descriptors":
        raise InputError("dataset=descriptors: the pooling is tuned on feature maps, so photos are needed")
    if d.kind == "folder" and not d.labels:
        raise InputError(
            "dataset=folder: tuning needs to know what is right: dataset.labels=true, a sub-folder a place"
        )
    if d.kind == "gldv2_recognition":
        raise InputError(f"{d.name}: pooling is tuned by average precision per query, which recognition does not have")
    if d.role == "train":
        raise InputError(
            f"{d.name}: its role is train, and settings chosen on photos that the network saw fit no others"
        )
    if d.name in _BENCHMARKS and d.role != "test":
        raise InputError(f"dataset.role={d.role}: {d.name} is what others report their numbers on; its role is test")
    if d.role == "test" and not allow_test:
        raise InputError(
            f"{d.name}: its role is test. Tuning on a test set makes its numbers worthless, for these settings were "
            "then chosen to make them high. Tune on a training's held-out landmarks (name=RUN without dataset=) or on "
            "photos of your own (dataset=folder dataset.labels=true); allow_test=true does it all the same, and marks "
            "every result"
        )


def _check_evaluation_ranges(config: EvalConfig) -> None:
    _require_within(
        {
            "k": (config.k, 1, math.inf),
            "statistics.dims": (config.statistics.dims, 1, math.inf),
            "trainer.num_workers": (config.trainer.num_workers, 0, math.inf),
            "pictures.queries": (config.pictures.queries, 0, math.inf),
            "pictures.ranks": (config.pictures.ranks, 1, math.inf),
            "seed": (config.seed, 0, 2**63 - 1),
        }
    )
    _require_choice("statistics.kind", config.statistics.kind, STATISTICS)
    if config.statistics.dims is not None and config.statistics.kind != "whiten":
        raise InputError(f"statistics.dims={config.statistics.dims}: only statistics=whiten has axes")
    complete_rerank(config.rerank)


def complete_rerank(rerank: RerankConfig) -> None:
    """Put the kind's defaults where nothing is given.

    Raises:
        InputError: a parameter that the kind does not take, or one out of range.
    """
    for key, value in completed(rerank.kind, rerank_parameters(rerank)).items():
        setattr(rerank, key, value)
    _require_within(
        {
            **{f"rerank.{key}": (getattr(rerank, key), 1, math.inf) for key in ("M", "K", "k1", "k2", "kq", "kd")},
            **{f"rerank.{key}": (getattr(rerank, key), 0, math.inf) for key in ("k_query", "n")},
            "rerank.beta": (rerank.beta, -1e6, 1e6),
            "rerank.lambda_": (rerank.lambda_, 0, 1),
            "rerank.alpha": (rerank.alpha, 0, 0.9999 if rerank.kind == "diffusion" else 1e3),
            "rerank.gamma": (rerank.gamma, 1e-3, 1e3),
        }
    )
    _require_choice("rerank.junk", rerank.junk, JUNK)
    if rerank.junk == "drop" and rerank.kind in SEARCH_AGAIN:
        raise InputError(f"rerank.junk=drop: {rerank.kind} searches the whole database again and has no shortlist")
    if rerank.second is not None:
        _require_choice("rerank.second", rerank.second, SECOND)


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
    if config.rerank.enabled and config.rerank.kind != "superglobal":
        raise InputError(
            f"ablation={config.ablation} means the paper's reranking; drop it, or rerank={config.rerank.kind}"
        )
