"""Extraction under Lightning: each image's descriptor into its row of a store, by any number of processes."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from superglobal.data.datamodules import LoadedBatch
from superglobal.data.image_checks import CheckReport
from superglobal.data.images import ImageItem, shrunk_size
from superglobal.data.samplers import ImageBatch
from superglobal.errors import InputError
from superglobal.models.network import RetrievalNetwork, forward_variants
from superglobal.retrieval.store import DescriptorStore
from superglobal.utils.distributed import in_main_thread
from superglobal.utils.precision import full_precision

log = logging.getLogger(__name__)
_NEWS_EVERY = 30.0  # seconds
# Devices that compute asynchronously: their descriptors are written while they compute the next batch.
_ASYNCHRONOUS = ("cuda",)


@dataclass(frozen=True)
class ExtractionList:
    """Images that share a store: title ("database", ...), set name, images, what checking them found, their limit.

    One with `skips` is complete without images that cannot be read, up to that share of them. `roots` are the folders
    that their paths are told from. `source`: the data set's settings, which a store keeps for the record.
    """

    title: str
    name: str
    items: Sequence[ImageItem]
    checked: CheckReport
    max_side: int | None
    skips: float | None = None
    roots: Sequence[Path] = ()
    source: dict[str, Any] | None = None

    def lines(self) -> list[str]:
        """One line per row for the fingerprint: file name, box and content, but not where the folder lies."""
        return [
            f"{item.path.name} {item.box or ''} {signature}"
            for item, signature in zip(self.items, self.checked.signatures, strict=True)
        ]

    def paths(self) -> list[str]:
        """A name of each image for people and databases: its path below the first of the roots that it lies under.

        Behind it stands the box of a crop, `a.jpg#12,30,540,400`, and a number where a list has the same once more.
        """
        roots = [os.path.join(os.path.abspath(root), "") for root in self.roots]
        counts: Counter[str] = Counter()
        found: dict[str, None] = {}
        for item in self.items:
            path = os.path.abspath(item.path)
            below = next((path[len(root) :] for root in roots if path.startswith(root)), path)
            name = os.fsencode(below).decode(errors="backslashreplace")
            if item.box is not None:
                name += "#" + ",".join(f"{value:g}" for value in item.box)
            unique = name
            while unique in found:  # an image may itself be called a.jpg#2
                counts[name] += 1
                unique = f"{name}#{counts[name] + 1}"
            found[unique] = None
        return list(found)

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of what is described, in pixels."""
        return [shrunk_size(size, self.max_side) for size in self.checked.sizes]


@dataclass(frozen=True)
class _Computed:
    """Descriptors of one batch by one group of networks, perhaps still on their way to the host.

    Attributes:
        number: of the image list.
        rows: (B,) of the images in it.
        descriptors: per network (B, D) on the host, valid once `copied` has happened.
        stores: of the group.
        has_own: whether the first of them is this run's.
        copied: CUDA event behind the copies; None where they are complete.
    """

    number: int
    rows: list[int]
    descriptors: list[Tensor]
    stores: Sequence[Sequence[DescriptorStore]]
    has_own: bool
    copied: torch.cuda.Event | None


