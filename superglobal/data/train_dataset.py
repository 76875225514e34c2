"""Training photos, with a stand-in for each one that cannot be read."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from superglobal.data.catalogue import how_to_get_gldv2_train
from superglobal.data.evaluation_set import NOTHING_COMPUTED, problem_lines
from superglobal.data.gldv2 import TrainList
from superglobal.data.image_checks import check_images
from superglobal.data.image_index import index_path, load_index, prepare_command, signature_codes
from superglobal.data.images import CorruptImageError, decode_image, image_size
from superglobal.errors import InputError

_STAND_INS = 10
Bad = list[tuple[int, str]]
"""Photos that cannot be read: index and reason each."""


class TrainingImage(NamedTuple):
    """A photo as the network sees it.

    Attributes:
        image: (3, S, S) uint8.
        label: its class.
        index: which photo it is, a stand-in perhaps.
        bad: photos that it stands in for.
    """

    image: Tensor
    label: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks a photo for
    bad: Bad


class Batch(NamedTuple):
    """Training images: images (B, 3, S, S) uint8, labels (B,) int64, indices (B,) int64, `TrainingImage.bad` of all."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    bad: Bad


class TrainingDataset(Dataset):
    """Photos by (epoch, index), augmented; every random draw depends on (seed, epoch, index) alone.

    In the place of a photo that cannot be read comes one drawn among all, so that a step has its full batch and a run
    of weeks outlives a damaged file. Where ten in a row cannot be read an InputError comes: raised inside a worker it
    would arrive wrapped in the worker's traceback.

    Args:
        photos: the training list.
        augment: (a photo's file, S) -> (3, S, S) uint8, drawing from torch's generator.
        side: epoch -> S, in pixels.
        seed: of augmentation and stand-ins.
    """

    def __init__(
        self, photos: TrainList, augment: Callable[[bytes, int], Tensor], side: Callable[[int], int], seed: int
    ) -> None:
        self.photos = photos
        self.augment = augment
        self.side = side
        self.seed = seed

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, place: tuple[int, int]) -> TrainingImage | InputError:
        epoch, asked = place
        bad: Bad = []
        index = asked
        for attempt in range(1 + _STAND_INS):
            if attempt:
                index = int(np.random.default_rng([self.seed, epoch, asked, attempt]).integers(len(self)))
            try:
                image = self._augmented(epoch, asked, self.photos.read(index))
            except CorruptImageError as error:
                bad.append((index, str(error)))
            else:
                return TrainingImage(image, int(self.photos.labels[index]), index, bad)
        first = f"{self.photos.location(asked)}: {bad[0][1]}"
        return InputError(
            f"image cannot be read: {first}; nor could {_STAND_INS} others in its stead: most photos are missing or "
            "damaged, superglobal prepare-gldv2 lists them"
        )

    def _augmented(self, epoch: int, asked: int, data: bytes) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([self.seed, epoch, asked]).generate_state(1)[0]))
            return self.augment(data, self.side(epoch))


def collate(photos: list[TrainingImage | InputError]) -> Batch | InputError:
    """A batch, or what makes it impossible."""
    sound: list[TrainingImage] = []
    for photo in photos:
        if isinstance(photo, InputError):
            return photo
        sound.append(photo)
    images, labels, indices, bad = zip(*sound, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(indices), [one for few in bad for one in few])


class Augment:
    """Random crop of any place, size and shape, resized to a square; mirror image; brightness, contrast, saturation.

    The draws are those of torchvision's `RandomResizedCrop`, `RandomHorizontalFlip` and `ColorJitter`, in that order,
    from torch's generator: without reduced decoding the result is theirs, bit for bit.

    Args:
        crop: smallest share of the photo's area that a crop covers.
        flip: mirror every other photo.
        jitter: strength of the changes of brightness, contrast and saturation.
        ratio: narrowest and widest crop, width over height.
        reduced: decode a JPEG at 1/2, 1/4 or 1/8 of its size where the crop still has as many pixels as asked for.
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
        changes = [v2.RandomHorizontalFlip()] if flip else []
        self.after = v2.Compose([*changes, v2.ColorJitter(jitter, jitter, jitter)])

    def __call__(self, data: bytes, side: int) -> Tensor:
        """(3, side, side) uint8 from an image file's bytes.

        Raises:
            CorruptImageError: they are not a whole image.
        """
        width, height = image_size(data)
        top, left, rows, columns = self.box(width, height)
        pixels = decode_image(data, self.reduction(rows, columns, side))
        # As it was decoded: a photo that is no JPEG comes in full size.
        down, across = pixels.shape[0] / height, pixels.shape[1] / width
        top, bottom = round(top * down), round((top + rows) * down)
        left, right = round(left * across), round((left + columns) * across)
        # A view with the channels last, which torch resizes three times as fast as a copy with them first.
        image = torch.from_numpy(np.array(pixels[top:bottom, left:right], order="C")).permute(2, 0, 1)
        return self.after(F.resize(image, [side, side], antialias=True)).contiguous()

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(top, left, rows, columns) of a random crop, in pixels of the whole photo."""
        draw = v2.RandomResizedCrop(1, scale=(self.crop, 1.0), ratio=self.ratio)
        box = draw.make_params([torch.empty((3, height, width), device="meta")])
        return box["top"], box["left"], box["height"], box["width"]

    def reduction(self, rows: int, columns: int, side: int) -> int:
        """The largest of 8, 4, 2, 1 that leaves a crop of (rows, columns) pixels at least `side` a side."""
        if not self.reduced:
            return 1
        return next((r for r in (8, 4, 2) if min(rows, columns) >= r * (side + 1)), 1)


