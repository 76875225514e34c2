"""Stores of an evaluation's images: opened, and filled where rows are missing."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from superglobal.config.evaluation import ExtractionConfig
from superglobal.data.datamodules import ExtractionDataModule
from superglobal.data.jpeg_decoding import check_gpu_decoder
from superglobal.data.samplers import plan_batches, select_missing
from superglobal.errors import InputError
from superglobal.evaluation.module import EvaluationModule, ExtractionList, skip_rows
from superglobal.models.inference import optimize_for_inference
from superglobal.models.network import RetrievalNetwork
from superglobal.retrieval.store import DescriptorStore
from superglobal.retrieval.store_files import fingerprint, record_paths
from superglobal.retrieval.store_tools import adopt_from
from superglobal.training.trainer import launched_externally, translate_process_error
from superglobal.utils.provenance import versions

log = logging.getLogger(__name__)
# Activations of a ResNet in float32 while a scale is computed, in bytes a pixel of that scale. A network that needs
# more runs out of memory once, and goes on with less at a time.
_BYTES_PER_PIXEL = 600
_SHARE_OF_MEMORY = 0.5
_PIXELS_ON_CPU = 2**20


def extract_lists(
    networks: Sequence[RetrievalNetwork],
    lists: Sequence[ExtractionList],
    folder: Path,
    trainer: pl.Trainer,
    how: ExtractionConfig,
    num_workers: int,
    dtype: str,
) -> tuple[list[DescriptorStore], dict[str, int]]:
    """Open the stores of each list under `folder` and extract the rows that are missing, in one pass over the images.

    Rows of the same images that another store under `folder` has, of the same network and settings, are copied:
    a photo more in a folder costs one description.

    Args:
        networks: on the CPU; all are filled, the stores of the first are what is asked for.
        dtype: of the stores.

    Returns:
        The stores of the first network, complete unless `how.shard` is one of several, and how many rows each title
        lacked.

    Raises:
        InputError: an unreadable image, a place that cannot be written or a process that died; finished rows stay for
            the next run.
    """
    device = trainer.strategy.root_device
    image_lists = [(part.items, part.max_side) for part in lists]
    check_decoder = cache(partial(check_gpu_decoder, image_lists, device)) if how.decoder == "gpu" else None
    stores = [
        [_open_store(network, part, folder, str(device), dtype, check_decoder) for part in lists]
        for network in networks
    ]
    for i, part in enumerate(lists):
        for own in stores:
            _settle_unreadable(own[i], part, trainer.is_global_zero)
        if trainer.is_global_zero:
            paths = part.paths()
            for own in stores:
                if os.access(own[i].folder, os.W_OK):  # somebody else's may be complete as it is
                    record_paths(own[i].folder, paths)
    # A sibling of a sweep that fails would be tried again by every job: one that lacks nothing describes for nobody.
    served = stores if any(len(store.missing) for store in stores[0]) else []
    missing = [{row for own in served for row in own[i].missing.tolist()} for i in range(len(lists))]
    lacked = {part.title: len(rows) for part, rows in zip(lists, missing, strict=True)}
    for part in lists:
        total, todo = len(part.items), lacked[part.title]
        log.info("%s: %d images, %d in store, %d to describe", part.title, total, total - todo, todo)
    # Processes that were started together may not agree on what is missing, and have to wait for one another.
    if any(missing) or launched_externally():
        if check_decoder is not None:
            check_decoder()
        if len(networks) > 1:
            log.info("one pass over the images serves %d networks of the sweep", len(networks))
        pixels = how.batch_pixels or _pixels_at_once(networks[0], device)
        sizes = [part.sizes() for part in lists]
        rank = trainer.global_rank, trainer.world_size
        plan = plan_batches(sizes, pixels, how.batch_size, how.parse_shard(), rank)
        # Lightning stops on a process without data; a row described twice is the same row.
        batches = select_missing(plan, missing) or plan_batches(sizes, 0, 1)[-1:]
        images = ExtractionDataModule(image_lists, batches, num_workers, how.decoder)
        module = EvaluationModule(*_grouped(optimize_for_inference(networks), stores), lists, batches)
        _describe(trainer, module, images, [store for own in stores for store in own])
        if images.decoded_on_cpu:
            log.warning("GPU JPEG decoder: %d images were decoded on the CPU instead", images.decoded_on_cpu)
    for part, store in zip(lists, stores[0], strict=True):
        _require_budget(store, part)
    return stores[0], lacked


def _describe(
    trainer: pl.Trainer, module: EvaluationModule, images: ExtractionDataModule, stores: Sequence[DescriptorStore]
) -> None:
    """Fill the stores, whatever is finished being kept, in all processes.

    Raises:
        InputError: as of `extract_lists`.
    """
    try:
        try:
            trainer.predict(module, images, return_predictions=False)
        finally:
            try:
                module.drain()
            finally:  # a GPU that failed cannot deliver its last batch
                for failure in dict.fromkeys(module.failures):  # not part of the error that ended the run
                    log.warning("%s", failure)
                for store in stores:
                    store.flush()
        trainer.strategy.barrier()
    except SystemExit as end:
        if end.code == 1:  # Lightning's answer to Ctrl-C
            log.error("interrupted; the same command goes on with what is missing")
            sys.exit(130)
        raise
    except RuntimeError as error:
        told = translate_process_error(error, trainer.world_size, "evaluation", "with what is missing")
        if told is None:
            raise
        raise told from error


def _settle_unreadable(store: DescriptorStore, part: ExtractionList, writes: bool) -> None:
    """Skip what checking the images has found already; refuse what another run has skipped where nothing may be."""
    if part.skips is None:
        if len(store.skipped):
            raise InputError(
                f"{store.folder}: {len(store.skipped)} images were skipped by a run with distractors.unreadable=skip; "
                f"mend those in {store.folder / 'skipped.txt'} and remove the store, or skip them here too"
            )
        return
    reasons = dict(part.checked.problems)
    bad = [row for row, item in enumerate(part.items) if item.path in reasons]
    if len(bad) <= part.skips * len(part.items) and writes:
        skip_rows([store], part, [(row, reasons[part.items[row].path]) for row in bad])
        store.flush()
    _require_budget(store, part, len(bad))


def _require_budget(store: DescriptorStore, part: ExtractionList, found: int = 0) -> None:
    count, most = max(found, len(store.skipped)), (part.skips or 0) * len(part.items)
    if count > most:
        raise InputError(
            f"{count} of {len(part.items)} {part.title} are missing or cannot be read, more than "
            f"distractors.skip_budget={part.skips:g} allows: is all of it there? Otherwise raise that; skipped are in "
            f"{store.folder / 'skipped.txt'}"
        )


def _grouped(
    networks: Sequence[RetrievalNetwork], stores: Sequence[list[DescriptorStore]]
) -> tuple[list[list[RetrievalNetwork]], list[list[list[DescriptorStore]]]]:
    """Networks that share a backbone together, and their stores alike."""
    groups: dict[int, list[int]] = {}
    for i, network in enumerate(networks):
        groups.setdefault(id(network.backbone), []).append(i)
    places = list(groups.values())
    return [[networks[i] for i in group] for group in places], [[stores[i] for i in group] for group in places]


def _pixels_at_once(network: RetrievalNetwork, device: torch.device) -> int:
    """Pixels of a batch that memory should have room for at the network's largest scale."""
    if device.type != "cuda":
        return _PIXELS_ON_CPU
    room = torch.cuda.get_device_properties(device).total_memory * _SHARE_OF_MEMORY
    width = 4 if network.precision == "float32" else 2
    return int(room / (_BYTES_PER_PIXEL * width / 4 * max(network.scales) ** 2))


