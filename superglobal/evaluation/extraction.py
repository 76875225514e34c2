"""Extract the descriptors that are missing from the stores of an evaluation."""

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
from superglobal.evaluation.module import ExtractionList, ExtractionModule, skip_rows
from superglobal.models.inference import optimize_for_inference
from superglobal.models.network import RetrievalNetwork
from superglobal.retrieval.store import DescriptorStore
from superglobal.retrieval.store_files import fingerprint, record_paths
from superglobal.retrieval.store_tools import reuse_rows
from superglobal.training.trainer import launched_externally, translate_process_error
from superglobal.utils.provenance import versions

log = logging.getLogger(__name__)
# Estimated memory of a ResNet's float32 activations, in bytes per pixel of the scaled image. If a network needs more
# memory, the GPU runs out of memory once, and the extraction continues with smaller batches.
_BYTES_PER_PIXEL = 600
_MEMORY_FRACTION = 0.5  # fraction of the GPU memory that a batch may use
_CPU_BATCH_PIXELS = 2**20


def extract_lists(
    networks: Sequence[RetrievalNetwork],
    lists: Sequence[ExtractionList],
    folder: Path,
    trainer: pl.Trainer,
    settings: ExtractionConfig,
    num_workers: int,
    dtype: str,
) -> tuple[list[DescriptorStore], dict[str, int]]:
    """Open the store of each image list under `folder`, and extract all missing descriptors in one pass.

    Descriptors of the same images, network and settings are first copied to a new store from other stores under
    `folder`. If an image is added to a data set, for example, only this image is extracted.

    Args:
        networks: networks on the CPU. The stores of all networks are filled. Only the stores of the first network are
            returned.
        lists: checked image lists.
        folder: parent folder of the stores.
        trainer: runs the extraction.
        settings: section `extraction` of the configuration.
        num_workers: number of processes that decode images.
        dtype: dtype of the stores, "float32" or "float16".

    Returns:
        The stores of the first network, one per image list; and a dict from the title of each image list to the number
        of its descriptors that were missing before the extraction. The stores are still incomplete if other shards have
        images to extract.

    Raises:
        InputError: an image is unreadable, a store cannot be written, or a process died. Finished rows are kept for the
            next run.
    """
    device = trainer.strategy.root_device
    image_lists = [images.files() for images in lists]
    check_decoder = cache(partial(check_gpu_decoder, image_lists, device)) if settings.decoder == "gpu" else None
    stores = [
        [_open_store(network, images, folder, str(device), dtype, check_decoder) for images in lists]
        for network in networks
    ]
    for i, images in enumerate(lists):
        for network_stores in stores:
            _skip_unreadable(network_stores[i], images, trainer.is_global_zero)
        if trainer.is_global_zero:
            paths = images.paths()
            for network_stores in stores:
                if os.access(network_stores[i].folder, os.W_OK):  # A complete store of another user may be read-only.
                    record_paths(network_stores[i].folder, paths)
    # A sweep job whose own stores are complete extracts nothing for the other jobs. If it did, and if the extraction
    # for one of the jobs failed, every job would attempt that extraction again.
    open_stores = stores if any(len(store.missing) for store in stores[0]) else []
    missing = [
        {row for network_stores in open_stores for row in network_stores[i].missing.tolist()} for i in range(len(lists))
    ]
    for images, rows in zip(lists, missing, strict=True):
        total = len(images.items)
        log.info("%s: %d images, %d in store, %d to extract", images.title, total, total - len(rows), len(rows))
    # Processes that torchrun or SLURM started together may find that different rows are missing. Every process must
    # take part in the extraction, even if it finds no row missing, because the processes wait for each other.
    if any(missing) or launched_externally():
        if check_decoder is not None:
            check_decoder()
        _extract_missing(networks, stores, lists, missing, trainer, settings, num_workers)
    for images, store in zip(lists, stores[0], strict=True):
        _require_few_corrupt(store, images)
    return stores[0], {images.title: len(rows) for images, rows in zip(lists, missing, strict=True)}


