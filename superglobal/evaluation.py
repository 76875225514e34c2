"""Extraction under Lightning: each image's descriptor into its row of a store, by any number of processes."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor

from superglobal.data.datamodules import ExtractionDataModule, Task
from superglobal.data.images import ImageItem
from superglobal.errors import InputError
from superglobal.models.network import RetrievalNetwork
from superglobal.precision import full_precision
from superglobal.retrieval.report import versions
from superglobal.retrieval.store import DescriptorStore, fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExtractionList:
    """Images that share a store: title ("database", ...), set name, images and their content signatures."""

    title: str
    name: str
    items: Sequence[ImageItem]
    signatures: Sequence[str]
    max_side: int | None

    def lines(self) -> list[str]:
        """One line per row for the fingerprint: file name, box and content, but not where the folder lies."""
        return [
            f"{item.path.name} {item.box or ''} {signature}"
            for item, signature in zip(self.items, self.signatures, strict=True)
        ]


class EvaluationModule(pl.LightningModule):
    """Describes images and writes each into its row of its list's store.

    Args:
        network: in evaluation mode.
        stores: one per image list.
        lists: the image lists, to name an image that fails.
    """

    def __init__(
        self, network: RetrievalNetwork, stores: Sequence[DescriptorStore], lists: Sequence[ExtractionList]
    ) -> None:
        super().__init__()
        self.network = network
        self.stores = stores
        self.lists = lists
        self.failures: list[str] = []

    def predict_step(self, batch: tuple[Task, Tensor | InputError], batch_idx: int) -> Task:
        """Write the descriptor of one image and say which.

        An image that fails is told at the end, to all processes: one that stopped alone would leave the others
        waiting. Alone, a process stops at once. Finished rows stay either way.
        """
        (number, row), image = batch
        try:
            if isinstance(image, InputError):
                raise image
            with full_precision():
                descriptor = self.network(image[None])[0].cpu().numpy()
            self.stores[number].write(row, descriptor)
        except InputError as error:
            path = self.lists[number].items[row].path
            self.failures.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            if self.trainer.world_size == 1:
                self.raise_failures()
        return number, row

    def on_predict_start(self) -> None:
        """Let SIGTERM end the run, finished rows flushed: Lightning's handler only takes note of it here."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    def on_predict_end(self) -> None:
        self.raise_failures()

    def raise_failures(self) -> None:
        """
        Raises:
            InputError: in every process, the images that failed in any.
        """
        failures = self.failures
        if self.trainer.world_size > 1:
            gathered: list[list[str]] = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(gathered, self.failures)
            failures = [failure for part in gathered for failure in part]
        if failures:
            raise InputError("\n".join(failures))


def extract_lists(
    network: RetrievalNetwork,
    lists: Sequence[ExtractionList],
    folder: Path,
    trainer: pl.Trainer,
    num_workers: int,
    dtype: str = "float32",
) -> tuple[list[DescriptorStore], dict[str, int]]:
    """Open the store of each list under `folder` and extract the rows that are missing.

    Rows of the same images that another store under `folder` has, of the same network and settings, are copied:
    a photo more in a folder costs one description.

    Returns:
        The complete stores, and how many rows each title had to compute.

    Raises:
        InputError: an unreadable image or a place that cannot be written; finished rows stay for the next run.
    """
    stores = [_open_store(network, part, folder, str(trainer.strategy.root_device), dtype) for part in lists]
    computed = {part.title: len(store.missing) for part, store in zip(lists, stores, strict=True)}
    for part, store in zip(lists, stores, strict=True):
        todo = computed[part.title]
        log.info("%s: %d images, %d in store, %d to describe", part.title, len(store), len(store) - todo, todo)
    tasks = [(number, int(row)) for number, store in enumerate(stores) for row in store.missing]
    if tasks:
        images = ExtractionDataModule([(part.items, part.max_side) for part in lists], tasks, num_workers)
        try:
            trainer.predict(EvaluationModule(network, stores, lists), images, return_predictions=False)
        finally:
            for store in stores:
                store.flush()
        trainer.strategy.barrier()
        network.cpu()
    return stores, computed


def _open_store(
    network: RetrievalNetwork, part: ExtractionList, folder: Path, device: str, dtype: str
) -> DescriptorStore:
    identity = {**network.identity(), "max_side": part.max_side}
    lines = part.lines()
    place = folder / f"{part.name}-{part.title}-{fingerprint(identity, lines, dtype)[:16]}"
    fresh = not place.exists()
    provenance = {"device": device, "versions": versions()}
    store = DescriptorStore.open_or_create(place, identity, lines, network.dim, provenance=provenance, dtype=dtype)
    for other in sorted(folder.glob("*/manifest.json")) if fresh else ():
        if other.parent != place and len(store.missing) and DescriptorStore.identity_in(other.parent) == identity:
            store.adopt(DescriptorStore.open(other.parent))
    return store