def store_identity(network: RetrievalNetwork, max_side: int | None, decoder: str) -> dict[str, Any]:
    """Return everything but the images that changes a stored descriptor; the CPU decoder is not mentioned."""
    return {**network.identity(), "max_side": max_side, **({} if decoder == "cpu" else {"decoder": decoder})}


def _open_store(
    network: RetrievalNetwork,
    part: ExtractionList,
    folder: Path,
    device: str,
    dtype: str,
    check_decoder: Callable[[], dict[str, Any]] | None,
) -> DescriptorStore:
    """Open or create the store of a list; a new one records what `check_decoder` returns, if that is given."""
    identity = store_identity(network, part.max_side, "cpu" if check_decoder is None else "gpu")
    lines = part.lines()
    place = folder / f"{part.name}-{part.title}-{fingerprint(identity, lines, dtype)[:16]}"
    fresh = not place.exists()
    # Enough to find the weights and the photos again, from the store alone.
    weights = Path(network.weights_label)
    found = str(weights.resolve()) if weights.is_file() else network.weights_label
    origin: dict[str, Any] = {"weights": found, "dataset": part.source, "images": part.title}
    provenance = {"device": device, "versions": versions(), **origin}
    if check_decoder is not None and fresh:
        provenance["decoder"] = check_decoder()
    store = DescriptorStore.open_or_create(place, identity, lines, network.dim, provenance=provenance, dtype=dtype)
    if fresh:
        adopt_from(folder, store)
    return store
