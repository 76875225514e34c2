"""Training on photos some of which are bad: stand-ins, the file of bad photos, the budget before and during a run."""

from __future__ import annotations

import multiprocessing
import pickle
import re
import shutil
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

from superglobal.data.datamodules import ImageLoader
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

TABLE = "train_clean.csv"


@pytest.fixture
def root(toy_data, tmp_path) -> Path:
    """A copy of the toy set's training photos and clean list."""
    shutil.copytree(toy_data / "toy" / "gldv2" / "train", tmp_path / "gldv2" / "train")
    shutil.copy(toy_data / "toy" / "gldv2" / TABLE, tmp_path / "gldv2")
    return tmp_path / "gldv2"


def side(epoch: int) -> int:
    return 32 + 16 * epoch


def dataset(photos: TrainList, seed: int = 0) -> TrainingDataset:
    return TrainingDataset(photos, Augment(0.3, True, 0.2), side, seed)


def same(one: TrainingImage, other: TrainingImage) -> bool:
    return torch.equal(one.image, other.image) and one[1:] == other[1:]


def test_a_photo_depends_on_seed_epoch_and_index_alone(root):
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


def test_tree_and_tar_files_give_the_same_photos_to_any_workers(root, tmp_path):
    photos = read_train(root)
    folder = make_tars(read_train(root, min_images=1), tmp_path / "tars")
    prepare(root, tars=folder, workers=1)
    packed = dataset(read_train(root, tars=folder))
    packed[(0, 0)]  # a tar file is open before the workers are made
    places = [(0, index) for index in range(len(photos))]
    for workers in (0, 2):
        batches = DataLoader(packed, 8, sampler=places, num_workers=workers, collate_fn=collate)
        assert all(
            same(TrainingImage(x, y, i, []), dataset(photos)[(0, i)])
            for b in batches
            for x, y, i in zip(b.images, b.labels.tolist(), b.indices.tolist(), strict=True)
        )


def missing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def page(path: Path) -> None:
    path.write_bytes(b"<html>404</html>")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [(missing, "missing"), (empty, "empty"), (truncated, "truncated"), (page, "not an image"), (break_scan, "damaged")],
)
def test_another_photo_stands_in_for_a_bad_one_the_same_after_a_restart(root, harm: Callable, reason):
    photos = read_train(root)
    harm(photos.path(7))
    shown = dataset(photos)[(0, 7)]
    assert shown.index != 7
    assert shown.label == photos.labels[shown.index]
    ((index, why),) = shown.corrupt
    assert index == 7
    assert reason in why
    assert same(shown, dataset(read_train(root))[(0, 7)])
    assert len({dataset(photos)[(epoch, 7)].index for epoch in range(6)}) > 1


def test_bad_stand_ins_are_reported_too_and_only_then_is_there_an_end(root):
    photos = read_train(root)
    for index in range(0, len(photos), 2):
        photos.path(index).unlink()
    shown = [dataset(photos)[(0, index)] for index in range(len(photos))]
    assert all(photo.index % 2 for photo in shown)
    assert max(len(photo.corrupt) for photo in shown) > 1
    assert all(index % 2 == 0 for photo in shown for index, _ in photo.corrupt)
    for index in range(1, len(photos), 2):
        photos.path(index).unlink()
    error = dataset(photos)[(0, 3)]
    assert isinstance(error, InputError)
    assert f"image cannot be read: {photos.path(3)}: missing" in str(error)
    assert "superglobal prepare-gldv2" in str(error)
    assert collate([shown[0], error]) is error


def test_a_batch_goes_where_lightning_moves_it(root):
    photos = read_train(root)
    photos.path(2).unlink()
    batch = collate([dataset(photos)[(0, index)] for index in range(4)])
    assert batch.images.shape == (4, 3, 32, 32)
    assert (batch.images.dtype, batch.labels.dtype, batch.indices.dtype) == (torch.uint8, torch.int64, torch.int64)
    assert batch.corrupt == [(2, "missing")]
    moved = move_data_to_device(batch, torch.device("cpu"))
    assert isinstance(moved, Batch)
    assert moved.corrupt == [(2, "missing")]
    assert torch.equal(moved.labels, photos_labels(photos, batch))


def photos_labels(photos: TrainList, batch: Batch) -> torch.Tensor:
    return torch.from_numpy(photos.labels[batch.indices.numpy()]).long()


