"""Datasets, data loaders and Lightning data modules for extraction, validation and training."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from superglobal.data.gldv2 import TrainList
from superglobal.data.images import CorruptImageError, ImageItem, decode_image, image_tensor, read_image, shrink
from superglobal.data.jpeg_decoding import EncodedImage, decode_batch, read_encoded
from superglobal.data.samplers import EpochBatches, ImageBatch
from superglobal.data.train_dataset import TrainingDataset, collate
from superglobal.errors import InputError
from superglobal.utils.distributed import end_with_parent, in_main_thread

log = logging.getLogger(__name__)
Task = tuple[int, int]
"""Index of an image list, and row of an image in that list."""
ImageList = tuple[Sequence[ImageItem], int | None]
"""Images, and the `max_side` in pixels to which larger ones are shrunk (None for no limit)."""


class ImageDataset(Dataset):
    """Images of several lists.

    An item is (task, (3, H, W) uint8), or (task, InputError) for a corrupt image. The error is returned because
    DataLoader would add the traceback of the worker to the message of an error that is raised.

    Args:
        lists: images and their `max_side`.
        tasks: images to read.
    """

    def __init__(self, lists: Sequence[ImageList], tasks: Sequence[Task]) -> None:
        self.lists = lists
        self.tasks = tasks

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, position: int) -> tuple[Task, Tensor | InputError]:
        task = self.tasks[position]
        image = _read(self.lists, task)
        assert not isinstance(image, EncodedImage)
        return task, image


class LoadedBatch(NamedTuple):
    """Decoded images of one list.

    Attributes:
        number: index of the list.
        rows: (B,) rows of the images in it.
        images: (B, 3, H, W) uint8.
        faults: images of the batch that cannot be read: row, reason, and whether the fault is permanent.
    """

    number: int
    rows: list[int]
    images: Tensor
    faults: list[tuple[int, str, bool]]


class EncodedBatch(NamedTuple):
    """JPEG files of one list, to be decoded on the device.

    Attributes:
        number: index of the list.
        rows: (B,) rows of the images in it.
        data: (n,) uint8, the bytes of all files, concatenated.
        sizes: (B,) bytes of each file.
        bounds: (B,) crop (x1, y1, x2, y2) of each image, in pixels.
    """

    number: int
    rows: list[int]
    data: Tensor
    sizes: list[int]
    bounds: list[tuple[int, int, int, int]]


class BatchedImageDataset(Dataset):
    """Batches of images.

    An item is a list with one `LoadedBatch`, or several if the header of an image file has a wrong size.

    Args:
        lists: images and their `max_side`.
        batches: batches of these images.
        decoder: "cpu"; or "gpu" to return an `EncodedBatch` of the files that `read_encoded` leaves encoded.
    """

    def __init__(self, lists: Sequence[ImageList], batches: Sequence[ImageBatch], decoder: str = "cpu") -> None:
        self.lists = lists
        self.batches = batches
        self.decoder = decoder

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> list[LoadedBatch | EncodedBatch]:
        number, rows, _ = self.batches[position]
        encoded: list[tuple[int, EncodedImage]] = []
        decoded: list[tuple[int, Tensor | InputError]] = []
        for row in rows:
            image = _read(self.lists, (number, row), self.decoder)
            if isinstance(image, EncodedImage):
                encoded.append((row, image))
            else:
                decoded.append((row, image))
        batches: list[LoadedBatch | EncodedBatch] = [*_group_by_size(number, decoded)]
        if encoded:
            files = [image.data for _, image in encoded]  # Sending each tensor alone needs a file descriptor.
            kept, bounds = [row for row, _ in encoded], [image.bounds for _, image in encoded]
            batches.append(EncodedBatch(number, kept, torch.cat(files), [len(file) for file in files], bounds))
        return batches


def _group_by_size(number: int, images: Iterable[tuple[int, Tensor | InputError]]) -> list[LoadedBatch]:
    """Group (row, image) pairs into one batch per image size, and a last batch for images that cannot be read."""
    by_size: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    faults = []
    for row, image in images:
        if isinstance(image, InputError):
            # Errors of a failing disk may be temporary.
            cause = image.__cause__
            permanent = not isinstance(cause, OSError) or isinstance(cause, FileNotFoundError)
            faults.append((row, str(image), permanent))
        else:
            by_size.setdefault(tuple(image.shape), []).append((row, image))
    loaded = [
        LoadedBatch(number, [row for row, _ in same], torch.stack([image for _, image in same]), [])
        for same in by_size.values()
    ]
    return [*loaded, LoadedBatch(number, [], torch.empty(0, 3, 0, 0), faults)] if faults else loaded


def _read(lists: Sequence[ImageList], task: Task, decoder: str = "cpu") -> EncodedImage | Tensor | InputError:
    items, max_side = lists[task[0]]
    item = items[task[1]]
    try:
        image = (read_encoded if decoder == "gpu" else read_image)(item.path, item.box, max_side)
    except InputError as error:
        return error
    return image if isinstance(image, EncodedImage) else image_tensor(image)


class ExtractionDataModule(pl.LightningDataModule):
    """Batches of images, read by worker processes ahead of the network.

    Args:
        lists: images and their `max_side`.
        batches: batches of these images.
        num_workers: number of processes that read images, and decode those that `decoder` does not.
        decoder: "cpu", or "gpu" to decode JPEGs on the device of the batches.

    Attributes:
        decoded_on_cpu: number of JPEGs that the GPU decoder did not support.
    """

    def __init__(
        self, lists: Sequence[ImageList], batches: Sequence[ImageBatch], num_workers: int, decoder: str = "cpu"
    ) -> None:
        super().__init__()
        self.images = BatchedImageDataset(lists, batches, decoder)
        self.num_workers = num_workers
        self.decoded_on_cpu = 0

    def predict_dataloader(self) -> DataLoader:
        """Return the loader of all batches."""
        assert self.trainer is not None
        return ImageLoader(
            self.images,
            num_workers=self.num_workers,
            collate_fn=first_item,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def transfer_batch_to_device(
        self, batch: list[LoadedBatch | EncodedBatch], device: torch.device, dataloader_idx: int
    ) -> list[LoadedBatch]:
        """Decode encoded images on the device and move the others there."""
        loaded: list[LoadedBatch] = []
        for images in batch:
            loaded += self._decode(images, device) if isinstance(images, EncodedBatch) else [images]
        return super().transfer_batch_to_device(loaded, device, dataloader_idx)

    def _decode(self, batch: EncodedBatch, device: torch.device) -> list[LoadedBatch]:
        images: list[tuple[int, Tensor | InputError]] = []
        decoded = decode_batch(batch.data.split(batch.sizes), device)
        for row, pixels, (x1, y1, x2, y2) in zip(batch.rows, decoded, batch.bounds, strict=True):
            if pixels is not None:
                images.append((row, pixels[:, y1:y2, x1:x2]))
                continue
            if not self.decoded_on_cpu:
                path = self.images.lists[batch.number][0][row].path
                log.warning("%s: the GPU decoder does not support this JPEG; such files are decoded on the CPU", path)
            self.decoded_on_cpu += 1
            image = _read(self.images.lists, (batch.number, row))
            assert not isinstance(image, EncodedImage)
            images.append((row, image if isinstance(image, InputError) else image.to(device)))
        return _group_by_size(batch.number, images)


def first_item(batch: list[Any]) -> Any:
    """Return the item of a batch of one."""
    return batch[0]


class HeldOutDataset(Dataset):
    """All images of at least two random landmarks of a training list, with the items of `ImageDataset`.

    Landmarks are added until the next one would exceed `max_images`.

    Args:
        images: images of landmarks that are not used for training.
        max_images: maximum number of images.
        max_side: larger images are shrunk to this longer side, in pixels; None for no limit.
        seed: seed of the selection.
        exclude: indices of known corrupt images.

    Attributes:
        indices: (n,) int64 indices into `images`.
    """

    def __init__(
        self, images: TrainList, max_images: int, max_side: int | None, seed: int, exclude: Sequence[int] = ()
    ) -> None:
        order = np.random.default_rng(seed).permutation(len(images.landmarks))
        total = np.cumsum(np.bincount(images.labels)[order])
        selected = order[: max(2, np.searchsorted(total, max_images, side="right"))]
        self.indices = np.setdiff1d(np.flatnonzero(np.isin(images.labels, selected)), exclude)
        self.images = images
        self.max_side = max_side

    @property
    def labels(self) -> np.ndarray:
        """The landmark of each image, (n,)."""
        return self.images.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def drop(self, rows: Sequence[int]) -> None:
        """Remove images that turned out to be corrupt."""
        self.indices = np.delete(self.indices, rows)

    def __getitem__(self, row: int) -> tuple[Task, Tensor | InputError]:
        try:
            pixels = shrink(decode_image(self.images.read(int(self.indices[row]))), self.max_side)
        except CorruptImageError as error:
            return (0, row), error
        return (0, row), image_tensor(pixels)


class TrainingDataModule(pl.LightningDataModule):
    """Shuffled, augmented training images; each process loads its part of each step.

    The order continues at the current step of the trainer. A resumed run therefore sees the same images as an
    uninterrupted run.

    Args:
        dataset: training images, indexed by (epoch, index).
        batch_size: number of images per step, in all processes together.
        accumulate: number of parts of a step per process.
        num_workers: number of processes per device that decode images.
        seed: seed of the order.
    """

    def __init__(self, dataset: TrainingDataset, batch_size: int, accumulate: int, num_workers: int, seed: int) -> None:
        super().__init__()
        self.dataset = dataset
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.num_workers = num_workers
        self.seed = seed
        self.loader: ImageLoader | None = None

    @property
    def waited(self) -> float:
        """Seconds that training has waited for images."""
        return 0.0 if self.loader is None else self.loader.waited

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the images for this process, from the current step of the trainer."""
        trainer = self.trainer
        assert trainer is not None
        batches = EpochBatches(
            len(self.dataset), self.batch_size, self.seed, self.accumulate, trainer.global_rank, trainer.world_size
        )
        batches.start_at(trainer.global_step)
        self.loader = ImageLoader(
            self.dataset,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            persistent_workers=self.num_workers > 0,
            worker_init_fn=init_worker,
            multiprocessing_context=worker_start_method(trainer.world_size, self.num_workers),
        )
        return self.loader


