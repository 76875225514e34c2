"""Load and augment training images, and replace corrupt images by others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from superglobal.data.download_links import how_to_get_gldv2_train
from superglobal.data.evaluation_set import NOTHING_COMPUTED, problem_lines
from superglobal.data.gldv2 import TrainList
from superglobal.data.image_checks import check_images
from superglobal.data.image_index import index_path, load_index, prepare_command, signature_codes
from superglobal.data.images import CorruptImageError, decode_image, image_size
from superglobal.errors import InputError

log = logging.getLogger(__name__)
_MAX_REPLACEMENTS = 10  # maximum number of replacements tried for a corrupt image
_SLOW_CHECK = 50_000  # for more images than this, the check of the image files may take minutes on a hard disk
CorruptImages = list[tuple[int, str]]
"""(index, reason) of each missing or corrupt image."""


class TrainingImage(NamedTuple):
    """An augmented training image.

    Attributes:
        image: (3, S, S) uint8.
        label: class of the image.
        index: index in the training list of the image that was loaded. It is not the requested index if the requested
            image is corrupt and has been replaced.
        corrupt: images that were found corrupt before a valid image was found: the requested image and replacements;
            empty if the requested image is valid.
    """

    image: Tensor
    label: int
    index: int  # type: ignore[assignment]  # The attribute hides the method tuple.index.
    corrupt: CorruptImages


class Batch(NamedTuple):
    """A batch of training images.

    Attributes:
        images: (B, 3, S, S) uint8.
        labels: (B,) int64 classes.
        indices: (B,) int64 indices in the training list of the images that were loaded, including replacements.
        corrupt: images that were found corrupt and replaced.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    corrupt: CorruptImages