def _extract_missing(
    networks: Sequence[RetrievalNetwork],
    stores: Sequence[list[DescriptorStore]],
    lists: Sequence[ExtractionList],
    missing: Sequence[set[int]],
    trainer: pl.Trainer,
    settings: ExtractionConfig,
    num_workers: int,
) -> None:
    """Divide the missing images into batches, and extract the batches that are assigned to this process.

    If the extraction is split into shards, only the images of this run's shard are divided among its processes.

    Args:
        networks: networks on the CPU.
        stores: for each network, one store per image list.
        lists: image lists.
        missing: for each image list, the indices of the images to extract.
        trainer: runs the extraction.
        settings: section `extraction` of the configuration.
        num_workers: number of processes that decode images.
    """
    if len(networks) > 1:
        log.info("extracting descriptors of %d networks of the sweep in one pass over the images", len(networks))
    sizes = [images.sizes() for images in lists]
    pixels = settings.batch_pixels or _default_batch_pixels(networks[0], trainer.strategy.root_device)
    process = trainer.global_rank, trainer.world_size
    plan = plan_batches(sizes, pixels, settings.batch_size, settings.parse_shard(), process)
    # Lightning ends early in a process without data. A process without missing rows therefore extracts one image, even
    # if the descriptor of this image is already in the store.
    batches = select_missing(plan, missing) or plan_batches(sizes, 0, 1)[-1:]
    image_lists = [images.files() for images in lists]
    data = ExtractionDataModule(image_lists, batches, num_workers, settings.decoder)
    module = ExtractionModule(*_group_by_backbone(optimize_for_inference(networks), stores), lists, batches)
    run_extraction(trainer, module, data, [store for network_stores in stores for store in network_stores])
    if data.decoded_on_cpu:
        log.warning("GPU JPEG decoder: %d images were decoded on the CPU instead", data.decoded_on_cpu)


def run_extraction(
    trainer: pl.Trainer, module: ExtractionModule, data: ExtractionDataModule, stores: Sequence[DescriptorStore]
) -> None:
    """Extract all batches in all processes, and flush finished descriptors to disk even after an error.

    Args:
        trainer: runs the extraction.
        module: extracts the batches and writes the descriptors to the stores.
        data: loads the images of the batches.
        stores: all stores to flush.

    Raises:
        InputError: an image is unreadable, a store cannot be written, or a process died.
    """
    try:
        try:
            trainer.predict(module, data, return_predictions=False)
        finally:
            try:
                module.drain()
            finally:  # `drain` raises an error if the GPU has failed.
                for failure in dict.fromkeys(module.failures):  # The error that ends the run does not contain them.
                    log.warning("%s", failure)
                for store in stores:
                    store.flush()
        trainer.strategy.barrier()
    except SystemExit as end:
        if end.code == 1:  # Lightning exits with this status after Ctrl-C.
            log.error("interrupted; run the same command to resume with the missing images")
            sys.exit(130)
        raise
    except RuntimeError as error:
        input_error = translate_process_error(error, trainer.world_size, "evaluation", "with the missing images")
        if input_error is None:
            raise
        raise input_error from error


def _skip_unreadable(store: DescriptorStore, images: ExtractionList, writes: bool) -> None:
    """Mark the rows of unreadable images as skipped, if the image list allows skipping.

    Args:
        store: store of the image list.
        images: checked image list.
        writes: whether this process may write to the store; True in the first process only.

    Raises:
        InputError: more images are unreadable than `images.max_corrupt_fraction` allows, or the store has skipped
            images although the image list allows none.
    """
    if images.max_corrupt_fraction is None:
        if len(store.skipped):
            raise InputError(
                f"{store.folder}: {len(store.skipped)} images were skipped by a run with distractors.unreadable=skip; "
                f"repair those in {store.folder / 'skipped.txt'} and remove the store, or use "
                "distractors.unreadable=skip here too"
            )
        return
    reasons = dict(images.checked.problems)
    rows = [row for row, item in enumerate(images.items) if item.path in reasons]
    if len(rows) <= images.max_corrupt_fraction * len(images.items) and writes:
        skip_rows([store], images, [(row, reasons[images.items[row].path]) for row in rows])
        store.flush()
    _require_few_corrupt(store, images, len(rows))