class Slow(Dataset):
    """A hundred numbers, each after a while."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        time.sleep(0.02)
        return index


def test_a_dead_worker_is_told_where_a_batch_is_waited_for_and_nowhere_else():
    before = set(multiprocessing.active_children())
    batches = iter(ImageLoader(Slow(), batch_size=None, num_workers=1))
    assert next(batches) == 0
    (worker,) = set(multiprocessing.active_children()) - before
    worker.kill()
    begin = time.monotonic()
    while time.monotonic() < begin + 0.5:  # where torch's handler would raise
        pass
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(batches)
    assert time.monotonic() < begin + 15


@pytest.fixture
def bad_photos(tmp_path) -> Callable[..., CorruptImageList]:
    return partial(CorruptImageList, tmp_path / "run" / "corrupt_images.txt", location="photo {}".format)


def test_bad_photos_are_listed_once_over_restarts(bad_photos, caplog):
    listed = bad_photos(total=1000, budget=0.01)
    listed.add([])
    assert not listed.file.exists()
    listed.add([(3, "missing"), (3, "missing"), (5, "damaged\theader\n(x)")])
    assert "photo 3: missing" in caplog.text
    bad_photos(total=1000, budget=0.01).add([[5, "damaged"], [6, "missing"]])
    assert listed.file.read_text() == "photo 3\tmissing\nphoto 5\tdamaged header (x)\nphoto 6\tmissing\n"
    assert len(caplog.records) == 1


def test_one_photo_more_than_the_budget_ends_the_run(bad_photos):
    listed = bad_photos(total=1000, budget=0.002)
    listed.add([(1, "missing"), (2, "missing")])
    listed.add([(1, "missing"), (2, "missing")])
    with pytest.raises(InputError) as caught:
        bad_photos(total=1000, budget=0.002).add([(3, "missing")])
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
        bad_photos(total=10, budget=0).file.unlink() or bad_photos(total=10, budget=0).add([(1, "missing")])


def test_processes_that_add_at_the_same_time_lose_nothing_and_list_nothing_twice(bad_photos):
    listed = bad_photos(total=1000, budget=1)
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
def required(root):
    def call(budget: float = 0.1, tars: Path | None = None):
        lists = split_landmarks(read_train(root, tars=tars), 0.25, seed=0)
        return lists, *check_training_images(lists, root, TABLE, tars, budget)

    return call


def test_the_check_beforehand_is_the_same_with_an_index_and_without(root, tmp_path, required):
    (train, held), bad, codes = required(0)
    assert bad == [[], []]
    folder = make_tars(read_train(root, min_images=1), tmp_path / "tars")
    with pytest.raises(InputError, match=re.escape(f"--root {root} --table {TABLE} --tars {folder}")):
        required(tars=folder)
    prepare(root, tars=folder, workers=1)
    _, again, indexed = required(0, folder)
    assert again == bad
    assert np.array_equal(indexed, codes)
    assert codes.all()
    train.path(4).unlink()
    held.path(1).write_bytes(b"")
    (root / "train_clean.index.npz").unlink()
    expected = [[(4, "missing")], [(1, "empty file (0 bytes)")]]
    _, looked, other = required()
    prepare(root, workers=1)
    assert (looked, other) == (expected, other)
    _, again, indexed = required()
    assert again == expected
    assert np.array_equal(indexed, other)
    assert np.flatnonzero(other != codes).tolist() == np.flatnonzero(other == 0).tolist() == [4, len(train) + 1]


@pytest.mark.parametrize("indexed", [False, True])
def test_more_than_the_budget_ends_it_before_anything_is_computed(root, required, indexed):
    lists, *_ = required()
    train = lists[0]
    total = sum(len(part) for part in lists)
    for index in range(10, 18):
        train.path(index).unlink()
    train.path(20).write_bytes(b"x")
    if indexed:
        prepare(root, workers=1)
    assert required(9 / total)
    with pytest.raises(InputError) as caught:
        required(8.5 / total)
    for word in (f"8 of {total} images missing, 1 corrupt", "... and 4 more", "data.max_corrupt_fraction"):
        assert word in str(caught.value)


def test_a_set_without_photos_is_counted(root, required):
    shutil.rmtree(root / "train")
    total = len(read_train(root))
    with pytest.raises(InputError, match=f"{total} of {total} images missing"):
        required()
