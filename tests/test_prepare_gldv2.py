"""`superglobal prepare-gldv2`: the check of images in folders and tar files, and the index that it writes."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from runs import environment
from sets import break_scan, make_tars

from superglobal import cli
from superglobal.data import prepare_gldv2 as module
from superglobal.data.gldv2 import TrainList, read_train
from superglobal.data.image_index import load_index
from superglobal.data.images import CorruptImageError
from superglobal.data.prepare_gldv2 import prepare
from superglobal.errors import InputError

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "superglobal", "prepare-gldv2"]
ENVIRONMENT = environment(PYTHONPATH=str(ROOT))


@pytest.fixture
def run(capfd):
    """Run the command in this process to save imports; two tests run it in a process of its own."""

    def call(*arguments: object, status: int) -> str:
        try:
            code = cli.main(["prepare-gldv2", *map(str, arguments)])
        except SystemExit as end:
            code = end.code
        text = "".join(capfd.readouterr())
        assert code == status, text
        return text

    return call


@pytest.fixture
def root(toy_data, tmp_path) -> Path:
    """Copy the training images and the lists of the toy set."""
    root = tmp_path / "gldv2"
    shutil.copytree(toy_data / "toy" / "gldv2" / "train", root / "train")
    for name in ("train.csv", "train_clean.csv"):
        shutil.copy(toy_data / "toy" / "gldv2" / name, root)
    return root


def damage(photos: TrainList) -> dict[Path, str]:
    """Damage one image in each way; return a part of the reason for each."""
    paths = [photos.path(index) for index in range(5)]
    paths[0].unlink()
    paths[1].write_bytes(b"")
    paths[2].write_bytes(paths[2].read_bytes()[:-300])
    paths[3].write_bytes(b"<!DOCTYPE html><title>404</title>")
    paths[4].write_bytes(bytes(1000))
    return dict(zip(paths, ["missing", "empty", "truncated", "not an image", "not an image"], strict=True))


def test_undamaged_folders_pass_the_check(root):
    command = [*COMMAND, "--root", str(root), "--workers", "1"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    photos = read_train(root, min_images=1)
    assert done.returncode == 0, done.stderr
    assert f"all {len(photos)} images are readable" in done.stdout
    assert f"checked {len(photos)}/{len(photos)} images" in done.stderr
    index = load_index(root, "train_clean.csv", None)
    assert np.array_equal(index.ids, np.sort(photos.ids))
    for i in range(0, len(photos), 7):
        assert index.sizes[np.searchsorted(index.ids, photos.ids[i])] == photos.path(i).stat().st_size
    assert len(np.unique(index.codes)) == len(photos)
    assert not list(root.glob(".*"))


def test_every_kind_of_damage_is_detected_counted_and_listed(run, root):
    photos = read_train(root, min_images=1)
    damaged = damage(photos)
    text = run("--root", root, "--workers", 1, status=1)
    assert f"5 of {len(photos)} images are corrupt ({5 / len(photos):.4%})" in text
    assert "data.max_corrupt_fraction" in text
    report = (root / "train_clean.report.txt").read_text()
    listed = dict(line.split("\t") for line in report.splitlines() if "\t" in line)
    assert set(listed) == {str(path) for path in damaged}
    assert all(reason in listed[str(path)] for path, reason in damaged.items())
    assert "2 not an image" in report
    assert load_index(root, "train_clean.csv", None).corrupt_among(photos.ids) == [
        (i, listed[str(photos.path(i))]) for i in range(5)
    ]


def test_damage_inside_a_file_is_detected_by_decoding(root):
    damaged = read_train(root).path(3)
    break_scan(damaged)
    assert prepare(root, workers=1).corrupt == []
    ((location, reason),) = prepare(root, workers=1, decode=True).corrupt
    assert location == str(damaged)
    assert "damaged" in reason


def test_tar_files_give_the_images_of_the_folders(run, root, tmp_path):
    tree = read_train(root)
    folder = make_tars(read_train(root, min_images=1), tmp_path / "tars")
    prepare(root, workers=1)
    codes = load_index(root, "train_clean.csv", None).codes
    run("--root", root, "--tars", folder, "--workers", 2, status=0)
    assert np.array_equal(load_index(root, "train_clean.csv", folder).codes, codes)
    shutil.rmtree(root / "train")
    photos = read_train(root, tars=folder)
    assert photos.digest() == tree.digest()
    assert photos.location(1).endswith(f".tar:{tree.path(1).relative_to(tree.root)}")
    assert str(folder / "images_") in photos.location(1)
    for i in range(len(photos)):
        with tarfile.open(photos.location(i).split(":")[0]) as tar:
            assert photos.read(i) == tar.extractfile(photos.location(i).split(":")[1]).read()


def test_tar_files_that_change_during_a_run_raise_errors(root, tmp_path):
    folder = make_tars(read_train(root, min_images=1), tmp_path / "tars")
    prepare(root, tars=folder, workers=1)
    photos = read_train(root, tars=folder)
    for path in folder.iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CorruptImageError, match="not at the position that the index contains"):
        photos.read(0)
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(CorruptImageError, match=r"missing \(images_00\d\.tar does not exist"):
        read_train(root).read(0) and pickle.loads(pickle.dumps(photos)).read(0)


def test_truncated_tar_files_and_missing_members_are_reported(root, tmp_path):
    everything = read_train(root, min_images=1)
    total = len(everything)
    lacking = TrainList(everything.root, everything.ids[1:], everything.labels[1:], everything.landmarks)
    folder = make_tars(lacking, tmp_path / "tars")
    last = folder / "images_002.tar"
    with tarfile.open(last) as tar:
        members = tar.getmembers()
    os.truncate(last, members[-2].offset_data + members[-2].size - 100)
    prepared = prepare(root, tars=folder, workers=1)
    reasons = {Path(location.split(":")[1]).name: reason for location, reason in prepared.corrupt}
    assert reasons.pop(everything.path(0).name) == "missing"
    assert reasons.pop(Path(members[-1].name).name) == "missing"
    assert "truncated" in reasons.pop(Path(members[-2].name).name)
    assert not reasons
    assert "truncated" in prepared.report.read_text()
    assert str(last) in prepared.tar_problems[0]
    assert f"{total} images, 3 missing or corrupt" in prepared.report.read_text()


def test_an_index_that_does_not_match_is_an_error_that_names_the_command(root, tmp_path):
    folder = make_tars(read_train(root, min_images=1), tmp_path / "tars")
    table = "train_clean.csv"
    command = f"superglobal prepare-gldv2 --root {root} --table {table}"
    with pytest.raises(InputError, match="not found") as caught:
        load_index(root, table, None)
    assert command in str(caught.value)
    prepare(root, workers=1)
    with pytest.raises(InputError, match="folder tree") as caught:
        load_index(root, table, folder)
    assert f"{command} --tars {folder}" in str(caught.value)
    prepare(root, tars=folder, workers=1)
    with pytest.raises(InputError, match="tar files"):
        load_index(root, table, None)
    with tarfile.open(folder / "images_000.tar", "a") as tar:
        tar.add(__file__, "one_more.txt")
        tar.add(__file__, "and_more.txt")
    with pytest.raises(InputError, match=r"images_000.tar has changed"):
        load_index(root, table, folder)
    prepare(root, workers=1)
    lines = (root / table).read_text().splitlines()
    (root / table).write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(InputError, match=r"train_clean.csv has changed"):
        load_index(root, table, None)
    (root / "train_clean.index.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(InputError, match="damaged"):
        load_index(root, table, None)


def test_a_killed_run_resumes(root, tmp_path, monkeypatch):
    """Finished shards are not checked again, so an image removed from one in the meantime is not noticed."""
    monkeypatch.setattr(module, "_SHARD", 16)
    photos = read_train(root, min_images=1)
    order = np.argsort(photos.ids)
    code = """
