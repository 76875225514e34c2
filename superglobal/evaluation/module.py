"""Extract descriptors with Lightning, in one or several processes that write them into descriptor stores."""

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
from superglobal.data.images import ImageItem, ImageList, shrunk_size
from superglobal.data.samplers import ImageBatch
from superglobal.errors import InputError, printable
from superglobal.models.network import RetrievalNetwork, forward_variants
from superglobal.retrieval.store import DescriptorStore
from superglobal.utils.distributed import in_main_thread
from superglobal.utils.precision import full_precision

log = logging.getLogger(__name__)
_REPORT_INTERVAL = 30.0  # seconds between two reports of the progress
# Types of devices that compute asynchronously. On such a device, the descriptors of a batch are written while the
# device computes the next batch.
_ASYNCHRONOUS = ("cuda",)


class UnreadableImagesError(InputError):
    """Error for images that can be left out: the descriptors of all others were extracted.

    Attributes:
        images: (path, signature) of each image that cannot be decoded.
    """

    def __init__(self, message: str, images: Sequence[tuple[Path, str]]) -> None:
        super().__init__(message)
        self.images = images


@dataclass(frozen=True)
class ExtractionList:
    """List of images whose descriptors belong to one store. Row i of the store contains the descriptor of image i."""

    title: str  # "database", "queries" or "distractors"
    name: str  # name of the data set
    items: Sequence[ImageItem]
    checked: CheckReport  # result of checking the image files
    max_side: int | None  # longer side in pixels to which larger images are shrunk; None for no limit
    max_corrupt_fraction: float | None = None  # maximum fraction of unreadable images to skip; None to skip none
    leaves_out: bool = False  # whether unreadable images are removed from the list, by `UnreadableImagesError`
    roots: Sequence[Path] = ()  # folders; `paths` returns each path relative to the first of them that contains it
    source: dict[str, Any] | None = None  # settings of the data set, which the store records

    def lines(self) -> list[str]:
        """Return one text line per image, from which the fingerprint of the store is computed.

        A line contains the file name without its folder, the box, and a signature of the file's content.
        """
        return [
            f"{item.path.name} {item.box or ''} {signature}"
            for item, signature in zip(self.items, self.checked.signatures, strict=True)
        ]

    def paths(self) -> list[str]:
        """Return a unique name for each image: its path relative to one of `roots`, or else its absolute path.

        If an image is a crop, its box is appended to the path, as in `a.jpg#12,30,540,400`. If several images have the
        same name, a number is appended to all but the first.
        """
        roots = [os.path.join(os.path.abspath(root), "") for root in self.roots]
        counts: Counter[str] = Counter()
        names: dict[str, None] = {}
        for item in self.items:
            path = os.path.abspath(item.path)
            relative = next((path[len(root) :] for root in roots if path.startswith(root)), path)
            name = printable(relative)
            if item.box is not None:
                name += "#" + ",".join(f"{value:g}" for value in item.box)
            unique = name
            while unique in names:  # a file name may itself end with #2
                counts[name] += 1
                unique = f"{name}#{counts[name] + 1}"
            names[unique] = None
        return list(names)

    def files(self) -> ImageList:
        """Return the images to read, whose files must have the checked signatures."""
        return ImageList(self.items, self.max_side, self.checked.signatures)

    def sizes(self) -> list[tuple[int, int]]:
        """Return the (height, width) of each image in pixels, after it is shrunk to `max_side`."""
        return [shrunk_size(size, self.max_side) for size in self.checked.sizes]


@dataclass(frozen=True)
class _PendingBatch:
    """Descriptors of one batch, computed by one group of networks, that are not yet written to the stores."""

    list_index: int  # index of the image list that contains the batch
    rows: list[int]  # (B,) position of each image in the list, which is its row in the store
    descriptors: list[Tensor]  # one (B, D) tensor in host memory per network, valid after the event `copied`
    stores: Sequence[Sequence[DescriptorStore]]  # for each network, one store per image list
    is_first_group: bool  # true if the first network of the group is the network of this run
    copied: torch.cuda.Event | None  # occurs when the copies from the GPU are complete; None on the CPU


