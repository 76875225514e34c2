"""Define the PyTorch datasets, data loaders and Lightning data modules for extraction, validation and training."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from superglobal.data.gldv2 import TrainList
from superglobal.data.images import (
    CorruptImageError,
    ImageList,
    decode_image,
    image_tensor,
    read_image,
    shrink,
)
from superglobal.data.jpeg_decoding import EncodedImage, decode_batch, read_encoded
from superglobal.data.samplers import EpochBatches, ImageBatch
from superglobal.data.train_dataset import TrainingDataset, collate
from superglobal.errors import InputError, first_line
from superglobal.utils.distributed import STOP_SIGNALS, end_with_parent, in_main_thread

log = logging.getLogger(__name__)
_POLL_SECONDS = 5.0  # ImageLoader notices after this time that a worker has died.
Task = tuple[int, int]
"""One image to read: (index of the image list, row of the image in this list)."""


class ImageDataset(Dataset):
    """Single images from several image lists.

    Item i is a pair: `tasks[i]`, and the image of this task as a (3, H, W) uint8 tensor. If the image is corrupt, an
    InputError takes the place of the tensor. The error is returned instead of raised, because DataLoader would add the
    traceback of the worker process to the error message.

    Args:
        lists: image lists.
        tasks: (index of the image list, row in this list) of each image to read.
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
    """A batch of decoded images from one image list.

    Attributes:
        number: index of the image list.
        rows: (B,) rows of the images in the list.
        images: (B, 3, H, W) uint8.
        faults: (row, reason, permanent) of each requested image that cannot be read. `permanent` is False if another
            attempt may succeed.
    """

    number: int
    rows: list[int]
    images: Tensor
    faults: list[tuple[int, str, bool]]


class EncodedBatch(NamedTuple):
    """A batch of JPEG files from one image list, to be decoded on the GPU.

    Attributes:
        number: index of the image list.
        rows: (B,) rows of the images in the list.
        data: (n,) uint8, the concatenated contents of all files.
        sizes: (B,) size of each file in bytes.
        bounds: (B,) crop (x1, y1, x2, y2) of each image in pixels.
    """

    number: int
    rows: list[int]
    data: Tensor
    sizes: list[int]
    bounds: list[tuple[int, int, int, int]]