class TrainingDataset(Dataset):
    """Augmented training images, indexed by (epoch, image index).

    All random numbers depend only on the seed, the epoch and the image index. A corrupt image is replaced by a random
    image, so that batches are complete and a damaged file does not end a long run. If ten replacements are corrupt too,
    the item is an InputError. The error is returned instead of raised, because DataLoader would add the traceback of
    the worker process to the error message.

    Args:
        images: training list.
        augment: function of the contents of an image file and a side S in pixels, which returns the augmented image,
            (3, S, S) uint8. It must take its random numbers from torch's global generator.
        side: function that returns the side S of the images in an epoch.
        seed: seed of the augmentation and of the choice of replacements.
    """

    def __init__(
        self, images: TrainList, augment: Callable[[bytes, int], Tensor], side: Callable[[int], int], seed: int
    ) -> None:
        self.images = images
        self.augment = augment
        self.side = side
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> TrainingImage | InputError:
        epoch, requested = key
        corrupt: CorruptImages = []
        index = requested
        for attempt in range(1 + _MAX_REPLACEMENTS):
            if attempt:
                index = int(np.random.default_rng([self.seed, epoch, requested, attempt]).integers(len(self)))
            try:
                image = self._augmented(epoch, requested, self.images.read(index))
            except CorruptImageError as error:
                corrupt.append((index, str(error)))
            else:
                return TrainingImage(image, int(self.images.labels[index]), index, corrupt)
        return InputError(
            f"image cannot be read: {self.images.location(requested)}: {corrupt[0][1]}, and neither can "
            f"{_MAX_REPLACEMENTS} random replacements; most images are missing or corrupt (for GLDv2, superglobal "
            "prepare-gldv2 lists them)"
        )

    def _augmented(self, epoch: int, requested: int, data: bytes) -> Tensor:
        """Decode and augment an image file. The random numbers depend only on the seed, the epoch and `requested`.

        Args:
            epoch: the epoch.
            requested: index of the requested image, even if `data` is the file of a replacement.
            data: contents of the image file.

        Returns:
            The augmented image, (3, S, S) uint8.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([self.seed, epoch, requested]).generate_state(1)[0]))
            return self.augment(data, self.side(epoch))


def collate(items: list[TrainingImage | InputError]) -> Batch | InputError:
    """Combine items of `TrainingDataset` into a batch. If an item is an error, return the first error instead."""
    images: list[TrainingImage] = []
    for item in items:
        if isinstance(item, InputError):
            return item
        images.append(item)
    pixels, labels, indices, corrupt = zip(*images, strict=True)
    return Batch(
        torch.stack(pixels), torch.tensor(labels), torch.tensor(indices), [pair for c in corrupt for pair in c]
    )


class Augment:
    """Random crop resized to a square, horizontal flip, and jitter of brightness, contrast and saturation.

    The random numbers are the same as those of torchvision's `RandomResizedCrop`, `RandomHorizontalFlip` and
    `ColorJitter`, in this order. If `reduced` is False, the result is bit-identical to the result of these
    transforms.

    Args:
        crop: minimum area of a crop, as a fraction of the area of the image.
        flip: whether to flip each image with probability 1/2.
        jitter: maximum relative change of brightness, contrast and saturation.
        ratio: minimum and maximum aspect ratio of a crop (width divided by height).
        reduced: whether to decode a JPEG at 1/2, 1/4 or 1/8 of its size, which is faster, if the crop is then still at
            least as large as the result.
    """

    def __init__(
        self,
        crop: float,
        flip: bool,
        jitter: float,
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        reduced: bool = True,
    ) -> None:
        self.crop, self.ratio, self.reduced = crop, ratio, reduced
        flips = [v2.RandomHorizontalFlip()] if flip else []
        self.after = v2.Compose([*flips, v2.ColorJitter(jitter, jitter, jitter)])

    def __call__(self, data: bytes, side: int) -> Tensor:
        """Decode and augment an image file.

        Args:
            data: contents of the file.
            side: side of the result in pixels.

        Returns:
            The augmented image, (3, side, side) uint8.

        Raises:
            CorruptImageError: the file is truncated, damaged or not an image.
        """
        width, height = image_size(data)
        top, left, rows, columns = self.box(width, height)
        pixels = decode_image(data, self.reduction(rows, columns, side))
        # `decode_image` ignores the reduction unless the image is a JPEG, so the actual scale may differ.
        scale_y, scale_x = pixels.shape[0] / height, pixels.shape[1] / width
        top, bottom = round(top * scale_y), round((top + rows) * scale_y)
        left, right = round(left * scale_x), round((left + columns) * scale_x)
        # Keep the channels last in memory, because torch resizes images in this layout three times as fast.
        image = torch.from_numpy(np.array(pixels[top:bottom, left:right], order="C")).permute(2, 0, 1)
        return self.after(F.resize(image, [side, side], antialias=True)).contiguous()

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return a random crop (top, left, height, width) of an image of the given size, all in pixels."""
        transform = v2.RandomResizedCrop(1, scale=(self.crop, 1.0), ratio=self.ratio)
        box = transform.make_params([torch.empty((3, height, width), device="meta")])
        return box["top"], box["left"], box["height"], box["width"]

    def reduction(self, rows: int, columns: int, side: int) -> int:
        """Return the reduction, 8, 4, 2 or 1, at which to decode an image.

        It is the largest one after which a crop of `rows` x `columns` pixels, measured at full size, still has at least
        `side` pixels per side.
        """
        if not self.reduced:
            return 1
        return next((r for r in (8, 4, 2) if min(rows, columns) >= r * (side + 1)), 1)


class CorruptImageList:
    """Text file that lists the corrupt images of a training run, with one line `location<TAB>reason` per image.

    All processes of a run write to the same file, and a resumed run appends to it.

    Args:
        file: path of the file. It is created when the first corrupt image is added.
        total: number of training images.
        budget: maximum fraction of corrupt images.
        location: function that returns where the image with a given index is stored.
    """

    def __init__(self, file: Path, total: int, budget: float, location: Callable[[int], str]) -> None:
        self.file = file
        self.total = total
        self.budget = budget
        self.location = location

    def add(self, corrupt: Iterable[Sequence]) -> None:
        """Add those of the given images to the file that it does not list yet.

        Args:
            corrupt: (index, reason) of each corrupt image.

        Raises:
            InputError: the file, to which all processes write, now lists more than the fraction `budget` of the images,
                or it cannot be written.
        """
        reasons = {self.location(index): " ".join(reason.split()) for index, reason in corrupt}
        if not reasons:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with (
                FileLock(self.file.with_name(f".{self.file.name}.lock")),
                self.file.open("a+", encoding="utf-8") as file,
            ):
                file.seek(0)
                listed = {line.partition("\t")[0] for line in file if line.endswith("\n")}
                new = {location: reason for location, reason in reasons.items() if location not in listed}
                file.write("".join(f"{location}\t{reason}\n" for location, reason in new.items()))
        except (OSError, NotImplementedError) as error:
            raise InputError(f"{self.file}: cannot be written ({error}); free disk space") from error
        if new and not listed:
            location, reason = next(iter(new.items()))
            text = "replaced a corrupt image: %s: %s; all replaced images are listed in %s"
            log.warning(text, location, reason, self.file)
        where = f"; they are listed in {self.file}, remove it after repairing them"
        require_budget(len(listed) + len(new), self.total, self.budget, where)


