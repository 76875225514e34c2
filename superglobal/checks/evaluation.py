"""Settings of an evaluation."""

from __future__ import annotations

import importlib.util
import math

from superglobal.checks.limits import TABLES, require_choice, require_within
from superglobal.checks.trackers import check_logger
from superglobal.config import (
    DatasetConfig,
    EvalConfig,
    ExtractionConfig,
    IndexConfig,
    RerankConfig,
    rerank_parameters,
)
from superglobal.errors import InputError
from superglobal.models.fast import PRECISIONS, resolve_precision
from superglobal.models.network import make_scales
from superglobal.models.pooling import relup_mode
from superglobal.reporting.runs import LADDER, SWITCHES
from superglobal.retrieval.index_plan import KINDS, TAKEN, require_taken
from superglobal.retrieval.landmark_scoring import VOTES
from superglobal.retrieval.rerank import SECOND
from superglobal.retrieval.rerankers import JUNK, SEARCH_AGAIN, completed
from superglobal.retrieval.search import BACKENDS
from superglobal.retrieval.statistics import KINDS as STATISTICS
from superglobal.retrieval.store_files import DTYPES

_KINDS = ("revisited", "folder", "descriptors", "gldv2", "gldv2_val", "gldv2_recognition")
_ROLES = ("train", "validation", "test")


def check_evaluation(config: EvalConfig) -> None:
    """Raise InputError for what `eval.py` and those like it could not do as told; complete what is left to defaults."""
    d, own = config.dataset, config.descriptors
    check_dataset(d)
    _check_index(config.index)
    require_choice("store.dtype", config.store.dtype, DTYPES)
    if (own.query is None) != (own.database is None):
        raise InputError("descriptors.query and descriptors.database go together: give both .npy files")
    if d.kind == "descriptors" and own.query is None:
        raise InputError("dataset=descriptors needs descriptors.query=Q.npy descriptors.database=X.npy")
    if d.kind == "descriptors" and config.distractors.name is not None:
        raise InputError("dataset=descriptors knows no images: put distractors into descriptors.database")
    if d.kind.startswith("gldv2") and config.distractors.name is not None:
        raise InputError(f"{d.name}: distractors={config.distractors.name}: GLDv2's sets have none; distractors=none")
    require_choice("distractors.unreadable", config.distractors.unreadable, ("error", "skip"))
    require_within({"distractors.skip_budget": (config.distractors.skip_budget, 0, 1)})
    _check_extraction(config.extraction, config.trainer.accelerator)
    _check_evaluation_ranges(config)
    _check_reranking(config)
    _check_ablation(config)
    if config.scales is not None:
        make_scales(config.scales)


def _check_reranking(config: EvalConfig) -> None:
    """Reranking beside the data set and the index."""
    d = config.dataset
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


def _check_extraction(how: ExtractionConfig, accelerator: str) -> None:
    """Check choices and ranges; replace the precision "auto" by what it stands for, which results and stores record."""
    require_choice("extraction.precision", how.precision, ("auto", *PRECISIONS))
    require_choice("extraction.decoder", how.decoder, ("cpu", "gpu"))
    how.precision = resolve_precision(how.precision, accelerator)
    require_within(
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
    """Choices and ranges; puts the kind's default of compare where nothing is given."""
    require_choice("index.kind", index.kind, ("flat", *KINDS))
    given = {key: value for key, value in vars(index).items() if key != "kind" and value not in (None, "auto")}
    if index.compare == 0:  # as a result has it, which is checked again where it is opened
        del given["compare"]
    require_taken(index.kind, given, ("backend",) if index.kind == "flat" else (*TAKEN[index.kind], "compare"))
    index.compare = (0 if index.kind == "flat" else 100) if index.compare is None else index.compare
    require_choice("index.backend", index.backend, BACKENDS)
    if (index.kind != "flat" or index.backend == "faiss") and importlib.util.find_spec("faiss") is None:
        raise InputError(
            f"index.kind={index.kind} index.backend={index.backend}: FAISS is not installed; pip install faiss-cpu (or "
            "faiss-gpu), or index=flat"
        )
    numbers = ("nlist", "nprobe", "pq_m", "ef_construction", "ef_search", "candidates")
    require_within({f"index.{name}": (getattr(index, name), 1, 2**31 - 1) for name in numbers})
    require_within({"index.M": (index.M, 2, 2048), "index.compare": (index.compare, 0, math.inf)})


def check_dataset(d: DatasetConfig) -> None:
    """Raise InputError for a set that cannot be."""
    require_choice("dataset.kind", d.kind, _KINDS)
    require_choice("dataset.role", d.role, _ROLES)
    if d.kind == "folder" and not d.database:
        raise InputError("dataset=folder: dataset.database=FOLDER is missing")
    require_choice("dataset.table", d.table, TABLES)
    require_choice("dataset.votes", d.votes, VOTES)
    require_within(
        {
            "dataset.max_side": (d.max_side, 1, math.inf),
            "dataset.landmarks": (d.landmarks, 1, math.inf),
            "dataset.seed": (d.seed, 0, 2**32 - 1),
            "dataset.neighbours": (d.neighbours, 1, math.inf),
        }
    )


def _check_evaluation_ranges(config: EvalConfig) -> None:
    require_within(
        {
            "k": (config.k, 1, math.inf),
            "statistics.dims": (config.statistics.dims, 1, math.inf),
            "trainer.num_workers": (config.trainer.num_workers, 0, math.inf),
            "pictures.queries": (config.pictures.queries, 0, math.inf),
            "pictures.ranks": (config.pictures.ranks, 1, math.inf),
            "seed": (config.seed, 0, 2**63 - 1),
        }
    )
    check_logger(config.logger)
    require_choice("statistics.kind", config.statistics.kind, STATISTICS)
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
    require_within(
        {
            **{f"rerank.{key}": (getattr(rerank, key), 1, math.inf) for key in ("M", "K", "k1", "k2", "kq", "kd")},
            **{f"rerank.{key}": (getattr(rerank, key), 0, math.inf) for key in ("k_query", "n")},
            "rerank.beta": (rerank.beta, -1e6, 1e6),
            "rerank.lambda_": (rerank.lambda_, 0, 1),
            "rerank.alpha": (rerank.alpha, 0, 0.9999 if rerank.kind == "diffusion" else 1e3),
            "rerank.gamma": (rerank.gamma, 1e-3, 1e3),
        }
    )
    require_choice("rerank.junk", rerank.junk, JUNK)
    if rerank.junk == "drop" and rerank.kind in SEARCH_AGAIN:
        raise InputError(f"rerank.junk=drop: {rerank.kind} searches the whole database again and has no shortlist")
    if rerank.second is not None:
        require_choice("rerank.second", rerank.second, SECOND)


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