import os, signal, sys
from superglobal.data import prepare_gldv2
prepare_gldv2._SHARD = 16
kill = lambda done, total: done and os.kill(os.getpid(), signal.SIGKILL)
prepare_gldv2.prepare(sys.argv[1], workers=1, progress=kill)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(root)], env=ENVIRONMENT)
    assert killed.returncode == -signal.SIGKILL
    assert not (root / "train_clean.index.npz").exists()
    parts = sorted((root / ".train_clean.index.parts").glob("*.npz"))
    assert parts
    parts.append(parts[0].with_name(f"{16 * len(parts):08d}.npz"))  # the first missing shard
    lost = [photos.path(int(order[0])), photos.path(int(order[16 * (len(parts) - 1)]))]
    for path in lost:
        path.unlink()
    assert [location for location, _ in prepare(root, workers=1).corrupt] == [str(lost[1])]
    # A finished run leaves no shards, so the next run checks every image again.
    assert [location for location, _ in prepare(root, workers=1).corrupt] == sorted(str(path) for path in lost)


def test_ctrl_c_prints_how_to_resume(root):
    stuck = next((root / "train").rglob("*.jpg"))
    stuck.unlink()
    os.mkfifo(stuck)  # opening a pipe blocks, so that the run cannot end too early
    command = [*COMMAND, "--root", str(root), "--decode", "--workers", "2", "--table", "train.csv"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (root / ".train.index.parts" / "parts.json").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[1]
    assert process.returncode == 130, text
    assert "run the same command again to resume" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--root", "ROOT/nowhere"], ["training list not found"]),
        (["--root", "ROOT", "--tars", "ROOT/train"], ["no tar files", "images_000.tar"]),
        (["--root", "ROOT", "--workers", "0"], ["workers=0"]),
        (["--root", "ROOT", "--table", "train.txt"], ["training list not found"]),
    ],
)
def test_invalid_arguments_print_a_message(run, root, arguments, words):
    text = run(*(word.replace("ROOT", str(root)) for word in arguments), status=2)
    assert all(word in text for word in words)


