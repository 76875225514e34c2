"""Extraction under Lightning: each image's descriptor into its row of a store, by any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from superglobal.data.datamodules import extraction_loader
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
    """Describes images and writes them to their stores; one data loader per store.

    Args:
        network: in evaluation mode.
        stores: in the order of the data loaders.
        lists: the image lists of the stores, to name an image that fails.
    """

    def __init__(
        self, network: RetrievalNetwork, stores: Sequence[DescriptorStore], lists: Sequence[ExtractionList]
    ) -> None:
        super().__init__()
        self.network = network
        self.stores = stores
        self.lists = lists

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        row, image = batch
        return row, image.to(device, non_blocking=True) if isinstance(image, Tensor) else image

    def predict_step(self, batch: tuple[int, Tensor | InputError], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Write the descriptor of one image into its row.

        Raises:
            InputError: the image cannot be read, or its descriptor is not finite; finished rows stay.
        """
        row, image = batch
        if isinstance(image, InputError):
            raise image
        with full_precision():
            descriptor = self.network(image[None])[0].cpu().numpy()
        try:
            self.stores[dataloader_idx].write(row, descriptor)
        except InputError as error:
            raise InputError(f"{self.lists[dataloader_idx].items[row].path}: {error}") from error

    def on_predict_end(self) -> None:
        self.flush()

    def flush(self) -> None:
        """Mark what was written as done."""
        for store in self.stores:
            store.flush()


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
    todo = [(part, store) for part, store in zip(lists, stores, strict=True) if len(store.missing)]
    if todo:
        module = EvaluationModule(network, [store for _, store in todo], [part for part, _ in todo])
        loaders = [extraction_loader(p.items, s.missing, p.max_side, num_workers) for p, s in todo]
        try:
            trainer.predict(module, loaders, return_predictions=False)
        finally:
            module.flush()
        trainer.strategy.barrier()
        network.cpu()
    return stores, computed