def _require_few_corrupt(store: DescriptorStore, images: ExtractionList, unreadable: int = 0) -> None:
    """Check that no more images are unreadable or skipped than `images.max_corrupt_fraction` allows.

    Args:
        store: store of the image list; its skipped rows are counted.
        images: image list.
        unreadable: number of images in the list that were found unreadable.
    """
    count, total = max(unreadable, len(store.skipped)), len(images.items)
    if count > (images.max_corrupt_fraction or 0) * total:
        raise InputError(
            f"{count} of {total} {images.title} are missing or unreadable, more than "
            f"distractors.max_corrupt_fraction={images.max_corrupt_fraction:g} allows: check that the "
            f"download is complete, or raise the fraction; skipped images are listed in {store.folder / 'skipped.txt'}"
        )


def _group_by_backbone(
    networks: Sequence[RetrievalNetwork], stores: Sequence[list[DescriptorStore]]
) -> tuple[list[list[RetrievalNetwork]], list[list[list[DescriptorStore]]]]:
    """Group networks that share one backbone, so that the backbone processes each image only once.

    Args:
        networks: networks; some of them may share the same backbone object.
        stores: for each network, one store per image list.

    Returns:
        The groups of networks; and the stores of the same networks, grouped in the same way.
    """
    groups: dict[int, list[int]] = {}
    for i, network in enumerate(networks):
        groups.setdefault(id(network.backbone), []).append(i)
    return (
        [[networks[i] for i in group] for group in groups.values()],
        [[stores[i] for i in group] for group in groups.values()],
    )


def _default_batch_pixels(network: RetrievalNetwork, device: torch.device) -> int:
    """Estimate the maximum number of pixels per batch for which the batch fits in memory.

    Pixels are counted in the input images, before the network scales them. The estimate assumes that the network
    processes the images at its largest scale.
    """
    if device.type != "cuda":
        return _CPU_BATCH_PIXELS
    memory = torch.cuda.get_device_properties(device).total_memory * _MEMORY_FRACTION
    width = 4 if network.precision == "float32" else 2
    return int(memory / (_BYTES_PER_PIXEL * width / 4 * max(network.scales) ** 2))


def store_identity(network: RetrievalNetwork, max_side: int | None, decoder: str) -> dict[str, Any]:
    """Return all settings that affect a stored descriptor, by name.

    Args:
        network: network that extracts the descriptors.
        max_side: longer side in pixels to which larger images are shrunk; None for no limit.
        decoder: JPEG decoder, "cpu" or "gpu". The returned settings contain it only if it is not "cpu".
    """
    return {**network.identity(), "max_side": max_side, **({} if decoder == "cpu" else {"decoder": decoder})}


def _open_store(
    network: RetrievalNetwork,
    images: ExtractionList,
    folder: Path,
    device: str,
    dtype: str,
    check_decoder: Callable[[], dict[str, Any]] | None,
) -> DescriptorStore:
    """Open the store of an image list, or create it.

    A new store records the device, package versions, weights and data set. Descriptors of the same images, network and
    settings are copied to it from other stores under `folder`.

    Args:
        network: network that extracts the descriptors.
        images: checked image list.
        folder: parent folder of the stores.
        device: device of the extraction, recorded as provenance.
        dtype: dtype of the store, "float32" or "float16".
        check_decoder: function that checks the GPU JPEG decoder and returns its differences from the CPU decoder, which
            a new store records; None to decode on the CPU.
    """
    identity = store_identity(network, images.max_side, "cpu" if check_decoder is None else "gpu")
    lines = images.lines()
    path = folder / f"{images.name}-{images.title}-{fingerprint(identity, lines, dtype)[:16]}"
    is_new = not path.exists()
    # The search page reads "weights" and "dataset", so that it can open the store without further settings.
    weights = Path(network.weights_label)
    provenance = {
        "device": device,
        "versions": versions(),
        "weights": str(weights.resolve()) if weights.is_file() else network.weights_label,
        "dataset": images.source,
        "images": images.title,
    }
    if check_decoder is not None and is_new:
        provenance["decoder"] = check_decoder()
    store = DescriptorStore.open_or_create(path, identity, lines, network.dim, provenance=provenance, dtype=dtype)
    if is_new:
        reuse_rows(folder, store)
    return store
