"""Open the database of the search page, extract missing descriptors, and serve the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from superglobal.config.common import validate_config
from superglobal.config.evaluation import StoreConfig, rerank_parameters
from superglobal.config.search_page import ServeConfig
from superglobal.data.evaluation_set import EvaluationSet
from superglobal.data.images import ImageItem
from superglobal.data.lazy_sequence import LazySequence, chain_sequences
from superglobal.errors import InputError, first_line, printable
from superglobal.evaluation.extraction import extract_lists, store_identity
from superglobal.evaluation.inputs import StageTimer, leave_out_unreadable, load_sources
from superglobal.evaluation.module import ExtractionList
from superglobal.evaluation.pipeline import open_configured_index, search_device
from superglobal.models.inference import optimize_for_inference
from superglobal.models.network import RetrievalNetwork
from superglobal.retrieval.rows import Rows, concat
from superglobal.retrieval.store import DescriptorStore
from superglobal.retrieval.whitening import stored_whitening
from superglobal.search_page.image_search import FirstStage, ImageSearch, SearchDatabase
from superglobal.training.trainer import make_trainer

# types of the settings in the identity of a store that the page uses
_IDENTITY = {
    "backbone": str,
    "pooling": dict,
    "scales": list,
    "antialias": bool,
    "precision": str,
    "max_side": int | None,
}


def serve(cfg: DictConfig) -> None:
    """Open the configured database and serve its page until Ctrl-C or SIGTERM.

    Args:
        cfg: composed `ServeConfig`.

    Raises:
        InputError: inputs or settings are missing, invalid or contradict each other, the address is in use, or there is
            no private folder for uploads.
    """
    from superglobal.search_page.server import open_socket, run_server, upload_folder

    config, folder = read_config(cfg)
    # Errors of the address and of the folder for uploads appear at once, not after minutes of extraction.
    with open_socket(config.page.host, config.page.port) as listener, upload_folder() as uploads:
        database = leave_out_unreadable(partial(open_database, config, folder), config.paths.stores)
        run_server(config, database, listener, uploads)


def read_config(cfg: DictConfig) -> tuple[ServeConfig, Path | None]:
    """Validate the configuration of the page.

    If the user has set `store` to the folder of a descriptor store, the extraction settings are read from that store.
    So are the data set and the weights, unless the user has set them.

    Args:
        cfg: composed `ServeConfig`.

    Returns:
        The validated configuration; and the folder of the store, or None if the user has not set `store` to a folder.

    Raises:
        InputError: a setting is invalid, or the store lacks information that is needed to search it.
    """
    folder = None if OmegaConf.is_config(cfg.store) else Path(str(cfg.store))
    return validate_config(cfg if folder is None else _with_settings_of_store(cfg, folder), ServeConfig), folder


def open_database(config: ServeConfig, folder: Path | None = None) -> SearchDatabase:
    """Open the database to search, and extract missing descriptors into the same stores as `eval.py`.

    Args:
        config: settings of the page. With dataset=folder, neither queries nor labels are needed, in contrast to
            `eval.py`.
        folder: folder of a complete store, which is searched without extracting anything. If None, the stores of the
            data set are searched, after the missing descriptors have been extracted.

    Raises:
        InputError: inputs are missing (one message lists all of them), or the store is incomplete or belongs to other
            images, settings or weights.
    """
    d = config.dataset
    if d.kind == "folder" and d.query is None and not d.labels:
        config = replace(config, dataset=replace(d, query=d.database))  # type: ignore[call-arg]
    if folder is not None:
        config = replace(config, paths=replace(config.paths, stores=str(folder.parent)))
    dataset, distractors, network, lists = load_sources(config, StageTimer(), queries=False)
    if folder is None:
        trainer = make_trainer(config.trainer, logger=False, enable_checkpointing=False, inference_mode=True)
        parent, workers = Path(config.paths.stores), config.trainer.num_workers
        stores, _ = extract_lists([network], lists, parent, trainer, config.extraction, workers, config.store.dtype)
    else:
        stores = [_open_store(folder, network, lists)]
    signatures = [signature for images in lists for signature in images.checked.signatures]
    return _make_database(config, dataset, distractors, network, stores, signatures)


def _make_database(
    config: ServeConfig,
    dataset: EvaluationSet,
    distractors: list[ImageItem],
    network: RetrievalNetwork,
    stores: list[DescriptorStore],
    signatures: Sequence[str],
) -> SearchDatabase:
    """Create the database of the page from stores of descriptors. If whitening is configured, whiten the descriptors.

    Args:
        config: settings of the page.
        dataset: data set with the database images and the example queries.
        distractors: distractor images. In the database, they follow the images of the data set.
        network: network that extracts the descriptors of the queries.
        stores: stores of the database images and, if there are any, of the distractors.
        signatures: `file_signature` of each image of the stores.
    """
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
        signatures=signatures,
    )
    is_own_queries = dataset.leave_one_out or (d.kind == "folder" and d.query == d.database)
    queries: Sequence[ImageItem] = [] if is_own_queries else dataset.queries
    name = printable(dataset.root.resolve().name) if d.kind == "folder" and d.name == "folder" else dataset.name
    return SearchDatabase(name, search, queries, LazySequence(len(queries), lambda number: name_of(queries[number])))


def _shown_name(root: Path, item: ImageItem) -> str:
    """Return the name under which the page shows an image.

    The name is the path of the image relative to the folder `root`. For an image outside this folder, it is only the
    file name, so that the page does not reveal other folders of the machine.
    """
    return printable(item.path.relative_to(root).as_posix() if item.path.is_relative_to(root) else item.path.name)


def _index_search(config: ServeConfig, rows: Rows, device: str) -> FirstStage:
    """Return a function that searches the database with the configured approximate index.

    Args:
        config: settings of the page.
        rows: (N, D) database descriptors.
        device: device on which the index is built and searched.
    """
    index = open_configured_index(config, rows, device)

    def search(q: np.ndarray, k: int, exclude: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        return index.search(q, k, exclude=exclude)

    return search


def _with_settings_of_store(cfg: DictConfig, folder: Path) -> DictConfig:
    """Return the configuration with the data set, weights and extraction settings that a store records.

    If the user has set a data set or weights, these are kept.

    Args:
        cfg: configuration of the page.
        folder: folder of the store.

    Raises:
        InputError: the folder contains no store, the store is not of database images, or it does not record its images,
            weights or settings.
    """
    store = DescriptorStore.open(folder)
    identity, record = _recorded_settings(store)
    if record.get("images", "database") != "database":
        raise InputError(
            f"{folder}: the store contains {record['images']}; expected database images, so set store= to the "
            "store of the database, which is in the same parent folder"
        )
    given = OmegaConf.to_container(cfg.dataset)
    assert isinstance(given, dict)
    is_given = given["kind"] != "???"
    weights = cfg.weights or (cfg.backbone.get("weights") if cfg.backbone else None) or record.get("weights")
    needed = {"images": is_given or record.get("dataset"), "weights": weights}
    missing = [name for name, value in needed.items() if not value]
    if missing:
        raise InputError(
            f"{folder}: the store does not record its {' and '.join(missing)}; add the dataset=... and weights=... (or "
            "backbone=...) with which eval.py extracted it"
        )
    dataset = given
    if not is_given:
        dataset = {key: value for key, value in (record.get("dataset") or {}).items() if key in given}
        if dataset.get("kind") == "folder":
            dataset |= {
                "query": None,
                "labels": False,
            }  # The page does not need the query images, which may have been deleted since the extraction.
    decoder = identity.get("decoder", "cpu")
    if cfg.extraction.decoder not in ("cpu", decoder):  # "cpu" is the default, which the user may not have chosen.
        raise InputError(
            f"extraction.decoder={cfg.extraction.decoder}: {folder} was extracted with extraction.decoder={decoder}; "
            "leave out extraction.decoder or store="
        )
    # The exponent p of GeM is left out, because the network first reads p from the weights. `_open_store` then replaces
    # it with the p with which the store was extracted.
    pooling = {key: value for key, value in identity["pooling"].items() if key != "p"}
    settings = {
        "dataset": {**dataset, "max_side": identity["max_side"]},
        "weights": weights,
        "backbone": {"name": identity["backbone"]},
        "pooling": pooling,
        "scales": identity["scales"],
        "antialias": identity["antialias"],
        "extraction": {"precision": identity["precision"], "decoder": decoder},
    }
    stored_as = {"store": OmegaConf.structured(StoreConfig(store.manifest["dtype"]))}
    try:
        return OmegaConf.merge(cfg, settings, stored_as)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise InputError(
            f"{folder / 'manifest.json'} is damaged ({first_line(error)}); give a store that eval.py extracted"
        ) from error


def _recorded_settings(store: DescriptorStore) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the identity and the provenance of a store.

    Raises:
        InputError: they are not those of descriptors that eval.py extracted. A program can write other stores.
    """
    identity, record = store.manifest["identity"], store.manifest.get("provenance", {})
    invalid = [key for key, kind in _IDENTITY.items() if not isinstance(identity.get(key, ...), kind)]
    if not invalid and not isinstance(identity["pooling"].get("p"), float):
        invalid = ["pooling.p"]
    if not isinstance(record, dict) or not isinstance(record.get("dataset") or {}, dict):
        invalid.append("provenance")
    if invalid:
        raise InputError(
            f"{store.folder}: the store does not record how to extract the descriptor of a query (invalid or missing: "
            f"{', '.join(invalid)}); give a store that eval.py extracted"
        )
    return identity, record


