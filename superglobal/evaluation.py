"""Extraction under Lightning: each image's descriptor into its row of a store, by any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
from torch import Tensor

from superglobal.data.datamodules import ExtractionDataModule, Task
from superglobal.data.images import ImageItem
from superglobal.errors import InputError
from superglobal.models.network import RetrievalNetwork
from superglobal.precision import full_precision
from superglobal.retrieval.store import DescriptorStore, fingerprint


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

    def predict_step(self, batch: tuple[Task, Tensor | InputError], batch_idx: int) -> Task:
        """Write the descriptor of one image and say which.

        Raises:
            InputError: the image cannot be read, or its descriptor is not finite; finished rows stay.
        """
        (number, row), image = batch
        if isinstance(image, InputError):
            raise image
        with full_precision():
            descriptor = self.network(image[None])[0].cpu().numpy()
        try:
            self.stores[number].write(row, descriptor)
        except InputError as error:
            raise InputError(f"{self.lists[number].items[row].path}: {error}") from error
        return number, row


def extract_lists(
    network: RetrievalNetwork,
    lists: Sequence[ExtractionList],
    folder: Path,
    trainer: pl.Trainer,
    num_workers: int,
) -> tuple[list[DescriptorStore], dict[str, int]]:
    """Open the store of each list under `folder` and extract the rows that are missing.

    Returns:
        The complete stores, and how many rows each title had to compute.

    Raises:
        InputError: an unreadable image or a place that cannot be written; finished rows stay for the next run.
    """
    stores = []
    identity = network.identity()
    for part in lists:
        about = {**identity, "max_side": part.max_side}
        name = f"{part.name}-{part.title}-{fingerprint(about, part.lines())[:16]}"
        stores.append(DescriptorStore.open_or_create(folder / name, about, part.lines(), network.dim))
    computed = {part.title: len(store.missing) for part, store in zip(lists, stores, strict=True)}
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
