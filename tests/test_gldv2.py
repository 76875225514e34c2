"""GLDv2's lists, the hold-out of whole landmarks, and an order that depends on seed and epoch alone."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from superglobal.data.datamodules import TrainingDataModule
from superglobal.data.gldv2 import TrainList, read_train, split_landmarks
from superglobal.data.samplers import EpochSampler
from superglobal.errors import InputError

A, B, C, D, E = (f"{digit}0123456789abcde"[:16] for digit in "abcde")


def write(root: Path, name: str, text: str) -> Path:
    (root / name).write_text(text)
    return root


def test_both_lists_read_alike(tmp_path):
    write(tmp_path, "train_clean.csv", f"landmark_id,images\n900,{C} {A}\n7,{B} {D}\n55,{E}\n")
    write(tmp_path, "train.csv", f"id,url,landmark_id\n{A},http://x/a.jpg,900\n{E},u,55\n{D},u,7\n{C},u,900\n{B},u,7\n")
    clean, full = read_train(tmp_path), read_train(tmp_path, "train.csv")
    # Landmark 55 has one photo only; labels follow the landmarks' numbers, photos their names within one.
    assert clean.landmarks.tolist() == [7, 900]
    assert clean.ids.tolist() == [name.encode() for name in (B, D, A, C)]
    assert clean.labels.tolist() == [0, 0, 1, 1]
    assert clean.path(2) == tmp_path / "train" / A[0] / A[1] / A[2] / f"{A}.jpg"
    assert full.digest() == clean.digest()
    assert len(read_train(tmp_path, "train.csv", min_images=1)) == 5


def test_a_list_saved_by_a_spreadsheet_and_a_very_long_line(tmp_path):
    names = " ".join(f"{i:016x}" for i in range(9000))
    (tmp_path / "train_clean.csv").write_text(f"landmark_id,images\n7,{names}\n8,\n", encoding="utf-8-sig")
    photos = read_train(tmp_path)
    assert len(photos) == 9000
    assert photos.landmarks.tolist() == [7]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("landmark,images\n", ["columns", "landmark_id"]),
        (f"landmark_id,images\nseven,{A}\n", ["line 2", "'seven'", "number"]),
        ("landmark_id,images\n7,../../etc/passwd\n", ["line 2", "16 hexadecimal"]),
        (f"landmark_id,images\n7,{A} {B}\n8,{A} {C}\n", [A, "twice"]),
        (f"landmark_id,images\n7,{A}\n", ["no landmark has 2", "data.min_images"]),
        ("landmark_id,images\n", ["lists no photos"]),
        (f"landmark_id,images\n99999999999999999999,{A}\n", ["line 2", "number"]),
        ("", ["columns"]),
    ],
)
def test_bad_lists_are_named(tmp_path, text, words):
    write(tmp_path, "train_clean.csv", text)
    with pytest.raises(InputError) as caught:
        read_train(tmp_path)
    for word in ["train_clean.csv", *words]:
        assert word in str(caught.value)


def test_a_missing_list_tells_layout_address_and_the_toy_set(tmp_path):
    with pytest.raises(InputError) as caught:
        read_train(tmp_path)
    for word in (str(tmp_path / "train_clean.csv"), "a/b/c/<id>.jpg", "https://", "scripts/make_toy_data.py"):
        assert word in str(caught.value)


def photos_of(counts: list[int]) -> TrainList:
    labels = np.repeat(np.arange(len(counts)), counts)
    ids = np.array([f"{i:016x}".encode() for i in range(len(labels))])
    return TrainList(Path("train"), ids, labels, 10 * np.arange(len(counts)))


def test_whole_landmarks_are_held_out_by_seed():
    photos = photos_of([3] * 50)
    train, held = split_landmarks(photos, 0.2, seed=4)
    assert len(held.landmarks) == 10
    assert len(train.landmarks) == 40
    assert not set(train.landmarks) & set(held.landmarks)
    assert sorted([*train.ids, *held.ids]) == sorted(photos.ids)
    for part in (train, held):
        assert np.array_equal(np.unique(part.labels), np.arange(len(part.landmarks)))
        before = dict(zip(photos.ids, photos.landmarks[photos.labels], strict=True))
        assert [before[i] for i in part.ids] == part.landmarks[part.labels].tolist()
    assert split_landmarks(photos, 0.2, seed=4)[1].digest() == held.digest()
    assert split_landmarks(photos, 0.2, seed=5)[1].digest() != held.digest()


def test_an_epoch_is_a_permutation_of_its_own():
    sampler = EpochSampler(100, seed=3)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        pairs = list(sampler)
        assert {e for e, _ in pairs} == {epoch}
        assert sorted(i for _, i in pairs) == list(range(100))
        orders.append([i for _, i in pairs])
    assert len({tuple(order) for order in orders}) == 3
    sampler.set_epoch(1)
    assert [i for _, i in sampler] == orders[1]
    assert [i for _, i in EpochSampler(100, seed=4)] != orders[0]


@pytest.fixture
def module(tmp_path):
    photos = photos_of([4, 4])
    photos = TrainList(tmp_path, photos.ids, photos.labels, photos.landmarks)
    rng = np.random.default_rng(0)
    for i in range(len(photos)):
        photos.path(i).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(photos.path(i)), rng.integers(0, 256, (40, 56, 3), dtype=np.uint8))

    def make(num_workers: int, seed: int = 0) -> TrainingDataModule:
        return TrainingDataModule(photos, 24, 0.3, 0.2, 3, num_workers, seed)

    return make


def test_augmentation_depends_on_seed_epoch_and_photo_alone(module):
    torch.manual_seed(1)
    here = [(x.clone(), y.tolist()) for x, y in module(0).train_dataloader()]
    torch.manual_seed(2)
    there = [(x.clone(), y.tolist()) for x, y in module(2).train_dataloader()]
    assert len(here) == 2  # 8 photos in batches of 3; the rest waits for the next order
    assert here[0][0].shape == (3, 3, 24, 24)
    assert here[0][0].dtype == torch.uint8
    for (x, y), (other, label) in zip(here, there, strict=True):
        assert torch.equal(x, other)
        assert y == label
    data = module(0).photos
    assert not torch.equal(data[(0, 1)][0], data[(1, 1)][0])
    assert not torch.equal(data[(0, 1)][0], module(0, seed=1).photos[(0, 1)][0])


def test_reading_a_photo_leaves_the_random_state_alone(module):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    module(0).photos[(0, 0)]
    assert torch.equal(torch.get_rng_state(), before)