class BatchedImageDataset(Dataset):
    """Batches of images from several image lists.

    Item i contains the images of `batches[i]` as a list of `LoadedBatch`. The list usually has one element. It has more
    if images have different sizes or cannot be read. With the decoder "gpu", the last element can be an `EncodedBatch`.

    Args:
        lists: image lists.
        batches: for each batch, the index of its image list and the rows of its images in this list.
        decoder: "cpu" to decode all images, or "gpu" to leave those JPEG files encoded that the GPU can decode.
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
            # All files are concatenated to one tensor, because each tensor that a worker sends needs a file descriptor.
            files = [image.data for _, image in encoded]
            kept, bounds = [row for row, _ in encoded], [image.bounds for _, image in encoded]
            batches.append(EncodedBatch(number, kept, torch.cat(files), [len(file) for file in files], bounds))
        return batches


def is_permanent(error: InputError) -> bool:
    """Return False if another attempt to read an image may succeed.

    A missing file is a permanent error. Other errors of the operating system may be temporary, for example those of a
    network file system.
    """
    return not isinstance(error.__cause__, OSError) or isinstance(error.__cause__, FileNotFoundError)


def _group_by_size(number: int, images: Iterable[tuple[int, Tensor | InputError]]) -> list[LoadedBatch]:
    """Group images into one batch per image size. Add a last batch for images that cannot be read, if there are any.

    Args:
        number: index of the image list.
        images: (row, image) pairs; `image` is a (3, H, W) uint8 tensor, or the error if the image cannot be read.
    """
    by_size: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
    faults = []
    for row, image in images:
        if isinstance(image, InputError):
            faults.append((row, str(image), is_permanent(image)))
        else:
            by_size.setdefault(tuple(image.shape), []).append((row, image))
    loaded = [
        LoadedBatch(number, [row for row, _ in same], torch.stack([image for _, image in same]), [])
        for same in by_size.values()
    ]
    return [*loaded, LoadedBatch(number, [], torch.empty(0, 3, 0, 0), faults)] if faults else loaded


def _read(lists: Sequence[ImageList], task: Task, decoder: str = "cpu") -> EncodedImage | Tensor | InputError:
    """Read one image.

    Args:
        lists: image lists.
        task: (index of the image list, row in this list) of the image to read.
        decoder: "cpu" to decode the image, or "gpu" to leave a JPEG file encoded if the GPU can decode it.

    Returns:
        The image as a (3, H, W) uint8 tensor; the encoded JPEG file; or the error if the image cannot be read.
    """
    images, row = lists[task[0]], task[1]
    item, signature = images.items[row], images.signatures[row] if images.signatures is not None else None
    try:
        image = (read_encoded if decoder == "gpu" else read_image)(item.path, item.box, images.max_side, signature)
    except InputError as error:
        return error
    return image if isinstance(image, EncodedImage) else image_tensor(image)


class ExtractionDataModule(pl.LightningDataModule):
    """Batches of images for the extraction. Worker processes load them while the network computes.

    Args:
        lists: image lists.
        batches: for each batch, the index of its image list and the rows of its images in this list.
        num_workers: number of worker processes.
        decoder: "cpu" to decode all images in the workers, or "gpu" to decode JPEG files on the device of the network.

    Attributes:
        decoded_on_cpu: number of JPEG files that the GPU could not decode and that were decoded on the CPU instead.
    """

    def __init__(
        self, lists: Sequence[ImageList], batches: Sequence[ImageBatch], num_workers: int, decoder: str = "cpu"
    ) -> None:
        super().__init__()
        self.images = BatchedImageDataset(lists, batches, decoder)
        self.num_workers = num_workers
        self.decoded_on_cpu = 0

    def predict_dataloader(self) -> DataLoader:
        """Return the data loader that yields all batches, each as a list of `LoadedBatch` and `EncodedBatch`."""
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
        """Decode encoded images on the device. Move images that are already decoded to the device."""
        loaded: list[LoadedBatch] = []
        for images in batch:
            loaded += self._decode(images, device) if isinstance(images, EncodedBatch) else [images]
        return super().transfer_batch_to_device(loaded, device, dataloader_idx)

    def _decode(self, batch: EncodedBatch, device: torch.device) -> list[LoadedBatch]:
        """Decode a batch of JPEG files on the device. A file that the device cannot decode is decoded on the CPU."""
        images: list[tuple[int, Tensor | InputError]] = []
        decoded = decode_batch(batch.data.split(batch.sizes), device)
        for row, pixels, (x1, y1, x2, y2) in zip(batch.rows, decoded, batch.bounds, strict=True):
            if pixels is not None:
                images.append((row, pixels[:, y1:y2, x1:x2]))
                continue
            if not self.decoded_on_cpu:
                path = self.images.lists[batch.number].items[row].path
                log.warning("%s: the GPU decoder does not support this JPEG; such files are decoded on the CPU", path)
            self.decoded_on_cpu += 1
            image = _read(self.images.lists, (batch.number, row))
            assert not isinstance(image, EncodedImage)
            images.append((row, image if isinstance(image, InputError) else image.to(device)))
        return _group_by_size(batch.number, images)


def first_item(batch: list[Any]) -> Any:
    """Return the only element of `batch`.

    DataLoader calls this function to combine the items of a data set. Here, each item is already a complete batch of
    images.
    """
    return batch[0]


class HeldOutDataset(Dataset):
    """All images of randomly selected held-out landmarks, for the validation during training.

    Landmarks are selected at random until the images of the next landmark would exceed `max_images`. At least two
    landmarks are selected. The items have the same form as those of `ImageDataset`.

    Args:
        images: images of landmarks that are not used for training.
        max_images: maximum number of images.
        max_side: maximum longer side in pixels; larger images are shrunk. None means no limit.
        seed: seed of the selection.
        exclude: indices of images that are known to be corrupt.

    Attributes:
        indices: (n,) int64 indices of the selected images in `images`.
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
        """Class of each selected image, (n,) int32."""
        return self.images.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def drop(self, rows: Sequence[int]) -> None:
        """Remove corrupt images from this data set. `rows` are the positions of these images in the data set."""
        self.indices = np.delete(self.indices, rows)

    def __getitem__(self, row: int) -> tuple[Task, Tensor | InputError]:
        try:
            pixels = shrink(decode_image(self.images.read(int(self.indices[row]))), self.max_side)
        except CorruptImageError as error:
            return (0, row), error
        return (0, row), image_tensor(pixels)


