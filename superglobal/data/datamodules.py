"""What Lightning reads images through."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from superglobal.data.batches import ImageBatch
from superglobal.data.gldv2 import TrainList
from superglobal.data.images import FaultyImageError, ImageItem, decode_image, image_tensor, read_image, shrink
from superglobal.data.photos import TrainingPhotos, collate
from superglobal.data.samplers import EpochBatches
from superglobal.errors import InputError
from superglobal.processes import end_with_parent, in_main_thread

Task = tuple[int, int]
"""Number of an image list and row in it."""
ImageList = tuple[Sequence[ImageItem], int | None]
"""Images and the `max_side` that they are shrunk to."""


class Images(Dataset):
    """Chosen rows of several image lists, each as (task, (3, H, W) uint8), at its own size.

    An unreadable image comes as (task, InputError): raised inside a worker it would arrive wrapped in the worker's
    traceback.

    Args:
        lists: images and their `max_side` each.
        tasks: which rows of which list.
    """

    def __init__(self, lists: Sequence[ImageList], tasks: Sequence[Task]) -> None:
        self.lists = lists
        self.tasks = tasks

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, position: int) -> tuple[Task, Tensor | InputError]:
        task = self.tasks[position]
        return task, _read(self.lists, task)


class LoadedBatch(NamedTuple):
    """Images of one list, read.

    Attributes:
        number: of the list.
        rows: (B,) of the images in it.
        images: (B, 3, H, W) uint8.
        faults: (row, why it cannot be read, whether that is the file's fault and will last) of further images.
    """

    number: int
    rows: list[int]
    images: Tensor
    faults: list[tuple[int, str, bool]]


class BatchedImages(Dataset):
    """Image batches, each as `LoadedBatch`es: one, or several where a header does not tell the size of its image."""

    def __init__(self, lists: Sequence[ImageList], batches: Sequence[ImageBatch]) -> None:
        self.lists = lists
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> list[LoadedBatch]:
        batch = self.batches[position]
        by_size: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        faults = []
        for row in batch.rows:
            image = _read(self.lists, (batch.number, row))
            if isinstance(image, InputError):
                # Of a disk that fails, any image may be unreadable for a while.
                cause = image.__cause__
                lasting = not isinstance(cause, OSError) or isinstance(cause, FileNotFoundError)
                faults.append((row, str(image), lasting))
            else:
                by_size.setdefault(tuple(image.shape), []).append((row, image))
        loaded = [
            LoadedBatch(batch.number, [row for row, _ in same], torch.stack([image for _, image in same]), [])
            for same in by_size.values()
        ]
        return [*loaded, LoadedBatch(batch.number, [], torch.empty(0, 3, 0, 0), faults)] if faults else loaded


def _read(lists: Sequence[ImageList], task: Task) -> Tensor | InputError:
    items, max_side = lists[task[0]]
    item = items[task[1]]
    try:
        return image_tensor(read_image(item.path, item.box, max_side))
    except InputError as error:
        return error


class ExtractionDataModule(pl.LightningDataModule):
    """Batches of images, decoded ahead of the network by `num_workers` processes."""

    def __init__(self, lists: Sequence[ImageList], batches: Sequence[ImageBatch], num_workers: int) -> None:
        super().__init__()
        self.images = BatchedImages(lists, batches)
        self.num_workers = num_workers

    def predict_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        return PhotoLoader(
            self.images,
            num_workers=self.num_workers,
            collate_fn=only,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )


def only(batch: list[Any]) -> Any:
    """The one item of a batch of one."""
    return batch[0]


class HeldOutPhotos(Dataset):
    """Whole landmarks of a training list, drawn by `seed` until one more would pass `most` photos; two at least.

    Photos come as `Images` gives them, whole and shrunk to `max_side`.

    Args:
        photos: of landmarks that are not trained on.
        most: photos.
        max_side: larger ones are shrunk to this longer side, in pixels; None leaves them.
        seed: of the draw.
        without: indices that are left out: photos known to be bad.

    Attributes:
        indices: (n,) int64, which of `photos`.
    """

    def __init__(
        self, photos: TrainList, most: int, max_side: int | None, seed: int, without: Sequence[int] = ()
    ) -> None:
        order = np.random.default_rng(seed).permutation(len(photos.landmarks))
        total = np.cumsum(np.bincount(photos.labels)[order])
        drawn = order[: max(2, np.searchsorted(total, most, side="right"))]
        self.indices = np.setdiff1d(np.flatnonzero(np.isin(photos.labels, drawn)), without)
        self.photos = photos
        self.max_side = max_side

    @property
    def labels(self) -> np.ndarray:
        """(n,) the landmark of each."""
        return self.photos.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def drop(self, rows: Sequence[int]) -> None:
        """Leave out photos that turned out to be bad."""
        self.indices = np.delete(self.indices, rows)

    def __getitem__(self, row: int) -> tuple[Task, Tensor | InputError]:
        try:
            pixels = shrink(decode_image(self.photos.read(int(self.indices[row]))), self.max_side)
        except FaultyImageError as error:  # the caller knows the place
            return (0, row), error
        return (0, row), image_tensor(pixels)


class TrainingDataModule(pl.LightningDataModule):
    """Shuffled, augmented training photos; every process gets its share of every step.

    The order goes on from the trainer's step, so that a resumed run sees what the uninterrupted one would have.

    Args:
        photos: (epoch, index) -> a photo.
        batch_size: photos a step, over all processes together.
        accumulate: parts in which each process goes through its share.
        num_workers: processes that decode ahead, per device.
        seed: of the order.
    """

    def __init__(self, photos: TrainingPhotos, batch_size: int, accumulate: int, num_workers: int, seed: int) -> None:
        super().__init__()
        self.photos = photos
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.num_workers = num_workers
        self.seed = seed
        self.loader: TimedLoader | None = None

    @property
    def waited(self) -> float:
        """Seconds that training has waited for photos."""
        return 0.0 if self.loader is None else self.loader.waited

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        batches = EpochBatches(
            len(self.photos), self.batch_size, self.seed, self.accumulate, trainer.global_rank, trainer.world_size
        )
        batches.start_at(trainer.global_step)
        self.loader = TimedLoader(
            self.photos,
            batch_sampler=batches,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            persistent_workers=self.num_workers > 0,
            worker_init_fn=begin_worker,
            multiprocessing_context=how_workers_start(trainer.world_size, self.num_workers),
        )
        return self.loader


class PhotoLoader(DataLoader):
    """A DataLoader whose dead workers are an error where a batch is waited for, at most five seconds later.

    torch's own handler of SIGCHLD raises at once, wherever the run is: in the middle of saving a checkpoint, or where
    Python can do no more than print it.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
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
                # What a worker has announced is fetched from it: a dead one has it no more.
                raise RuntimeError(f"DataLoader worker exited unexpectedly ({error!r})") from error
            yield batch


class TimedLoader(PhotoLoader):
    """A PhotoLoader that knows how long it was waited for: `waited`, in seconds."""

    waited = 0.0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - start
            yield batch


def how_workers_start(processes: int, num_workers: int) -> str | None:
    """Argument of a DataLoader: its workers are forked, but not beside other processes of a training.

    There threads communicate all the time, and a fork in the wrong moment leaves a worker that waits for ever.
    """
    if processes == 1 or num_workers == 0:
        return None
    # Imported once, by the process that they are forked from.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    return "forkserver"


def begin_worker(worker: int) -> None:
    """What a process that decodes for a training does first: leave signals to the training, and end with it.

    A signal to the whole process group must not take the photos away before the step is done and saved.
    """
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