def test_a_tar_file_that_is_not_a_regular_file_is_an_error(root, tmp_path):
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "images_000.tar").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"images_000\.tar: not a file"):
        prepare(root, tars=tmp_path / "tars", workers=1)


@pytest.mark.parametrize(
    "change",
    [
        {"type": tarfile.SYMTYPE, "linkname": "b.jpg"},
        {"type": tarfile.LNKTYPE, "linkname": "b.jpg"},
        {"type": tarfile.FIFOTYPE},
        {"type": tarfile.CHRTYPE},
        {"type": tarfile.DIRTYPE},
        {"pax_headers": {"GNU.sparse.map": "0,3", "GNU.sparse.size": "9"}},
    ],
)
def test_members_of_tar_files_that_are_not_regular_files_count_as_missing(root, tmp_path, change):
    photos = read_train(root, min_images=1)
    folder = make_tars(photos, tmp_path / "tars", 1)
    replaced = photos.path(0).relative_to(photos.root)
    with tarfile.open(folder / "images_000.tar", "w") as tar:
        for index in range(1, len(photos)):
            tar.add(photos.path(index), photos.path(index).relative_to(photos.root))
        member = tarfile.TarInfo(str(replaced))
        for name, value in {"size": 3 if "pax_headers" in change else 0, **change}.items():
            setattr(member, name, value)
        tar.addfile(member, io.BytesIO(b"abc"))
    prepared = prepare(root, tars=folder, workers=1)
    assert [reason for _, reason in prepared.corrupt] == ["missing"]


def test_a_list_without_images_is_an_error(root):
    shutil.rmtree(root / "train")
    with pytest.raises(InputError, match="images not found") as caught:
        prepare(root, workers=1)
    assert "https://" in str(caught.value)


def test_an_index_with_unexpected_arrays_is_an_error(root):
    prepare(root, workers=1)
    np.savez(root / "train_clean.index.npz", ids=np.zeros(3))
    with pytest.raises(InputError, match="damaged"):
        load_index(root, "train_clean.csv", None)