def _open_store(folder: Path, network: RetrievalNetwork, lists: list[ExtractionList]) -> DescriptorStore:
    """Open the store in `folder`, and check that it is complete and belongs to the network and the images.

    If the exponent p of GeM in the store differs from that in the weights, the network is set to the p of the store.

    Raises:
        InputError: the store is missing or incomplete, or belongs to another network or other images.
    """
    store = DescriptorStore.open(folder)
    stored = store.manifest["identity"]
    if network.config.p != stored["pooling"]["p"]:
        network.set_p(stored["pooling"]["p"])
    identity = json.loads(json.dumps(store_identity(network, lists[0].max_side, stored.get("decoder", "cpu"))))
    different = [key for key in stored if identity.get(key) != stored[key]]
    if different:
        raise InputError(
            f"{folder}: weights={network.weights_label} do not match the store in {', '.join(different)}; give the "
            "weights with which the store was extracted (and their seed= if they are random), or leave out store="
        )
    if len(lists) > 1:
        raise InputError(
            f"store={folder}: the store contains no distractors; leave out store= to search distractors, too"
        )
    if store.names != lists[0].lines():
        raise InputError(
            f"{folder}: the images of {lists[0].name} have changed since the extraction; leave out store= and give "
            "dataset=... to extract new and changed images"
        )
    if len(store.missing):
        raise InputError(
            f"{folder}: {len(store.missing)} of {len(store)} descriptors are missing; leave out store= to extract them"
        )
    return store
