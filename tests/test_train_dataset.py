"""Training images some of which are corrupt: replacements, the list of corrupt images and their maximum number."""

from __future__ import annotations

import multiprocessing
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning.utilities import move_data_to_device
from runs import ROOT, environment
from sets import break_scan, make_tars
from torch.utils.data import DataLoader, Dataset

from superglobal.data import datamodules
from superglobal.data.datamodules import ImageLoader, init_worker
from superglobal.data.gldv2 import TrainList, read_train, split_landmarks
from superglobal.data.prepare_gldv2 import prepare
from superglobal.data.train_dataset import (
    Augment,
    Batch,
    CorruptImageList,
    TrainingDataset,
    TrainingImage,
    check_training_images,
    collate,
)
from superglobal.errors import InputError
from superglobal.training import checkpointing
from superglobal.training.callbacks import NonFiniteGuard

TABLE = "train_clean.csv"


@pytest.fixture
def root(toy_data, tmp_path) -> Path:
    """Copy the training images and the clean list of the toy set."""
    shutil.copytree(toy_data / "toy" / "gldv2" / "train", tmp_path / "gldv2" / "train")
    shutil.copy(toy_data / "toy" / "gldv2" / TABLE, tmp_path / "gldv2")
    return tmp_path / "gldv2"


def side(epoch: int) -> int:
    """Return the image size of an epoch."""
    return 32 + 16 * epoch


def dataset(photos: TrainList, seed: int = 0) -> TrainingDataset:
    """Return a training dataset."""
    return TrainingDataset(photos, Augment(0.3, True, 0.2), side, seed)


def same(first: TrainingImage, second: TrainingImage) -> bool:
    """Return whether two training images are equal."""
    return torch.equal(first.image, second.image) and first[1:] == second[1:]


def test_an_image_depends_only_on_seed_epoch_and_index(root):
    photos = read_train(root)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = dataset(photos)[(1, 5)]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(first, pickle.loads(pickle.dumps(dataset(photos)))[(1, 5)])
    assert (first.label, first.index, first.corrupt) == (int(photos.labels[5]), 5, [])
    assert (first.image.shape, first.image.dtype) == ((3, 48, 48), torch.uint8)
    assert dataset(photos)[(0, 5)].image.shape == (3, 32, 32)
    assert not torch.equal(first.image, dataset(photos, seed=1)[(1, 5)].image)


def test_folders_and_tar_files_give_the_same_images_with_any_workers(root, tmp_path):
    photos = read_train(root)
    folder = make_tars(read_train(root, min_images=1), tmp_path / "tars")
    prepare(root, tars=folder, workers=1)
    packed = dataset(read_train(root, tars=folder))
    packed[(0, 0)]  # a tar file is open before the workers are started
    keys = [(0, index) for index in range(len(photos))]
    for workers in (0, 2):
        batches = DataLoader(packed, 8, sampler=keys, num_workers=workers, collate_fn=collate)
        assert all(
            same(TrainingImage(x, y, i, []), dataset(photos)[(0, i)])
            for b in batches
            for x, y, i in zip(b.images, b.labels.tolist(), b.indices.tolist(), strict=True)
        )


def missing(path: Path) -> None:
    """Remove a file."""
    path.unlink()


def empty(path: Path) -> None:
    """Empty a file."""
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    """Remove the last 200 bytes of a file."""
    path.write_bytes(path.read_bytes()[:-200])


def page(path: Path) -> None:
    """Replace a file by a web page."""
    path.write_bytes(b"<html>404</html>")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(missing, "missing"), (empty, "empty"), (truncated, "truncated"), (page, "not an image"), (break_scan, "damaged")],
)
def test_corrupt_images_have_the_same_replacement_after_a_restart(root, damage: Callable, reason):
    photos = read_train(root)
    damage(photos.path(7))
    image = dataset(photos)[(0, 7)]
    assert image.index != 7
    assert image.label == photos.labels[image.index]
    ((index, problem),) = image.corrupt
    assert index == 7
    assert reason in problem
    assert same(image, dataset(read_train(root))[(0, 7)])
    assert len({dataset(photos)[(epoch, 7)].index for epoch in range(6)}) > 1


