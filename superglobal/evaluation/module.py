"""Extraction by Lightning: one or several processes write the descriptor of each image into its row of a store."""

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
_REPORT_INTERVAL = 30.0  # seconds
# These devices compute asynchronously, so descriptors are written while the next batch is computed.
_ASYNCHRONOUS = ("cuda",)


@dataclass(frozen=True)
class ExtractionList:
    """Images that have their descriptors in the same store."""

    title: str  # "database", "queries" or "distractors"
    name: str  # name of the data set
    items: Sequence[ImageItem]
    checked: CheckReport  # result of the check of these images
    max_side: int | None  # longer side in pixels to which larger images are shrunk; None to keep the size
    max_corrupt_fraction: float | None = None  # largest fraction of unreadable images, in 0..1; None to allow none
    roots: Sequence[Path] = ()  # recorded paths are relative to the first of these folders that contains the image
    source: dict[str, Any] | None = None  # settings of the data set, recorded in the store

    def lines(self) -> list[str]:
        """Return one line per row for the fingerprint: file name, box and content, without the folder."""
        return [
            f"{item.path.name} {item.box or ''} {signature}"
            for item, signature in zip(self.items, self.checked.signatures, strict=True)
        ]

    def paths(self) -> list[str]:
        """Return a unique name of each image: its path relative to one of `roots`.

        The box of a crop is appended, as in `a.jpg#12,30,540,400`. A number is appended to repeated names.
        """
        roots = [os.path.join(os.path.abspath(root), "") for root in self.roots]
        counts: Counter[str] = Counter()
        names: dict[str, None] = {}
        for item in self.items:
            path = os.path.abspath(item.path)
            relative = next((path[len(root) :] for root in roots if path.startswith(root)), path)
            name = os.fsencode(relative).decode(errors="backslashreplace")
            if item.box is not None:
                name += "#" + ",".join(f"{value:g}" for value in item.box)
            unique = name
            while unique in names:  # the name of a file may end with #2, too
                counts[name] += 1
                unique = f"{name}#{counts[name] + 1}"
            names[unique] = None
        return list(names)

    def sizes(self) -> list[tuple[int, int]]:
        """Return (height, width) of each image after shrinking, in pixels."""
        return [shrunk_size(size, self.max_side) for size in self.checked.sizes]


@dataclass(frozen=True)
class _PendingBatch:
    """Descriptors of one batch by one group of networks that are not written yet."""

    list_index: int  # index of the image list
    rows: list[int]  # (B,) rows of the images in the list
    descriptors: list[Tensor]  # for each network (B, D) on the host, valid after the event `copied`
    stores: Sequence[Sequence[DescriptorStore]]  # for each network, one store per image list
    is_first_group: bool  # true if the first network of the group is the network of this run
    copied: torch.cuda.Event | None  # recorded after the copies; None if they are complete


