"""The search page of a data set or a store: what it needs is opened, described where it is missing, and served."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf

from superglobal.config.common import validate_config
from superglobal.config.evaluation import DatasetConfig, StoreConfig, rerank_parameters
from superglobal.config.tuning import DemoConfig
from superglobal.data.evaluation_set import EvaluationSet, LazySequence, chain_sequences
from superglobal.data.images import ImageItem
from superglobal.errors import InputError
from superglobal.evaluation.extraction import extract_lists, store_identity
from superglobal.evaluation.first_stage import configured_index
from superglobal.evaluation.inputs import (
    Clock,
    attempt,
    checked_lists,
    distractor_items,
    evaluated_network,
    evaluation_set,
)
from superglobal.evaluation.module import ExtractionList
from superglobal.evaluation.pipeline import search_device
from superglobal.models.inference import optimize_for_inference
from superglobal.models.network import RetrievalNetwork
from superglobal.retrieval.rows import Rows, concat
from superglobal.retrieval.store import DescriptorStore
from superglobal.retrieval.whitening import stored_statistics
from superglobal.search_page.image_search import FirstStage, Opened, PhotoSearch
from superglobal.training.trainer import make_trainer

log = logging.getLogger(__name__)


def serve(cfg: DictConfig) -> None:
    """Open what is configured and serve its page until it is ended.

    Args:
        cfg: composed `DemoConfig`.

    Raises:
        InputError: anything missing, unreadable or contradicting, or an address that is taken.
    """
    from superglobal.search_page.server import listening, run_server

    config, folder = configured(cfg)
    # Before minutes of work: what will be wanted then.
    with listening(config.page.host, config.page.port) as socket:
        run_server(config, open_database(config, folder), socket)


def configured(cfg: DictConfig) -> tuple[DemoConfig, Path | None]:
    """The checked configuration, and the folder of the store if it was one that was given.

    Raises:
        InputError: a setting that is none, or a store that does not say enough.
    """
    folder = None if OmegaConf.is_config(cfg.store) else Path(str(cfg.store))
    return validate_config(cfg if folder is None else _as_stored(cfg, folder), DemoConfig), folder


def open_database(config: DemoConfig, folder: Path | None = None) -> Opened:
    """The database to search, described where it is missing, as `eval.py` does it and into the same stores.

    Args:
        config: `dataset` may be a folder of photos without queries or labels.
        folder: of the store that is to be searched, which then is to be complete.

    Raises:
        InputError: anything missing, all of it in one message, or a store of other photos, settings or weights.
    """
    clock, problems = Clock(), list[str]()
    config = replace(config, dataset=_searchable(config))
    dataset = attempt(problems, lambda one: evaluation_set(one.dataset), config)
    distractors = attempt(problems, distractor_items, config) or []
    network = attempt(problems, evaluated_network, config)
    lists = checked_lists(config, dataset, distractors, problems, clock, queries=False)
    assert dataset is not None
    assert network is not None
    if folder is None:
        trainer = make_trainer(config.trainer, logger=False, enable_checkpointing=False, inference_mode=True)
        place, workers = Path(config.paths.stores), config.trainer.num_workers
        stores, _ = extract_lists([network], lists, place, trainer, config.extraction, workers, config.store.dtype)
    else:
        stores = [_same_store(folder, network, lists)]
    return _opened(config, dataset, distractors, network, stores)


def _searchable(config: DemoConfig) -> DatasetConfig:
    """The data set; a folder of photos alone is its own queries."""
    d = config.dataset
    alone = d.kind == "folder" and d.query is None and not d.labels
    return replace(d, query=d.database) if alone else d  # type: ignore[call-arg]


def _opened(
    config: DemoConfig,
    dataset: EvaluationSet,
    distractors: list[ImageItem],
    network: RetrievalNetwork,
    stores: list[DescriptorStore],
) -> Opened:
    device = search_device(config)
    rows = concat(*stores, name="database")
    s, statistics = config.whitening, None
    if s.kind != "none":
        prints = [store.fingerprint() for store in stores]
        statistics, _ = stored_statistics(rows, s.kind, s.dims, Path(config.paths.stores), prints)
        rows = statistics.apply(rows, "database")
    images = chain_sequences(dataset.database, distractors)
    names = partial(_shown_name, dataset.root / "jpg" if config.dataset.kind == "revisited" else dataset.root)
    (fast,) = optimize_for_inference([network])
    values = rerank_parameters(config.rerank)
    search = PhotoSearch(
        network=fast.to(device),
        database=rows,
        images=images,
        names=LazySequence(len(images), lambda number: names(images[number])),
        max_side=config.dataset.max_side,
        device=device,
        kind=config.rerank.kind,
        fixed={key: value for key, value in values.items() if key not in ("M", "K", "beta")},
        statistics=statistics,
        first=_indexed(config, rows, device),
        max_pixels=config.page.max_megapixels * 10**6,
    )
    d = config.dataset
    themselves = dataset.leave_one_out or (d.kind == "folder" and d.query == d.database)
    queries: Sequence[ImageItem] = [] if themselves else dataset.queries
    name = dataset.root.resolve().name if d.kind == "folder" and d.name == "folder" else dataset.name
    return Opened(name, search, queries, LazySequence(len(queries), lambda number: names(queries[number])))


def _shown_name(root: Path, item: ImageItem) -> str:
    """Below `root`, or else the file's name alone: where a data set lies is nobody's business."""
    return item.path.relative_to(root).as_posix() if item.path.is_relative_to(root) else item.path.name


def _indexed(config: DemoConfig, rows: Rows, device: str) -> FirstStage | None:
    """The search by `config.index`; None for the exact one."""
    if config.index.kind == "flat":
        return None
    index = configured_index(config, rows, device)
    find: Callable[..., tuple[np.ndarray, np.ndarray]] = index.search
    return lambda q, k, exclude: find(q, k, exclude=exclude)


def _as_stored(cfg: DictConfig, folder: Path) -> DictConfig:
    """The configuration with everything in it that changed the descriptors of the store in `folder`.

    Raises:
        InputError: no store, one of other images than a database, or one that does not say what its photos are.
    """
    store = DescriptorStore.open(folder)
    identity, record = store.manifest["identity"], store.manifest.get("provenance", {})
    if record.get("images", "database") != "database":
        raise InputError(f"{folder}: a store of {record['images']}; give the one of the database beside it")
    given = OmegaConf.to_container(cfg.dataset)
    assert isinstance(given, dict)
    chosen = given["kind"] != "???"
    weights = cfg.weights or (cfg.backbone.get("weights") if cfg.backbone else None) or record.get("weights")
    lacks = [what for what, there in (("photos", chosen or record.get("dataset")), ("weights", weights)) if not there]
    if lacks:
        raise InputError(
            f"{folder}: this store does not say where its {' and '.join(lacks)} are; say it beside store=: "
            "dataset=... and weights=... (or backbone=...) as eval.py had them"
        )
    known = {key: value for key, value in (record.get("dataset") or {}).items() if key in given}
    # The queries of an own folder may be anywhere, or gone; the page needs none.
    dataset = given if chosen else {**known, **({"query": None, "labels": False} if known["kind"] == "folder" else {})}
    decoder = identity.get("decoder", "cpu")
    if cfg.extraction.decoder not in ("cpu", decoder):  # "cpu" is the default: it need not be a request
        raise InputError(
            f"extraction.decoder={cfg.extraction.decoder}: {folder} was extracted with extraction.decoder={decoder}; "
            "leave out extraction.decoder or store="
        )
    # GeM's p comes with the weights; `_same_store` looks whether it is the same.
    pooling = {key: value for key, value in identity["pooling"].items() if key != "p"}
    return OmegaConf.merge(
        cfg,
        {
            "dataset": {**dataset, "max_side": identity["max_side"]},
            "weights": weights,
            "backbone": {"name": identity["backbone"]},
            "pooling": pooling,
            "scales": identity["scales"],
            "antialias": identity["antialias"],
            "extraction": {"precision": identity["precision"], "decoder": decoder},
        },
        {"store": OmegaConf.structured(StoreConfig(store.manifest["dtype"]))},
    )  # type: ignore[return-value]


def _same_store(folder: Path, network: RetrievalNetwork, lists: list[ExtractionList]) -> DescriptorStore:
    """The complete store in `folder`, of these weights, settings and photos."""
    store = DescriptorStore.open(folder)
    stored = store.manifest["identity"]
    if network.config.p != stored["pooling"]["p"]:  # it was given beside the weights
        network.set_p(stored["pooling"]["p"])
    own = json.loads(json.dumps(store_identity(network, lists[0].max_side, stored.get("decoder", "cpu"))))
    differ = [key for key in stored if own.get(key) != stored[key]]
    if differ:
        raise InputError(
            f"{folder}: its descriptors are of other {', '.join(differ)} than weights={network.weights_label} give; "
            "name those it was made with (random ones with their seed=), or leave store= out"
        )
    if len(lists) > 1:
        raise InputError(f"store={folder} is a database alone; leave store= out to search distractors too")
    if store.names != lists[0].lines():
        raise InputError(
            f"{folder}: its photos are not those that are there now; leave store= out, and what is new or changed is "
            f"described: dataset=... of {lists[0].name}"
        )
    if len(store.missing):
        raise InputError(
            f"{folder}: {len(store.missing)} of {len(store)} descriptors are missing; leave store= out, and the page "
            "describes them first"
        )
    return store