class EvaluationModule(pl.LightningModule):
    """Describes batches of images by one or several networks and writes each descriptor into its row of its store.

    Args:
        networks: in evaluation mode, in groups that share their maps (`forward_variants`).
        stores: by group and network, one per image list.
        lists: the image lists, to name an image that fails.
        batches: all that this process will see, for the news of how far it is.
    """

    def __init__(
        self,
        networks: Sequence[Sequence[RetrievalNetwork]],
        stores: Sequence[Sequence[Sequence[DescriptorStore]]],
        lists: Sequence[ExtractionList],
        batches: Sequence[ImageBatch],
    ) -> None:
        super().__init__()
        self.groups = networks
        self.all = nn.ModuleList(network for group in networks for network in group)  # so that they move together
        self.stores = stores
        self.lists = lists
        self.failures: list[str] = []
        self.computed: list[_Computed] = []  # not written yet
        self.most = math.inf  # pixels that memory has room for at once
        self.pixels = sum(len(batch.rows) * batch.size[0] * batch.size[1] for batch in batches)
        self.done, self.images = 0, 0
        self.began = self.told = time.monotonic()

    def predict_step(self, batch: list[LoadedBatch], batch_idx: int) -> int:
        """Compute the descriptors of one batch and write them; return how many images are done.

        On a GPU the descriptors of the batch before are written instead, while the GPU computes these.

        An image that fails is told at the end, to all processes: one that stopped alone would leave the others
        waiting. Alone, a process stops at once. Finished rows stay either way.
        """
        for number, rows, images, faults in batch:
            for row, fault, lasting in faults:
                if lasting and self.lists[number].skips is not None:
                    skip_rows(self._stores_of(number), self.lists[number], [(row, fault)])
                else:
                    self.failures.append(fault)
            with full_precision():
                for place, (group, stores) in enumerate(zip(self.groups, self.stores, strict=True)):
                    if rows:
                        descriptors, copied = _to_host(self._described(group, images))
                        self.computed.append(_Computed(number, rows, descriptors, stores, place == 0, copied))
                        self.drain(keep=int(images.device.type in _ASYNCHRONOUS))
            self._tell(len(rows), images.shape[-2:].numel() * len(rows))
        if self.failures and self.trainer.world_size == 1:
            self.raise_failures()
        return self.images

    def drain(self, keep: int = 0) -> None:
        """Write all descriptors that were computed, except those of the last `keep` launches."""
        while len(self.computed) > keep:
            self._write(self.computed[0])
            del self.computed[0]  # only now: an interrupted write is repeated

    def _described(self, group: Sequence[RetrievalNetwork], images: Tensor) -> list[Tensor]:
        """(B, D) per network, in as many parts as memory asks for.

        Raises:
            InputError: there is no room for a single image.
        """
        count, area = len(images), images.shape[-2:].numel()
        step = max(1, min(count, int(min(self.most, count * area) // area)))
        try:
            parts = [forward_variants(group, images[i : i + step]) for i in range(0, count, step)]
            return [torch.cat(found) for found in zip(*parts, strict=True)]
        except torch.OutOfMemoryError as error:
            if step == 1:
                size = f"{images.shape[-1]} x {images.shape[-2]}"
                raise InputError(
                    f"out of GPU memory with one image of {size} px: set dataset.max_side, or fewer scales"
                ) from error
            self.most = step // 2 * area
        log.info("out of GPU memory with %d images of %d pixels: %d at once from now on", step, area, step // 2)
        torch.cuda.empty_cache()
        return self._described(group, images)

    def _write(self, batch: _Computed) -> None:
        """Write the descriptors of a batch into the stores of its group.

        Only a failure in the store of this run is recorded: the run of another store finds its rows missing.
        """
        if batch.copied is not None:
            batch.copied.synchronize()
        for place, (found, own) in enumerate(zip(batch.descriptors, batch.stores, strict=True)):
            try:
                own[batch.number].write_rows(np.array(batch.rows), found.numpy())
            except InputError as error:
                if place or not batch.has_own:
                    continue
                self.failures.append(f"{self.lists[batch.number].items[batch.rows[0]].path} or of its batch: {error}")

    def _stores_of(self, number: int) -> list[DescriptorStore]:
        return [own[number] for group in self.stores for own in group]

    def _tell(self, images: int, pixels: int) -> None:
        self.images += images
        self.done += pixels
        now = time.monotonic()
        if self.done and now - self.told > _NEWS_EVERY:  # nothing is, where the first images cannot be read
            self.told = now
            left = (now - self.began) / self.done * (self.pixels - self.done)
            speed = self.images / (now - self.began)
            log.info("%d images described, %.1f images/s, about %.0f min left", self.images, speed, left / 60)

    def on_predict_start(self) -> None:
        """Let SIGTERM end the run, finished rows flushed: Lightning's handler only takes note of it here."""
        if in_main_thread():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    def on_predict_end(self) -> None:
        self.drain()
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
        self.failures = []
        if failures:
            raise InputError("\n".join(dict.fromkeys(failures)))


def _to_host(descriptors: Sequence[Tensor]) -> tuple[list[Tensor], torch.cuda.Event | None]:
    """Return host copies of descriptors, and for CUDA tensors the event that tells when the copies are complete."""
    if descriptors[0].device.type != "cuda":
        return [x.cpu() for x in descriptors], None
    copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in descriptors]
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(descriptors[0].device))
    return copies, copied


def skip_rows(stores: Sequence[DescriptorStore], part: ExtractionList, faults: Sequence[tuple[int, str]]) -> None:
    """Make rows of stores complete without a descriptor, and name the images and why in `skipped.txt` of each store.

    Args:
        stores: of these images.
        part: the images.
        faults: (row, why its image cannot be read).
    """
    if not faults:
        return
    for store in stores:
        done = store.done
        left = [(row, reason) for row, reason in faults if not done[row]]
        notes = [f"{part.items[row].path}\t{' '.join(reason.split())}" for row, reason in left]
        store.skip(np.array([row for row, _ in left], np.int64), notes)
