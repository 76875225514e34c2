"""Lists of GLDv2, and the split into training landmarks and held-out landmarks."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from superglobal.config import register
from superglobal.config.common import validate_config
from superglobal.config.training import TrainConfig
from superglobal.data.gldv2 import TrainList, read_train, split_landmarks
from superglobal.data.images import CorruptImageError
from superglobal.errors import InputError

A, B, C, D, E = (f"{digit}0123456789abcde"[:16] for digit in "abcde")


def write(root: Path, name: str, text: str) -> Path:
    """Write a text file and return its folder."""
    (root / name).write_text(text)
    return root


def test_clean_and_full_lists_are_read_identically(tmp_path):
    write(tmp_path, "train_clean.csv", f"landmark_id,images\n900,{C} {A}\n7,{B} {D}\n55,{E}\n")
    write(tmp_path, "train.csv", f"id,url,landmark_id\n{A},http://x/a.jpg,900\n{E},u,55\n{D},u,7\n{C},u,900\n{B},u,7\n")
    clean, full = read_train(tmp_path), read_train(tmp_path, "train.csv")
    # Landmark 55 has only one image. Labels are in the order of landmark ids, and the images of a label are in the
    # order of their names.
    assert clean.landmarks.tolist() == [7, 900]
    assert clean.ids.tolist() == [name.encode() for name in (B, D, A, C)]
    assert clean.labels.tolist() == [0, 0, 1, 1]
    assert clean.path(2) == tmp_path / "train" / A[0] / A[1] / A[2] / f"{A}.jpg"
    assert full.digest() == clean.digest()
    assert len(read_train(tmp_path, "train.csv", min_images=1)) == 5


def test_byte_order_marks_and_very_long_lines_are_read(tmp_path):
    names = " ".join(f"{i:016x}" for i in range(9000))
    (tmp_path / "train_clean.csv").write_text(f"landmark_id,images\n7,{names}\n8,\n", encoding="utf-8-sig")
    photos = read_train(tmp_path)
    assert len(photos) == 9000
    assert photos.landmarks.tolist() == [7]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("landmark,images\n", ["columns", "landmark_id"]),
        (f"landmark_id,images\nseven,{A}\n", ["line 2", "'seven'", "number"]),
        ("landmark_id,images\n7,../../etc/passwd\n", ["line 2", "16 hexadecimal"]),
        (f"landmark_id,images\n7,{A} {B}\n8,{A} {C}\n", [A, "twice"]),
        (f"landmark_id,images\n7,{A}\n", ["no landmark has 2", "data.min_images"]),
        ("landmark_id,images\n", ["contains no images"]),
        (f"landmark_id,images\n99999999999999999999,{A}\n", ["line 2", "number"]),
        ("", ["columns"]),
    ],
)
def test_invalid_lists_raise_errors_that_name_them(tmp_path, text, parts):
    write(tmp_path, "train_clean.csv", text)
    with pytest.raises(InputError) as caught:
        read_train(tmp_path)
    for part in ["train_clean.csv", *parts]:
        assert part in str(caught.value)


def test_the_error_for_a_missing_list_names_layout_url_and_toy_command(tmp_path):
    with pytest.raises(InputError) as caught:
        read_train(tmp_path)
    for word in (str(tmp_path / "train_clean.csv"), "a/b/c/<id>.jpg", "https://", "superglobal toy-data"):
        assert word in str(caught.value)


def test_quoted_fields_blanks_and_windows_line_ends_are_read(tmp_path):
    address = '"http://x/a,b ""c""\nd.jpg"'
    rows = f"id,url,landmark_id\r\n{A},{address},7\r\n\r\n{B},u,7\r\n"
    (tmp_path / "train.csv").write_bytes(rows.encode())
    write(tmp_path, "train_clean.csv", f'images,landmark_id\n"  {B}   {A} ",7\n')
    assert read_train(tmp_path, "train.csv").ids.tolist() == [A.encode(), B.encode()]
    assert read_train(tmp_path).digest() == read_train(tmp_path, "train.csv").digest()


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (f"{B},u,x9", ["line 3", "'x9'", "number"]),
        (f"{B},u,-9", ["line 3", "'-9'", "number"]),
        (f"{B},u,", ["line 3", "''", "number"]),
        (f"{B.upper()},u,7", ["line 3", B.upper(), "16 hexadecimal"]),
        (f"{B[1:]} ,u,7", ["line 3", "16 hexadecimal"]),
        (",u,7", ["line 3", "''", "16 hexadecimal"]),
        (f"{B},u", ["line 3", "''", "number"]),
        (f"{B},u,7,more", ["not a list of images", "columns"]),
        (f"{A},u,9", [A, "twice"]),
    ],
)
def test_invalid_lines_of_the_full_list_are_named(tmp_path, line, parts):
    write(tmp_path, "train.csv", f"id,url,landmark_id\n{A},u,7\n{line}\n{C},u,7\n")
    with pytest.raises(InputError) as caught:
        read_train(tmp_path, "train.csv")
    for part in ["train.csv", *parts]:
        assert part in str(caught.value)


def test_lists_that_are_not_text_files_raise_errors(tmp_path):
    (tmp_path / "train.csv").write_bytes(b"id,url,landmark_id\n\xff\xfe\x00,u,7\n")
    with pytest.raises(InputError, match=r"train.csv: not a"):
        read_train(tmp_path, "train.csv")
    (tmp_path / "train_clean.csv").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_train(tmp_path)


@given(
    st.dictionaries(st.integers(0, 10**18 - 1), st.integers(0, 4), min_size=1, max_size=30),
    st.integers(1, 3),
    st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_random_lists_are_read_correctly(tmp_path_factory, counts, min_images, seed):
    rng = random.Random(seed)
    root = tmp_path_factory.mktemp("list")
    names = [f"{rng.getrandbits(64):016x}" for _ in range(sum(counts.values()))]
    pairs = list(zip(names, [n for n, count in counts.items() for _ in range(count)], strict=True))
    kept = sorted((number, name) for name, number in pairs if counts[number] >= min_images)
    clean = "".join(f"{n},{' '.join(name for name, m in pairs if m == n)}\n" for n in counts)
    full = "".join(f"{name},u,{n}\n" for name, n in rng.sample(pairs, len(pairs)))
    write(root, "train_clean.csv", f"landmark_id,images\n{clean}")
    write(root, "train.csv", f"id,url,landmark_id\n{full}")
    for table in ("train_clean.csv", "train.csv"):
        if not kept:
            with pytest.raises(InputError):
                read_train(root, table, min_images)
            continue
        photos = read_train(root, table, min_images)
        assert list(zip(photos.landmarks[photos.labels].tolist(), photos.ids.tolist(), strict=True)) == [
            (number, name.encode()) for number, name in kept
        ]


def test_gldv2x_contains_all_images_of_the_clean_landmarks(tmp_path):
    write(tmp_path, "train_clean.csv", f"landmark_id,images\n7,{A} {B}\n8,\n")
    write(tmp_path, "train.csv", f"id,url,landmark_id\n{A},u,7\n{B},u,7\n{C},u,7\n{D},u,8\n{E},u,9\n")
    photos = read_train(tmp_path, "train.csv", min_images=1, classes_of="train_clean.csv")
    assert photos.landmarks.tolist() == [7]
    assert photos.ids.tolist() == [name.encode() for name in (A, B, C)]


def test_landmarks_of_evaluation_sets_are_left_out(tmp_path, caplog):
    write(tmp_path, "train_clean.csv", f"landmark_id,images\n7,{A} {B}\n8,{C} {D}\n")
    write(tmp_path, "overlap.txt", "# Revisited Oxford\n8  # Radcliffe Camera\n\n123\n124\n")
    photos = read_train(tmp_path, leave_out=tmp_path / "overlap.txt")
    assert photos.landmarks.tolist() == [7]
    assert "2 of 3 landmarks are not in" in caplog.text
    write(tmp_path, "overlap.txt", "8\neight\n")
    with pytest.raises(InputError, match=r"overlap.txt, line 2: 'eight'"):
        read_train(tmp_path, leave_out=tmp_path / "overlap.txt")
    write(tmp_path, "overlap.txt", "7\n8\n")
    with pytest.raises(InputError, match="no landmark"):
        read_train(tmp_path, leave_out=tmp_path / "overlap.txt")
    with pytest.raises(InputError, match=r"none.txt"):
        read_train(tmp_path, leave_out=tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.classes_of=some.csv", "data.classes_of=some.csv: expected one of train_clean.csv"),
        ("data.max_corrupt_fraction=0.2", "data.max_corrupt_fraction=0.2: expected a number from 0 to 0.1"),
        ("data.max_corrupt_fraction=-1", "data.max_corrupt_fraction"),
    ],
)
def test_training_set_settings_are_validated(override, message):
    register()
    with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base="1.3"):
        good, wrong = (compose("train", overrides=["data=gldv2x", *more]) for more in ([], [override]))
    settings = validate_config(good, TrainConfig).data
    assert (settings.table, settings.classes_of) == ("train.csv", "train_clean.csv")
    with pytest.raises(InputError, match=message):
        validate_config(wrong, TrainConfig)


def test_images_are_read_from_the_folders_and_missing_ones_are_reported(tmp_path):
    photos = replace(train_list([2]), root=tmp_path)
    photos.path(0).parent.mkdir(parents=True)
    photos.path(0).write_bytes(b"bytes")
    assert photos.read(0) == b"bytes"
    assert photos.location(1) == str(photos.path(1))
    with pytest.raises(CorruptImageError, match="missing"):
        photos.read(1)
    assert pickle.loads(pickle.dumps(photos)).read(0) == b"bytes"


def train_list(counts: list[int]) -> TrainList:
    """Return a list with the given number of images per landmark."""
    labels = np.repeat(np.arange(len(counts)), counts)
    ids = np.array([f"{i:016x}".encode() for i in range(len(labels))])
    return TrainList(Path("train"), ids, labels, 10 * np.arange(len(counts)))


@pytest.mark.parametrize(("landmarks", "expected"), [(4, 2), (5, 2), (30, 6), (1000, 50)])
def test_the_default_number_of_held_out_classes_fits_small_and_large_sets(landmarks, expected):
    train, held = split_landmarks(train_list([3] * landmarks), None, seed=0)
    assert (len(train.landmarks), len(held.landmarks)) == (landmarks - expected, expected)


def test_a_csv_file_and_folders_of_the_same_classes_are_the_same_list(tmp_path):
    names = ["b/2.jpg", "a/1.jpg", "b/1.jpg", "a/0.jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    write(tmp_path, "labels.csv", "path,label\n" + "".join(f"{name},{name[0]}\n" for name in names))
    photos = read_train(tmp_path, None)
    assert photos.digest() == read_train(tmp_path / "labels.csv", None).digest()
    assert photos.labels.tolist() == [0, 0, 1, 1]
    for index, label in enumerate("aabb"):
        assert pickle.loads(pickle.dumps(photos)).read(index).decode().startswith(label)
        assert photos.location(index) == str(photos.path(index))
        assert photos.path(index).read_bytes() == photos.read(index)
    with pytest.raises(InputError, match="no landmark has 3 images"):
        read_train(tmp_path, None, min_images=3)


def test_whole_landmarks_are_held_out_depending_on_the_seed():
    photos = train_list([3] * 50)
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
