"""Open the database of the search page, extract what is missing, and serve the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf

from superglobal.config.common import validate_config
from superglobal.config.evaluation import StoreConfig, rerank_parameters
from superglobal.config.search_page import ServeConfig
from superglobal.data.evaluation_set import EvaluationSet
from superglobal.data.images import ImageItem
from superglobal.data.lazy_sequence import LazySequence, chain_sequences
from superglobal.errors import InputError
from superglobal.evaluation.extraction import extract_lists, store_identity
from superglobal.evaluation.inputs import StageTimer, load_sources
from superglobal.evaluation.module import ExtractionList
from superglobal.evaluation.pipeline import open_configured_index, search_device
from superglobal.models.inference import optimize_for_inference
from superglobal.models.network import RetrievalNetwork
from superglobal.retrieval.rows import Rows, concat
from superglobal.retrieval.store import DescriptorStore
from superglobal.retrieval.whitening import stored_whitening
from superglobal.search_page.image_search import FirstStage, ImageSearch, SearchDatabase
from superglobal.training.trainer import make_trainer


def serve(cfg: DictConfig) -> None:
    """Open the configured database and serve its page until Ctrl-C or SIGTERM.

    Args:
        cfg: composed `ServeConfig`.

    Raises:
        InputError: input or settings are missing, invalid or contradict each other, or the address is taken.
    """
    from superglobal.search_page.server import open_socket, run_server

    config, folder = read_config(cfg)
    # Listen first, so that a taken address is reported before minutes of extraction.
    with open_socket(config.page.host, config.page.port) as listener:
        run_server(config, open_database(config, folder), listener)


def read_config(cfg: DictConfig) -> tuple[ServeConfig, Path | None]:
    """Return the validated configuration and, if `store` is a folder, that folder.

    Raises:
        InputError: an invalid setting, or a store that does not record what is needed.
    """
    folder = None if OmegaConf.is_config(cfg.store) else Path(str(cfg.store))
    return validate_config(cfg if folder is None else _with_settings_of_store(cfg, folder), ServeConfig), folder


def open_database(config: ServeConfig, folder: Path | None = None) -> SearchDatabase:
    """Open the database to search; missing descriptors are extracted into the same stores as by `eval.py`.

    Args:
        config: `dataset` may be a folder of images without queries or labels.
        folder: folder of a complete store to search instead; None for the stores of the data set.

    Raises:
        InputError: input is missing (one message names all of it), or the store has other images, settings or weights.
    """
    d = config.dataset
    if d.kind == "folder" and d.query is None and not d.labels:
        config = replace(config, dataset=replace(d, query=d.database))  # type: ignore[call-arg]
    dataset, distractors, network, lists = load_sources(config, StageTimer(), queries=False)
    if folder is None:
        trainer = make_trainer(config.trainer, logger=False, enable_checkpointing=False, inference_mode=True)
        parent, workers = Path(config.paths.stores), config.trainer.num_workers
        stores, _ = extract_lists([network], lists, parent, trainer, config.extraction, workers, config.store.dtype)
    else:
        stores = [_open_store(folder, network, lists)]
    return _make_database(config, dataset, distractors, network, stores)


def _make_database(
    config: ServeConfig,
    dataset: EvaluationSet,
    distractors: list[ImageItem],
    network: RetrievalNetwork,
    stores: list[DescriptorStore],
) -> SearchDatabase:
    device, d, s = search_device(config), config.dataset, config.whitening
    rows, whitening = concat(*stores, name="database"), None
    if s.kind != "none":
        fingerprints = [store.fingerprint() for store in stores]
        whitening, _ = stored_whitening(rows, s.kind, s.dims, Path(config.paths.stores), fingerprints)
        rows = whitening.transform_rows(rows, "database")
    images = chain_sequences(dataset.database, distractors)
    name_of = partial(_shown_name, dataset.root / "jpg" if d.kind == "revisited" else dataset.root)
    (fast,) = optimize_for_inference([network])
    search = ImageSearch(
        network=fast.to(device),
        database=rows,
        images=images,
        names=LazySequence(len(images), lambda number: name_of(images[number])),
        max_side=d.max_side,
        device=device,
        kind=config.rerank.kind,
        parameters={k: v for k, v in rerank_parameters(config.rerank).items() if k not in ("M", "K", "beta")},
        whitening=whitening,
        first_stage=None if config.index.kind == "flat" else _index_search(config, rows, device),
        max_pixels=config.page.max_megapixels * 10**6,
    )
    is_own_queries = dataset.leave_one_out or (d.kind == "folder" and d.query == d.database)
    queries: Sequence[ImageItem] = [] if is_own_queries else dataset.queries
    name = dataset.root.resolve().name if d.kind == "folder" and d.name == "folder" else dataset.name
    return SearchDatabase(name, search, queries, LazySequence(len(queries), lambda number: name_of(queries[number])))


def _shown_name(root: Path, item: ImageItem) -> str:
    """Return the path below `root`, or only the file name, so that the page shows no path of this machine."""
    return item.path.relative_to(root).as_posix() if item.path.is_relative_to(root) else item.path.name


def _index_search(config: ServeConfig, rows: Rows, device: str) -> FirstStage:
    index = open_configured_index(config, rows, device)

    def search(q: np.ndarray, k: int, exclude: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        return index.search(q, k, exclude=exclude)

    return search


def _with_settings_of_store(cfg: DictConfig, folder: Path) -> DictConfig:
    """Return the configuration with all settings that changed the descriptors of the store in `folder`.

    Raises:
        InputError: no store, a store of other images than a database, or one that does not record its images.
    """
    store = DescriptorStore.open(folder)
    identity, record = store.manifest["identity"], store.manifest.get("provenance", {})
    if record.get("images", "database") != "database":
        raise InputError(f"{folder}: a store of {record['images']}; give that of the database beside it")
    given = OmegaConf.to_container(cfg.dataset)
    assert isinstance(given, dict)
    is_given = given["kind"] != "???"
    weights = cfg.weights or (cfg.backbone.get("weights") if cfg.backbone else None) or record.get("weights")
    needed = {"images": is_given or record.get("dataset"), "weights": weights}
    missing = [name for name, value in needed.items() if not value]
    if missing:
        raise InputError(
            f"{folder}: this store does not record its {' and '.join(missing)}; add dataset=... and weights=... (or "
            "backbone=...) as given to eval.py"
        )
    dataset = given
    if not is_given:
        dataset = {key: value for key, value in (record.get("dataset") or {}).items() if key in given}
        if dataset["kind"] == "folder":
            dataset |= {"query": None, "labels": False}  # The queries may be gone, and the page does not need them.
    decoder = identity.get("decoder", "cpu")
    if cfg.extraction.decoder not in ("cpu", decoder):  # "cpu" is the default, and not a request.
        raise InputError(
            f"extraction.decoder={cfg.extraction.decoder}: {folder} was extracted with extraction.decoder={decoder}; "
            "leave out extraction.decoder or store="
        )
    # GeM's p comes with the weights; `_open_store` compares it.
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


def _open_store(folder: Path, network: RetrievalNetwork, lists: list[ExtractionList]) -> DescriptorStore:
    """Open the store in `folder`; raises InputError unless it is complete, of this network and of these images."""
    store = DescriptorStore.open(folder)
    stored = store.manifest["identity"]
    if network.config.p != stored["pooling"]["p"]:  # It was set when the descriptors were extracted.
        network.set_p(stored["pooling"]["p"])
    own = json.loads(json.dumps(store_identity(network, lists[0].max_side, stored.get("decoder", "cpu"))))
    different = [key for key in stored if own.get(key) != stored[key]]
    if different:
        raise InputError(
            f"{folder}: weights={network.weights_label} do not match the store in {', '.join(different)}; give the "
            "weights that it was extracted with (and seed= of random ones), or leave out store="
        )
    if len(lists) > 1:
        raise InputError(f"store={folder} is a database without distractors; leave out store= to search them too")
    if store.names != lists[0].lines():
        raise InputError(
            f"{folder}: the images of {lists[0].name} have changed since; leave out store= and give dataset=... to "
            "extract what is new or changed"
        )
    if len(store.missing):
        raise InputError(
            f"{folder}: {len(store.missing)} of {len(store)} descriptors are missing; leave out store= to extract them"
        )
    return store