class TrainingDataModule(pl.LightningDataModule):
    """Shuffled and augmented training images. Each process loads a different part of each batch.

    The order of the images depends only on the seed, and loading starts at the current step of the trainer. A resumed
    run therefore sees the same images as an uninterrupted run.

    Args:
        dataset: training images, indexed by (epoch, index).
        batch_size: number of images per optimizer step, summed over all processes.
        accumulate: number of smaller batches into which each process divides its images of a step (gradient
            accumulation).
        num_workers: number of worker processes per training process that decode images.
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
        """Total time in seconds that the training has waited for images."""
        return 0.0 if self.loader is None else self.loader.waited

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the images for this process, starting at the current step of the trainer."""
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
    """DataLoader that measures the time spent waiting for batches, and reports workers that died or do not respond.

    It removes the SIGCHLD handler of torch. The handler raises an error as soon as a worker dies, which can interrupt
    any code, for example while a checkpoint is being saved. Without the handler, an error is raised within five seconds
    after the next batch is requested.

    Args:
        dataset: dataset to load.
        num_workers: number of worker processes.
        options: other arguments of DataLoader.

    Attributes:
        waited: time spent waiting for batches, in seconds.
        max_wait: maximum time in seconds in which no worker sends a batch, for all loaders of the process. Time in
            which the process is suspended does not count.
    """

    waited = 0.0
    max_wait = 600.0

    def __init__(self, dataset: Any, num_workers: int = 0, **options: Any) -> None:
        super().__init__(dataset, num_workers=num_workers, timeout=_POLL_SECONDS if num_workers else 0, **options)
        self.collate_fn = _SharedCollate(self.collate_fn)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start = time.perf_counter()
        try:
            batches = super().__iter__()
        except OSError as error:
            raise _worker_error(f"cannot be started: {error}") from error
        if hasattr(signal, "SIGCHLD") and in_main_thread():  # Windows lacks this signal.
            handler = signal.getsignal(signal.SIGCHLD)
            if getattr(handler, "__module__", "").startswith("torch."):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        while True:
            try:
                batch = self._next(batches)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def _next(self, batches: Iterator[Any]) -> Any:
        """Return the next batch, as `next(batches)`.

        Raises:
            InputError: the workers died, have too little shared memory, or sent no batch within `max_wait`.
        """
        waited = 0.0
        while True:
            try:
                return next(batches)
            except RuntimeError as error:
                text = str(error)
                if text.startswith("DataLoader timed out after") and waited < self.max_wait:
                    waited += _POLL_SECONDS
                elif "shared memory" in text:
                    raise _worker_error("have too little shared memory") from error
                elif text.startswith("DataLoader timed out after"):
                    for worker in getattr(batches, "_workers", ()):
                        worker.kill()  # Workers of a training process ignore SIGTERM, with which torch ends them.
                    raise _worker_error(f"sent no images for {waited:g} seconds") from error
                elif text.startswith("DataLoader worker"):
                    raise _worker_error(f"died ({first_line(error)}), possibly because of too little memory") from error
                else:
                    raise
            except (ConnectionError, EOFError, FileNotFoundError) as error:
                if not self.num_workers:
                    raise
                # The next batch is received from a worker process. These errors mean that the process is dead.
                raise _worker_error(f"died ({error!r}), possibly because of too little memory") from error


class _SharedCollate:
    """Function that combines the items of a batch, and moves its tensors to shared memory if it runs in a worker.

    Without it, a thread of the worker moves them. If there is too little shared memory, the error in this thread is not
    sent to the training process, which waits forever.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Any) -> Any:
        batch = self.collate(items)
        if get_worker_info() is None:
            return batch
        try:
            return apply_to_collection(batch, Tensor, Tensor.share_memory_)
        except RuntimeError as error:
            raise RuntimeError(f"too little shared memory: {error}") from error


def _worker_error(problem: str) -> InputError:
    """Return an InputError about the worker processes of a DataLoader. `problem` says what is wrong with them."""
    return InputError(
        f"the processes that decode images {problem}; lower trainer.num_workers (0 needs no processes), or provide "
        "more shared memory in /dev/shm (docker run --shm-size=8g), and run the same command to resume"
    )


def worker_start_method(processes: int, num_workers: int) -> str | None:
    """Return the `multiprocessing_context` for the DataLoader of a training process.

    If there are several training processes, background threads of each process communicate with the other processes. A
    worker that is forked while such a thread holds a lock could wait for this lock forever. The workers are therefore
    started by a fork server, a separate process without such threads.

    Args:
        processes: number of training processes.
        num_workers: number of workers of the DataLoader.

    Returns:
        None (the default of torch) if there is one training process, no worker, or no fork server on this operating
        system; else "forkserver".
    """
    if processes == 1 or num_workers == 0 or "forkserver" not in multiprocessing.get_all_start_methods():
        return None
    # The fork server imports this module once. The workers are copies of the server and need not import it again.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    return "forkserver"


def init_worker(worker: int) -> None:
    """Initialize a DataLoader worker of a training process.

    The worker ignores signals, and ends when the training process ends. Signals, such as SIGINT after Ctrl-C, also
    reach the workers. The workers must keep running, because the trainer first finishes the current step and saves a
    checkpoint.
    """
    end_with_parent()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