class ImageLoader(DataLoader):
    """DataLoader that reports a dead worker when the next batch is loaded, and measures the time spent waiting.

    The SIGCHLD handler of torch is removed. It raises an error as soon as a worker dies, which can interrupt any code,
    for example while a checkpoint is saved. Without it, loading a batch reports the dead worker within five seconds.

    Attributes:
        waited: seconds spent waiting for batches.
    """

    waited = 0.0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start = time.perf_counter()
        batches = super().__iter__()
        handler = signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", "").startswith("torch.") and in_main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (ConnectionError, EOFError, FileNotFoundError) as error:
                if not self.num_workers:
                    raise
                # A batch is fetched from its worker, and these errors mean that the worker is dead.
                raise RuntimeError(f"DataLoader worker exited unexpectedly ({error!r})") from error
            finally:
                self.waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()


def worker_start_method(processes: int, num_workers: int) -> str | None:
    """Return the `multiprocessing_context` of a DataLoader: the default for one training process, else "forkserver".

    With several training processes, background threads communicate all the time. A fork while one of them holds a lock
    creates a worker that waits forever.
    """
    if processes == 1 or num_workers == 0:
        return None
    # The server imports this module once for all workers.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    return "forkserver"


def init_worker(worker: int) -> None:
    """Make a training worker ignore signals, and end when its parent process ends.

    A signal to the process group must not end the workers before the trainer has saved the current step.
    """
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