def test_corrupt_replacements_are_reported_and_replaced_while_possible(root):
    photos = read_train(root)
    for index in range(0, len(photos), 2):
        photos.path(index).unlink()
    images = [dataset(photos)[(0, index)] for index in range(len(photos))]
    assert all(image.index % 2 for image in images)
    assert max(len(image.corrupt) for image in images) > 1
    assert all(index % 2 == 0 for image in images for index, _ in image.corrupt)
    for index in range(1, len(photos), 2):
        photos.path(index).unlink()
    error = dataset(photos)[(0, 3)]
    assert isinstance(error, InputError)
    assert f"image cannot be read: {photos.path(3)}: missing" in str(error)
    assert "superglobal prepare-gldv2" in str(error)
    assert collate([images[0], error]) is error


def test_lightning_moves_all_tensors_of_a_batch(root):
    photos = read_train(root)
    photos.path(2).unlink()
    batch = collate([dataset(photos)[(0, index)] for index in range(4)])
    assert batch.images.shape == (4, 3, 32, 32)
    assert (batch.images.dtype, batch.labels.dtype, batch.indices.dtype) == (torch.uint8, torch.int64, torch.int64)
    assert batch.corrupt == [(2, "missing")]
    moved = move_data_to_device(batch, torch.device("cpu"))
    assert isinstance(moved, Batch)
    assert moved.corrupt == [(2, "missing")]
    assert torch.equal(moved.labels, batch_labels(photos, batch))


def batch_labels(photos: TrainList, batch: Batch) -> torch.Tensor:
    """Return the labels of the images of a batch."""
    return torch.from_numpy(photos.labels[batch.indices.numpy()]).long()


class Slow(Dataset):
    """Dataset of 100 numbers that takes `seconds` for each."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        time.sleep(self.seconds)
        return index


def test_a_dead_worker_raises_an_error_only_when_a_batch_is_requested():
    before = set(multiprocessing.active_children())
    batches = iter(ImageLoader(Slow(), batch_size=None, num_workers=1))
    assert next(batches) == 0
    (worker,) = set(multiprocessing.active_children()) - before
    worker.kill()
    begin = time.monotonic()
    while time.monotonic() < begin + 0.5:  # the signal handler of torch would raise an error here
        pass
    with pytest.raises(InputError, match="exited unexpectedly"):
        list(batches)
    assert time.monotonic() < begin + 15


def limit_shared_memory(worker: int) -> None:
    """Let a worker create only small files, which include blocks of shared memory."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))


def test_too_little_shared_memory_raises_an_error(monkeypatch):
    monkeypatch.setattr(ImageLoader, "max_wait", 10.0)
    images = [torch.zeros(3, 300, 300)]
    loader = ImageLoader(images, batch_size=None, num_workers=1, worker_init_fn=limit_shared_memory)
    with pytest.raises(InputError, match="too little shared memory; lower trainer"):
        next(iter(loader))


def test_the_wait_for_a_worker_that_does_not_respond_is_limited_after_a_signal(monkeypatch, tmp_path):
    monkeypatch.setattr(datamodules, "_POLL_SECONDS", 0.1)
    before = set(multiprocessing.active_children())
    batches = iter(ImageLoader(Slow(60), batch_size=None, num_workers=1, worker_init_fn=init_worker))
    monkeypatch.setattr(checkpointing, "_MAX_WAIT", 0.5)
    monkeypatch.setattr(ImageLoader, "max_wait", 60)  # is restored after the test
    checkpointing.CheckpointCallback(tmp_path, None, None, NonFiniteGuard(1, tmp_path, str))._receive(
        signal.SIGTERM, None
    )
    with pytest.raises(InputError, match=r"sent no images for 0\.[56] seconds"):
        next(batches)
    assert set(multiprocessing.active_children()) <= before
    monkeypatch.setattr(ImageLoader, "max_wait", 60)
    assert next(iter(ImageLoader(Slow(0.2), batch_size=None, num_workers=1))) == 0


@pytest.fixture
def corrupt_list(tmp_path) -> Callable[..., CorruptImageList]:
    """Return a function that opens the list of corrupt images."""
    return partial(CorruptImageList, tmp_path / "run" / "corrupt_images.txt", location="photo {}".format)


def test_corrupt_images_are_listed_once_over_several_restarts(corrupt_list, caplog):
    listed = corrupt_list(total=1000, budget=0.01)
    listed.add([])
    assert not listed.file.exists()
    listed.add([(3, "missing"), (3, "missing"), (5, "damaged\theader\n(x)")])
    assert "photo 3: missing" in caplog.text
    corrupt_list(total=1000, budget=0.01).add([[5, "damaged"], [6, "missing"]])
    assert listed.file.read_text() == "photo 3\tmissing\nphoto 5\tdamaged header (x)\nphoto 6\tmissing\n"
    assert len(caplog.records) == 1