class ExtractionModule(pl.LightningModule):
    """Extract batches of images with one or several networks and write each descriptor into its row of a store.

    Args:
        networks: networks in evaluation mode, in groups that share their feature maps (`forward_variants`).
        stores: for each group and network, one store per image list.
        lists: image lists, for error messages.
        batches: all batches of this process, to report the progress.
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
        self.networks = nn.ModuleList(
            network for group in networks for network in group
        )  # registered, so that they move to a device together
        self.stores = stores
        self.lists = lists
        self.failures: list[str] = []
        self.pending: list[_PendingBatch] = []
        self.max_pixels = math.inf  # largest number of pixels that fit in memory at once
        self.total_pixels = sum(len(batch.rows) * batch.size[0] * batch.size[1] for batch in batches)
        self.pixels_done, self.images_done = 0, 0
        self.start_time = self.last_report = time.monotonic()

    def predict_step(self, batch: list[LoadedBatch], batch_idx: int) -> int:
        """Extract one batch and write its descriptors; return the number of images done.

        On a GPU, the descriptors of the previous batch are written while the GPU computes this batch. A single process
        stops at once if an image fails. Several processes raise the error together at the end, because they would
        wait for a process that stops alone. Finished rows are kept in both cases.
        """
        for list_index, rows, images, faults in batch:
            image_list = self.lists[list_index]
            for row, fault, lasting in faults:
                if lasting and image_list.max_corrupt_fraction is not None:
                    stores = [network_stores[list_index] for group in self.stores for network_stores in group]
                    skip_rows(stores, image_list, [(row, fault)])
                else:
                    self.failures.append(fault)
            with full_precision():
                for index, (group, group_stores) in enumerate(zip(self.groups, self.stores, strict=True)):
                    if rows:
                        descriptors, copied = _copy_to_host(self._extract(group, images))
                        pending = _PendingBatch(list_index, rows, descriptors, group_stores, index == 0, copied)
                        self.pending.append(pending)
                        self.drain(keep=int(images.device.type in _ASYNCHRONOUS))
            self._report_progress(len(rows), images.shape[-2:].numel() * len(rows))
        if self.failures and self.trainer.world_size == 1:
            self.raise_failures()
        return self.images_done

    def drain(self, keep: int = 0) -> None:
        """Write all pending descriptors except those of the last `keep` batches."""
        while len(self.pending) > keep:
            self._write(self.pending[0])
            del self.pending[0]  # after the write, so that an interrupted write is repeated

    def _extract(self, group: Sequence[RetrievalNetwork], images: Tensor) -> list[Tensor]:
        """Return the descriptors (B, D) of each network, computed in as many parts as memory requires.

        Raises:
            InputError: a single image does not fit in memory.
        """
        count, area = len(images), images.shape[-2:].numel()
        step = max(1, min(count, int(min(self.max_pixels, count * area) // area)))
        try:
            parts = [forward_variants(group, images[i : i + step]) for i in range(0, count, step)]
            return [torch.cat(descriptors) for descriptors in zip(*parts, strict=True)]
        except torch.OutOfMemoryError as error:
            if step == 1:
                size = f"{images.shape[-1]} x {images.shape[-2]}"
                raise InputError(
                    f"out of GPU memory with one image of {size} px: set dataset.max_side, or use fewer scales"
                ) from error
            self.max_pixels = step // 2 * area
        log.info("out of GPU memory with %d images of %d pixels: continuing with %d at a time", step, area, step // 2)
        torch.cuda.empty_cache()
        return self._extract(group, images)

    def _write(self, batch: _PendingBatch) -> None:
        """Write the descriptors of a batch, and record failures only for the store of this run.

        The other runs of a sweep extract the missing rows of their stores again.
        """
        if batch.copied is not None:
            batch.copied.synchronize()
        for index, (descriptors, stores) in enumerate(zip(batch.descriptors, batch.stores, strict=True)):
            try:
                stores[batch.list_index].write_rows(np.array(batch.rows), descriptors.numpy())
            except InputError as error:
                if index == 0 and batch.is_first_group:
                    path = self.lists[batch.list_index].items[batch.rows[0]].path
                    self.failures.append(f"{path} or another image of its batch: {error}")

    def _report_progress(self, images: int, pixels: int) -> None:
        self.images_done += images
        self.pixels_done += pixels
        now = time.monotonic()
        if self.pixels_done and now - self.last_report > _REPORT_INTERVAL:
            self.last_report = now
            elapsed = now - self.start_time
            minutes = elapsed / self.pixels_done * (self.total_pixels - self.pixels_done) / 60
            speed = self.images_done / elapsed
            log.info("extracted %d images, %.1f images/s, about %.0f min left", self.images_done, speed, minutes)

    def on_predict_start(self) -> None:
        """End the run on SIGTERM, so that finished rows are flushed, because Lightning's handler only sets a flag."""
        if in_main_thread():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    def on_predict_end(self) -> None:
        self.drain()
        self.raise_failures()

    def raise_failures(self) -> None:
        """Raise an InputError in all processes that lists the failed images of all processes, if there are any."""
        failures = self.failures
        if self.trainer.world_size > 1:
            by_process: list[list[str]] = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(by_process, self.failures)
            failures = [failure for process_failures in by_process for failure in process_failures]
        self.failures = []
        if failures:
            raise InputError("\n".join(dict.fromkeys(failures)))


def _copy_to_host(descriptors: Sequence[Tensor]) -> tuple[list[Tensor], torch.cuda.Event | None]:
    """Return host copies of descriptors and, for CUDA tensors, an event that occurs when the copies are complete."""
    if descriptors[0].device.type != "cuda":
        return [x.cpu() for x in descriptors], None
    copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in descriptors]
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(descriptors[0].device))
    return copies, copied


def skip_rows(stores: Sequence[DescriptorStore], images: ExtractionList, faults: Sequence[tuple[int, str]]) -> None:
    """Mark rows of stores as skipped, and record the images and reasons in the `skipped.txt` of each store.

    Args:
        stores: stores of the image list.
        images: the image list.
        faults: row and reason of each image to skip.
    """
    for store in stores if faults else ():
        done = store.done
        new = [(row, reason) for row, reason in faults if not done[row]]
        notes = [f"{images.items[row].path}\t{' '.join(reason.split())}" for row, reason in new]
        store.skip(np.array([row for row, _ in new], np.int64), notes)