class ExtractionModule(pl.LightningModule):
    """Extract batches of images with one or several networks and write each descriptor into its row of a store.

    Args:
        networks: groups of networks in evaluation mode; the networks of a group share one backbone, which computes the
            feature maps once. The first network of the first group is the network of this run.
        stores: one store for each group, network and image list, nested in this order.
        lists: image lists to which the batches refer.
        batches: all batches of this process, used to estimate the remaining time.
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
        # This attribute registers the networks as submodules, so that Lightning moves them to the device.
        self.networks = nn.ModuleList(network for group in networks for network in group)
        self.stores = stores
        self.lists = lists
        self.failures: list[str] = []
        self.unreadable: dict[tuple[Path, str], str] = {}  # (path, signature) of each image to leave out -> reason
        self.pending: list[_PendingBatch] = []
        self.max_pixels = math.inf  # maximum number of pixels to process at once, reduced when GPU memory runs out
        self.total_pixels = sum(len(batch.rows) * batch.size[0] * batch.size[1] for batch in batches)
        self.pixels_done, self.images_done = 0, 0
        self.start_time = self.last_report = time.monotonic()

    def predict_step(self, batch: list[LoadedBatch], batch_idx: int) -> int:
        """Extract one batch and write its descriptors.

        On a GPU, the descriptors of the previous batch are written while the GPU computes this batch. If an image
        cannot be extracted and the run has one process, the error is raised at once, but for an image to leave out
        (`ExtractionList.leaves_out`) at the end of the extraction. If the run has several processes, all of them raise
        the error at the end, because a process that stopped early would make the others wait forever. Finished rows
        are kept in all cases.

        Returns:
            Number of images that this process has extracted so far.
        """
        for list_index, rows, images, faults in batch:
            image_list = self.lists[list_index]
            for row, fault, lasting in faults:
                if lasting and image_list.max_corrupt_fraction is not None:
                    stores = [network_stores[list_index] for group in self.stores for network_stores in group]
                    skip_rows(stores, image_list, [(row, fault)])
                elif lasting and image_list.leaves_out:
                    self.unreadable[image_list.items[row].path, image_list.checked.signatures[row]] = fault
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
        """Write the batches in `pending` to the stores, the oldest first, until only `keep` batches remain."""
        while len(self.pending) > keep:
            self._write(self.pending[0])
            del self.pending[0]  # removed after the write, so that an interrupted write is repeated

    def _extract(self, group: Sequence[RetrievalNetwork], images: Tensor) -> list[Tensor]:
        """Return the descriptors of a batch, as one tensor (B, D) for each network in the group.

        If GPU memory runs out, fewer images are processed at a time.

        Args:
            group: networks that share one backbone.
            images: (B, 3, H, W) batch of images.

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
        """Write the descriptors of a batch into the stores of its networks.

        If the store of this run cannot be written, the error is appended to `failures`. If the store of another sweep
        job cannot be written, the error is ignored, because that job extracts the missing rows itself.
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
        """Add a finished batch to the totals, and log the progress every `_REPORT_INTERVAL` seconds.

        Args:
            images: number of images in the batch.
            pixels: number of pixels in the batch.
        """
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
        """Install a handler that raises SystemExit on SIGTERM, so that finished rows are flushed to disk.

        Lightning's handler for SIGTERM only sets a flag, and the extraction would continue.
        """
        if in_main_thread():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    def on_predict_end(self) -> None:
        self.drain()
        self.raise_failures()

    def raise_failures(self) -> None:
        """Raise InputError in every process if any process has failures. The message lists all failures.

        If the only failures are images to leave out, the error is an `UnreadableImagesError`.
        """
        failures, unreadable = self.failures, self.unreadable
        if self.trainer.world_size > 1:
            by_process: list[Any] = [None for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(by_process, (failures, unreadable))
            failures = [failure for process_failures, _ in by_process for failure in process_failures]
            unreadable = {image: fault for _, faults in by_process for image, fault in faults.items()}
        self.failures, self.unreadable = [], {}
        if failures:
            raise InputError("\n".join(dict.fromkeys(failures)))
        if unreadable:
            raise UnreadableImagesError(
                "\n".join([*unreadable.values(), "run the command again to leave these images out"]), list(unreadable)
            )


def _copy_to_host(descriptors: Sequence[Tensor]) -> tuple[list[Tensor], torch.cuda.Event | None]:
    """Copy descriptors to host memory; from a GPU, without waiting for the copies.

    Returns:
        The copies; and an event that occurs when the copies from a GPU are complete, or None for tensors on the CPU.
    """
    if descriptors[0].device.type != "cuda":
        return [x.cpu() for x in descriptors], None
    copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in descriptors]
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(descriptors[0].device))
    return copies, copied


def skip_rows(stores: Sequence[DescriptorStore], images: ExtractionList, faults: Sequence[tuple[int, str]]) -> None:
    """Mark rows of stores as skipped, and record the images and reasons in the `skipped.txt` of each store.

    Rows that are already finished stay unchanged.

    Args:
        stores: stores whose rows belong to `images`.
        images: list of images.
        faults: (index in `images`, reason) of each image to skip.
    """
    for store in stores if faults else ():
        done = store.done
        new = [(row, reason) for row, reason in faults if not done[row]]
        notes = [f"{images.items[row].path}\t{' '.join(reason.split())}" for row, reason in new]
        store.skip(np.array([row for row, _ in new], np.int64), notes)
