"""Which images are described together: those of exactly the same size, so that nothing is padded."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from superglobal.data.gldv2 import TrainList
from superglobal.data.images import CorruptImageError, ImageItem, decode_image, image_tensor, read_image, shrink
from superglobal.data.jpeg_decoding import EncodedImage, decode_batch, read_encoded
from superglobal.data.samplers import EpochBatches
from superglobal.data.train_dataset import TrainingDataset, collate
from superglobal.errors import InputError
from superglobal.utils.distributed import end_with_parent, in_main_thread

_DEALT = 32  # at most so many images of neighbouring size go to one process together
Size = tuple[int, int]


class ImageBatch(NamedTuple):
    """Images of one list: its number, their rows in it, and their size (height, width) in pixels."""

    number: int
    rows: tuple[int, ...]
    size: Size


def plan_batches(
    lists: Sequence[Sequence[Size]],
    max_pixels: int,
    max_images: int,
    shard: tuple[int, int] = (0, 1),
    rank: tuple[int, int] = (0, 1),
) -> list[ImageBatch]:
    """Batches of the images of several lists, the largest images first, so that memory runs out at the start if at all.

    The plan depends on the sizes and these arguments alone, never on what is stored already: batches are the same
    when a run goes on, and so are their descriptors, bit for bit. Which images belong to a share does not depend on
    the size of batches nor on ranks: shares of machines with other memory or devices still cover every image once.

    Args:
        lists: (height, width) of every image that is described, in pixels.
        max_pixels: maximum number of pixels in a batch; a single image may have more.
        max_images: maximum number of images in a batch.
        shard: (k, n): shard k of n, counted from 0.
        rank: (k, n): process k of the n that share this part.
    """
    found: list[ImageBatch] = []
    for number, sizes in enumerate(lists):
        rows = sorted(range(len(sizes)), key=lambda row: (-_area(sizes[row]), sizes[row], row))
        mine = _dealt(_dealt(rows, shard), rank)
        for size, group in groupby(mine, key=lambda row: sizes[row]):
            same = list(group)
            count = max(1, min(max_images, max_pixels // max(1, _area(size))))
            found += [ImageBatch(number, tuple(same[i : i + count]), size) for i in range(0, len(same), count)]
    return sorted(found, key=lambda batch: -_area(batch.size))


def _dealt(rows: list[int], share: tuple[int, int]) -> list[int]:
    """Part k of n, in blocks of neighbours."""
    k, n = share
    together = max(1, min(_DEALT, len(rows) // (4 * n)))
    return [row for place, row in enumerate(rows) if place // together % n == k]


def select_missing(batches: Iterable[ImageBatch], missing: Sequence[set[int]]) -> list[ImageBatch]:
    """What is left to do of a plan, given the missing rows of each list: whole batches but for rows found elsewhere."""
    left = []
    for batch in batches:
        rows = tuple(row for row in batch.rows if row in missing[batch.number])
        if rows:
            left.append(batch._replace(rows=rows))
    return left


def _area(size: Size) -> int:
    return size[0] * size[1]


log = logging.getLogger(__name__)
Task = tuple[int, int]
"""Number of an image list and row in it."""
ImageList = tuple[Sequence[ImageItem], int | None]
"""Images and the `max_side` that they are shrunk to."""


class ImageDataset(Dataset):
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


class EncodedBatch(NamedTuple):
    """JPEG files of one list, to be decoded on the device.

    Attributes:
        number: of the list.
        rows: (B,) of the images in it.
        data: (n,) uint8, the bytes of all files, concatenated.
        sizes: (B,) bytes of each file.
        bounds: (B,) (x1, y1, x2, y2) of each crop, in pixels.
    """

    number: int
    rows: list[int]
    data: Tensor
    sizes: list[int]
    bounds: list[tuple[int, int, int, int]]


class BatchedImageDataset(Dataset):
    """Image batches, each as `LoadedBatch`es: one, or several where a header does not tell the size of its image.

    Args:
        lists: images and their `max_side` each.
        batches: of these images.
        decoder: "cpu", or "gpu" to leave an `EncodedBatch` of the files that `read_encoded` leaves encoded.
    """

    def __init__(self, lists: Sequence[ImageList], batches: Sequence[ImageBatch], decoder: str = "cpu") -> None:
        self.lists = lists
        self.batches = batches
        self.decoder = decoder

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, position: int) -> list[LoadedBatch | EncodedBatch]:
        number, rows, _ = self.batches[position]
        read = _read_encoded if self.decoder == "gpu" else _read
        encoded: list[tuple[int, EncodedImage]] = []
        decoded: list[tuple[int, Tensor | InputError]] = []
        for row in rows:
            image = read(self.lists, (number, row))
            if isinstance(image, EncodedImage):
                encoded.append((row, image))
            else:
                decoded.append((row, image))
        batches: list[LoadedBatch | EncodedBatch] = [*_by_size(number, decoded)]
        if encoded:
            files = [image.data for _, image in encoded]  # as one tensor: each would cost a file descriptor
            left, bounds = [row for row, _ in encoded], [image.bounds for _, image in encoded]
            batches.append(EncodedBatch(number, left, torch.cat(files), [len(file) for file in files], bounds))
        return batches


def _by_size(number: int, images: Iterable[tuple[int, Tensor | InputError]]) -> list[LoadedBatch]:
    """Return the images of one size together, (row, image) each, and the faults in a batch of their own."""
    by_size: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    faults = []
    for row, image in images:
        if isinstance(image, InputError):
            # Of a disk that fails, any image may be unreadable for a while.
            cause = image.__cause__
            lasting = not isinstance(cause, OSError) or isinstance(cause, FileNotFoundError)
            faults.append((row, str(image), lasting))
        else:
            by_size.setdefault(tuple(image.shape), []).append((row, image))
    loaded = [
        LoadedBatch(number, [row for row, _ in same], torch.stack([image for _, image in same]), [])
        for same in by_size.values()
    ]
    return [*loaded, LoadedBatch(number, [], torch.empty(0, 3, 0, 0), faults)] if faults else loaded


def _read(lists: Sequence[ImageList], task: Task) -> Tensor | InputError:
    items, max_side = lists[task[0]]
    item = items[task[1]]
    try:
        return image_tensor(read_image(item.path, item.box, max_side))
    except InputError as error:
        return error


def _read_encoded(lists: Sequence[ImageList], task: Task) -> EncodedImage | Tensor | InputError:
    items, max_side = lists[task[0]]
    item = items[task[1]]
    try:
        image = read_encoded(item.path, item.box, max_side)
    except InputError as error:
        return error
    return image if isinstance(image, EncodedImage) else image_tensor(image)


class ExtractionDataModule(pl.LightningDataModule):
    """Batches of images, read ahead of the network by `num_workers` processes.

    Args:
        lists: images and their `max_side` each.
        batches: of these images.
        num_workers: processes that read, and decode what `decoder` does not.
        decoder: "cpu", or "gpu" to decode JPEGs on the device that the batches go to.

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
        assert self.trainer is not None
        return ImageLoader(
            self.images,
            num_workers=self.num_workers,
            collate_fn=only,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def transfer_batch_to_device(
        self, batch: list[LoadedBatch | EncodedBatch], device: torch.device, dataloader_idx: int
    ) -> list[LoadedBatch]:
        """Decode encoded images on the device and move the others there."""
        loaded: list[LoadedBatch] = []
        for part in batch:
            loaded += self._decoded(part, device) if isinstance(part, EncodedBatch) else [part]
        return super().transfer_batch_to_device(loaded, device, dataloader_idx)

    def _decoded(self, batch: EncodedBatch, device: torch.device) -> list[LoadedBatch]:
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
            images.append((row, image if isinstance(image, InputError) else image.to(device)))
        return _by_size(batch.number, images)


def only(batch: list[Any]) -> Any:
    """The one item of a batch of one."""
    return batch[0]


class HeldOutDataset(Dataset):
    """Whole landmarks of a training list, drawn by `seed` until one more would pass `most` photos; two at least.

    Photos come as `ImageDataset` gives them, whole and shrunk to `max_side`.

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
        except CorruptImageError as error:  # the caller knows the place
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

    def __init__(self, photos: TrainingDataset, batch_size: int, accumulate: int, num_workers: int, seed: int) -> None:
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
            worker_init_fn=init_worker,
            multiprocessing_context=worker_start_method(trainer.world_size, self.num_workers),
        )
        return self.loader


class ImageLoader(DataLoader):
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


class TimedLoader(ImageLoader):
    """A ImageLoader that knows how long it was waited for: `waited`, in seconds."""

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


def worker_start_method(processes: int, num_workers: int) -> str | None:
    """Argument of a DataLoader: its workers are forked, but not beside other processes of a training.

    There threads communicate all the time, and a fork in the wrong moment leaves a worker that waits for ever.
    """
    if processes == 1 or num_workers == 0:
        return None
    # Imported once, by the process that they are forked from.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    return "forkserver"


def init_worker(worker: int) -> None:
    """What a process that decodes for a training does first: leave signals to the training, and end with it.

    A signal to the whole process group must not take the photos away before the step is done and saved.
    """
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