log = logging.getLogger(__name__)
_MANY = 50_000  # photos that take minutes to check on a disk that turns


class CorruptImageList:
    """The file of a run's bad photos, `place<TAB>reason` a line, each photo once, whatever the processes and restarts.

    Args:
        file: made when the first one comes.
        total: photos of the run.
        budget: the largest share of them that may be bad.
        place: index of a photo -> where it is.
    """

    def __init__(self, file: Path, total: int, budget: float, place: Callable[[int], str]) -> None:
        self.file = file
        self.total = total
        self.budget = budget
        self.place = place

    def add(self, bad: Iterable[Sequence]) -> None:
        """List the photos that are not listed yet.

        Args:
            bad: (index, reason) each.

        Raises:
            InputError: more than the budget are listed, by this process or another one.
        """
        found = {self.place(index): " ".join(reason.split()) for index, reason in bad}
        if not found:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a+", encoding="utf-8") as file:
                fcntl.lockf(file, fcntl.LOCK_EX)  # until the file is closed
                file.seek(0)
                listed = {line.partition("\t")[0] for line in file if line.endswith("\n")}
                new = {place: reason for place, reason in found.items() if place not in listed}
                file.write("".join(f"{place}\t{reason}\n" for place, reason in new.items()))
        except OSError as error:
            raise InputError(f"{self.file}: cannot be written ({error.strerror}); free space") from error
        if new and not listed:
            place, reason = next(iter(new.items()))
            log.warning(
                "a photo cannot be read, another one stands in: %s: %s; all are listed in %s", place, reason, self.file
            )
        require_budget(
            len(listed) + len(new),
            self.total,
            self.budget,
            f"; they are listed in {self.file}: remove it when they are mended",
        )


def require_budget(bad: int, total: int, budget: float, where: str = "") -> None:
    """InputError if more than `budget * total` photos are bad; `where` goes into the message."""
    if bad > budget * total:
        raise InputError(
            f"{bad} of {total} photos ({bad / total:.3%}) are missing or cannot be read, more than data.max_corrupt="
            f"{budget:g} allows{where}; mend them (superglobal prepare-gldv2 checks all), or raise data.max_corrupt"
        )


def check_training_images(
    lists: Sequence[TrainList], root: str | Path, table: str, tars: str | Path | None, budget: float
) -> tuple[list[Bad], np.ndarray]:
    """Check every photo before anything is computed: by the index where there is one, else by looking at each file.

    Args:
        lists: photos of one table, training and held-out ones, say.
        root, table: where the index of the table is.
        tars: folder of the tar files if the photos are read from them.
        budget: the largest share that may be missing or unreadable.

    Returns:
        (index, reason) of the bad photos of each list, and (N,) uint64 codes of the contents of all photos of all
        lists, 0 for a bad one.

    Raises:
        InputError: more than the budget are bad, the index does not fit, or there is none for the tar files.
    """
    root, where = Path(root), ""
    if tars is not None or index_path(root, table).exists():
        index = load_index(root, table, tars)
        where = (
            f", by {index_path(root, table)} (when they are mended, once more: {prepare_command(root, table, tars)})"
        )
        bad = [index.corrupt_among(photos.ids) for photos in lists]
        contents = [index.codes_of(photos.ids) for photos in lists]
    else:
        checked = [_check(photos, prepare_command(root, table, tars)) for photos in lists]
        bad, contents = [found for found, _ in checked], [codes for _, codes in checked]
    problems = [(photos.location(i), reason) for photos, found in zip(lists, bad, strict=True) for i, reason in found]
    total = sum(len(photos) for photos in lists)
    try:
        require_budget(len(problems), total, budget, where)
    except InputError as error:
        lines = problem_lines("training photos", total, problems)
        hint = [how_to_get_gldv2_train(root)] if 2 * len(problems) > total else []
        raise InputError("\n".join([NOTHING_COMPUTED, *lines, str(error), *hint])) from None
    return bad, np.concatenate(contents)


def _check(photos: TrainList, command: str) -> tuple[Bad, np.ndarray]:
    """Bad photos and content codes by looking at every file of the tree."""
    if len(photos) > _MANY:
        log.info(
            "looking at %d photos, which may take a while; this does it once for all runs: %s", len(photos), command
        )
    paths = [photos.path(i) for i in range(len(photos))]
    report = check_images(paths)
    reasons = dict(report.problems)
    bad = [(i, reasons[path]) for i, path in enumerate(paths) if path in reasons]
    return bad, signature_codes(report.signatures)