def test_more_corrupt_images_than_allowed_end_the_run(corrupt_list):
    listed = corrupt_list(total=1000, budget=0.002)
    listed.add([(1, "missing"), (2, "missing")])
    listed.add([(1, "missing"), (2, "missing")])
    with pytest.raises(InputError) as caught:
        corrupt_list(total=1000, budget=0.002).add([(3, "missing")])
    for word in (
        "3 of 1000",
        "0.300%",
        "0.002",
        str(listed.file),
        "superglobal prepare-gldv2",
        "data.max_corrupt_fraction",
    ):
        assert word in str(caught.value)
    with pytest.raises(InputError):
        listed.add([(1, "missing")])
    with pytest.raises(InputError):
        corrupt_list(total=10, budget=0).file.unlink() or corrupt_list(total=10, budget=0).add([(1, "missing")])


def test_concurrent_processes_list_every_corrupt_image_exactly_once(corrupt_list):
    listed = corrupt_list(total=1000, budget=1)
    code = (
        "import sys\nfrom pathlib import Path\nfrom superglobal.data.train_dataset import CorruptImageList\n"
        "bad = CorruptImageList(Path(sys.argv[1]), 1000, 1, 'photo {}'.format)\n"
        "for i in range(int(sys.argv[2]), 300): bad.add([(i, 'missing')])"
    )
    command = [sys.executable, "-c", code, str(listed.file)]
    processes = [subprocess.Popen([*command, str(start)], env=environment(PYTHONPATH=str(ROOT))) for start in (0, 100)]
    assert [process.wait(timeout=100) for process in processes] == [0, 0]
    lines = listed.file.read_text().splitlines()
    assert sorted(lines) == sorted(f"photo {i}\tmissing" for i in range(300))


@pytest.fixture
def check_images(root):
    """Return a function that splits the training list and checks its images."""

    def call(budget: float = 0.1, tars: Path | None = None):
        lists = split_landmarks(read_train(root, tars=tars), 0.25, seed=0)
        return lists, *check_training_images(lists, root, TABLE, tars, budget)

    return call


def test_the_check_before_training_is_the_same_with_and_without_an_index(root, tmp_path, check_images):
    (train, held), bad, codes = check_images(0)
    assert bad == [[], []]
    folder = make_tars(read_train(root, min_images=1), tmp_path / "tars")
    with pytest.raises(InputError, match=re.escape(f"--root {root} --table {TABLE} --tars {folder}")):
        check_images(tars=folder)
    prepare(root, tars=folder, workers=1)
    _, repeated, indexed = check_images(0, folder)
    assert repeated == bad
    assert np.array_equal(indexed, codes)
    assert codes.all()
    train.path(4).unlink()
    held.path(1).write_bytes(b"")
    (root / "train_clean.index.npz").unlink()
    expected = [[(4, "missing")], [(1, "empty file (0 bytes)")]]
    _, found, new_codes = check_images()
    prepare(root, workers=1)
    assert (found, new_codes) == (expected, new_codes)
    _, repeated, indexed = check_images()
    assert repeated == expected
    assert np.array_equal(indexed, new_codes)
    assert np.flatnonzero(new_codes != codes).tolist() == np.flatnonzero(new_codes == 0).tolist() == [4, len(train) + 1]


@pytest.mark.parametrize("indexed", [False, True])
def test_more_corrupt_images_than_allowed_are_an_error_before_training(root, check_images, indexed):
    lists, *_ = check_images()
    train = lists[0]
    total = sum(len(part) for part in lists)
    for index in range(10, 18):
        train.path(index).unlink()
    train.path(20).write_bytes(b"x")
    if indexed:
        prepare(root, workers=1)
    assert check_images(9 / total)
    with pytest.raises(InputError) as caught:
        check_images(8.5 / total)
    for word in (f"8 of {total} images missing, 1 corrupt", "... and 4 more", "data.max_corrupt_fraction"):
        assert word in str(caught.value)


def test_a_training_set_without_images_is_an_error(root, check_images):
    shutil.rmtree(root / "train")
    total = len(read_train(root))
    with pytest.raises(InputError, match=f"{total} of {total} images missing"):
        check_images()