def require_budget(corrupt: int, total: int, budget: float, where: str = "") -> None:
    """Check that at most the fraction `budget` of the images is corrupt.

    Args:
        corrupt: number of missing or corrupt images.
        total: number of images.
        budget: maximum fraction of missing or corrupt images.
        where: part of the error message that says in which file the corrupt images are listed.

    Raises:
        InputError: more than this fraction of the images is corrupt.
    """
    if corrupt > budget * total:
        raise InputError(
            f"{corrupt} of {total} images ({corrupt / total:.3%}) are missing or corrupt, more than "
            f"data.max_corrupt_fraction={budget:g} allows{where}; repair or remove them (for GLDv2, superglobal "
            "prepare-gldv2 checks all images), or raise data.max_corrupt_fraction"
        )


def check_training_images(
    lists: Sequence[TrainList],
    root: str | Path,
    table: str | None,
    tars: str | Path | None,
    budget: float,
    cache: Path | None = None,
) -> tuple[list[CorruptImages], np.ndarray]:
    """Find the missing and corrupt training images before the training starts.

    If `superglobal prepare-gldv2` has written an index, read the corrupt images from the index. Otherwise, check every
    image file.

    Args:
        lists: parts of one training list, for example the training images and the held-out images.
        root: folder that contains the training list and the index.
        table: file name of the training list; None for images of your own, which have no index.
        tars: folder of the tar files if the images are read from tar files; None for the folder tree.
        budget: maximum fraction of missing or corrupt images.
        cache: file that keeps the results of `check_images` for later calls; None to read all files.

    Returns:
        The corrupt images of each list, and a hash of the contents of each image of all lists, (N,) uint64. The hash of
        a corrupt image is 0.

    Raises:
        InputError: too many images are corrupt, the index does not match the training list or the tar files, or the
            images are in tar files and there is no index.
    """
    root, where = Path(root), ""
    command = None if table is None else prepare_command(root, table, tars)
    if table is not None and (tars is not None or index_path(root, table).exists()):
        index = load_index(root, table, tars)
        where = f", according to {index_path(root, table)} (after repairing them, update it: {command})"
        corrupt = [index.corrupt_among(images.ids) for images in lists]
        contents = [index.codes_of(images.ids) for images in lists]
    else:
        checked = [_check_files(images, command, cache) for images in lists]
        corrupt, contents = [pairs for pairs, _ in checked], [codes for _, codes in checked]
    problems = [(images.location(i), why) for images, pairs in zip(lists, corrupt, strict=True) for i, why in pairs]
    total = sum(len(images) for images in lists)
    try:
        require_budget(len(problems), total, budget, where)
    except InputError as error:
        lines = problem_lines("training images", total, problems)
        hint = [how_to_get_gldv2_train(root)] if table is not None and 2 * len(problems) > total else []
        raise InputError("\n".join([NOTHING_COMPUTED, *lines, str(error), *hint])) from None
    return corrupt, np.concatenate(contents)


def _check_files(images: TrainList, command: str | None, cache: Path | None) -> tuple[CorruptImages, np.ndarray]:
    """Check each file of a training list in the folder tree.

    Args:
        images: training list to check.
        command: command that writes an index, to be recommended in a log message; None for no recommendation.
        cache: file that keeps the results of `check_images`; None to read all files.

    Returns:
        The missing and corrupt images, and a hash of the contents of each image, (N,) uint64.
    """
    if command is not None and len(images) > _SLOW_CHECK:
        log.info(
            "checking %d images, which may take minutes; to check them once for all runs, write an index: %s",
            len(images),
            command,
        )
    paths = [images.path(i) for i in range(len(images))]
    report = check_images(paths, cache=cache)
    reasons = dict(report.problems)
    corrupt = [(i, reasons[path]) for i, path in enumerate(paths) if path in reasons]
    return corrupt, signature_codes(report.signatures)
